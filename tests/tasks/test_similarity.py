"""Metrics of features: the cosine with something fixed, and the projection on a direction."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

import circuitvit as cv
from circuitvit.engine.state import task_digest
from circuitvit.errors import DataError, OptionError
from circuitvit.tasks import as_task, select_pairs
from circuitvit.tasks.images import load_image
from circuitvit.tasks.metrics import BoundMetric
from circuitvit.verification import robustness
from circuitvit.views.attribution import attribution_of_task
from circuitvit.views.lens import logit_lens
from tests.rightness import CLEAN, CORRUPT, micro

WIDTH = 24


@cache
def features() -> cv.Model:
    """A model without a classifier."""
    return cv.wrap(micro(num_classes=0))


@pytest.fixture(scope="module")
def model() -> cv.Model:
    return features()


def vector(seed: int = 0) -> Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bound(model: cv.Model, metric: Any, pairs: int = 2) -> BoundMetric:
    return cv.Task(CLEAN[:pairs], CORRUPT[:pairs], metric).prepare(model).metric


def measured(model: cv.Model, metric: Any, outputs: Tensor, clean: Tensor | None = None) -> Tensor:
    rows = torch.arange(outputs.shape[-2])
    return bound(model, metric)(outputs, outputs if clean is None else clean, rows)


# -- what they are -------------------------------------------------------------------------------


def test_they_are_the_cosine_and_the_inner_product(model: cv.Model) -> None:
    outputs, other = model(CLEAN), vector()
    cosine = measured(model, cv.similarity(other), outputs)
    torch.testing.assert_close(cosine, F.cosine_similarity(outputs, other, dim=-1))
    torch.testing.assert_close(measured(model, cv.projection(other), outputs), outputs @ other)
    candidates = torch.stack([outputs, 3 * outputs, -outputs])
    found = measured(model, cv.similarity(other), candidates)
    torch.testing.assert_close(found, torch.stack([cosine, cosine, -cosine]))


def test_an_image_stands_for_the_models_output(model: cv.Model, tmp_path: Path) -> None:
    expected = F.cosine_similarity(model(CORRUPT), model(CLEAN[:1]), dim=-1)
    torch.testing.assert_close(measured(model, cv.similarity(CLEAN[0]), model(CORRUPT)), expected)
    noise = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cat.png")
    seen = load_image(tmp_path / "cat.png", model.preprocessing)[None].double()
    expected = F.cosine_similarity(model(CORRUPT), model(seen), dim=-1)
    torch.testing.assert_close(
        measured(model, cv.similarity(to=tmp_path / "cat.png"), model(CORRUPT)), expected
    )
    assert bound(model, cv.similarity(to=str(tmp_path / "cat.png"))).label == "similarity(cat.png)"


def test_left_out_it_is_each_clean_images_own_output(model: cv.Model) -> None:
    clean, corrupt = model(CLEAN), model(CORRUPT)
    expected = F.cosine_similarity(corrupt, clean, dim=-1)
    torch.testing.assert_close(measured(model, cv.similarity(), corrupt, clean), expected)
    torch.testing.assert_close(
        measured(model, "similarity", clean, clean), torch.ones(2, dtype=torch.float64)
    )


@pytest.mark.parametrize("kind", ["list", "array", "float32", "npy", "safetensors"])
def test_a_vector_is_given_in_many_ways(model: cv.Model, tmp_path: Path, kind: str) -> None:
    plain = vector().float()
    np.save(tmp_path / "v.npy", plain.numpy())
    save_file({"direction": plain}, tmp_path / "v.safetensors")
    given: dict[str, Any] = {
        "list": plain.tolist(), "array": plain.numpy(), "float32": plain,
        "npy": str(tmp_path / "v.npy"), "safetensors": tmp_path / "v.safetensors",
    }  # fmt: skip
    found = measured(model, cv.projection(given[kind]), model(CLEAN))
    torch.testing.assert_close(found, model(CLEAN) @ plain.double())


# -- what methods do with them -------------------------------------------------------------------


@pytest.mark.parametrize("make", [cv.similarity, cv.projection])
def test_eap_is_their_finite_difference(model: cv.Model, make: Callable[..., Any]) -> None:
    """Along a step of the last receiver's input, by a literal formula of the module's own norm."""
    other, step = vector(), 1e-5
    last = model.layers[-1].nodes.senders[0]
    scores = cv.attribute(model, cv.Task(CLEAN, CORRUPT, make(other)), "eap", progress=False)

    def written(images: Tensor) -> tuple[Tensor, Tensor]:
        stream = model.embed(images)
        for layer in model.layers:
            compact = layer.write(layer.read(stream))
            stream = layer.add(stream, compact)
        return stream, layer.expand(compact)[0]

    def formula(stream: Tensor) -> Tensor:
        features = model.module.norm(stream)[:, 0]
        inner = features @ other
        return (inner / (features.norm(dim=-1) * other.norm()) if make is cv.similarity else inner).mean()

    (stream, own), (_, reference) = written(CLEAN), written(CORRUPT)
    moved = [formula(stream + share * (reference - own)) for share in (step, -step)]
    slope = float(moved[0] - moved[1]) / (2 * step)
    assert scores[f"{last}->logits"] == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("metric", [cv.similarity(vector()), cv.projection(vector()), cv.similarity()])
def test_scores_do_not_depend_on_the_batch_size(model: cv.Model, metric: Any) -> None:
    task = cv.Task(CLEAN, CORRUPT, metric)
    one, two = (cv.attribute(model, task, "exact", batch_size=n, progress=False).values for n in (1, 2))
    np.testing.assert_allclose(one, two, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_digits_of_a_cosine(dtype: torch.dtype) -> None:
    half = cv.wrap(micro(num_classes=0).to(dtype))
    outputs = half(CLEAN.to(dtype))
    found = measured(half, cv.similarity(vector()), outputs)
    torch.testing.assert_close(found, F.cosine_similarity(outputs.float(), vector().float(), dim=-1))
    assert found.dtype == torch.float32
    scores = cv.attribute(half, cv.Task(CLEAN, CORRUPT, cv.similarity(vector())), "eap", progress=False)
    assert np.isfinite(scores.values).all()


def test_a_circuit_is_found_verified_and_reported_by_the_metric(model: cv.Model) -> None:
    task = cv.Task(CLEAN[:1], CORRUPT[:1], cv.similarity(to=CORRUPT[0]))
    found = cv.find(model, task, plan=cv.Plan(0, 200, 1), progress=False)
    report = cv.verify(model, task, found.circuit, n_random=3, progress=False)
    assert 0.9 <= report.task.faithfulness.value <= 1.1
    assert (report.task.agreement, report.task.kl) == (None, None)
    said = found.summary + report.to_markdown()
    assert "similarity(image " in said
    assert "class" not in said
    assert "metric" not in {row.kind for row in robustness(model, task, found.circuit).rows}


def test_shares_of_a_projection_add_up(model: cv.Model) -> None:
    clean, _ = attribution_of_task(model, cv.Task(CLEAN, CORRUPT, cv.projection(vector())))
    np.testing.assert_allclose(clean.total, model(CLEAN) @ vector(), rtol=1e-9)
    with pytest.raises(OptionError, match="not a sum of shares"):
        attribution_of_task(model, cv.Task(CLEAN, CORRUPT, cv.similarity(vector())))


def test_the_lens_is_refused(model: cv.Model) -> None:
    with pytest.raises(OptionError, match=r"no classes, .*cv\.fit_head"):
        logit_lens(model, CLEAN)


@pytest.mark.parametrize("metric", [cv.similarity(), cv.similarity(CLEAN[0])])
def test_the_clean_run_itself_has_no_gradient(model: cv.Model, metric: Any) -> None:
    """A cosine with itself is at its maximum: scores by gradient would be rounding."""
    task = cv.Task(CLEAN[:1], CORRUPT[:1], metric)
    with pytest.raises(OptionError, match="similarity is flat at the clean run"):
        cv.attribute(model, task, "eap", progress=False)
    assert cv.attribute(model, task, "eap-ig", progress=False).values.any()
    both = cv.Task(CLEAN, CORRUPT, cv.similarity(CLEAN[0])).prepare(model)
    assert not both.metric.flat_at_clean


# -- tasks keep them -----------------------------------------------------------------------------


def test_a_task_is_told_apart_by_its_vector(model: cv.Model) -> None:
    def prepared(metric: Any) -> Any:
        return cv.Task(CLEAN, CORRUPT, metric).prepare(model)

    one, two = (prepared(cv.projection(vector(seed))) for seed in (0, 1))
    assert task_digest(one) != task_digest(two)
    assert task_digest(one) == task_digest(prepared(cv.projection(vector())))
    assert one.metric.label != two.metric.label
    assert one.metric.label.startswith("projection(vector ")
    assert one.metric.label in cv.attribute(model, one, "eap", progress=False).provenance.task
    for again in (select_pairs(one, [1, 0]), as_task(one).prepare(model)):
        assert torch.equal(again.metric.vector, one.metric.vector)
        assert again.metric.label == one.metric.label
    assert "to tensor 24" in repr(cv.Task(CLEAN, CORRUPT, cv.projection(vector())))


# -- refusals ------------------------------------------------------------------------------------


@given(width=st.integers(0, 40), seed=st.integers(0, 5), make=st.sampled_from([cv.similarity, cv.projection]))
def test_a_vector_of_another_width_is_refused(width: int, seed: int, make: Callable[..., Any]) -> None:
    model = features()
    given = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    if width == WIDTH:
        assert bound(model, make(given)).vector is not None
        return
    with pytest.raises(DataError, match=rf"shape \({width},\), and the model gives 24 outputs"):
        bound(model, make(given))


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (cv.similarity(torch.zeros(WIDTH)), "what the outputs are compared with is zero"),
        (cv.projection(torch.zeros(WIDTH)), "the direction is zero"),
        (cv.projection([float("nan")] * WIDTH), "the direction holds NaN"),
        (cv.projection([float("inf")] * WIDTH), "the direction holds NaN or infinite"),
        (cv.projection(torch.ones(2, WIDTH)), r"shape \(2, 24\)"),
        (cv.projection(torch.ones(WIDTH) > 0), "no vector of real numbers"),
        (cv.projection(np.array(["a"] * WIDTH)), "no vector of numbers"),
        (cv.projection("missing.npy"), r"cannot read the vector missing\.npy"),
        (cv.similarity("missing.png"), r"no image missing\.png"),
        (cv.similarity(CLEAN), "to one image, not to 2"),
        (cv.similarity(torch.zeros(3, 8, 8)), r"images of shape \(3, 8, 8\)"),
        (cv.projection(CLEAN[0]), "a vector.*and not an image: similarity takes an image"),
        ("projection", "needs a direction"),
    ],
)
def test_what_cannot_be_compared_with(model: cv.Model, metric: Any, message: str) -> None:
    with pytest.raises((DataError, OptionError), match=message):
        bound(model, metric)


def test_files_that_hold_no_vector(model: cv.Model, tmp_path: Path) -> None:
    (tmp_path / "v.npy").write_bytes(b"nonsense")
    (tmp_path / "v.safetensors").write_bytes(b"nonsense")
    save_file({"a": vector(), "b": vector()}, tmp_path / "two.safetensors")
    for name in ("v.npy", "v.safetensors", "two.safetensors"):
        with pytest.raises(DataError, match="cannot read the vector"):
            bound(model, cv.projection(tmp_path / name))


def test_outputs_of_zero_have_no_cosine(model: cv.Model) -> None:
    with pytest.raises(DataError, match="NaN or infinite for image 0"):
        measured(model, cv.similarity(vector()), torch.zeros(2, WIDTH, dtype=torch.float64))

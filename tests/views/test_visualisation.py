"""Images made by gradient ascent: an optimum that is known, circuits, repeatability, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import circuitvit as cv
from circuitvit.cli.inside import view
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.errors import DataError, ModelError, NameNotFoundError, OptionError
from circuitvit.models.timm_import import import_timm
from circuitvit.views import feature_visualisation

QUICK: dict[str, Any] = {"count": 1, "steps": 12, "progress": False}


@pytest.fixture(scope="module")
def model() -> cv.Model:
    return cv.load("catdog-tiny")


def waves(side: int = 16) -> torch.Tensor:
    """A patch filter of two values, whose product with an image in a range is largest for itself."""
    place = (torch.arange(side) + 0.5) / side - 0.5
    row, column = torch.meshgrid(place, place, indexing="ij")
    return torch.cos(2 * torch.pi * (1.5 * column + row)).sign()


def with_filter(pattern: torch.Tensor) -> cv.Model:
    """A model of one patch, of whose embedding unit 3 is the image's product with a pattern."""
    family = import_timm().models.vision_transformer.VisionTransformer
    side = len(pattern)
    module = family(img_size=side, patch_size=side, embed_dim=8, depth=1, num_heads=2, num_classes=2)
    with torch.no_grad():
        module.patch_embed.proj.weight[3] = pattern
    return cv.wrap(module.eval(), name="filter")


def correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(np.corrcoef(one.numpy().ravel(), other.numpy().ravel())[0, 1])


# -- known answers -------------------------------------------------------------------------------


def test_of_a_linear_unit_the_image_is_its_filter() -> None:
    pattern = waves()
    toy = with_filter(pattern)
    options: dict[str, Any] = {"count": 2, "steps": 40, "rate": 0.2, "jitter": 0, "progress": False}
    made = feature_visualisation(toy, "input[3]@patch", **options)
    axis = torch.zeros(8)
    axis[3] = 2.5
    along = feature_visualisation(toy, "input", direction=axis, **options)
    for image in made.images:
        assert correlation(image.mean(dim=0), pattern) > 0.9
    torch.testing.assert_close(along.images, made.images)
    np.testing.assert_allclose(along.values, made.values, atol=1e-5)
    assert made.values.min() > 5 * np.abs(made.random).max()


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        ("m3.hidden", {"unit": 5}),
        ("a1.h1", {}),
        ("a2.h3<q>@cls", {"unit": 0}),
        ("a2.h3.pattern@patch(2,2)->cls", {}),
        ("resid2", {"direction": torch.ones(64), "tokens": "cls"}),
    ],
)
def test_the_objective_rises_and_beats_random_images(
    model: cv.Model, objective: str, options: dict[str, Any]
) -> None:
    made = feature_visualisation(model, objective, **options, count=2, steps=20, progress=False)
    assert made.history.shape == (2, 20)
    assert (made.history[:, -5:].mean(axis=1) > made.history[:, 0]).all()
    assert made.values.min() > made.random.mean()
    assert made.random.shape == (32,)
    assert made.images.shape == (2, 3, 48, 48)
    assert made.images.abs().max() <= 1  # pixels from 0 to 1, as the model normalises them


def test_values_are_those_of_the_plain_model(model: cv.Model) -> None:
    pairs = catdog_pairs(5, seed=0)
    made = feature_visualisation(model, "logits", unit="dog", reference=pairs.clean, **QUICK)
    np.testing.assert_allclose(made.values, model(made.images)[:, 1], atol=1e-5)
    np.testing.assert_allclose(made.reference, model(pairs.clean)[:, 1], atol=1e-5)
    best = int(made.reference.argmax())
    assert made.best_names[0] == f"image {best}"
    assert torch.equal(made.best[0], pairs.clean[best])
    hidden = feature_visualisation(model, "m3.hidden", unit=7, **QUICK)
    expected = model.activations(hidden.images, "m3.hidden", tokens="patch")["m3.hidden"][..., 7].mean(dim=1)
    np.testing.assert_allclose(hidden.values, expected, atol=1e-6)


# -- circuits and functions ----------------------------------------------------------------------


@pytest.mark.parametrize("groups", [None, "kind"])
def test_of_a_circuit_it_is_the_logit_with_the_rest_ablated(model: cv.Model, groups: str | None) -> None:
    pairs = catdog_pairs(6, seed=0)
    task = cv.Task(pairs.clean, pairs.corrupt, metric=cv.logit("cat"), ablation="mean", groups=groups)
    circuit = cv.attribute(model, task, "eap", progress=False).connected(30)
    made = feature_visualisation(model, circuit, unit="cat", task=task, reference=pairs.clean, **QUICK)
    evaluator = cv.engine.Evaluator(task.prepare(model))
    np.testing.assert_allclose(made.reference, evaluator.measure([circuit])[0].values, atol=1e-4)
    full = cv.Circuit.full(circuit.graph)
    whole = feature_visualisation(model, full, unit="cat", task=task, **QUICK)
    plain = feature_visualisation(model, "logits", unit="cat", **QUICK)
    np.testing.assert_allclose(whole.history, plain.history, atol=1e-3)
    assert made.label == f"cat in a circuit of {len(circuit)} edges"


def test_a_function_of_images_will_do(model: cv.Model) -> None:
    def brightness(images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(1, 2, 3))

    made = feature_visualisation(model, brightness, count=1, steps=40, jitter=0, progress=False)
    assert made.label == "brightness"
    assert made.values[0] > 0.15
    with pytest.raises(OptionError, match="differentiable number for each image"):
        feature_visualisation(model, lambda images: images.mean(), **QUICK)
    with pytest.raises(ModelError, match="NaN or infinite at step 1"):
        feature_visualisation(
            model, lambda images: images.mean(dim=(1, 2, 3)).neg().abs().neg().log(), **QUICK
        )
    with pytest.raises(DataError, match="nothing to climb"):
        feature_visualisation(model, lambda images: 0 * images.mean(dim=(1, 2, 3)), **QUICK)


# -- repeatability, edits, other models ------------------------------------------------------------


def test_an_image_depends_on_its_seed_alone(model: cv.Model) -> None:
    options: dict[str, Any] = {"unit": "cat", "steps": 4, "progress": False}
    three = feature_visualisation(model, "logits", count=3, seed=5, **options)
    again = feature_visualisation(model, "logits", count=3, seed=5, **options)
    assert torch.equal(three.images, again.images)
    assert three.history.tobytes() == again.history.tobytes()
    alone = feature_visualisation(model, "logits", count=3, seed=5, batch_size=1, **options)
    torch.testing.assert_close(three.images, alone.images, atol=1e-3, rtol=0)
    last = feature_visualisation(model, "logits", count=1, seed=7, **options)
    torch.testing.assert_close(three.images[2:], last.images, atol=1e-3, rtol=0)
    assert not torch.allclose(three.images[0], three.images[1], atol=0.05)


def test_the_users_model_gets_no_gradient_and_edits_count(model: cv.Model) -> None:
    edited = model.edit({"logits": lambda x, at: -x})
    made = feature_visualisation(edited, "logits", unit="cat", **QUICK)
    np.testing.assert_allclose(made.values, -model(made.images)[:, 0], atol=1e-5)
    assert all(parameter.grad is None for parameter in model.module.parameters())
    with torch.no_grad():
        inside = feature_visualisation(edited, "logits", unit="cat", **QUICK)
    assert torch.equal(inside.images, made.images)


def test_grey_models_and_other_dtypes_are_visualised() -> None:
    made = feature_visualisation(cv.load("digits-tiny"), "logits", unit=3, **QUICK)
    assert made.images.shape[1] == 1
    assert made.pictures.shape[-1] == 3
    double = feature_visualisation(cv.load("digits-tiny", dtype=torch.float64), "logits", unit=3, **QUICK)
    torch.testing.assert_close(double.images, made.images, atol=1e-2, rtol=0)


def test_the_figure_shows_photographs_only_if_they_may_be_seen(model: cv.Model, tmp_path: Path) -> None:
    pairs = catdog_pairs(5, seed=0)
    made = feature_visualisation(model, "m3.hidden", unit=5, reference=pairs.clean, **QUICK)
    with_, without = (made.figure(picture=shown) for shown in (True, False))
    assert len(with_.subfigs[0].axes) > len(without.subfigs[0].axes) or with_.get_size_inches()[0] > 4.5
    assert with_.save(tmp_path / "a.png").read_bytes() == made.figure().save(tmp_path / "b.png").read_bytes()
    assert without.save(tmp_path / "c.png").read_bytes() != (tmp_path / "a.png").read_bytes()
    assert "5 reference images up to" in repr(made)


@pytest.mark.slow
def test_a_neuron_of_the_real_model_answers_more_than_to_photographs(shared_data: Path) -> None:
    real = cv.load(
        "vit_tiny_patch16_224", checkpoint=shared_data / "weights" / "vit_tiny_patch16_224.safetensors"
    )
    photos = sorted((shared_data / "images" / "imagenet").glob("*.jpg"))[::80]
    made = feature_visualisation(
        real, "m5.hidden", unit=17, reference=photos, count=1, steps=16, progress=False
    )
    assert made.values.min() > 1 > 5 * made.reference.max()  # 2.7, and 0.05


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        ("m*.hidden", {"unit": 1}, "means 4 sites"),
        ("m3.hidden", {"unit": 999}, "has units 0 to"),
        ("m3.hidden[4]@cls", {"unit": 4}, "names a unit already"),
        ("m3.hidden", {"unit": "cat"}, "has units 0 to"),
        ("m3.hidden", {"unit": 1, "direction": torch.ones(128)}, "a unit or a direction"),
        ("m3.hidden", {"direction": torch.ones(3)}, "a tensor of 128 numbers"),
        ("m3.hidden", {"direction": torch.zeros(128)}, "direction is 0"),
        ("m3.hidden@moon", {"unit": 1}, "no tokens are called 'moon'"),
        ("a1.h1.pattern", {}, "write @patch->cls"),
        ("logits", {}, "of which class"),
        ("logits", {"unit": 0, "steps": 0}, "steps must be at least 1"),
        ("logits", {"unit": 0, "jitter": -1}, "jitter must be"),
        ("logits", {"unit": 0, "task": object()}, "a task is for a circuit"),
        (torch.nn.Identity(), {"unit": 0}, "leave out unit="),
    ],
)
def test_what_makes_no_sense_is_refused(
    model: cv.Model, objective: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        feature_visualisation(model, objective, **{**QUICK, **options})


def test_names_that_are_wrong_are_refused_with_the_nearest(model: cv.Model) -> None:
    with pytest.raises(NameNotFoundError, match="did you mean 'cat'"):
        feature_visualisation(model, "logits", unit="cta", **QUICK)
    with pytest.raises(NameNotFoundError, match=r"m3\.hidden"):
        feature_visualisation(model, "m3.hiden", unit=1, **QUICK)


def test_circuits_need_an_ablation_that_is_the_same_for_all_images(model: cv.Model) -> None:
    pairs = catdog_pairs(2, seed=0)
    task = cv.Task(pairs.clean, pairs.corrupt, metric=cv.logit("cat"))
    circuit = cv.Circuit.full(model.graph)
    with pytest.raises(OptionError, match="patch ablation is of pairs"):
        feature_visualisation(model, circuit, unit="cat", task=task, **QUICK)
    with pytest.raises(OptionError, match="give unit=, the class, and task="):
        feature_visualisation(model, circuit, **QUICK)
    with pytest.raises(OptionError, match="for a site's objective"):
        feature_visualisation(model, circuit, unit="cat", task=task, tokens="cls", **QUICK)


# -- the command line ----------------------------------------------------------------------------


def test_both_commands_write_what_they_find(tmp_path: Path) -> None:
    picture, table = tmp_path / "made.png", tmp_path / "shares.json"
    for arguments, said in (
        (
            ["visualise", "m2.hidden", "--unit", "5", "--steps", "4", "--count", "1", "--out", picture],
            "random",
        ),
        (["disentanglement", "--names", "m3", "--trees", "30", "--out", table], "DCI disentanglement"),
    ):
        result = CliRunner().invoke(view, [*map(str, arguments), "--model", "catdog-tiny"])
        assert result.exit_code == 0, result.output
        assert said in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads(table.read_text())["shares"]["m3"]["species"] > 0.5

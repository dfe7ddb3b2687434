"""Deciders: planted heads that decide, and the statistics of a flip matrix made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import circuitvit as cv
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.errors import DataError, NameNotFoundError, OptionError
from circuitvit.verification import flip_search, patching_map
from circuitvit.views import DeciderHeads, deciders
from tests.verification.cases import images, tiny_model, tiny_task


def of(flips: Any, toward: Any) -> DeciderHeads:
    """A result from a matrix of flips, and of changes towards the other run."""
    n, pairs = np.shape(flips)
    return DeciderHeads(
        names=tuple(f"a{row}.h0" for row in range(n)),
        places=tuple((row, 0) for row in range(n)),
        tokens=("all",) * n,
        pairs=tuple(f"pair {pair}" for pair in range(pairs)),
        left_out=(),
        flips=np.array(flips, dtype=bool),
        changes=-np.array(toward, dtype=np.float64),
        base=np.ones(pairs),
        other=-np.ones(pairs),
        by="sign",
        label="logit_diff",
    )


def test_where_one_head_carries_the_answer_it_decides_every_pair() -> None:
    """In "relay" the answer goes through `a1.h0` of what `a0.h0` finds; all other heads are decoys."""
    relay = cv.compiled("relay")
    task = cv.Task(*relay.pairs(8), metric=cv.logit_diff("yes", "no"))
    found = deciders(relay.model, task, progress=False)
    rates = {name: rate.value for name, rate in zip(found.names, found.rates, strict=True)}
    assert {name for name, rate in rates.items() if rate == 1} == {"a0.h0", "a1.h0"}
    assert all(rate == 0 for name, rate in rates.items() if name not in ("a0.h0", "a1.h0"))
    assert {found.decider(pair) for pair in range(8)} <= {"a0.h0", "a1.h0"}
    assert found.transfer == 1
    assert found.transfer_of(0).value == 1
    assert found.best_of_others.value == 1
    assert found.chance == pytest.approx(2 / len(found.names))
    assert found.p_values[found.names.index("a1.h0")] < 0.01
    at_cls = deciders(relay.model, task, sites="heads", tokens="kind", progress=False)
    rates = {name: rate.value for name, rate in zip(at_cls.names, at_cls.rates, strict=True)}
    assert rates["a0.h0@patch"] == rates["a1.h0@cls"] == 1
    assert rates["a0.h0@cls"] == rates["a1.h0@patch"] == 0


def cats_and_dogs(direction: Any = "noising") -> cv.Task:
    """Six cats with dogs, of which two are the other way round: the model does not get those right."""
    pairs = catdog_pairs(6, seed=0)
    swapped = torch.tensor([False, True, False, False, True, False])[:, None, None, None]
    clean, corrupt = (
        torch.where(swapped, one, other)
        for one, other in ((pairs.corrupt, pairs.clean), (pairs.clean, pairs.corrupt))
    )
    return cv.Task(clean, corrupt, metric=cv.logit_diff("cat", "dog"), direction=direction)


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_changes_and_flips_are_those_of_the_patching_map(direction: Any) -> None:
    model, task = cv.load("catdog-tiny"), cats_and_dogs(direction)
    found = deciders(model, task, sites=("mlps", "patterns"), batch_size=4, progress=False)
    maps = [patching_map(model, task, site, "all", progress=False) for site in ("mlps", "patterns")]
    values, base = np.concatenate([each.values[:, 0] for each in maps]), maps[0].base
    told = [0, 2, 3, 5]
    assert found.left_out == ("image 1 | image 1", "image 4 | image 4")
    assert np.allclose(found.changes, (values - base)[:, told], atol=1e-5)
    assert (found.flips == (np.sign(values) != np.sign(base))[:, told]).all()
    assert np.allclose(found.toward, found.changes * (1 if direction == "denoising" else -1))
    assert found.names[-1] == "a3.h3.pattern"


def test_by_top_class_it_is_the_flip_search() -> None:
    model, task = cv.load("catdog-tiny"), cats_and_dogs()
    found = deciders(model, task, sites="heads", by="top", progress=False)
    search = flip_search(model, task, tokens="all", narrow=False, progress=False)
    assert not found.left_out
    assert (found.flips == (search.map.tops[:, 0] != search.map.base_tops)).all()
    rates = {name: rate.value for name, rate in zip(found.names, found.rates, strict=True)}
    assert {flip.node: flip.share for flip in search.flips} == {n: r for n, r in rates.items() if r}


def test_the_decider_moves_a_flipped_pair_farthest() -> None:
    found = of([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]], [[3, 1, 9, 1], [2, 2, 1, 1], [9, 9, 9, 9]])
    assert [found.decider(pair) for pair in range(4)] == ["a0.h0", "a1.h0", "a1.h0", None]
    assert found.transfer == pytest.approx(np.mean([1 / 3, 2 / 3, 2 / 3]))
    assert found.transfer_of(1).value == pytest.approx(2 / 3)
    assert found.chance == pytest.approx(5 / 12)
    assert found.order == (1, 0, 2)
    # Without pair 2 both of the first two flip two pairs; a0.h0 moves those farther, and does not flip it.
    assert found.best_of_others.value == pytest.approx(0.5)
    with pytest.raises(DataError, match="no single candidate flips pair 3"):
        found.transfer_of(3)
    assert any("1 of 4 pairs are flipped by no candidate" in each for each in found.caveats)


def test_chance_looks_like_chance_and_a_sure_head_does_not() -> None:
    rng = np.random.default_rng(0)
    noise = of(rng.random((30, 20)) < 0.1, rng.random((30, 20)))
    assert noise.p_values.min() > 0.05
    assert noise.transfer_p > 0.05
    flips = rng.random((30, 20)) < 0.05
    flips[7] = True
    sure = of(flips, rng.random((30, 20)) + flips)
    assert sure.p_values[7] < 0.002
    assert np.delete(sure.p_values, 7).min() > 0.05
    low, high = sure.rates[7].low, sure.rates[7].high
    assert (low, high) == (pytest.approx(0.025 ** (1 / 20)), 1.0)  # Clopper and Pearson for 20 of 20


def test_agreement_is_one_for_pairs_that_rank_alike_and_minus_one_for_opposites() -> None:
    alike = np.outer(np.arange(5.0), [1, 2, 3, 4, 5, 6])
    assert of(alike > 9, alike).agreement.value == pytest.approx(1)
    two = np.stack([np.arange(5.0), -np.arange(5.0)], axis=1)
    assert of(two > 9, two).agreement.value == pytest.approx(-1)


def test_data_and_figures(tmp_path: Path) -> None:
    model = cv.load("catdog-tiny")
    task = cv.Task(*catdog_pairs(6, seed=0), metric=cv.logit_diff("cat", "dog"))
    found = deciders(model, task, tokens="kind", progress=False)
    again = deciders(model, task, tokens="kind", batch_size=2, progress=False)
    assert found.to_dict()["deciders"] == again.to_dict()["deciders"]
    said = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert len(said["candidates"]) == 3 * 20 == len(found.names)
    assert found.names[:3] == ("a0.h0", "a0.h0@cls", "a0.h0@patch")
    assert found.names[found.order[0]] in found.table()
    assert repr(found).startswith("DeciderHeads(60 candidates, 6 pairs: ")
    json.dumps(of([[1], [0]], [[1], [0]]).to_dict(), allow_nan=False)
    pytest.importorskip("matplotlib")
    text = found.figure().save(tmp_path / "deciders.svg").read_text(encoding="utf-8")
    assert "logit_diff(cat, dog), 6 pairs" in text
    assert all(f">{found.names[place]}<" in text for place in found.order[:5])
    drawn = found.figure().axes[1].images[0].get_array()
    assert np.array_equal(np.asarray(drawn)[0], found.toward[found.order[0]])


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"sites": "stream"}, NameNotFoundError, "stream"),
        ({"sites": ()}, NameNotFoundError, "kind of candidate"),
        ({"by": "vote"}, NameNotFoundError, "vote"),
        ({"tokens": {"far": [99]}}, OptionError, "far"),
        ({"seed": -1}, OptionError, "seed"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        deciders(tiny_model(), tiny_task(2), progress=False, **options)


def test_tasks_that_nothing_can_flip_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(DataError, match="corrupt"):
        deciders(model, cv.Task(images(2, 1), metric=cv.logit_diff(0, 1), ablation="mean"), progress=False)
    with pytest.raises(OptionError, match="is no answer"):
        deciders(model, tiny_task(2, metric=cv.logit(0)), progress=False)
    same = cv.Task(images(2, 1), images(2, 1) + 0.0, metric=cv.logit_diff(0, 1))
    with pytest.raises(DataError, match="tells none of 2 pairs apart"):
        deciders(model, same, progress=False)
    with pytest.raises(OptionError, match="no pair 9"):
        of([[1]], [[1]]).decider(9)


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_target_and_foil_the_wrong_way_round_are_told(direction: str) -> None:
    """In a search as in a report, where the figures are right all the same."""
    model, said = cv.load("catdog-tiny"), "the answer is the foil on all of them: exchange target and foil"
    pairs, metric = catdog_pairs(2, seed=1), cv.logit_diff("dog", "cat")
    task = cv.Task(*pairs, metric=metric, direction=direction)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=said):
        deciders(model, task, progress=False)
    everything = cv.Circuit.full(model.graph)
    report = cv.verify(model, task, everything, n_random=0, progress=False)
    assert any(said in warning for warning in report.warnings)
    right = task.with_options(metric=cv.logit_diff("cat", "dog"))
    report = cv.verify(model, right, everything, n_random=0, progress=False)
    assert not any(said in warning for warning in report.warnings)
    if direction == "noising":
        plan = cv.Plan(steps=0, trim_runs=1, batch_size=2)
        assert said in cv.find(model, task, plan=plan, progress=False).summary


def test_edited_models_are_honoured() -> None:
    relay = cv.compiled("relay")
    task = cv.Task(*relay.pairs(4), metric=cv.logit_diff("yes", "no"))
    acts = relay.model.activations(relay.pairs(4)[0], "a0.h0", progress=False)["a0.h0"]
    frozen = relay.model.edit({"a0.h0": torch.as_tensor(acts)})
    with pytest.raises(DataError, match="apart without a patch"):
        deciders(frozen, task, batch_size=4, progress=False)


def test_a_real_model_has_no_one_decider(shared_data: Path) -> None:
    """On photographs of cats and dogs no single head of ViT-Ti decides them all."""
    model = cv.load(
        "vit_tiny_patch16_224", checkpoint=shared_data / "weights" / "vit_tiny_patch16_224.safetensors"
    )
    folder = shared_data / "images" / "cats_vs_dogs"
    cats, dogs = (sorted((folder / kind).iterdir())[:5] for kind in ("cats", "dogs"))
    task = cv.Task(cats, dogs, metric=cv.logit_diff(list(range(281, 286)), list(range(151, 269))))
    found = deciders(model, task, sites="heads", progress=False)
    assert len(found.names) == 36
    assert found.names[found.order[0]] == "a2.h0"
    assert found.rates[found.order[0]].value < 0.8

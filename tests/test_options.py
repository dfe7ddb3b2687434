"""Settings that make no sense are refused with an error of ours, before anything is run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import circuitvit as cv
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.engine import Evaluator, runs
from circuitvit.errors import CircuitViTError
from circuitvit.graph import Circuit


@pytest.fixture(scope="module")
def model() -> cv.Model:
    return cv.load("catdog-tiny")


@pytest.fixture(scope="module")
def task(model: cv.Model) -> Any:
    return cv.Task(*catdog_pairs(2), metric=cv.logit_diff("cat", "dog")).prepare(model)


NO_COUNT = (0, -1, 1.5, "a", True)
NO_SEED = (-1, 1.5, "a", None)
FIND: dict[str, tuple[Any, ...]] = {
    "batch_size": (*NO_COUNT, None),
    "seed": NO_SEED,
    "within": (None, 0, -1, "x", []),
    "faithfulness": (0, 1, "a", None, True),
    "memory": (0, 1.5, "2 lots"),
    "plan": (3, (1, 2, 3), cv.Plan),
    "start": (3, "half"),
    "state": (3, []),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in FIND for value in FIND[name]])
def test_find(model: cv.Model, task: Any, name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "capture", None)  # nothing may be run
    with pytest.raises(CircuitViTError):
        cv.find(model, task, progress=False, **{name: value})


def scores(model: cv.Model) -> cv.EdgeScores:
    return cv.EdgeScores(model.graph, model.graph.edge_mask * 1.0)


Use = Callable[[cv.Model, Any, Any], Any]
USES: dict[str, tuple[Use, tuple[Any, ...]]] = {
    "eap-ig": (lambda model, task, value: cv.attribute(model, task, "eap-ig", steps=value), NO_COUNT),
    "ceap": (lambda model, task, value: cv.attribute(model, task, "ceap", steps=value), NO_COUNT),
    "method": (lambda model, task, value: cv.attribute(model, task, value), (None, 3, ["eap"])),
    "batch_size": (lambda model, task, value: cv.attribute(model, task, "eap", batch_size=value), NO_COUNT),
    "random": (lambda model, task, value: cv.attribute(model, task, "random", seed=value), NO_SEED),
    "hybrid": (lambda model, task, value: cv.attribute(model, task, "hybrid", budget=value), (0, "a", [])),
    "calibrate": (lambda model, task, value: cv.calibrate(model, task, scores(model), value), NO_COUNT),
    "evaluator": (lambda model, task, value: Evaluator(task, batch_size=value), NO_COUNT),
    "n_random": (
        lambda model, task, value: cv.verify(model, task, Circuit.full(model.graph), n_random=value),
        (-1, 1.5, "a", None),
    ),
    "n_bootstrap": (
        lambda model, task, value: cv.verify(model, task, Circuit.full(model.graph), n_bootstrap=value),
        (*NO_COUNT, None),
    ),
    "verify": (
        lambda model, task, value: cv.verify(model, task, Circuit.full(model.graph), seed=value),
        NO_SEED,
    ),
    "tau": (lambda model, task, value: cv.acdc(model, task, tau=value), (0, -1, "a", None)),
    "threshold": (lambda model, task, value: scores(model).threshold(value), (0, "a", None)),
    "learn_mask": (lambda model, task, value: cv.learn_mask(model, task, value), (*NO_COUNT, 10**6)),
    "thin": (lambda model, task, value: cv.thin(model, task, value), (*NO_COUNT, 10**6, [])),
    "thin rate": (lambda model, task, value: cv.ThinSettings(rate=value), (0, 1, "a", None)),
    "max_runs": (
        lambda model, task, value: cv.refine(model, task, Circuit.full(model.graph), max_runs=value),
        NO_COUNT,
    ),
    "mask steps": (lambda model, task, value: cv.MaskSettings(steps=value), (*NO_COUNT, None)),
    "mask seed": (lambda model, task, value: cv.MaskSettings(seed=value), NO_SEED),
    "plan": (lambda model, task, value: cv.Plan(10, 5, value), (*NO_COUNT, None)),
    "split": (lambda model, task, value: cv.split(model, task, value), (0, 1, "a", None)),
    "ablation": (
        lambda model, task, value: cv.Task(*catdog_pairs(1), ablation=value),
        (None, 3, ["patch"]),
    ),
    "noise": (lambda model, task, value: cv.Noise(scale=value), (0, -1, "a", None)),
}
CASES = [(name, value) for name, (_, values) in USES.items() for value in values]


@pytest.mark.parametrize(("name", "value"), CASES)
def test_others(model: cv.Model, task: Any, name: str, value: Any) -> None:
    with pytest.raises(CircuitViTError):
        USES[name][0](model, task, value)

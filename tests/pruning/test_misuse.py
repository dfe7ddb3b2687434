"""What searches refuse before they start: the wrong graph, a broken metric, the wrong direction, too much."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import circuitvit as cv
from circuitvit.engine import batches, evaluator
from circuitvit.errors import DataError, OptionError
from circuitvit.graph.eap_ig import transformer_graph
from circuitvit.verification.caveats import _about_values
from circuitvit.verification.statistics import Estimate
from tests.pruning.test_find import images, small_module

Search = Callable[[cv.Model, cv.Task], Any]

PLAN = cv.Plan(steps=30, trim_runs=20, batch_size=2)


@pytest.fixture(scope="module")
def model() -> cv.Model:
    return cv.wrap(small_module())


@pytest.fixture(scope="module")
def task() -> cv.Task:
    return cv.Task(images(2, 1), images(2, 2), metric=cv.logit_diff(0, 1))


def full(model: cv.Model) -> cv.Circuit:
    return cv.Circuit.full(model.graph)


SEARCHES: dict[str, Search] = {
    "find": lambda model, task: cv.find(model, task, plan=PLAN, progress=False),
    "refine": lambda model, task: cv.refine(model, task, full(model), progress=False),
    "learn_mask": lambda model, task: cv.learn_mask(model, task, 10, progress=False),
    "thin": lambda model, task: cv.thin(model, task, 10, progress=False),
    "acdc": lambda model, task: cv.acdc(model, task, 0.1, divergence="metric", progress=False),
    "circuit_curve": lambda model, task: cv.circuit_curve(model, task, [], "none", progress=False),
}


@pytest.mark.parametrize("name", list(SEARCHES))
def test_a_metric_that_is_no_number(model: cv.Model, task: cv.Task, name: str) -> None:
    broken = cv.Task(task.clean, task.corrupt, metric=lambda logits: logits[:, 0] * float("nan"))
    with pytest.raises(DataError, match="NaN or infinite"):
        SEARCHES[name](model, broken)


@pytest.mark.parametrize("name", list(SEARCHES))
def test_the_denoising_direction(model: cv.Model, task: cv.Task, name: str) -> None:
    with pytest.raises(OptionError, match="noising"):
        SEARCHES[name](model, task.with_options(direction="denoising"))


@pytest.mark.parametrize(
    "search",
    [
        lambda model, task, other: cv.refine(model, task, cv.Circuit.full(other)),
        lambda model, task, other: cv.circuit_curve(model, task, [cv.Circuit.full(other)], "x"),
        lambda model, task, other: cv.score_curve(model, task, cv.EdgeScores(other, np.ones(other.shape))),
        lambda model, task, other: cv.learn_constants(model, task, cv.Circuit.full(other)),
    ],
)
def test_a_circuit_of_another_graph(model: cv.Model, task: cv.Task, search: Any) -> None:
    with pytest.raises(OptionError, match="belong"):
        search(model, task, transformer_graph(3, 5))


def test_constants_for_a_circuit_without_the_groups_of_the_task(model: cv.Model, task: cv.Task) -> None:
    with pytest.raises(OptionError, match="belongs"):
        cv.learn_constants(model, task.with_options(groups="kind"), full(model), progress=False)


@pytest.mark.parametrize("order", [np.zeros(3), [0, 1, 2]])
@pytest.mark.parametrize("search", [cv.refine, cv.ddmin])
def test_an_order_of_another_graph(model: cv.Model, task: cv.Task, search: Any, order: Any) -> None:
    with pytest.raises(OptionError, match=r"the order has shape \(3,\)"):
        search(model, task, full(model), order=order, progress=False)


@pytest.mark.parametrize("candidates", [-1, "all"])
def test_candidates_that_are_no_number(model: cv.Model, task: cv.Task, candidates: Any) -> None:
    with pytest.raises(OptionError, match="candidates must be"):
        cv.refine(model, task, full(model), candidates=candidates, progress=False)


def test_a_schedule_that_would_never_come_to_its_end() -> None:
    with pytest.raises(OptionError, match="ramp must be a number between 0 and 1, not 5"):
        cv.MaskSettings(ramp=5)
    assert cv.MaskSettings(ramp=1).ramp == 1


def test_more_pairs_than_memory_holds(
    model: cv.Model, task: cv.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ACDC's own state is as large as what it holds; a mask is learned on batches captured anew."""
    settings = cv.MaskSettings(steps=20, batch_size=1)
    learned = cv.learn_mask(model, task, 10, settings, progress=False)
    monkeypatch.setattr(evaluator, "HELD_BYTES", 1000)
    monkeypatch.setattr(batches, "CPU_BUDGET", 1000)
    with pytest.raises(DataError, match="at most 1 pairs"):
        SEARCHES["acdc"](model, task)
    again = cv.learn_mask(model, task, 10, settings, progress=False)
    assert again.trace == learned.trace
    assert again.circuit == learned.circuit


def test_a_failing_circuit_is_called_insufficient(model: cv.Model, task: cv.Task) -> None:
    one = cv.Task(task.clean[:1], task.corrupt[:1], metric=task.metric)
    report = cv.verify(model, one, cv.Circuit.empty(model.graph), n_random=0, progress=False)
    assert any("not sufficient" in warning for warning in report.warnings)


def test_a_faithful_circuit_that_sees_something_else_is_told(model: cv.Model, task: cv.Task) -> None:
    """The metric is a difference of two logits that the circuit keeps while a third one wins."""
    one = cv.Task(task.clean[:1], task.corrupt[:1], metric=task.metric)
    report = cv.verify(model, one, full(model), n_random=0, progress=False)
    section = replace(report.task, agreement=Estimate(0.28, None, None))
    (said,) = (text for text in _about_values(section) if "top class" in text)
    assert "keeps 100% of the behaviour, but its top class is the model's on only 28% of 1 pair:" in said
    assert not any("top class" in text for text in report.warnings)


def test_prepared_tasks_are_taken_everywhere(model: cv.Model, task: cv.Task) -> None:
    prepared = cv.Task(task.clean[:1], task.corrupt[:1], metric=task.metric).prepare(model)
    report = cv.verify(model, prepared, full(model), n_random=0, progress=False)
    assert report.headline.faithfulness.value == pytest.approx(1)
    assert torch.allclose(cv.run(model, prepared, full(model)), model(images(2, 1)[:1]), atol=1e-5)
    with pytest.raises(OptionError, match="prepared for"):
        cv.run(cv.wrap(small_module()), prepared, full(model))


@pytest.mark.parametrize("search", ["refine", "score_curve"])
def test_batches_of_an_evaluator_that_is_there_already(model: cv.Model, task: cv.Task, search: str) -> None:
    known = evaluator.Evaluator(task.prepare(model))
    given = full(model) if search == "refine" else cv.attribute(model, task, "eap", progress=False)
    function: Any = getattr(cv, search)
    with pytest.raises(OptionError, match="give batch_size= and memory= to the evaluator"):
        function(model, task, given, evaluator=known, batch_size=1)

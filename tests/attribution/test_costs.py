"""Long work says how long it will take before it begins, and nobody waits for that where it is short."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import circuitvit as cv
from circuitvit.attribution import costs
from circuitvit.datasets.catdog import catdog_pairs


@pytest.fixture
def task() -> cv.tasks.PreparedTask:
    pairs = catdog_pairs(3, seed=0)
    return cv.Task(*pairs, metric=cv.logit_diff("cat", "dog")).prepare(cv.load("catdog-tiny"))


@pytest.mark.parametrize(
    ("run", "cost"),
    [
        (lambda task: cv.attribute(task.model, task, "local"), costs.local_cost),
        (lambda task: cv.attribute(task.model, task, "exact"), costs.exact_cost),
        (lambda task: cv.attribute(task.model, task, "hybrid", budget=900.0), lambda graph: 900.0),
        (lambda task: cv.acdc(task.model, task, tau=10.0), costs.exact_cost),
    ],
)
def test_the_time_is_told_first(
    run: Callable[[cv.tasks.PreparedTask], object],
    cost: Callable[[cv.Graph], float],
    task: cv.tasks.PreparedTask,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(costs, "seconds_per_forward", lambda *_, **__: 2.0)
    run(task)
    said = capsys.readouterr().err.splitlines()[0]
    needed = 2.0 * cost(task.graph) * 3
    assert f"about {costs.spoken(needed)} at the speed of now" in said
    assert said.endswith(f"{cost(task.graph):,.0f} forwards a pair, 2 s each")


def test_short_work_says_nothing(task: cv.tasks.PreparedTask, capsys: pytest.CaptureFixture[str]) -> None:
    cv.attribute(task.model, task, "local")
    assert capsys.readouterr().err == ""

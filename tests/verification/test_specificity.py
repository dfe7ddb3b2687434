"""Specificity: its figures are those of `verify`, and it raises no more false alarms than it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

import circuitvit as cv
from circuitvit.errors import FileError, OptionError
from circuitvit.graph import Circuit
from circuitvit.verification.cross_effects import Specificity, adjusted, larger_share_p, specificity
from tests.rightness import METRIC, images, micro

Numbers = NDArray[np.float64]


def task(clean: int, corrupt: int, metric: cv.Metric = METRIC) -> cv.Task:
    """Six pairs, each much like the other, so that all show the behaviour."""
    sides = [images(1, seed) + 0.05 * images(6, seed + 10) for seed in (clean, corrupt)]
    return cv.Task(*sides, metric)


def halves(model: cv.Model) -> dict[str, Circuit]:
    """What passes the MLPs, and what does not."""
    mlps = [edge for edge in model.graph.edges if edge.startswith("m")]
    found = Circuit.from_edges(model.graph, mlps)
    return {"mlps": found, "others": ~found}


def test_every_circuit_on_every_behaviour_is_what_verify_says_of_it() -> None:
    model = cv.wrap(micro())
    circuits = halves(model)
    tasks = {"mlps": task(0, 1), "others": task(2, 3, cv.logit(2))}
    found = specificity(model, tasks, circuits, progress=False)
    for circuit, behaviour in ((a, b) for a in tasks for b in tasks):
        expected = cv.verify(model, tasks[behaviour], circuits[circuit], n_random=0, progress=False).headline
        cell = found.effect(circuit, behaviour)
        assert (cell.necessity, cell.faithfulness) == (expected.necessity, expected.faithfulness)
        assert (cell.p is None) == (circuit == behaviour)


def test_one_circuit_for_two_behaviours_is_specific_to_neither() -> None:
    model = cv.wrap(micro())
    names = ("one", "other")
    circuits = dict.fromkeys(names, halves(model)["mlps"])
    found = specificity(model, dict.fromkeys(names, task(0, 1)), circuits, progress=False)
    assert found.p_values == (1.0, 1.0)
    assert found.specific == ()
    assert "not shown to be specific" in str(found)


def drawn(rng: np.random.Generator, count: int, share: float, spread: float) -> tuple[Numbers, Numbers]:
    """Pairs of which this share is lost on the whole, though each by its own."""
    effect = rng.gamma(4, 0.5, count)
    return effect * share + spread * rng.normal(size=count), effect


def test_false_alarms_are_as_many_as_the_level_says_whatever_the_spreads() -> None:
    rng, alarms = np.random.default_rng(0), 0
    for _ in range(4000):
        first, second = drawn(rng, 20, 0.4, 0.8), drawn(rng, 30, 0.4, 0.3)
        alarms += larger_share_p(*first, *second) < 0.05
    assert stats.binomtest(alarms, 4000, 0.05).pvalue > 1e-3
    assert larger_share_p(*drawn(rng, 20, 0.9, 0.3), *drawn(rng, 20, 0.1, 0.3)) < 1e-6


def test_too_few_pairs_have_no_p_value() -> None:
    lost = np.ones(4)
    assert larger_share_p(lost, lost, 0 * lost, lost) is None


def test_adjusted_p_values_by_hand() -> None:
    assert adjusted([0.03, 0.01, None, 0.02]) == pytest.approx((0.04, 0.03, None, 0.04))


@pytest.mark.parametrize(
    ("tasks", "circuits", "message"),
    [(("one",), None, "two tasks or more"), (("one", "two"), ("one", "tow"), "its own circuit, by the same")],
)
def test_what_cannot_be_compared(
    tasks: tuple[str, ...], circuits: tuple[str, ...] | None, message: str
) -> None:
    model = cv.wrap(micro())
    given = None if circuits is None else dict.fromkeys(circuits, Circuit.full(model.graph))
    with pytest.raises(OptionError, match=message):
        specificity(model, dict.fromkeys(tasks, task(0, 1)), given, progress=False)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"p_values": (7.0, 1.0)}, "p-values lie between 0 and 1"),
        ({"alpha": -1.0}, "the level alpha"),
        ({"names": ("one",), "circuits": 1, "effects": 1, "p_values": (None,)}, "two or more"),
    ],
)
def test_a_file_of_what_no_run_gives_is_refused(wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = cv.wrap(micro())
    circuits, tasks = halves(model), {"mlps": task(0, 1), "others": task(2, 3)}
    found = specificity(model, tasks, circuits, n_bootstrap=100, progress=False)
    changed = {
        name: getattr(found, name)[:given] if isinstance(given, int) else given
        for name, given in wrong.items()
    }
    saved = replace(found, **changed).save(tmp_path / "found.json")
    with pytest.raises(FileError, match=message):
        Specificity.load(saved)


def test_behaviours_have_names() -> None:
    with pytest.raises(OptionError, match="two tasks or more, by name"):
        specificity(cv.wrap(micro()), [task(0, 1), task(2, 3)], progress=False)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="tasks by name"):
        cv.verify(cv.wrap(micro()), task(0, 1), [], others=[task(2, 3)])  # type: ignore[arg-type]


def test_verify_says_of_other_behaviours_what_specificity_does(tmp_path: Path) -> None:
    model, circuits = cv.wrap(micro()), halves(cv.wrap(micro()))
    tasks = {"mlps": task(0, 1), "others": task(2, 3, cv.logit(2))}
    whole = specificity(model, tasks, circuits, progress=False)
    beside = {"others": tasks["others"]}
    report = cv.verify(model, tasks["mlps"], circuits["mlps"], others=beside, n_random=0, progress=False)
    (found,), expected = report.others, whole.effect("mlps", "others")
    assert (found.necessity, found.faithfulness, found.p) == (
        expected.necessity, expected.faithfulness, expected.p
    )  # fmt: skip
    assert found.p is not None
    assert report.specific == (found.p < 0.01)
    assert cv.Report.load(report.save(tmp_path / "report.json")).others == report.others
    assert f"| others | {found.necessity} |" in report.to_markdown()
    assert "others=others" in report.recipe.verify


def test_a_circuit_beside_its_own_behaviour_is_not_called_specific() -> None:
    model = cv.wrap(micro())
    control = {"again": task(0, 1), "few": cv.Task(*(images(2, seed) for seed in (0, 1)), METRIC)}
    mlps = halves(model)["mlps"]
    report = cv.verify(model, task(0, 1), mlps, others={"again": task(0, 1)}, n_random=0, progress=False)
    assert report.others[0].p == 0.5
    assert report.specific is False
    assert any("rather than 'again'" in said for said in report.warnings)
    assert "not shown to be specific" in report.to_markdown()
    few = cv.verify(model, task(0, 1), mlps, others=control, n_random=0, progress=False)
    assert few.specific is None
    assert any("too few pairs" in said for said in few.warnings)
    assert cv.verify(model, task(0, 1), mlps, n_random=0, progress=False).specific is None


def test_the_matrix_shows_every_share_and_verdict(tmp_path: Path) -> None:
    model = cv.wrap(micro())
    tasks = {"mlps": task(0, 1), "others": task(2, 3, cv.logit(2))}
    found = specificity(model, tasks, halves(model), progress=False)
    figure = found.figure()
    shown = [each.get_text().partition("\n")[0] for each in figure.axes[0].texts]
    assert shown == [f"{each.necessity.value:.0%}" for each in found.effects]
    assert figure.save(tmp_path / "matrix.svg").read_text().count("specific") == 2

"""What changed: changes of known effect get their verdicts, and every figure is that of a slow way to it."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import circuitvit as cv
from circuitvit.attribution.exact import edge_effects, pair_effects
from circuitvit.attribution.scoring import Running
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.engine import Evaluator
from circuitvit.errors import DataError, NameNotFoundError, OptionError
from circuitvit.export import draw_drift
from circuitvit.models.zoo import load_zoo_module
from circuitvit.testing import assert_no_drift, entries
from circuitvit.verification import Drift, Estimate, drift_runs
from circuitvit.verification.drift import VERDICTS, Measures, judge
from circuitvit.verification.drift_runs import RELABELLED, Beyond, edge_changes, left_of_own
from circuitvit.verification.null import relabelled_circuits
from tests.verification.cases import some_circuit, tiny_model, tiny_task

bench = pytest.importorskip("bench.what_changed")

METRIC = cv.logit_diff("cat", "dog")


@cache
def old() -> cv.Model:
    return cv.load("catdog-tiny")


@cache
def stored() -> cv.Circuit:
    """A circuit of the bundled model, small enough that heads matter."""
    task = cv.Task(*catdog_pairs(4, seed=9), metric=METRIC)
    return cv.attribute(old(), task, "eap-ig", progress=False).connected(30)


def pairs(n: int = 12) -> cv.Task:
    return cv.Task(*catdog_pairs(n, seed=5), metric=METRIC)


@cache
def with_logits(factor: float) -> cv.Model:
    """The same model, all of whose logits are so many times as large."""
    module = copy.deepcopy(load_zoo_module("catdog-tiny"))
    head = module.head
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight.mul_(factor)
        head.bias.mul_(factor)
    return bench.wrapped(module, old(), f"logits {factor}")


@cache
def without_head(layer: int, head: int) -> cv.Model:
    """The same model, one of whose heads writes nothing."""
    module = copy.deepcopy(load_zoo_module("catdog-tiny"))
    attention = module.blocks[layer].attn  # type: ignore[index]
    with torch.no_grad():
        attention.proj.weight.unflatten(1, (attention.num_heads, -1))[:, head] = 0
    return bench.wrapped(module, old(), "a head less")


def diff(new: cv.Model, n: int = 12, **options: object) -> Drift:
    return cv.diff(old(), new, pairs(n), stored(), **{"edges": 0, "progress": False, **options})


# -- verdicts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "verdict"),
    [(0.6, "weaker"), (0.97, "unchanged"), (1.5, "shifted"), (-1, "gone")],
)
def test_scaled_logits_leave_that_share_of_the_behaviour_by_the_same_edges(
    factor: float, verdict: str
) -> None:
    found = diff(with_logits(factor))
    assert found.verdict == verdict
    assert found.behaviour is not None
    assert found.behaviour.value == pytest.approx(factor, abs=1e-5)
    assert ("the other way" in found.reason) == (factor < -0.5)
    if verdict != "gone":
        assert found.faithfulness_change is not None
        assert found.faithfulness_change.value == pytest.approx(0, abs=1e-5)
    assert found.old is not None
    assert found.new is not None
    np.testing.assert_allclose(found.new, factor * found.old, atol=1e-5)


def test_heads_in_another_order_are_rerouted_and_training_further_is_not() -> None:
    """`python -m bench what_changed` asks it of twenty each."""
    moved = diff(bench.reordered(old(), 0))
    assert moved.verdict == "rerouted"
    assert moved.behaviour is not None
    assert moved.behaviour.value == pytest.approx(1, abs=1e-4)
    assert diff(bench.tuned(old(), 0, steps=4)).verdict == "unchanged"


def test_the_same_weights_are_said_at_once_and_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    same = bench.wrapped(load_zoo_module("catdog-tiny"), old(), "a copy")
    monkeypatch.setattr(Evaluator, "measure", None)
    found = diff(same)
    assert (found.verdict, found.n, found.edges) == ("unchanged", 0, ())
    assert "identical" in found.reason
    assert "\n\n\n" not in cv.diff(old(), old(), pairs()).to_markdown()


def test_edges_that_were_not_measured_are_said_and_which_were() -> None:
    circuit, *others = (diff(with_logits(0.9), edges=edges).caveats for edges in (0, 80))
    assert f"{len(stored())} were measured, the circuit's: " in circuit[0]
    assert "the circuit's and the strongest by estimate: " in others[0][0]


def test_few_pairs_cannot_tell() -> None:
    found = diff(with_logits(0.9), 3)
    assert found.verdict == "cannot tell"
    assert "too few pairs" in found.reason


def test_a_circuit_that_never_carried_it_cannot_tell() -> None:
    empty = cv.Circuit.empty(old().graph)
    found = cv.diff(old(), with_logits(0.9), pairs(), empty, edges=0, progress=False)
    assert found.verdict == "cannot tell"
    assert "in the old weights either" in found.reason


NEAR, FAR = Estimate(1.0, 0.95, 1.05), Estimate(0.1, 0.0, 0.3)
STILL, LESS = Estimate(0.0, -0.05, 0.05), Estimate(0.7, 0.6, 0.8)


@pytest.mark.parametrize(
    ("measures", "verdict"),
    [
        (Measures(NEAR, NEAR, NEAR, STILL, None, 0.09, 0.0), "unchanged"),
        (Measures(NEAR, NEAR, NEAR, STILL), "unchanged"),
        (Measures(NEAR, NEAR, NEAR, STILL, None, 0.2, 0.0), "cannot tell"),  # of an edge
        (Measures(NEAR, NEAR, NEAR, STILL, None, 0.5, 0.2), "shifted"),
        (Measures(NEAR, NEAR, NEAR, Estimate(0.0, -0.2, 0.2), None, 0.09, 0.0), "cannot tell"),
        (
            Measures(NEAR, NEAR, Estimate(0.7, 0.6, 0.8), Estimate(-0.3, -0.4, -0.2), None, 0.09, 0.0),
            "weaker",
        ),
        (Measures(NEAR, NEAR, FAR, STILL), "rerouted"),
        (Measures(NEAR, NEAR, Estimate(2.0, 1.6, 2.4), STILL), "rerouted"),
        (Measures(NEAR, NEAR, Estimate(0.5, 0.4, 0.6), STILL), "cannot tell"),  # whether it is carried
        (
            Measures(NEAR, NEAR, Estimate(0.5, 0.4, 0.6), STILL, FAR),
            "rerouted",
        ),  # it is by no heads of its own
        (Measures(NEAR, NEAR, LESS, STILL, Estimate(0.5, 0.4, 0.6)), "unchanged"),  # that is not sure
        (Measures(NEAR, FAR, NEAR, STILL), "cannot tell"),  # was it carried before?
        (Measures(Estimate(0.1, 0.0, 0.15), NEAR), "gone"),
        (Measures(FAR, NEAR), "cannot tell"),  # whether there is any
        (Measures(Estimate(0.0), NEAR), "cannot tell"),
    ],
)
def test_only_intervals_decide(measures: Measures, verdict: str) -> None:
    assert judge(measures, 0.1)[0] == verdict


# -- figures ---------------------------------------------------------------------------------------


def test_effects_by_pair_are_those_of_runs_with_one_edge_ablated() -> None:
    prepared = tiny_task(5, groups="kind").prepare(tiny_model())
    graph, how = prepared.graph, Running(2)
    wanted = graph.edge_mask & (np.random.default_rng(0).random(graph.shape) < 0.3)
    found = pair_effects(prepared, wanted, how)
    evaluator = Evaluator(prepared)
    for column, edge in enumerate(graph.names_of(wanted)):
        kept = graph.edge_mask & ~graph.mask_of([edge])
        np.testing.assert_allclose(found[:, column], evaluator.values(kept) - evaluator.whole, atol=1e-10)
    np.testing.assert_allclose(found.sum(axis=0), edge_effects(prepared, wanted, how)[wanted], atol=1e-10)


def test_intervals_of_all_edges_at_once_hold_all_of_them_as_often_as_they_say() -> None:
    random = np.random.default_rng(0)
    missed, draws, edges, truth = 0, 600, 30, 0.25
    for _ in range(draws):
        effect = random.normal(4, 1, 20)
        change = truth * effect[:, None] + random.normal(size=(20, edges))
        share, _, wide = edge_changes(change, effect, edges)
        missed += bool((np.abs(share - truth) > wide).any())
    assert 0.02 <= missed / draws <= 0.075


def test_what_is_left_of_its_own_is_what_other_heads_do_not_carry() -> None:
    """Literally: the circuit's faithfulness less that of circuits with other heads, new over old."""
    new, task = without_head(2, 3), pairs()
    found = diff(new).own_left
    beyond = []
    for model in (old(), new):
        run = Evaluator(task.prepare(model))
        others = [run.faithfulness(each) for each in relabelled_circuits(stored(), RELABELLED)]
        beyond.append(run.faithfulness(stored()) - float(np.mean(others)))
    assert found is not None
    assert found.value == pytest.approx(beyond[1] / beyond[0], abs=1e-5)
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.value < found.high


def test_all_that_is_its_own_is_left_in_scaled_logits_and_none_with_other_heads() -> None:
    same, other = diff(with_logits(1.5)).own_left, diff(bench.reordered(old(), 0)).own_left
    assert same is not None
    assert same.low == pytest.approx(1, abs=1e-4)
    assert same.high == pytest.approx(1, abs=1e-4)
    assert other is not None
    assert other.high is not None
    assert other.high < 0.2


def test_its_interval_holds_what_all_relabellings_and_many_pairs_give_as_often_as_it_says() -> None:
    """The share of a made-up circuit, whose truth is known, over draws of pairs and of relabellings."""
    random = np.random.default_rng(0)
    missed, draws, truth = 0, 400, 0.4
    for _ in range(draws):
        runs = []
        for own, mean in ((1.0, 0.3), (0.3 + 0.7 * truth, 0.3)):
            whole = random.normal(4, 1, 20)
            drawn = (mean + random.normal(0, 0.2, RELABELLED))[:, None] * whole
            noise = random.normal(0, 0.5, (RELABELLED + 1, 20))
            runs.append((whole, np.concatenate([own * whole[None], drawn]) + noise))
        estimate = left_of_own(*(Beyond.of(values, whole) for whole, values in runs))
        assert estimate is not None
        assert estimate.low is not None
        assert estimate.high is not None
        missed += not estimate.low <= truth <= estimate.high
    assert 0.02 <= missed / draws <= 0.08


def test_an_edge_that_is_cut_has_lost_all_that_it_had() -> None:
    found = diff(without_head(2, 3))
    (cut,) = (each for each in found.records() if each["edge"] == "a2.h3->logits")
    assert cut["in_circuit"]
    assert cut["new"] == pytest.approx(0, abs=1e-6)
    assert cut["change"] == pytest.approx(-float(cut["old"] or 0), abs=1e-6)
    first, second = found.effects(0.02)
    assert "a2.h3->logits" in first
    assert "a2.h3->logits" not in second


def test_a_new_search_finds_the_heads_where_they_are_now() -> None:
    found = cv.diff(
        old(), bench.reordered(old(), 0), pairs(16), stored(), edges=0, search="1s", progress=False
    )
    assert found.n == 8
    assert found.faithfulness_found is not None
    assert found.faithfulness_new is not None
    assert found.faithfulness_found.value > 0.7 > found.faithfulness_new.value
    assert "A search in the new weights" in found.to_markdown()


def test_a_search_takes_the_seconds_given_and_no_time_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    new, asked = without_head(2, 3), []

    def noted(model: cv.Model, task: object, *, within: float, **keywords: object) -> cv.Finding:
        asked.append(within)
        return cv.find(model, task, plan=cv.Plan(0, 10, 4), progress=False)  # type: ignore[arg-type]

    monkeypatch.setattr(drift_runs, "find", noted)
    cv.diff(old(), new, pairs(), stored(), edges=0, search=1, progress=False)
    assert asked == [1.0]
    with pytest.raises(OptionError, match="a duration is a number"):
        cv.diff(old(), new, pairs(), stored(), search="soon", progress=False)


def test_edges_are_not_chosen_by_a_metric_without_a_gradient() -> None:
    new, task = without_head(2, 3), cv.Task(*catdog_pairs(12, seed=5), metric=cv.accuracy("cat"))
    with pytest.raises(OptionError, match=r"accuracy has no gradient: give edges=0 .* edges=479 for all"):
        cv.diff(old(), new, task, stored(), edges=5, progress=False)
    assert len(cv.diff(old(), new, task, stored(), edges=0, progress=False).edges) == len(stored())


# -- in a test suite, on a page --------------------------------------------------------------------


def test_a_test_suite_fails_where_a_head_was_zeroed_and_within_its_tolerance_does_not() -> None:
    broken = without_head(2, 3)
    with pytest.raises(AssertionError, match=r"the verdict is 'rerouted': .* Asked for: unchanged"):
        assert_no_drift(old(), broken, pairs(), stored(), edges=0)
    assert not entries()[-1].held
    assert_no_drift(old(), with_logits(0.9), pairs(), stored(), edges=0, tolerance=0.3)
    with pytest.raises(NameNotFoundError, match="unchanged"):
        assert_no_drift(old(), broken, pairs(), stored(), accept=("unchangd",))


def test_the_page_needs_no_other_file_and_runs_nothing(tmp_path: Path) -> None:
    found = diff(with_logits(0.6))
    text = draw_drift(found, tmp_path / "x.html").read_text()
    assert "<script" not in text
    assert "http" not in text.replace("http-equiv", "")
    assert VERDICTS["weaker"] in text
    assert "Strong edges, old and new" in text
    with pytest.raises(OptionError, match=r"\.html"):
        draw_drift(found, tmp_path / "x.pdf")
    assert Drift.load(found.save(tmp_path / "x.json")).to_markdown() == found.to_markdown()


# -- what is refused -------------------------------------------------------------------------------


def test_models_that_cannot_be_compared_are_refused_by_what_differs() -> None:
    task = tiny_task(6)
    with pytest.raises(OptionError, match="the new model catdog-tiny"):
        cv.diff(tiny_model(), old(), task, some_circuit())
    module = copy.deepcopy(load_zoo_module("catdog-tiny"))
    with torch.no_grad():
        module.head.weight.mul_(0.9)  # type: ignore[union-attr, operator]
    names = [{"cat": "dog", "dog": "cat"}.get(name, name) for name in old().classes]
    swapped = cv.wrap(module, classes=names, preprocessing=old().preprocessing)
    guessed = cv.Task(*catdog_pairs(6, seed=5))  # target and foil are what the old model sees
    with pytest.raises(OptionError, match="is cat in catdog-tiny and dog in"):
        cv.diff(old(), swapped, guessed, stored())
    plain = cv.wrap(module, classes=old().classes)
    with pytest.raises(OptionError, match="prepare images differently"):
        cv.diff(old(), plain, pairs(6), stored())


def test_a_model_without_the_behaviour_has_nothing_to_lose() -> None:
    clean, _ = catdog_pairs(6)
    same = cv.Task(clean, clean, metric=METRIC)
    with pytest.raises(DataError, match="nothing for a circuit to explain"):
        cv.diff(old(), with_logits(0.9), same, stored())

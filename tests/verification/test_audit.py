"""The tests of a circuit: right on circuits whose answer is known, and reports that carry all of it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import circuitvit as cv
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.engine import Evaluator
from circuitvit.errors import OptionError
from circuitvit.tasks import select_pairs
from circuitvit.verification import (
    AuditSettings,
    Bootstrap,
    Falls,
    Hypothesis,
    Report,
    audit,
    completeness_test,
    connected_circuits,
    equivalence_test,
    hsic_permutation_p,
    independence_test,
    minimality_test,
    robustness,
    stability,
    sufficiency_test,
    verify,
)
from circuitvit.verification.statistics import equivalence_p, power_of_mean, rank_p
from tests.verification.cases import some_circuit, tiny_model, tiny_task

QUICK = AuditSettings(n_random=39, n_others=40, n_paths=30, n_bootstrap=300)


@cache
def catdog(n: int = 16, seed: int = 5) -> tuple[cv.Model, cv.Task]:
    return cv.load("catdog-tiny"), cv.Task(*catdog_pairs(n, seed=seed), metric=cv.logit_diff("cat", "dog"))


@cache
def true_circuit() -> cv.Circuit:
    """Nearly all that matters: the strongest edges by their exact effects, grown until faithful."""
    model, task = catdog()
    scores = cv.attribute(model, task, "eap-ig", steps=5, progress=False)
    for size in range(30, model.graph.n_edges, 10):
        circuit = scores.connected(size)
        evaluator = Evaluator(task.prepare(model))
        if (
            abs(
                float((evaluator.values(circuit.kept) - evaluator.nothing).sum() / evaluator.effect.sum()) - 1
            )
            < 0.08
        ):
            return circuit
    raise AssertionError("no circuit is faithful")


def crippled(circuit: cv.Circuit) -> cv.Circuit:
    """The most important edge swapped for a random one."""
    model, task = catdog()
    evaluator = Evaluator(task.prepare(model))
    drops = {}
    for name in circuit:
        without = circuit - cv.Circuit.from_edges(circuit.graph, [name])
        drops[name] = float((evaluator.values(circuit.kept) - evaluator.values(without.kept)).mean())
    strongest = max(drops, key=lambda name: drops[name])
    rest = list(~circuit)
    swapped = rest[int(np.random.default_rng(0).integers(len(rest)))]
    graph = circuit.graph
    return (circuit - cv.Circuit.from_edges(graph, [strongest])) | cv.Circuit.from_edges(graph, [swapped])


@cache
def report(which: str) -> Report:
    model, task = catdog()
    circuit = {
        "true": true_circuit,
        "swapped": lambda: crippled(true_circuit()),
        "random": lambda: connected_circuits(true_circuit(), 1, seed=7)[0],
    }[which]()
    settings = AuditSettings(n_random=39, n_others=40, n_paths=0, n_bootstrap=300)
    return verify(model, task, circuit, n_random=2, n_bootstrap=300, tests=settings, progress=False)


def test_the_true_circuit_passes() -> None:
    found = report("true")
    assert found.conclusion == "passed", found.reasons
    assert "The circuit **passes**" in found.to_markdown()


@pytest.mark.parametrize("which", ["swapped", "random"])
def test_a_wrong_circuit_fails_with_the_reason_stated(which: str) -> None:
    found = report(which)
    assert found.conclusion == "failed"
    assert "shown not to lie within 0.8 to 1.2" in found.reasons
    assert "The circuit **fails**" in found.to_markdown()
    if which == "random":
        assert {test.claim: test.verdict for test in found.tests}["sufficiency"] == "refuted"


def test_a_report_with_all_findings_survives_json(tmp_path: Path) -> None:
    model, task, circuit = tiny_model(), tiny_task(8), some_circuit()
    plain = verify(model, task, circuit, n_random=2, tests=QUICK, robust=True, progress=False)
    claim = Hypothesis("something | odd", "* -> logits", Falls(0.0)).test(model, task)
    again = stability(model, task, lambda model, task: circuit, n=2, progress=False)
    full = plain.with_findings(hypotheses=[claim], stability=again, circuit=circuit)
    assert Report.load(full.save(tmp_path / "report.json")) == full
    text = full.to_markdown()
    for part in (
        "## Tests",
        "## Robustness",
        "## Hypotheses",
        "## Stability",
        "something \\| odd",
        "null hypothesis",
    ):
        assert part in text
    assert {test.claim for test in full.tests} == {
        "sufficiency", "partial necessity", "equivalence", "independence of the complement", "minimality",
        "completeness",
    }  # fmt: skip
    with pytest.raises(OptionError, match="circuit="):
        plain.with_findings(stability=again)


# -- single tests --------------------------------------------------------------------------------


def test_the_whole_graph_is_equivalent_complete_and_leaves_nothing() -> None:
    evaluator = Evaluator(tiny_task(12).prepare(tiny_model()))
    full = cv.Circuit.full(evaluator.graph)
    assert equivalence_test(evaluator, full, AuditSettings(margin=0.01)).supported
    assert completeness_test(
        evaluator, full, AuditSettings(completeness_margin=0.01), n_random=3, greedy_steps=2
    ).supported
    alone = independence_test(evaluator, full)
    assert alone.supported
    assert "does not vary" in alone.reason


def test_the_empty_circuit_is_not_equivalent_and_few_pairs_decide_nothing() -> None:
    empty = cv.Circuit.empty(tiny_model().graph)
    outcome = equivalence_test(Evaluator(tiny_task(12).prepare(tiny_model())), empty)
    assert (outcome.verdict, outcome.effect.value) == ("refuted", 0.0)
    few = equivalence_test(Evaluator(tiny_task(3).prepare(tiny_model())), cv.Circuit.full(empty.graph))
    assert (few.verdict, few.p_value, few.power) == ("not enough evidence", None, None)


def test_too_few_random_circuits_are_not_enough_evidence() -> None:
    evaluator = Evaluator(tiny_task(6).prepare(tiny_model()))
    circuit = some_circuit()
    outcome = sufficiency_test(evaluator, circuit, connected_circuits(circuit, 5))
    assert outcome.p_value is not None
    assert outcome.p_value >= 1 / 6
    assert not outcome.supported


def test_minimality_lists_the_idle_edges() -> None:
    model, task = catdog(8)
    evaluator = Evaluator(task.prepare(model))
    needed, idle = ["input->m0", "m0->logits"], "input->logits"  # the same image for both: it does nothing
    outcome = minimality_test(
        evaluator, cv.Circuit.from_edges(model.graph, [*needed, idle]), AuditSettings(n_paths=39)
    )
    assert idle in outcome.details["idle"] or outcome.details["adjusted_p"][idle] > 0
    assert set(outcome.details["adjusted_p"]) == {*needed, idle}
    with pytest.raises(OptionError, match="nothing can be minimal"):
        minimality_test(evaluator, cv.Circuit.from_edges(model.graph, ["input->m0"]))


def test_settings_that_make_no_sense_are_refused() -> None:
    model, task, circuit = tiny_model(), tiny_task(6), some_circuit()
    for settings in ({"alpha": 0.7}, {"margin": 0}, {"completeness_margin": -1.0}):
        with pytest.raises(OptionError):
            audit(model, task, circuit, settings=AuditSettings(**settings), progress=False)
    with pytest.raises(OptionError, match="nothing to test"):
        audit(model, task, cv.Circuit.empty(model.graph), progress=False)
    with pytest.raises(OptionError, match="2 clusters for 6 pairs"):
        audit(model, task, circuit, clusters=["a", "b"], progress=False)


# -- the arithmetic ------------------------------------------------------------------------------


def test_two_one_sided_tests_agree_with_t_tests_on_normal_data() -> None:
    difference = np.random.default_rng(0).normal(0.2, 1, 200)
    sides = [
        stats.ttest_1samp(0.4 + sign * difference, 0, alternative="greater").pvalue for sign in (1.0, -1.0)
    ]
    found = equivalence_p(difference, np.full(200, 0.4), Bootstrap(n_resamples=20_000))
    assert found == pytest.approx(max(sides), abs=0.005)


def test_ranks_count_ties_against_and_power_is_that_of_the_t_test() -> None:
    assert rank_p(1.0, [1.0, 1.0, 0.0]) == 0.75
    assert rank_p(2.0, np.zeros(19)) == 0.05
    values = np.random.default_rng(0).normal(size=30)
    rng = np.random.default_rng(1)
    hits = [
        stats.ttest_1samp(rng.normal(0.5, values.std(ddof=1), 30), 0, alternative="greater").pvalue <= 0.05
        for _ in range(2000)
    ]
    assert power_of_mean(values, 0.5, 0.05) == pytest.approx(np.mean(hits), abs=0.03)


def test_hsic_finds_what_correlation_does_not() -> None:
    x = np.random.default_rng(0).uniform(-1, 1, 60)
    assert hsic_permutation_p(x, x**2, 199) <= 0.01
    assert hsic_permutation_p(x, np.random.default_rng(1).normal(size=60), 199) > 0.05


# -- robustness and stability --------------------------------------------------------------------


def test_robustness_of_the_whole_graph_never_flips_and_names_what_cannot_be_asked() -> None:
    model, task = tiny_model(), tiny_task(6)
    table = robustness(
        model,
        task,
        cv.Circuit.full(model.graph),
        ablations={"loud": cv.Noise(scale=3)},
        others={"more": tiny_task(5, seed=70)},
    )
    kinds = {row.kind for row in table.rows}
    assert kinds == {"baseline", "ablation", "direction", "metric", "images", "perturbed images"}
    asked = [row for row in table.rows if row.faithfulness is not None]
    assert all(row.faithfulness.value == pytest.approx(1.0) for row in asked if row.faithfulness)
    assert not table.flips
    assert "none flips" in str(table)
    assert next(row for row in table.rows if row.condition == "zero").note


def test_robustness_shows_a_flip() -> None:
    model = tiny_model()
    circuit = some_circuit(3, share=0.5)
    table = robustness(model, tiny_task(6), circuit, perturb=False)
    base = table.rows[0]
    for row in table.rows[1:]:
        opposite = {(base.enough, row.enough), (base.needed, row.needed)} & {("yes", "no"), ("no", "yes")}
        assert row.flips == bool(opposite)


def test_stability_counts_edges_and_the_consensus_holds_them() -> None:
    model, task = tiny_model(), tiny_task(6)
    once, twice = some_circuit(1), some_circuit(2)
    answers = iter([once, twice, twice])
    found = stability(model, task, lambda model, task: next(answers), n=3, progress=False)
    assert found.consensus == twice.pruned()
    shared = list(once & twice)
    assert set(found.of(once & twice).values()) == {1.0}
    assert found.of(once - twice)[next(iter(once - twice))] == pytest.approx(1 / 3)
    assert shared
    assert "3 searches" in str(found)


def test_selected_pairs_measure_the_same_behaviour() -> None:
    model, task = tiny_model(), tiny_task(5).with_options(metric="logit")
    prepared = task.prepare(model)
    whole = Evaluator(prepared).whole
    rows = [4, 0, 0, 2]
    again = Evaluator(select_pairs(prepared, rows)).whole
    assert np.allclose(again, whole[rows])
    flipped = select_pairs(prepared, change=lambda images: images.flip(-1))
    assert flipped.metric.target is not None
    assert prepared.metric.target is not None  # the classes that the model saw before mirroring
    assert bool((flipped.metric.target == prepared.metric.target).all())

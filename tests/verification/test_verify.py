"""`verify` on circuits whose figures are known, in both directions, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import circuitvit as cv
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.errors import DataError, OptionError
from circuitvit.graph import Provenance
from circuitvit.models.zoo import zoo_names
from circuitvit.verification import connected_circuits, verify
from tests.verification.cases import images, some_circuit, tiny_model, tiny_task

MODEL = tiny_model()
GRAPH = MODEL.graph


def approx(value: float) -> object:
    return pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_the_full_circuit_is_the_model(direction: str) -> None:
    report = verify(MODEL, tiny_task(direction=direction), cv.Circuit.full(GRAPH), n_random=3, progress=False)
    found = report.task
    for estimate in (found.faithfulness, found.necessity):
        assert (estimate.value, estimate.low, estimate.high) == (approx(1), approx(1), approx(1))
    assert found.complement_faithfulness.value == approx(0)
    assert found.kl.value == approx(0)
    assert found.agreement.value == 1
    assert found.random is not None
    assert found.random.p_value == 1  # every random circuit of that size is the whole graph too
    assert found.random.advantage.value == approx(0)
    assert any("whole graph" in warning for warning in report.warnings)


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_the_empty_circuit_does_nothing(direction: str) -> None:
    report = verify(
        MODEL, tiny_task(direction=direction), cv.Circuit.empty(GRAPH), n_random=3, progress=False
    )
    found = report.task
    assert found.faithfulness.value == approx(0)
    assert found.complement_faithfulness.value == approx(1)
    assert found.necessity.value == approx(0)
    assert found.random is not None
    assert found.random.p_value == 1
    assert report.size.edges == report.size.nodes == 0
    assert any("empty" in warning for warning in report.warnings)


@pytest.mark.parametrize(
    ("direction", "ablation"), [("noising", "patch"), ("noising", "mean"), ("denoising", "patch")]
)
def test_every_figure_follows_from_runs_of_the_circuit(direction: str, ablation: str) -> None:
    circuit, task = some_circuit(), tiny_task(seed=3, direction=direction, ablation=ablation)
    report = verify(MODEL, task, circuit, n_random=5, seed=3, progress=False)
    found = report.task

    def metric(logits: torch.Tensor) -> np.ndarray:
        return (logits[:, 0] - logits[:, 1]).double().numpy()

    full, empty = cv.Circuit.full(GRAPH), cv.Circuit.empty(GRAPH)
    logits = [cv.run(MODEL, task, each) for each in (full, empty, circuit)]
    logits.append(cv.run(MODEL, task, ablate=circuit))
    whole, nothing, kept, rest = (metric(each) for each in logits)
    effect = whole.mean() - nothing.mean()
    assert found.faithfulness.value == approx((kept.mean() - nothing.mean()) / effect)
    assert found.necessity.value == approx((whole.mean() - rest.mean()) / effect)
    assert found.agreement.value == (logits[0].argmax(-1) == logits[2].argmax(-1)).double().mean()
    log_full, log_circuit = (F.log_softmax(logits[place].double(), dim=-1) for place in (0, 2))
    kl = F.kl_div(log_circuit, log_full, reduction="none", log_target=True).sum(dim=-1)
    assert found.kl.value == approx(float(kl.mean()))
    drawn = [metric(cv.run(MODEL, task, each)).mean() for each in connected_circuits(circuit, 5, seed=3)]
    assert found.random is not None
    assert found.random.faithfulness == approx([(each - nothing.mean()) / effect for each in drawn])
    assert [pair.circuit for pair in found.pairs] == approx(kept.tolist())
    assert [pair.complement for pair in found.pairs] == approx(rest.tolist())
    assert [pair.kl for pair in found.pairs] == approx(kl.tolist())
    assert [pair.top_circuit for pair in found.pairs] == [
        ("cat", "dog | wolf", "fox")[index] for index in logits[2].argmax(-1).tolist()
    ]


def test_random_circuits_are_summed_up_faithfully() -> None:
    found = verify(MODEL, tiny_task(), some_circuit(), n_random=30, progress=False).task
    assert found.random is not None
    values = np.array(found.random.faithfulness)
    assert found.random.n == len(values) == 30
    assert found.random.mean.value == approx(values.mean())
    assert (found.random.low, found.random.high) == (values.min(), values.max())
    assert found.random.quantiles == approx(np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95]).tolist())
    assert found.random.advantage.value == approx(found.faithfulness.value - values.mean())
    closer = (np.abs(values - 1) <= abs(found.faithfulness.value - 1)).sum()
    assert found.random.as_good == closer
    assert found.random.p_value == approx((closer + 1) / 31)
    assert found.random.same == 0


def test_the_answer_depends_on_neither_batch_size_nor_chance() -> None:
    task, circuit = tiny_task(7), some_circuit()
    first = verify(MODEL, task, circuit, n_random=4, seed=1, progress=False)
    assert verify(MODEL, task, circuit, n_random=4, seed=1, progress=False) == first
    small = verify(MODEL, task, circuit, n_random=4, seed=1, batch_size=2, memory=1, progress=False)
    assert small.task.faithfulness.low == approx(first.task.faithfulness.low or 0)
    assert small.task.random is not None
    assert first.task.random is not None
    assert small.task.random.faithfulness == approx(list(first.task.random.faithfulness))
    other = verify(MODEL, task, circuit, n_random=4, seed=2, progress=False)
    assert other.task.faithfulness.value == first.task.faithfulness.value
    assert other.task.random != first.task.random


def test_held_out_pairs_become_the_headline() -> None:
    task, other, circuit = tiny_task(5), tiny_task(8, seed=90), some_circuit()
    report = verify(MODEL, task, circuit, held_out=other, n_random=2, progress=False)
    assert report.headline is report.held_out
    assert report.headline.n_pairs == 8
    assert report.task == verify(MODEL, task, circuit, n_random=2, progress=False).task
    assert not any("no held-out" in warning for warning in report.warnings)


def test_size_is_counted_after_pruning_and_a_circuit_that_is_not_is_named() -> None:
    dead = "a0.h0->a1.h0<k>"
    provenance = Provenance(parameters={"asked": 9})
    circuit = cv.Circuit.from_edges(GRAPH, ["input->m0", "m0->logits", dead], provenance)
    report = verify(MODEL, tiny_task(), circuit, n_random=2, progress=False)
    assert (report.size.edges, report.size.dead, report.size.nodes, report.size.asked) == (2, 1, 3, 9)
    assert report.size.density == 2 / GRAPH.n_edges
    assert any("1 of its 3 edges" in warning for warning in report.warnings)
    pruned = verify(MODEL, tiny_task(), circuit.pruned(), n_random=2, progress=False)
    assert pruned.task.faithfulness.value == approx(report.task.faithfulness.value)
    assert not any("not pruned" in warning for warning in pruned.warnings)


def test_dead_edges_that_are_not_without_effect_are_named() -> None:
    """Zeros are no run of the model, so a node that hears nothing still writes something but zero."""
    circuit = cv.Circuit.from_edges(GRAPH, ["input->m0", "m0->logits", "m1->logits"])
    task = tiny_task(ablation="zero")
    given, pruned = (verify(MODEL, task, each, progress=False) for each in (circuit, circuit.pruned()))
    assert given.task.faithfulness.value != approx(pruned.task.faithfulness.value)
    assert any("Under zero ablation such edges" in warning for warning in given.warnings)


def test_pairs_that_say_little_are_counted() -> None:
    task = tiny_task(9)
    clean, corrupt = task.clean.clone(), task.corrupt.clone()  # type: ignore[union-attr]
    corrupt[0] = clean[0]  # no difference at all
    clean[1], corrupt[1] = corrupt[1].clone(), clean[1].clone()  # the other way round
    mixed = cv.Task(clean, corrupt, metric=cv.logit_diff(0, 1))
    found = verify(MODEL, mixed, some_circuit(), n_random=0, progress=False)
    assert found.task.opposite_pairs == 1
    assert found.task.weak_pairs >= 1
    assert any("the other way round" in warning for warning in found.warnings)
    assert any("hardly differ" in warning for warning in found.warnings)


def test_caveats_are_said_where_they_hold() -> None:
    def said(task: cv.Task, circuit: cv.Circuit | None = None, **options: object) -> str:
        report = verify(MODEL, task, circuit or some_circuit(), progress=False, **options)  # type: ignore[arg-type]
        return "\n".join(report.warnings)

    plain = said(tiny_task(12), held_out=tiny_task(12, seed=70))
    for absent in (
        "held out",
        "single",
        "Only",
        "Zero",
        "not pruned",
        "other weights",
        "No random",
        "draw 19",
    ):
        assert absent not in plain
    assert "no held-out images" in said(tiny_task(12))
    assert "A single pair" in said(tiny_task(1))
    assert "too few for intervals" in said(tiny_task(3))
    assert "intervals are rough" in said(tiny_task(6))
    assert "Zero ablation" in said(tiny_task(ablation="zero"))
    assert "draw 19 or more" in said(tiny_task(), n_random=5)
    assert "No random circuits" in said(tiny_task(), n_random=0)
    assert "5 of the 5 held-out" in said(tiny_task(6), held_out=tiny_task(6).with_options(**first(5)))
    other = tiny_task(6, seed=70, metric=cv.probability(0))
    assert "measured differently" in said(tiny_task(6), held_out=other)
    mean, swapped = {"ablation": cv.Mean(images(9, 3))}, {"metric": cv.logit_diff(1, 0)}
    for changed in (mean, swapped, {"ablation": "zero"}):
        other = tiny_task(20, seed=70, **changed)
        assert "measured differently" in said(tiny_task(20), held_out=other)
        assert "measured differently" not in said(other, held_out=tiny_task(20, seed=110, **changed))
    by_name = tiny_task(6, seed=70, metric=cv.logit_diff("cat", "dog | wolf"))
    assert "measured differently" not in said(tiny_task(6), held_out=by_name)
    found = some_circuit().with_provenance(Provenance(task=tiny_task(9).prepare(MODEL).label))
    assert "found for another task" not in said(tiny_task(6), found)
    said_so = said(tiny_task(6, ablation="zero"), found)
    assert "found for another task (logit_diff(cat, dog | wolf), patch ablation, noising) than" in said_so
    weights = MODEL.weights_hash[:-64] + "0" * 64
    elsewhere = some_circuit().with_provenance(Provenance(model="vit", weights=weights))
    assert "other weights (vit" in said(tiny_task(), elsewhere)


def first(n: int) -> dict[str, torch.Tensor]:
    task = tiny_task(6)
    return {"clean": task.clean[:n], "corrupt": task.corrupt[:n]}  # type: ignore[dict-item, index]


def test_token_groups_are_respected() -> None:
    task = tiny_task(groups="kind")
    graph = GRAPH.with_groups(task.prepare(MODEL).graph.groups)
    full = verify(MODEL, task, cv.Circuit.full(graph), n_random=1, progress=False)
    assert full.task.faithfulness.value == approx(1)
    with pytest.raises(OptionError, match="belongs to"):
        verify(MODEL, task, cv.Circuit.full(GRAPH), progress=False)


def test_a_circuit_of_another_graph_is_refused() -> None:
    other = cv.Graph(GRAPH.stages[:-2] + GRAPH.stages[-1:])
    with pytest.raises(OptionError, match="the circuit belongs to"):
        verify(MODEL, tiny_task(), cv.Circuit.full(other), progress=False)


@pytest.mark.parametrize("n", [1, 6])
@pytest.mark.parametrize("metric", [cv.logit_diff(0, 1), cv.kl_divergence(), cv.probability(0)])
def test_images_that_do_not_differ_are_refused(metric: object, n: int) -> None:
    same = images(n, 5)
    with pytest.raises(DataError, match="same"):
        verify(MODEL, cv.Task(same, same.clone(), metric=metric), some_circuit(), progress=False)  # type: ignore[arg-type]


def test_a_metric_that_does_not_differ_on_average_is_refused() -> None:
    task = tiny_task(8)
    clean, corrupt = task.clean, task.corrupt
    both = cv.Task(torch.cat([clean, corrupt]), torch.cat([corrupt, clean]), metric=cv.logit_diff(0, 1))  # type: ignore[list-item]
    with pytest.raises(DataError, match=r"logit_diff.*nothing for a circuit to explain.*image"):
        verify(MODEL, both, some_circuit(), progress=False)


def test_a_metric_that_breaks_down_under_ablation_is_refused() -> None:
    with pytest.raises(DataError, match="NaN or infinite for image 0"):
        verify(MODEL, tiny_task(metric=lambda logits: logits[:, 0] / 0), some_circuit(), progress=False)


@pytest.mark.parametrize(
    "options", [{"n_random": -1}, {"n_bootstrap": 5}, {"seed": -3}, {"batch_size": 0}, {"memory": 0}]
)
def test_settings_without_sense_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(OptionError):
        verify(MODEL, tiny_task(), some_circuit(), progress=False, **options)  # type: ignore[arg-type]


@pytest.mark.skipif("catdog-tiny" not in zoo_names(), reason="the bundled model is not there")
def test_end_to_end_on_the_bundled_model() -> None:
    """Half of the edges, chosen by exact score, carry the behaviour on pictures not seen; chance does not."""
    model = cv.load("catdog-tiny")
    metric = cv.logit_diff("cat", "dog")
    task, held_out = (cv.Task(*catdog_pairs(n, seed), metric=metric) for n, seed in ((8, 0), (12, 1)))
    scores = cv.attribute(model, task, "exact", progress=False)
    circuit = scores.top(model.graph.n_edges // 2)
    report = verify(model, task, circuit, held_out=held_out, progress=False)
    found = report.headline
    assert found.faithfulness.value > 0.7
    assert found.necessity.value > 0.9
    assert found.random is not None
    assert found.random.p_value < 0.05
    assert found.random.high < found.faithfulness.low  # type: ignore[operator]
    assert found.pairs[0].top_whole == "cat"
    assert report.size.asked == model.graph.n_edges // 2

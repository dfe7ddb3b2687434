"""The evaluator: every circuit is run once, within a memory budget, for the weights as they are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitvit as cv
from circuitvit.engine import Evaluator, check_effect, choose_batch_size, evaluator
from circuitvit.errors import DataError, OptionError
from circuitvit.tasks import prepare
from tests.strategies import Case, Recipe, assert_close, cases

SEEDS = st.integers(0, 2**16)


def circuit_of(case: Case, seed: int, density: float = 0.5) -> cv.Circuit:
    graph = case.task().prepare(case.model).graph
    return cv.Circuit.from_edges(
        graph, [name for name, keep in case.random_mask(seed, density).items() if keep]
    )


# -- what is measured ------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(cases(), SEEDS)
def test_values_are_the_metric_of_the_literal_model(case: Case, seed: int) -> None:
    """Kept is kept in the clean run; in the denoising direction, restored in the corrupt run."""
    prepared, circuit = case.task().prepare(case.model), circuit_of(case, seed)
    mask, noising = set(circuit), case.direction == "noising"
    logits = case.literal.run(
        case.base, case.reference, lambda name: (name in mask) == noising, case.token_groups
    ).logits
    (found,) = Evaluator(prepared).measure([circuit])
    assert_close(torch.tensor(found.values), case.formula(logits))
    assert found.tops.tolist() == logits.argmax(dim=-1).tolist()
    clean = case.literal.run(case.clean).logits
    assert_close(torch.tensor(found.change), (logits - clean).abs().amax(dim=-1))
    log_clean, log_found = clean.log_softmax(-1), logits.log_softmax(-1)
    assert found.divergence is not None
    assert_close(torch.tensor(found.divergence), (log_clean.exp() * (log_clean - log_found)).sum(-1), 1e-8)


def test_the_whole_has_faithfulness_one_and_nothing_has_zero() -> None:
    case = Case(Recipe(depth=2, heads=2), n_pairs=1)
    found = Evaluator(case.task().prepare(case.model))
    whole, nothing = cv.Circuit.full(case.model.graph), cv.Circuit.empty(case.model.graph)
    assert found.faithfulness(whole) == pytest.approx(1, abs=1e-9)
    assert found.faithfulness(nothing) == 0
    assert np.array_equal(found.effect, found.whole - found.nothing)
    assert found.logits(whole).shape == (1, case.model.n_logits)


# -- once ------------------------------------------------------------------------------------------------


def test_a_circuit_is_run_once_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(Recipe(depth=2, heads=2), n_pairs=3)
    calls: list[object] = []
    original = evaluator.masked_run
    monkeypatch.setattr(evaluator, "masked_run", lambda *given: calls.append(given) or original(*given))
    found, circuit = Evaluator(case.task().prepare(case.model), batch_size=3), circuit_of(case, 1)
    first = found.values(circuit)
    again = found.many([circuit, circuit.kept, circuit.kept | ~circuit.graph.edge_mask])
    assert np.array_equal(again, np.stack([first] * 3))
    assert np.array_equal(found.tops(circuit), found.measure([circuit])[0].tops)
    assert (len(calls), found.runs) == (1, 1)
    assert found.many([]).shape == (0, 3)


def test_what_an_earlier_run_measured_is_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(Recipe(depth=2, heads=2), n_pairs=3)
    prepared, circuit = case.task().prepare(case.model), circuit_of(case, 1)
    first, saves = Evaluator(prepared), []
    first.after_run = lambda: saves.append(first.table())
    expected = first.measure([circuit])[0]
    later = Evaluator(prepared)
    later.recall(saves[0])
    monkeypatch.setattr(evaluator, "masked_run", None)
    found = later.measure([circuit])[0]
    for name in ("values", "tops", "divergence", "change"):
        assert np.array_equal(getattr(found, name), getattr(expected, name))
    assert later.runs == 1


def test_what_is_run_together_is_what_each_gives_alone_and_can_be_settled() -> None:
    """Some circuits are run together, in batches; then in runs of their own, which count once."""
    case = Case(Recipe(depth=2, heads=2), n_pairs=3)
    prepared, circuits = case.task().prepare(case.model), [circuit_of(case, n) for n in range(4)]
    together, alone = Evaluator(prepared, batch_size=2), Evaluator(prepared, batch_size=2)
    found = together.measure(circuits)
    for circuit, own in zip(circuits, found, strict=True):
        (expected,) = alone.measure([circuit])
        assert np.array_equal(own.tops, expected.tops)
        for name in ("values", "divergence", "change"):
            assert np.allclose(getattr(own, name), getattr(expected, name), rtol=1e-9, atol=1e-12)
        assert np.array_equal(together.settled(circuit).values, expected.values)
        assert together.measure([circuit])[0] is together.settled(circuit)
    assert together.runs == alone.runs == 4


def test_where_rounding_could_say_what_the_top_class_is_a_circuit_runs_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case(Recipe(depth=1, heads=2), n_pairs=1)
    prepared, circuits = case.task().prepare(case.model), [circuit_of(case, n) for n in range(3)]
    shape = (3, 1, case.model.n_logits)
    monkeypatch.setattr(evaluator, "masked_runs", lambda *given: torch.ones(shape, dtype=torch.float64))
    found = Evaluator(prepared).measure(circuits)
    monkeypatch.undo()
    assert [own.values for own in found] == [Evaluator(prepared).values(each) for each in circuits]


def test_what_was_measured_cannot_be_overwritten() -> None:
    case = Case(Recipe(depth=1))
    found = Evaluator(case.task().prepare(case.model))
    with pytest.raises(ValueError, match="read-only"):
        found.whole[:] = 0


# -- the memory budget -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ablation", ["patch", "mean", "noise", "resample"])
def test_batches_captured_anew_give_identical_numbers(ablation: str) -> None:
    case = Case(Recipe(depth=2, heads=2), n_pairs=5)
    prepared, masks = (
        case.task(ablation=ablation).prepare(case.model),
        [circuit_of(case, n) for n in range(3)],
    )
    held = Evaluator(prepared, batch_size=2)
    streamed = Evaluator(prepared, batch_size=2, memory=1)
    assert np.array_equal(held.many(masks), streamed.many(masks))
    assert held.batch(0) is held.batch(0)
    assert streamed.batch(0) is not streamed.batch(0)


def test_as_many_batches_are_held_as_fit() -> None:
    case = Case(Recipe(depth=2, heads=2), n_pairs=6)
    prepared = case.task().prepare(case.model)
    each = Evaluator(prepared, batch_size=2).batch(0).sources.nbytes
    found = Evaluator(prepared, batch_size=2, memory=int(2.5 * each))
    first, second = list(found.batches()), list(found.batches())
    assert [one is other for one, other in zip(first, second, strict=True)] == [True, True, False]


def test_a_search_that_needs_all_batches_says_how_many_fit() -> None:
    case = Case(Recipe(depth=1), n_pairs=4)
    prepared = case.task().prepare(case.model)
    assert len(Evaluator(prepared, batch_size=2).own_batches()) == 2
    with pytest.raises(DataError, match=r"4 pairs would take .* at most 1 pairs .* memory="):
        Evaluator(prepared, memory=1).own_batches()


@pytest.mark.parametrize("options", [{"memory": 0}, {"memory": -5}, {"batch_size": 0}])
def test_a_budget_is_positive(options: dict[str, int]) -> None:
    case = Case(Recipe(depth=1))
    with pytest.raises(OptionError, match=r"positive|at least 1"):
        Evaluator(case.task().prepare(case.model), **options)  # type: ignore[arg-type]


def test_a_small_budget_means_small_batches() -> None:
    prepared = Case(Recipe(depth=1), n_pairs=4).task().prepare(Case(Recipe(depth=1)).model)
    assert choose_batch_size(prepared) == 4
    assert choose_batch_size(prepared, 1) == 1


# -- the weights as they are -----------------------------------------------------------------------------


def _scaled(module: torch.nn.Module) -> None:
    with torch.no_grad():
        module.blocks[0].mlp.fc1.weight.mul_(1.5)  # type: ignore[union-attr, operator, index]


def _loaded(module: torch.nn.Module) -> None:
    module.load_state_dict({name: value * 1.5 for name, value in module.state_dict().items()})


@pytest.mark.parametrize("edit", [_scaled, _loaded])
@pytest.mark.parametrize("ablation", ["patch", "mean"])
def test_weights_edited_in_place_are_noticed(edit: Callable[[torch.nn.Module], None], ablation: str) -> None:
    case = Case(Recipe(depth=1, heads=2), n_pairs=2)
    prepared, circuit = case.task(ablation=ablation).prepare(case.model), circuit_of(case, 0)
    found = Evaluator(prepared)
    before = found.values(circuit)
    edit(case.module)
    after = found.values(circuit)
    assert not np.allclose(before, after)
    assert np.array_equal(after, Evaluator(prepared).values(circuit))


# -- refusals --------------------------------------------------------------------------------------------


def test_a_task_prepared_for_another_model_is_refused() -> None:
    case = Case(Recipe(depth=1))
    prepared, other = case.task().prepare(case.model), Case(Recipe(depth=1)).model
    assert prepare(case.model, prepared) is prepared
    for attempt in (
        lambda: prepare(other, prepared),
        lambda: cv.run(other, prepared, cv.Circuit.full(other.graph)),
        lambda: cv.attribute(other, prepared),
    ):
        with pytest.raises(OptionError, match="prepared for"):
            attempt()


def test_circuits_and_masks_of_another_graph_are_refused() -> None:
    case = Case(Recipe(depth=1))
    found, other = Evaluator(case.task().prepare(case.model)), Case(Recipe(depth=2)).model.graph
    with pytest.raises(OptionError, match="the circuit belongs to another graph"):
        found.values(cv.Circuit.full(other))
    with pytest.raises(OptionError, match="a mask of shape"):
        found.values(other.edge_mask)


def test_a_metric_that_is_no_number_names_the_pair() -> None:
    case = Case(Recipe(depth=1), n_pairs=3)
    broken = torch.tensor([0.0, float("nan"), 0.0])
    task = case.task(metric=lambda logits: logits[..., 0] + broken[: logits.shape[-2]])
    with pytest.raises(DataError, match=r"NaN or infinite for image 1"):
        assert Evaluator(task.prepare(case.model)).whole is None


def test_pairs_without_an_effect_are_refused() -> None:
    case = Case(Recipe(depth=1), n_pairs=2)
    same = cv.Task(case.clean, case.clean, cv.logit_diff(0, 1)).prepare(case.model)
    with pytest.raises(DataError, match="nothing for a circuit to explain"):
        Evaluator(same).faithfulness(cv.Circuit.full(same.graph))
    magnified = cv.Task(case.clean, case.clean, metric="kl_divergence").prepare(case.model)
    with pytest.raises(DataError, match="the same"):
        Evaluator(magnified).check_effect()


def test_an_effect_is_told_from_noise() -> None:
    check_effect([1.0, 2.0, 1.0, 2.0, 1.0], [0.0] * 5)
    noise = [5.0, -4.9, 5.1, -5.0, 0.1]
    with pytest.raises(DataError, match=r"not distinguishable from 0.*pair 3 \(-5\)"):
        check_effect(noise, [0.0] * 5)
    check_effect(noise, [0.0] * 5, level=0)
    with pytest.raises(DataError, match="same within rounding"):
        check_effect([1.0, 1.0], [1.0, 1.0], level=0)

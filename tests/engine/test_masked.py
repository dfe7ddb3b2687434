"""Masked runs: the three identities of the design, and the literal split model for every mask."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import circuitvit as cv
from circuitvit.engine import BatchRun, batch_runs, masked, masked_run, new_workspace
from circuitvit.errors import OptionError
from circuitvit.graph import EdgeMask, Graph
from tests.strategies import Case, Recipe, assert_close, cases

SEEDS = st.integers(0, 2**16)
DENSITIES = st.sampled_from((0.05, 0.3, 0.7, 0.95))


def one_batch(case: Case) -> BatchRun:
    (batch,) = batch_runs(case.task().prepare(case.model), case.n_pairs)
    return batch


def as_array(graph: Graph, mask: dict[str, bool]) -> EdgeMask:
    return cv.Circuit.from_edges(graph, [name for name, keep in mask.items() if keep]).kept


# -- identities ----------------------------------------------------------------------------------------


@given(cases())
def test_with_every_edge_kept_the_logits_are_the_models_own(case: Case) -> None:
    batch = one_batch(case)
    with torch.no_grad():
        expected = case.module(case.base)
    assert_close(masked_run(batch.sources, batch.sources.graph.edge_mask), expected, 1e-12)


@given(cases(ablations=("patch",)))
def test_with_no_edge_kept_the_logits_are_those_of_the_corrupt_run(case: Case) -> None:
    batch = one_batch(case)
    with torch.no_grad():
        expected = case.module(case.paired)
    assert_close(masked_run(batch.sources, np.zeros(batch.sources.graph.shape, dtype=bool)), expected, 1e-12)


# -- the literal split model -----------------------------------------------------------------------------


@given(cases(), SEEDS, DENSITIES)
def test_any_mask_gives_the_logits_of_the_literal_model(case: Case, seed: int, density: float) -> None:
    batch = one_batch(case)
    mask = case.random_mask(seed, density)
    expected = case.literal.run(case.base, case.reference, mask, case.token_groups).logits
    assert list(mask) == list(batch.sources.graph.edges)
    assert_close(masked_run(batch.sources, as_array(batch.sources.graph, mask)), expected)


@given(cases(), SEEDS, DENSITIES)
def test_a_few_images_at_a_time_give_what_all_give_together(case: Case, seed: int, density: float) -> None:
    case = replace(case, n_pairs=3)
    batch = one_batch(case)
    kept = as_array(batch.sources.graph, case.random_mask(seed, density))
    together = masked_run(batch.sources, kept)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masked, "ROOM_BYTES", 1)
        assert_close(masked_run(batch.sources, kept), together, 1e-12)


@given(cases(max_heads=2), SEEDS)
def test_a_workspace_used_before_changes_nothing(case: Case, seed: int) -> None:
    """Runs leave their numbers in the workspace; a later run must overwrite all that it looks at."""
    batch = one_batch(case)
    workspace = new_workspace(batch.sources)
    for step, density in enumerate((0.9, 0.1, 0.6, 0.3)):
        kept = as_array(batch.sources.graph, case.random_mask(seed + step, density))
        fresh = masked_run(batch.sources, kept)
        assert torch.equal(masked_run(batch.sources, kept, workspace=workspace), fresh)


@given(cases(), SEEDS, st.data())
def test_a_run_may_start_at_the_first_stage_with_ablated_edges(
    case: Case, seed: int, data: st.DataObject
) -> None:
    batch = one_batch(case)
    graph = batch.sources.graph
    start = data.draw(st.integers(1, len(graph.stages) - 1))
    kept = as_array(graph, case.random_mask(seed, 0.5))
    kept = kept.copy()
    before = slice(0, graph.receiver_slices[start].start)
    kept[:, before] = graph.edge_mask[:, before]
    assert_close(masked_run(batch.sources, kept, start=start), masked_run(batch.sources, kept), 1e-12)


@given(cases(ablations=("patch",)), SEEDS, DENSITIES)
def test_dead_edges_do_nothing_when_the_reference_is_another_run(
    case: Case, seed: int, density: float
) -> None:
    batch = one_batch(case)
    graph = batch.sources.graph
    circuit = cv.Circuit(graph, as_array(graph, case.random_mask(seed, density)))
    pruned = masked_run(batch.sources, circuit.pruned().kept)
    assert_close(pruned, masked_run(batch.sources, circuit.kept), 1e-11)


@given(cases(ablations=("mean", "mean-tokens", "zero")), SEEDS, DENSITIES)
def test_with_a_fixed_reference_dead_edges_carry_a_constant_and_nothing_of_the_image(
    case: Case, seed: int, density: float
) -> None:
    """A sender that hears nothing of the input gives a constant, which need not be its reference output."""
    if case.groups == "per-image":
        case = replace(case, groups="shared")  # the constant depends on how the tokens are grouped
    case = replace(case, n_pairs=3)
    batch = one_batch(case)
    graph = batch.sources.graph
    circuit = cv.Circuit(graph, as_array(graph, case.random_mask(seed, density)))
    logits = masked_run(batch.sources, (circuit - circuit.pruned()).kept)
    assert_close(logits, logits[:1].expand_as(logits), 1e-11)


# -- cv.run ----------------------------------------------------------------------------------------------


@given(cases(), SEEDS, DENSITIES)
def test_run_keeps_the_circuit_and_ablate_removes_it(case: Case, seed: int, density: float) -> None:
    task, graph = case.task(), case.task().prepare(case.model).graph
    circuit = cv.Circuit(graph, as_array(graph, case.random_mask(seed, density)))
    assert torch.equal(cv.run(case.model, task, circuit), cv.run(case.model, task, ablate=~circuit))
    in_circuit = set(circuit)
    # Noising keeps the circuit in the clean run; denoising restores it in the corrupt one, where an edge that
    # is "kept" is one that stays corrupt.
    noising = case.direction == "noising"
    expected = case.literal.run(
        case.base, case.reference, lambda name: (name in in_circuit) == noising, case.token_groups
    )
    assert_close(cv.run(case.model, task, circuit), expected.logits)


@given(cases(ablations=("patch",)))
def test_denoising_restores_the_clean_run(case: Case) -> None:
    task = case.task(direction="denoising")
    graph = task.prepare(case.model).graph
    with torch.no_grad():
        clean, corrupt = case.module(case.clean), case.module(case.corrupt)
    assert_close(cv.run(case.model, task, cv.Circuit.full(graph)), clean, 1e-12)
    assert_close(cv.run(case.model, task, cv.Circuit.empty(graph)), corrupt, 1e-12)
    assert_close(cv.run(case.model, task, ablate=cv.Circuit.empty(graph)), clean, 1e-12)


@given(cases(), SEEDS)
def test_logits_do_not_depend_on_the_batch_size(case: Case, seed: int) -> None:
    task = case.task()
    circuit = cv.Circuit(
        task.prepare(case.model).graph, as_array(task.prepare(case.model).graph, case.random_mask(seed, 0.5))
    )
    together = cv.run(case.model, task, circuit, batch_size=case.n_pairs)
    assert_close(cv.run(case.model, task, circuit, batch_size=1), together, 1e-12)
    assert_close(cv.run(case.model, task, circuit), together, 1e-12)


def test_a_batch_needs_a_pair() -> None:
    case = Case(Recipe(depth=1))
    with pytest.raises(OptionError, match="batch size"):
        cv.run(case.model, case.task(), cv.Circuit.full(case.model.graph), batch_size=-1)


def test_run_wants_one_circuit_of_the_tasks_graph() -> None:
    case = Case(Recipe(depth=1))
    circuit = cv.Circuit.full(case.model.graph)
    with pytest.raises(OptionError, match="ablate="):
        cv.run(case.model, case.task())
    with pytest.raises(OptionError, match="ablate="):
        cv.run(case.model, case.task(), circuit, ablate=circuit)
    with pytest.raises(OptionError, match="the circuit belongs to another graph"):
        cv.run(case.model, case.task(groups="kind"), circuit)
    with pytest.raises(OptionError, match="the circuit belongs to another graph"):
        cv.run(case.model, case.task(), cv.Circuit.full(Case(Recipe(depth=2)).model.graph))

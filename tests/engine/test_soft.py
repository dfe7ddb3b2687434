"""Runs under real-valued masks: masked runs at 0 and 1, and EAP by another route."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitvit as cv
from circuitvit.engine import batch_runs, masked_run, soft_run
from tests.reference import literal_scores
from tests.strategies import Case, assert_close, assert_same_scores, cases


@given(cases(), st.integers(0, 2**16))
def test_a_mask_of_zeros_and_ones_gives_the_masked_run(case: Case, seed: int) -> None:
    (batch,) = batch_runs(case.task().prepare(case.model), case.n_pairs)
    mask = case.random_mask(seed, 0.5)
    kept = cv.Circuit.from_edges(batch.sources.graph, [name for name, keep in mask.items() if keep]).kept
    soft = soft_run(batch.sources, torch.from_numpy(kept.copy()).double())
    assert_close(soft, masked_run(batch.sources, kept), 1e-11)


@given(cases(smooth=True))
def test_the_gradient_of_the_mask_at_the_base_run_is_the_negative_eap_score(case: Case) -> None:
    """`dX_v / dM[u, v] = x_u - r_u`, so the slope of the metric along an edge's mask is `-s(u->v)`."""
    (batch,) = batch_runs(case.task().prepare(case.model), case.n_pairs)
    mask = torch.ones(batch.sources.graph.shape, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(case.formula(soft_run(batch.sources, mask)).sum(), mask)
    scores = (-slope / case.n_pairs)[torch.from_numpy(batch.sources.graph.edge_mask.copy())].tolist()
    found = dict(zip(batch.sources.graph.edges, scores, strict=True))
    expected = literal_scores.eap(case.literal, case.base, case.reference, case.formula, case.token_groups)
    assert_same_scores(found, expected)


@settings(max_examples=25)
@given(cases(), st.integers(0, 2**16), st.booleans())
def test_a_run_of_the_gates_that_may_be_open_is_that_of_all_gates(
    case: Case, seed: int, checkpoint: bool
) -> None:
    """Values and slopes are the same where all other gates are 0, whatever is left out of the run."""
    (batch,) = batch_runs(case.task().prepare(case.model), case.n_pairs)
    kept = case.random_mask(seed, 0.4)
    possible = cv.Circuit.from_edges(batch.sources.graph, [name for name, keep in kept.items() if keep]).kept
    gates = torch.rand(possible.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gates *= torch.from_numpy(possible.copy())
    whole, part = gates.clone().requires_grad_(), gates.clone().requires_grad_()
    slow, fast = soft_run(batch.sources, whole), soft_run(batch.sources, part, checkpoint, possible)
    assert_close(fast, slow, 1e-11)
    (expected,) = torch.autograd.grad(slow.square().sum(), whole)
    (found,) = torch.autograd.grad(fast.square().sum(), part)
    assert_close(found, expected * torch.from_numpy(possible.copy()), 1e-9)

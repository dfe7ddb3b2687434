"""Slopes of gates at a circuit: the literal gradient at what a receiver hears times what an edge carries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitvit as cv
from circuitvit.engine import Evaluator
from tests.families import FAMILIES, made
from tests.reference.literal_scores import slopes
from tests.strategies import Case, Recipe, assert_same_scores, cases

SEEDS = st.integers(0, 2**16)


@settings(max_examples=8)
@given(cases(smooth=True), SEEDS, st.sampled_from((0.1, 0.4, 0.9)))
def test_slopes_are_the_literal_ones_for_kept_edges_and_for_ablated_ones(
    case: Case, seed: int, density: float
) -> None:
    """In the denoising direction an edge of the circuit is one that the corrupt run does not keep."""
    mask, noising = case.random_mask(seed, density), case.direction == "noising"
    expected = slopes(
        case.literal,
        case.base,
        case.reference,
        case.formula,
        lambda name: mask[name] == noising,
        case.token_groups,
    )
    expected = {name: value if noising else -value for name, value in expected.items()}
    evaluator = Evaluator(case.task().prepare(case.model), batch_size=2)
    graph = evaluator.graph
    circuit = cv.Circuit.from_edges(graph, [name for name, keep in mask.items() if keep])
    every = evaluator.slopes(circuit, absent=True)
    assert_same_scores(dict(zip(graph.edges, every[graph.edge_mask].tolist(), strict=True)), expected)
    assert np.allclose(evaluator.slopes(circuit), np.where(circuit.kept, every, 0), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("family", ["timm, pool beside a class token", "timm, norm across heads"])
def test_slopes_are_differences_of_runs_in_families_whose_parts_are_joined_otherwise(family: str) -> None:
    """The divergence, between real-valued masks."""
    model, images = made(family)[0], FAMILIES[family].images
    evaluator = Evaluator(cv.Task(images(1), images(1, seed=1), metric=cv.logit(0)).prepare(model))
    (run,), graph = evaluator.batches(), evaluator.graph
    kept = graph.edge_mask & (np.random.default_rng(0).random(graph.shape) < 0.5)
    found = evaluator.slopes(kept, of="divergence", absent=True)
    for edge in np.argwhere(graph.edge_mask & (found != 0))[::29]:
        moved = []
        for step in (1e-4, -1e-4):
            mask = torch.from_numpy(kept.astype(float))
            mask[tuple(edge)] += step
            moved.append(float(cv.tasks.divergence(run.clean_logits, cv.engine.soft_run(run.sources, mask))))
        assert found[tuple(edge)] == pytest.approx((moved[0] - moved[1]) / 2e-4, rel=1e-4, abs=1e-8)


def test_a_metric_that_does_not_look_at_the_logits_has_no_slopes() -> None:
    case = Case(Recipe(depth=1))
    evaluator = Evaluator(case.task(metric=lambda logits: torch.ones(logits.shape[:-1])).prepare(case.model))
    assert not evaluator.slopes(evaluator.graph.edge_mask).any()

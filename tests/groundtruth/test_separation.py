"""Edges that matter by brute force, and how well scores separate them from the rest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

import circuitvit as cv
from circuitvit.graph import StageNodes
from circuitvit.groundtruth.edges import largest_effects
from circuitvit.testing import active_edges, separation
from tests.strategies import Case, cases

LADDER = cv.Graph(
    (
        StageNodes("input", "input", 0, senders=("input",)),
        *(StageNodes(f"mlp{n}", "mlp", n, senders=(f"m{n}",), receivers=(f"m{n}",)) for n in range(4)),
        StageNodes("readout", "readout", 4, receivers=("logits",)),
    )
)
"""A graph of 15 edges."""


@given(cases(max_depth=1, max_heads=2), st.data())
def test_the_largest_effect_is_that_of_a_run_without_the_edge(case: Case, data: st.DataObject) -> None:
    """Over pairs, by `cv.run`: `ablate=` when noising, a circuit of one edge when denoising."""
    task = case.task()
    prepared = task.prepare(case.model)
    largest = largest_effects(prepared)
    assert not largest[~prepared.graph.edge_mask].any()
    with torch.no_grad():
        before = case.formula(case.module(case.base))
    for name in data.draw(st.lists(st.sampled_from(prepared.graph.edges), min_size=3, max_size=3)):
        one = cv.Circuit.from_edges(prepared.graph, [name])
        options = {"ablate": one} if case.direction == "noising" else {"circuit": one}
        difference = case.formula(cv.run(case.model, task, **options)) - before
        expected = float(difference.abs().max())
        assert largest[prepared.graph.edge_index(name)] == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_active_edges_are_those_above_the_threshold() -> None:
    relay = cv.compiled("relay")
    prepared = cv.Task(*relay.pairs(4), metric=cv.logit_diff("yes", "no")).prepare(relay.model)
    largest = largest_effects(prepared)
    for threshold in (1e-3, 1.0, float(largest.max())):
        expected = cv.Circuit(prepared.graph, largest >= threshold)
        assert active_edges(relay.model, prepared, at_least=threshold) == expected
        assert len(expected) > 0


def test_pairs_that_pull_in_opposite_directions_do_not_hide_an_edge() -> None:
    relay = cv.compiled("relay")
    clean, corrupt = relay.pairs(1)
    metric = cv.logit_diff(cv.PerPair(("yes", "no")), cv.PerPair(("no", "yes")))
    task = cv.Task(clean.expand(2, -1, -1, -1), corrupt.expand(2, -1, -1, -1), metric=metric)
    alone = cv.Task(clean, corrupt, metric=cv.logit_diff("yes", "no"))
    assert active_edges(relay.model, task) == active_edges(relay.model, alone)
    assert len(active_edges(relay.model, task)) == 3


@given(
    st.lists(st.integers(-3, 3), min_size=15, max_size=15),
    st.sets(st.integers(0, 14), min_size=1, max_size=14),
)
def test_separation_is_that_of_scikit_learn(sizes: list[int], chosen: set[int]) -> None:
    """Also where scores are tied."""
    values, kept = np.zeros(LADDER.shape), np.zeros(LADDER.shape, dtype=bool)
    values[LADDER.edge_mask] = sizes
    marks = np.isin(np.arange(15), list(chosen))
    kept[LADDER.edge_mask] = marks
    found = separation(cv.EdgeScores(LADDER, values), cv.Circuit(LADDER, kept))
    assert found.roc_auc == pytest.approx(roc_auc_score(marks, np.abs(sizes)))
    assert found.average_precision == pytest.approx(average_precision_score(marks, np.abs(sizes)))


def test_nothing_to_tell_apart_is_refused() -> None:
    scores = cv.EdgeScores(LADDER, np.zeros(LADDER.shape))
    for truth in (cv.Circuit.full(LADDER), cv.Circuit.empty(LADDER)):
        with pytest.raises(cv.CircuitViTError, match="of 15 edges matter: there is nothing to tell apart"):
            separation(scores, truth)
    relay = cv.compiled("relay")
    with pytest.raises(cv.CircuitViTError, match="belongs to another graph"):
        separation(scores, relay.wired)
    with pytest.raises(cv.CircuitViTError, match="must be a positive number, not 0"):
        active_edges(relay.model, cv.Task(*relay.pairs(1)), at_least=0)

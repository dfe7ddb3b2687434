"""Edges that matter by brute force, and how well scores separate them from the rest."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

import circuitvit as cv
from circuitvit.graph import StageNodes
from circuitvit.testing import active_edges, separation
from tests.attribution.test_ground_truth import task_of
from tests.strategies import Case, cases

LADDER = cv.Graph(
    (
        StageNodes("input", "input", 0, senders=("input",)),
        *(StageNodes(f"mlp{n}", "mlp", n, senders=(f"m{n}",), receivers=(f"m{n}",)) for n in range(4)),
        StageNodes("readout", "readout", 4, receivers=("logits",)),
    )
)
"""A graph of 15 edges."""


@given(cases(max_depth=1, max_heads=2))
def test_active_edges_are_those_that_move_some_pair(case: Case) -> None:
    """On one pair the largest effect over pairs is the exact effect itself."""
    task = case.task()
    prepared = task.prepare(case.model)
    exact = np.abs(cv.attribute(case.model, prepared, "exact", progress=False).values)
    threshold = float(np.median(exact[prepared.graph.edge_mask])) * 1.000001
    active = active_edges(case.model, prepared, at_least=threshold)
    assert not (exact >= threshold * 1.000001)[~active.kept].any()  # a mean is never above the largest
    if len(prepared) == 1:
        assert np.array_equal(active.kept, exact >= threshold)


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
    with pytest.raises(cv.CircuitViTError, match="different graphs"):
        separation(scores, relay.wired)
    with pytest.raises(cv.CircuitViTError, match="must be positive, not 0"):
        active_edges(relay.model, task_of(relay), at_least=0)

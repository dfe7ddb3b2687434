"""Edge scores: one number for each edge."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuitvit.errors import NameNotFoundError, OptionError
from circuitvit.graph import EdgeScores
from circuitvit.graph.eap_ig import transformer_graph
from tests.graph.strategies import scored

GRAPH = transformer_graph(1, 1)


@given(scored())
def test_scores_are_looked_up_by_name(scores: EdgeScores) -> None:
    everything = scores.to_dict()
    assert list(everything) == list(scores.graph.edges)
    assert all(scores[name] == value for name, value in everything.items())
    assert len(scores) == len(everything)


@given(scored(), st.integers(0, 5))
def test_the_strongest_come_first(scores: EdgeScores, k: int) -> None:
    by_hand = sorted(scores.to_dict().items(), key=lambda item: -abs(item[1]))[:k]
    assert scores.strongest(k) == by_hand


def test_support_is_positive_for_edges_that_the_behaviour_needs() -> None:
    values = np.full(GRAPH.shape, -0.5)
    lowers = EdgeScores(GRAPH, values)
    assert (lowers.support[GRAPH.edge_mask] > 0).all()
    restored = EdgeScores(GRAPH, -values, direction="denoising")
    assert (restored.support[GRAPH.edge_mask] > 0).all()


def test_what_is_no_edge_has_no_score() -> None:
    scores = EdgeScores(GRAPH, np.where(GRAPH.edge_mask, 1.0, np.nan))
    assert scores.values.sum() == GRAPH.n_edges
    with pytest.raises(ValueError, match="read-only"):
        scores.values[0, 0, 0] = 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_must_be_finite(value: float) -> None:
    with pytest.raises(OptionError, match="finite"):
        EdgeScores(GRAPH, np.full(GRAPH.shape, value))


def test_scores_must_fit_the_graph() -> None:
    with pytest.raises(OptionError, match="do not fit"):
        EdgeScores(GRAPH, np.zeros((2, 2)))


def test_an_unknown_edge_has_no_score() -> None:
    with pytest.raises(NameNotFoundError, match="did you mean"):
        EdgeScores(GRAPH, np.zeros(GRAPH.shape))["inptu->m0"]


@given(scored())
def test_the_repr_names_the_method_and_the_strongest_edge(scores: EdgeScores) -> None:
    assert repr(scores).startswith(f"EdgeScores(random, {len(scores):,} edges; strongest: ")
    assert scores.strongest(1)[0][0] in repr(scores)


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_a_saved_file_gives_the_same_scores_again(direction: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal(GRAPH.shape)
    scores = EdgeScores(GRAPH, values, "random", direction)  # type: ignore[arg-type]
    again = EdgeScores.load(scores.save(tmp_path / "scores.json"), GRAPH)
    assert np.array_equal(again.values, scores.values)
    assert (again.method, again.direction, again.provenance) == ("random", direction, scores.provenance)

"""From scores to circuits: which edges are chosen, and that the connected ones really are."""

from __future__ import annotations

from itertools import product
from time import perf_counter

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuitvit.errors import OptionError
from circuitvit.graph import Circuit, EdgeScores, Graph, StageNodes
from circuitvit.graph.eap_ig import transformer_graph
from tests.graph.strategies import all_paths, port_graph, scored

GRAPH = transformer_graph(1, 1)  # 8 edges


def scores_of(values: dict[str, float], graph: Graph = GRAPH, direction: str = "noising") -> EdgeScores:
    array = np.zeros(graph.shape)
    for name, value in values.items():
        array[graph.edge_index(name)] = value
    return EdgeScores(graph, array, "by hand", direction)  # type: ignore[arg-type]


# -- top and threshold ---------------------------------------------------------------------------


@given(scored(), st.data())
def test_top_takes_the_edges_of_largest_magnitude(scores: EdgeScores, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(scores)))
    by_hand = sorted(scores.graph.edges, key=lambda name: -abs(scores[name]))[:k]
    assert set(scores.top(k, prune=False)) == set(by_hand)
    assert scores.top(k) == scores.top(k, prune=False).pruned()


@given(scored(), st.data())
def test_signed_top_takes_only_edges_that_support_the_behaviour(
    scores: EdgeScores, data: st.DataObject
) -> None:
    k = data.draw(st.integers(0, len(scores)))
    supporting = [name for name in scores.graph.edges if scores[name] < 0]  # ablating them lowers the metric
    by_hand = sorted(supporting, key=lambda name: scores[name])[:k]
    assert set(scores.top(k, by="signed", prune=False)) == set(by_hand)


def test_when_restoring_the_supporting_edges_are_the_positive_ones() -> None:
    values = {"input->logits": 1.0, "input->m0": -1.0}
    assert list(scores_of(values).top(1, "signed", prune=False)) == ["input->m0"]
    assert list(scores_of(values, direction="denoising").top(1, "signed")) == ["input->logits"]


def test_ties_go_to_the_edge_that_comes_first_in_the_graph() -> None:
    tied = scores_of(dict.fromkeys(GRAPH.edges, 0.5))
    for k in range(GRAPH.n_edges + 1):
        assert list(tied.top(k, prune=False)) == list(GRAPH.edges[:k])


@given(scored(), st.floats(0.5, 40))
def test_threshold_takes_all_edges_at_or_past_it(scores: EdgeScores, at_least: float) -> None:
    by_hand = {name for name in scores.graph.edges if abs(scores[name]) >= at_least}
    assert set(scores.threshold(at_least, prune=False)) == by_hand
    supporting = {name for name in by_hand if scores[name] < 0}
    assert set(scores.threshold(at_least, by="signed", prune=False)) == supporting


def test_a_circuit_remembers_how_it_was_chosen_and_its_scores() -> None:
    scores = scores_of({"input->logits": -2.0})
    circuit = scores.top(np.int64(1))  # type: ignore[arg-type]
    asked = {"asked": 1, "by": "magnitude", "selection": "top", "direction": "noising"}
    assert dict(circuit.provenance.parameters) == asked
    assert circuit.score_of("input->logits") == -2.0


@pytest.mark.parametrize("k", [-1, 9, 2.5, "3", None])
def test_an_impossible_size_is_refused(k: object) -> None:
    scores = scores_of({})
    for select in (scores.top, scores.connected):
        with pytest.raises(OptionError, match=r"asked for|whole number"):
            select(k)  # type: ignore[operator]


@pytest.mark.parametrize("at_least", [0, -0.1, float("nan")])
def test_an_impossible_threshold_is_refused(at_least: float) -> None:
    with pytest.raises(OptionError, match="positive number"):
        scores_of({}).threshold(at_least)


def test_an_unknown_ranking_is_refused() -> None:
    with pytest.raises(OptionError, match="'magnitude' or 'signed', not by 'size'"):
        scores_of({}).top(1, by="size")  # type: ignore[arg-type]


# -- connected -----------------------------------------------------------------------------------


@given(scored(), st.data(), st.sampled_from(["magnitude", "signed"]))
def test_connected_never_holds_a_dead_edge_nor_more_than_asked(
    scores: EdgeScores, data: st.DataObject, by: str
) -> None:
    k = data.draw(st.integers(0, len(scores)))
    circuit = scores.connected(k, by)  # type: ignore[arg-type]
    assert len(circuit) <= k
    assert circuit.pruned() == circuit


@given(scored())
def test_connected_finds_every_live_edge_when_there_is_room(scores: EdgeScores) -> None:
    assert scores.connected(len(scores)) == Circuit.full(scores.graph).pruned()


@settings(max_examples=60)
@given(scored())
def test_connected_begins_with_the_best_path_through_the_best_edge(scores: EdgeScores) -> None:
    """Compared with all paths there are: on either side of the edge the widest, and of these the shortest."""
    paths = all_paths(Circuit.full(scores.graph))
    if not paths:
        assert len(scores.connected(len(scores))) == 0
        return
    best_edge = max({name for path in paths for name in path}, key=lambda name: abs(scores[name]))

    def goodness(side: tuple[str, ...]) -> tuple[float, int]:
        return min((abs(scores[name]) for name in side), default=float("inf")), -len(side)

    through = [path for path in paths if best_edge in path]
    before = max(goodness(path[: path.index(best_edge)]) for path in through)
    after = max(goodness(path[path.index(best_edge) + 1 :]) for path in through)
    circuit = scores.connected(1 - before[1] - after[1])
    (found,) = circuit.paths()
    assert set(found) == set(circuit)
    assert goodness(found[: found.index(best_edge)]) == before
    assert goodness(found[found.index(best_edge) + 1 :]) == after


@given(scored())
def test_with_too_little_room_for_the_best_path_a_shorter_one_is_taken(scores: EdgeScores) -> None:
    direct = [path for path in all_paths(Circuit.full(scores.graph)) if len(path) == 1]
    circuit = scores.connected(1)
    assert len(circuit) == (1 if direct else 0)
    if direct:
        assert set(circuit) == set(max(direct, key=lambda path: abs(scores[path[0]])))


def test_connected_keeps_the_strong_edge_that_plain_top_loses() -> None:
    scores = scores_of({"m0->logits": 3.0, "input->a0.h0<v>": 2.0, "input->m0": 0.1})
    assert len(scores.top(2)) == 0
    assert set(scores.connected(2)) == {"input->m0", "m0->logits"}


def test_of_equally_wide_ways_the_shortest_is_taken() -> None:
    """All ways to the logits are limited by the last edge, so a longer one would waste the room."""
    graph = transformer_graph(3, 1)
    values = dict.fromkeys(graph.edges, 5.0) | {
        name: 0.5 for name in graph.edges if name.endswith("->logits")
    }
    circuit = scores_of(values | {"input->m0": 9.0, "m0->logits": 0.5}, graph).connected(2)
    assert set(circuit) == {"input->m0", "m0->logits"}


def test_an_edge_on_no_path_takes_no_room() -> None:
    graph = Graph(
        (
            StageNodes("input", "input", 0, senders=("input",)),
            StageNodes("deaf", "mlp", 0, senders=("m0",), receivers=("m0",), feeds=((),)),
            StageNodes("readout", "readout", 1, receivers=("logits",)),
        )
    )
    scores = scores_of({"m0->logits": 9.0, "input->m0": 8.0, "input->logits": 1.0}, graph)
    assert list(scores.connected(1)) == ["input->logits"]


def test_connected_is_quick_on_a_large_model() -> None:
    graph = transformer_graph(12, 12)
    scores = EdgeScores(graph, np.random.default_rng(0).standard_normal(graph.shape))
    start = perf_counter()
    assert 2900 < len(scores.connected(3000)) <= 3000
    assert perf_counter() - start < 30


def test_the_oracle_of_these_tests_knows_a_path_when_it_sees_one() -> None:
    flow, sources, readouts = port_graph(Circuit.from_edges(GRAPH, ["input->m0", "m0->logits"]))
    assert [nx.has_path(flow, *ends) for ends in product(sources, readouts)] == [True]

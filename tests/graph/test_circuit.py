"""A circuit behaves like an immutable set of edges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuitvit.errors import NameNotFoundError, OptionError
from circuitvit.graph import Circuit, EdgeScores, Graph, Provenance, node_of, parse_edge
from circuitvit.graph.eap_ig import transformer_graph
from tests.graph.strategies import circuits, graphs

GRAPH = transformer_graph(1, 2)
HERE = st.just(GRAPH)


@given(circuits(HERE), circuits(HERE), circuits(HERE))
def test_the_laws_of_sets_hold(a: Circuit, b: Circuit, c: Circuit) -> None:
    assert a | b == b | a
    assert a & b == b & a
    assert (a | b) | c == a | (b | c)
    assert a & (b | c) == (a & b) | (a & c)
    assert ~(a | b) == ~a & ~b
    assert a - b == a & ~b
    assert a ^ b == (a | b) - (a & b)
    assert ~~a == a
    assert a & ~a == Circuit.empty(GRAPH)
    assert a | ~a == Circuit.full(GRAPH)


@given(circuits(HERE), circuits(HERE))
def test_it_agrees_with_a_set_of_names(a: Circuit, b: Circuit) -> None:
    assert set(a | b) == set(a) | set(b)
    assert set(a & b) == set(a) & set(b)
    assert set(a - b) == set(a) - set(b)
    assert set(a ^ b) == set(a) ^ set(b)
    assert (a <= b) == (set(a) <= set(b))
    assert (a == b) == (set(a) == set(b))
    assert len(a) == len(set(a))
    union = set(a) | set(b)
    assert a.jaccard(b) == (len(set(a) & set(b)) / len(union) if union else 1.0)


@given(circuits())
def test_edges_come_in_graph_order_and_build_the_same_circuit_again(circuit: Circuit) -> None:
    names = list(circuit)
    order = {name: place for place, name in enumerate(circuit.graph.edges)}
    assert names == sorted(names, key=order.__getitem__)
    again = Circuit.from_edges(circuit.graph, reversed(names))
    assert again == circuit
    assert hash(again) == hash(circuit)
    assert circuit.density == pytest.approx(len(circuit) / circuit.graph.n_edges)


@given(circuits())
def test_its_nodes_are_the_ends_of_its_edges(circuit: Circuit) -> None:
    ends = {end for name in circuit for end in (parse_edge(name).sender, node_of(parse_edge(name).receiver))}
    assert set(circuit.nodes) == ends
    assert len(circuit.nodes) == len(ends)


def test_membership_asks_for_a_name_and_never_fails() -> None:
    circuit = Circuit.from_edges(GRAPH, ["input->m0"])
    assert "input->m0" in circuit
    assert "input -> m0" in circuit
    assert "input->logits" not in circuit
    assert "no such edge" not in circuit
    assert 7 not in circuit


def test_an_unknown_edge_is_refused() -> None:
    with pytest.raises(NameNotFoundError, match="did you mean"):
        Circuit.from_edges(GRAPH, ["inptu->m0"])


def test_it_cannot_be_changed() -> None:
    circuit = Circuit.full(GRAPH).with_scores(EdgeScores(GRAPH, np.ones(GRAPH.shape)))
    assert circuit.values is not None
    for array in (circuit.kept, circuit.values):
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0, 0] = 0


def test_it_keeps_no_hold_on_the_arrays_it_is_made_of() -> None:
    kept = np.zeros(GRAPH.shape, dtype=bool)
    circuit = Circuit(GRAPH, kept)
    kept[:] = True
    assert len(circuit) == 0


def test_what_is_no_edge_is_never_kept() -> None:
    assert Circuit(GRAPH, np.ones(GRAPH.shape, dtype=bool)) == Circuit.full(GRAPH)


def test_circuits_of_different_graphs_do_not_mix() -> None:
    other = Circuit.full(transformer_graph(2, 2))
    for combine in (Circuit.__or__, Circuit.__and__, Circuit.__sub__, Circuit.__le__, Circuit.jaccard):
        with pytest.raises(OptionError, match="belongs to another graph"):
            combine(Circuit.full(GRAPH), other)
    assert Circuit.full(GRAPH) != other
    assert Circuit.full(GRAPH) != "a circuit"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_must_be_numbers_that_fit(value: float) -> None:
    with pytest.raises(OptionError, match="finite"):
        Circuit(GRAPH, GRAPH.edge_mask, np.full(GRAPH.shape, value))
    with pytest.raises(OptionError, match="do not fit"):
        Circuit(GRAPH, GRAPH.edge_mask, np.zeros(3))
    with pytest.raises(OptionError, match="does not fit"):
        Circuit(GRAPH, np.zeros(3, dtype=bool))


def test_scores_and_origin_travel_along() -> None:
    scores = EdgeScores(GRAPH, np.arange(np.prod(GRAPH.shape)).reshape(GRAPH.shape), "counting")
    circuit = Circuit.full(GRAPH).with_scores(scores).with_provenance(Provenance(model="toy"))
    half = circuit - Circuit.from_edges(GRAPH, ["input->m0"])
    assert half.score_of("input->m0") == scores["input->m0"]
    assert Circuit.full(GRAPH).score_of("input->m0") is None
    assert circuit.provenance.model == "toy"
    assert circuit.pruned().provenance.model == "toy"


def test_its_repr_says_how_large_it_is() -> None:
    assert repr(Circuit.from_edges(GRAPH, ["input->m0"])) == "Circuit(1 of 13 edges, 2 of 5 nodes)"


@given(graphs())
def test_full_and_empty_are_complements(graph: Graph) -> None:
    assert ~Circuit.full(graph) == Circuit.empty(graph)
    assert len(Circuit.full(graph)) == graph.n_edges


def test_scores_are_kept_as_a_copy_and_are_0_where_there_is_no_edge() -> None:
    values = np.where(GRAPH.edge_mask, 2.0, np.nan)
    circuit = Circuit(GRAPH, GRAPH.edge_mask, values)
    values[:] = 5.0
    assert circuit.values is not None
    assert (circuit.values == np.where(GRAPH.edge_mask, 2.0, 0.0)).all()
    assert not circuit.values.flags.writeable
    with pytest.raises(OptionError, match="do not fit"):
        Circuit(GRAPH, GRAPH.edge_mask, values[:-1])


def test_edges_by_name_become_arrays_and_unknown_ones_are_refused() -> None:
    names = ["input->m0", "m0->logits"]
    assert list(GRAPH.names_of(GRAPH.mask_of(names))) == names
    array = GRAPH.array_of({"input->m0": -1.5, "m0->logits": 2.0})
    assert [array[GRAPH.edge_index(name)] for name in names] == [-1.5, 2.0]
    assert np.count_nonzero(array) == 2
    for convert in (GRAPH.mask_of, lambda names: GRAPH.array_of(dict.fromkeys(names, 1.0))):
        with pytest.raises(NameNotFoundError, match="m7"):
            convert(["input->m0", "input->m7"])

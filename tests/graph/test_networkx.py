"""Circuits as networkx graphs and back."""

from __future__ import annotations

import networkx as nx
import pytest
from hypothesis import given

from circuitvit.errors import NameNotFoundError
from circuitvit.graph import Circuit, EdgeScores, node_of, parse_edge
from circuitvit.graph.eap_ig import transformer_graph
from tests.graph.strategies import circuits, scored


@given(circuits())
def test_a_circuit_survives_the_round_trip(circuit: Circuit) -> None:
    assert Circuit.from_networkx(circuit.graph, circuit.to_networkx()) == circuit


@given(scored())
def test_scores_survive_it_too(scores: EdgeScores) -> None:
    circuit = scores.top(len(scores) // 2, prune=False)
    again = Circuit.from_networkx(circuit.graph, circuit.to_networkx())
    assert [again.score_of(name) for name in again] == [circuit.score_of(name) for name in circuit]


@given(circuits())
def test_every_edge_is_there_under_its_name_between_its_nodes(circuit: Circuit) -> None:
    network = circuit.to_networkx()
    assert set(network) == set(circuit.nodes)
    by_name = {key: (start, stop, data) for start, stop, key, data in network.edges(keys=True, data=True)}
    assert set(by_name) == set(circuit)
    for name, (start, stop, data) in by_name.items():
        edge = parse_edge(name)
        assert (start, stop) == (edge.sender, node_of(edge.receiver))
        assert (data["receiver"], data["group"]) == (edge.receiver, edge.group)


def test_nodes_say_what_they_are() -> None:
    network = Circuit.full(transformer_graph(2, 1)).to_networkx()
    assert network.nodes["a1.h0"] == {"kind": "attention", "layer": 1}
    assert network.nodes["m0"] == {"kind": "mlp", "layer": 0}
    assert network.nodes["logits"]["kind"] == "readout"
    assert nx.is_directed_acyclic_graph(network)


def test_a_graph_of_other_origin_is_read_by_receivers_and_refused_when_it_does_not_fit() -> None:
    graph = transformer_graph(1, 1)
    network: nx.DiGraph[str] = nx.DiGraph()
    network.add_edge("input", "m0")
    network.add_edge("input", "a0.h0", receiver="a0.h0<v>", group="")
    assert set(Circuit.from_networkx(graph, network)) == {"input->m0", "input->a0.h0<v>"}
    network.add_edge("m0", "nowhere")
    with pytest.raises(NameNotFoundError, match="unknown receiver 'nowhere'"):
        Circuit.from_networkx(graph, network)

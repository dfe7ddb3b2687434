"""GraphML: read back by networkx it is the same circuit, with typed attributes."""

from __future__ import annotations

from pathlib import Path

import networkx as nx
import pytest
from hypothesis import given

from circuitvit.export import draw, graphml_of
from circuitvit.graph import Circuit, Provenance
from circuitvit.graph.eap_ig import transformer_graph
from tests.export.cases import MADE, random_circuit
from tests.export.test_svg import HOSTILE
from tests.graph.strategies import circuits

CIRCUIT = random_circuit(4, 2, 30)


@pytest.mark.parametrize("multigraph", [True, False])
def test_networkx_reads_the_same_circuit_back(multigraph: bool, tmp_path: Path) -> None:
    network = nx.read_graphml(draw(CIRCUIT, tmp_path / "circuit.graphml"), force_multigraph=multigraph)
    again = Circuit.from_networkx(CIRCUIT.graph, network)
    assert again == CIRCUIT
    assert [again.score_of(name) for name in again] == [CIRCUIT.score_of(name) for name in CIRCUIT]


@given(circuits())
def test_circuits_of_every_graph_come_back(circuit: Circuit) -> None:
    network = nx.parse_graphml(graphml_of(circuit), force_multigraph=True)
    assert Circuit.from_networkx(circuit.graph, network) == circuit


def test_attributes_have_types_and_edges_their_names(tmp_path: Path) -> None:
    network = nx.read_graphml(
        draw(CIRCUIT, tmp_path / "circuit.graphml", title="Thirty"), force_multigraph=True
    )
    assert network.nodes["m3"] == {"kind": "mlp", "layer": 3}
    assert {key for *_, key in network.edges(keys=True)} == set(CIRCUIT)
    assert all(type(score) is float for *_, score in network.edges(data="score"))
    assert network.graph["title"] == "Thirty"
    assert network.graph["model"] == MADE.model


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_inert(text: str) -> None:
    circuit = CIRCUIT.with_provenance(Provenance(text, text, text, text))
    network = nx.parse_graphml(graphml_of(circuit, title=text), force_multigraph=True)
    assert Circuit.from_networkx(CIRCUIT.graph, network) == CIRCUIT


def test_the_same_circuit_gives_the_same_text() -> None:
    assert graphml_of(CIRCUIT) == graphml_of(random_circuit(4, 2, 30))


def test_an_empty_circuit_is_an_empty_graph() -> None:
    assert len(nx.parse_graphml(graphml_of(Circuit.empty(transformer_graph(1, 1))))) == 0

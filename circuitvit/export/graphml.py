"""GraphML, for Gephi, Cytoscape, yEd and networkx: the circuit's nodes and edges with typed attributes."""

from __future__ import annotations

from typing import Any

import networkx as nx

from circuitvit.export.text import clean
from circuitvit.graph import Circuit


def graphml_of(circuit: Circuit, title: str | None = None) -> str:
    """The circuit as the text of a GraphML file.

    Nodes carry `kind` and `layer`; edges are identified by their name and carry `receiver`, `group` and,
    where the circuit has scores, `score`; the graph carries where the circuit came from. Read it back with
    `Circuit.from_networkx(graph, networkx.read_graphml(path))`.

    Example:
        >>> from circuitvit.graph.eap_ig import transformer_graph
        >>> circuit = Circuit.from_edges(transformer_graph(1, 2), ["input->m0", "m0->logits"])
        >>> 'id="m0-&gt;logits"' in graphml_of(circuit)
        True
    """
    network = circuit.to_networkx()
    made = circuit.provenance
    about = {
        "title": title,
        "model": made.model,
        "method": made.method,
        "task": made.task,
        "library": made.library,
    }
    network.graph.update({key: value for key, value in about.items() if value})
    for data in _all_attributes(network):
        for key, value in data.items():
            if isinstance(value, str):
                data[key] = clean(value)  # XML has no way to write control characters
    return "\n".join(nx.generate_graphml(network, named_key_ids=True)) + "\n"


def _all_attributes(network: nx.MultiDiGraph[str]) -> list[dict[str, Any]]:
    nodes = [data for _, data in network.nodes(data=True)]
    edges = [data for _, _, data in network.edges(data=True)]
    return [network.graph, *nodes, *edges]

"""Names, topology, scores and circuits: everything about a model's graph that needs no model."""

from circuitvit.graph.circuit import Circuit
from circuitvit.graph.fidelity import Fidelity
from circuitvit.graph.names import Edge, edge_name, node_of, parse_edge, port_of
from circuitvit.graph.node_scores import NodeScores
from circuitvit.graph.provenance import Provenance
from circuitvit.graph.scores import Direction, EdgeScores, Ranking
from circuitvit.graph.topology import ONE_GROUP, EdgeMask, Graph, StageNodes

__all__ = [
    "ONE_GROUP",
    "Circuit",
    "Direction",
    "Edge",
    "EdgeMask",
    "EdgeScores",
    "Fidelity",
    "Graph",
    "NodeScores",
    "Provenance",
    "Ranking",
    "StageNodes",
    "edge_name",
    "node_of",
    "parse_edge",
    "port_of",
]

"""Names, topology, scores and circuits: everything about a model's graph that needs no model."""

from circuitvit.graph.circuit import Circuit, CircuitLike, as_circuit
from circuitvit.graph.fidelity import Fidelity
from circuitvit.graph.names import Edge, edge_name, node_of, parse_edge, port_of
from circuitvit.graph.provenance import Provenance
from circuitvit.graph.scores import Direction, EdgeScores, NodeScores, Ranking, UnitScores, side_of
from circuitvit.graph.topology import ONE_GROUP, RESIDUAL, EdgeMask, Graph, StageNodes, is_residual

__all__ = [
    "ONE_GROUP",
    "RESIDUAL",
    "Circuit",
    "CircuitLike",
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
    "UnitScores",
    "as_circuit",
    "edge_name",
    "is_residual",
    "node_of",
    "parse_edge",
    "port_of",
    "side_of",
]

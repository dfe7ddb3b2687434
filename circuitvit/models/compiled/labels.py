"""The edges that a program is wired by, as a circuit."""

from __future__ import annotations

from circuitvit.graph import Circuit, Graph, edge_name
from circuitvit.models.compiled.language import Head, Program

__all__ = ["wired_circuit"]


def wired_circuit(program: Program, graph: Graph) -> Circuit:
    """The edges whose receiver reads a feature that their sender writes, on a path to the logits."""
    wired = [
        edge_name(sender, receiver)
        for sender, written in _writes(program).items()
        for receiver, read in _reads(program).items()
        if written & read
    ]
    return Circuit.from_edges(graph, wired).pruned()


def _writes(program: Program) -> dict[str, set[str]]:
    """The features that each sender writes."""
    writes = {"input": {*program.pixels, *program.places}}
    for place, layer in enumerate(program.layers):
        writes |= {f"a{place}.h{index}": {head.into} for index, head in enumerate(layer.heads)}
        writes[f"m{place}"] = {unit.into for unit in layer.units}
    return writes


def _reads(program: Program) -> dict[str, set[str]]:
    """The features that each receiver reads."""
    reads = {"logits": set(program.readout)}
    for place, layer in enumerate(program.layers):
        for index, head in enumerate(layer.heads):
            reads |= {f"a{place}.h{index}<{port}>": read for port, read in _ports(head).items()}
        reads[f"m{place}"] = {feature for unit in layer.units for feature in unit.reads}
    return reads


def _ports(head: Head) -> dict[str, set[str]]:
    queries = {match.query for match in head.matches if match.query is not None}
    return {"q": queries, "k": {match.key for match in head.matches}, "v": {head.value}}

"""A circuit: a set of edges of a graph, immutable, with the algebra of sets.

Example:
    >>> from circuitvit.graph import Circuit, Graph, StageNodes
    >>> graph = Graph(
    ...     (
    ...         StageNodes("input", "input", 0, senders=("input",)),
    ...         StageNodes("mlp0", "mlp", 0, senders=("m0",), receivers=("m0",)),
    ...         StageNodes("readout", "readout", 1, receivers=("logits",)),
    ...     )
    ... )
    >>> circuit = Circuit.from_edges(graph, ["input->m0", "m0->logits"])
    >>> circuit
    Circuit(2 of 3 edges, 3 of 3 nodes)
    >>> "m0->logits" in circuit, list(Circuit.full(graph) - circuit)
    (True, ['input->logits'])
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from circuitvit.errors import FileError, OptionError
from circuitvit.graph import eap_ig, notebook
from circuitvit.graph.files import check_version, naming, read_json, record, write_json
from circuitvit.graph.liveness import live_edges
from circuitvit.graph.names import edge_name, node_of, parse_edge
from circuitvit.graph.provenance import PROVENANCE_SCHEMA, Provenance
from circuitvit.graph.results import OTHER_ENDINGS, Record, Result
from circuitvit.graph.topology import GRAPH_SCHEMA, EdgeMask, Graph, Remade, frozen

CIRCUIT_SCHEMA = "circuitvit.circuit/1"
LONGEST_NAME = 600  # of an edge: those of its two ends and its group have 200 characters at most
SCORE_MAP_SCHEMA = {"type": "object"}  # of numbers, see `scores_of`: a million take the schema ten seconds
_FILE = record(
    "schema graph edges provenance",
    schema={"const": CIRCUIT_SCHEMA},
    graph=GRAPH_SCHEMA,
    edges={"type": "array", "maxItems": 10_000_000},  # of names: a million take the schema ten seconds
    scores=SCORE_MAP_SCHEMA,
    provenance=PROVENANCE_SCHEMA,
)


class Scored(Protocol):
    """What has a score for each edge of a graph, as `EdgeScores`."""

    @property
    def graph(self) -> Graph: ...
    @property
    def values(self) -> NDArray[np.float64]: ...
    @property
    def provenance(self) -> Provenance: ...


@dataclass(frozen=True, eq=False, repr=False)
class Circuit(Remade, Result):
    """A set of kept edges; all other edges of the graph are ablated when the circuit is run.

    It behaves like a frozen set of edge names: `|`, `&`, `-`, `~`, `<=`, `len`, `in`, iteration in graph
    order, equality (same graph, same edges).

    Attributes:
        graph: the graph that the edges belong to.
        kept: `(sender, receiver, group)`, True for the edges of the circuit; read-only.
        values: `(sender, receiver, group)` score of each edge, or None; for diagrams and files only.
        provenance: where the circuit came from.
    """

    graph: Graph
    kept: EdgeMask
    values: NDArray[np.float64] | None = None
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        kept = np.array(self.kept, dtype=bool)
        if kept.shape != self.graph.shape:
            raise OptionError(
                f"a mask of shape {kept.shape} does not fit {self.graph} of shape {self.graph.shape}"
            )
        object.__setattr__(self, "kept", frozen(kept & self.graph.edge_mask))
        if self.values is not None:
            object.__setattr__(self, "values", self.graph.checked(self.values))

    # -- making ----------------------------------------------------------------------------------

    @classmethod
    def from_edges(cls, graph: Graph, edges: Iterable[str], provenance: Provenance | None = None) -> Circuit:
        """The circuit of the named edges.

        Raises:
            NameNotFoundError: if a name is no edge of `graph`.
        """
        return cls(graph, graph.mask_of(edges), provenance=provenance or Provenance())

    @classmethod
    def full(cls, graph: Graph) -> Circuit:
        """Every edge of the graph: running it is running the model."""
        return cls(graph, graph.edge_mask)

    @classmethod
    def empty(cls, graph: Graph) -> Circuit:
        """No edge at all."""
        return cls(graph, np.zeros(graph.shape, dtype=bool))

    def with_scores(self, scores: Scored) -> Circuit:
        """The same edges, carrying these scores (an `EdgeScores`) for diagrams and files."""
        self.graph.check_same(scores.graph, "what scores the circuit")
        made = self.provenance.with_shares_of(scores.provenance.shares_of)
        return replace(self, values=scores.values, provenance=made)

    def with_provenance(self, provenance: Provenance) -> Circuit:
        """The same edges with another origin."""
        return replace(self, provenance=provenance)

    # -- what it is ------------------------------------------------------------------------------

    def __len__(self) -> int:
        return int(self.kept.sum())

    def __iter__(self) -> Iterator[str]:
        return self.graph.names_of(self.kept)

    def __contains__(self, edge: object) -> bool:
        """Whether the named edge is kept. A name that is no edge of the graph is simply not in it."""
        return edge in self.graph and bool(self.kept[self.graph.edge_index(str(edge))])

    @property
    def density(self) -> float:
        """Share of the graph's edges that are kept, 0 to 1."""
        return len(self) / self.graph.n_edges if self.graph.n_edges else 0.0

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """Names of the nodes that a kept edge touches, in running order."""
        touched: set[str] = set()
        for name in self:
            edge = parse_edge(name)
            touched.update((edge.sender, node_of(edge.receiver)))
        return tuple(node for node in self.graph.nodes if node in touched)

    def score_of(self, edge: str) -> float | None:
        """The score that the circuit carries for an edge, or None where it carries none.

        Files keep the scores of the circuit's own edges only; after loading those of others are 0.
        """
        return None if self.values is None else float(self.values[self.graph.edge_index(edge)])

    def __repr__(self) -> str:
        return (
            f"Circuit({len(self):,} of {self.graph.n_edges:,} edges, "
            f"{len(self.nodes)} of {len(self.graph.nodes)} nodes)"
        )

    def _repr_html_(self) -> str:
        from circuitvit.export.picture import picture_of  # a notebook shows the diagram, as `draw` does
        from circuitvit.export.svg import svg_of

        made = self.provenance
        rows = [
            ("edges", f"{len(self):,} of {self.graph.n_edges:,} ({self.density:.1%})"),
            ("nodes", f"{len(self.nodes)} of {len(self.graph.nodes)}"),
            *((name, text) for name, text in (("found by", made.method), ("task", made.task)) if text),
        ]
        drawing = svg_of(picture_of(self, max_edges=notebook.MOST_EDGES)) if self.nodes else ""
        return notebook.card(f"Circuit of {made.model or 'a model'}", rows, notebook.image(drawing))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Circuit):
            return NotImplemented
        return self.graph == other.graph and bool(np.array_equal(self.kept, other.kept))

    def __hash__(self) -> int:
        return hash((self.graph, self.kept.tobytes()))

    # -- set algebra -----------------------------------------------------------------------------

    def __or__(self, other: Circuit) -> Circuit:
        return self._combined(other, lambda mine, theirs: mine | theirs)

    def __and__(self, other: Circuit) -> Circuit:
        return self._combined(other, lambda mine, theirs: mine & theirs)

    def __sub__(self, other: Circuit) -> Circuit:
        return self._combined(other, lambda mine, theirs: mine & ~theirs)

    def __xor__(self, other: Circuit) -> Circuit:
        return self._combined(other, lambda mine, theirs: mine ^ theirs)

    def __invert__(self) -> Circuit:
        """The complement: all edges that are not in this circuit."""
        return Circuit(self.graph, ~self.kept, self.values)

    def __le__(self, other: Circuit) -> bool:
        self.graph.check_same(other.graph, "the other circuit")
        return not bool((self.kept & ~other.kept).any())

    def jaccard(self, other: Circuit) -> float:
        """Shared edges over edges in either, 0 to 1; two empty circuits are alike (1)."""
        either = len(self | other)
        return len(self & other) / either if either else 1.0

    def _combined(self, other: Circuit, operation: Callable[[EdgeMask, EdgeMask], EdgeMask]) -> Circuit:
        self.graph.check_same(other.graph, "the other circuit")
        kept = operation(self.kept, other.kept)
        return Circuit(self.graph, kept, self.values if self.values is not None else other.values)

    # -- structure -------------------------------------------------------------------------------

    def pruned(self) -> Circuit:
        """Without dead edges: only those on a path from the input to the logits."""
        return replace(self, kept=live_edges(self.graph, self.kept))

    def paths(self) -> Iterator[tuple[str, ...]]:
        """Every path from a source to a readout, as a tuple of edge names; lazily, as there can be many.

        With several token groups a path goes on from the groups that it can have reached: from all of them
        after a key or a value, from the same one after a query or an MLP.
        """
        graph, kept = self.graph, self.pruned().kept
        sources = {place for place, stage in enumerate(graph.stages) if not stage.receivers}
        readouts = {place for place, stage in enumerate(graph.stages) if not stage.senders}
        named = graph.groups if len(graph.groups) > 1 else ("",)

        def walk(sender: int, group: int, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
            for receiver in np.flatnonzero(kept[sender, :, group]).tolist():
                step = (*path, edge_name(graph.senders[sender], graph.receivers[receiver], named[group]))
                if graph.receiver_stages[receiver] in readouts:
                    yield step
                for onward in graph.fed(receiver, group):
                    yield from walk(*onward, step)

        for sender, place in enumerate(graph.sender_stages):
            if place in sources:
                for group in range(len(graph.groups)):
                    yield from walk(sender, group, ())

    def to_networkx(self) -> nx.MultiDiGraph[str]:
        """Nodes and kept edges as a networkx graph.

        Nodes carry `kind` and `layer`; edges are keyed by their name and carry `receiver`, `group` and,
        where the circuit has scores, `score`. Nodes that no kept edge touches are left out.
        """
        result: nx.MultiDiGraph[str] = nx.MultiDiGraph()
        for node in self.nodes:
            stage = self.graph.stage_of_node[node]
            result.add_node(node, kind=stage.kind_of(node), layer=stage.layer)
        for name in self:
            edge = parse_edge(name)
            data: dict[str, Any] = {"receiver": edge.receiver, "group": edge.group}
            score = self.score_of(name)
            if score is not None:
                data["score"] = score
            result.add_edge(edge.sender, node_of(edge.receiver), key=name, **data)
        return result

    @classmethod
    def from_networkx(cls, graph: Graph, network: nx.DiGraph[str]) -> Circuit:
        """The inverse of `to_networkx`; a `networkx.DiGraph`, such as `read_graphml` gives, is read as well.

        Edges are known by the node they leave and by their `receiver` and `group`.

        Raises:
            NameNotFoundError: if an edge is none of `graph`, or names no receiver.
        """
        kept = np.zeros(graph.shape, dtype=bool)
        values = np.zeros(graph.shape)
        scored = False
        for sender, target, data in network.edges(data=True):
            receiver, group = str(data.get("receiver", target)), str(data.get("group", ""))
            index = graph.edge_index(edge_name(str(sender), receiver, group))
            kept[index] = True
            if "score" in data:
                scored, values[index] = True, float(data["score"])
        return cls(graph, kept, values if scored else None)

    # -- files and pictures ----------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The circuit as JSON values, in the versioned schema of `docs/formats.md`."""
        edges, own = list(self), self.values
        scores = {} if own is None else {"scores": dict(zip(edges, own[self.kept].tolist(), strict=True))}
        return {
            "schema": CIRCUIT_SCHEMA,
            "provenance": self.provenance.to_dict(),
            "edges": edges,
            "graph": self.graph.to_dict(),
            **scores,
        }

    to_record = to_dict

    def records(self) -> Iterator[Record]:
        """One row for each edge: `edge`, its `sender`, `receiver` and `group` ("" without groups), and its
        `score`, None where the circuit carries none."""
        for name in self:
            sender, receiver, group = parse_edge(name)
            score = self.score_of(name)
            yield {"edge": name, "sender": sender, "receiver": receiver, "group": group, "score": score}

    def save(self, path: str | Path, layout: str = "circuitvit") -> Path:
        """Write the circuit as JSON; `layout="eap-ig"` writes the file of the EAP-IG and MIB tools.

        The ending `.csv` writes the table of `records`, `.safetensors` the JSON in such a file's header.

        Raises:
            FileError: if the file cannot be written.
            OptionError: if `layout` is unknown, or the graph cannot be said in the EAP-IG layout.
        """
        if Path(path).suffix in OTHER_ENDINGS:
            return super().save(path)
        if layout == "circuitvit":
            return write_json(path, self.to_dict())
        if layout == "eap-ig":
            return write_json(path, eap_ig.to_layout(self.graph, self.kept, self.values, self.nodes))
        raise OptionError(f"unknown layout {layout!r}: choose 'circuitvit' or 'eap-ig'")

    @classmethod
    def load(cls, path: str | Path, graph: Graph | None = None) -> Circuit:
        """Read a circuit from JSON, our own layout or that of EAP-IG and MIB, told apart by content.

        Args:
            path: of the file.
            graph: the graph that the circuit must belong to, such as `model.graph`.

        Raises:
            FileError: if the file is missing, malformed, of another version, or of another graph.
        """
        if Path(path).suffix == ".safetensors":
            circuit = super().load(path)
            check_graph(path, circuit.graph, graph)
            return circuit
        content = read_json(path)
        if "cfg" in content:
            with naming(path):
                circuit = cls(*eap_ig.from_layout(content), Provenance(method="EAP-IG file"))
        else:
            with naming(path):
                circuit = cls.from_record(content, str(path))
        check_graph(path, circuit.graph, graph)
        return circuit

    @classmethod
    def from_record(cls, content: Mapping[str, Any], place: str) -> Circuit:
        """The circuit that stands at a place of a file.

        Raises:
            FileError: if it is none, of another version, or contradicts itself.
        """
        check_version(place, content, _FILE, CIRCUIT_SCHEMA)
        graph, edges = Graph.from_dict(content["graph"]), content["edges"]
        for at, name in enumerate(edges):
            if not isinstance(name, str) or len(name) > LONGEST_NAME:
                raise FileError(f"edges/{at}: {str(name)[:80]!r} is not the name of an edge")
        twice = next((name for name, count in Counter(edges).items() if count > 1), None)
        if twice is not None:
            raise FileError(f"edge {twice!r} is listed {edges.count(twice)} times")
        values = scores_of(graph, content["scores"]) if "scores" in content else None
        return cls(graph, graph.mask_of(edges), values, Provenance.from_dict(content["provenance"]))

    def draw(self, path: str | Path, **options: Any) -> Path:
        """Draw the circuit; the ending chooses the format.

        `.html` is the interactive page, `.svg`, `.pdf` and `.png` are figures, `.tex` and `.dot` are sources
        to finish by hand, `.graphml` is for other programs. With `model=` and `task=` the page shows what the
        nodes do on the images. All options go to the drawing, see `circuitvit.export.draw`.
        """
        from circuitvit.export import draw  # the one look ahead in the house: a convenience for users

        return draw(self, path, **options)


class HasCircuit(Protocol):
    """What holds a circuit, as the results of searches do."""

    @property
    def circuit(self) -> Circuit: ...


CircuitLike = Circuit | HasCircuit | str | Path | Iterable[str]
"""Whatever means a circuit: itself, what a search found, names of edges, or the path of a file."""


def as_circuit(given: CircuitLike, graph: Graph | None = None) -> Circuit:
    """A circuit from whatever means one.

    Args:
        given: a circuit, what a search found (`find`, `refine`, ...), the names of edges, or a file's path. A
            text with an arrow names an edge.
        graph: that it must belong to. Edge names need one, as they say nothing of the other edges.

    Raises:
        OptionError: if it belongs to another graph, or means no circuit.
        NameNotFoundError: if a name is no edge of the graph.
        FileError: if the file cannot be read, or holds a circuit of another graph.

    Example:
        >>> from circuitvit.graph.eap_ig import transformer_graph
        >>> as_circuit(["input->m0", "m0->logits"], transformer_graph(1, 2))
        Circuit(2 of 13 edges, 3 of 5 nodes)
    """
    if isinstance(given, Path) or (isinstance(given, str) and "->" not in given):
        return Circuit.load(given, graph)
    circuit = getattr(given, "circuit", given)
    if isinstance(circuit, Circuit):
        if graph is not None:
            graph.check_same(circuit.graph, "the circuit")
        return circuit
    names = [given] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)
    if not all(isinstance(name, str) for name in names):
        raise OptionError(
            f"{type(given).__name__} is no circuit: give a Circuit, what a search found, the names of edges, "
            "or the path of a file"
        )
    if graph is None:
        raise OptionError("edge names need a graph to belong to: give Circuit.from_edges(model.graph, names)")
    return Circuit.from_edges(graph, map(str, names))


def scores_of(graph: Graph, scores: Mapping[str, Any]) -> NDArray[np.float64]:
    """The scores `(sender, receiver, group)` that a file gives by the names of edges.

    Raises:
        FileError: for what is no number.
        NameNotFoundError: if a name is no edge.
    """
    for name, score in scores.items():
        if isinstance(score, bool) or not isinstance(score, (int, float)):
            raise FileError(f"scores/{name[:LONGEST_NAME]}: {score!r:.80} is not of type 'number'")
    return graph.array_of(scores)


def check_graph(path: str | Path, found: Graph, wanted: Graph | None) -> None:
    """Refuse what a file holds when it belongs to another graph than the one that is wanted.

    Raises:
        FileError: naming the file and both graphs.
    """
    if wanted is not None:
        with naming(path):
            wanted.check_same(found, "what it holds")

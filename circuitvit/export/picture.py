"""What a picture of a circuit shows, before any decision about where: its nodes, edges and words.

The SVG and DOT writers both start from a `Picture`, so they agree on what is shown and how it looks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from circuitvit.errors import OptionError
from circuitvit.export.style import EdgeLook, Sign, clean, edge_look, number, widest
from circuitvit.graph import Circuit, Direction, EdgeMask, edge_name, node_of, port_of

Places = NDArray[np.intp]  # (edge, 3): sender, receiver and group of each

THUMB = 46.0  # side of a node's small image in pixels

NodeKind = Literal["head", "mlp", "end"]
"""A node with several inputs, one with a single input, or an end of the graph (input, logits)."""


@dataclass(frozen=True)
class DrawnNode:
    """One node: its name, its row (the place of its stage in the graph) and its inputs.

    Attributes:
        name: of the node.
        kind: "head", "mlp" or "end"; decides the shape.
        row: index of its stage, 0 at the bottom.
        layer: the block it belongs to.
        ports: names of its inputs in order, such as `("q", "k", "v")`; `("",)` for a single input.
        used: the inputs that an edge of the picture ends at.
        present: whether an edge of the picture touches it.
        thumb: side in pixels of the small image inside its box; 0 for none.
    """

    name: str
    kind: NodeKind
    row: int
    layer: int
    ports: tuple[str, ...]
    used: frozenset[str]
    present: bool
    thumb: float = 0.0


@dataclass(frozen=True)
class DrawnEdge:
    """One edge: its ends, its score and how it looks.

    Attributes:
        name: of the edge.
        sender: name of the node it leaves.
        target: name of the node it enters.
        port: which input of the target; "" where there is one.
        group: place of its token group among the graph's groups.
        score: its effect in units of the metric, or None.
        sign: what it does for the behaviour.
        look: colour, width, opacity and dash.
        note: what is said of the edge instead of its effect; "" for the effect.
    """

    name: str
    sender: str
    target: str
    port: str
    group: int
    score: float | None
    sign: Sign
    look: EdgeLook
    note: str = ""

    @property
    def said(self) -> str:
        """The edge in words, for hover texts and screen readers."""
        if self.note:
            return f"{self.name}: {self.note}"
        if self.score is None:
            return self.name
        meaning = "no effect" if self.sign == "unscored" else self.sign
        return f"{self.name}: {number(self.score, signed=True)} ({meaning})"


@dataclass(frozen=True)
class Picture:
    """Everything that is shown of a circuit.

    Attributes:
        title: one line.
        nodes: all nodes of the graph in running order, also those outside the circuit.
        edges: the edges to draw, weakest first, so that strong ones end up on top.
        rows: names of the graph's stages, bottom row first.
        layers: the layer of each row; None for rows of sources and readouts.
        groups: names of the token groups.
        strongest: the largest magnitude among the edges, or None when no edge has a score.
        max_width: width in pixels of an edge of that magnitude.
        direction: whether scores are those of ablating or of restoring an edge.
        counts: how many of how many edges and nodes, in words.
        origin: model, method, task and library version, in words; "" when nothing is known.
        key: what looks of edges mean, in words, where it is not the signs of effects.
    """

    title: str
    nodes: tuple[DrawnNode, ...]
    edges: tuple[DrawnEdge, ...]
    rows: tuple[str, ...]
    layers: tuple[int | None, ...]
    groups: tuple[str, ...]
    strongest: float | None
    max_width: float
    direction: Direction
    counts: str
    origin: str
    key: tuple[tuple[str, EdgeLook], ...] = ()

    @property
    def signs(self) -> tuple[Sign, ...]:
        """The signs that occur, in a fixed order."""
        found = {edge.sign for edge in self.edges}
        order: tuple[Sign, ...] = ("supports", "opposes", "unscored")
        return tuple(sign for sign in order if sign in found)

    @property
    def emptiness(self) -> str:
        """What to say of a picture without edges."""
        return "This circuit has no edges." if self.counts.startswith("0 ") else "No edges are shown."

    def meaning(self, sign: Sign) -> str:
        """What edges of a sign do, in words."""
        if sign == "unscored":
            return "edge without a score" if self.strongest is None else "no effect"
        verb = "ablating" if self.direction == "noising" else "restoring"
        raises = (sign == "opposes") == (self.direction == "noising")
        return f"{verb} {'raises' if raises else 'lowers'} the metric ({sign})"


def picture_of(
    circuit: Circuit,
    title: str | None = None,
    max_edges: int | None = None,
    direction: Direction | None = None,
    thumbs: Collection[str] = (),
) -> Picture:
    """Decide what to show of `circuit`.

    Args:
        circuit: to draw; edges have a width and a sign where it carries scores.
        title: of the picture; by default it names the model.
        max_edges: draw only this many edges, the strongest; the counts say so.
        direction: of the scores; by default what the circuit's provenance says, else "noising".
        thumbs: names of nodes whose box shall have room for a small image.

    Raises:
        OptionError: if `max_edges` is negative or `direction` is unknown.

    Example:
        >>> from circuitvit.graph.eap_ig import transformer_graph
        >>> picture = picture_of(Circuit.from_edges(transformer_graph(1, 2), ["input->m0", "m0->logits"]))
        >>> picture.counts
        '2 of 13 edges, 3 of 5 nodes'
    """
    direction = _direction(circuit, direction)
    places = _strongest(circuit, max_edges)
    kept = np.zeros(circuit.graph.shape, dtype=bool)
    kept[tuple(places.T)] = True
    max_width = widest(len(places))
    edges = tuple(_edges(circuit, places, direction, max_width))
    stages = circuit.graph.stages
    return Picture(
        title=clean(_title(circuit) if title is None else title),
        nodes=_nodes(circuit, kept, thumbs),
        edges=edges,
        rows=tuple(clean(stage.name) for stage in stages),
        layers=tuple(stage.layer if stage.senders and stage.receivers else None for stage in stages),
        groups=tuple(clean(group) for group in circuit.graph.groups),
        strongest=max((abs(edge.score) for edge in edges if edge.score is not None), default=None) or None,
        max_width=max_width,
        direction=direction,
        counts=_counts(circuit, len(places)),
        origin=clean(_origin(circuit)),
    )


def _direction(circuit: Circuit, direction: Direction | None) -> Direction:
    said = direction if direction is not None else circuit.provenance.parameters.get("direction", "noising")
    if said not in ("noising", "denoising"):
        if direction is not None:
            raise OptionError(f"direction is 'noising' or 'denoising', not {direction!r}")
        said = "noising"  # provenance is free text from a file: never a reason to refuse a drawing
    return "denoising" if said == "denoising" else "noising"


def _strongest(circuit: Circuit, max_edges: int | None) -> Places:
    """The places `(n, 3)` of the edges to draw, weakest first; ties in graph order."""
    if max_edges is not None and max_edges < 0:
        raise OptionError(f"max_edges must be 0 or more, not {max_edges}")
    places = np.argwhere(circuit.kept)
    magnitude = np.abs(_scores(circuit))[circuit.kept]
    strongest_first = np.argsort(-magnitude, kind="stable")[:max_edges]
    chosen: Places = places[strongest_first[::-1]]
    return chosen


def _scores(circuit: Circuit) -> NDArray[np.float64]:
    values = np.zeros(circuit.graph.shape) if circuit.values is None else circuit.values
    return np.nan_to_num(values, posinf=0.0, neginf=0.0)


def _edges(circuit: Circuit, places: Places, direction: Direction, max_width: float) -> Iterator[DrawnEdge]:
    graph = circuit.graph
    scores = _scores(circuit)
    largest = float(np.abs(scores[tuple(places.T)]).max(initial=0.0))
    for sender, receiver, group in places.tolist():
        value = float(scores[sender, receiver, group])
        support = value if direction == "denoising" else -value
        sign: Sign = "supports" if support > 0 else "opposes" if support < 0 else "unscored"
        sent, received = graph.senders[sender], graph.receivers[receiver]
        yield DrawnEdge(
            name=clean(edge_name(sent, received, graph.groups[group] if len(graph.groups) > 1 else "")),
            sender=sent,
            target=node_of(received),
            port=port_of(received),
            group=group,
            score=None if circuit.values is None else value,
            sign=sign,
            look=edge_look(sign, abs(value) / largest if largest else 0.0, max_width, group),
        )


def _nodes(circuit: Circuit, kept: EdgeMask, thumbs: Collection[str]) -> tuple[DrawnNode, ...]:
    graph = circuit.graph
    used: dict[str, set[str]] = {}
    for index in np.flatnonzero(kept.any(axis=(0, 2))).tolist():
        used.setdefault(node_of(graph.receivers[index]), set()).add(port_of(graph.receivers[index]))
    sends = {graph.senders[index] for index in np.flatnonzero(kept.any(axis=(1, 2))).tolist()}
    ports: dict[str, list[str]] = {}
    for receiver in graph.receivers:
        ports.setdefault(node_of(receiver), []).append(port_of(receiver))
    rows = {id(stage): row for row, stage in enumerate(graph.stages)}
    nodes = []
    for name in graph.nodes:
        stage = graph.stage_of_node[name]
        is_end = not (stage.senders and stage.receivers)
        own = tuple(ports.get(name, ()))
        kind: NodeKind = "head" if len(own) > 1 else "end" if is_end else "mlp"
        present = name in used or name in sends
        thumb = THUMB if present and name in thumbs else 0.0
        inputs = frozenset(used.get(name, ()))
        nodes.append(DrawnNode(name, kind, rows[id(stage)], stage.layer, own, inputs, present, thumb))
    return tuple(nodes)


def _title(circuit: Circuit) -> str:
    model = circuit.provenance.model
    return f"Circuit of {model}" if model else "Circuit"


def _counts(circuit: Circuit, shown: int) -> str:
    graph = circuit.graph
    edges = (
        f"{len(circuit):,} of {graph.n_edges:,} edges, {len(circuit.nodes):,} of {len(graph.nodes):,} nodes"
    )
    return edges if shown == len(circuit) else f"{edges}; drawn: the {shown:,} strongest"


def _origin(circuit: Circuit) -> str:
    made = circuit.provenance
    known = {"model": made.model, "method": made.method, "task": made.task}
    parts = [f"{key}: {value}" for key, value in known.items() if value]
    return " · ".join([*parts, f"circuitvit {made.library}"]) if parts else ""

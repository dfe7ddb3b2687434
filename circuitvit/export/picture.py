"""What a picture of a circuit shows, before any decision about where: its nodes, edges and words.

The SVG and DOT writers both start from a `Picture`, so they agree on what is shown and how it looks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from circuitvit.errors import OptionError, check_whole, unknown_name
from circuitvit.export.style import COLOURS, EdgeLook, Sign, edge_look, number, widest
from circuitvit.graph import Circuit, Direction, Graph, edge_name, node_of, port_of, side_of
from circuitvit.graph.files import clean

THUMB = 46.0  # side of a node's small image in pixels, where it is square
WIDEST_THUMB = 3 * THUMB  # width of one that is a strip of frames

NodeKind = Literal["head", "part", "mlp", "end"]
"""A node with several inputs, a piece of one, a node with a single input, or an end of the graph (input,
logits)."""


@dataclass(frozen=True)
class DrawnNode:
    """One node: its name, its row (the place of its stage in the graph) and its inputs.

    Attributes:
        name: of the node.
        kind: decides the shape.
        row: counted from the bottom: a stage has one, or two where pieces stand above their heads.
        block: the name of the block it belongs to.
        ports: names of its inputs in order, such as `("q", "k", "v")`; `("",)` for a single input.
        used: the inputs that an edge of the picture ends at.
        present: whether an edge of the picture touches it.
        thumb: width and height in pixels of the small image inside its box; None without one.
        label: what is said of it, on a line of its own; "" for nothing.
    """

    name: str
    kind: NodeKind
    row: int
    block: str
    ports: tuple[str, ...]
    used: frozenset[str]
    present: bool
    thumb: tuple[float, float] | None = None
    label: str = ""

    @property
    def said(self) -> str:
        """The node in words, for hover texts."""
        return f"{clean(self.name)} ({self.label})" if self.label else clean(self.name)


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
        shares_of: what the score is a share of, where it is no effect; else "".
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
    shares_of: str = ""

    @property
    def said(self) -> str:
        """The edge in words, for hover texts and screen readers."""
        if self.note:
            return f"{self.name}: {self.note}"
        if self.score is None:
            return self.name
        if self.shares_of:
            return f"{self.name}: {number(self.score)} (share of {self.shares_of})"
        meaning = "no effect" if self.sign == "unscored" else self.sign
        return f"{self.name}: {number(self.score, signed=True)} ({meaning})"


@dataclass(frozen=True)
class Picture:
    """Everything that is shown of a circuit.

    Attributes:
        title: one line.
        nodes: all nodes of the graph in running order, also those outside the circuit.
        edges: the edges to draw, weakest first, so that strong ones end up on top.
        blocks: of each row the name of its block, bottom row first; None for rows of sources and readouts.
        groups: names of the token groups.
        strongest: the largest magnitude among the edges, or None when no edge has a score.
        max_width: width in pixels of an edge of that magnitude.
        direction: whether scores are those of ablating or of restoring an edge.
        counts: how many of how many edges and nodes, in words.
        origin: model, method, task and library version, in words; "" when nothing is known.
        key: what looks of edges mean, in words, where it is not the signs of effects.
        shares_of: what scores are shares of, where they are no effects and have no sign; else "".
    """

    title: str
    nodes: tuple[DrawnNode, ...]
    edges: tuple[DrawnEdge, ...]
    blocks: tuple[str | None, ...]
    groups: tuple[str, ...]
    strongest: float | None
    max_width: float
    direction: Direction
    counts: str
    origin: str
    key: tuple[tuple[str, EdgeLook], ...] = ()
    shares_of: str = ""

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
        if self.shares_of:
            return f"as wide as its share of {self.shares_of}"
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
    thumb: tuple[float, float] = (THUMB, THUMB),
    labels: Mapping[str, str] | None = None,
) -> Picture:
    """Decide what to show of `circuit`.

    Args:
        circuit: to draw; edges have a width and a sign where it carries scores.
        title: of the picture; by default it names the model.
        max_edges: draw only this many edges, the strongest; the counts say so.
        direction: of the scores; by default what the circuit's provenance says, else "noising".
        thumbs: names of nodes whose box shall have room for a small image.
        thumb: width and height of these in pixels.
        labels: by the names of nodes what is said of them, such as what a head looks for.

    Raises:
        OptionError: if `max_edges` is negative or `direction` is unknown.
        NameNotFoundError: if a label is for a node that is not there.

    Example:
        >>> from circuitvit.graph.eap_ig import transformer_graph
        >>> picture = picture_of(Circuit.from_edges(transformer_graph(1, 2), ["input->m0", "m0->logits"]))
        >>> picture.counts
        '2 of 13 edges, 3 of 5 nodes'
    """
    direction = _direction(circuit, direction)
    graph, made, said = circuit.graph, circuit.provenance, dict(labels or {})
    for name in said:
        if name not in graph.nodes:
            raise unknown_name("node", name, graph.nodes)
    edges = _edges(circuit, max_edges, direction)
    counts = f"{len(circuit):,} of {graph.n_edges:,} edges, "
    counts += f"{len(circuit.nodes):,} of {len(graph.nodes):,} nodes"
    if len(edges) < len(circuit):
        counts += f"; drawn: the {len(edges):,} strongest"
    if kept := [name for stage in graph.stages for name in stage.kept]:
        counts += f"; {', '.join(kept)} kept in every run, with all edges"
    model = _short(made.model)
    told = all(prompt in made.task for prompt in made.prompts) and not made.templates
    prompts = "" if told else made.about(4)
    known = {"model": model, "method": made.method, "task": made.task, "prompts": prompts}
    origin = [f"{key}: {value}" for key, value in known.items() if value]
    named = f"Circuit of {model}" if model else "Circuit"
    nodes = _nodes(graph, edges, dict.fromkeys(thumbs, thumb), said)
    stages = {node.row: graph.stage_of_node[node.name] for node in nodes}
    blocks = {row: own.block if own.senders and own.receivers else None for row, own in stages.items()}
    return Picture(
        title=clean(named if title is None else title),
        nodes=nodes,
        edges=edges,
        blocks=tuple(blocks[row] for row in range(len(blocks))),
        groups=tuple(clean(group) for group in graph.groups),
        strongest=max((abs(edge.score) for edge in edges if edge.score is not None), default=None) or None,
        max_width=widest(len(edges)),
        direction=direction,
        counts=counts,
        origin=clean(" · ".join([*origin, f"circuitvit {made.library}"])) if origin else "",
        shares_of=_shares_of(circuit),
    )


def _short(model: str) -> str:
    """What a model is called in a picture: of a folder that is deep in others the last name.

    Example:
        >>> _short("hf:/home/me/models/owls"), _short("hf:google/vit-base-patch16-224")
        ('hf:owls', 'hf:google/vit-base-patch16-224')
    """
    source, colon, path = model.rpartition(":")
    return f"{source}{colon}{path.rstrip('/').rpartition('/')[2]}" if path.count("/") > 1 else model


def _direction(circuit: Circuit, wanted: Direction | None) -> Direction:
    if wanted not in ("noising", "denoising", None):
        raise OptionError(f"direction is 'noising' or 'denoising', not {wanted!r}")
    # Provenance is free text from a file: never a reason to refuse a drawing.
    said = circuit.provenance.parameters.get("direction") if wanted is None else wanted
    return "denoising" if said == "denoising" else "noising"


def _edges(circuit: Circuit, max_edges: int | None, direction: Direction) -> tuple[DrawnEdge, ...]:
    """The edges to draw, weakest first; of equal ones those that come last in the graph are first."""
    if max_edges is not None:
        check_whole("max_edges", max_edges, 0)
    graph = circuit.graph
    scores = np.zeros(graph.shape) if circuit.values is None else circuit.values
    order = np.argsort(-np.abs(scores[circuit.kept]), kind="stable")[:max_edges]
    places = np.argwhere(circuit.kept)[order[::-1]]
    largest = float(np.abs(scores[tuple(places.T)]).max(initial=0.0))
    shares_of = _shares_of(circuit)
    edges = []
    for sender, receiver, group in places.tolist():
        value = float(scores[sender, receiver, group])
        sign, look = shown(value, largest, direction, shares_of, max_width=widest(len(places)), group=group)
        sent, received = graph.senders[sender], graph.receivers[receiver]
        edge = DrawnEdge(
            name=clean(edge_name(sent, received, graph.groups[group] if len(graph.groups) > 1 else "")),
            sender=sent,
            target=node_of(received),
            port=port_of(received),
            group=group,
            score=None if circuit.values is None else value,
            sign=sign,
            look=look,
            shares_of=shares_of,
        )
        edges.append(edge)
    return tuple(edges)


def shown(
    value: float, largest: float, direction: Direction, shares_of: str, *, max_width: float, group: int
) -> tuple[Sign, EdgeLook]:
    """What an edge of this score does for the behaviour, and how it is drawn; a share has no sign.

    Args:
        value: the score.
        largest: the largest magnitude in the picture.
        direction: of the scores.
        shares_of: what they are shares of; "" for effects.
        max_width: width of the strongest edge.
        group: place of the edge's token group.

    Example:
        >>> [shown(0.5, 1.0, "noising", what, max_width=4.0, group=0)[0] for what in ("", "the votes")]
        ['opposes', 'unscored']
    """
    share = abs(value) / largest if largest else 0.0
    sign = side_of(value, direction) or "unscored"
    look = edge_look(sign, share, max_width, group)
    return ("unscored", replace(look, colour=COLOURS["unscored"])) if shares_of else (sign, look)


def _shares_of(circuit: Circuit) -> str:
    return "" if circuit.values is None else clean(circuit.provenance.shares_of)


def thumb_size(grid: tuple[int, int]) -> tuple[float, float]:
    """Width and height in pixels of a small image with so many rows and columns of patches.

    Example:
        >>> thumb_size((14, 14)), thumb_size((16, 80))
        ((46.0, 46.0), (138.0, 27.6))
    """
    rows, columns = grid
    if columns < 2 * rows:  # about as wide as high: all alike, whatever their shape
        return THUMB, THUMB
    width = min(WIDEST_THUMB, THUMB * columns / rows)
    return width, round(width * rows / columns, 1)


def _nodes(
    graph: Graph,
    edges: Sequence[DrawnEdge],
    thumbs: Mapping[str, tuple[float, float]],
    labels: Mapping[str, str],
) -> tuple[DrawnNode, ...]:
    used: dict[str, set[str]] = {edge.sender: set() for edge in edges}
    for edge in edges:
        used.setdefault(edge.target, set()).add(edge.port)
    ports: dict[str, list[str]] = {}
    for receiver in graph.receivers:
        ports.setdefault(node_of(receiver), []).append(port_of(receiver))
    # Heads in the order in which they read: pieces of some write before others do.
    ordered = [name for stage in graph.stages for name in (*map(node_of, stage.receivers), *stage.senders)]
    kinds = {name: _kind(graph, name, len(ports.get(name, ()))) for name in dict.fromkeys(ordered)}
    rows = _rows(graph, kinds)
    nodes = []
    for name, kind in kinds.items():
        stage, own = graph.stage_of_node[name], tuple(ports.get(name, ()))
        present, inputs = name in used, frozenset(used.get(name, ()))
        thumb = thumbs.get(name) if present else None
        label = clean(str(labels.get(name, "")))
        nodes.append(DrawnNode(name, kind, rows[name], stage.block, own, inputs, present, thumb, label))
    return tuple(nodes)


def _kind(graph: Graph, name: str, inputs: int) -> NodeKind:
    stage = graph.stage_of_node[name]
    if inputs > 1:
        return "head"
    if not (stage.senders and stage.receivers):
        return "end"
    return "mlp" if inputs else "part"


def _rows(graph: Graph, kinds: Mapping[str, NodeKind]) -> dict[str, int]:
    """The row of each node: that of its stage, or the one above it where heads have pieces, or where several
    nodes stand beside them.
    """
    by_stage: dict[int, list[str]] = {id(stage): [] for stage in graph.stages}
    for name in kinds:
        by_stage[id(graph.stage_of_node[name])].append(name)
    found: dict[str, int] = {}
    row = -1
    for own in by_stage.values():
        heads = [name for name in own if kinds[name] == "head"]
        others = [name for name in own if kinds[name] != "head"]
        row += 1
        found.update(dict.fromkeys(heads, row))
        row += bool(heads) and (len(others) > 1 or any(kinds[name] == "part" for name in others))
        found.update(dict.fromkeys(others, row))
    return found

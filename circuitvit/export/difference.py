"""Two circuits of one graph in one figure: what they share, and what only one of them has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from circuitvit.errors import OptionError
from circuitvit.export import style
from circuitvit.export.drawing import FIGURES, SOURCES, figure_bytes, format_of
from circuitvit.export.figure import Figure, Panel, figure_of
from circuitvit.export.layout import Layout, lay_out
from circuitvit.export.picture import DrawnEdge, Picture, picture_of
from circuitvit.export.style import EdgeLook, number
from circuitvit.graph import Circuit, CircuitLike, as_circuit
from circuitvit.graph.files import clean, write_bytes

DIFFERENCE_FORMATS = (*FIGURES, *SOURCES)
"""The formats that `draw_difference` writes."""

PLAIN_WIDTH = 1.6  # of edges without scores
_COLOURS = ("#7B838D", "#0072B2", "#D55E00")  # shared, only in the first, only in the second
_DASHES = ("", "", "7 2.5")  # so that the two are told apart in grey print, too


def draw_difference(
    first: CircuitLike,
    second: CircuitLike,
    path: str | Path,
    *,
    names: tuple[str, str] = ("A", "B"),
    panels: bool = False,
    title: str | None = None,
    max_edges: int | None = None,
    format: str | None = None,
) -> Path:
    """Draw what two circuits share, and what only one of them has.

    Edges are as wide as the larger of their effects in the two circuits.

    Args:
        first: drawn in blue where it is alone.
        second: drawn in dashed vermillion where it is alone.
        path: of the file; its ending chooses the format, one of `DIFFERENCE_FORMATS`.
        names: of the two circuits.
        panels: draw three panels side by side, the two circuits and their difference, every node in the same
            place in each; for `.svg`, `.pdf` and `.png`.
        title: above the figure.
        max_edges: draw only this many edges of either circuit, the strongest.
        format: when the ending of `path` does not say it.

    Returns:
        The path of the file.

    Raises:
        OptionError: if the circuits belong to different graphs, or an option makes no sense.
        FileError: if the file cannot be written, or matplotlib is needed and missing.

    Example:
        >>> import tempfile
        >>> from circuitvit.graph.eap_ig import transformer_graph
        >>> graph = transformer_graph(1, 2)
        >>> cats = Circuit.from_edges(graph, ["input->m0", "m0->logits"])
        >>> dogs = Circuit.from_edges(graph, ["input->logits", "m0->logits"])
        >>> draw_difference(cats, dogs, Path(tempfile.mkdtemp()) / "x.svg", names=("cats", "dogs")).name
        'x.svg'
    """
    path, first = Path(path), as_circuit(first)
    second = as_circuit(second, first.graph)
    kind = format_of(path, format, DIFFERENCE_FORMATS)
    if panels and kind in SOURCES:
        raise OptionError(f"panels stand side by side in .svg, .pdf and .png figures, not in .{kind} files")
    picture = difference_of(first, second, names, title, max_edges)
    if kind in SOURCES:
        return write_bytes(path, SOURCES[kind](picture).encode())
    figure = _side_by_side((first, second), names, picture) if panels else figure_of(picture)
    return write_bytes(path, figure_bytes(figure, kind))


def difference_of(
    first: CircuitLike,
    second: CircuitLike,
    names: tuple[str, str] = ("A", "B"),
    title: str | None = None,
    max_edges: int | None = None,
) -> Picture:
    """The picture of the edges of both circuits, each looking like the part that it belongs to.

    Example:
        >>> from circuitvit.graph.eap_ig import transformer_graph
        >>> graph = transformer_graph(1, 2)
        >>> cats = Circuit.from_edges(graph, ["input->m0", "m0->logits"])
        >>> dogs = Circuit.from_edges(graph, ["input->logits", "m0->logits"])
        >>> difference_of(cats, dogs).counts
        '1 edge shared, 1 only in A, 1 only in B; Jaccard index 0.333'
    """
    first = as_circuit(first)
    second = as_circuit(second, first.graph)
    one, other = clean(names[0]), clean(names[1])
    words = ("shared", f"only in {one}", f"only in {other}")
    both = _union(first, second)
    picture = picture_of(both, f"{one} and {other}" if title is None else title, max_edges)
    edges, drawn = [], set()
    for edge in picture.edges:
        part = 0 if edge.name in first and edge.name in second else 1 if edge.name in first else 2
        drawn.add(part)
        share = abs(edge.score or 0.0) / picture.strongest if picture.strongest else 1.0
        width = style.width_of(share, picture.max_width) if picture.strongest else PLAIN_WIDTH
        look = EdgeLook(_COLOURS[part], width, round(0.6 + 0.35 * share, 3), _DASHES[part])
        effects = _effects(edge.name, {one: first, other: second})
        edges.append(replace(edge, look=look, note=words[part] + effects))
    key = tuple((words[part], EdgeLook(_COLOURS[part], 2.4, 1.0, _DASHES[part])) for part in sorted(drawn))
    sizes = len(first & second), len(first - second), len(second - first)
    counts = f"{sizes[0]:,} edge{'' if sizes[0] == 1 else 's'} shared, {sizes[1]:,} {words[1]}, "
    counts += f"{sizes[2]:,} {words[2]}; Jaccard index {number(first.jaccard(second))}"
    if models := first.provenance.mismatch(second.provenance):
        counts += f"; of {clean(models)}"
    if len(edges) < len(both):
        counts += f"; drawn: the {len(edges):,} strongest"
    return replace(picture, edges=tuple(edges), key=key, counts=counts, origin="")


def _union(first: Circuit, second: Circuit) -> Circuit:
    """The edges of both, each with the larger of its effects; without scores where one has none."""
    both = first | second
    if first.values is None or second.values is None:
        return Circuit(both.graph, both.kept)
    mine, theirs = np.where(first.kept, first.values, 0.0), np.where(second.kept, second.values, 0.0)
    return Circuit(both.graph, both.kept, np.where(np.abs(mine) >= np.abs(theirs), mine, theirs))


def _effects(edge: str, circuits: Mapping[str, Circuit]) -> str:
    """The effects of an edge in the circuits that have it, in words; "" where none is known."""
    scores = {name: circuit.score_of(edge) for name, circuit in circuits.items() if edge in circuit}
    said = [f"{name} {number(score, signed=True)}" for name, score in scores.items() if score is not None]
    return f" ({', '.join(said)})" if said else ""


def _side_by_side(circuits: tuple[Circuit, Circuit], names: tuple[str, str], picture: Picture) -> Figure:
    """The two circuits and their difference on one layout, so that every node is in its place in each."""
    layout = lay_out(picture)
    panels = [
        panel_of(
            picture,
            layout,
            {edge.name: edge for edge in picture.edges if edge.name in circuit},
            f"{clean(name)}: {len(circuit):,} edges",
        )
        for circuit, name in zip(circuits, names, strict=True)
    ]
    return Figure(picture, (*panels, Panel("difference", picture, layout)))


def panel_of(picture: Picture, layout: Layout, edges: Mapping[str, DrawnEdge], caption: str) -> Panel:
    """A part of a picture on the whole one's layout: the edges given, as they look there; boxes that none of
    them touches become dots."""
    lines = tuple(
        replace(line, edge=edges[line.edge.name]) for line in layout.lines if line.edge.name in edges
    )
    touched = {end for line in lines for end in (line.edge.sender, line.edge.target)}
    used = {(line.edge.target, line.edge.port) for line in lines}
    nodes = tuple(
        replace(
            node,
            present=node.name in touched,
            used=frozenset(port for port in node.used if (node.name, port) in used),
        )
        for node in picture.nodes
    )
    middles = {name: box.centre for name, box in layout.boxes.items()}
    mine = replace(picture, nodes=nodes, edges=tuple(line.edge for line in lines))
    return Panel(caption, mine, replace(layout, lines=lines, dots={**layout.dots, **middles}))

"""The figure: drawings side by side with a title above and a legend below, put on any canvas.

What stands where on the sheet is decided here, once. SVG, matplotlib and TikZ are canvases, which know how to
draw a rectangle, a curve or a text; so their pictures look alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from circuitvit.export import style
from circuitvit.export.layout import (
    LABEL_LINE,
    LABEL_MAX,
    LABEL_SIZE,
    NAME_MAX,
    NAME_SIZE,
    PORT_MAX,
    PORT_SIZE,
    Box,
    Layout,
    Point,
    lay_out,
)
from circuitvit.export.picture import DrawnNode, Picture
from circuitvit.export.style import EdgeLook, fit, number, text_width, wrap
from circuitvit.graph.files import clean

MARGIN = 10.0
LABELS = 46.0  # room left of the drawing for the names of the layers
PANEL_GAP = 36.0
ROW_GAP = 14.0
LEAST_WIDTH = 400.0  # room for the legend under a narrow drawing
CASED = 1.8  # from this width on, an edge has a white seam that shows what passes below it
LEGEND_LINE = 19.0
SAMPLE = 26.0  # length of a sample line in the legend
PORT_NAMES = {"q": "query", "k": "key", "v": "value", "g": "gate"}

Pixels = NDArray[np.uint8]


ORIGIN = (0.0, 0.0)


class Font(NamedTuple):
    """Size in pixels, colour, and weight: 400 is plain, 600 and more is bold."""

    size: float
    colour: str
    weight: int = 400


TITLE = Font(15.0, style.INK, 600)
CAPTION = Font(NAME_SIZE, style.INK, 600)
LABEL = Font(10.5, style.INK)
QUIET = Font(10.5, style.MUTED)


class Canvas(Protocol):
    """What a figure is drawn on: lengths in pixels, y downwards, later marks above earlier ones.

    Hover texts (`said`) and `kind` are for formats that can be pointed at; others pass them over.
    """

    def group(self, at: Point = ORIGIN, said: str = "", kind: str = "", fill: str = "") -> Canvas:
        """A canvas within this one, its corner at a point; `fill` is that of most marks on it."""

    def rect(self, box: Box, fill: str, stroke: str = "", radius: float = 0.0) -> None:
        """A rectangle, its corners rounded by `radius`, its outline one pixel wide."""

    def dot(self, at: Point, radius: float, fill: str, said: str = "") -> None:
        """A filled circle."""

    def stroke(self, points: Sequence[Point], look: EdgeLook, said: str = "") -> None:
        """A curve: a start, then for each cubic piece two control points and an end."""

    def area(self, corners: Sequence[Point], fill: str) -> None:
        """A filled polygon."""

    def text(self, at: Point, words: str, font: Font, middle: bool = False) -> None:
        """A line of text that starts, or has its middle, at a point on its base line."""

    def image(self, box: Box, pixels: Pixels) -> None:
        """An image `(height, width, 3)` that fills a box."""


@dataclass(frozen=True)
class Panel:
    """One of the drawings of a figure.

    Attributes:
        caption: above it.
        picture: what is drawn.
        layout: where.
    """

    caption: str
    picture: Picture
    layout: Layout


@dataclass(frozen=True)
class Figure:
    """Drawings of the same height in rows, with one title, one set of layer names and one legend.

    Attributes:
        whole: gives title and legend.
        panels: from left to right.
        thumbnails: the small image of each node that has room for one.
        columns: panels in a row; all by default.
    """

    whole: Picture
    panels: tuple[Panel, ...]
    thumbnails: Mapping[str, Pixels] = field(default_factory=dict)
    columns: int | None = None


def figure_of(picture: Picture, thumbnails: Mapping[str, Pixels] | None = None) -> Figure:
    """The figure of one picture alone."""
    return Figure(picture, (Panel("", picture, lay_out(picture)),), thumbnails or {})


def put_on(canvas: Canvas, figure: Figure) -> tuple[float, float]:
    """Draw the figure.

    Returns:
        Width and height that it has taken.
    """
    across = figure.columns or len(figure.panels)
    rows = [figure.panels[first : first + across] for first in range(0, len(figure.panels), across)]
    drawn = max(sum(each.layout.width for each in row) + PANEL_GAP * (len(row) - 1) for row in rows)
    inner = max(LABELS + drawn, LEAST_WIDTH)
    left = MARGIN + LABELS + (inner - LABELS - drawn) / 2
    y = _title(canvas, figure.whole, inner)
    for row in rows:
        y = _row(canvas, row, figure.thumbnails, left, inner, y) + (ROW_GAP if row is not rows[-1] else 0.0)
    y = _legend(canvas, figure.whole, y, inner)
    return inner + 2 * MARGIN, y + MARGIN


def _row(
    canvas: Canvas,
    panels: Sequence[Panel],
    thumbnails: Mapping[str, Pixels],
    left: float,
    inner: float,
    y: float,
) -> float:
    """Draw panels side by side from a place on; returns y of their lower end."""
    y += 1.8 * NAME_SIZE if any(panel.caption for panel in panels) else 0.0
    _layers(canvas, panels[0].layout, inner, y)
    below = y + panels[0].layout.height + 14
    for panel in panels:
        layout = panel.layout
        if panel.caption:
            words, middle = fit(panel.caption, NAME_SIZE, layout.width), left + layout.width / 2
            canvas.text((middle, y - 0.9 * NAME_SIZE), words, CAPTION, middle=True)
        put_drawing(canvas.group((left, y)), panel, thumbnails)
        _column_names(canvas, layout, left, below + LABEL.size)
        left += layout.width + PANEL_GAP
    return below + 8 + (LABEL.size if panels[-1].layout.heads else 0.0)


def put_drawing(canvas: Canvas, panel: Panel, thumbnails: Mapping[str, Pixels]) -> None:
    """Draw one panel alone, its corner at (0, 0): dots, edges from weak to strong, nodes above them."""
    picture, layout = panel.picture, panel.layout
    dots = canvas.group(fill=style.FAINT)
    for node in picture.nodes:
        if not node.present:
            said = f"{clean(node.name)} (outside the circuit)"
            dots.dot(layout.dots[node.name], 1.7, style.FAINT, said)
    edges = canvas.group(fill="none")
    for line in layout.lines:
        look = line.edge.look
        if look.width >= CASED:
            edges.stroke(line.points, EdgeLook(style.PAPER, look.width + 2, 1.0))
        edges.stroke(line.points, look, line.edge.said)
    nodes = canvas.group()
    for node in picture.nodes:
        if node.present:
            _node(nodes, node, picture, layout, thumbnails.get(node.name))


# -- around the drawings -------------------------------------------------------------------------


def _title(canvas: Canvas, picture: Picture, room: float) -> float:
    y = MARGIN
    for line in wrap(picture.title, 1.06 * TITLE.size, room, max_lines=2):  # bold is wider
        canvas.text((MARGIN, y + 0.8 * TITLE.size), line, TITLE)
        y += 1.3 * TITLE.size
    if not picture.edges:
        canvas.text((MARGIN, y + 14), picture.emptiness, Font(NAME_SIZE + 1, style.MUTED))
        y += 24
    return y + 10


def _layers(canvas: Canvas, layout: Layout, inner: float, y: float) -> None:
    """A stripe behind every other layer, and the layers' names on the left."""
    for index, (block, (top, bottom)) in enumerate(layout.stripes.items()):
        if index % 2 == 0:
            canvas.rect(Box(MARGIN, y + top, inner, bottom - top), style.STRIPE)
        base = y + (top + bottom) / 2 + 0.36 * LABEL.size
        canvas.text((MARGIN + 2, base), block, QUIET)


def _column_names(canvas: Canvas, layout: Layout, left: float, y: float) -> None:
    """Under the drawing, which head each column is; shorter, then fewer, where columns are narrow."""
    if not layout.heads:
        return
    pitch = min((high - low for low, high in pairwise(sorted(layout.column_names()))), default=100.0)
    names = layout.column_names("head " if pitch > text_width("head 00", LABEL.size) else "h")
    taken: list[tuple[float, float]] = []
    for x in sorted(names, key=lambda x: (x != layout.spine, x)):
        half = text_width(names[x], LABEL.size) / 2 + 2
        if all(x + half <= low or high <= x - half for low, high in taken):
            taken.append((x - half, x + half))
            canvas.text((left + x, y), names[x], QUIET, middle=True)


# -- nodes ---------------------------------------------------------------------------------------


def _node(canvas: Canvas, node: DrawnNode, picture: Picture, layout: Layout, thumb: Pixels | None) -> None:
    incoming = sum(edge.target == node.name for edge in picture.edges)
    outgoing = sum(edge.sender == node.name for edge in picture.edges)
    said = f"{node.said}: {incoming} edges in, {outgoing} out"
    own, box = canvas.group(said=said, kind=f"node {node.kind}"), layout.boxes[node.name]
    looks = {
        "head": (style.PAPER, style.INK),
        "part": (style.PAPER, style.INK),
        "mlp": (style.MLP_FILL, style.INK),
    }
    fill, ink = looks.get(node.kind, (style.END_FILL, style.PAPER))
    own.rect(box, fill, style.INK, min(box.height / 2, 10) if node.kind == "mlp" else 4)
    x, middle = box.centre
    if node.kind == "head" or node.thumb or node.label:
        middle = box.top + 12.0
    name = fit(clean(node.name), NAME_SIZE, NAME_MAX)
    own.text((x, middle + 0.36 * NAME_SIZE), name, Font(NAME_SIZE, ink, 600), middle=True)
    line = LABEL_LINE if node.label else 0.0
    if node.label:
        quiet = Font(LABEL_SIZE, ink if node.kind == "end" else style.MUTED)
        words = fit(node.label, LABEL_SIZE, LABEL_MAX)
        own.text((x, middle + line + 0.36 * LABEL_SIZE), words, quiet, middle=True)
    if node.thumb and thumb is not None:
        width, height = node.thumb
        own.image(Box(x - width / 2, box.top + 20.5 + line, width, height), thumb)
    for port, at in layout.ports[node.name].items():
        _port(own, node, port, at, box.bottom)


def _port(canvas: Canvas, node: DrawnNode, port: str, x: float, bottom: float) -> None:
    """The letter of an input within the box, and an arrow head under it when an edge ends there."""
    used = port in node.used
    if node.kind == "head":
        font = Font(PORT_SIZE, style.INK, 700) if used else Font(PORT_SIZE, style.FAINT)
        canvas.text((x, bottom - 4.5), fit(clean(port), PORT_SIZE, PORT_MAX), font, middle=True)
    if used:
        canvas.area(((x - 3.6, bottom + 4.5), (x, bottom), (x + 3.6, bottom + 4.5)), style.INK)


# -- the legend: what colours, widths, dashes and ports mean, and what is shown ------------------


@dataclass(frozen=True)
class _Item:
    """A sample of `sample` pixels, drawn by `draw(canvas, x, y)`, and the words beside it."""

    words: str
    sample: float
    draw: Callable[[Canvas, float, float], None]


def _legend(canvas: Canvas, picture: Picture, top: float, room: float) -> float:
    """Draw the legend, at most `room` pixels wide; returns y of its lower end."""
    x, y = MARGIN, top + LEGEND_LINE / 2
    for item in _items(picture):
        width = item.sample + 6 + text_width(item.words, LABEL.size)
        if x > MARGIN and x + width > MARGIN + room:
            x, y = MARGIN, y + LEGEND_LINE
        item.draw(canvas, x, y)
        start = x + item.sample + 6
        if item.words:
            _words(canvas, start, y, fit(item.words, LABEL.size, MARGIN + room - start))
        x += width + 22
    y += LEGEND_LINE
    counts = f"{picture.counts} · edges run upwards" if picture.edges else picture.counts
    _words(canvas, MARGIN, y, fit(counts, LABEL.size, room))
    for line in wrap(picture.origin, LABEL.size, room, max_lines=3):
        y += LEGEND_LINE - 4
        _words(canvas, MARGIN, y, line, QUIET)
    return y + LEGEND_LINE / 2


def _items(picture: Picture) -> list[_Item]:
    items = [_line_item(words, look, SAMPLE + 8) for words, look in picture.key]
    if not picture.key:
        looks = {sign: EdgeLook(style.COLOURS[sign], 3.0, 1.0) for sign in picture.signs}
        items = [_line_item(picture.meaning(sign), look, SAMPLE) for sign, look in looks.items()]
    if picture.strongest is not None:
        items.append(_width_item(picture, picture.strongest))
    heads = [node for node in picture.nodes if node.kind == "head" and node.present]
    ports = dict.fromkeys(port for node in heads for port in node.ports)
    if ports:
        items.append(_port_item(list(ports)))
    if len(picture.groups) > 1:
        for index, name in enumerate(picture.groups):
            look = EdgeLook(style.MUTED, 1.8, 1.0, style.dash_of(index))
            items.append(_line_item(fit(f"tokens: {name}", LABEL.size, 200), look, SAMPLE + 8))
    if any(not node.present for node in picture.nodes):
        items.append(
            _Item("node outside the circuit", 6.0, lambda on, x, y: on.dot((x + 3, y), 2, style.FAINT))
        )
    return items


def _line_item(words: str, look: EdgeLook, length: float) -> _Item:
    return _Item(words, length, lambda canvas, x, y: _sample(canvas, x, y, length, look))


def _width_item(picture: Picture, strongest: float) -> _Item:
    """Three widths with the effects that they stand for, side by side so that they are compared."""
    shares = (1.0, 0.5, 0.2)
    words = [number(strongest * share) for share in shares]
    steps = [SAMPLE + 12 + text_width(word, LABEL.size) for word in words]
    measure = "share" if picture.shares_of else "effect"
    lead = text_width(measure, LABEL.size) + 6

    def draw(canvas: Canvas, x: float, y: float) -> None:
        _words(canvas, x, y, measure)
        at = x + lead
        for share, word, step in zip(shares, words, steps, strict=True):
            look = EdgeLook(style.MUTED, style.width_of(share, picture.max_width), 1.0)
            _sample(canvas, at, y, SAMPLE, look)
            _words(canvas, at + SAMPLE + 4, y, word)
            at += step

    return _Item("", lead + sum(steps), draw)


def _port_item(ports: list[str]) -> _Item:
    letters = fit(clean("  ".join(ports)), LABEL.size, 120)
    names = ", ".join(PORT_NAMES.get(port, clean(port)) for port in ports)
    return _Item(
        f"inputs of a head: {names} (dark: used)",
        text_width(letters, LABEL.size),
        lambda canvas, x, y: _words(canvas, x, y, letters, LABEL._replace(weight=700)),
    )


def _sample(canvas: Canvas, x: float, y: float, length: float, look: EdgeLook) -> None:
    canvas.stroke(((x, y), (x, y), (x + length, y), (x + length, y)), look)


def _words(canvas: Canvas, x: float, y: float, words: str, font: Font = LABEL) -> None:
    canvas.text((x, y + 0.36 * font.size), words, font)

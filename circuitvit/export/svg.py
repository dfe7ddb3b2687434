"""The SVG picture, written without any other program: one file, fonts as text, hover texts inside.

ElementTree escapes every text and attribute, so no name or title can add markup of its own.
"""

from __future__ import annotations

import hashlib
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from circuitvit.export import style
from circuitvit.export.axes import NAME_MAX, NAME_SIZE, PORT_MAX, PORT_SIZE, Box
from circuitvit.export.curves import Line
from circuitvit.export.layout import Layout, lay_out
from circuitvit.export.legend import add_legend
from circuitvit.export.picture import DrawnNode, Picture
from circuitvit.export.text import clean, fit, text_width, wrap

MARGIN = 10.0
LABELS = 46.0  # room left of the drawing for the names of the layers
PANEL_GAP = 36.0
TITLE_SIZE = 15.0
LABEL_SIZE = 10.5
LEAST_WIDTH = 400.0  # room for the legend under a narrow drawing
CASED = 1.8  # from this width on, an edge has a white seam that shows what passes below it
_STYLE = ".edge:hover{stroke-opacity:1;stroke:#000}"


def svg_of(picture: Picture, thumbnails: Mapping[str, str] | None = None) -> str:
    """The picture as the text of an SVG file; the same picture gives the same text, byte for byte.

    Args:
        picture: to write.
        thumbnails: data URI of the small image of each node that has room for one.

    Example:
        >>> from circuitvit.export.picture import picture_of
        >>> from circuitvit.graph import Circuit
        >>> from circuitvit.graph.eap_ig import transformer_graph
        >>> circuit = Circuit.from_edges(transformer_graph(1, 2), ["input->m0", "m0->logits"])
        >>> "<title>input-&gt;m0</title>" in svg_of(picture_of(circuit))
        True
    """
    return svg_of_panels(picture, [Panel("", picture, lay_out(picture))], thumbnails)


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


def svg_of_panels(
    whole: Picture, panels: Sequence[Panel], thumbnails: Mapping[str, str] | None = None
) -> str:
    """Drawings of the same height side by side, with one title, one set of layer names and one legend.

    Args:
        whole: gives title and legend.
        panels: from left to right.
        thumbnails: as for `svg_of`.
    """
    height = panels[0].layout.height
    drawn = sum(panel.layout.width for panel in panels) + PANEL_GAP * (len(panels) - 1)
    inner = max(LABELS + drawn, LEAST_WIDTH)
    root = _root(whole)
    y = _add_title(root, whole, inner)
    y += 1.8 * NAME_SIZE if any(panel.caption for panel in panels) else 0.0
    _add_layers(root, panels[0].layout, inner, y)
    left = MARGIN + LABELS + (inner - LABELS - drawn) / 2
    for panel in panels:
        _add_panel(root, panel, left, y, thumbnails or {})
        below = _add_column_names(root, panel.layout, left, y + height + 14)
        left += panel.layout.width + PANEL_GAP
    y = add_legend(root, whole, MARGIN, below + 8, inner)
    _set_size(root, inner + 2 * MARGIN, y + MARGIN)
    ET.indent(root, space=" ")
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _add_panel(root: ET.Element, panel: Panel, left: float, y: float, thumbnails: Mapping[str, str]) -> None:
    picture, layout = panel.picture, panel.layout
    if panel.caption:
        words = fit(panel.caption, NAME_SIZE, layout.width)
        middle = left + layout.width / 2
        _text(root, middle, y - 0.9 * NAME_SIZE, words, NAME_SIZE, style.INK, anchor="middle", weight="600")
    drawing = ET.SubElement(root, "g", transform=f"translate({_n(left)} {_n(y)})")
    _add_dots(drawing, picture, layout)
    _add_edges(drawing, layout)
    _add_nodes(drawing, picture, layout, thumbnails)


def _root(picture: Picture) -> ET.Element:
    """The outermost element, with the words that a screen reader says of the picture."""
    words = f"{picture.title}: {picture.counts}"
    names = "\n".join([words, *(edge.name for edge in picture.edges)])
    mark = hashlib.sha256(names.encode()).hexdigest()[:8]  # so that two pictures can share a page
    root = ET.Element("svg", xmlns="http://www.w3.org/2000/svg", role="img")
    root.set("aria-labelledby", f"title-{mark} about-{mark}")
    root.set("font-family", style.FONT)
    ET.SubElement(root, "title", id=f"title-{mark}").text = words
    strongest = "; ".join(edge.said for edge in picture.edges[-10:][::-1])
    about = f"Circuit diagram, input at the bottom, logits on top. Strongest edges: {strongest or 'none'}."
    ET.SubElement(root, "desc", id=f"about-{mark}").text = " ".join([about, picture.origin]).strip()
    ET.SubElement(root, "style").text = _STYLE
    return root


def _set_size(root: ET.Element, width: float, height: float) -> None:
    root.set("viewBox", f"0 0 {_n(width)} {_n(height)}")
    root.set("width", _n(width))
    root.set("height", _n(height))
    paper = ET.Element("rect", width="100%", height="100%", fill=style.PAPER)
    root.insert(3, paper)  # after title, description and style, below all that is drawn


def _add_title(root: ET.Element, picture: Picture, room: float) -> float:
    y = MARGIN
    for line in wrap(picture.title, 1.06 * TITLE_SIZE, room, max_lines=2):  # bold is wider
        _text(root, MARGIN, y + 0.8 * TITLE_SIZE, line, TITLE_SIZE, style.INK, weight="600")
        y += 1.3 * TITLE_SIZE
    if not picture.edges:
        _text(root, MARGIN, y + 14, picture.emptiness, NAME_SIZE + 1, style.MUTED)
        y += 24
    return y + 10


def _add_layers(root: ET.Element, layout: Layout, inner: float, y: float) -> None:
    """A stripe behind every other layer, and the layers' names on the left."""
    for index, (layer, (top, bottom)) in enumerate(sorted(layout.stripes.items())):
        if index % 2 == 0:
            stripe = ET.SubElement(root, "rect", x=_n(MARGIN), y=_n(y + top), fill=style.STRIPE)
            stripe.set("width", _n(inner))
            stripe.set("height", _n(bottom - top))
        _text(
            root,
            MARGIN + 2,
            y + (top + bottom) / 2 + 0.36 * LABEL_SIZE,
            f"layer {layer}",
            LABEL_SIZE,
            style.MUTED,
        )


def _add_dots(parent: ET.Element, picture: Picture, layout: Layout) -> None:
    group = ET.SubElement(parent, "g", fill=style.FAINT)
    for node in picture.nodes:
        if not node.present:
            x, y = layout.dots[node.name]
            dot = ET.SubElement(group, "circle", cx=_n(x), cy=_n(y), r="1.7")
            ET.SubElement(dot, "title").text = f"{clean(node.name)} (outside the circuit)"


def _add_edges(parent: ET.Element, layout: Layout) -> None:
    group = ET.SubElement(parent, "g", fill="none")
    for line in layout.lines:
        look = line.edge.look
        if look.width >= CASED:
            case = ET.SubElement(group, "path", d=path_of(line), stroke=style.PAPER)
            case.set("stroke-width", f"{look.width + 2:.2f}")
            case.set("aria-hidden", "true")
        path = ET.SubElement(group, "path", d=path_of(line), stroke=look.colour)
        path.set("class", "edge")
        path.set("stroke-width", f"{look.width:.2f}")
        path.set("stroke-opacity", f"{look.opacity:.2f}")
        if look.dash:
            path.set("stroke-dasharray", look.dash)
        ET.SubElement(path, "title").text = line.edge.said


def path_of(line: Line) -> str:
    """A curve as the commands of an SVG path."""
    words = [f"M{_n(line.start[0])} {_n(line.start[1])}"]
    before = line.start
    for first, second, end in line.pieces:
        if before[0] == end[0]:
            words.append(f"V{_n(end[1])}")
        else:
            words.append("C" + " ".join(f"{_n(x)} {_n(y)}" for x, y in (first, second, end)))
        before = end
    return "".join(words)


def _add_nodes(parent: ET.Element, picture: Picture, layout: Layout, thumbnails: Mapping[str, str]) -> None:
    group = ET.SubElement(parent, "g")
    for node in picture.nodes:
        if node.present:
            box = layout.boxes[node.name]
            element = ET.SubElement(group, "g")
            element.set("class", f"node {node.kind}")
            ET.SubElement(element, "title").text = _said(node, picture)
            _add_box(element, node, box)
            if node.thumb and node.name in thumbnails:
                _add_thumbnail(element, node, box, thumbnails[node.name])
            for port, x in layout.ports[node.name].items():
                _add_port(element, node, port, x, box.bottom)


def _said(node: DrawnNode, picture: Picture) -> str:
    incoming = sum(edge.target == node.name for edge in picture.edges)
    outgoing = sum(edge.sender == node.name for edge in picture.edges)
    return f"{clean(node.name)}: {incoming} edges in, {outgoing} out"


def _add_box(parent: ET.Element, node: DrawnNode, box: Box) -> None:
    fill, ink = {"head": (style.PAPER, style.INK), "mlp": (style.MLP_FILL, style.INK)}.get(
        node.kind, (style.END_FILL, style.PAPER)
    )
    shape = ET.SubElement(parent, "rect", x=_n(box.left), y=_n(box.top), fill=fill, stroke=style.INK)
    shape.set("width", _n(box.width))
    shape.set("height", _n(box.height))
    shape.set("rx", _n(min(box.height / 2, 10) if node.kind == "mlp" else 4))
    middle = box.top + (12.0 if node.kind == "head" or node.thumb else box.height / 2)
    name = fit(clean(node.name), NAME_SIZE, NAME_MAX)
    _text(parent, box.middle, middle + 0.36 * NAME_SIZE, name, NAME_SIZE, ink, anchor="middle", weight="600")


def _add_thumbnail(parent: ET.Element, node: DrawnNode, box: Box, uri: str) -> None:
    place = {"x": _n(box.middle - node.thumb / 2), "y": _n(box.top + 20.5)}
    image = ET.SubElement(parent, "image", place, href=uri, preserveAspectRatio="none")
    for side in ("width", "height"):
        image.set(side, _n(node.thumb))


def _add_port(parent: ET.Element, node: DrawnNode, port: str, x: float, bottom: float) -> None:
    """The letter of an input within the box, and an arrow head under it when an edge ends there."""
    used = port in node.used
    if node.kind == "head":
        colour, weight = (style.INK, "700") if used else (style.FAINT, "400")
        name = fit(clean(port), PORT_SIZE, PORT_MAX)
        _text(parent, x, bottom - 4.5, name, PORT_SIZE, colour, anchor="middle", weight=weight)
    if used:
        tip = f"M{_n(x - 3.6)} {_n(bottom + 4.5)}L{_n(x)} {_n(bottom)}L{_n(x + 3.6)} {_n(bottom + 4.5)}Z"
        ET.SubElement(parent, "path", d=tip, fill=style.INK)


def _add_column_names(root: ET.Element, layout: Layout, left: float, y: float) -> float:
    """Under the drawing, which head each column is; shorter, then fewer, where columns are narrow."""
    xs = sorted({*layout.heads, *([] if layout.spine is None else [layout.spine])})
    if not layout.heads:
        return y
    pitch = min((high - low for low, high in pairwise(xs)), default=100.0)
    word = "head " if pitch > text_width("head 00", LABEL_SIZE) else "h"
    places = {} if layout.spine is None else {layout.spine: "MLP"}
    for head, x in enumerate(layout.heads):
        places[x] = f"{word}{head}, {places[x]}" if x in places else f"{word}{head}"
    taken: list[tuple[float, float]] = []
    for x in sorted(places, key=lambda x: (x != layout.spine, x)):
        half = text_width(places[x], LABEL_SIZE) / 2 + 2
        if all(x + half <= low or high <= x - half for low, high in taken):
            taken.append((x - half, x + half))
            _text(root, left + x, y + LABEL_SIZE, places[x], LABEL_SIZE, style.MUTED, anchor="middle")
    return y + LABEL_SIZE


def _text(
    parent: ET.Element,
    x: float,
    y: float,
    words: str,
    size: float,
    colour: str,
    anchor: str = "start",
    weight: str = "400",
) -> None:
    text = ET.SubElement(parent, "text", x=_n(x), y=_n(y), fill=colour)
    text.set("font-size", _n(size))
    if anchor != "start":
        text.set("text-anchor", anchor)
    if weight != "400":
        text.set("font-weight", weight)
    text.text = words


def _n(value: float) -> str:
    """A coordinate with one decimal, without a trailing zero and without "-0"."""
    text = f"{value:.1f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text

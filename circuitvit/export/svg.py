"""The SVG picture, written without any other program: one file, fonts as text, hover texts inside.

ElementTree escapes every text and attribute, so no name or title can add markup of its own.
"""

from __future__ import annotations

import base64
import hashlib
import io
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from circuitvit.export import style
from circuitvit.export.figure import ORIGIN, Figure, Font, Pixels, figure_of, put_on
from circuitvit.export.layout import Box, Point
from circuitvit.export.picture import Picture
from circuitvit.export.style import EdgeLook

_STYLE = ".edge:hover{stroke-opacity:1;stroke:#000}"
_PNG_SIDE = 96  # smaller images are kept without loss


def svg_of(picture: Picture) -> str:
    """The picture as the text of an SVG file; the same picture gives the same text, byte for byte.

    Example:
        >>> from circuitvit.export.picture import picture_of
        >>> from circuitvit.graph import Circuit
        >>> from circuitvit.graph.eap_ig import transformer_graph
        >>> circuit = Circuit.from_edges(transformer_graph(1, 2), ["input->m0", "m0->logits"])
        >>> "<title>input-&gt;m0</title>" in svg_of(picture_of(circuit))
        True
    """
    return svg_of_figure(figure_of(picture))


def svg_of_figure(figure: Figure) -> str:
    """A whole figure as SVG: several drawings, or one with thumbnails."""
    root = _root(figure.whole)
    width, height = (_n(side) for side in put_on(SvgCanvas(root), figure))
    for name, value in {"viewBox": f"0 0 {width} {height}", "width": width, "height": height}.items():
        root.set(name, value)
    ET.indent(root, space=" ")
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _root(picture: Picture) -> ET.Element:
    """The outermost element, with the words that a screen reader says of the picture, and the paper."""
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
    ET.SubElement(root, "rect", width="100%", height="100%", fill=style.PAPER)
    return root


@dataclass(frozen=True)
class SvgCanvas:
    """Adds elements to `parent`; see `figure.Canvas`."""

    parent: ET.Element

    def group(self, at: Point = ORIGIN, said: str = "", kind: str = "", fill: str = "") -> SvgCanvas:
        move = "" if at == ORIGIN else f"translate({_n(at[0])} {_n(at[1])})"
        return SvgCanvas(self._add("g", said, {"transform": move, "fill": fill, "class": kind}))

    def rect(self, box: Box, fill: str, stroke: str = "", radius: float = 0.0) -> None:
        place = {"x": _n(box.left), "y": _n(box.top), "fill": fill, "stroke": stroke}
        size = {"width": _n(box.width), "height": _n(box.height), "rx": _n(radius) if radius else ""}
        self._add("rect", "", place | size)

    def dot(self, at: Point, radius: float, fill: str, said: str = "") -> None:
        self._add("circle", said, {"cx": _n(at[0]), "cy": _n(at[1]), "r": _n(radius), "fill": fill})

    def stroke(self, points: Sequence[Point], look: EdgeLook, said: str = "") -> None:
        path = {"d": path_of(points), "stroke": look.colour, "fill": "none", "class": "edge" if said else ""}
        opacity = "" if look.opacity == 1 else f"{look.opacity:.2f}"
        width = {"stroke-width": f"{look.width:.2f}", "stroke-opacity": opacity}
        last = {"stroke-dasharray": look.dash, "aria-hidden": "" if said else "true"}
        self._add("path", said, path | width | last)

    def area(self, corners: Sequence[Point], fill: str) -> None:
        way = "L".join(f"{_n(x)} {_n(y)}" for x, y in corners)
        self._add("path", "", {"d": f"M{way}Z", "fill": fill})

    def text(self, at: Point, words: str, font: Font, middle: bool = False) -> None:
        look = {"fill": font.colour, "font-size": _n(font.size), "text-anchor": "middle" if middle else ""}
        weight = {"font-weight": "" if font.weight == 400 else str(font.weight)}
        self._add("text", "", {"x": _n(at[0]), "y": _n(at[1])} | look | weight).text = words

    def image(self, box: Box, pixels: Pixels) -> None:
        place = {"x": _n(box.left), "y": _n(box.top), "href": image_uri(pixels)}
        size = {"preserveAspectRatio": "none", "width": _n(box.width), "height": _n(box.height)}
        self._add("image", "", place | size)

    def _add(self, tag: str, said: str, attributes: dict[str, str]) -> ET.Element:
        """An element with the attributes that are not empty and that its group does not have already."""
        own = {name: value for name, value in attributes.items() if value and value != self.parent.get(name)}
        element = ET.SubElement(self.parent, tag, own)
        if said:
            ET.SubElement(element, "title").text = said
        return element


def path_of(points: Sequence[Point]) -> str:
    """A curve as the commands of an SVG path; straight pieces as short as can be."""
    words, before = [f"M{_n(points[0][0])} {_n(points[0][1])}"], points[0]
    for at in range(1, len(points), 3):
        end = points[at + 2]
        if before[0] == end[0]:
            words.append(f"V{_n(end[1])}")
        elif before[1] == end[1]:
            words.append(f"H{_n(end[0])}")
        else:
            words.append("C" + " ".join(f"{_n(x)} {_n(y)}" for x, y in points[at : at + 3]))
        before = end
    return "".join(words)


def image_uri(pixels: Pixels, quality: int = 88) -> str:
    """An image `(height, width, 3)`, or with a fourth channel for how opaque it is, as a data URI."""
    file, picture = io.BytesIO(), Image.fromarray(pixels)
    kind = "png" if picture.mode == "RGBA" or max(picture.size) <= _PNG_SIDE else "jpeg"
    picture.save(file, kind, optimize=kind == "png", quality=quality)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _n(value: float) -> str:
    """A coordinate with one decimal, without a trailing zero and without "-0"."""
    text = f"{value:.1f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text

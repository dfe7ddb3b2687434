"""Reads an SVG picture back as rectangles, texts and curves, knowing nothing of how it was laid out."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from PIL import ImageFont

SVG = "{http://www.w3.org/2000/svg}"
SAMPLES = 40  # points looked at on each Bezier piece

Point = tuple[float, float]


@dataclass(frozen=True)
class Rectangle:
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Rectangle, space: float = 0.0) -> bool:
        """Whether the two overlap, or are less than `space` apart."""
        apart_x = max(self.left - other.right, other.left - self.right)
        apart_y = max(self.top - other.bottom, other.top - self.bottom)
        return max(apart_x, apart_y) < space

    def holds(self, point: Point) -> bool:
        x, y = point
        return self.left < x < self.right and self.top < y < self.bottom

    def holds_all(self, other: Rectangle) -> bool:
        return (
            self.left <= other.left
            and self.top <= other.top
            and other.right <= self.right
            and other.bottom <= self.bottom
        )


@dataclass(frozen=True)
class Curve:
    """One edge: its hover text, its attributes and points along it."""

    said: str
    attributes: dict[str, str]
    points: tuple[Point, ...]

    @property
    def name(self) -> str:
        return self.said.split(": ")[0]

    @property
    def width(self) -> float:
        return float(self.attributes["stroke-width"])


class Drawing:
    """An SVG picture, read.

    Attributes:
        page: the view box.
        boxes: rectangle of each node, by name.
        curves: the edges, in drawing order.
        texts: every text with its rectangle, as wide as a common font makes it.
        own_texts: for each node, the texts in its box.
    """

    def __init__(self, svg: str) -> None:
        self.root = ET.fromstring(svg.encode())
        self.page = Rectangle(*(float(word) for word in self.root.attrib["viewBox"].split()))
        self.boxes: dict[str, Rectangle] = {}
        self.curves: list[Curve] = []
        self.texts: list[tuple[str, Rectangle]] = []
        self.own_texts: dict[str, list[tuple[str, Rectangle]]] = {}
        self.dots = [
            element for element in self.root.iter(f"{SVG}circle") if element.find(f"{SVG}title") is not None
        ]
        self._read(self.root, 0.0, 0.0, None)

    def _read(self, element: ET.Element, dx: float, dy: float, node: str | None) -> None:
        moved = re.fullmatch(r"translate\((\S+) (\S+)\)", element.get("transform", ""))
        if moved:
            dx, dy = dx + float(moved[1]), dy + float(moved[2])
        kinds = element.get("class", "").split()
        if "node" in kinds:
            node = element.findtext(f"{SVG}title", "").rsplit(": ", 1)[0]
            self.own_texts[node] = []
        if element.tag == f"{SVG}rect" and node is not None:
            self.boxes[node] = _rectangle(element, dx, dy)
        elif element.tag == f"{SVG}text":
            text = (element.text or "", _text_rectangle(element, dx, dy))
            self.texts.append(text)
            if node is not None:
                self.own_texts[node].append(text)
        elif "edge" in kinds:
            points = tuple((x + dx, y + dy) for x, y in points_on(element.attrib["d"]))
            self.curves.append(Curve(element.findtext(f"{SVG}title", ""), dict(element.attrib), points))
        for child in element:
            self._read(child, dx, dy, node)

    # -- what must not be ------------------------------------------------------------------------

    def clashes(self) -> list[str]:
        """Everything that overlaps something it should not, in words; empty for a good picture."""
        return [*self._boxes_that_meet(), *self._texts_in_the_way(), *self._curves_in_the_way()]

    def _boxes_that_meet(self) -> Iterator[str]:
        for (one, first), (other, second) in combinations(self.boxes.items(), 2):
            if first.meets(second, space=4.0):
                yield f"boxes {one} and {other}"

    def _texts_in_the_way(self) -> Iterator[str]:
        for words, place in self.texts:
            if not self.page.holds_all(place):
                yield f"text {words!r} leaves the page"
        for (one, first), (other, second) in combinations(self.texts, 2):
            if first.meets(second):
                yield f"texts {one!r} and {other!r}"
        for node, box in self.boxes.items():
            for words, place in self.own_texts[node]:
                if not box.holds_all(place):
                    yield f"text {words!r} leaves the box of {node}"
            strange = [text for text in self.texts if text not in self.own_texts[node]]
            yield from (
                f"text {words!r} on the box of {node}" for words, place in strange if place.meets(box)
            )

    def _curves_in_the_way(self) -> Iterator[str]:
        inside = {id(text) for texts in self.own_texts.values() for text in texts}
        free_texts = [text for text in self.texts if id(text) not in inside]
        nodes, boxes = list(self.boxes), _as_array(self.boxes.values())
        texts = _as_array(place for _, place in free_texts)
        for curve in self.curves:
            points = np.array(curve.points)
            reached = curve.width / 2  # half of the line's width is beside its middle
            for place in np.flatnonzero(_inside(points, boxes, -reached)).tolist():
                if not _ends_at(curve, nodes[place]):
                    yield f"edge {curve.name} touches the box of {nodes[place]}"
            for place in np.flatnonzero(_inside(points, boxes, 0.2)).tolist():
                yield f"edge {curve.name} enters the box of {nodes[place]}"
            for place in np.flatnonzero(_inside(points, texts, -reached)).tolist():
                yield f"edge {curve.name} crosses the text {free_texts[place][0]!r}"
            if not all(self.page.holds(point) for point in curve.points):
                yield f"edge {curve.name} leaves the page"


def _as_array(rectangles: Iterable[Rectangle]) -> NDArray[np.float64]:
    sides = [(place.left, place.top, place.right, place.bottom) for place in rectangles]
    return np.array(sides, dtype=float).reshape(-1, 4)


def _inside(points: NDArray[np.float64], places: NDArray[np.float64], border: float) -> NDArray[np.bool_]:
    """For each rectangle, whether any point lies inside, more than `border` away from every side."""
    after = (points[:, None] > places[None, :, :2] + border).all(axis=2)
    before = (points[:, None] < places[None, :, 2:] - border).all(axis=2)
    found: NDArray[np.bool_] = (after & before).any(axis=0)
    return found


def _ends_at(curve: Curve, node: str) -> bool:
    sender, _, receiver = curve.name.partition("->")
    return node in (sender, receiver.partition("@")[0].partition("<")[0])


def points_on(path: str) -> Iterator[Point]:
    """Points along a path of M, V and C commands."""
    here = (0.0, 0.0)
    for command, words in re.findall(r"([A-Za-z])([^A-Za-z]*)", path):
        numbers = [float(word) for word in words.split()]
        if command == "M":
            here = (numbers[0], numbers[1])
            yield here
        elif command in "VC":
            x, y = here
            if command == "V":
                numbers = [x, y, x, numbers[0], x, numbers[0]]
            x1, y1, x2, y2, x3, y3 = numbers
            for step in range(1, SAMPLES + 1):
                t = step / SAMPLES
                a, b, c, d = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3
                yield a * x + b * x1 + c * x2 + d * x3, a * y + b * y1 + c * y2 + d * y3
            here = (x3, y3)
        else:
            raise AssertionError(f"an edge has no {command!r} command")


def true_width(text: str, size: float) -> float:
    """How wide a common font makes a text; measured large, as small sizes are rounded to pixels."""
    return ImageFont.load_default(200).getlength(text) * size / 200


def _rectangle(element: ET.Element, dx: float, dy: float) -> Rectangle:
    left, top = float(element.attrib["x"]) + dx, float(element.attrib["y"]) + dy
    return Rectangle(left, top, left + float(element.attrib["width"]), top + float(element.attrib["height"]))


def _text_rectangle(element: ET.Element, dx: float, dy: float) -> Rectangle:
    size = float(element.attrib["font-size"])
    bold = 1.08 if element.get("font-weight", "400") != "400" else 1.0
    width = bold * true_width(element.text or "", size)
    x, y = float(element.attrib["x"]) + dx, float(element.attrib["y"]) + dy
    left = x - width / 2 if element.get("text-anchor") == "middle" else x
    return Rectangle(left, y - 0.74 * size, left + width, y + 0.22 * size)

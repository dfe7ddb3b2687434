"""Our SVG pictures as PNG and PDF, painted by matplotlib: no other program and no system library is needed.

Only the little of SVG that our own writer uses is understood: groups that move, rectangles, circles, paths,
texts and images. So every picture looks the same in all three formats, and text in a PDF stays text.
"""

from __future__ import annotations

import base64
import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from circuitvit.errors import FileError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SVG = "{http://www.w3.org/2000/svg}"
DPI = 192  # of a PNG: two dots for each pixel of the SVG
MAX_PIXELS = 16_000  # on the longer side of a PNG
POINTS = 0.75  # to a pixel
FONT = "DejaVu Sans"  # the one that matplotlib brings, so that a figure is the same on every machine
_INHERITED = ("fill", "stroke", "stroke-width", "stroke-opacity", "stroke-dasharray", "font-size")
_COMMANDS = re.compile(r"([MLHVCZh])([^MLHVCZh]*)")

Look = Mapping[str, str]


def painted(svg: str, kind: str, title: str = "") -> bytes:
    """A picture of `svg_of` as the bytes of a file; the same picture gives the same bytes.

    Args:
        svg: the text of the picture.
        kind: "png" or "pdf".
        title: that a PDF says of itself.

    Raises:
        FileError: if matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FileError(
            f"drawing a .{kind} file needs matplotlib, which is not installed: "
            "pip install 'circuitvit[plots]', or draw a .svg file, which needs nothing"
        ) from error
    root = ET.fromstring(svg)  # our own text, no file from elsewhere
    width, height = float(root.get("width", "1")), float(root.get("height", "1"))
    settings: Any = {"pdf.fonttype": 42, "lines.scale_dashes": False, "font.family": FONT}
    # A font that lacks a letter of a name is no reason for a warning to the user.
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure = Figure(figsize=(width / 96, height / 96))
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0), frame_on=False)
        axes.set_axis_off()
        _Painter(axes, width, height).paint(root)
        file = io.BytesIO()
        about: dict[str, Any] = (
            {"Title": title, "CreationDate": None} if kind == "pdf" else {"Software": None}
        )
        dpi = min(DPI, MAX_PIXELS / max(width, height) * 96)
        figure.savefig(file, format=kind, dpi=dpi, metadata=about)
    return file.getvalue()


class _Painter:
    """Walks through the elements of a picture, in drawing order, and adds each to the axes."""

    def __init__(self, axes: Axes, width: float, height: float) -> None:
        self.axes, self.width, self.height = axes, width, height
        self.order = 0
        self.tools: Mapping[str, Callable[[ET.Element, Look, float, float], None]] = {
            "rect": self._rect,
            "circle": self._circle,
            "path": self._path,
            "text": self._text,
            "image": self._image,
        }

    def paint(self, root: ET.Element, look: Look | None = None, x: float = 0.0, y: float = 0.0) -> None:
        for element in root:
            tag = element.tag.removeprefix(SVG)
            own = {key: element.get(key, "") for key in _INHERITED if element.get(key) is not None}
            merged = {**(look or {}), **own}
            if tag == "g":
                dx, dy = _shift(element)
                self.paint(element, merged, x + dx, y + dy)
            elif tag in self.tools:
                self.order += 1
                self.tools[tag](element, merged, x, y)

    def _rect(self, element: ET.Element, look: Look, x: float, y: float) -> None:
        from matplotlib.patches import FancyBboxPatch, Rectangle

        left, top = x + _number(element, "x"), y + _number(element, "y")
        width, height = (
            self._length(element, "width", self.width),
            self._length(element, "height", self.height),
        )
        radius = _number(element, "rx")
        style = self._style(look)
        if radius:
            rounded = f"round,pad=0,rounding_size={radius}"
            self.axes.add_patch(FancyBboxPatch((left, top), width, height, boxstyle=rounded, **style))
        else:
            self.axes.add_patch(Rectangle((left, top), width, height, **style))

    def _circle(self, element: ET.Element, look: Look, x: float, y: float) -> None:
        from matplotlib.patches import Circle

        middle = (x + _number(element, "cx"), y + _number(element, "cy"))
        self.axes.add_patch(Circle(middle, _number(element, "r"), **self._style(look)))

    def _path(self, element: ET.Element, look: Look, x: float, y: float) -> None:
        from matplotlib.patches import PathPatch
        from matplotlib.path import Path

        points, codes = [], []
        for code, (px, py) in _steps(element.get("d", "")):
            points.append((x + px, y + py))
            codes.append(code)
        if points:
            self.axes.add_patch(PathPatch(Path(points, codes), capstyle="butt", **self._style(look)))

    def _text(self, element: ET.Element, look: Look, x: float, y: float) -> None:
        anchor = {"start": "left", "middle": "center", "end": "right"}[element.get("text-anchor", "start")]
        self.axes.text(
            x + _number(element, "x"),
            y + _number(element, "y"),
            element.text or "",
            size=float(look.get("font-size", "10")) * POINTS,
            weight="bold" if int(element.get("font-weight", "400")) >= 600 else "normal",
            color=look.get("fill", "#000"),
            ha=anchor,
            va="baseline",
            zorder=self.order,
            parse_math=False,  # a dollar sign in a name is a dollar sign
        )

    def _image(self, element: ET.Element, look: Look, x: float, y: float) -> None:
        left, top = x + _number(element, "x"), y + _number(element, "y")
        right, bottom = left + _number(element, "width"), top + _number(element, "height")
        _, _, content = element.get("href", "").partition("base64,")
        with Image.open(io.BytesIO(base64.b64decode(content))) as image:
            pixels = np.asarray(image.convert("RGB"))
        limits = self.axes.get_xlim(), self.axes.get_ylim()
        self.axes.imshow(
            pixels,
            extent=(left, right, bottom, top),
            aspect="auto",
            zorder=self.order,
            interpolation="nearest",
        )
        self.axes.set(xlim=limits[0], ylim=limits[1])

    def _style(self, look: Look) -> dict[str, Any]:
        fill, stroke = look.get("fill", "#000"), look.get("stroke", "none")
        style: dict[str, Any] = {"facecolor": fill, "edgecolor": stroke, "zorder": self.order}
        style["linewidth"] = 0.0 if stroke == "none" else float(look.get("stroke-width", "1")) * POINTS
        if stroke != "none" and "stroke-opacity" in look:
            style["alpha"] = float(look["stroke-opacity"])
        if look.get("stroke-dasharray"):
            dashes = [float(length) * POINTS for length in look["stroke-dasharray"].split()]
            style["linestyle"] = (0, tuple(dashes))
        return style

    @staticmethod
    def _length(element: ET.Element, name: str, whole: float) -> float:
        text = element.get(name, "0")
        return whole * float(text[:-1]) / 100 if text.endswith("%") else float(text)


def _shift(element: ET.Element) -> tuple[float, float]:
    found = re.fullmatch(r"translate\((\S+) (\S+)\)", element.get("transform", "translate(0 0)"))
    assert found is not None, "our writer only moves groups"
    return float(found[1]), float(found[2])


def _number(element: ET.Element, name: str) -> float:
    return float(element.get(name, "0"))


def _steps(commands: str) -> Iterator[tuple[int, tuple[float, float]]]:
    """The points of a path with matplotlib's codes: 1 move, 2 line, 4 cubic, 79 close."""
    x = y = 0.0
    for command, text in _COMMANDS.findall(commands):
        numbers = [float(number) for number in text.split()]
        if command == "Z":
            yield 79, (x, y)
        elif command in "HhV":
            x, y = (x, numbers[0]) if command == "V" else (numbers[0] + (x if command == "h" else 0.0), y)
            yield 2, (x, y)
        else:
            for at in range(0, len(numbers), 2):
                x, y = numbers[at], numbers[at + 1]
                yield {"M": 1, "L": 2, "C": 4}[command], (x, y)

"""Figures for print, drawn by matplotlib: PNG and PDF that look like the SVG, and text in a PDF stays text.

The one module of the room that needs matplotlib, which is optional: `drawing` imports it when it is needed.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Sheet
from matplotlib.patches import Circle, FancyBboxPatch, Patch, PathPatch, Polygon, Rectangle
from matplotlib.path import Path

from circuitvit.export.figure import ORIGIN, Figure, Font, Pixels, put_on
from circuitvit.export.layout import Box, Point
from circuitvit.export.style import PAPER, EdgeLook

DPI = 192  # of a PNG: two dots for each pixel of the SVG
MAX_PIXELS = 16_000  # on the longer side of a PNG
POINTS = 0.75  # to a pixel
_SETTINGS: Any = {
    "font.family": "DejaVu Sans",  # the one that matplotlib brings: a figure is the same on every machine
    "lines.scale_dashes": False,
    "pdf.fonttype": 42,  # text as text
    # What a user's own style may not change:
    "text.usetex": False,
    "path.sketch": None,
    "path.effects": [],
    "savefig.bbox": None,
    "savefig.facecolor": "auto",
    "savefig.transparent": False,
}


def printed(figure: Figure, kind: str) -> bytes:
    """A figure as the bytes of a file; the same figure gives the same bytes.

    Args:
        figure: to draw.
        kind: "png" or "pdf".
    """
    # A font that lacks a letter of a name is no reason for a warning to the user.
    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sheet = Sheet(facecolor=PAPER)
        axes = sheet.add_axes((0, 0, 1, 1), frame_on=False)
        axes.set_axis_off()
        axes.set_autoscale_on(False)
        width, height = (round(side, 1) for side in put_on(_Canvas(axes), figure))  # as the SVG says
        axes.set(xlim=(0, width), ylim=(height, 0))
        sheet.set_size_inches(width / 96, height / 96)
        about = {"Title": figure.whole.title, "CreationDate": None} if kind == "pdf" else {"Software": None}
        file = io.BytesIO()
        sheet.savefig(file, format=kind, dpi=min(DPI, MAX_PIXELS / max(width, height) * 96), metadata=about)
    return file.getvalue()


@dataclass(frozen=True)
class _Canvas:
    """Adds artists to axes, whose units are pixels of the SVG; see `figure.Canvas`."""

    axes: Axes
    corner: Point = ORIGIN

    def group(self, at: Point = ORIGIN, said: str = "", kind: str = "", fill: str = "") -> _Canvas:
        return _Canvas(self.axes, self._at(at))

    def rect(self, box: Box, fill: str, stroke: str = "", radius: float = 0.0) -> None:
        corner, size = self._at((box.left, box.top)), (box.width, box.height)
        look: Any = {"fc": fill, "ec": stroke or "none", "linewidth": POINTS if stroke else 0.0}
        if radius:
            rounded = f"round,pad=0,rounding_size={radius}"
            self._add(FancyBboxPatch(corner, *size, boxstyle=rounded, **look))
        else:
            self._add(Rectangle(corner, *size, **look))

    def dot(self, at: Point, radius: float, fill: str, said: str = "") -> None:
        self._add(Circle(self._at(at), radius, facecolor=fill, linewidth=0))

    def stroke(self, points: Sequence[Point], look: EdgeLook, said: str = "") -> None:
        path = Path([self._at(point) for point in points], [Path.MOVETO] + [Path.CURVE4] * (len(points) - 1))
        patch = PathPatch(
            path, facecolor="none", edgecolor=look.colour, linewidth=look.width * POINTS, capstyle="butt"
        )
        patch.set_alpha(look.opacity)
        if look.dash:
            patch.set_linestyle((0, tuple(float(length) * POINTS for length in look.dash.split())))
        self._add(patch)

    def area(self, corners: Sequence[Point], fill: str) -> None:
        self._add(Polygon([self._at(corner) for corner in corners], facecolor=fill, linewidth=0))

    def text(self, at: Point, words: str, font: Font, middle: bool = False) -> None:
        self.axes.text(
            *self._at(at),
            words,
            size=font.size * POINTS,
            weight="bold" if font.weight >= 600 else "normal",
            color=font.colour,
            ha="center" if middle else "left",
            va="baseline",
            zorder=1,
            parse_math=False,  # a dollar sign in a name is a dollar sign
        )

    def image(self, box: Box, pixels: Pixels) -> None:
        (left, top), (right, bottom) = self._at((box.left, box.top)), self._at((box.right, box.bottom))
        place = (left, right, bottom, top)
        self.axes.imshow(pixels, extent=place, aspect="auto", interpolation="nearest", zorder=1)

    def _at(self, point: Point) -> Point:
        return self.corner[0] + point[0], self.corner[1] + point[1]

    def _add(self, patch: Patch) -> None:
        patch.set_zorder(1)  # all alike, so that what is added later is above
        self.axes.add_patch(patch)

"""The pixels of :mod:`circuitvit.datasets.catdog`: faces painted from a table of shapes, many at a time.

Every animal is the same head and eyes plus the features of its species: a row of :data:`EARS` and a
row of :data:`MUZZLES`. Shapes are given in the head's own frame (head radius 1, x to the right, y
down, upright) and mirrored left-right, so the tables read like a drawing guide. To make a new species,
add a row to both tables.

A shape answers one question, "how far is this point from my edge?" (negative inside). One minus
that distance in pixels, clipped to 0..1, is how much of a pixel the shape covers: anti-aliasing at
the cost of one sample per pixel. Only + - * / sqrt, min and max touch the pixels. Those round the same way on
every element whatever the array's length, so an image does not depend on the batch it was drawn in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def _length(x: Floats, y: Floats) -> Floats:
    result: Floats = np.sqrt(x * x + y * y)
    return result


class Shape(Protocol):
    """Anything with an edge that points can be near to."""

    def distance(self, x: Floats, y: Floats) -> Floats:
        """Signed distance (about, in head radii) from points (x, y) to the edge; negative inside."""
        ...


@dataclass(frozen=True)
class Ellipse:
    """An ellipse around (x, y) with half-axes `a` and `b`, turned by `degrees` (clockwise as seen)."""

    x: float
    y: float
    a: float
    b: float
    degrees: float = 0.0

    def distance(self, x: Floats, y: Floats) -> Floats:
        """First-order distance: the implicit function over the length of its gradient."""
        dx, dy = x - np.float32(self.x), y - np.float32(self.y)
        if self.degrees:
            cos, sin = (np.float32(f(np.radians(self.degrees))) for f in (np.cos, np.sin))
            dx, dy = dx * cos + dy * sin, dy * cos - dx * sin
        u, v = dx * np.float32(1 / self.a), dy * np.float32(1 / self.b)
        level = _length(u, v)
        if self.a == self.b:
            return (level - np.float32(1)) * np.float32(self.a)
        # The slope is 0 at the centre only, where the level is too.
        slope = _length(u * np.float32(1 / self.a), v * np.float32(1 / self.b)) + np.float32(1e-6)
        result: Floats = level * (level - np.float32(1)) / slope
        return result - np.float32(1e-6)


@dataclass(frozen=True)
class Triangle:
    """A triangle; the corners go clockwise as seen on the screen."""

    corners: tuple[tuple[float, float], tuple[float, float], tuple[float, float]]

    def distance(self, x: Floats, y: Floats) -> Floats:
        """The largest of the distances to the three sides: exact inside and beside the sides."""
        result: Floats | None = None
        for (ax, ay), (bx, by) in zip(self.corners, self.corners[1:] + self.corners[:1], strict=True):
            length = float(np.hypot(bx - ax, by - ay))
            nx, ny = (by - ay) / length, -(bx - ax) / length
            side = x * np.float32(nx) + y * np.float32(ny) - np.float32(nx * ax + ny * ay)
            result = side if result is None else np.maximum(result, side)
        assert result is not None
        return result


@dataclass(frozen=True)
class Stroke:
    """A line from (x0, y0) to (x1, y1), `width` wide, with round ends."""

    x0: float
    y0: float
    x1: float
    y1: float
    width: float

    def distance(self, x: Floats, y: Floats) -> Floats:
        """Distance to the segment, less half the width."""
        vx, vy = self.x1 - self.x0, self.y1 - self.y0
        square = vx * vx + vy * vy
        dx, dy = x - np.float32(self.x0), y - np.float32(self.y0)
        along = np.clip(dx * np.float32(vx / square) + dy * np.float32(vy / square), 0, 1).astype(np.float32)
        dx, dy = dx - along * np.float32(vx), dy - along * np.float32(vy)
        return _length(dx, dy) - np.float32(self.width / 2)


HEAD: Shape = Ellipse(0.0, 0.0, 1.0, 0.92)
EYES: Mapping[str, tuple[Shape, ...]] = {
    "eye": (Ellipse(0.40, -0.20, 0.20, 0.20),),
    "dark": (Ellipse(0.40, -0.20, 0.10, 0.10),),
}

# The species, layer by layer. "fur" is painted first and merges with the head, then "accent", then
# "dark". Ears stay with the head; muzzles move sideways with the eyes when the animal looks aside.
EARS: Mapping[str, Mapping[str, tuple[Shape, ...]]] = {
    "cat": {
        "fur": (Triangle(((0.12, -0.62), (0.92, -1.50), (1.02, -0.10))),),
        "accent": (Triangle(((0.42, -0.75), (0.82, -1.22), (0.88, -0.50))),),
    },
    "dog": {"fur": (), "accent": (Ellipse(1.03, 0.02, 0.27, 0.72, -14.0),)},
    "rabbit": {
        "fur": (Ellipse(0.46, -1.18, 0.25, 0.78, 10.0),),
        "accent": (Ellipse(0.47, -1.18, 0.11, 0.54, 10.0),),
    },
    "bear": {"fur": (Ellipse(0.76, -0.72, 0.40, 0.40),), "accent": (Ellipse(0.78, -0.74, 0.21, 0.21),)},
}
MUZZLES: Mapping[str, Mapping[str, tuple[Shape, ...]]] = {
    "cat": {
        "accent": (Ellipse(0.19, 0.48, 0.24, 0.20),),
        "dark": (
            Triangle(((-0.16, 0.18), (0.16, 0.18), (0.0, 0.38))),
            Stroke(0.50, 0.40, 1.28, 0.24, 0.07),
            Stroke(0.50, 0.54, 1.26, 0.62, 0.07),
        ),
    },
    "dog": {
        "accent": (Ellipse(0.0, 0.46, 0.44, 0.46),),
        "dark": (Ellipse(0.0, 0.22, 0.25, 0.17), Stroke(0.0, 0.3, 0.0, 0.62, 0.07)),
    },
    "rabbit": {
        "accent": (Ellipse(0.10, 0.62, 0.10, 0.20),),
        "dark": (Ellipse(0.0, 0.24, 0.13, 0.09), Stroke(0.0, 0.38, 0.34, 0.44, 0.07)),
    },
    "bear": {"accent": (Ellipse(0.0, 0.42, 0.50, 0.36),), "dark": (Ellipse(0.0, 0.36, 0.20, 0.14),)},
}


@dataclass(frozen=True)
class FaceFrame:
    """The pixels of n pictures seen from the heads in them.

    Attributes:
        x: (n, H, W) distance from the head's middle line, in head radii, always >= 0.
        face_x: the same from the middle line of eyes and muzzle, which a turned head moves aside.
        y: (n, H, W), downwards.
        pixels: (n, 1, 1) pixels in one head radius.
    """

    x: Floats
    face_x: Floats
    y: Floats
    pixels: Floats

    @classmethod
    def of(
        cls,
        size: int,
        x: Sequence[float],
        y: Sequence[float],
        radius: Sequence[float],
        tilt: Sequence[float],
        turn: Sequence[float],
    ) -> FaceFrame:
        """Frames for n heads; positions and radii are fractions of the picture's side."""
        place = (np.arange(size, dtype=np.float64) + 0.5) / size
        cx, cy, r, angle = (np.asarray(v, dtype=np.float64)[:, None, None] for v in (x, y, radius, tilt))
        cos, sin = np.cos(angle), np.sin(angle)
        dx, dy = (place[None, None, :] - cx) / r, (place[None, :, None] - cy) / r
        local_x = (dx * cos + dy * sin).astype(np.float32)
        local_y = (dy * cos - dx * sin).astype(np.float32)
        shift = np.asarray(turn, dtype=np.float32)[:, None, None]
        return cls(np.abs(local_x), np.abs(local_x - shift), local_y, (r * size).astype(np.float32))


def cover(shapes: Sequence[Shape], x: Floats, frame: FaceFrame) -> Floats | None:
    """How much of each pixel the union of `shapes` covers: (n, H, W) in 0..1, None without shapes."""
    distance: Floats | None = None
    for shape in shapes:
        one = shape.distance(x, frame.y)
        distance = one if distance is None else np.minimum(distance, one)
    if distance is None:
        return None
    covered: Floats = np.clip(np.float32(0.5) - distance * frame.pixels, 0, 1)
    return covered


def species_layers(species: str, frame: FaceFrame) -> dict[str, list[Floats]]:
    """Coverages of the features of `species` alone (no head, no eyes), by paint."""
    layers: dict[str, list[Floats]] = {}
    for table, x in ((EARS, frame.x), (MUZZLES, frame.face_x)):
        for paint_name, shapes in table[species].items():
            covered = cover(shapes, x, frame)
            if covered is not None:
                layers.setdefault(paint_name, []).append(covered)
    return layers


def animal_layers(species: str, frame: FaceFrame) -> dict[str, Floats]:
    """Coverage (n, H, W) of each paint of whole animals, in the order of painting."""
    layers = species_layers(species, frame)
    for paint_name, shapes in EYES.items():
        covered = cover(shapes, frame.face_x, frame)
        if covered is not None:
            layers.setdefault(paint_name, []).append(covered)
    head = cover((HEAD,), frame.x, frame)
    assert head is not None
    layers.setdefault("fur", []).append(head)
    merged: dict[str, Floats] = {}
    for paint_name in ("fur", "accent", "eye", "dark"):
        first, *rest = layers[paint_name]
        for other in rest:
            first = np.maximum(first, other)
        merged[paint_name] = first
    return merged


def paint(canvas: Floats, layers: Mapping[str, Floats], colours: Mapping[str, Floats]) -> Floats:
    """Paints layer after layer over `canvas` (n, 3, H, W); `colours` are (n, 3). Returns the picture.

    A pixel that a layer does not cover comes out with the very same bits: c + 0 * (colour - c).
    """
    for paint_name, covered in layers.items():
        colour = colours[paint_name][:, :, None, None]
        canvas = canvas + covered[:, None] * (colour - canvas)
    return canvas


TEXTURES: tuple[str, ...] = ("plain", "gradient", "stripes", "checks")
"""How the two background colours are mixed."""


def backgrounds(
    size: int,
    first: Floats,
    second: Floats,
    *,
    texture: Sequence[str],
    angle: Sequence[float],
    period: Sequence[float],
    phase: Sequence[float],
) -> Floats:
    """n pictures without animals, (n, 3, size, size).

    Args:
        size: side in pixels.
        first: (n, 3) colours.
        second: (n, 3) colours, mixed in by the texture.
        texture: one of :data:`TEXTURES` for each picture.
        angle: direction across the stripes, in radians.
        period: of stripes and checks, as a fraction of the side.
        phase: of stripes and checks, 0..1.
    """
    place = (np.arange(size, dtype=np.float64) + 0.5) / size - 0.5
    turned, width, start = (np.asarray(v, dtype=np.float64)[:, None, None] for v in (angle, period, phase))
    across = np.cos(turned) * place[None, None, :] + np.sin(turned) * place[None, :, None]
    along = np.cos(turned) * place[None, :, None] - np.sin(turned) * place[None, None, :]
    gradient = np.clip(0.5 + 0.7 * across, 0, 1)
    stripes, bands = (_wave(way / width + start, width * size) for way in (across, along))
    checks = stripes + bands - 2 * stripes * bands
    kinds = np.array([TEXTURES.index(name) for name in texture])[:, None, None]
    mix = np.choose(kinds, [np.zeros_like(gradient), gradient, stripes, checks]).astype(np.float32)
    return first[:, :, None, None] + mix[:, None] * (second - first)[:, :, None, None]


def _wave(turns: NDArray[np.float64], pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    """A square wave of period 1 between 0 and 1, its edges a pixel soft (`pixels` to a period)."""
    triangle = np.abs(2 * (turns - np.floor(turns)) - 1)
    return np.clip((triangle - 0.5) * pixels / 2 + 0.5, 0, 1)

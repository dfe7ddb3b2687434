"""The figure of what crosses: a lane for each group of tokens, through the layers, and ribbons between lanes.

Everything has one scale. A lane is as wide as the effect that its group holds at a cut, a ribbon as what the
heads of a layer carry from one group to another. What opposes the behaviour is hatched.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from numpy.typing import NDArray
from PIL import Image

from circuitvit.errors import OptionError, check_number, check_whole
from circuitvit.export.style import FAINT, INK, MUTED
from circuitvit.graph.files import write_bytes
from circuitvit.views import canvas

MOST = len(canvas.PALETTE)
"""Groups that colours tell apart."""

LEAST = 0.015
"""Of the largest width: what is narrower is not drawn."""

WIDEST = 0.62
"""Of the distance between lanes."""

EVEN = np.linspace(0.0, 1.0, 33)
SMOOTH = EVEN**2 * (3 - 2 * EVEN)


@dataclass(frozen=True, eq=False)
class Lanes:
    """What is drawn.

    Attributes:
        title: above all.
        note: below it.
        groups: names of the lanes.
        cuts: names of the places at which lanes are looked at.
        held: how wide each lane is there; negative where it opposes.
        crossing: what goes from lane to lane between two cuts, `(layer, source, target)`.
        shares: what to write beside each lane at a cut.
    """

    title: str
    note: str
    groups: Sequence[str]
    cuts: Sequence[str]
    held: Float[NDArray[np.float64], "cut group"]
    crossing: Float[NDArray[np.float64], "layer group group"]
    shares: Sequence[Sequence[str]]


def draw(flow: Lanes, upto: int) -> canvas.Picture:
    """The figure, with the first layers alone.

    Raises:
        OptionError: if there are more lanes than can be told apart, or no such layer.
    """
    check_whole("the number of layers (upto)", upto, 0)
    if upto > len(flow.crossing):
        raise OptionError(f"the first {upto} of {len(flow.crossing)} layers do not exist")
    if len(flow.groups) > MOST:
        raise OptionError(
            f"colours tell {MOST} groups apart, not {len(flow.groups)}: join some, or take the data"
        )
    held, crossing = flow.held, flow.crossing
    off = np.abs(crossing) * (1 - np.eye(len(flow.groups)))
    unit = WIDEST / (max(float(np.abs(held).max()), float(off.max())) or 1.0)
    with canvas.styled():
        figure = canvas.blank(2.3 + 0.72 * len(crossing), 1.2 + 1.0 * len(flow.groups), flow.title)
        axes = figure.subplots()
        for group in range(len(flow.groups)):
            _lane(axes, group, held[: upto + 1, group] * unit)
        for layer in range(upto):
            _ribbons(axes, layer, held[layer : layer + 2] * unit, crossing[layer] * unit)
        _words(axes, flow, upto)
    return figure


def _lane(axes: Axes, group: int, widths: NDArray[np.float64]) -> None:
    """A group's band from cut to cut, and how much it holds at each."""
    colour = canvas.PALETTE[group]
    for cut, (left, right) in enumerate(pairwise(widths)):
        half = np.abs(left + (right - left) * SMOOTH) / 2
        axes.fill_between(cut + EVEN, -group - half, -group + half, color=colour, alpha=0.16, linewidth=0)
    for cut, width in enumerate(widths):
        look: dict[str, Any] = {"facecolor": colour} if width >= 0 else _against(colour)
        axes.bar(cut, abs(width), 0.07, bottom=-group - abs(width) / 2, zorder=3, **look)


def _ribbons(axes: Axes, layer: int, held: NDArray[np.float64], widths: NDArray[np.float64]) -> None:
    """What one layer carries between groups, the widest first; they leave a lane on the side they go to."""
    off = np.abs(widths) * (1 - np.eye(len(widths)))
    for place in np.argsort(-off, axis=None, kind="stable"):
        source, target = np.unravel_index(place, off.shape)
        width = off[source, target]
        if width < LEAST * WIDEST:
            return
        side = 1 if target < source else -1
        start, end = (
            -lane + sign * side * max(0.0, (abs(held[cut, lane]) - width) / 2)
            for cut, lane, sign in ((0, source, 1), (1, target, -1))
        )
        centre = start + (end - start) * SMOOTH
        colour = canvas.PALETTE[source]
        supports = widths[source, target] > 0
        look = {"facecolor": colour, "alpha": 0.62, "linewidth": 0.0} if supports else _against(colour)
        x = layer + 0.04 + 0.92 * EVEN
        axes.fill_between(x, centre - width / 2, centre + width / 2, zorder=2, **look)


def _against(colour: str) -> dict[str, Any]:
    """How what opposes the behaviour looks."""
    return {"facecolor": "white", "edgecolor": colour, "hatch": "//////", "linewidth": 0.4}


def _words(axes: Axes, flow: Lanes, upto: int) -> None:
    cuts = flow.cuts
    axes.set_xlim(-0.2, len(cuts) - 0.38)
    axes.set_ylim(-len(flow.groups) + 0.4, 0.6)
    axes.set_xticks(range(len(cuts)), cuts)
    axes.set_xlabel("before the attention of layer")
    axes.set_yticks([-group for group in range(len(flow.groups))], [*flow.groups])
    axes.tick_params(length=0)
    for label, colour in zip(axes.get_yticklabels(), canvas.PALETTE, strict=False):
        label.set(color=colour, fontweight="bold", fontsize=9)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for cut in range(len(cuts)):
        axes.axvline(cut, color=FAINT, linewidth=0.4, zorder=0)
    for group, share in enumerate(flow.shares[upto]):
        axes.text(upto + 0.09, -group, share, va="center", fontsize=7, color=INK, zorder=4)
    axes.set_title(flow.note, fontsize=7, color=MUTED, loc="left")


def film(flow: Lanes, path: Path, seconds: float) -> Path:
    """The figure as an animation, layer by layer."""
    check_number("the time for a layer, in seconds,", seconds)
    if path.suffix.lower() != ".gif":
        raise OptionError(f"an animation is saved as .gif, not as {path.name!r}")
    frames = []
    for upto in range(len(flow.cuts)):
        frames.append(Image.open(io.BytesIO(draw(flow, upto)._repr_png_())).convert("RGB"))
    colours = frames[-1].quantize(128)
    shown = [frame.quantize(palette=colours, dither=Image.Dither.NONE) for frame in frames]
    times = [math.ceil(1000 * seconds)] * (len(shown) - 1) + [math.ceil(4000 * seconds)]
    file = io.BytesIO()
    shown[0].save(file, "GIF", save_all=True, append_images=shown[1:], duration=times, loop=0)
    return write_bytes(path, file.getvalue())

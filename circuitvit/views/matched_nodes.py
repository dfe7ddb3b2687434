"""The figure of a match: how alike every node is to every other, layers as bands, partners framed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from circuitvit.export.style import COLOURS, FAINT, INK, MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from circuitvit.views.canvas import Picture

ALPHA = 0.05
"""Up to this p-value a partner is said to be more alike than by chance."""

CELL = 0.16
SMALLEST, LARGEST = 1.5, 7.0
"""Inches of a node, and of a side of a map."""

NAMED = 40
"""Nodes on a side up to which each has its name; of more the layers are named."""


class Nodes(NamedTuple):
    """Nodes on one side of a map: their names, and the number of each one's layer."""

    names: Sequence[str]
    layers: Sequence[int]


class Map(NamedTuple):
    """Nodes of one kind: what they are, both sides, `(node, other)`, and of each node the partner, or -1."""

    kind: str
    down: Nodes
    across: Nodes
    similarity: NDArray[np.float64]
    partner: NDArray[np.int64]
    p: NDArray[np.float64]


def match_figure(maps: Sequence[Map], models: tuple[str, str], title: str | None = None) -> Picture:
    """One map for each kind of node: those of the first model down, those of the second across."""
    from circuitvit.views import canvas

    widths = [_inches(len(each.across.names)) for each in maps]
    highest = max(_inches(len(each.down.names)) for each in maps)
    names = [canvas.label(name, 40) for name in models]
    with canvas.styled():
        title = title or f"{names[0]} and {names[1]}, by what their nodes write"
        figure = canvas.blank(sum(widths) + 1.1 * len(maps) + 0.6, highest + 1.3, title)
        panels = figure.subplots(1, len(maps), squeeze=False, width_ratios=widths)[0]
        for axes, each in zip(panels, maps, strict=True):
            drawn = axes.imshow(each.similarity, cmap=canvas.rising_colours(), vmin=0.0, vmax=1.0)
            axes.set_title(each.kind)
            _bands(axes, each.down, "y")
            _bands(axes, each.across, "x")
            axes.set(xlabel=names[1], ylabel=names[0])
            for row, (column, p) in enumerate(zip(each.partner.tolist(), each.p.tolist(), strict=True)):
                if column >= 0:
                    _frame(axes, row, column, p)
        bar = figure.colorbar(drawn, ax=list(panels), shrink=0.7, pad=0.02)
        bar.set_label("similarity (debiased linear CKA)")
        bar.outline.set_visible(False)
        said = "framed: partners"
        if any(np.isfinite(each.p).any() for each in maps):
            said += f"; bold: beyond chance, p <= {ALPHA:g}; dashed: not shown to be"
        figure.supxlabel(said, fontsize=7, color=MUTED)
    return figure


def _frame(axes: Axes, row: int, column: int, p: float) -> None:
    """Partners; NaN for a p-value is drawn plain."""
    left, top = column - 0.5, row - 0.5
    axes.plot(
        [left, left + 1, left + 1, left, left], [top, top, top + 1, top + 1, top],
        color=COLOURS["opposes"], linewidth=1.6 if p <= ALPHA else 0.8,
        linestyle=(0, (2, 1.2)) if p > ALPHA else "-", clip_on=False,
    )  # fmt: skip


def _inches(count: int) -> float:
    return min(max(count * CELL, SMALLEST), LARGEST)


def _bands(axes: Axes, nodes: Nodes, side: str) -> None:
    """Lines between the layers, and the names of nodes, or of layers where there are many."""
    names, layers = nodes
    starts = [at for at, layer in enumerate(layers) if not at or layer != layers[at - 1]]
    line = axes.axhline if side == "y" else axes.axvline
    for start in starts[1:] if len(starts) < len(names) else ():
        line(start - 0.5, color=FAINT, linewidth=0.7)
    at: list[float] = list(range(len(names)))
    if len(names) > NAMED:
        ends = [*starts[1:], len(names)]
        at = [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)]
        names = [f"layer {layers[start]}" for start in starts]
    if side == "y":
        axes.set_yticks(at, names, fontsize=6)
    else:
        axes.set_xticks(at, names, fontsize=6, rotation=90)
    axes.tick_params(length=0, colors=INK)

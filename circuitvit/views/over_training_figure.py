"""The figure of a training: behaviour and circuit above, the edges that matter most below.

Checkpoints stand at equal distances, whatever steps lie between them, so that each can be seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from circuitvit.export.style import COLOURS, FAINT, INK, MUTED
from circuitvit.verification.statistics import Estimate
from circuitvit.views.canvas import PALETTE, Picture, blank, label, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from circuitvit.views.over_training import Across

BACKGROUND = 60
"""Edges that are drawn in grey behind those with names."""

TICKS = 12
"""Steps that are written out, at most."""

LOOKS = (*PALETTE[:6], "#7A5195", INK)
"""Colours of edges with names."""

MARKS = "osD^vPX*"

SHARP: Any = {"linewidth": 5.0, "solid_capstyle": "round", "alpha": 0.35}
"""How the piece of a line looks in which a sharp change lies."""


def lines_figure(found: Across, edges: int) -> Picture:
    """Behaviour, faithfulness and edges by step."""
    with styled():
        figure = blank(7.2, 5.0, f"A circuit over training: {found.provenance.task}")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
        _draw_whole(above, found)
        _draw_edges(below, found, found.strongest(edges))
        places = np.arange(len(found.steps))
        shown = places[::-1][:: -(-len(places) // TICKS)]
        below.set_xticks(places, minor=True)
        below.set_xticks(shown, [f"{found.steps[at]:,}" for at in shown])
        below.set_xlim(-0.3, len(places) - 0.7)
        below.set_xlabel("step of the training")
    return figure


def _draw_whole(axes: Axes, found: Across) -> None:
    """The behaviour, the faithfulness of the circuit, and when it formed."""
    _draw_formed(axes, found)
    axes.axhline(1, color=MUTED, linewidth=0.6, linestyle=(0, (4, 3)))
    behaviour = [each.value for each in found.behaviour]
    for figures, colour, name in (
        (found.behaviour, INK, "behaviour"),
        (found.faithfulness, COLOURS["supports"], "faithfulness of the circuit"),
    ):
        _draw_band(axes, figures, colour)
        values = [np.nan if each is None else each.value for each in figures]
        axes.plot(values, "-o", color=colour, markersize=2.6, linewidth=1.3, label=name)
    for each in found.leaps():
        _draw_sharp(axes, found, behaviour, str(each["after"]), INK)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -1.0), min(high, 2.5))
    axes.set_ylabel("share of the last behaviour")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.6), fontsize=7)


def _draw_formed(axes: Axes, found: Across) -> None:
    """Where the circuit forms: shaded where that is open, a line where it is likeliest."""
    at, after, by = found.formed
    if at is None:
        return
    first = 0 if after is None else found.steps.index(after)
    last = len(found.steps) - 1 if by is None else found.steps.index(by)
    axes.axvspan(first, last, color=COLOURS["opposes"], alpha=0.1, linewidth=0)
    axes.axvline(found.steps.index(at), color=COLOURS["opposes"], linewidth=1.0)
    axes.text(
        found.steps.index(at), 1.02, f"formed by step {at:,}", transform=axes.get_xaxis_transform(),
        color=COLOURS["opposes"], fontsize=7, va="bottom", ha="center", clip_on=False,
    )  # fmt: skip


def _draw_band(axes: Axes, figures: Sequence[Estimate | None], colour: str) -> None:
    ends = [(np.nan, np.nan) if each is None else (each.low, each.high) for each in figures]
    low, high = np.array(ends, dtype=np.float64).T
    axes.fill_between(np.arange(len(ends)), low, high, color=colour, alpha=0.15, linewidth=0)


def _draw_edges(axes: Axes, found: Across, named: Sequence[str]) -> None:
    """All edges in grey, those with names in colour, their sharp changes thick."""
    peaks = np.abs(found.effects).max(axis=0, initial=0.0)
    behind = np.argsort(-peaks, kind="stable")[:BACKGROUND]
    if len(behind):
        axes.plot(found.effects[:, behind], color=FAINT, linewidth=0.5, zorder=1)
    jumps = found.jumps()
    for place, name in enumerate(named):
        at, colour = found.edges.index(name), LOOKS[place % len(LOOKS)]
        values, width = found.effects[:, at], found.widths[:, at]
        axes.fill_between(
            np.arange(len(values)), values - width, values + width, color=colour, alpha=0.1, linewidth=0
        )
        mark = MARKS[place % len(MARKS)]
        axes.plot(values, "-", marker=mark, markersize=3.0, color=colour, linewidth=1.0, zorder=2)
        for each in jumps:
            if each["edge"] == name:
                _draw_sharp(axes, found, values, str(each["after"]), colour)
    ends = np.array([found.effects[-1, found.edges.index(name)] for name in named])
    low, high = axes.get_ylim()
    for place, (name, y) in enumerate(zip(named, _apart(ends, 0.065 * (high - low)), strict=True)):
        axes.text(
            1.015, y, label(name), color=LOOKS[place % len(LOOKS)], fontsize=7, va="center",
            transform=axes.get_yaxis_transform(), clip_on=False,
        )  # fmt: skip
    axes.set_ylabel("effect of an edge, as a share of it")
    grey = (
        f"; grey: the {len(behind)} strongest of {len(found.edges):,} edges"
        if len(found.edges) > len(named)
        else ""
    )
    said = f"thick: a sharp change; bands: 95 % of one edge{grey}"
    axes.set_title(said, loc="left", color=MUTED, fontsize=7)


def _draw_sharp(
    axes: Axes, found: Across, values: Sequence[float] | NDArray[np.float64], after: str, colour: str
) -> None:
    """The piece of a line between two checkpoints, thick."""
    gap = found.steps.index(int(after))
    axes.plot((gap, gap + 1), values[gap : gap + 2], color=colour, zorder=3, **SHARP)


def _apart(
    wanted: Float[NDArray[np.float64], " label"], least: float
) -> Float[NDArray[np.float64], " label"]:
    """Heights for labels near the wanted ones, none closer to another than `least`.

    Example:
        >>> _apart(np.array([0.0, 0.5, 0.1]), 0.2).round(2).tolist()
        [-0.05, 0.5, 0.15]
    """
    found, order = wanted.astype(np.float64), np.argsort(wanted, kind="stable")
    groups: list[list[int]] = []
    for at in order.tolist():
        groups.append([at])
        while (
            len(groups) > 1
            and _middle(found, groups[-1]) - _middle(found, groups[-2])
            < least * (len(groups[-1]) + len(groups[-2])) / 2
        ):
            last = groups.pop()
            groups[-1] += last
    placed = np.empty_like(found)
    for group in groups:
        shifts = (np.arange(len(group)) - (len(group) - 1) / 2) * least
        placed[group] = _middle(found, group) + shifts
    return placed


def _middle(values: NDArray[np.float64], group: Sequence[int]) -> float:
    return float(values[list(group)].mean())

"""Figures of what is certain of circuits: votes and what they certify, whose behaviour a circuit hurts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from circuitvit.export.style import FAINT, INK, MUTED
from circuitvit.verification.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from circuitvit.views.canvas import Picture

DARK = 0.55
"""Where a cell is darker than this, it is written on in white."""


def votes_figure(
    title: str, shares: NDArray[np.float64], signs: NDArray[np.int64], counts: Sequence[int]
) -> Picture:
    """Left the votes for edges, by what was decided; right how many stay as pairs are deleted.

    Args:
        title: of the figure.
        shares: of the subsets on which each edge was found, `(edge,)`.
        signs: 1 for in, -1 for out, 0 where it is abstained from, `(edge,)`.
        counts: how many edges stay whichever 0, 1, 2, ... pairs are deleted.
    """
    from circuitvit.views import canvas

    order = np.argsort(-shares, kind="stable")
    shares, signs = shares[order], signs[order]
    with canvas.styled():
        figure = canvas.blank(6.4, 2.8, title)
        votes, sizes = figure.subplots(1, 2)
        kinds = ((1, "in", canvas.PALETTE[0]), (0, "abstained from", MUTED), (-1, "out", canvas.PALETTE[1]))
        for sign, name, colour in kinds:
            at = np.flatnonzero(signs == sign)
            votes.plot(at + 1, shares[at], ".", color=colour, markersize=4, label=f"{name}: {len(at):,}")
        votes.axhline(0.5, color=MUTED, linewidth=0.6, zorder=0)
        votes.set(xlabel="edges that were ever found", ylabel="share of the subsets", ylim=(-0.03, 1.03))
        votes.legend(frameon=False, fontsize=7)
        sizes.bar(range(len(counts)), counts, color=canvas.PALETTE[0], width=0.8)
        for radius, count in enumerate(counts):
            sizes.text(radius, count, f"{count:,}", ha="center", va="bottom", fontsize=7, color=INK)
        sizes.set_xticks(range(len(counts)))
        sizes.set(xlabel="pairs deleted, whichever they are", ylabel="edges that stay in the circuit")
    return figure


def lost_figure(names: Sequence[str], lost: Sequence[Estimate], verdicts: Sequence[str]) -> Picture:
    """A matrix: the share of each behaviour (across) that is lost without each circuit (down).

    Args:
        names: of the behaviours and their circuits.
        lost: the shares, circuit by circuit, behaviour by behaviour.
        verdicts: what is said of each circuit, on the right.
    """
    from circuitvit.views import canvas

    names = [canvas.label(name, 24) for name in names]
    size = len(names)
    table = np.array([each.value for each in lost]).reshape(size, size)
    with canvas.styled():
        figure = canvas.blank(2.4 + 1.15 * size, 1.5 + 0.62 * size, "Share of each behaviour that is lost")
        axes = figure.subplots()
        axes.imshow(table, cmap=canvas.rising_colours(), vmin=0.0, vmax=1.0, aspect="auto")
        for place, each in enumerate(lost):
            row, column = divmod(place, size)
            colour = "white" if each.value > DARK else INK
            bounds = "" if each.low is None or each.high is None else f"\n{each.low:.0%} to {each.high:.0%}"
            axes.text(column, row, f"{each.value:.0%}{bounds}", ha="center", va="center",
                      color=colour, fontsize=7, fontweight="bold" if row == column else "normal")  # fmt: skip
        axes.set_xticks(range(size), names)
        axes.set_yticks(range(size), [f"without that of\n{name}" for name in names])
        axes.xaxis.tick_top()
        axes.tick_params(length=0, colors=INK)
        for edge in range(1, size):
            axes.axvline(edge - 0.5, color=FAINT, linewidth=0.6)
            axes.axhline(edge - 0.5, color=FAINT, linewidth=0.6)
        right = axes.secondary_yaxis("right")
        right.set_yticks(range(size), list(verdicts))
        right.tick_params(length=0, colors=INK, labelsize=7)
        for spine in (*axes.spines.values(), *right.spines.values()):
            spine.set_visible(False)
    return figure


Accuracies = Sequence[tuple[str, Estimate, Estimate | None]]


def groups_figure(title: str, rows: Accuracies, groups: int) -> Picture:
    """Accuracy on each group of images before and after, with intervals, from the worst before to the best.

    Args:
        title: of the figure.
        rows: name, accuracy before, and after where something was ablated.
        groups: how many of the first rows are groups; those after them are other images, below a line.
    """
    from circuitvit.views import canvas

    ordered = [*sorted(rows[:groups], key=lambda each: each[1].value), *rows[groups:]]
    with canvas.styled():
        figure = canvas.blank(6.0, 1.3 + 0.34 * len(ordered), title)
        axes = figure.subplots()
        for at, (_, before, after) in enumerate(ordered):
            _accuracy(axes, at - 0.12, before, "D", canvas.PALETTE[1], "the model as it is")
            if after is not None:
                axes.plot([before.value, after.value], [at, at], "-", color=FAINT, linewidth=1.2, zorder=1)
                _accuracy(axes, at + 0.12, after, "o", canvas.PALETTE[0], "without the cue's own edges")
        if groups < len(ordered):
            axes.axhline(groups - 0.5, color=MUTED, linewidth=0.6)
        axes.set_yticks(range(len(ordered)), [canvas.label(name, 36) for name, *_ in ordered])
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0, colors=INK)
        axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axes.set(xlim=(-0.03, 1.03), xlabel="right answers")
        handles, names = axes.get_legend_handles_labels()
        told = dict(zip(names, handles, strict=True))
        figure.legend(
            told.values(), told.keys(), frameon=False, fontsize=7, ncols=2, loc="outside lower center"
        )
    return figure


def _accuracy(axes: Axes, at: float, found: Estimate, sign: str, colour: str, name: str) -> None:
    """A point with its interval."""
    if found.low is not None and found.high is not None:
        axes.plot([found.low, found.high], [at, at], "-", color=colour, linewidth=3, alpha=0.35)
    axes.plot(found.value, at, sign, color=colour, markersize=4, label=name)

"""Figures of what is certain of circuits: votes and what they certify, whose behaviour a circuit hurts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from circuitvit.export.style import FAINT, INK, MUTED
from circuitvit.verification.certificates import Certificate
from circuitvit.verification.cross_effects import SMALL, Specificity

if TYPE_CHECKING:
    from circuitvit.views.canvas import Picture

DARK = 0.55
"""Where a cell is darker than this, it is written on in white."""


def certificate_figure(found: Certificate) -> Picture:
    """Left the votes of all edges that were ever found, by what was decided; right how many edges stay in
    the circuit whichever so many pairs are deleted."""
    from circuitvit.views import canvas

    place = np.argwhere(found.votes > 0)
    order = np.argsort(-found.share[tuple(place.T)], kind="stable")
    shares = found.share[tuple(place[order].T)]
    signs = found.decisions.sign[tuple(place[order].T)]
    with canvas.styled():
        figure = canvas.blank(6.4, 2.8, f"{found.drawn}, {found.method}")
        votes, sizes = figure.subplots(1, 2)
        kinds = ((1, "in", canvas.PALETTE[0]), (0, "abstained from", MUTED), (-1, "out", canvas.PALETTE[1]))
        for sign, name, colour in kinds:
            at = np.flatnonzero(signs == sign)
            votes.plot(at + 1, shares[at], ".", color=colour, markersize=4, label=f"{name}: {len(at):,}")
        votes.axhline(0.5, color=MUTED, linewidth=0.6, zorder=0)
        votes.set(xlabel="edges that were ever found", ylabel="share of the subsets", ylim=(-0.03, 1.03))
        votes.legend(frameon=False, fontsize=7)
        counts = found.sizes()
        sizes.bar(range(len(counts)), counts, color=canvas.PALETTE[0], width=0.8)
        for radius, count in enumerate(counts):
            sizes.text(radius, count, f"{count:,}", ha="center", va="bottom", fontsize=7, color=INK)
        sizes.set_xticks(range(len(counts)))
        sizes.set(xlabel="pairs deleted, whichever they are", ylabel="edges that stay in the circuit")
    return figure


def specificity_figure(found: Specificity) -> Picture:
    """A matrix: the share of each behaviour (across) that is lost without each circuit (down), with its
    interval, and the p-value of each circuit."""
    from circuitvit.views import canvas

    names = [canvas.label(name, 24) for name in found.names]
    size = len(names)
    table = np.array([each.necessity.value for each in found.effects]).reshape(size, size)
    with canvas.styled():
        figure = canvas.blank(2.4 + 1.15 * size, 1.5 + 0.62 * size, "Share of each behaviour that is lost")
        axes = figure.subplots()
        axes.imshow(table, cmap=canvas.rising_colours(), vmin=0.0, vmax=1.0, aspect="auto")
        for place, each in enumerate(found.effects):
            row, column = divmod(place, size)
            colour = "white" if each.necessity.value > DARK else INK
            low, high = each.necessity.low, each.necessity.high
            bounds = "" if low is None or high is None else f"\n{low:.0%} to {high:.0%}"
            axes.text(column, row, f"{each.necessity.value:.0%}{bounds}", ha="center", va="center",
                      color=colour, fontsize=7, fontweight="bold" if row == column else "normal")  # fmt: skip
        axes.set_xticks(range(size), names)
        axes.set_yticks(range(size), [f"without that of\n{name}" for name in names])
        axes.xaxis.tick_top()
        axes.tick_params(length=0, colors=INK)
        for edge in range(1, size):
            axes.axvline(edge - 0.5, color=FAINT, linewidth=0.6)
            axes.axhline(edge - 0.5, color=FAINT, linewidth=0.6)
        verdicts = axes.secondary_yaxis("right")
        verdicts.set_yticks(range(size), [_verdict(found, name) for name in found.names])
        verdicts.tick_params(length=0, colors=INK, labelsize=7)
        for spine in (*axes.spines.values(), *verdicts.spines.values()):
            spine.set_visible(False)
    return figure


def _verdict(found: Specificity, name: str) -> str:
    p = found.p_values[found.names.index(name)]
    if p is None:
        return "too few pairs"
    said = "specific" if name in found.specific else "not shown to\nbe specific"
    return f"{said}\n" + (f"p = {p:.2g}" if p >= SMALL else f"p < {SMALL:g}")

"""Effects of nodes as a heat map, and faithfulness by size as curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from circuitvit.errors import OptionError
from circuitvit.export.style import COLOURS, INK, MUTED
from circuitvit.views.figures.canvas import Picture, even_norm, label, picture_of, signed_colours, styled

if TYPE_CHECKING:
    from circuitvit.views.effects import EffectHeatmap, FaithfulnessCurve

MARKERS = "osD^vPX*"
OTHERS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", INK, MUTED)
WRITTEN = 160
"""Cells carry their number up to this many of them."""


def draw_heatmap(view: EffectHeatmap, *, title: str | None = None) -> Picture:
    """Layers from bottom to top, heads and the MLP from left to right; other senders are named below."""
    n_layers, n_heads = view.heads.shape
    table = np.concatenate([view.heads, view.mlps[:, None]], axis=1)
    signed = view.by == "signed"
    sizes = LinearSegmentedColormap.from_list("sizes", ["#FFFFFF", COLOURS["supports"]]).with_extremes(
        bad="#F0F1F3"
    )
    norm = even_norm(table) if signed else Normalize(0, float(np.nanmax(table)) or 1.0)
    cell = 0.62 if n_heads <= 6 else 0.48
    with styled():
        text = title or f"Effect of each node ({view.label}, {'signed' if signed else 'sum of magnitudes'})"
        figure = picture_of(max(3.4, cell * (n_heads + 1) + 1.7), 0.3 * n_layers + 1.25, text)
        axes = figure.subplots()
        drawn = axes.imshow(
            table, cmap=signed_colours() if signed else sizes, norm=norm, origin="lower", aspect="auto"
        )
        axes.axvline(n_heads - 0.5, color=INK, linewidth=0.8)
        axes.set_xticks(range(n_heads + 1), [*(f"h{head}" for head in range(n_heads)), "MLP"])
        axes.set_yticks(range(n_layers), [str(layer) for layer in view.layers])
        axes.set_ylabel("layer")
        axes.tick_params(length=0)
        if table.size <= WRITTEN:
            largest = float(np.nanmax(np.abs(table))) or 1.0
            for (row, column), value in np.ndenumerate(table):
                if np.isfinite(value) and abs(value) >= 0.02 * largest:
                    colour = "white" if abs(value) > 0.62 * largest else INK
                    axes.text(column, row, f"{value:.2g}", ha="center", va="center", fontsize=6, color=colour)
        others = ", ".join(f"{name} {value:+.3g}" for name, value in view.others.items())
        axes.set_xlabel(label(others, 80), color=MUTED)
        words = "supports (+), opposes (-)" if signed else "sum of magnitudes"
        figure.colorbar(drawn, ax=axes, shrink=0.8, label=f"units of the metric\n{words}")
    return figure


def draw_curves(curves: Sequence[FaithfulnessCurve], *, title: str = "Faithfulness by size") -> Picture:
    """One or several curves over a logarithmic axis of edges, with their intervals as bands.

    Raises:
        OptionError: if there is no curve.
    """
    if not curves:
        raise OptionError("no curves to draw")
    palette = (COLOURS["supports"], COLOURS["opposes"], *OTHERS)
    with styled():
        figure = picture_of(4.6, 3.0, title)
        axes = figure.subplots()
        for place, curve in enumerate(curves):
            colour, edges = palette[place % len(palette)], np.maximum(curve.edges, 1)
            if curve.low is not None and curve.high is not None:
                axes.fill_between(edges, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0)
            dashes = "-" if place < len(palette) else "--"  # past the last colour they begin anew
            axes.plot(edges, curve.faithfulness, dashes, color=colour, marker=MARKERS[place % len(MARKERS)],
                      markersize=3.2, linewidth=1.3, label=label(curve.label or f"{place + 1}"))  # fmt: skip
        for level, name in ((1.0, "whole model"), (0.0, "nothing kept")):
            axes.axhline(level, color=MUTED, linewidth=0.6, linestyle=(0, (4, 3)))
            axes.text(1.01, level, name, transform=axes.get_yaxis_transform(), ha="left", va="center",
                      fontsize=6.5, color=MUTED)  # fmt: skip
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("edges kept")
        axes.set_ylabel("faithfulness")
        axes.margins(x=0.04, y=0.1)
        if len(curves) > 1 or curves[0].label:
            axes.legend(frameon=False, loc="best")
    return figure

"""Effects of whole nodes as a map of the model, and faithfulness as a curve of the circuit's size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float, Int64
from numpy.typing import NDArray

from circuitvit.errors import DataError, OptionError, unknown_name
from circuitvit.export.style import INK, MUTED
from circuitvit.graph import EdgeScores
from circuitvit.graph.results import Record, Result, cells

if TYPE_CHECKING:
    from circuitvit.pruning.anytime import Candidate
    from circuitvit.views.canvas import Picture

By = Literal["signed", "magnitude"]

WRITTEN = 160
"""Cells of a heat map carry their number up to this many of them."""


@dataclass(frozen=True, eq=False, repr=False)
class EffectHeatmap(Result):
    """The effect of each sender, in the layout of the model. NaN where there is no such node.

    Attributes:
        label: the scoring method, for titles.
        layers: number of each row's layer; "pool" for that of a pool.
        heads: `(layer, head)`, in units of the metric; positive supports the behaviour.
        mlps: `(layer,)`.
        others: senders that are neither, such as `input`, by name.
        by: "signed": the sum of the scores of the edges that leave a node; "magnitude": that of their sizes.
    """

    label: str
    layers: tuple[int | str, ...]
    heads: Float[NDArray[np.float64], "layer head"]
    mlps: Float[NDArray[np.float64], " layer"]
    others: dict[str, float]
    by: By

    along = "layers:layer"
    may_be_nan = "heads mlps"

    def records(self) -> Iterator[Record]:
        """One row for each node: its `layer` (None of others, such as the input), `node` ("h0", "mlp" or a
        name), and `effect` in units of the metric."""
        names = [f"h{head}" for head in range(self.heads.shape[1])]
        table = np.concatenate([self.heads, self.mlps[:, None]], axis=1)
        for row in cells({"layer": self.layers, "node": [*names, "mlp"]}, effect=table):
            if row["effect"] == row["effect"]:  # NaN: there is no such node
                yield row
        yield from ({"layer": None, "node": name, "effect": effect} for name, effect in self.others.items())

    def figure(self, *, title: str | None = None) -> Picture:
        """Layers from bottom to top, heads and the MLP from left to right; other senders are named below."""
        from circuitvit.views import canvas

        (n_layers, n_heads), signed = self.heads.shape, self.by == "signed"
        table = np.concatenate([self.heads, self.mlps[:, None]], axis=1)
        words = ("signed", "supports (+), opposes (-)") if signed else ("sum of magnitudes",) * 2
        colours = canvas.signed_colours() if signed else canvas.rising_colours()
        norm = canvas.even_norm(table) if signed else canvas.scale(np.append(0.0, np.nan_to_num(table)))
        width = max(3.4, (0.62 if n_heads <= 6 else 0.48) * (n_heads + 1) + 1.7)
        with canvas.styled():
            text = title or f"Effect of each node ({self.label}, {words[0]})"
            figure = canvas.blank(width, 0.3 * n_layers + 1.25, text)
            axes = figure.subplots()
            heads = [f"h{head}" for head in range(n_heads)]
            drawn = canvas.model_map(axes, table, self.layers, heads, cmap=colours, norm=norm)
            largest = float(np.nanmax(np.abs(table))) or 1.0
            for (row, column), value in np.ndenumerate(table):
                if table.size <= WRITTEN and abs(value) >= 0.02 * largest:  # NaN is not
                    colour = "white" if abs(value) > 0.62 * largest else INK
                    axes.text(column, row, f"{value:.2g}", ha="center", va="center", fontsize=6, color=colour)
            others = ", ".join(f"{name} {value:+.3g}" for name, value in self.others.items())
            axes.set_xlabel(canvas.label(others, 80), color=MUTED)
            figure.colorbar(drawn, ax=axes, shrink=0.8, label=f"units of the metric\n{words[1]}")
        return figure

    def __repr__(self) -> str:
        return (
            f"EffectHeatmap({self.label}, {self.by}: {len(self.layers)} layers x {self.heads.shape[1]} heads)"
        )


def effect_heatmap(scores: EdgeScores, by: By = "signed") -> EffectHeatmap:
    """The effect of each sender from the scores of its edges.

    A node's effect, to first order, is the sum of those of the edges that leave it: all of them carry the
    same change of its output, each to another receiver. Opposite effects cancel; "magnitude" adds sizes.

    Raises:
        NameNotFoundError: if `by` is neither "signed" nor "magnitude".

    Example:
        >>> from circuitvit.graph.eap_ig import transformer_graph
        >>> graph = transformer_graph(2, 3)
        >>> heatmap = effect_heatmap(EdgeScores(graph, np.where(graph.edge_mask, -1.0, 0.0)))
        >>> heatmap.heads.shape, float(heatmap.mlps[-1]), heatmap.others["input"] > 0
        ((2, 3), 1.0, True)
    """
    if by not in ("signed", "magnitude"):
        raise unknown_name("kind of heat map", by, ("signed", "magnitude"))
    values = scores.support if by == "signed" else np.abs(scores.values)
    effects = values.sum(axis=(1, 2))
    stages = [stage for stage in scores.graph.stages if stage.senders]
    blocks = list(dict.fromkeys(stage.block for stage in stages if stage.receivers))
    named: dict[str, int | str] = {f"layer {stage.layer}": stage.layer for stage in stages}
    kinds = {stage.name: [stage.kind_of(sender) for sender in stage.senders] for stage in stages}
    width = max((kind.count("attention") for kind in kinds.values()), default=0)
    heads, mlps = np.full((len(blocks), width), np.nan), np.full(len(blocks), np.nan)
    others: dict[str, float] = {}
    place = 0
    for stage in stages:
        mine = effects[place : place + len(stage.senders)]
        place += len(stage.senders)
        row = blocks.index(stage.block) if stage.block in blocks else -1
        of_kind = {
            kind: [at for at, own in enumerate(kinds[stage.name]) if own == kind]
            for kind in kinds[stage.name]
        }
        for kind, places in of_kind.items():
            if kind == "attention":
                heads[row, : len(places)] = mine[places]
            elif kind == "mlp" and len(places) == 1:
                mlps[row] = mine[places[0]]
            else:
                others |= {stage.senders[at]: float(mine[at]) for at in places}
    layers = tuple(named.get(block, block) for block in blocks)
    return EffectHeatmap(scores.method or "scores", layers, heads, mlps, others, by)


@dataclass(frozen=True, eq=False, repr=False)
class FaithfulnessCurve(Result):
    """Faithfulness of circuits by size.

    Attributes:
        label: of the curve.
        edges: `(point,)`, in rising order.
        faithfulness: `(point,)`; 1 is the whole behaviour, 0 none of it.
        low: `(point,)` lower end of an interval, or None.
        high: `(point,)` upper end.
    """

    label: str
    edges: Int64[NDArray[np.int64], " point"]
    faithfulness: Float[NDArray[np.float64], " point"]
    low: Float[NDArray[np.float64], " point"] | None = None
    high: Float[NDArray[np.float64], " point"] | None = None

    def records(self) -> Iterator[Record]:
        """One row for each point: the `label`, the number of `edges`, `faithfulness`, and the ends `low` and
        `high` of its interval, None where there is none."""
        figures = {"faithfulness": self.faithfulness, "low": self.low, "high": self.high}
        for row in cells({"point": range(len(self.edges))}, edges=self.edges, **figures):
            del row["point"]
            yield {"label": self.label, **row}

    def figure(self, *, title: str = "Faithfulness by size") -> Picture:
        """The curve, with the number of edges on a logarithmic axis."""
        return draw_curves([self], title=title)

    def __repr__(self) -> str:
        return f"FaithfulnessCurve({self.label or 'unnamed'}: {len(self.edges)} points)"


Points = Iterable["tuple[float, ...] | Candidate"]


def faithfulness_curve(points: Points, label: str = "") -> FaithfulnessCurve:
    """A curve from points in any order.

    Args:
        points: `(edges, faithfulness)` or `(edges, faithfulness, low, high)` each, or the `candidates` of
            what `circuitvit.find` found.
        label: for the legend.

    Raises:
        DataError: if there is no point, or one is not two or four finite numbers.

    Example:
        >>> curve = faithfulness_curve([(100, 0.95), (10, 0.2)])
        >>> curve.edges.tolist(), curve.faithfulness.tolist()
        ([10, 100], [0.2, 0.95])
    """
    rows = [
        tuple(point) if isinstance(point, tuple) else (point.size, point.faithfulness) for point in points
    ]
    if not rows:
        raise DataError("no points: a curve needs pairs of edges and faithfulness")
    lengths = {len(row) for row in rows}
    if len(lengths) > 1 or not lengths <= {2, 4}:
        raise DataError("each point is (edges, faithfulness) or (edges, faithfulness, low, high), all alike")
    table = np.array(sorted(rows), dtype=np.float64)
    if not np.isfinite(table).all() or (table[:, 0] < 0).any():
        raise DataError("points of a curve are finite numbers, and edges are not negative")
    bounds = (table[:, 2], table[:, 3]) if table.shape[1] == 4 else (None, None)
    return FaithfulnessCurve(label, table[:, 0].astype(np.int64), table[:, 1], *bounds)


def draw_curves(curves: Sequence[FaithfulnessCurve], *, title: str = "Faithfulness by size") -> Picture:
    """One or several curves over a logarithmic axis of edges, with their intervals as bands.

    Raises:
        OptionError: if there is no curve.
    """
    from circuitvit.views import canvas

    if not curves:
        raise OptionError("no curves to draw")
    palette = (*canvas.PALETTE[:6], INK, MUTED)
    with canvas.styled():
        figure = canvas.blank(4.6, 3.0, title)
        axes = figure.subplots()
        for place, curve in enumerate(curves):
            name = canvas.label(curve.label or f"{place + 1}")
            colour, edges = palette[place % len(palette)], np.maximum(curve.edges, 1)
            if curve.low is not None and curve.high is not None:
                axes.fill_between(edges, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0)
            dashes = "-" if place < len(palette) else "--"  # past the last colour they begin anew
            axes.plot(edges, curve.faithfulness, dashes, color=colour, marker="osD^vPX*"[place % 8],
                      markersize=3.2, linewidth=1.3, label=name)  # fmt: skip
        for level, name in ((1.0, "whole model"), (0.0, "nothing kept")):
            axes.axhline(level, color=MUTED, linewidth=0.6, linestyle=(0, (4, 3)))
            axes.text(1.01, level, name, transform=axes.get_yaxis_transform(), ha="left", va="center",
                      fontsize=6.5, color=MUTED)  # fmt: skip
        canvas.log_axis(axes, "edges kept")
        axes.set_ylabel("faithfulness")
        axes.margins(x=0.04, y=0.1)
        if len(curves) > 1 or curves[0].label:
            axes.legend(facecolor="white", edgecolor="none", framealpha=1, loc="best")
    return figure

"""Which edges to measure: the strongest for certain, and equally many of every stratum of the others.

Strata are bands of layers, cut in two by the size of the score. Within a stratum every edge has the same
chance, so that the edges drawn speak for those that were not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from circuitvit.graph import EdgeScores

LEAST = 30
"""Edges without which no interval of 95 % can be had."""

CERTAIN_SHARE = 0.25
"""Of the edges to measure, those that are simply the strongest: they decide correlations."""

PER_STRATUM = 20
"""Edges drawn from each stratum at least: with 19 the largest error of a sample bounds 95 % of all."""

WEAK_SHARE = 0.7
"""Of the edges of a band, those in the stratum of small scores."""

MOST_BANDS = 4


@dataclass(frozen=True, eq=False)
class Stratum:
    """Edges that are alike, and those of them that are measured.

    Attributes:
        edges: places among all edges of the graph.
        drawn: those that are measured.
    """

    edges: Int[np.ndarray, " edge"]
    drawn: Int[np.ndarray, " drawn"]

    @property
    def weights(self) -> Float[np.ndarray, " drawn"]:
        """For how many edges each drawn one stands."""
        return np.full(len(self.drawn), len(self.edges) / max(1, len(self.drawn)))


def draw_strata(scores: EdgeScores, open_: Int[np.ndarray, " edge"], n: int, seed: int) -> list[Stratum]:
    """The strata of the edges whose effects are not known yet, with `n` of them drawn in all.

    Args:
        scores: to be judged.
        open_: places of these edges among all edges of the graph.
        n: how many to draw.
        seed: of the draw.
    """
    if n >= len(open_):
        return [Stratum(open_, open_)]
    graph = scores.graph
    sizes = np.abs(scores.values[graph.edge_mask])[open_]
    layers = np.array([graph.stages[stage].layer for stage in graph.receiver_stages])
    layers = np.broadcast_to(layers[None, :, None], graph.shape)[graph.edge_mask][open_]
    strongest = np.argsort(-sizes, kind="stable")[: int(n * CERTAIN_SHARE)]
    others = np.setdiff1d(np.arange(len(open_)), strongest)
    cells = _cells(others[np.argsort(layers[others], kind="stable")], sizes, n - len(strongest))
    generator = np.random.default_rng(seed)
    strata = [Stratum(open_[strongest], open_[strongest])]
    left = n - len(strongest)
    for number, cell in enumerate(cells):
        take = min(len(cell), left // (len(cells) - number))
        drawn = np.sort(generator.choice(cell, size=take, replace=False))
        strata.append(Stratum(open_[np.sort(cell)], open_[drawn]))
        left -= take
    return strata


def _cells(by_layer: NDArray[np.intp], sizes: NDArray[np.float64], n: int) -> list[NDArray[np.intp]]:
    """Edges in order of their layers, cut into bands and each band by size; smaller cells first."""
    n_cells = max(1, n // PER_STRATUM)
    if n_cells == 1:
        return [by_layer]
    cells = []
    for band in np.array_split(by_layer, min(MOST_BANDS, n_cells // 2)):
        ranked = band[np.argsort(sizes[band], kind="stable")]
        cut = int(len(ranked) * WEAK_SHARE)
        cells += [ranked[:cut], ranked[cut:]]
    return sorted((cell for cell in cells if len(cell)), key=len)

"""Agreement of scores with effects on a weighted sample of edges: correlations, top edges, signs.

An edge of weight `w` stands for `w` edges of the graph (Horvitz and Thompson 1952). With all weights 1 these
are the plain figures.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

Values = Float[np.ndarray, " edge"]


def pearson(scores: Values, effects: Values, weights: Values) -> float | None:
    """Weighted Pearson correlation; None where one side is constant.

    Example:
        >>> round(pearson(np.array([0.0, 1, 2]), np.array([1.0, 3, 5]), np.ones(3)), 6)
        1.0
    """
    moments = np.cov(np.stack([scores, effects]), aweights=weights, ddof=0)
    scale = float(np.sqrt(moments[0, 0] * moments[1, 1]))
    return None if scale == 0.0 or not np.isfinite(scale) else float(moments[0, 1]) / scale


def spearman(scores: Values, effects: Values, weights: Values) -> float | None:
    """Weighted Spearman correlation of magnitudes; None where one side is constant."""
    return pearson(_ranks(np.abs(scores), weights), _ranks(np.abs(effects), weights), weights)


def top_precision(scores: Values, effects: Values, weights: Values, k: int) -> float:
    """Share of the `k` edges of largest score that are among the `k` of largest effect, in magnitude."""
    chosen, true = _top_shares(scores, weights, k), _top_shares(effects, weights, k)
    return float((weights * np.minimum(chosen, true)).sum() / min(k, weights.sum()))


def sign_agreement(scores: Values, effects: Values, weights: Values) -> float:
    """Weighted share of edges whose score and effect have one sign."""
    return float(np.average(np.sign(scores) == np.sign(effects), weights=weights))


def _ranks(values: Values, weights: Values) -> NDArray[np.float64]:
    """The middle of each value's place in a line in which an edge takes up its weight; ties share theirs."""
    distinct, place = np.unique(values, return_inverse=True)
    widths = np.bincount(place, weights=weights, minlength=len(distinct))
    ranks: NDArray[np.float64] = (np.cumsum(widths) - widths / 2)[place]
    return ranks


def _top_shares(values: Values, weights: Values, k: int) -> NDArray[np.float64]:
    """How much of each edge lies within the `k` largest magnitudes, 0 to 1."""
    order = np.argsort(-np.abs(values), kind="stable")
    before = np.cumsum(weights[order]) - weights[order]
    shares = np.empty(len(values))
    shares[order] = np.clip((k - before) / weights[order], 0.0, 1.0)
    return shares

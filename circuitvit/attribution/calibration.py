"""`calibrate`: measure the exact effects of some edges, and say how far all scores can be trusted.

Intervals are split-conformal within strata: of the `m` edges drawn from a stratum, the error of rank
`ceil((m + 1) level)` bounds that of a further edge of it with probability at least `level`, however errors
are distributed. The interval of an edge that was measured is its effect. Agreement is that of a weighted
sample: a drawn edge of weight `w` stands for `w` edges of the graph (Horvitz and Thompson 1952).

Vovk, Gammerman and Shafer 2005, "Algorithmic Learning in a Random World", for Mondrian conformal predictors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from circuitvit._keywords import running
from circuitvit.attribution.exact import edge_effects
from circuitvit.attribution.scoring import Running
from circuitvit.engine import choose_batch_size
from circuitvit.errors import OptionError, check_whole
from circuitvit.graph import EdgeScores, Fidelity, Graph
from circuitvit.models import Model
from circuitvit.tasks import PreparedTask, Task, prepare

MOST_TOP = 100
TOP_SHARE = 0.2
"""The top edges that precision speaks of: a fifth of the edges, and at most 100."""

LEAST = 30
"""Edges without which no interval of 95 % can be had."""

CERTAIN_SHARE = 0.25
"""Of the edges to measure, those that are simply the strongest: they decide correlations."""

PER_STRATUM = 20
"""Edges drawn from each stratum at least: with 19 the largest error of a sample bounds 95 % of all."""

WEAK_SHARE = 0.7
"""Of the edges of a band, those in the stratum of small scores."""

MOST_BANDS = 4

Values = Float[np.ndarray, " edge"]


@running
def calibrate(
    model: Model,
    task: Task | PreparedTask,
    scores: EdgeScores,
    n: int = 200,
    *,
    level: float = 0.95,
    seed: int = 0,
    batch_size: int | None = None,
    memory: int | str | None = None,
    progress: bool = True,
) -> EdgeScores:
    """The scores with their measured fidelity: agreement with exact effects, and an interval for each edge.

    Args:
        model: that was scored.
        task: that it was scored on; other pairs tell how far the scores carry over.
        scores: from `attribute`, or any others of this graph.
        n: how many edges to measure; edges whose scores are exact effects already are not measured again.
        level: share of the edges whose effects should lie in their intervals.
        seed: of the draw.
        batch_size: pairs at once; by default what `memory` allows.
        memory: bytes that a batch, and what is kept between runs, may take.
        progress: whether to show a bar.

    Returns:
        The same scores with `fidelity` set.

    Raises:
        OptionError: for scores of another graph or direction, too few edges, a level out of
            reach, or a negative seed.
        DataError: as `attribute`.

    Example:
        >>> import circuitvit as cv  # doctest: +SKIP
        >>> scores = cv.calibrate(model, task, cv.attribute(model, task, "local"))  # doctest: +SKIP
        >>> scores.fidelity.pearson, scores.interval("input->m0")  # doctest: +SKIP
    """
    check_whole("n", n, 0)
    if n < LEAST:
        raise OptionError(f"at least {LEAST} edges must be measured to say how right scores are, not {n}")
    if not 0.5 <= level <= 0.95:
        raise OptionError(f"the level of the intervals lies between 0.5 and 0.95, not {level:g}")
    prepared = prepare(model, task, progress)
    prepared.graph.check_same(scores.graph, "what scores the edges")
    if scores.direction != prepared.direction:
        raise OptionError(f"the scores are of {scores.direction}; the task of {prepared.direction}")
    graph, places = prepared.graph, np.argwhere(prepared.graph.edge_mask)
    known = np.zeros(len(places), bool) if scores.measured is None else scores.measured[graph.edge_mask]
    strata = draw_strata(scores, np.flatnonzero(~known), n, seed)
    wanted = np.zeros(graph.shape, dtype=bool)
    for stratum in strata:
        wanted[tuple(places[stratum.drawn].T)] = True
    how = Running(batch_size or choose_batch_size(prepared, memory), progress)
    effects = edge_effects(prepared, wanted, how) / len(prepared)
    return replace(scores, fidelity=_fidelity(scores, effects, known, strata, level, seed))


def _fidelity(
    scores: EdgeScores,
    effects: NDArray[np.float64],
    known: NDArray[np.bool_],
    strata: Sequence[Stratum],
    level: float,
    seed: int,
) -> Fidelity:
    """The figures, from the effects of the drawn edges; known edges count as measured and right."""
    edges = scores.graph.edge_mask
    values = scores.values[edges]
    truth = np.where(known, values, effects[edges])
    errors, already = np.abs(truth - values), np.flatnonzero(known)
    sample = np.concatenate([already, *(stratum.drawn for stratum in strata)]).astype(int)
    weights = np.concatenate([np.ones(len(already)), *(stratum.weights for stratum in strata)])
    given, layers = (values[sample], truth[sample], weights), _layers(scores.graph)[sample]
    k = min(MOST_TOP, max(1, int(TOP_SHARE * len(values))))
    low, high = np.zeros(edges.shape), np.zeros(edges.shape)
    low[edges], high[edges] = _intervals(values, truth, errors, strata, level)
    return Fidelity(
        n_measured=len(sample),
        n_edges=len(values),
        pearson=pearson(*given),
        spearman=spearman(*given),
        top_k=k,
        top_precision=top_precision(*given, k),
        sign_agreement=sign_agreement(*given),
        level=level,
        low=low,
        high=high,
        layer_errors={
            int(layer): float(np.average(errors[sample][layers == layer], weights=weights[layers == layer]))
            for layer in np.unique(layers)
        },
        seed=seed,
    )


def _intervals(
    values: Values, truth: Values, errors: Values, strata: Sequence[Stratum], level: float
) -> tuple[Values, Values]:
    """Lower and upper ends for every edge of the graph, in order."""
    low, high = truth.copy(), truth.copy()
    for stratum in strata:
        others = np.setdiff1d(stratum.edges, stratum.drawn)
        if len(others):
            n = len(stratum.drawn)
            width = np.sort(errors[stratum.drawn])[min(math.ceil((n + 1) * level), n) - 1]
            low[others], high[others] = values[others] - width, values[others] + width
    return low, high


def _layers(graph: Graph) -> NDArray[np.intp]:
    """The receiver's layer of every edge, in order."""
    layers = np.array([graph.stages[stage].layer for stage in graph.receiver_stages])
    of_edges: NDArray[np.intp] = np.broadcast_to(layers[None, :, None], graph.shape)[graph.edge_mask]
    return of_edges


# -- which edges to measure ----------------------------------------------------------------------
# The strongest for certain, and equally many of every stratum of the others. Strata are bands of layers, cut
# in two by the size of the score. Within one every edge has the same chance, so that the edges drawn speak
# for those that were not.


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
    layers = _layers(graph)[open_]
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


# -- agreement with effects ----------------------------------------------------------------------


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

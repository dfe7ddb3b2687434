"""`calibrate`: measure the exact effects of some edges, and say how far all scores can be trusted.

Intervals are split-conformal within strata: of the `m` edges drawn from a stratum, the error of rank
`ceil((m + 1) level)` bounds that of a further edge of it with probability at least `level`, however errors
are distributed. The interval of an edge that was measured is its effect.

Vovk, Gammerman and Shafer 2005, "Algorithmic Learning in a Random World", for Mondrian conformal predictors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from circuitvit.attribution import agreement
from circuitvit.attribution.exact import edge_effects
from circuitvit.attribution.method import Settings
from circuitvit.attribution.sample import LEAST, Stratum, draw_strata
from circuitvit.engine import choose_batch_size
from circuitvit.errors import OptionError
from circuitvit.graph import EdgeScores, Fidelity
from circuitvit.models import Model
from circuitvit.tasks import PreparedTask, Task, prepare

MOST_TOP = 100
TOP_SHARE = 0.2
"""The top edges that precision speaks of: a fifth of the edges, and at most 100."""


def calibrate(
    model: Model,
    task: Task | PreparedTask,
    scores: EdgeScores,
    n: int = 200,
    *,
    level: float = 0.95,
    seed: int = 0,
    batch_size: int | None = None,
    memory: int | None = None,
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
        batch_size: pairs at once; chosen from the memory budget by default.
        memory: that budget, in bytes.
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
    if n < LEAST:
        raise OptionError(f"at least {LEAST} edges must be measured to say how right scores are, not {n}")
    if not 0.5 <= level <= 0.95:
        raise OptionError(f"the level of the intervals lies between 0.5 and 0.95, not {level:g}")
    if seed < 0:
        raise OptionError(f"a seed must not be negative: {seed!r}")
    prepared = prepare(model, task, progress)
    if scores.graph != prepared.graph or scores.direction != prepared.direction:
        raise OptionError(
            f"the scores are of {scores.graph}, {scores.direction}; the task of {prepared.graph}, "
            f"{prepared.direction}"
        )
    graph, places = prepared.graph, np.argwhere(prepared.graph.edge_mask)
    known = np.zeros(len(places), bool) if scores.measured is None else scores.measured[graph.edge_mask]
    strata = draw_strata(scores, np.flatnonzero(~known), n, seed)
    wanted = np.zeros(graph.shape, dtype=bool)
    for stratum in strata:
        wanted[tuple(places[stratum.drawn].T)] = True
    settings = Settings(batch_size or choose_batch_size(prepared, memory), progress=progress)
    effects = edge_effects(prepared, wanted, settings) / len(prepared)
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
    graph = scores.graph
    values = scores.values[graph.edge_mask]
    truth = np.where(known, values, effects[graph.edge_mask])
    already = np.flatnonzero(known)
    sample = np.concatenate([already, *(stratum.drawn for stratum in strata)]).astype(int)
    weights = np.concatenate([np.ones(len(already)), *(stratum.weights for stratum in strata)])
    given = (values[sample], truth[sample], weights)
    k = min(MOST_TOP, max(1, int(TOP_SHARE * len(values))))
    low, high = _intervals(values, truth, known, strata, level)
    return Fidelity(
        n_measured=len(sample),
        n_edges=len(values),
        pearson=agreement.pearson(*given),
        spearman=agreement.spearman(*given),
        top_k=k,
        top_precision=agreement.top_precision(*given, k),
        sign_agreement=agreement.sign_agreement(*given),
        level=level,
        low=_spread(scores, low),
        high=_spread(scores, high),
        layer_errors=_layer_errors(scores, sample, weights, np.abs(truth - values)),
        seed=seed,
    )


def _intervals(
    values: NDArray[np.float64],
    truth: NDArray[np.float64],
    known: NDArray[np.bool_],
    strata: Sequence[Stratum],
    level: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lower and upper ends for every edge of the graph, in order."""
    low, high = truth.copy(), truth.copy()
    for stratum in strata:
        others = np.setdiff1d(stratum.edges, stratum.drawn)
        if len(others):
            errors = np.sort(np.abs(truth - values)[stratum.drawn])
            rank = min(math.ceil((len(errors) + 1) * level), len(errors))
            low[others], high[others] = values[others] - errors[rank - 1], values[others] + errors[rank - 1]
    return low, high


def _layer_errors(
    scores: EdgeScores,
    sample: NDArray[np.intp],
    weights: NDArray[np.float64],
    errors: NDArray[np.float64],
) -> dict[int, float]:
    """Mean error by the receiver's layer, of the layers that any measured edge enters."""
    graph = scores.graph
    layers = np.array([graph.stages[stage].layer for stage in graph.receiver_stages])
    of_edges = np.broadcast_to(layers[None, :, None], graph.shape)[graph.edge_mask][sample]
    return {
        int(layer): float(np.average(errors[sample][of_edges == layer], weights=weights[of_edges == layer]))
        for layer in np.unique(of_edges)
    }


def _spread(scores: EdgeScores, by_edge: NDArray[np.float64]) -> NDArray[np.float64]:
    """Numbers of all edges in order, as `(sender, receiver, group)`."""
    spread = np.zeros(scores.graph.shape)
    spread[scores.graph.edge_mask] = by_edge
    return spread

"""Scores held against edges that are known to matter.

The labels come from `circuitvit.compiled`, or from brute force: `active_edges` runs the model once for each
edge, as a circuit that lacks this edge alone. The method `exact` goes another way, and is held against it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import rankdata

from circuitvit.engine import Evaluator
from circuitvit.errors import OptionError, check_number
from circuitvit.graph import Circuit, CircuitLike, EdgeMask, EdgeScores, as_circuit
from circuitvit.models import Model
from circuitvit.tasks import PreparedTask, Task, prepare

Numbers = Float[np.ndarray, " edge"]
Marks = Bool[np.ndarray, " edge"]
Effects = Float[np.ndarray, "sender receiver group"]

CHUNK = 64
"""Masks that are run before their logits are let go."""


def active_edges(model: Model, task: Task | PreparedTask, *, at_least: float = 1e-3) -> Circuit:
    """The edges that matter by themselves: ablating one alone moves the metric of at least one pair.

    Per pair and not on average, so that effects of opposite signs do not hide each other.

    Args:
        model: from `load`, `wrap` or `compiled`.
        task: images, metric, ablation and direction.
        at_least: the smallest effect that counts, in units of the metric; the rest is taken for rounding.

    Raises:
        OptionError: if `at_least` is not positive.

    Example:
        >>> import circuitvit as cv
        >>> relay = cv.compiled("relay")
        >>> clean, corrupt = relay.pairs(4, change="colour")
        >>> list(active_edges(relay.model, cv.Task(clean, corrupt, metric=cv.logit_diff("yes", "no"))))
        ['input->a0.h0<v>', 'a0.h0->a1.h0<v>', 'a1.h0->logits']
    """
    check_number("the smallest effect that counts", at_least)
    prepared = prepare(model, task)
    return Circuit(prepared.graph, largest_effects(prepared) >= at_least)


def largest_effects(prepared: PreparedTask) -> Effects:
    """The largest magnitude, over pairs, of the effect of ablating each edge alone; 0 for no edge."""
    graph, evaluator = prepared.graph, Evaluator(prepared)
    base = evaluator.nothing if prepared.denoising else evaluator.whole
    largest = np.zeros(graph.shape)
    places = np.argwhere(graph.edge_mask)
    for start in range(0, len(places), CHUNK):
        chunk = places[start : start + CHUNK]
        masks = _without_one(graph.edge_mask, chunk)  # in the run that is intervened on
        found = evaluator.many([~mask if prepared.denoising else mask for mask in masks])
        largest[tuple(chunk.T)] = np.abs(found - base).max(axis=1)
    return largest


@dataclass(frozen=True)
class Separation:
    """How well scores tell the edges that matter from the others.

    Attributes:
        roc_auc: the probability that an edge that matters has the greater score, ties counting half: 0.5 by
            chance, 1 when all that matter come first.
        average_precision: precision averaged over the edges that matter, each at its own rank; by chance
            their share.
    """

    roc_auc: float
    average_precision: float


def separation(scores: EdgeScores, truth: CircuitLike) -> Separation:
    """Rank edges by the magnitude of their scores, and compare with the edges that matter.

    Gupta et al. 2024, "InterpBench", arXiv:2407.14494, and Mueller et al. 2025, "MIB", arXiv:2504.13151, use
    the ROC AUC over edges. Where few edges matter, average precision tells more.

    Raises:
        OptionError: if scores and truth belong to different graphs, or all edges matter, or none does.

    Example:
        >>> import circuitvit as cv
        >>> relay = cv.compiled("relay")
        >>> task = cv.Task(*relay.pairs(4), metric=cv.logit_diff("yes", "no"))
        >>> scores = cv.attribute(relay.model, task, "exact", progress=False)
        >>> separation(scores, active_edges(relay.model, task))
        Separation(roc_auc=1.0, average_precision=1.0)
    """
    edges = scores.graph.edge_mask
    marks = as_circuit(truth, scores.graph).kept[edges]
    if marks.all() or not marks.any():
        raise OptionError(f"{marks.sum()} of {len(marks)} edges matter: there is nothing to tell apart")
    sizes = np.abs(scores.values[edges])
    return Separation(_roc_auc(sizes, marks), average_precision(sizes, marks))


def _without_one(mask: EdgeMask, places: np.ndarray) -> Iterator[EdgeMask]:
    for place in places:
        kept = mask.copy()
        kept[tuple(place)] = False
        yield kept


def _roc_auc(sizes: Numbers, marks: Marks) -> float:
    """By the Mann-Whitney statistic."""
    positives, negatives = int(marks.sum()), int((~marks).sum())
    ranks = rankdata(sizes)[marks].sum()
    return float((ranks - positives * (positives + 1) / 2) / (positives * negatives))


def average_precision(values: Float[np.ndarray, " item"], marks: Bool[np.ndarray, " item"]) -> float:
    """The mean of the precision over the marked items, from the greatest value down, ties as one.

    Example:
        >>> average_precision(np.array([3.0, 2.0, 1.0]), np.array([True, False, True]))
        0.8333333333333333
    """
    levels, level = np.unique(-values, return_inverse=True)
    hits = np.cumsum(np.bincount(level, weights=marks, minlength=len(levels)))
    chosen = np.cumsum(np.bincount(level, minlength=len(levels)))
    return float((np.diff(hits, prepend=0) * hits / chosen).sum() / marks.sum())

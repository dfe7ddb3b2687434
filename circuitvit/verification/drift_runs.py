"""`diff`: does a stored circuit still carry the behaviour in new weights, and which edges have changed?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

from circuitvit._keywords import running
from circuitvit.attribution import attribute
from circuitvit.attribution.budget import seconds
from circuitvit.attribution.exact import pair_effects
from circuitvit.attribution.scoring import Running, provenance_of, without_gradient
from circuitvit.engine import Evaluator, choose_batch_size
from circuitvit.errors import OptionError, check_number, check_whole, counted
from circuitvit.graph import Circuit, CircuitLike, EdgeMask, Graph, as_circuit
from circuitvit.models import Model
from circuitvit.pruning.find import find
from circuitvit.tasks import PreparedTask, Task, prepare, split
from circuitvit.verification.drift import LEFT, TOLERANCE, UNCHANGED, Drift, Measures, judge
from circuitvit.verification.faithfulness import origin_differs
from circuitvit.verification.null import relabelled_circuits
from circuitvit.verification.other_weights import check_same_kind, same_task
from circuitvit.verification.statistics import (
    MIN_PAIRS,
    ROUNDING,
    Bootstrap,
    Estimate,
    mean_range,
    ratio_interval,
)

Pairs = Float[np.ndarray, " pair"]
ByPair = Float[np.ndarray, "pair edge"]
Edges = Float[np.ndarray, " edge"]

LEVEL = 0.95

ALL_EDGES = 2000
"""Of a graph with no more edges than this all are measured, unless another number is asked for."""

SOME_EDGES = 200
"""How many are measured of a larger one, besides those of the circuit."""

FEW = 12
"""Pairs with which the interval of an edge among hundreds is twice as wide as that of one by itself."""

RELABELLED = 40
"""Circuits with nodes in one another's places."""

WITHIN = "120s"
"""For each search, where no time is given."""


@running
def diff(
    old: Model,
    new: Model,
    task: Task | PreparedTask,
    circuit: CircuitLike | None = None,
    *,
    tolerance: float = TOLERANCE,
    edges: int | None = None,
    search: bool | str | float = False,
    held_out: float = 0.5,
    n_bootstrap: int = 1000,
    seed: int = 0,
    batch_size: int | None = None,
    memory: int | str | None = None,
    progress: bool = True,
) -> Drift:
    """What became of a circuit when the weights of its model changed?

    On every pair both models are run whole, with everything ablated, with the stored circuit alone, and with
    each edge ablated alone. The verdict is read from intervals over pairs (`circuitvit.verification.drift`):

        gone        less than a fifth of the old behaviour is left
        rerouted    the behaviour is there, the stored circuit does not carry it: faithfulness beyond 1 +-
                    0.5, or less than half is left of what it carried beyond itself with other heads
        weaker      the circuit carries it; there is less of it, or the circuit carries less of it
        shifted     the circuit carries it; there is more of it, or some edge's effect has changed
        unchanged   behaviour, faithfulness and every edge's effect are within the tolerance of what they were
        cannot tell none of these is sure

    Models of the same weights are said to be so at once, and nothing is run.

    Args:
        old: the model that the circuit was found in.
        new: one of the same graph, such as the same model trained further.
        task: images, metric and ablation. Pairs that the circuit was not found on.
        circuit: of the old model. By default one is found, and all else is measured on held-out pairs.
        tolerance: the change that does not count, as a share of the old behaviour.
        edges: how many edges are measured besides the circuit's, those of largest "local" score in either
            model; by default all edges of a graph of at most 2,000, and 200 of a larger one.
        search: look for a circuit in the new model as well: True, or the time for it, such as "60s".
        held_out: the share of pairs that a search is not given, and on which everything is then measured.
        n_bootstrap: how often the pairs are resampled for intervals.
        seed: of searches, halves and resampling.
        batch_size: pairs at once; by default what `memory` allows.
        memory: bytes that a batch, and what is kept between runs, may take.
        progress: whether to show a bar.

    Raises:
        OptionError: if the models have different graphs, prepare images differently or call the task's
            classes differently, the circuit is of another graph, or edges would have to be chosen by a metric
            that has no gradient.
        DataError: if the old model shows no behaviour, or images cannot be used.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> model = cv.load("catdog-tiny")
        >>> task = cv.Task(*catdog_pairs(6), metric=cv.logit_diff("cat", "dog"))
        >>> everything = cv.Circuit.full(model.graph)
        >>> diff(model, model, task, everything).verdict
        'unchanged'
        >>> broken = model.edit({"a2.*": 0, "m2": 0, "a3.*": 0, "m3": 0})
        >>> diff(model, broken, task, everything, edges=0, progress=False).verdict
        'gone'
    """
    check_number("the tolerance", tolerance, above=0, below=1)
    check_number("the share of pairs to hold out", held_out, 0, 1)
    if edges is not None:
        check_whole("the number of edges", edges, 0)
    within = seconds(search) if search and not isinstance(search, bool) else WITHIN
    prepared = prepare(old, task, progress)
    check_same_kind(prepared, new, task)
    stored = None if circuit is None else as_circuit(circuit, prepared.graph)
    if old.weights_hash == new.weights_hash and old.prompts == new.prompts:
        return _identical(old, new, prepared, stored, tolerance)
    _check_estimate(prepared, edges)
    sides = split(old, prepared, held_out, seed=seed) if search or stored is None else None
    judged = prepared if sides is None else sides.held_out
    other = same_task(new, judged)
    runs = [
        Evaluator(each, batch_size=batch_size, memory=memory, progress=progress) for each in (judged, other)
    ]
    runs[0].check_effect()
    if stored is None:
        assert sides is not None
        stored = find(
            old, sides.discovery, within=within, seed=seed, memory=memory, progress=progress
        ).circuit
    settings = Bootstrap(n_bootstrap, LEVEL, seed)
    kept = _carried(runs, stored, settings)
    wanted = _wanted(judged, other, stored, edges, progress)
    how = Running(batch_size or choose_batch_size(judged, memory), progress)
    moved = _EdgeChanges.of(judged, other, wanted, runs[0].effect, how)
    measures = replace(kept, largest=moved.largest, least=moved.least)
    verdict, reason = judge(measures, tolerance)
    found = Drift(
        verdict=verdict,
        reason=reason,
        n=len(judged),
        tolerance=tolerance,
        circuit=stored,
        before=provenance_of(judged, "diff", seed),
        after=provenance_of(other, "diff", seed),
        behaviour=kept.behaviour,
        faithfulness_old=kept.old,
        faithfulness_new=kept.new,
        faithfulness_change=kept.change,
        own_left=kept.own,
        edges=moved.edges,
        old=moved.old,
        new=moved.new,
        low=moved.low,
        high=moved.high,
        largest=moved.largest,
        caveats=_caveats(old, stored, wanted, judged),
    )
    if not search or sides is None or kept.new is None:
        return found
    anew = find(
        new, same_task(new, sides.discovery), within=within, seed=seed, memory=memory, progress=progress
    )
    back, there = (carried_share(run, anew.circuit, settings) for run in runs)
    return replace(found, found=anew.circuit, faithfulness_found=there, faithfulness_back=back)


# -- what needs no run -----------------------------------------------------------------------------


def _identical(
    old: Model, new: Model, prepared: PreparedTask, stored: Circuit | None, tolerance: float
) -> Drift:
    said = "No circuit was given and none was looked for: the whole graph stands for it."
    return Drift(
        verdict=UNCHANGED,
        reason=f"The weights are identical ({old.weights_hash[:12]}); nothing was run.",
        n=0,
        tolerance=tolerance,
        circuit=Circuit.full(prepared.graph) if stored is None else stored,
        before=provenance_of(prepared, "diff"),
        after=provenance_of(replace(prepared, model=new), "diff"),
        caveats=(said,) if stored is None else (),
    )


# -- the circuit -----------------------------------------------------------------------------------


def _carried(runs: Sequence[Evaluator], circuit: Circuit, settings: Bootstrap) -> Measures:
    """How much of the behaviour is left, and how much of it the circuit carries in both models."""
    before, after = (run.effect for run in runs)
    share = ratio_interval(after, before, settings)
    old = carried_share(runs[0], circuit, settings)
    if not is_left(share, after, settings):
        return Measures(share, old)
    kept = [run.values(circuit.kept) - run.nothing for run in runs]
    change = _change(_Share(kept[0], before), _Share(kept[1], after))
    own = _own_left(runs, circuit, settings.seed)
    return Measures(share, old, carried_share(runs[1], circuit, settings), change, own)


def _own_left(runs: Sequence[Evaluator], circuit: Circuit, seed: int) -> Estimate | None:
    """How much is left of what the circuit carries beyond itself with like nodes in one another's places."""
    others = relabelled_circuits(circuit, RELABELLED, seed) if len(runs[0]) >= MIN_PAIRS else []
    if not others:
        return None
    old, new = (Beyond.of(run.many([circuit, *others]) - run.nothing, run.effect) for run in runs)
    return left_of_own(old, new)


class Beyond(NamedTuple):
    """What a circuit carries beyond the mean of others.

    Attributes:
        value: its faithfulness less theirs.
        pairs: how far each pair moves it.
        others: how far each of the others does.
    """

    value: float
    pairs: Pairs
    others: Float[np.ndarray, " circuit"]

    @classmethod
    def of(cls, values: Float[np.ndarray, "circuit pair"], effect: Pairs) -> Beyond:
        """From what each circuit keeps of the effect on each pair, the circuit in question first."""
        shares = values[1:].sum(axis=1) / effect.sum()
        beyond = _Share(values[0] - values[1:].mean(axis=0), effect)
        return cls(beyond.value, beyond.pulls, shares.mean() - shares)


def left_of_own(old: Beyond, new: Beyond) -> Estimate | None:
    """The new over the old, made linear at the means, with its interval over pairs and over the others drawn.

    Returns:
        The share; None where the old is not surely more than the tolerance by default.
    """
    t = stats.t.ppf((1 + LEVEL) / 2, len(old.pairs) - 1)

    def width(pairs: Pairs, others: Float[np.ndarray, " circuit"]) -> float:
        return float(t * np.sqrt(pairs.var(ddof=1) / len(pairs) + others.var(ddof=1) / len(others)))

    if old.value - width(old.pairs, old.others) <= TOLERANCE:
        return None
    left = new.value / old.value
    wide = width((new.pairs - left * old.pairs) / old.value, (new.others - left * old.others) / old.value)
    return Estimate(left, left - wide, left + wide)


def is_left(share: Estimate, effect: Pairs, settings: Bootstrap) -> bool:
    """Whether a behaviour is surely there in other weights: enough of it, and its own effect is not 0.

    Args:
        share: of the behaviour that there is in the first weights.
        effect: on each pair, in the other weights.
        settings: of intervals.
    """
    low, high = mean_range(effect, settings)
    return share.low is not None and share.low > LEFT and not low <= 0 <= high


def carried_share(run: Evaluator, circuit: Circuit, settings: Bootstrap) -> Estimate:
    return ratio_interval(run.values(circuit.kept) - run.nothing, run.effect, settings)


class _Share(NamedTuple):
    """A ratio of means over pairs."""

    part: Pairs
    whole: Pairs

    @property
    def value(self) -> float:
        return float(self.part.sum() / self.whole.sum())

    @property
    def pulls(self) -> Pairs:
        """How far each pair moves it: the ratio, made linear at the means."""
        return np.asarray((self.part - self.value * self.whole) / self.whole.mean())


def _change(old: _Share, new: _Share) -> Estimate:
    """The second less the first, over the same pairs, with its interval by Student's t."""
    change, count = new.value - old.value, len(old.part)
    if count < MIN_PAIRS:
        return Estimate(change)
    pulls = new.pulls - old.pulls
    wide = stats.t.ppf((1 + LEVEL) / 2, count - 1) * max(pulls.std(ddof=1) / np.sqrt(count), ROUNDING)
    return Estimate(change, change - wide, change + wide)


# -- the edges -------------------------------------------------------------------------------------


def how_many(graph: Graph, asked: int | None) -> int:
    """How many edges are measured besides the circuit's: by default all, of a large graph some."""
    if asked is not None:
        return asked
    return graph.n_edges if graph.n_edges <= ALL_EDGES else SOME_EDGES


def _check_estimate(prepared: PreparedTask, edges: int | None) -> None:
    """Refuse to choose edges by estimates that the metric does not allow, before anything runs."""
    total, why = prepared.graph.n_edges, without_gradient(prepared)
    if why and 0 < how_many(prepared.graph, edges) < total:
        raise OptionError(
            f"the edges to measure are chosen by gradients, and {why}: give edges=0 to measure those of the "
            f"circuit alone, edges={total} for all, or another metric"
        )


def _wanted(
    judged: PreparedTask, other: PreparedTask, circuit: Circuit, edges: int | None, progress: bool
) -> EdgeMask:
    """The edges to measure: the circuit's, and the strongest of both models."""
    graph = judged.graph
    edges = how_many(graph, edges)
    if edges >= graph.n_edges:
        return graph.edge_mask
    wanted = circuit.kept.copy()
    if edges:
        scores = [attribute(each.model, each, "local", progress=progress).values for each in (judged, other)]
        sizes = np.where(graph.edge_mask, np.max(np.abs(scores), axis=0), -1.0)
        wanted.flat[np.argsort(-sizes, axis=None, kind="stable")[:edges]] = True
    return wanted & graph.edge_mask


@dataclass(frozen=True, eq=False)
class _EdgeChanges:
    """Edges in both models, as shares of the old behaviour; None where pairs or edges are too few."""

    edges: tuple[str, ...] = ()
    old: Edges | None = None
    new: Edges | None = None
    low: Edges | None = None
    high: Edges | None = None
    largest: float | None = None
    least: float | None = None

    @classmethod
    def of(
        cls, judged: PreparedTask, other: PreparedTask, wanted: EdgeMask, effect: Pairs, how: Running
    ) -> _EdgeChanges:
        if len(judged) < MIN_PAIRS or not wanted.any():
            return cls()
        sign = 1.0 if judged.denoising else -1.0  # so that what supports the behaviour is positive
        old, new = (sign * pair_effects(each, wanted, how) for each in (judged, other))
        change, alone, together = edge_changes(new - old, effect, judged.graph.n_edges)
        names, whole = tuple(judged.graph.names_of(wanted)), effect.mean()
        low, high = change - together, change + together
        return cls(
            names,
            old.mean(axis=0) / whole,
            new.mean(axis=0) / whole,
            low,
            high,
            float((np.abs(change) + alone).max()),
            float(np.maximum(low, -high).max(initial=0.0)),
        )


def edge_changes(change: ByPair, effect: Pairs, count: int) -> tuple[Edges, Edges, Edges]:
    """The mean change of each edge as a share of the mean effect, and how wide its 95 % intervals are.

    Intervals are Student's. Those for all edges at once are Bonferroni's, over the edges that there are and
    not only those that were chosen to be measured.

    Args:
        change: of each edge on each pair.
        effect: what there is to explain on each.
        count: the edges of the graph.

    Returns:
        The change; half the width of the interval of each edge by itself; the same for all edges at once.

    Example:
        >>> change = np.array([[0.2], [0.3], [0.1], [0.2], [0.2]])
        >>> [round(float(each[0]), 3) for each in edge_changes(change, np.full(5, 2.0), 10)]
        [0.1, 0.044, 0.089]
    """
    share, error = edge_shares(change, effect)
    alone, together = (stats.t.ppf(1 - (1 - LEVEL) / 2 / number, len(effect) - 1) for number in (1, count))
    return share, alone * error, together * error


def edge_shares(values: ByPair, effect: Pairs) -> tuple[Edges, Edges]:
    """The mean of each edge as a share of the mean effect, and its standard error.

    The error is that of the ratio of means, made linear at them.

    Args:
        values: of each edge on each pair.
        effect: what there is to explain on each.
    """
    whole = effect.mean()
    share = values.mean(axis=0) / whole
    pulls = (values - share * effect[:, None]) / whole
    return share, np.maximum(pulls.std(axis=0, ddof=1) / np.sqrt(len(effect)), ROUNDING)


# -- what to bear in mind --------------------------------------------------------------------------


def _caveats(old: Model, circuit: Circuit, wanted: EdgeMask, judged: PreparedTask) -> tuple[str, ...]:
    measured, edges = int(wanted.sum()), judged.graph.n_edges
    said = [origin_differs(circuit, old)]
    if measured < edges:
        which = "the circuit's and the strongest by estimate" if measured > len(circuit) else "the circuit's"
        said.append(
            f"Of {edges:,} edges {measured:,} were measured, {which}: what is said of edges is said of these."
        )
    if len(judged) < FEW:
        said.append(
            f"On {counted(len(judged), 'pair')} an interval for all edges at once is very wide: give {FEW} "
            "or more to see which have changed."
        )
    return tuple(filter(None, said))

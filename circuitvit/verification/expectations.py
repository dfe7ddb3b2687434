"""What a claim may expect to happen, and how each expectation is judged.

An expectation about a mean is judged on all such pairs by intervals and p-values, or on these pairs alone as
a fact; see `circuitvit.verification.hypotheses`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from circuitvit.engine import Evaluator
from circuitvit.errors import DataError, OptionError
from circuitvit.graph import Circuit, EdgeMask
from circuitvit.models import Model
from circuitvit.tasks.classes import class_indices, class_label
from circuitvit.tasks.metrics import ClassSpec
from circuitvit.verification.null import connected_circuits, edges_of_same_kind
from circuitvit.verification.statistics import (
    MIN_PAIRS,
    Bootstrap,
    Estimate,
    as_extreme,
    beyond_p,
    equivalence_p,
    mean_above,
    mean_interval,
    share_interval,
)
from circuitvit.verification.verdict import (
    ALL_PAIRS,
    REFUTED,
    SUPPORTED,
    THESE_PAIRS,
    UNDECIDED,
    of_rows,
    rank_verdict,
)


@dataclass(frozen=True)
class Falls:
    """The mean metric falls by at least `by`, in its own units."""

    by: float

    def __str__(self) -> str:
        return f"the metric falls by at least {self.by:g}"


@dataclass(frozen=True)
class Rises:
    """The mean metric rises by at least `by`, in its own units."""

    by: float

    def __str__(self) -> str:
        return f"the metric rises by at least {self.by:g}"


@dataclass(frozen=True)
class Flips:
    """The top class becomes `to` on more than a share of the pairs that start as `start`.

    Attributes:
        to: class, or set of classes, that the prediction should become.
        start: class or classes that it should be before; by default whatever it is, except `to`.
        share: of the pairs that start so, the share to be exceeded; on these pairs alone, to be reached.
    """

    to: ClassSpec
    start: ClassSpec | None = None
    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise OptionError(
                f"the share of pairs that flip lies above 0 and is at most 1, not {self.share!r}"
            )

    def __str__(self) -> str:
        begin = "" if self.start is None else f"from {_class(self.start)} "
        often = "" if self.share == 0.5 else f" on {self.share:.0%} of pairs"
        return f"the prediction flips {begin}to {_class(self.to)}{often}"


@dataclass(frozen=True)
class Unchanged:
    """The mean metric changes by less than `within`, up or down: shown, not merely left unrefuted."""

    within: float

    def __post_init__(self) -> None:
        if not self.within > 0:
            raise OptionError(f"the margin must be positive, in units of the metric, not {self.within!r}")

    def __str__(self) -> str:
        return f"the metric changes by less than {self.within:g}"


@dataclass(frozen=True)
class BeatsRandom:
    """The mean metric changes more, up or down, than when random edges of the same kind are ablated.

    Of the same kind: from and to the same kinds of node (input, head, MLP, logits), into the same port, at
    the same token group, as many of each. Edges that are a circuit by themselves (no dead edge among them)
    are compared with random connected circuits of their profile over stages, as in `verify`.

    Attributes:
        n: random sets to draw; where there are no more than that, each is taken once.
    """

    n: int = 99

    def __post_init__(self) -> None:
        if self.n < 1:
            raise OptionError(f"at least one random set is needed, not {self.n}")

    def __str__(self) -> str:
        return "the metric changes more than with random edges of the same kind"


Expectation = Falls | Rises | Flips | Unchanged | BeatsRandom


# -- how each is judged --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Case:
    """A claim on its way to a verdict.

    Attributes:
        evaluator: of the images and the ablation that it is tested on.
        edges: that it names.
        kept: the edges kept in the run that it is about.
        facts: whether it is about these pairs alone.
    """

    evaluator: Evaluator
    edges: Circuit
    kept: EdgeMask
    facts: bool
    alpha: float
    settings: Bootstrap
    clusters: Sequence[str] | None

    @property
    def change(self) -> NDArray[np.float64]:
        return self.evaluator.values(self.kept) - self.evaluator.whole

    def mean(self, values: NDArray[np.float64]) -> Estimate:
        if self.facts:
            return Estimate(float(values.mean()))
        return mean_interval(values, self.settings, self.clusters)

    def of_two(self, for_it: float, against: float) -> str:
        if for_it <= self.alpha:
            return SUPPORTED
        return REFUTED if against <= self.alpha else UNDECIDED


@dataclass(frozen=True)
class Found:
    """What is found of a claim; `check_hypotheses` adds what all verdicts have in common."""

    verdict: str
    reason: str
    statistic: str
    effect: Estimate
    p_value: float | None = None
    scope: str = ALL_PAIRS
    details: Mapping[str, Any] = field(default_factory=dict)


def judged(expect: Expectation, case: Case) -> Found:
    """What is found of an expectation in a case."""
    match expect:
        case Falls(by=by):
            return _moves(case, -case.change, by, "fall of the metric")
        case Rises(by=by):
            return _moves(case, case.change, by, "rise of the metric")
        case Unchanged(within=within):
            return _stays(case, within)
        case Flips():
            return _flips(case, expect)
        case BeatsRandom(n=n):
            return _beats(case, n)


def _moves(case: Case, move: NDArray[np.float64], by: float, name: str) -> Found:
    effect = case.mean(move)
    above = mean_above(move, by, case.settings, case.clusters)
    below = mean_above(-move, -by, case.settings, case.clusters)
    words = f"at least {by:g}", f"less than {by:g}", f"more or less than {by:g}"
    return _of_two(case, name, effect, effect.value >= by, (above, below), words)


def _stays(case: Case, within: float) -> Found:
    effect, room = case.mean(case.change), np.full_like(case.change, within)
    inside = equivalence_p(case.change, room, case.settings, case.clusters)
    beyond = beyond_p(case.change, room, case.settings, case.clusters)
    smaller, larger = f"smaller than {within:g} (two one-sided tests)", f"larger than {within:g}"
    words = smaller, larger, f"smaller or larger than {within:g}"
    return _of_two(case, "change of the metric", effect, abs(effect.value) < within, (inside, beyond), words)


def _of_two(
    case: Case,
    name: str,
    effect: Estimate,
    holds: bool,
    p_values: tuple[float | None, float | None],
    words: tuple[str, str, str],
) -> Found:
    """A claim on a mean, that `holds` on these pairs or not, from the p-values of its opposite and of itself;
    `words` say how large the mean is where the claim is supported, refuted and undecided."""
    n, (for_it, against) = len(case.evaluator), p_values
    if case.facts:
        return _fact(holds, f"The {name} is {effect.value:.4g}", name, effect, n)
    if for_it is None or against is None:
        return _too_few(case, name, effect, n)
    verdict = case.of_two(for_it, against)
    said = dict(zip((SUPPORTED, REFUTED, UNDECIDED), words, strict=True))[verdict]
    shown = "which may be" if verdict == UNDECIDED else "shown to be"
    reason = f"The {name} is {effect} on average, {shown} {said}."
    return Found(verdict, reason, name, effect, min(for_it, against))


def _flips(case: Case, flips: Flips) -> Found:
    model = case.evaluator.prepared.model
    if not model.chooses:
        raise OptionError(
            f"{model.name} has no classes, so nothing flips: claim that the metric falls or rises"
        )
    before, after = case.evaluator.tops(case.evaluator.graph.edge_mask), case.evaluator.tops(case.kept)
    name, goal = "share of pairs that flip", class_indices(model, flips.to)
    starts = ~np.isin(before, goal)
    if flips.start is not None:
        starts = np.isin(before, class_indices(model, flips.start))
    if not starts.any():
        reason = f"No pair starts as the claim says: the whole model sees {_seen(model, before)}."
        return Found(UNDECIDED, reason, name, Estimate(0.0), scope=THESE_PAIRS)
    hits = np.isin(after, goal)[starts]
    share, n = float(hits.mean()), len(hits)
    found = f"{int(hits.sum())} of {n} pairs flip (they become {_seen(model, after[starts])})"
    details = {"flipped": int(hits.sum()), "started": n}
    if case.facts:
        return _fact(share >= flips.share, found, name, Estimate(share), n, details)
    if n < MIN_PAIRS:
        return _too_few(case, name, Estimate(share), n)
    labels = of_rows(case.clusters, np.flatnonzero(starts))
    often, seldom, effect = _share_tests(case, hits, flips.share, labels)
    if often is None or seldom is None:
        return _too_few(case, name, effect, len(set(labels or ())))
    verdict = case.of_two(often, seldom)
    said = {SUPPORTED: "shown to be more than", REFUTED: "shown to be less than"}
    reason = f"{found}; {said.get(verdict, 'it may be more or less than')} {flips.share:.0%} in general."
    return Found(verdict, reason, name, effect, min(often, seldom), details=details)


def _beats(case: Case, n: int) -> Found:
    whole_circuit = len(case.edges) > 0 and case.edges == case.edges.pruned()
    kind = "connected circuits of its profile" if whole_circuit else "sets of edges of the same kind"
    draw = connected_circuits if whole_circuit else edges_of_same_kind
    drawn = draw(case.edges, n, case.settings.seed)
    if all(each == case.edges for each in drawn):
        raise DataError("there are no other edges of the same kind to compare with: state another claim")
    change, evaluator = case.change, case.evaluator
    others = np.abs((evaluator.many([(~each).kept for each in drawn]) - evaluator.whole).mean(axis=1))
    b = as_extreme(float(abs(change.mean())), others)
    name = "change of the metric"
    effect = Estimate(float(change.mean())) if len(evaluator) < MIN_PAIRS else case.mean(change)
    reason = (
        f"The {name} is {effect.value:.4g}; {b} of {len(drawn)} random {kind} "
        f"change it as much (on average by {others.mean():.4g} up or down)."
    )
    if 1 / (len(drawn) + 1) > case.alpha:
        reason += f" With only {len(drawn)} such sets no p-value can reach {case.alpha:g}."
    return Found(
        verdict=rank_verdict(b, len(drawn), case.alpha),
        reason=reason,
        statistic=name,
        effect=effect,
        p_value=(b + 1) / (len(drawn) + 1),
        scope="these pairs, against random edges",
        details={"random": len(drawn), "as_large": b, "random_mean": float(others.mean())},
    )


def _share_tests(
    case: Case, hits: NDArray[np.bool_], share: float, clusters: Sequence[str] | None
) -> tuple[float | None, float | None, Estimate]:
    """P-values of "at most this share" and of "at least", exact for independent pairs."""
    if clusters is None:
        often, seldom = (
            float(stats.binomtest(int(hits.sum()), len(hits), share, alternative=side).pvalue)
            for side in ("greater", "less")
        )
        return often, seldom, share_interval(hits, case.settings)
    marks = hits.astype(np.float64)
    return (
        mean_above(marks, share, case.settings, clusters),
        mean_above(-marks, -share, case.settings, clusters),
        mean_interval(marks, case.settings, clusters),
    )


def _fact(
    holds: bool, found: str, name: str, effect: Estimate, n: int, details: Mapping[str, Any] | None = None
) -> Found:
    verdict = SUPPORTED if holds else REFUTED
    pairs = "this pair" if n == 1 else f"these {n} pairs"
    reason = f"{found}: an exact statement about {pairs}; nothing is inferred about others."
    return Found(verdict, reason, name, effect, scope=THESE_PAIRS, details=details or {})


def _too_few(case: Case, name: str, effect: Estimate, n: int) -> Found:
    units = "pairs" if case.clusters is None else "clusters"
    reason = (
        f"The {name} is {effect.value:.4g}, but {n} {units} say nothing about all such pairs: it takes "
        f'{MIN_PAIRS}. Give more, or claim it of "these pairs" only.'
    )
    return Found(UNDECIDED, reason, name, effect)


def _seen(model: Model, tops: NDArray[np.int64]) -> str:
    return ", ".join(sorted({class_label(model, int(top)) for top in tops})[:3])


def _class(spec: ClassSpec) -> str:
    return " or ".join(map(str, spec)) if isinstance(spec, (list, tuple)) else str(spec)

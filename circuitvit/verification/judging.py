"""Judging hypotheses: run with and without the edges, and decide. See `circuitvit.verification`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from scipy import stats

from circuitvit.errors import DataError, OptionError
from circuitvit.graph import Circuit
from circuitvit.models import Model
from circuitvit.tasks import Task
from circuitvit.tasks.classes import class_index, class_label
from circuitvit.tasks.metrics import ClassSpec
from circuitvit.verification.bootstrap import (
    MIN_PAIRS,
    Bootstrap,
    Estimate,
    mean_above,
    mean_interval,
    share_interval,
)
from circuitvit.verification.hypothesis import (
    REFUTED,
    SUPPORTED,
    UNDECIDED,
    BeatsRandom,
    Falls,
    Flips,
    Hypothesis,
    Rises,
    Unchanged,
    Verdict,
)
from circuitvit.verification.kinds import edges_of_same_kind
from circuitvit.verification.meter import PairMeter
from circuitvit.verification.outcome import as_extreme, check_level, equivalence_p, rank_verdict
from circuitvit.verification.patterns import select_edges

_FROM_RANK = {"passed": SUPPORTED, "failed": REFUTED, "not enough evidence": UNDECIDED}


class Judged(NamedTuple):
    """What a rule says; the court adds what all verdicts have in common."""

    verdict: str
    reason: str
    statistic: str
    effect: Estimate
    p_value: float | None
    scope: str
    details: Mapping[str, Any]


class Court:
    """Tests any number of hypotheses about one model and task, and runs nothing twice.

    Args:
        model: from `load` or `wrap`.
        task: images, metric and ablation, where a hypothesis does not bring its own.
        alpha: level of significance.
        seed: of resampling and random edges.
        n_bootstrap: how often pairs are resampled.
        batch_size: pairs at once.
    """

    def __init__(
        self,
        model: Model,
        task: Task,
        *,
        alpha: float = 0.05,
        seed: int = 0,
        n_bootstrap: int = 1000,
        batch_size: int | None = None,
    ) -> None:
        check_level(alpha)
        self.model, self.task, self.alpha, self.seed = model, task, alpha, seed
        self.settings = Bootstrap(n_resamples=n_bootstrap, level=1 - 2 * alpha, seed=seed)
        self._batch_size = batch_size
        self._meters: list[tuple[Task, PairMeter]] = []

    def judge(self, hypothesis: Hypothesis, clusters: Sequence[str] | None = None) -> Verdict:
        """The verdict on one hypothesis.

        Raises:
            CircuitViTError: as `Hypothesis.test`.
        """
        meter = self._meter(hypothesis.task(self.task))
        edges = select_edges(meter.graph, hypothesis.edges)
        if clusters is not None and len(clusters) != len(meter):
            raise OptionError(f"{len(clusters)} clusters for {len(meter)} pairs: give one for each")
        facts = hypothesis.scope == "these pairs" or (hypothesis.scope is None and len(meter) == 1)
        judged = self._rule(hypothesis, meter, edges, facts, clusters)
        count = f"{len(edges)} edge{'' if len(edges) == 1 else 's'}"
        done = f"only {count} kept" if hypothesis.keep else f"{count} ablated"
        verb = "restoring" if meter.prepared.denoising else "ablation"
        return Verdict(
            claim=hypothesis.claim,
            verdict=judged.verdict,
            reason=judged.reason,
            expectation=str(hypothesis.expect),
            intervention=f"{done}, {meter.prepared.ablation.name} {verb}, {meter.prepared.metric.label}",
            statistic=judged.statistic,
            effect=judged.effect,
            p_value=judged.p_value,
            n=len(meter),
            alpha=self.alpha,
            scope=judged.scope,
            edges=len(edges),
            details=judged.details,
        )

    # -- the rules -------------------------------------------------------------------------------

    def _rule(
        self,
        hypothesis: Hypothesis,
        meter: PairMeter,
        edges: Circuit,
        facts: bool,
        clusters: Sequence[str] | None,
    ) -> Judged:
        kept = edges.kept if hypothesis.keep else (~edges).kept
        change = meter(kept) - meter.whole
        match hypothesis.expect:
            case Falls(by=by):
                return self._moves(-change, by, "fall of the metric", facts, clusters)
            case Rises(by=by):
                return self._moves(change, by, "rise of the metric", facts, clusters)
            case Unchanged(within=within):
                return self._stays(change, within, facts, clusters)
            case Flips() as flips:
                before, after = meter.tops(meter.graph.edge_mask), meter.tops(kept)
                return self._flips(flips, before, after, facts, clusters)
            case BeatsRandom(n=n):
                return self._beats(meter, edges, change, n, clusters)

    def _moves(
        self, move: NDArray[np.float64], by: float, name: str, facts: bool, clusters: Sequence[str] | None
    ) -> Judged:
        effect = self._mean(move, facts, clusters)
        if facts:
            verdict = SUPPORTED if effect.value >= by else REFUTED
            return Judged(
                verdict, _fact(f"The {name} is {effect.value:.4g}", move), name, effect, None, *_PAIRS
            )
        above = mean_above(move, by, self.settings, clusters)
        below = mean_above(-move, -by, self.settings, clusters)
        if above is None or below is None:
            return _too_few(name, effect, len(move), clusters)
        verdict = self._of_two(above, below)
        said = {
            SUPPORTED: f"shown to be at least {by:g}",
            REFUTED: f"shown to be less than {by:g}",
            UNDECIDED: f"which may be more or less than {by:g}",
        }
        reason = f"The {name} is {effect} on average, {said[verdict]}."
        return Judged(verdict, reason, name, effect, min(above, below), *_ALL)

    def _stays(
        self, change: NDArray[np.float64], within: float, facts: bool, clusters: Sequence[str] | None
    ) -> Judged:
        name, effect = "change of the metric", self._mean(change, facts, clusters)
        if facts:
            verdict = SUPPORTED if abs(effect.value) < within else REFUTED
            return Judged(
                verdict, _fact(f"The {name} is {effect.value:.4g}", change), name, effect, None, *_PAIRS
            )
        inside = equivalence_p(change, np.full_like(change, within), self.settings, clusters)
        outside = [mean_above(sign * change, within, self.settings, clusters) for sign in (1.0, -1.0)]
        beyond = [each for each in outside if each is not None]
        if inside is None or not beyond:
            return _too_few(name, effect, len(change), clusters)
        verdict = self._of_two(inside, min(beyond))
        said = {
            SUPPORTED: f"shown to be smaller than {within:g} (two one-sided tests)",
            REFUTED: f"shown to be larger than {within:g}",
            UNDECIDED: f"which may be smaller or larger than {within:g}",
        }
        reason = f"The {name} is {effect} on average, {said[verdict]}."
        return Judged(verdict, reason, name, effect, min(inside, *beyond), *_ALL)

    def _flips(
        self,
        flips: Flips,
        before: NDArray[np.int64],
        after: NDArray[np.int64],
        facts: bool,
        clusters: Sequence[str] | None,
    ) -> Judged:
        name, goal = "share of pairs that flip", self._classes(flips.to)
        starts = ~_among(before, goal) if flips.start is None else _among(before, self._classes(flips.start))
        if not starts.any():
            tops = ", ".join(sorted({class_label(self.model, int(top)) for top in before})[:3])
            reason = f"No pair starts as the claim says: the whole model sees {tops}."
            return Judged(UNDECIDED, reason, name, Estimate(0.0), None, "these pairs", {})
        hits = _among(after, goal)[starts]
        seen = ", ".join(sorted({class_label(self.model, int(top)) for top in after[starts]})[:3])
        found = f"{int(hits.sum())} of {len(hits)} pairs flip (they become {seen})"
        details = {"flipped": int(hits.sum()), "started": len(hits)}
        if facts:
            verdict = SUPPORTED if hits.mean() >= flips.share else REFUTED
            return Judged(
                verdict, _fact(found, hits), name, Estimate(float(hits.mean())), None, _PAIRS[0], details
            )
        if len(hits) < MIN_PAIRS:
            return _too_few(name, Estimate(float(hits.mean())), len(hits), clusters)
        labels = None if clusters is None else [clusters[row] for row in np.flatnonzero(starts).tolist()]
        often, seldom, effect = self._share_tests(hits, flips.share, labels)
        if often is None or seldom is None:
            return _too_few(name, effect, len(set(labels or ())), clusters)
        verdict = self._of_two(often, seldom)
        reason = f"{found}; {_more(verdict)} {flips.share:.0%} in general."
        return Judged(verdict, reason, name, effect, min(often, seldom), _ALL[0], details)

    def _beats(
        self,
        meter: PairMeter,
        edges: Circuit,
        change: NDArray[np.float64],
        n: int,
        clusters: Sequence[str] | None,
    ) -> Judged:
        drawn = edges_of_same_kind(edges, n, self.seed)
        if not drawn:
            raise DataError("there are no other edges of the same kind to compare with: state another claim")
        others = np.abs((meter.many([(~each).kept for each in drawn]) - meter.whole).mean(axis=1))
        own = float(abs(change.mean()))
        b = as_extreme(own, others)
        verdict = _FROM_RANK[rank_verdict(b, len(drawn), self.alpha)]
        name, effect = "change of the metric", self._mean(change, len(meter) < MIN_PAIRS, clusters)
        reason = (
            f"The {name} is {effect.value:.4g}; {b} of {len(drawn)} random sets of edges of the same kind "
            f"change it as much (on average by {others.mean():.4g} up or down)."
        )
        if 1 / (len(drawn) + 1) > self.alpha:
            reason += f" With only {len(drawn)} such sets no p-value can reach {self.alpha:g}."
        details = {"random": len(drawn), "as_large": b, "random_mean": float(others.mean())}
        p_value = (b + 1) / (len(drawn) + 1)
        return Judged(verdict, reason, name, effect, p_value, "these pairs, against random edges", details)

    # -- shared ----------------------------------------------------------------------------------

    def _of_two(self, for_it: float, against: float) -> str:
        if for_it <= self.alpha:
            return SUPPORTED
        return REFUTED if against <= self.alpha else UNDECIDED

    def _share_tests(
        self, hits: Bool[NDArray[np.bool_], " pair"], share: float, clusters: Sequence[str] | None
    ) -> tuple[float | None, float | None, Estimate]:
        """P-values of "at most this share" and of "at least", exact for independent pairs."""
        if clusters is None:
            count, n = int(hits.sum()), len(hits)
            often, seldom = (
                float(stats.binomtest(count, n, share, alternative=side).pvalue)
                for side in ("greater", "less")
            )
            return often, seldom, share_interval(hits, self.settings)
        marks = hits.astype(np.float64)
        often = mean_above(marks, share, self.settings, clusters)  # type: ignore[assignment]
        seldom = mean_above(-marks, -share, self.settings, clusters)  # type: ignore[assignment]
        return often, seldom, mean_interval(marks, self.settings, clusters)

    def _mean(
        self, values: Float[NDArray[np.float64], " pair"], facts: bool, clusters: Sequence[str] | None
    ) -> Estimate:
        return Estimate(float(values.mean())) if facts else mean_interval(values, self.settings, clusters)

    def _classes(self, spec: ClassSpec) -> list[int]:
        wanted = [spec] if isinstance(spec, (int, str)) else list(spec)
        return [class_index(self.model, each) for each in wanted]

    def _meter(self, task: Task) -> PairMeter:
        for known, meter in self._meters:
            if known is task:
                return meter
        meter = PairMeter(task.prepare(self.model), batch_size=self._batch_size)
        self._meters.append((task, meter))
        return meter


def judge_all(court: Court, hypotheses: Sequence[Hypothesis]) -> tuple[Verdict, ...]:
    """The verdicts on several hypotheses, in their order."""
    return tuple(court.judge(each) for each in hypotheses)


_PAIRS: tuple[str, Mapping[str, Any]] = ("these pairs", {})
_ALL: tuple[str, Mapping[str, Any]] = ("all such pairs", {})


def _fact(found: str, values: NDArray[Any]) -> str:
    pairs = "this pair" if len(values) == 1 else f"these {len(values)} pairs"
    return f"{found}: an exact statement about {pairs}; nothing is inferred about others."


def _more(verdict: str) -> str:
    said = {SUPPORTED: "shown to be more than", REFUTED: "shown to be less than"}
    return said.get(verdict, "it may be more or less than")


def _too_few(name: str, effect: Estimate, n: int, clusters: Sequence[str] | None) -> Judged:
    units = "pairs" if clusters is None else "clusters"
    reason = (
        f"The {name} is {effect.value:.4g}, but {n} {units} say nothing about all such pairs: it takes "
        f'{MIN_PAIRS}. Give more, or claim it of "these pairs" only.'
    )
    return Judged(UNDECIDED, reason, name, effect, None, *_ALL)


def _among(tops: NDArray[np.int64], classes: Sequence[int]) -> NDArray[np.bool_]:
    return np.isin(tops, classes)

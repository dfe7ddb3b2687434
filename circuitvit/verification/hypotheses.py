"""Hypotheses as code: which edges are ablated, how, on which images, and what should happen.

A claim is written down before it is tested, and can turn out false:

    cv.Hypothesis(
        "head 1 of the last layer writes the cat",
        edges="a11.h1 -> logits",
        expect=Falls(by=0.5),
    ).test(model, task)

*Supported* means that the opposite was refuted at level alpha, *refuted* that the claim itself was; what lies
between is *not enough evidence*. Either error has at most probability alpha. Two kinds of claim are told
apart:

* about *all such pairs*, of which those at hand are a sample: this takes at least 5 pairs, and gives an
  interval and a p-value;
* about *these pairs* alone: a fact that is computed, not inferred, so it is exact and has no p-value. A
  claim tested on one pair is of this kind, and its verdict says so.

Claims that compare with random edges are exact for any number of pairs, as there the edges are drawn.
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
from circuitvit.tasks import Ablation, PreparedTask, Task, as_task, prepare
from circuitvit.tasks.ablations import as_ablation, same_ablation
from circuitvit.tasks.classes import class_indices, class_label
from circuitvit.tasks.images import ImageSpec
from circuitvit.tasks.metrics import ClassSpec
from circuitvit.verification.null import connected_circuits, edges_of_same_kind
from circuitvit.verification.patterns import EdgesLike, select_edges
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
    SCOPES,
    SUPPORTED,
    THESE_PAIRS,
    UNDECIDED,
    Verdict,
    check_clusters,
    check_level,
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


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """A claim about what some edges do.

    Attributes:
        claim: in words.
        edges: one or several patterns (see `circuitvit.verification.patterns`) or circuits.
        expect: what should happen: `Falls`, `Rises`, `Flips`, `Unchanged` or `BeatsRandom`.
        keep: False: these edges are ablated. True: all others are, so the claim is about the edges alone.
        ablation: instead of the task's.
        clean: images instead of the task's.
        corrupt: their counterfactuals.
        scope: "all such pairs" or "these pairs"; by default the latter for a single pair, else the former.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> model = cv.load("catdog-tiny")
        >>> task = cv.Task(*catdog_pairs(8), metric=cv.logit_diff("cat", "dog"))
        >>> Hypothesis("the last MLP speaks for the cat", "m3 -> logits", Falls(by=1.0)).test(
        ...     model, task
        ... ).verdict
        'supported'
        >>> nothing = Hypothesis("the image alone says nothing", "input -> logits", Unchanged(within=0.1))
        >>> nothing.test(model, task).verdict
        'supported'
    """

    claim: str
    edges: EdgesLike
    expect: Expectation
    keep: bool = False
    ablation: Ablation | str | None = None
    clean: ImageSpec | None = None
    corrupt: ImageSpec | None = None
    scope: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.expect, Expectation):
            raise OptionError(
                f"{self.claim!r}: expect Falls, Rises, Flips, Unchanged or BeatsRandom, not {self.expect!r}"
            )
        if self.scope is not None and self.scope not in SCOPES:
            raise OptionError(f"a claim is about {' or '.join(map(repr, SCOPES))}, not {self.scope!r}")
        if self.ablation is not None:
            object.__setattr__(self, "ablation", as_ablation(self.ablation))
        if self.keep and isinstance(self.expect, BeatsRandom):
            raise OptionError(
                f"{self.claim!r}: what random circuits keep is asked by verify(), not by BeatsRandom"
            )

    def test(
        self,
        model: Model,
        task: Task | PreparedTask,
        *,
        alpha: float = 0.05,
        seed: int = 0,
        n_bootstrap: int = 1000,
        clusters: Sequence[str] | None = None,
        batch_size: int | None = None,
        memory: int | None = None,
    ) -> Verdict:
        """Run the model with and without the edges, and judge. Several claims: `check_hypotheses`.

        Args:
            model: from `load` or `wrap`.
            task: images, metric and ablation, where the hypothesis does not bring its own.
            alpha: level of significance.
            seed: of resampling and random edges.
            n_bootstrap: how often pairs are resampled.
            clusters: which cluster (photograph, class) each pair belongs to.
            batch_size: pairs at once.
            memory: budget of everything that is kept between runs, in bytes.

        Raises:
            NameNotFoundError: if a pattern names no edge, or a class is unknown.
            OptionError: if a circuit belongs to another graph, the task was prepared for another model, or a
                setting makes no sense.
            DataError: if the images cannot be used.
        """
        (verdict,) = check_hypotheses(
            model, task, [self], alpha=alpha, seed=seed, n_bootstrap=n_bootstrap, clusters=clusters,
            batch_size=batch_size, memory=memory,
        )  # fmt: skip
        return verdict


def check_hypotheses(
    model: Model,
    task: Task | PreparedTask,
    hypotheses: Sequence[Hypothesis],
    *,
    alpha: float = 0.05,
    seed: int = 0,
    n_bootstrap: int = 1000,
    clusters: Sequence[str] | None = None,
    batch_size: int | None = None,
    memory: int | None = None,
) -> tuple[Verdict, ...]:
    """The verdicts on several claims, in their order.

    Claims under the same ablation and on the same images share one evaluator, which runs nothing twice. They
    are tested together, and what the evaluator holds is let go before the next ones, so that one memory
    budget is enough however many ablations the claims bring.

    Args: as `Hypothesis.test`.

    Raises:
        CircuitViTError: as `Hypothesis.test`.

    Example:
        >>> file = read_hypotheses("claims.yaml")  # doctest: +SKIP
        >>> [each.verdict for each in check_hypotheses(model, task, file.hypotheses)]  # doctest: +SKIP
        ['supported', 'refuted']
    """
    check_level(alpha)
    settings = Bootstrap(n_resamples=n_bootstrap, level=1 - 2 * alpha, seed=seed)
    alike: list[tuple[dict[str, Any], list[int]]] = []
    for place, each in enumerate(hypotheses):
        changes = _changes(each, task)
        for others, places in alike:
            same = (same_ablation(changes[key], others.get(key)) for key in changes)
            if changes.keys() == others.keys() and all(same):
                places.append(place)
                break
        else:
            alike.append((changes, [place]))
    verdicts: dict[int, Verdict] = {}
    for changes, places in alike:
        evaluator = Evaluator(_prepared(model, task, changes), batch_size=batch_size, memory=memory)
        for place in places:
            verdicts[place] = _check(hypotheses[place], evaluator, alpha, settings, clusters)
    return tuple(verdicts[place] for place in range(len(hypotheses)))


# -- inside --------------------------------------------------------------------------------------


def _prepared(model: Model, task: Task | PreparedTask, changes: Mapping[str, Any]) -> PreparedTask:
    if not changes:
        return prepare(model, task)
    plain = task if isinstance(task, Task) else as_task(prepare(model, task))
    return prepare(model, plain.with_options(**changes))


def _changes(hypothesis: Hypothesis, task: Task | PreparedTask) -> dict[str, Any]:
    """The options of `Task.with_options` that the claim brings, where they are not the task's own."""
    found: dict[str, Any] = {} if hypothesis.ablation is None else {"ablation": hypothesis.ablation}
    if hypothesis.clean is not None:
        found.update(clean=hypothesis.clean, corrupt=hypothesis.corrupt)
    elif hypothesis.corrupt is not None:
        found["corrupt"] = hypothesis.corrupt
    return {} if all(same_ablation(getattr(task, key), value) for key, value in found.items()) else found


@dataclass(frozen=True, eq=False)
class _Case:
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
class _Found:
    """What a rule says; `_check` adds what all verdicts have in common."""

    verdict: str
    reason: str
    statistic: str
    effect: Estimate
    p_value: float | None = None
    scope: str = ALL_PAIRS
    details: Mapping[str, Any] = field(default_factory=dict)


def _check(
    hypothesis: Hypothesis,
    evaluator: Evaluator,
    alpha: float,
    settings: Bootstrap,
    clusters: Sequence[str] | None,
) -> Verdict:
    edges, n = select_edges(evaluator.graph, hypothesis.edges), len(evaluator)
    check_clusters(clusters, n)
    facts = hypothesis.scope == THESE_PAIRS or (hypothesis.scope is None and n == 1)
    kept = edges.kept if hypothesis.keep else (~edges).kept
    found = _rule(hypothesis.expect, _Case(evaluator, edges, kept, facts, alpha, settings, clusters))
    count = f"{len(edges)} edge{'' if len(edges) == 1 else 's'}"
    done = f"only {count} kept" if hypothesis.keep else f"{count} ablated"
    prepared = evaluator.prepared
    verb = "restoring" if prepared.denoising else "ablation"
    return Verdict(
        claim=hypothesis.claim,
        verdict=found.verdict,
        reason=found.reason,
        expectation=str(hypothesis.expect),
        statistic=found.statistic,
        effect=found.effect,
        p_value=found.p_value,
        n=n,
        alpha=alpha,
        scope=found.scope,
        intervention=f"{done}, {prepared.ablation.name} {verb}, {prepared.metric.label}",
        edges=len(edges),
        details=found.details,
    )


def _rule(expect: Expectation, case: _Case) -> _Found:
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


def _moves(case: _Case, move: NDArray[np.float64], by: float, name: str) -> _Found:
    effect = case.mean(move)
    above = mean_above(move, by, case.settings, case.clusters)
    below = mean_above(-move, -by, case.settings, case.clusters)
    words = f"at least {by:g}", f"less than {by:g}", f"more or less than {by:g}"
    return _of_two(case, name, effect, effect.value >= by, (above, below), words)


def _stays(case: _Case, within: float) -> _Found:
    effect, room = case.mean(case.change), np.full_like(case.change, within)
    inside = equivalence_p(case.change, room, case.settings, case.clusters)
    beyond = beyond_p(case.change, room, case.settings, case.clusters)
    smaller, larger = f"smaller than {within:g} (two one-sided tests)", f"larger than {within:g}"
    words = smaller, larger, f"smaller or larger than {within:g}"
    return _of_two(case, "change of the metric", effect, abs(effect.value) < within, (inside, beyond), words)


def _of_two(
    case: _Case,
    name: str,
    effect: Estimate,
    holds: bool,
    p_values: tuple[float | None, float | None],
    words: tuple[str, str, str],
) -> _Found:
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
    return _Found(verdict, reason, name, effect, min(for_it, against))


def _flips(case: _Case, flips: Flips) -> _Found:
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
        return _Found(UNDECIDED, reason, name, Estimate(0.0), scope=THESE_PAIRS)
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
    return _Found(verdict, reason, name, effect, min(often, seldom), details=details)


def _beats(case: _Case, n: int) -> _Found:
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
    return _Found(
        verdict=rank_verdict(b, len(drawn), case.alpha),
        reason=reason,
        statistic=name,
        effect=effect,
        p_value=(b + 1) / (len(drawn) + 1),
        scope="these pairs, against random edges",
        details={"random": len(drawn), "as_large": b, "random_mean": float(others.mean())},
    )


def _share_tests(
    case: _Case, hits: NDArray[np.bool_], share: float, clusters: Sequence[str] | None
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
) -> _Found:
    verdict = SUPPORTED if holds else REFUTED
    pairs = "this pair" if n == 1 else f"these {n} pairs"
    reason = f"{found}: an exact statement about {pairs}; nothing is inferred about others."
    return _Found(verdict, reason, name, effect, scope=THESE_PAIRS, details=details or {})


def _too_few(case: _Case, name: str, effect: Estimate, n: int) -> _Found:
    units = "pairs" if case.clusters is None else "clusters"
    reason = (
        f"The {name} is {effect.value:.4g}, but {n} {units} say nothing about all such pairs: it takes "
        f'{MIN_PAIRS}. Give more, or claim it of "these pairs" only.'
    )
    return _Found(UNDECIDED, reason, name, effect)


def _seen(model: Model, tops: NDArray[np.int64]) -> str:
    return ", ".join(sorted({class_label(model, int(top)) for top in tops})[:3])


def _class(spec: ClassSpec) -> str:
    return " or ".join(map(str, spec)) if isinstance(spec, (list, tuple)) else str(spec)

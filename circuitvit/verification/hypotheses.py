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
from dataclasses import dataclass
from typing import Any

from circuitvit._keywords import running
from circuitvit.engine import Evaluator
from circuitvit.errors import OptionError, counted
from circuitvit.models import Model
from circuitvit.tasks import Ablation, PreparedTask, Task, as_task, prepare
from circuitvit.tasks.ablations import as_ablation, same_ablation
from circuitvit.tasks.images import ImageSpec
from circuitvit.verification.expectations import BeatsRandom, Case, Expectation, judged
from circuitvit.verification.patterns import EdgesLike, select_edges
from circuitvit.verification.statistics import Bootstrap
from circuitvit.verification.verdict import SCOPES, THESE_PAIRS, Verdict, check_clusters, check_level


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
        >>> Hypothesis("the last MLP speaks for the cat", "m3 -> logits", cv.Falls(by=1.0)).test(
        ...     model, task
        ... ).verdict
        'supported'
        >>> nothing = Hypothesis("the image alone says nothing", "input -> logits", cv.Unchanged(0.1))
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

    @running
    def test(
        self,
        model: Model,
        task: Task | PreparedTask,
        *,
        alpha: float = 0.05,
        n_bootstrap: int = 1000,
        clusters: Sequence[str] | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        memory: int | str | None = None,
        progress: bool = True,
    ) -> Verdict:
        """Run the model with and without the edges, and judge. Several claims: `check_hypotheses`.

        Args:
            model: from `load` or `wrap`.
            task: images, metric and ablation, where the hypothesis does not bring its own.
            alpha: level of significance.
            n_bootstrap: how often pairs are resampled.
            clusters: which cluster (photograph, class) each pair belongs to.
            seed: of resampling and random edges.
            batch_size: pairs at once; by default what `memory` allows.
            memory: bytes that a batch, and what is kept between runs, may take.
            progress: whether to show a bar.

        Raises:
            NameNotFoundError: if a pattern names no edge, or a class is unknown.
            OptionError: if a circuit belongs to another graph, the task was prepared for another model, or a
                setting makes no sense.
            DataError: if the images cannot be used.
        """
        (verdict,) = check_hypotheses(
            model, task, [self], alpha=alpha, seed=seed, n_bootstrap=n_bootstrap, clusters=clusters,
            batch_size=batch_size, memory=memory, progress=progress,
        )  # fmt: skip
        return verdict


@running
def check_hypotheses(
    model: Model,
    task: Task | PreparedTask,
    hypotheses: Sequence[Hypothesis],
    *,
    alpha: float = 0.05,
    n_bootstrap: int = 1000,
    clusters: Sequence[str] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    memory: int | str | None = None,
    progress: bool = True,
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
        evaluator = Evaluator(
            _prepared(model, task, changes), batch_size=batch_size, memory=memory, progress=progress
        )
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
    found = judged(hypothesis.expect, Case(evaluator, edges, kept, facts, alpha, settings, clusters))
    count = counted(len(edges), "edge")
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

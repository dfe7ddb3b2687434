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
from typing import TYPE_CHECKING, Any

from circuitvit.errors import OptionError
from circuitvit.graph import Circuit
from circuitvit.models import Model
from circuitvit.tasks import Ablation, Task
from circuitvit.tasks.ablations import as_ablation
from circuitvit.tasks.metrics import ClassSpec
from circuitvit.verification.bootstrap import Estimate

if TYPE_CHECKING:
    from circuitvit.tasks.task import ImageSpec

SUPPORTED = "supported"
REFUTED = "refuted"
UNDECIDED = "not enough evidence"

SCOPES = ("all such pairs", "these pairs")


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
    the same token group, as many of each.

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


@dataclass(frozen=True)
class Verdict:
    """What a test says about a claim.

    Attributes:
        claim: that was tested.
        verdict: "supported", "refuted" or "not enough evidence".
        reason: why, in plain sentences.
        expectation: what should have happened.
        intervention: what was done.
        statistic: what `effect` measures.
        effect: its value, with an interval where there are pairs enough, for a claim about all such pairs.
        p_value: of the null hypothesis that the verdict rejects, or came nearest to rejecting; None for facts
            about these pairs.
        n: how many pairs.
        alpha: level of significance.
        scope: "all such pairs", "these pairs", or "these pairs, against random edges".
        edges: how many edges were ablated (or kept).
        details: further numbers, JSON values.

    Example:
        >>> print(Verdict("m0 matters", "supported", "It does.", "", "", "change", Estimate(-2.0), None, 1))
        supported: m0 matters (change -2.000, n = 1)
    """

    claim: str
    verdict: str
    reason: str
    expectation: str
    intervention: str
    statistic: str
    effect: Estimate
    p_value: float | None
    n: int
    alpha: float = 0.05
    scope: str = "these pairs"
    edges: int = 0
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def supported(self) -> bool:
        return self.verdict == SUPPORTED

    @property
    def refuted(self) -> bool:
        return self.verdict == REFUTED

    def __str__(self) -> str:
        p_value = "" if self.p_value is None else f", p = {self.p_value:.2g}"
        return f"{self.verdict}: {self.claim} ({self.statistic} {self.effect}{p_value}, n = {self.n})"


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
    edges: str | Circuit | Sequence[str | Circuit]
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
        task: Task,
        *,
        alpha: float = 0.05,
        seed: int = 0,
        n_bootstrap: int = 1000,
        clusters: Sequence[str] | None = None,
        batch_size: int | None = None,
    ) -> Verdict:
        """Run the model with and without the edges, and judge.

        Args:
            model: from `load` or `wrap`.
            task: images, metric and ablation, where the hypothesis does not bring its own.
            alpha: level of significance.
            seed: of resampling and random edges.
            n_bootstrap: how often pairs are resampled.
            clusters: which cluster (photograph, class) each pair belongs to.
            batch_size: pairs at once.

        Raises:
            NameNotFoundError: if a pattern names no edge, or a class is unknown.
            OptionError: if a circuit belongs to another graph, or a setting makes no sense.
            DataError: if the images cannot be used.
        """
        from circuitvit.verification.judging import Court  # it gives verdicts on these dataclasses

        court = Court(model, task, alpha=alpha, seed=seed, n_bootstrap=n_bootstrap, batch_size=batch_size)
        return court.judge(self, clusters)

    def task(self, task: Task) -> Task:
        """The task with the images and the ablation of this hypothesis."""
        changes: dict[str, Any] = {}
        if self.ablation is not None:
            changes["ablation"] = self.ablation
        if self.clean is not None:
            changes.update(clean=self.clean, corrupt=self.corrupt)
        elif self.corrupt is not None:
            changes["corrupt"] = self.corrupt
        return task.with_options(**changes) if changes else task


def _class(spec: ClassSpec) -> str:
    return " or ".join(map(str, spec)) if isinstance(spec, (list, tuple)) else str(spec)

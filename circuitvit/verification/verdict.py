"""What one hypothesis test says, about a circuit or about a claim, and how tests are run.

*Supported* means that the opposite was refuted at level alpha, *refuted* that the claim itself was; what lies
between is *not enough evidence*. Either error has at most probability alpha.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from circuitvit.errors import OptionError
from circuitvit.graph.results import Record, Result
from circuitvit.verification.statistics import Bootstrap, Estimate, estimated

SUPPORTED = "supported"
REFUTED = "refuted"
UNDECIDED = "not enough evidence"

PASSED = "passed"
FAILED = "failed"

ALL_PAIRS = "all such pairs"
THESE_PAIRS = "these pairs"
SCOPES = (ALL_PAIRS, THESE_PAIRS)


@dataclass(frozen=True)
class Verdict(Result):
    """What a hypothesis test says.

    Attributes:
        claim: that was tested: the name of a test of `audit`, or a claim in words.
        verdict: "supported", "refuted" or "not enough evidence".
        reason: why, in plain sentences.
        expectation: what should be so if the claim is true.
        statistic: what `effect` measures.
        effect: its value, with an interval where there are pairs enough, for a claim about all such pairs.
        p_value: of the null hypothesis that the verdict rejects, or came nearest to rejecting; None for facts
            about these pairs.
        n: how many pairs.
        alpha: level of significance.
        scope: "all such pairs", "these pairs", or what else the statement is about.
        intervention: what was done.
        edges: how many edges were ablated (or kept).
        null: the null hypothesis, where the test has a fixed one.
        assumes: what has to be true for the p-value to be one.
        source: where the test comes from.
        power: how likely the test was to decide; None where unknown.
        decisive: whether a report's conclusion rests on it.
        details: further numbers, JSON values.

    Example:
        >>> print(Verdict("m0 matters", "supported", "It does.", "", "change", Estimate(-2.0), None, 1))
        supported: m0 matters (change -2.000, n = 1)
    """

    claim: str
    verdict: str
    reason: str
    expectation: str
    statistic: str
    effect: Estimate
    p_value: float | None
    n: int
    alpha: float = 0.05
    scope: str = THESE_PAIRS
    intervention: str = ""
    edges: int = 0
    null: str = ""
    assumes: str = ""
    source: str = ""
    power: float | None = None
    decisive: bool = True
    details: Mapping[str, Any] = field(default_factory=dict)

    def records(self) -> Iterator[Record]:
        """One row: `claim`, `verdict`, `statistic`, its value (`effect`) and the ends of its interval,
        `p_value`, the number of pairs `n`, `alpha` and `scope`."""
        yield {
            "claim": self.claim,
            "verdict": self.verdict,
            "statistic": self.statistic,
            **estimated("effect", self.effect),
            "p_value": self.p_value,
            "n": self.n,
            "alpha": self.alpha,
            "scope": self.scope,
        }

    @property
    def supported(self) -> bool:
        return self.verdict == SUPPORTED

    @property
    def refuted(self) -> bool:
        return self.verdict == REFUTED

    def __str__(self) -> str:
        p_value = "" if self.p_value is None else f", p = {self.p_value:.2g}"
        return f"{self.verdict}: {self.claim} ({self.statistic} {self.effect}{p_value}, n = {self.n})"


@dataclass(frozen=True)
class AuditSettings:
    """How the tests of a circuit are run.

    Attributes:
        alpha: level of significance of each test.
        margin: of equivalence, as a share of the behaviour.
        completeness_margin: of completeness, likewise.
        n_random: random connected circuits, for sufficiency.
        n_others: random circuits of the rest of the model, for necessity; 89 make its exact level 4.97 %.
        n_paths: random knock-outs, for minimality; 0 leaves minimality and completeness out, which take most
            of the time.
        n_bootstrap: how often pairs are resampled.
        seed: of everything random.

    Raises:
        OptionError: if the level or a margin makes no sense.
    """

    alpha: float = 0.05
    margin: float = 0.2
    completeness_margin: float = 0.3
    n_random: int = 99
    n_others: int = 89
    n_paths: int = 199
    n_bootstrap: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        check_level(self.alpha)
        if not min(self.margin, self.completeness_margin) > 0:
            raise OptionError(f"a margin is a positive share of the behaviour, not {self.margin!r}")

    @property
    def draws(self) -> Bootstrap:
        """How intervals and p-values of means are made."""
        return Bootstrap(n_resamples=self.n_bootstrap, seed=self.seed)


def conclusion(verdicts: Sequence[Verdict]) -> tuple[str, str]:
    """What the decisive tests say together: "passed", "failed" or "not enough evidence", and why.

    Failed as soon as one is refuted; passed when all are supported.

    Example:
        >>> conclusion([])
        ('not enough evidence', 'No test was made.')
    """
    decisive = [each for each in verdicts if each.decisive]
    if not decisive:
        return UNDECIDED, "No test was made."
    words = {REFUTED: FAILED, UNDECIDED: UNDECIDED, SUPPORTED: PASSED}
    worst = next(word for word in words if any(each.verdict == word for each in decisive))
    reasons = [f"{each.claim.capitalize()}: {each.reason}" for each in decisive if each.verdict == worst]
    return words[worst], " ".join(reasons)


def check_level(alpha: float) -> None:
    """Refuse a level of significance that is none.

    Raises:
        OptionError: if it does not lie between 0 and 0.5.
    """
    if not 0 < alpha < 0.5:
        raise OptionError(f"the level of significance lies between 0 and 0.5, not {alpha!r}")


def check_clusters(clusters: Sequence[str] | None, n: int) -> None:
    """Refuse clusters that do not fit the pairs.

    Raises:
        OptionError: if there is not one for each pair.
    """
    given: object = clusters
    if given is not None and (isinstance(given, str) or not isinstance(given, Sized)):
        raise OptionError(f"clusters are a list with one for each pair, not {given!r}")
    if clusters is not None and len(clusters) != n:
        raise OptionError(f"{len(clusters)} clusters for {n} pairs: give one for each")


def of_rows(clusters: Sequence[str] | None, rows: NDArray[np.intp]) -> list[str] | None:
    """The clusters of some pairs."""
    return None if clusters is None else [clusters[row] for row in rows]


def rank_verdict(b: int, n: int, alpha: float) -> str:
    """A verdict on "the circuit does better than random draws" from `b` of `n` that do as well.

    Supported when `(b + 1) / (n + 1) <= alpha`. Refuted when a share of `alpha` of draws as good is refuted
    from the other side (exact binomial test): there are too many of them to blame bad luck.

    Example:
        >>> [rank_verdict(b, 99, 0.05) for b in (4, 7, 20)]
        ['supported', 'not enough evidence', 'refuted']
    """
    if (b + 1) / (n + 1) <= alpha:
        return SUPPORTED
    if n and stats.binomtest(b, n, alpha, alternative="greater").pvalue <= alpha:
        return REFUTED
    return UNDECIDED


def share_verdict(b: int, n: int, share: float, alpha: float) -> str:
    """A verdict on "fewer than this share of random draws do as well", from `b` of `n`: exact binomial tails.

    Example:
        >>> [share_verdict(b, 99, 0.1, 0.05) for b in (3, 10, 30)]
        ['supported', 'not enough evidence', 'refuted']
    """
    if not n:
        return UNDECIDED
    if stats.binom.cdf(b, n, share) <= alpha:
        return SUPPORTED
    return REFUTED if stats.binom.sf(b - 1, n, share) <= alpha else UNDECIDED

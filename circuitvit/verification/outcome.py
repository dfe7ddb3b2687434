"""The result of one test of a circuit, and the arithmetic that several tests share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from circuitvit.errors import OptionError
from circuitvit.verification.bootstrap import MIN_PAIRS, Bootstrap, Estimate, cluster_sums, mean_above

PASSED = "passed"
FAILED = "failed"
UNDECIDED = "not enough evidence"

TIE = 1e-9
"""Relative to the larger of two figures: closer ones are equal, and differ by rounding."""


@dataclass(frozen=True)
class Outcome:
    """What one test says about a circuit.

    Attributes:
        name: of the test.
        verdict: "passed", "failed" or "not enough evidence".
        reason: why, in one or two plain sentences.
        question: what was asked.
        null: the null hypothesis.
        statistic: what `effect` measures.
        effect: its value, with an interval where there are pairs enough for one.
        p_value: of the null hypothesis; None where there is none.
        n: how many pairs.
        alpha: the level that the p-value was compared with.
        power: how likely the test was to decide, see the test; None where unknown.
        assumes: what has to be true for the p-value to be one.
        source: where the test comes from.
        decisive: whether the report's conclusion rests on it.
        details: numbers of this test only, JSON values.
    """

    name: str
    verdict: str
    reason: str
    question: str
    null: str
    statistic: str
    effect: Estimate
    p_value: float | None
    n: int
    alpha: float
    power: float | None = None
    assumes: str = ""
    source: str = ""
    decisive: bool = True
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return self.verdict == PASSED

    def __str__(self) -> str:
        p_value = "" if self.p_value is None else f", p = {self.p_value:.2g}"
        return f"{self.name}: {self.verdict} ({self.statistic} {self.effect}{p_value}, n = {self.n})"


def check_level(alpha: float) -> None:
    """Refuse a level of significance that is none.

    Raises:
        OptionError: if it does not lie between 0 and 0.5.
    """
    if not 0 < alpha < 0.5:
        raise OptionError(f"the level of significance lies between 0 and 0.5, not {alpha!r}")


def check_margin(margin: float) -> None:
    """Refuse a margin of equivalence that is none.

    Raises:
        OptionError: if it is not positive.
    """
    if not margin > 0:
        raise OptionError(f"the margin is a positive share of the behaviour, not {margin!r}")


def conclusion(outcomes: Sequence[Outcome]) -> tuple[str, str]:
    """What the decisive tests say together: a verdict, and why in plain sentences.

    Failed as soon as one failed; passed when all passed; else there is not enough evidence.

    Example:
        >>> conclusion([])
        ('not enough evidence', 'No test was made.')
    """
    decisive = [outcome for outcome in outcomes if outcome.decisive]
    if not decisive:
        return UNDECIDED, "No test was made."
    for verdict in (FAILED, UNDECIDED):
        found = [outcome for outcome in decisive if outcome.verdict == verdict]
        if found:
            return verdict, " ".join(f"{each.name.capitalize()}: {each.reason}" for each in found)
    return PASSED, " ".join(f"{each.name.capitalize()}: {each.reason}" for each in decisive)


# -- against random draws ------------------------------------------------------------------------


def as_extreme(own: float, others: ArrayLike) -> int:
    """How many of the others are at least as large as the own figure; ties count against it.

    Example:
        >>> as_extreme(2.0, [1.0, 2.0, 2.0 + 1e-15, 3.0])
        3
    """
    drawn = np.asarray(others, dtype=np.float64)
    slack = TIE * max(abs(own), float(np.abs(drawn).max(initial=0.0)))
    return int((drawn >= own - slack).sum())


def rank_p(own: float, others: ArrayLike) -> float:
    """The Monte Carlo p-value `(b + 1) / (n + 1)`, exact when own and others are exchangeable.

    `b / n` would be too small and can be 0 (Phipson and Smyth 2010, "Permutation p-values should never be
    zero"). As ties count against the own figure, the test is conservative when there are many.

    Example:
        >>> rank_p(5.0, range(5))
        0.16666666666666666
    """
    drawn = np.asarray(others, dtype=np.float64)
    return (as_extreme(own, drawn) + 1) / (len(drawn) + 1)


def rank_verdict(b: int, n: int, alpha: float) -> str:
    """A verdict from `b` of `n` random draws that do as well.

    Passed when `(b + 1) / (n + 1) <= alpha`. Failed when a share of `alpha` of draws as good is refuted from
    the other side (exact binomial test): there are too many of them to blame bad luck. Else undecided.

    Example:
        >>> [rank_verdict(b, 99, 0.05) for b in (4, 7, 20)]
        ['passed', 'not enough evidence', 'failed']
    """
    if (b + 1) / (n + 1) <= alpha:
        return PASSED
    if n and stats.binomtest(b, n, alpha, alternative="greater").pvalue <= alpha:
        return FAILED
    return UNDECIDED


def share_verdict(b: int, n: int, share: float, alpha: float) -> str:
    """A verdict on "fewer than this share of random draws do as well", from `b` of `n`: exact binomial tails.

    Example:
        >>> [share_verdict(b, 99, 0.1, 0.05) for b in (3, 10, 30)]
        ['passed', 'not enough evidence', 'failed']
    """
    if not n:
        return UNDECIDED
    if stats.binom.cdf(b, n, share) <= alpha:
        return PASSED
    return FAILED if stats.binom.sf(b - 1, n, share) <= alpha else UNDECIDED


def power_by_resampling(
    passes: NDArray[np.bool_] | list[bool],
) -> float | None:
    """The share of resampled data sets on which a test passes; None when there are none."""
    marks = np.asarray(passes, dtype=bool)
    return float(marks.mean()) if len(marks) else None


# -- means of pairs ------------------------------------------------------------------------------


def equivalence_p(
    difference: Float[NDArray[np.float64], " pair"],
    margin: Float[NDArray[np.float64], " pair"],
    settings: Bootstrap,
    clusters: ArrayLike | None = None,
) -> float | None:
    """Two one-sided tests: the p-value of "the mean difference is at least as large as the mean margin".

    Null hypothesis: `|mean(difference)| >= mean(margin)`. The margin may vary from pair to pair, such as a
    share of each pair's own effect: both sides are means of pairs, so no ratio is ever formed.

    Schuirmann 1987, "A comparison of the two one-sided tests procedure", J. Pharmacokin. Biopharm. 15; each
    side is `mean_above`.

    Returns:
        The larger of the two one-sided p-values; None with fewer than 5 pairs or clusters.

    Example:
        >>> small, margin = np.array([0.1, -0.1, 0.2, 0.0, -0.2, 0.1]), np.ones(6)
        >>> equivalence_p(small, margin, Bootstrap()) < 0.05
        True
    """
    sides = [mean_above(margin + sign * difference, 0.0, settings, clusters) for sign in (1.0, -1.0)]
    known = [side for side in sides if side is not None]
    return max(known) if len(known) == 2 else None


def power_of_mean(
    values: ArrayLike, shift: float, alpha: float, clusters: ArrayLike | None = None
) -> float | None:
    """The power of a one-sided test of a mean at this spread and number of pairs, by the noncentral t.

    Args:
        values: `(pair,)`, whose spread counts.
        shift: by how much the true mean is supposed to exceed the null value.
        alpha: level of the test.
        clusters: which cluster each pair belongs to.

    Example:
        >>> round(power_of_mean([0.0, 2.0] * 10, shift=1.0, alpha=0.05), 2)
        0.99
    """
    column = np.asarray(values, dtype=np.float64)
    sums, counts = cluster_sums(clusters, column, np.ones_like(column))
    n = len(sums)
    if n < MIN_PAIRS:
        return None
    rest = sums - column.mean() * counts
    spread = float(np.sqrt((rest**2).sum() * n / (n - 1)) / len(column))  # standard error of the mean
    if spread <= TIE * max(abs(shift), 1e-300):
        return 1.0 if shift > 0 else 0.0
    return float(stats.nct.sf(stats.t.ppf(1 - alpha, n - 1), n - 1, shift / spread))

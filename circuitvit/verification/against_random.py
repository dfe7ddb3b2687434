"""Is the circuit better than chance? Sufficiency and partial necessity against random connected circuits.

Both tests compare one figure of the circuit with the same figure of random circuits without dead edges
(`circuitvit.verification.connected`), and are exact for any number of pairs, even one: what is random is the
circuit. That other images would give the same is another question, to which the interval and
the power speak: the share of resampled sets of pairs on which the circuit would pass again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import stats

from circuitvit.graph import Circuit
from circuitvit.verification.bootstrap import Bootstrap, Estimate, cluster_sums, ratio_interval
from circuitvit.verification.meter import PairMeter
from circuitvit.verification.outcome import (
    FAILED,
    PASSED,
    Outcome,
    as_extreme,
    check_level,
    power_by_resampling,
    rank_verdict,
    share_verdict,
)

POWER_RESAMPLES = 200

AS_BAD = 0.1
"""Share of random circuits of the rest of the model that may be missed as much as a necessary circuit."""

EXCHANGEABLE = (
    "The random circuits are exchangeable with the circuit if it is itself a uniform draw among connected "
    "circuits with as many edges into each stage; a circuit found on these very pairs has an advantage."
)

DRAWN = (
    "Nothing about the circuit; the statement is about random circuits of other paths. A circuit found on "
    "these very pairs has an advantage."
)

Shares = Float[NDArray[np.float64], "circuit"]


def sufficiency_test(
    meter: PairMeter,
    circuit: Circuit,
    randoms: Sequence[Circuit],
    *,
    alpha: float = 0.05,
    settings: Bootstrap | None = None,
    clusters: Sequence[str] | None = None,
) -> Outcome:
    """Does the circuit keep the behaviour better than chance?

    Null hypothesis: the circuit is a random connected circuit of its size and layer profile.
    Statistic: `|f(C) - 1|`, with `f` the faithfulness, a ratio of means over pairs; small is extreme.
    p-value: `(b + 1) / (n + 1)`, `b` of the random circuits being as close to 1; ties count as close.
    Source: the sufficiency test of Shi et al. 2024, arXiv:2410.13032, with connected circuits and the exact
    rank instead of a binomial approximation.

    Args:
        meter: of the task.
        circuit: to test.
        randoms: from `connected_circuits`.
        alpha: level of significance.
        settings: of the interval and the power.
        clusters: which cluster each pair belongs to.
    """
    kept = meter.many([circuit.kept, *(each.kept for each in randoms)]) - meter.nothing
    tested = _Ranked(kept, meter.effect, None, alpha, settings or Bootstrap(), clusters)
    b = tested.as_good
    return tested.outcome(
        name="sufficiency",
        question="Does the circuit alone keep the behaviour better than random connected circuits?",
        null="the circuit is a random connected circuit with as many edges into each stage",
        statistic="faithfulness",
        reason=(
            f"{b} of {len(randoms)} random connected circuits of the same size and layers keep the behaviour "
            f"as well (the circuit {tested.own.value:.3f}, they {tested.typical:.3f} on average)."
        ),
        shared=_shared(circuit, randoms),
    )


def necessity_test(
    meter: PairMeter,
    circuit: Circuit,
    randoms: Sequence[Circuit],
    *,
    as_bad: float = AS_BAD,
    alpha: float = 0.05,
    settings: Bootstrap | None = None,
    clusters: Sequence[str] | None = None,
) -> Outcome:
    """Does ablating the circuit hurt more than ablating as much of the rest of the model?

    Null hypothesis: of all random circuits of its size in the rest of the model, at least a share `as_bad`
    are missed as much as the circuit is.
    Statistic: the share of the behaviour lost when only its edges are ablated, `1 - f(everything but C)`.
    p-value: `P(Binomial(n, as_bad) <= b)`, `b` of the random circuits being missed as much; ties count.
    Verdict: failed when the same share is refuted from the other side (more than `as_bad` are).
    Source: partial necessity of Shi et al. 2024, arXiv:2410.13032, with the exact binomial tail.

    The rank `(b + 1) / (n + 1)` would be wrong here: circuits of the complement cannot hold the circuit's
    edges, so they are not exchangeable with it, and where one edge dominates the model any circuit that
    holds it would seem necessary.

    Args:
        meter: of the task.
        circuit: to test.
        randoms: from `complement_circuits`.
        as_bad: the share of random circuits that may be missed as much.
        alpha: level of significance.
        settings: of the interval and the power.
        clusters: which cluster each pair belongs to.
    """
    lost = meter.whole - meter.many([~circuit.kept, *(~each.kept for each in randoms)])
    tested = _Ranked(lost, meter.effect, as_bad, alpha, settings or Bootstrap(), clusters)
    b = tested.as_good
    return tested.outcome(
        name="partial necessity",
        question="Does the model miss the circuit more than it misses as much of the rest?",
        null=f"at least {as_bad:.0%} of random circuits in the rest of the model are missed as much",
        statistic="share of the behaviour lost without it",
        reason=(
            f"{b} of {len(randoms)} random circuits of as many edges, made of other paths, are missed as "
            f"much (without the circuit {tested.own.value:.3f} of the behaviour is lost, without one of them "
            f"{tested.typical:.3f} on average)."
        ),
        shared=_shared(circuit, randoms),
    )


class _Ranked:
    """One figure of the circuit (row 0) among that of the random circuits.

    Args:
        gains: `(circuit, pair)`; the figure is `sum(gains) / sum(effect)`.
        effect: `(pair,)`.
        as_bad: None: the figure should be near 1, and circuits are exchangeable; else it should be large, and
            this share of random circuits may be as large.
    """

    def __init__(
        self,
        gains: Float[NDArray[np.float64], "circuit pair"],
        effect: Float[NDArray[np.float64], " pair"],
        as_bad: float | None,
        alpha: float,
        settings: Bootstrap,
        clusters: Sequence[str] | None,
    ) -> None:
        check_level(alpha)
        self.alpha, self.as_bad, self.n = alpha, as_bad, gains.shape[1]
        self.own: Estimate = ratio_interval(gains[0], effect, settings, clusters)
        shares = gains.sum(axis=1) / effect.sum()
        self.typical = float(shares[1:].mean()) if len(shares) > 1 else float("nan")
        self.as_good = self._as_good(shares)
        self.n_random = len(shares) - 1
        self.verdict = self._verdict(self.as_good)
        self.power = self._power(gains, effect, settings, clusters)

    def _as_good(self, shares: Shares) -> int:
        goodness = -np.abs(shares - 1) if self.as_bad is None else shares
        return as_extreme(float(goodness[0]), goodness[1:])

    def _verdict(self, b: int) -> str:
        if self.as_bad is None:
            return rank_verdict(b, self.n_random, self.alpha)
        return share_verdict(b, self.n_random, self.as_bad, self.alpha)

    def _p_value(self) -> float:
        if self.as_bad is None:
            return (self.as_good + 1) / (self.n_random + 1)
        return float(stats.binom.cdf(self.as_good, self.n_random, self.as_bad))

    def _power(
        self,
        gains: NDArray[np.float64],
        effect: NDArray[np.float64],
        settings: Bootstrap,
        clusters: Sequence[str] | None,
    ) -> float | None:
        sums = np.array(cluster_sums(clusters, effect, *gains))
        n = sums.shape[1]
        if n < 2 or not self.n_random:
            return None
        rng = np.random.default_rng(settings.seed)
        counts = rng.multinomial(n, np.full(n, 1 / n), size=POWER_RESAMPLES)
        redrawn = counts @ sums.T  # (resample, 1 + circuit)
        passes = [self._verdict(self._as_good(row[1:] / row[0])) == PASSED for row in redrawn if row[0] != 0]
        return power_by_resampling(passes)

    def outcome(
        self, name: str, question: str, null: str, statistic: str, reason: str, shared: float
    ) -> Outcome:
        if self.verdict not in (PASSED, FAILED):
            reason += (
                f" With {self.n_random} random circuits that decides nothing at the level {self.alpha:g}; "
                "draw more."
            )
        return Outcome(
            name=name,
            verdict=self.verdict,
            reason=reason,
            question=question,
            null=null,
            statistic=statistic,
            effect=self.own,
            p_value=self._p_value(),
            n=self.n,
            alpha=self.alpha,
            power=self.power,
            assumes=EXCHANGEABLE if self.as_bad is None else DRAWN,
            source="Shi et al. 2024, arXiv:2410.13032; Besag and Clifford 1989, Biometrika 76",
            details={
                "random": self.n_random,
                "as_good": self.as_good,
                "random_mean": self.typical if self.n_random else None,
                "shared": shared,
            },
        )


def _shared(circuit: Circuit, randoms: Sequence[Circuit]) -> float:
    """Which share of the circuit's edges a random one has too, on average."""
    live = circuit.pruned()
    return (
        float(np.mean([len(live & each) / len(live) for each in randoms])) if randoms and len(live) else 0.0
    )

"""Does the rest of the model still know anything of the behaviour? HSIC with a permutation test."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import pdist, squareform

from circuitvit.errors import DataError
from circuitvit.graph import Circuit
from circuitvit.verification.bootstrap import Bootstrap, Estimate
from circuitvit.verification.meter import PairMeter
from circuitvit.verification.outcome import FAILED, PASSED, TIE, UNDECIDED, Outcome, check_level, rank_p

ENOUGH_POWER = 0.8
ALTERNATIVE = 0.5
"""The correlation that power is reported for."""

POWER_SIMULATIONS = 100
POWER_PAIRS = 150
"""More pairs than this are simulated as so many: their power is 1 to two digits."""

Pairs = Float[NDArray[np.float64], " pair"]


def hsic(x: ArrayLike, y: ArrayLike) -> float:
    """The Hilbert-Schmidt independence criterion of two samples, 0 when there is no dependence at all.

    `sum(HKH * L) / n^2` with Gaussian kernels whose width is the median distance, `H` centring.

    Gretton et al. 2005, "Measuring statistical dependence with Hilbert-Schmidt norms", ALT.

    Args:
        x: `(pair,)`.
        y: `(pair,)`.

    Example:
        >>> x = np.linspace(-1, 1, 40)
        >>> hsic(x, x**2) > 5 * hsic(x, np.random.default_rng(0).permutation(x**2))
        True
    """
    first, second = _kernel(_column(x)), _kernel(_column(y))
    return float((_centred(first) * second).mean())


def hsic_permutation_p(x: ArrayLike, y: ArrayLike, n_permutations: int = 999, seed: int = 0) -> float:
    """The p-value of "x and y are independent", from permuting which y goes with which x.

    Null hypothesis: x and y are independent. Exact for independent pairs, whatever their distributions.

    Gretton et al. 2008, "A kernel statistical test of independence", NIPS.

    Raises:
        DataError: if x and y differ in length.
    """
    x, y = _column(x), _column(y)
    if len(x) != len(y):
        raise DataError(f"{len(x)} and {len(y)} values: independence is asked of pairs")
    first, second = _centred(_kernel(x)), _kernel(y)
    rng = np.random.default_rng(seed)
    orders = np.array([rng.permutation(len(y)) for _ in range(n_permutations)])
    drawn = [float((first * second[np.ix_(order, order)]).mean()) for order in orders]
    return rank_p(float((first * second).mean()), drawn)


def independence_test(
    meter: PairMeter,
    circuit: Circuit,
    *,
    alpha: float = 0.05,
    settings: Bootstrap | None = None,
    n_permutations: int = 999,
) -> Outcome:
    """Is what the rest of the model says independent of what the model says?

    Null hypothesis: over pairs, `m(all) - m(none)` and `m(everything but C) - m(none)` are independent. Both
    are measured from the ablated run, so that a scene's brightness, say, which every run shares, does not
    count as knowledge of the behaviour.
    Statistic: HSIC; p-value by permutation of the pairs, `(b + 1) / (n + 1)`.
    Verdict: failed when the null is rejected. Not rejecting shows little by itself, so it passes only where
    the power against a correlation of 0.5 is at least 0.8 (simulated at this number of pairs).
    Assumed: pairs are independent draws.
    An ideal rather than a requirement: a complement that carries a thousandth of the behaviour, but always
    the same thousandth, is dependent. See the size of the effect.
    Source: the independence test of Shi et al. 2024, arXiv:2410.13032; Gretton et al. 2008.

    Args:
        meter: of the task.
        circuit: to test.
        alpha: level of significance.
        settings: whose seed counts.
        n_permutations: how many.
    """
    check_level(alpha)
    seed = (settings or Bootstrap()).seed
    full, rest = meter.effect, meter(~circuit.kept) - meter.nothing
    n = len(full)
    varies = n < 3 or bool(min(np.ptp(full), np.ptp(rest)) > TIE * np.abs(full).max())
    p_value = hsic_permutation_p(full, rest, n_permutations, seed) if n > 2 and varies else None
    power = detection_power(n, alpha, seed) if n > 2 else None
    correlation = float(np.corrcoef(full, rest)[0, 1]) if n > 2 and varies else 0.0
    share = float(rest.sum() / full.sum())
    return Outcome(
        name="independence of the complement",
        verdict=_verdict(p_value, power, varies, alpha),
        reason=_reason(p_value, power, varies, alpha, share),
        question="Does the rest of the model know anything of the behaviour?",
        null="what the complement restores is independent of how strong the behaviour is",
        statistic="correlation",
        effect=Estimate(correlation),
        p_value=p_value,
        n=n,
        alpha=alpha,
        power=power,
        assumes="Pairs are independent draws. Power is that of finding a correlation of 0.5 (normal data).",
        source="Gretton et al. 2008; Shi et al. 2024, arXiv:2410.13032",
        decisive=False,
        details={"hsic": hsic(full, rest) if varies else 0.0, "share_kept_by_complement": share},
    )


@lru_cache(maxsize=64)
def detection_power(n: int, alpha: float, seed: int = 0, simulations: int = POWER_SIMULATIONS) -> float:
    """How often the test finds a correlation of 0.5 between normal variables in `n` pairs, simulated."""
    n = min(n, POWER_PAIRS)
    rng = np.random.default_rng([seed, n])
    found = 0
    for trial in range(simulations):
        x = rng.normal(size=n)
        y = ALTERNATIVE * x + np.sqrt(1 - ALTERNATIVE**2) * rng.normal(size=n)
        found += hsic_permutation_p(x, y, 99, trial) <= alpha
    return found / simulations


def _verdict(p_value: float | None, power: float | None, varies: bool, alpha: float) -> str:
    if p_value is None:
        return UNDECIDED if varies else PASSED
    if p_value <= alpha:
        return FAILED
    return PASSED if power is not None and power >= ENOUGH_POWER else UNDECIDED


def _reason(p_value: float | None, power: float | None, varies: bool, alpha: float, share: float) -> str:
    carries = f"the complement carries {share:.1%} of the behaviour on average"
    if p_value is None:
        why = "There are too few pairs to tell" if varies else "What the complement says does not vary"
        return f"{why}; {carries}."
    if p_value <= alpha:
        return f"What the complement says depends on the behaviour; {carries}."
    found = f"No dependence was found; {carries}."
    if power is None or power < ENOUGH_POWER:
        found += (
            f" A correlation of {ALTERNATIVE} would have been found in {power or 0:.0%} of such samples only."
        )
    return found


def _kernel(x: Pairs) -> Float[NDArray[np.float64], "pair pair"]:
    distances = pdist(x[:, None])
    positive = distances[distances > 0]
    width = float(np.median(positive)) if len(positive) else 1.0
    return np.asarray(np.exp(-0.5 * squareform(distances) ** 2 / width**2))


def _centred(kernel: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(kernel - kernel.mean(axis=0) - kernel.mean(axis=1, keepdims=True) + kernel.mean())


def _column(values: ArrayLike) -> Pairs:
    return np.asarray(values, dtype=np.float64).ravel()

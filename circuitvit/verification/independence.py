"""Independence of the complement: does what the rest of the model says depend on how strong the behaviour is?

An ideal that few circuits meet. The test is HSIC with permutations.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import pdist, squareform

from circuitvit.engine import Evaluator
from circuitvit.errors import DataError
from circuitvit.graph import CircuitLike, as_circuit
from circuitvit.verification.statistics import ROUNDING, Estimate, as_pairs, rank_p
from circuitvit.verification.verdict import REFUTED, SUPPORTED, UNDECIDED, AuditSettings, Verdict

ENOUGH_POWER = 0.8

ALTERNATIVE = 0.5
"""The correlation that the power of a test of independence is reported for."""

POWER_SIMULATIONS = 100
POWER_PAIRS = 150
"""More pairs than this are simulated as so many: their power is 1 to two digits."""


def independence_test(
    evaluator: Evaluator,
    circuit: CircuitLike,
    settings: AuditSettings | None = None,
    *,
    n_permutations: int = 999,
) -> Verdict:
    """Is what the rest of the model says independent of what the model says?

    Null hypothesis: over pairs, `m(all) - m(none)` and `m(everything but C) - m(none)` are independent. Both
    are measured from the ablated run, so that a scene's brightness, say, which every run shares, does not
    count as knowledge of the behaviour.
    Statistic: HSIC; p-value by permutation of the pairs, `(b + 1) / (n + 1)`.
    Verdict: refuted when the null is rejected. Not rejecting shows little by itself, so it is supported only
    where the power against a correlation of 0.5 is at least 0.8 (simulated at this number of pairs).
    Assumed: pairs are independent draws.
    An ideal rather than a requirement: a complement that carries a thousandth of the behaviour, but always
    the same thousandth, is dependent. See the size of the effect.
    Source: the independence test of Shi et al. 2024, arXiv:2410.13032; Gretton et al. 2008.

    Args:
        evaluator: of the task.
        circuit: to test.
        settings: level and seed.
        n_permutations: how many.
    """
    settings, circuit = settings or AuditSettings(), as_circuit(circuit, evaluator.graph)
    alpha, seed = settings.alpha, settings.seed
    full, rest = evaluator.effect, evaluator.values(~circuit.kept) - evaluator.nothing
    n = len(full)
    varies = n < 3 or bool(min(np.ptp(full), np.ptp(rest)) > ROUNDING * np.abs(full).max())
    p_value = hsic_permutation_p(full, rest, n_permutations, seed) if n > 2 and varies else None
    power = detection_power(n, alpha, seed) if n > 2 else None
    correlation = float(np.corrcoef(full, rest)[0, 1]) if n > 2 and varies else 0.0
    share = float(rest.sum() / full.sum())
    verdict, why, more = _independence_verdict(p_value, power, varies, alpha)
    carries = f"the complement carries {round(share, 3) + 0.0:.1%} of the behaviour on average"
    return Verdict(
        claim="independence of the complement",
        verdict=verdict,
        reason=f"{why}; {carries}.{more}",
        expectation="the rest of the model knows nothing of the behaviour",
        null="what the complement restores is independent of how strong the behaviour is",
        statistic="correlation",
        effect=Estimate(correlation),
        p_value=p_value,
        n=n,
        alpha=alpha,
        power=power,
        assumes="Pairs are independent draws. Power is that of finding a correlation of 0.5 (normal data).",
        source="Gretton et al. 2008; Shi et al. 2024, arXiv:2410.13032",
        scope="all such pairs",
        edges=len(circuit),
        decisive=False,
        details={"hsic": hsic(full, rest) if varies else 0.0, "share_kept_by_complement": share},
    )


def _independence_verdict(
    p_value: float | None, power: float | None, varies: bool, alpha: float
) -> tuple[str, str, str]:
    """The verdict, why, and what else there is to say."""
    if p_value is None and varies:
        return UNDECIDED, "There are too few pairs to tell", ""
    if p_value is None:
        return SUPPORTED, "What the complement says does not vary", ""
    if p_value <= alpha:
        return REFUTED, "What the complement says depends on the behaviour", ""
    if power is not None and power >= ENOUGH_POWER:
        return SUPPORTED, "No dependence was found", ""
    seldom = (
        f" A correlation of {ALTERNATIVE} would have been found in {power or 0:.0%} of such samples only."
    )
    return UNDECIDED, "No dependence was found", seldom


# -- the statistic -------------------------------------------------------------------------------


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
    first, second = _kernel(as_pairs(x)), _kernel(as_pairs(y))
    return float((_centred(first) * second).mean())


def hsic_permutation_p(x: ArrayLike, y: ArrayLike, n_permutations: int = 999, seed: int = 0) -> float:
    """The p-value of "x and y are independent", from permuting which y goes with which x.

    Null hypothesis: x and y are independent. Exact for independent pairs, whatever their distributions.

    Gretton et al. 2008, "A kernel statistical test of independence", NIPS.

    Raises:
        DataError: if x and y differ in length.
    """
    x, y = as_pairs(x), as_pairs(y)
    if len(x) != len(y):
        raise DataError(f"{len(x)} and {len(y)} values: independence is asked of pairs")
    first, second = _centred(_kernel(x)), _kernel(y)
    rng = np.random.default_rng(seed)
    orders = np.array([rng.permutation(len(y)) for _ in range(n_permutations)])
    drawn = [float((first * second[np.ix_(order, order)]).mean()) for order in orders]
    return rank_p(float((first * second).mean()), drawn)


@lru_cache(maxsize=64)
def detection_power(n: int, alpha: float, seed: int = 0) -> float:
    """How often the test finds a correlation of 0.5 between normal variables in `n` pairs, simulated."""
    n = min(n, POWER_PAIRS)
    rng = np.random.default_rng([seed, n])
    found = 0
    for trial in range(POWER_SIMULATIONS):
        x = rng.normal(size=n)
        y = ALTERNATIVE * x + np.sqrt(1 - ALTERNATIVE**2) * rng.normal(size=n)
        found += hsic_permutation_p(x, y, 99, trial) <= alpha
    return found / POWER_SIMULATIONS


def _kernel(x: NDArray[np.float64]) -> Float[NDArray[np.float64], "pair pair"]:
    distances = pdist(x[:, None])
    positive = distances[distances > 0]
    width = float(np.median(positive)) if len(positive) else 1.0
    return np.asarray(np.exp(-0.5 * squareform(distances) ** 2 / width**2))


def _centred(kernel: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(kernel - kernel.mean(axis=0) - kernel.mean(axis=1, keepdims=True) + kernel.mean())

"""Does every edge of the circuit do something? Each is compared with edges that were added at random.

Any edge has some effect, so "does ablating it change anything" is the wrong question. The right one is
whether it changes more than an edge that has no business in the circuit: a random path from input to logits
is added to the circuit, and one of the edges that came with it is knocked out again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import stats

from circuitvit.errors import OptionError
from circuitvit.graph import Circuit, EdgeMask
from circuitvit.verification.bootstrap import Bootstrap, Estimate, ratio_interval
from circuitvit.verification.connected import random_path
from circuitvit.verification.meter import PairMeter
from circuitvit.verification.outcome import (
    FAILED,
    PASSED,
    UNDECIDED,
    Outcome,
    as_extreme,
    check_level,
    power_by_resampling,
)

MOST_TRIES = 1000
POWER_RESAMPLES = 50


def minimality_test(
    meter: PairMeter,
    circuit: Circuit,
    *,
    n_random: int = 199,
    alpha: float = 0.05,
    settings: Bootstrap | None = None,
    clusters: Sequence[str] | None = None,
) -> Outcome:
    """Is every edge of the circuit needed more than an edge added at random?

    Null hypothesis, for each edge: knocking it out of the circuit changes the metric no more than knocking
    an edge of a randomly added path out of the circuit with that path.
    Statistic: `|mean(m(C) - m(C without the edge))|`, as a share of the behaviour.
    p-value: `(b + 1) / (n + 1)` among `n` such random knock-outs; ties count against the edge. Edges share
    these draws, which makes their p-values positively dependent, so Benjamini and Hochberg's procedure
    controls the share of falsely kept edges at alpha (Bates et al. 2023, "Testing for outliers with conformal
    p-values", Annals of Statistics 51).
    Verdict: passed when every edge is needed; failed when some are not shown to be (they are listed);
    undecided when the draws are too few for any edge to be.
    Power: the share of edges that would be found needed, on average over resampled pairs.
    Source: minimality in Wang et al. 2023, arXiv:2211.00593, as tested by Shi et al. 2024, arXiv:2410.13032.

    Args:
        meter: of the task.
        circuit: to test; its dead edges are left out.
        n_random: how many random knock-outs.
        alpha: false discovery rate.
        settings: whose seed draws the paths.
        clusters: which cluster each pair belongs to.

    Raises:
        OptionError: if the circuit has no live edge.
    """
    check_level(alpha)
    settings = settings or Bootstrap()
    live = circuit.pruned()
    if not len(live):
        raise OptionError("the circuit has no edge on a path from input to logits: nothing can be minimal")
    effect = meter.effect
    own = _own_changes(meter, live)
    drawn = _random_changes(meter, live, n_random, settings.seed)
    p_values = minimality_p_values(_sizes(own, effect), _sizes(drawn, effect))
    adjusted = stats.false_discovery_control(p_values)
    names, needed = list(live), adjusted <= alpha
    idle = [name for name, kept in zip(names, needed, strict=True) if not kept]
    weakest = int(np.argmin(_sizes(own, effect)))
    verdict = PASSED if not idle else FAILED if 1 / (len(drawn) + 1) <= alpha else UNDECIDED
    return Outcome(
        name="minimality",
        verdict=verdict,
        reason=_reason(idle, len(names), len(drawn)),
        question="Does every edge do more than an edge added at random?",
        null="knocking the edge out changes no more than knocking out an edge of a randomly added path",
        statistic=f"share of the behaviour that the weakest edge ({names[weakest]}) changes",
        effect=_size_interval(own[weakest], effect, settings, clusters),
        p_value=float(adjusted.max()),
        n=len(meter),
        alpha=alpha,
        power=_power(own, drawn, effect, alpha, settings.seed),
        assumes="An edge without a role is exchangeable with the edges of random paths.",
        source="Wang et al. 2023, arXiv:2211.00593; Shi et al. 2024, arXiv:2410.13032",
        decisive=False,
        details={
            "random": len(drawn),
            "needed": int(needed.sum()),
            "idle": idle,
            "adjusted_p": {name: float(p) for name, p in zip(names, adjusted, strict=True)},
        },
    )


def minimality_p_values(
    own: Float[NDArray[np.float64], " edge"], drawn: Float[NDArray[np.float64], " draw"]
) -> Float[NDArray[np.float64], " edge"]:
    """The p-value of each edge's change among those of random edges.

    Example:
        >>> minimality_p_values(np.array([5.0, 0.5]), np.arange(4.0)).tolist()
        [0.2, 0.8]
    """
    return np.array([(as_extreme(float(size), drawn) + 1) / (len(drawn) + 1) for size in own])


def inflated_circuits(circuit: Circuit, n: int, seed: int = 0) -> list[tuple[EdgeMask, EdgeMask]]:
    """The circuit with a random path added, and the same without one of the edges that came with it.

    No two are alike: short paths come up again and again, and would only be ties.

    Args:
        circuit: to inflate.
        n: how many, or as many as there are.
        seed: of the draws.

    Raises:
        OptionError: if the circuit is so full that no path adds an edge.
    """
    rng = np.random.default_rng(seed)
    found: dict[tuple[bytes, bytes], tuple[EdgeMask, EdgeMask]] = {}
    for _ in range(MOST_TRIES + 10 * n):
        if len(found) == n:
            break
        added = random_path(circuit.graph, rng) & ~circuit.kept
        if not added.any():
            continue
        grown = circuit.kept | added
        without = grown.copy()
        places = np.argwhere(added)
        without[tuple(places[rng.integers(len(places))])] = False
        found.setdefault((grown.tobytes(), without.tobytes()), (grown, without))
    if not found:
        raise OptionError("the circuit has nearly every edge: no random path adds one to compare with")
    return list(found.values())


# -- inside --------------------------------------------------------------------------------------


def _own_changes(meter: PairMeter, live: Circuit) -> Float[NDArray[np.float64], "edge pair"]:
    masks = []
    for place in np.argwhere(live.kept):
        without = live.kept.copy()
        without[tuple(place)] = False
        masks.append(without)
    return meter(live.kept) - meter.many(masks)


def _random_changes(
    meter: PairMeter, live: Circuit, n: int, seed: int
) -> Float[NDArray[np.float64], "draw pair"]:
    inflated = inflated_circuits(live, n, seed)
    values = meter.many([mask for both in inflated for mask in both])
    return values[::2] - values[1::2]


def _sizes(changes: NDArray[np.float64], effect: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.abs(changes.sum(axis=-1) / effect.sum()))


def _size_interval(
    change: NDArray[np.float64],
    effect: NDArray[np.float64],
    settings: Bootstrap,
    clusters: Sequence[str] | None,
) -> Estimate:
    signed = ratio_interval(change, effect, settings, clusters)
    if signed.value >= 0 or signed.low is None or signed.high is None:
        return Estimate(abs(signed.value), signed.low, signed.high)
    return Estimate(-signed.value, -signed.high, -signed.low)


def _power(
    own: NDArray[np.float64], drawn: NDArray[np.float64], effect: NDArray[np.float64], alpha: float, seed: int
) -> float | None:
    n = len(effect)
    if n < 2:
        return None
    rng = np.random.default_rng(seed)
    found: list[bool] = []
    for _ in range(POWER_RESAMPLES):
        rows = rng.integers(n, size=n)
        if effect[rows].sum() == 0:
            continue
        p_values = minimality_p_values(
            _sizes(own[:, rows], effect[rows]), _sizes(drawn[:, rows], effect[rows])
        )
        found += (stats.false_discovery_control(p_values) <= alpha).tolist()
    return power_by_resampling(found)


def _reason(idle: list[str], n_edges: int, n_random: int) -> str:
    if not idle:
        return f"Each of the {n_edges} edges changes more than edges of random paths do."
    shown = ", ".join(idle[:5]) + (f" and {len(idle) - 5} more" if len(idle) > 5 else "")
    than = f"are not shown to do more than edges of {n_random} random paths"
    return f"{len(idle)} of {n_edges} edges {than}: {shown}."

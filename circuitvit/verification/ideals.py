"""Ideals that few circuits meet: every edge is needed, and nothing is missing.

*Minimality.* Any edge has some effect, so "does ablating it change anything" is the wrong question. The right
one is whether it changes more than an edge that has no business in the circuit: a random path from input to
logits is added to the circuit, and one of the edges that came with it is knocked out again.

*Completeness.* A circuit that holds one of two interchangeable parts is faithful and not complete: the model
does not miss that part, the circuit does. What tells is a set of its edges ablated in the circuit and in the
model: both must fail alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import stats

from circuitvit.engine import Evaluator
from circuitvit.errors import OptionError
from circuitvit.graph import Circuit, CircuitLike, EdgeMask, as_circuit
from circuitvit.pruning.refine import changed
from circuitvit.verification.null import random_path
from circuitvit.verification.statistics import (
    Bootstrap,
    Estimate,
    beyond_p,
    equivalence_p,
    power_of_equivalence,
    rank_p,
    ratio_interval,
)
from circuitvit.verification.verdict import REFUTED, SUPPORTED, UNDECIDED, AuditSettings, Verdict, of_rows

MOST_TRIES = 1000
POWER_RESAMPLES = 50

GREEDY_CANDIDATES = 10
"""Edges tried in each greedy step."""


def minimality_test(
    evaluator: Evaluator,
    circuit: CircuitLike,
    settings: AuditSettings | None = None,
    clusters: Sequence[str] | None = None,
) -> Verdict:
    """Is every edge of the circuit needed more than an edge added at random?

    Null hypothesis, for each edge: knocking it out of the circuit changes the metric no more than knocking
    an edge of a randomly added path out of the circuit with that path.
    Statistic: `|mean(m(C) - m(C without the edge))|`, as a share of the behaviour.
    p-value: `(b + 1) / (n + 1)` among `n` such random knock-outs; ties count against the edge. Edges share
    these draws, which makes their p-values positively dependent, so Benjamini and Hochberg's procedure
    controls the share of falsely kept edges at alpha (Bates et al. 2023, "Testing for outliers with conformal
    p-values", Annals of Statistics 51).
    Verdict: supported when every edge is needed; refuted when some are not shown to be (they are listed);
    undecided when the draws are too few for any edge to be.
    Power: the share of edges that would be found needed, on average over resampled pairs.
    Source: minimality in Wang et al. 2023, arXiv:2211.00593, as tested by Shi et al. 2024, arXiv:2410.13032.

    Args:
        evaluator: of the task.
        circuit: to test; its dead edges are left out.
        settings: number of random knock-outs (`n_paths`), false discovery rate (`alpha`), seed.
        clusters: which cluster each pair belongs to.

    Raises:
        OptionError: if the circuit has no live edge.
    """
    settings, circuit = settings or AuditSettings(), as_circuit(circuit, evaluator.graph)
    alpha = settings.alpha
    live = circuit.pruned()
    if not len(live):
        raise OptionError("the circuit has no edge on a path from input to logits: nothing can be minimal")
    effect = evaluator.effect
    own = own_changes(evaluator, live)
    drawn = _random_changes(evaluator, live, settings.n_paths, settings.seed)
    p_values = minimality_p_values(_sizes(own, effect), _sizes(drawn, effect))
    adjusted = stats.false_discovery_control(p_values)
    names, needed = list(live), adjusted <= alpha
    idle = [name for name, kept in zip(names, needed, strict=True) if not kept]
    weakest = int(np.argmin(_sizes(own, effect)))
    verdict = SUPPORTED if not idle else REFUTED if 1 / (len(drawn) + 1) <= alpha else UNDECIDED
    return Verdict(
        claim="minimality",
        verdict=verdict,
        reason=_minimality_reason(idle, len(names), len(drawn)),
        expectation="every edge does more than an edge added at random",
        null="knocking the edge out changes no more than knocking out an edge of a randomly added path",
        statistic=f"share of the behaviour that the weakest edge ({names[weakest]}) changes",
        effect=_size_interval(own[weakest], effect, settings.draws, clusters),
        p_value=float(adjusted.max()),
        n=len(evaluator),
        alpha=alpha,
        power=_minimality_power(own, drawn, effect, alpha, settings.seed),
        assumes="An edge without a role is exchangeable with the edges of random paths.",
        source="Wang et al. 2023, arXiv:2211.00593; Shi et al. 2024, arXiv:2410.13032",
        scope="these pairs, against random edges",
        edges=len(circuit),
        decisive=False,
        details={
            "random": len(drawn),
            "needed": int(needed.sum()),
            "idle": idle,
            "adjusted_p": {name: float(p) for name, p in zip(names, adjusted, strict=True)},
        },
    )


def own_changes(evaluator: Evaluator, circuit: Circuit) -> Float[NDArray[np.float64], "edge pair"]:
    """By how much knocking out each edge of a circuit lowers the metric."""
    masks = [changed(circuit.kept, [place], False) for place in np.argwhere(circuit.kept)]
    return evaluator.values(circuit.kept) - evaluator.many(masks)


def minimality_p_values(
    own: Float[NDArray[np.float64], " edge"], drawn: Float[NDArray[np.float64], " draw"]
) -> Float[NDArray[np.float64], " edge"]:
    """The p-value of each edge's change among those of random edges.

    Example:
        >>> minimality_p_values(np.array([5.0, 0.5]), np.arange(4.0)).tolist()
        [0.2, 0.8]
    """
    return np.array([rank_p(float(size), drawn) for size in own])


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
        places = np.argwhere(added)
        without = changed(grown, [places[rng.integers(len(places))]], False)
        found.setdefault((grown.tobytes(), without.tobytes()), (grown, without))
    if not found:
        raise OptionError("the circuit has nearly every edge: no random path adds one to compare with")
    return list(found.values())


@dataclass(frozen=True, eq=False)
class KnockOut:
    """A set of edges of the circuit that is ablated in circuit and model alike.

    Attributes:
        name: how it was chosen.
        edges: `(sender, receiver, group)`.
        rows: the pairs to test it on; for a set that was chosen by looking, those it was not chosen on.
    """

    name: str
    edges: EdgeMask
    rows: NDArray[np.intp]


def completeness_test(
    evaluator: Evaluator,
    circuit: CircuitLike,
    settings: AuditSettings | None = None,
    clusters: Sequence[str] | None = None,
    *,
    n_random: int = 10,
    greedy_steps: int = 5,
) -> Verdict:
    """Does the circuit without K do what the model without K does, whatever edges K of the circuit?

    K is each of: nothing; random halves of the circuit; all its edges into one layer, layer after layer; and
    a set grown greedily to tell circuit and model apart (chosen on every other pair, tested on the rest).

    Null hypothesis: for some K, `|mean(m(C - K) - m(all - K))| >= margin * |mean(m(all) - m(none))|`.
    Statistic: the largest such difference as a share of the behaviour.
    p-value: the largest over K of the two one-sided p-values of equivalence. As every K must pass, no
    correction for their number is due (intersection-union test; Berger 1982, Technometrics 24), and choosing
    a K for its difference only makes the test stricter.
    Verdict: supported when the null is rejected; refuted when for some K a difference beyond the margin is
    shown, at alpha divided by twice the number of K; else undecided.
    Power: if circuit and model were equal under every K, for the K with the largest spread.
    Source: completeness and its greedy search in Wang et al. 2023, arXiv:2211.00593.

    Args:
        evaluator: of the task.
        circuit: to test.
        settings: level, margin (`completeness_margin`), number of resamples, seed.
        clusters: which cluster each pair belongs to.
        n_random: how many random halves.
        greedy_steps: how many edges the greedy set has; 0 for none.
    """
    settings, circuit = settings or AuditSettings(), as_circuit(circuit, evaluator.graph)
    alpha, margin, draws = settings.alpha, settings.completeness_margin, settings.draws
    sets = knock_outs(evaluator, circuit, n_random, greedy_steps, settings.seed)
    difference = _differences(evaluator, circuit, [each.edges for each in sets])
    sign = np.sign(evaluator.effect.mean())
    difference, effect = sign * difference, sign * evaluator.effect
    tests = [
        _test(row, effect, each, margin, alpha, draws, clusters)
        for row, each in zip(difference, sets, strict=True)
    ]
    worst = int(np.argmax([abs(test.share) for test in tests]))
    known = [test.p_value for test in tests if test.p_value is not None]
    p_value = max(known) if len(known) == len(tests) else None
    verdict = _completeness_verdict(p_value, tests, alpha)
    rows = sets[worst].rows
    powers = [test.power for test in tests if test.power is not None]
    return Verdict(
        claim="completeness",
        verdict=verdict,
        reason=_completeness_reason(verdict, sets[worst], tests[worst].share, margin, len(sets)),
        expectation=f"the circuit fails as the model fails, to within {margin:.0%} of the behaviour",
        null="for some set of its edges, ablating them in both leaves a difference beyond the margin",
        statistic="largest difference as a share of the behaviour",
        effect=ratio_interval(difference[worst][rows], effect[rows], draws, of_rows(clusters, rows)),
        p_value=p_value,
        n=len(rows),
        alpha=alpha,
        power=min(powers) if powers else None,
        assumes="Pairs (or clusters of pairs) are independent draws. Other sets may still tell them apart.",
        source="Wang et al. 2023, arXiv:2211.00593; intersection-union test, Berger 1982",
        scope="all such pairs",
        edges=len(circuit),
        decisive=False,
        details={
            "margin": margin,
            "sets": {each.name: test.share for each, test in zip(sets, tests, strict=True)},
            "worst": sets[worst].name,
            "worst_edges": list(circuit.graph.names_of(sets[worst].edges)),
        },
    )


def knock_outs(
    evaluator: Evaluator, circuit: Circuit, n_random: int, greedy_steps: int, seed: int
) -> list[KnockOut]:
    """All sets that completeness is tested on; none twice, and all on every pair but the greedy one."""
    graph, everyone = circuit.graph, np.arange(len(evaluator))
    found = [KnockOut("nothing", np.zeros(graph.shape, dtype=bool), everyone)]
    for layer in sorted({stage.layer for stage in graph.stages}):
        into = [stage.layer == layer for stage in graph.stages]
        receivers = np.array([into[place] for place in graph.receiver_stages], dtype=bool)
        edges = circuit.kept & receivers[None, :, None]
        found.append(KnockOut(f"all edges into layer {layer}", edges, everyone))
    rng = np.random.default_rng(seed)
    for number in range(n_random):
        edges = circuit.kept & (rng.random(graph.shape) < 0.5)
        found.append(KnockOut(f"random half {number + 1}", edges, everyone))
    if greedy_steps and len(evaluator) > 1 and len(circuit):
        found.append(_greedy(evaluator, circuit, greedy_steps, rng))
    distinct = {
        each.edges.tobytes(): each for each in reversed(found) if each.edges.any() or each is found[0]
    }
    return list(reversed(distinct.values()))


# -- inside --------------------------------------------------------------------------------------


def _random_changes(
    evaluator: Evaluator, live: Circuit, n: int, seed: int
) -> Float[NDArray[np.float64], "draw pair"]:
    inflated = inflated_circuits(live, n, seed)
    values = evaluator.many([mask for both in inflated for mask in both])
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


def _minimality_power(
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
    return float(np.mean(found)) if found else None


def _minimality_reason(idle: list[str], n_edges: int, n_random: int) -> str:
    if not idle:
        return f"Each of the {n_edges} edges changes more than edges of random paths do."
    shown = ", ".join(idle[:5]) + (f" and {len(idle) - 5} more" if len(idle) > 5 else "")
    than = f"are not shown to do more than edges of {n_random} random paths"
    return f"{len(idle)} of {n_edges} edges {than}: {shown}."


@dataclass(frozen=True)
class _Tested:
    """One set's test: its difference as a share of the behaviour, the p-values, and the power."""

    share: float
    p_value: float | None
    beyond: float | None
    power: float | None


def _test(
    difference: NDArray[np.float64],
    effect: NDArray[np.float64],
    each: KnockOut,
    margin: float,
    alpha: float,
    settings: Bootstrap,
    clusters: Sequence[str] | None,
) -> _Tested:
    labels, change, room = of_rows(clusters, each.rows), difference[each.rows], margin * effect[each.rows]
    return _Tested(
        share=float(change.mean() / (room.mean() / margin)),
        p_value=equivalence_p(change, room, settings, labels),
        beyond=beyond_p(change, room, settings, labels),
        power=power_of_equivalence(change, room, alpha, labels),
    )


def _differences(
    evaluator: Evaluator, circuit: Circuit, sets: Sequence[EdgeMask]
) -> Float[NDArray[np.float64], "set pair"]:
    """The metric of the circuit without each set, minus that of the model without it."""
    full = circuit.graph.edge_mask
    both = evaluator.many([kept & ~edges for edges in sets for kept in (circuit.kept, full)])
    return both[::2] - both[1::2]


def _greedy(evaluator: Evaluator, circuit: Circuit, steps: int, rng: np.random.Generator) -> KnockOut:
    """Edge after edge, of a few random candidates the one that drives circuit and model furthest apart."""
    chosen_on, tested_on = np.arange(0, len(evaluator), 2), np.arange(1, len(evaluator), 2)
    edges: Float[NDArray[np.bool_], "sender receiver group"] = np.zeros(circuit.graph.shape, dtype=bool)
    places = np.argwhere(circuit.kept)
    for _ in range(min(steps, len(places))):
        left = [place for place in places if not edges[tuple(place)]]
        indices = rng.permutation(len(left))[:GREEDY_CANDIDATES]
        tried = [changed(edges, [left[index]], True) for index in indices]
        apart = np.abs(_differences(evaluator, circuit, tried)[:, chosen_on].mean(axis=1))
        edges = tried[int(apart.argmax())]
    return KnockOut("greedy set", edges, tested_on)


def _completeness_verdict(p_value: float | None, tests: Sequence[_Tested], alpha: float) -> str:
    if p_value is not None and p_value <= alpha:
        return SUPPORTED
    beyond = [test.beyond for test in tests if test.beyond is not None]
    return REFUTED if beyond and min(beyond) <= alpha / (2 * len(tests)) else UNDECIDED


def _completeness_reason(verdict: str, worst: KnockOut, share: float, margin: float, n_sets: int) -> str:
    ending = {
        SUPPORTED: f"; all differences are shown to be below {margin:g}.",
        REFUTED: f". A difference beyond {margin:g} is shown: something outside the circuit stands in.",
        UNDECIDED: f". That all differences are below {margin:g} is not shown.",
    }
    return (
        f"Of {n_sets} sets of its edges, circuit and model differ most without {worst.name} "
        f"({int(worst.edges.sum())} edges): by {share:+.3f} of the behaviour{ending[verdict]}"
    )

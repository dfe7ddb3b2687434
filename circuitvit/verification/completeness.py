"""Does the circuit fail as the model fails? Knocking the same edges out of both must change both alike.

A circuit that holds one of two interchangeable parts is faithful and not complete: the model does not miss
that part, the circuit does. What tells is a set of its edges ablated in the circuit and in the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from circuitvit.graph import Circuit, EdgeMask
from circuitvit.verification.bootstrap import Bootstrap, mean_above, ratio_interval
from circuitvit.verification.meter import PairMeter
from circuitvit.verification.outcome import (
    FAILED,
    PASSED,
    UNDECIDED,
    Outcome,
    check_level,
    check_margin,
    equivalence_p,
    power_of_mean,
)

GREEDY_CANDIDATES = 10
"""Edges tried in each greedy step."""


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
    meter: PairMeter,
    circuit: Circuit,
    *,
    margin: float = 0.3,
    alpha: float = 0.05,
    n_random: int = 10,
    greedy_steps: int = 5,
    settings: Bootstrap | None = None,
    clusters: Sequence[str] | None = None,
) -> Outcome:
    """Does the circuit without K do what the model without K does, whatever edges K of the circuit?

    K is each of: nothing; random halves of the circuit; all its edges into one layer, layer after layer; and
    a set grown greedily to tell circuit and model apart (chosen on every other pair, tested on the rest).

    Null hypothesis: for some K, `|mean(m(C - K) - m(all - K))| >= margin * |mean(m(all) - m(none))|`.
    Statistic: the largest such difference as a share of the behaviour.
    p-value: the largest over K of the two one-sided p-values of equivalence. As every K must pass, no
    correction for their number is due (intersection-union test; Berger 1982, Technometrics 24), and choosing
    a K for its difference only makes the test stricter.
    Verdict: passed when the null is rejected; failed when for some K a difference beyond the margin is shown,
    at alpha divided by twice the number of K; else undecided.
    Power: if circuit and model were equal under every K, for the K with the largest spread.
    Source: completeness and its greedy search in Wang et al. 2023, arXiv:2211.00593.

    Args:
        meter: of the task.
        circuit: to test.
        margin: largest difference that counts as none, as a share of the behaviour.
        alpha: level of significance.
        n_random: how many random halves.
        greedy_steps: how many edges the greedy set has; 0 for none.
        settings: of the bootstrap; its seed draws the halves.
        clusters: which cluster each pair belongs to.

    Raises:
        OptionError: if the margin is not positive.
    """
    check_level(alpha)
    check_margin(margin)
    settings = settings or Bootstrap()
    sets = knock_outs(meter, circuit, n_random, greedy_steps, settings.seed)
    both = meter.many([each.edges for each in _runs(circuit, sets)])
    difference = (both[::2] - both[1::2]) * np.sign(meter.effect.mean())
    tests = [
        _test(row, meter.effect, each, margin, settings, clusters)
        for row, each in zip(difference, sets, strict=True)
    ]
    shares = [abs(test.share) for test in tests]
    worst = int(np.argmax(shares))
    known = [test.p_value for test in tests if test.p_value is not None]
    p_value = max(known) if len(known) == len(tests) else None
    verdict = _verdict(p_value, tests, alpha)
    rows, oriented = sets[worst].rows, meter.effect * np.sign(meter.effect.mean())
    labels = None if clusters is None else [clusters[row] for row in rows]
    powers = [power for test in tests if (power := test.power(alpha)) is not None]
    return Outcome(
        name="completeness",
        verdict=verdict,
        reason=_reason(verdict, sets[worst], tests[worst].share, margin, len(sets)),
        question=f"Does the circuit fail as the model fails, to within {margin:.0%} of the behaviour?",
        null="for some set of its edges, ablating them in both leaves a difference beyond the margin",
        statistic="largest difference as a share of the behaviour",
        effect=ratio_interval(difference[worst][rows], oriented[rows], settings, labels),
        p_value=p_value,
        n=len(rows),
        alpha=alpha,
        power=min(powers) if powers else None,
        assumes="Pairs (or clusters of pairs) are independent draws. Other sets may still tell them apart.",
        source="Wang et al. 2023, arXiv:2211.00593; intersection-union test, Berger 1982",
        decisive=False,
        details={
            "margin": margin,
            "sets": {each.name: test.share for each, test in zip(sets, tests, strict=True)},
            "worst": sets[worst].name,
            "worst_edges": list(circuit.graph.names_of(sets[worst].edges)),
        },
    )


def knock_outs(
    meter: PairMeter, circuit: Circuit, n_random: int, greedy_steps: int, seed: int
) -> list[KnockOut]:
    """All sets that completeness is tested on; none twice, and all on every pair but the greedy one."""
    graph, everyone = circuit.graph, np.arange(len(meter))
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
    if greedy_steps and len(meter) > 1 and len(circuit):
        found.append(_greedy(meter, circuit, greedy_steps, rng))
    distinct = {
        each.edges.tobytes(): each for each in reversed(found) if each.edges.any() or each is found[0]
    }
    return list(reversed(distinct.values()))


# -- inside --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Tested:
    """One set's test: its difference as a share, the p-values, and what its power follows from."""

    share: float
    p_value: float | None
    beyond: float | None
    sides: tuple[NDArray[np.float64], NDArray[np.float64]]
    margin: float

    def power(self, alpha: float) -> float | None:
        powers = [power_of_mean(side, self.margin, alpha) for side in self.sides]
        known = [power for power in powers if power is not None]
        return max(0.0, sum(known) - 1) if len(known) == 2 else None


def _test(
    difference: NDArray[np.float64],
    effect: NDArray[np.float64],
    each: KnockOut,
    margin: float,
    settings: Bootstrap,
    clusters: Sequence[str] | None,
) -> _Tested:
    labels = None if clusters is None else [clusters[row] for row in each.rows]
    change = difference[each.rows]
    room = margin * effect[each.rows] * np.sign(effect.mean())
    beyond = [mean_above(sign * change - room, 0.0, settings, labels) for sign in (1.0, -1.0)]
    known = [side for side in beyond if side is not None]
    return _Tested(
        share=float(change.mean() / (room.mean() / margin)),
        p_value=equivalence_p(change, room, settings, labels),
        beyond=min(known) if known else None,
        sides=(room + change, room - change),
        margin=float(room.mean()),
    )


def _runs(circuit: Circuit, sets: Sequence[KnockOut]) -> list[KnockOut]:
    """For each set the circuit without it, and the model without it."""
    full = circuit.graph.edge_mask
    return [
        KnockOut(each.name, kept & ~each.edges, each.rows) for each in sets for kept in (circuit.kept, full)
    ]


def _greedy(meter: PairMeter, circuit: Circuit, steps: int, rng: np.random.Generator) -> KnockOut:
    """Edge after edge, of a few random candidates the one that drives circuit and model furthest apart."""
    chosen_on, tested_on = np.arange(0, len(meter), 2), np.arange(1, len(meter), 2)
    edges: Float[NDArray[np.bool_], "sender receiver group"] = np.zeros(circuit.graph.shape, dtype=bool)
    places = np.argwhere(circuit.kept)
    for _ in range(min(steps, len(places))):
        left = [place for place in places if not edges[tuple(place)]]
        tried = []
        for index in rng.permutation(len(left))[:GREEDY_CANDIDATES]:
            grown = edges.copy()
            grown[tuple(left[index])] = True
            tried.append(KnockOut("greedy", grown, chosen_on))
        both = meter.many([each.edges for each in _runs(circuit, tried)])
        apart = np.abs((both[::2] - both[1::2])[:, chosen_on].mean(axis=1))
        edges = tried[int(apart.argmax())].edges
    return KnockOut("greedy set", edges, tested_on)


def _verdict(p_value: float | None, tests: Sequence[_Tested], alpha: float) -> str:
    if p_value is not None and p_value <= alpha:
        return PASSED
    beyond = [test.beyond for test in tests if test.beyond is not None]
    return FAILED if beyond and min(beyond) <= alpha / (2 * len(tests)) else UNDECIDED


def _reason(verdict: str, worst: KnockOut, share: float, margin: float, n_sets: int) -> str:
    found = (
        f"Of {n_sets} sets of its edges, circuit and model differ most without {worst.name} "
        f"({int(worst.edges.sum())} edges): by {share:+.3f} of the behaviour"
    )
    if verdict == PASSED:
        return f"{found}; all differences are shown to be below {margin:g}."
    if verdict == FAILED:
        return f"{found}. A difference beyond {margin:g} is shown: something outside the circuit stands in."
    return f"{found}. That all differences are below {margin:g} is not shown."

"""Do the tests of a circuit reject as often as they say? `python -m bench.calibration`

For every test, 2000 draws under a true null hypothesis: it should reject in 3 to 7 % of them (its level is
5 %). With 500 draws one rate in twenty lies two points off by luck alone; with 2000, one point. And 200
draws of 64 pairs with the true circuit: it should decide rightly in at least 90 %.

The *population* is a large pool of drawn cat-dog pairs on which every needed circuit is run once; a draw
takes 64 pairs of it. So masked runs are paid for once, and the truth is known: the figure of the whole
pool. Each null hypothesis is put exactly on its boundary, where a test rejects most often. Tests of
equivalence reach their level only where the margin is wide beside the error of the mean, and where nothing
but one figure lies on it; so theirs is the boundary of a *weak* circuit, one that the search passed through
at a faithfulness near 0.8.

| test | how the null is made true |
| --- | --- |
| mean above (Falls, Rises) | the claim is the pool's own mean fall |
| mean above, clustered | the same, with 64 clusters of 1 to 4 pairs that share an image's noise |
| equivalence | the margin is the weak circuit's own distance from faithfulness 1 |
| completeness | the margin is the weak circuit's own largest difference; the other knock-outs tell nothing |
| sufficiency | the circuit is itself one of the random connected circuits |
| partial necessity | the share that may be as bad is the pool's own share, over the random circuits |
| independence | what the complement says is taken from other pairs than what the model says |
| minimality | the edge tested is itself one that came with a random path |
| flips | the share to be exceeded is the pool's own |

The exact level of a binomial test jumps with the number of pairs, so for flips the number from 50 to 64 is
taken whose level is nearest to 5 %.

Power is that with the circuit that `find` gives at a faithfulness near 1, in the usual setting of each
test. Two are ideals that it need not meet. Minimality: edges that carry at least 2 % of the behaviour
should be found needed (the share of all edges is printed too). Completeness: a circuit that lacks idle
paths only should pass (how often the found circuit passes is printed too).

Independence is the one test that a true circuit should *not* reject: what is left without it restores
nothing, so that what it says is noise. Its power is therefore that against circuits that are not complete,
whose rest restores the behaviour in part, in step with how strong it is: a tenth of it beside that noise;
and all that is left of it without a random circuit of other paths. How often the true circuit's own rest is
called dependent is printed too.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats
from tqdm.auto import tqdm

import circuitvit as cv
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.engine import Evaluator
from circuitvit.graph import EdgeMask
from circuitvit.pruning import Plan
from circuitvit.verification import (
    SUPPORTED,
    Bootstrap,
    complement_circuits,
    connected_circuits,
    hsic_permutation_p,
    mean_above,
)
from circuitvit.verification.ideals import inflated_circuits, minimality_p_values
from circuitvit.verification.statistics import equivalence_p, rank_p
from circuitvit.verification.verdict import share_verdict

ALPHA = 0.05
PAIRS = 64
BAND = (0.03, 0.07)
ENOUGH_POWER = 0.9
SEARCH_PAIRS = 96
ASKED = 0.97
"""The faithfulness that the true circuit is searched for: a weaker one is not what the tests should find."""

WEAK = 0.8
"""The faithfulness of a circuit that is on the edge of equivalence at the usual margin."""

N_RANDOM = 99
N_OTHERS = 89


@dataclass(frozen=True)
class Population:
    """Metrics of every pair of the pool under everything that the tests run, `(..., pair)`."""

    whole: np.ndarray
    nothing: np.ndarray
    circuit: np.ndarray
    weak: np.ndarray  # with a circuit that is not faithful enough kept
    complement: np.ndarray
    ablated: np.ndarray  # with the circuit's strongest edge ablated from the model
    randoms: np.ndarray  # (random connected circuit, pair), kept
    without_randoms: np.ndarray  # (circuit of the rest, pair), ablated
    edges: np.ndarray  # (edge of the circuit, pair): change when knocked out
    idle: np.ndarray  # (edge of a random path, pair): likewise
    apart: np.ndarray  # (knock-out, pair): circuit minus model
    apart_whole: np.ndarray  # the same for the whole graph without some idle paths
    apart_weak: np.ndarray  # the same for the weak circuit
    flipped: np.ndarray  # whether the top class changes under some ablation that changes about half of them

    @property
    def effect(self) -> np.ndarray:
        return self.whole - self.nothing


def population(n_pairs: int, n_circuits: int, seed: int) -> tuple[Population, cv.Circuit]:
    """Find the true circuit, and run everything on the pool."""
    model = cv.load("catdog-tiny")
    metric = cv.logit_diff("cat", "dog")
    search = cv.Task(*catdog_pairs(SEARCH_PAIRS, seed=2 * seed), metric=metric)
    plan = Plan(steps=30, trim_runs=600, batch_size=16, seed=seed)
    found = cv.find(model, search, faithfulness=ASKED, plan=plan)
    circuit = found.circuit
    weak = min(found.candidates, key=lambda each: abs(each.faithfulness - WEAK)).kept
    pool = cv.Task(*catdog_pairs(n_pairs, seed=2 * seed + 1), metric=metric)
    evaluator = Evaluator(pool.prepare(model), progress=True)
    graph, full = model.graph, model.graph.edge_mask

    def without(kept: EdgeMask, place: np.ndarray) -> EdgeMask:
        smaller = kept.copy()
        smaller[tuple(place)] = False
        return smaller

    places = np.argwhere(circuit.kept)
    knocked = evaluator.values(circuit.kept) - evaluator.many(
        [without(circuit.kept, place) for place in places]
    )
    inflated = inflated_circuits(circuit, n_circuits + 40, seed)
    both = evaluator.many([mask for pair in inflated for mask in pair])
    rng = np.random.default_rng(seed)
    halves = [circuit.kept & (rng.random(graph.shape) < 0.5) for _ in range(5)]

    def apart(kept: EdgeMask) -> np.ndarray:
        return np.stack(
            [
                evaluator.values(kept & ~half) - evaluator.values(full & ~half)
                for half in [np.zeros_like(full), *halves]
            ]
        )

    randoms = [each.kept for each in connected_circuits(circuit, n_circuits, seed)]
    others = [each.kept for each in complement_circuits(circuit, n_circuits, seed)]
    kept, without_others = evaluator.many(randoms), evaluator.many([full & ~each for each in others])
    changed = [
        evaluator.tops(mask) != evaluator.tops(full)
        for mask in [*randoms, *(full & ~each for each in others)]
    ]
    strongest = places[int(np.abs(knocked.mean(axis=1)).argmax())]
    return Population(
        whole=evaluator.whole,
        nothing=evaluator.nothing,
        circuit=evaluator.values(circuit.kept),
        weak=evaluator.values(weak),
        complement=evaluator.values((~circuit).kept),
        ablated=evaluator.values(without(full, strongest)),
        randoms=kept,
        without_randoms=without_others,
        edges=knocked,
        idle=both[::2] - both[1::2],
        apart=apart(circuit.kept),
        apart_whole=apart(full & ~others[0]),
        apart_weak=apart(weak),
        flipped=min(changed, key=lambda marks: abs(float(marks.mean()) - 0.5)),
    ), circuit


Draw = Callable[[np.random.Generator], bool]
"""One draw: whether the test rejects (under the null) or decides rightly (for power)."""


def shares(values: np.ndarray, effect: np.ndarray) -> np.ndarray:
    """Ratios of means, one for each row of values."""
    return np.asarray(values.sum(axis=-1) / effect.sum())


def exact_level(n: int, share: float) -> float:
    """How often a binomial test of `n` pairs rejects a true share."""
    tails = stats.binom.sf(np.arange(-1, n), n, share)
    return float(tails[tails <= ALPHA].max(initial=0.0))


def own_seed(rng: np.random.Generator) -> Bootstrap:
    """Settings with a seed of their own, so that all draws do not share the accidents of one resampling."""
    return Bootstrap(seed=int(rng.integers(2**31)))


def nulls(pool: Population) -> dict[str, Draw]:
    """The tests under a true null."""
    n = len(pool.whole)
    fall, effect = pool.whole - pool.ablated, pool.effect
    rows = lambda rng: rng.integers(n, size=PAIRS)  # noqa: E731

    def mean(rng: np.random.Generator) -> bool:
        p_value = mean_above(fall[rows(rng)], float(fall.mean()), own_seed(rng))
        return p_value is not None and p_value <= ALPHA

    def clustered(rng: np.random.Generator) -> bool:
        sizes = rng.integers(1, 5, size=PAIRS)
        clusters = np.repeat(np.arange(PAIRS), sizes)
        shared = rng.normal(scale=fall.std(), size=PAIRS)[clusters]
        values = fall[rng.integers(n, size=len(clusters))] + shared
        p_value = mean_above(values, float(fall.mean()), own_seed(rng), clusters)
        return p_value is not None and p_value <= ALPHA

    def equivalence(rng: np.random.Generator) -> bool:
        difference = pool.weak - pool.whole
        margin = abs(float(shares(difference, effect)))
        at = rows(rng)
        p_value = equivalence_p(difference[at], margin * effect[at], own_seed(rng))
        return p_value is not None and p_value <= ALPHA

    distances = np.abs(shares(pool.apart_weak, effect))
    worst = int(distances.argmax())
    knock_outs = pool.apart_whole.copy()
    knock_outs[worst] = pool.apart_weak[worst]

    def completeness(rng: np.random.Generator) -> bool:
        at, margin = rows(rng), float(distances[worst])
        found = [equivalence_p(row[at], margin * effect[at], own_seed(rng)) for row in knock_outs]
        return max(each for each in found if each is not None) <= ALPHA

    def sufficiency(rng: np.random.Generator) -> bool:
        chosen, at = rng.permutation(len(pool.randoms))[: N_RANDOM + 1], rows(rng)
        kept = pool.randoms[np.ix_(chosen, at)] - pool.nothing[at]
        goodness = -np.abs(shares(kept, effect[at]) - 1)
        return rank_p(float(goodness[0]), goodness[1:]) <= ALPHA

    lost = shares(pool.whole - pool.without_randoms, effect)
    typical = float(np.quantile(lost, 0.9))  # a circuit that exactly a tenth of all are missed as much as

    def necessity(rng: np.random.Generator) -> bool:
        drawn = lost[rng.integers(len(lost), size=N_OTHERS)]
        return (
            share_verdict(int((drawn >= typical).sum()), N_OTHERS, float((lost >= typical).mean()), ALPHA)
            == SUPPORTED
        )

    def independence(rng: np.random.Generator) -> bool:
        rest = (pool.complement - pool.nothing)[rows(rng)]
        return hsic_permutation_p(effect[rows(rng)], rest, 99, int(rng.integers(2**31))) <= ALPHA

    def minimality(rng: np.random.Generator) -> bool:
        chosen, at = rng.permutation(len(pool.idle))[: N_RANDOM + 5], rows(rng)
        sizes = np.abs(shares(pool.idle[np.ix_(chosen, at)], effect[at]))
        p_values = minimality_p_values(sizes[:5], sizes[5:])
        return bool((stats.false_discovery_control(p_values) <= ALPHA).any())

    share = float(pool.flipped.mean())
    pairs = max(range(50, PAIRS + 1), key=lambda size: exact_level(size, share))

    def flips(rng: np.random.Generator) -> bool:
        hits = int(pool.flipped[rng.integers(n, size=pairs)].sum())
        return float(stats.binomtest(hits, pairs, share, alternative="greater").pvalue) <= ALPHA

    return {
        "mean above (Falls, Rises)": mean,
        "mean above, clustered": clustered,
        "equivalence (TOST)": equivalence,
        "completeness (worst of 6 knock-outs)": completeness,
        "sufficiency (random connected circuits)": sufficiency,
        "partial necessity (circuits of the rest)": necessity,
        "independence of the complement (HSIC)": independence,
        "minimality (5 idle edges, BH)": minimality,
        "flips (exact binomial)": flips,
    }


def powers(pool: Population) -> dict[str, Draw]:
    """The tests with the true circuit on 64 pairs, as a user runs them."""
    n, effect = len(pool.whole), pool.effect
    rows = lambda rng: rng.integers(n, size=PAIRS)  # noqa: E731

    def falls(rng: np.random.Generator) -> bool:
        fall = (pool.whole - pool.ablated)[rows(rng)]
        p_value = mean_above(fall, 0.5 * float((pool.whole - pool.ablated).mean()), own_seed(rng))
        return p_value is not None and p_value <= ALPHA

    def equivalence(rng: np.random.Generator) -> bool:
        at = rows(rng)
        p_value = equivalence_p((pool.circuit - pool.whole)[at], 0.2 * effect[at], own_seed(rng))
        return p_value is not None and p_value <= ALPHA

    def sufficiency(rng: np.random.Generator) -> bool:
        at = rows(rng)
        others = pool.randoms[np.ix_(rng.permutation(len(pool.randoms))[:N_RANDOM], at)]
        kept = np.concatenate([pool.circuit[None, at], others]) - pool.nothing[at]
        goodness = -np.abs(shares(kept, effect[at]) - 1)
        return rank_p(float(goodness[0]), goodness[1:]) <= ALPHA

    def necessity(rng: np.random.Generator) -> bool:
        at = rows(rng)
        others = pool.without_randoms[np.ix_(rng.permutation(len(pool.without_randoms))[:N_OTHERS], at)]
        own = shares((pool.whole - pool.complement)[at], effect[at])
        b = int((shares((pool.whole[at] - others), effect[at]) >= own).sum())
        return share_verdict(b, N_OTHERS, 0.1, ALPHA) == SUPPORTED

    carried = np.abs(shares(pool.edges, effect)) >= 0.02

    def minimality(rng: np.random.Generator) -> bool:
        found = needed(rng)
        return bool(found[rng.choice(np.flatnonzero(carried))])

    def any_edge(rng: np.random.Generator) -> bool:
        found = needed(rng)
        return bool(found[rng.integers(len(found))])

    def needed(rng: np.random.Generator) -> np.ndarray:
        at = rows(rng)
        drawn = pool.idle[np.ix_(rng.permutation(len(pool.idle))[: 2 * N_RANDOM + 1], at)]
        p_values = minimality_p_values(
            np.abs(shares(pool.edges[:, at], effect[at])), np.abs(shares(drawn, effect[at]))
        )
        return np.asarray(stats.false_discovery_control(p_values) <= ALPHA)

    def dependent(rests: np.ndarray) -> Draw:
        """Whether what one of the complements `(complement, pair)` restores is called dependent."""

        def independence(rng: np.random.Generator) -> bool:
            at, rest = rows(rng), rests[rng.integers(len(rests))]
            return hsic_permutation_p(effect[at], rest[at], 99, int(rng.integers(2**31))) <= ALPHA

        return independence

    rest = (pool.complement - pool.nothing)[None]

    def complete(apart: np.ndarray) -> Draw:
        def completeness(rng: np.random.Generator) -> bool:
            at = rows(rng)
            found = [equivalence_p(row[at], 0.3 * effect[at], own_seed(rng)) for row in apart]
            return max(each for each in found if each is not None) <= ALPHA

        return completeness

    return {
        "mean above (half of the true fall)": falls,
        "equivalence (margin 0.2)": equivalence,
        "completeness (only idle paths missing)": complete(pool.apart_whole),
        "(completeness of the found circuit)": complete(pool.apart),
        "sufficiency": sufficiency,
        "partial necessity": necessity,
        "independence (the rest carries a tenth)": dependent(rest + 0.1 * effect),
        "independence (rest of a wrong circuit)": dependent(pool.without_randoms - pool.nothing),
        "(independence, rest of the true circuit)": dependent(rest),
        "minimality (edges that carry 2 %)": minimality,
        "(minimality, all edges of the circuit)": any_edge,
    }


def rate(draw: Draw, n_draws: int, seed: int, name: str) -> float:
    """How often a draw says yes."""
    rng = np.random.default_rng([seed, *name.encode()])
    return float(np.mean([draw(rng) for _ in tqdm(range(n_draws), desc=name, delay=1, leave=False)]))


def main() -> None:
    """Print both tables; the exit code is 1 if a rate lies outside."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=2000, help="under the null (default 2000)")
    parser.add_argument("--power-draws", type=int, default=200, help="with the true circuit (default 200)")
    parser.add_argument("--pool", type=int, default=128, help="pairs of the population (default 128)")
    parser.add_argument(
        "--circuits", type=int, default=200, help="random circuits of each kind (default 200)"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.perf_counter()
    pool, circuit = population(options.pool, options.circuits, options.seed)
    faithful = float(shares(pool.circuit - pool.nothing, pool.effect))
    print(f"true circuit: {circuit}, faithfulness {faithful:.3f} on a pool of {options.pool} pairs")
    print(f"population ready after {time.perf_counter() - start:.0f} s\n")
    bad = 0
    print(f"rejections of a true null in {options.draws} draws of {PAIRS} pairs; level {ALPHA:.0%}")
    for name, draw in nulls(pool).items():
        found = rate(draw, options.draws, options.seed, name)
        inside = BAND[0] <= found <= BAND[1]
        bad += not inside
        print(f"  {name:42s} {found:6.1%}  {'ok' if inside else 'OUTSIDE 3 to 7 %'}")
    print(f"\npower with the true circuit in {options.power_draws} draws of {PAIRS} pairs")
    for name, draw in powers(pool).items():
        found = rate(draw, options.power_draws, options.seed + 1, name)
        aside = name.startswith("(")
        bad += found < ENOUGH_POWER and not aside
        said = "for comparison" if aside else "ok" if found >= ENOUGH_POWER else "BELOW 90 %"
        print(f"  {name:42s} {found:6.1%}  {said}")
    print(f"\n{time.perf_counter() - start:.0f} s")
    if bad:
        sys.exit(1)


if __name__ == "__main__":
    main()

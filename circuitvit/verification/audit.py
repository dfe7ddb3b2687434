"""The hypothesis tests of a circuit: is it better than chance, is it needed, does it do what the model does?

Sufficiency and partial necessity compare one figure of the circuit with the same figure of random circuits
without dead edges (`circuitvit.verification.null`), and are exact for any number of pairs, even one: what is
random is the circuit. That other images would give the same is another question, to which the interval and
the power speak: the share of resampled sets of pairs on which the circuit would pass again. Equivalence asks
that question of the circuit's faithfulness itself. The three decide; `circuitvit.verification.ideals` holds
those that few circuits pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import stats

from circuitvit._keywords import running
from circuitvit.engine import Evaluator, resampled_sums
from circuitvit.errors import OptionError, counted
from circuitvit.graph import Circuit, CircuitLike, as_circuit
from circuitvit.models import Model
from circuitvit.tasks import PreparedTask, Task, prepare
from circuitvit.verification.faithfulness import origin_differs
from circuitvit.verification.ideals import completeness_test, minimality_test
from circuitvit.verification.independence import independence_test
from circuitvit.verification.null import complement_circuits, connected_circuits
from circuitvit.verification.statistics import (
    MIN_PAIRS,
    Bootstrap,
    Estimate,
    as_extreme,
    beyond_p,
    cluster_sums,
    equivalence_p,
    power_of_equivalence,
    ratio_interval,
)
from circuitvit.verification.verdict import (
    REFUTED,
    SUPPORTED,
    UNDECIDED,
    AuditSettings,
    Verdict,
    check_clusters,
    rank_verdict,
    share_verdict,
)

POWER_RESAMPLES = 200

AS_BAD = 0.1
"""Share of random circuits of the rest of the model that may be missed as much as a necessary circuit."""

SHI = "Shi et al. 2024, arXiv:2410.13032; Besag and Clifford 1989, Biometrika 76"

Shares = Float[np.ndarray, "circuit"]


@running
def audit(
    model: Model,
    task: Task | PreparedTask,
    circuit: CircuitLike,
    *,
    settings: AuditSettings | None = None,
    clusters: Sequence[str] | None = None,
    batch_size: int | None = None,
    memory: int | str | None = None,
    progress: bool = True,
) -> tuple[Verdict, ...]:
    """Put a circuit to every test of this room.

    Sufficiency, partial necessity and equivalence decide (see `Report.conclusion`); minimality, completeness
    and independence of the complement are ideals that few circuits meet, and say how far this one is
    from them.

    Args:
        model: from `load` or `wrap`.
        task: images, metric and ablation; best on pairs that discovery has not seen.
        circuit: to test. Where it was found on another model, every reason says so.
        settings: see `AuditSettings`.
        clusters: which cluster (photograph, class) each pair belongs to, where pairs are not independent.
        batch_size: pairs at once; by default what `memory` allows.
        memory: bytes that a batch, and what is kept between runs, may take.
        progress: whether to show a bar.

    Raises:
        OptionError: if the circuit belongs to another graph, has no live edge, the task was prepared for
            another model, or a setting makes no sense.
        DataError: if the metric does not differ with and without the behaviour.

    Example:
        >>> verdicts = audit(model, task, circuit)  # doctest: +SKIP
        >>> [each.verdict for each in verdicts]  # doctest: +SKIP
        ['supported', 'supported', 'supported', 'supported', 'refuted', 'refuted']
    """
    evaluator = Evaluator(prepare(model, task), batch_size=batch_size, memory=memory, progress=progress)
    circuit = as_circuit(circuit, evaluator.graph)
    verdicts = run_audit(evaluator, circuit, settings or AuditSettings(), clusters)
    note = origin_differs(circuit, model)
    return tuple(replace(each, reason=f"{each.reason} {note}") if note else each for each in verdicts)


def run_audit(
    evaluator: Evaluator,
    circuit: Circuit,
    settings: AuditSettings,
    clusters: Sequence[str] | None = None,
    randoms: Sequence[Circuit] | None = None,
) -> tuple[Verdict, ...]:
    """The tests on an evaluator at hand, which runs no circuit twice, and on `connected_circuits` at hand, if
    any. See `audit`."""
    live = circuit.pruned()
    if not len(live):
        raise OptionError("the circuit has no edge on a path from input to logits: there is nothing to test")
    check_clusters(clusters, len(evaluator))
    evaluator.check_effect()
    if randoms is None:
        randoms = connected_circuits(live, settings.n_random, settings.seed)
    try:
        others = complement_circuits(live, settings.n_others, settings.seed)
    except OptionError:  # the circuit leaves too little of the model to draw from
        others = ()
    found = [
        sufficiency_test(evaluator, circuit, randoms, settings, clusters),
        necessity_test(evaluator, circuit, others, settings, clusters),
        equivalence_test(evaluator, circuit, settings, clusters),
        independence_test(evaluator, circuit, settings),
    ]
    if settings.n_paths:
        found.append(minimality_test(evaluator, circuit, settings, clusters))
        found.append(completeness_test(evaluator, circuit, settings, clusters))
    return tuple(found)


def sufficiency_test(
    evaluator: Evaluator,
    circuit: CircuitLike,
    randoms: Sequence[Circuit],
    settings: AuditSettings | None = None,
    clusters: Sequence[str] | None = None,
) -> Verdict:
    """Does the circuit keep the behaviour better than chance?

    Null hypothesis: the circuit is a random connected circuit of its size and profile over stages.
    Statistic: `|f(C) - 1|`, with `f` the faithfulness, a ratio of means over pairs; small is extreme.
    p-value: `(b + 1) / (n + 1)`, `b` of the random circuits being as close to 1; ties count as close.
    Source: the sufficiency test of Shi et al. 2024, arXiv:2410.13032, with connected circuits and the exact
    rank instead of a binomial approximation.

    Args:
        evaluator: of the task.
        circuit: to test.
        randoms: from `connected_circuits`.
        settings: level, number of resamples, seed.
        clusters: which cluster each pair belongs to.
    """
    settings, circuit = settings or AuditSettings(), as_circuit(circuit, evaluator.graph)
    n, alpha = len(randoms), settings.alpha
    kept = evaluator.many([circuit.kept, *(each.kept for each in randoms)]) - evaluator.nothing
    decide = partial(rank_verdict, n=n, alpha=alpha)
    found = _ranked(kept, evaluator.effect, as_faithful, decide, settings.draws, clusters)
    reason = (
        f"{found.as_good} of {n} random connected circuits of the same size and profile over stages keep the "
        f"behaviour as well (the circuit {found.own.value:.3f}, they {found.typical:.3f} on average)."
    )
    return Verdict(
        claim="sufficiency",
        expectation="the circuit alone keeps the behaviour better than random connected circuits do",
        statistic="faithfulness",
        p_value=(found.as_good + 1) / (n + 1),
        scope="these pairs, against random circuits",
        null="the circuit is a random connected circuit with as many edges into each stage",
        assumes=(
            "The random circuits are exchangeable with the circuit if it is itself a uniform draw among "
            "them; a circuit found on these very pairs has an advantage."
        ),
        **found.verdict(reason, evaluator, circuit, randoms, alpha),
    )


def necessity_test(
    evaluator: Evaluator,
    circuit: CircuitLike,
    randoms: Sequence[Circuit],
    settings: AuditSettings | None = None,
    clusters: Sequence[str] | None = None,
) -> Verdict:
    """Does ablating the circuit hurt more than ablating as much of the rest of the model?

    Null hypothesis: of all random circuits of its size in the rest of the model, at least a tenth are
    missed as much as the circuit is.
    Statistic: the share of the behaviour lost when only its edges are ablated, `1 - f(everything but C)`.
    p-value: `P(Binomial(n, as_bad) <= b)`, `b` of the random circuits being missed as much; ties count.
    Verdict: refuted when the same share is refuted from the other side (more than a tenth are).
    Source: partial necessity of Shi et al. 2024, arXiv:2410.13032, with the exact binomial tail.

    The rank `(b + 1) / (n + 1)` would be wrong here: circuits of the complement cannot hold the circuit's
    edges, so they are not exchangeable with it, and where one edge dominates the model any circuit that
    holds it would seem necessary.

    Args:
        evaluator: of the task.
        circuit: to test.
        randoms: from `complement_circuits`.
        settings: level, number of resamples, seed.
        clusters: which cluster each pair belongs to.
    """
    settings, circuit = settings or AuditSettings(), as_circuit(circuit, evaluator.graph)
    n, alpha = len(randoms), settings.alpha
    lost = evaluator.whole - evaluator.many([~circuit.kept, *(~each.kept for each in randoms)])
    decide = partial(share_verdict, n=n, share=AS_BAD, alpha=alpha)
    found = _ranked(
        lost, evaluator.effect, lambda shares: as_extreme(float(shares[0]), shares[1:]), decide,
        settings.draws, clusters,
    )  # fmt: skip
    reason = (
        f"{found.as_good} of {n} random circuits of as many edges, made of other paths, are missed as much "
        f"(without the circuit {found.own.value:.3f} of the behaviour is lost, without one of them "
        f"{found.typical:.3f} on average)."
    )
    return Verdict(
        claim="partial necessity",
        expectation="the model misses the circuit more than it misses as much of the rest",
        statistic="share of the behaviour lost without it",
        p_value=float(stats.binom.cdf(found.as_good, n, AS_BAD)),
        scope="these pairs, against the rest of the model",
        null=f"at least {AS_BAD:.0%} of random circuits in the rest of the model are missed as much",
        assumes=(
            "Nothing about the circuit; the statement is about random circuits of other paths. A circuit "
            "found on these very pairs has an advantage."
        ),
        **found.verdict(reason, evaluator, circuit, randoms, alpha),
    )


def equivalence_test(
    evaluator: Evaluator,
    circuit: CircuitLike,
    settings: AuditSettings | None = None,
    clusters: Sequence[str] | None = None,
) -> Verdict:
    """Is the circuit's mean metric that of the whole model, to within a share of the behaviour?

    Null hypothesis: `|mean(m(C) - m(all))| >= margin * |mean(m(all) - m(none))|`, that is, faithfulness is
    outside `1 - margin` to `1 + margin`. That two means "do not differ significantly" shows nothing, as any
    two do when pairs are few; here few pairs show nothing.
    Statistic: the two one-sided BCa p-values of means of pairs, the larger one counting.
    Verdict: supported when the null is rejected; refuted when faithfulness is shown to lie outside; else
    undecided. With fewer than 5 pairs there is no test.
    Assumed: pairs (or clusters) are independent draws.
    Power: at a true faithfulness of 1 and the spread seen, by the noncentral t.
    Source: Schuirmann 1987, J. Pharmacokin. Biopharm. 15; the hypothesis of equivalence in Shi et al. 2024,
    arXiv:2410.13032, which tests a sign instead.

    Args:
        evaluator: of the task.
        circuit: to test.
        settings: level, margin, number of resamples, seed.
        clusters: which cluster each pair belongs to.
    """
    settings, circuit = settings or AuditSettings(), as_circuit(circuit, evaluator.graph)
    alpha, margin, draws = settings.alpha, settings.margin, settings.draws
    sign = np.sign(evaluator.effect.mean())
    effect = evaluator.effect * sign
    difference, room = (evaluator.values(circuit.kept) - evaluator.whole) * sign, margin * effect
    faithfulness = ratio_interval(effect + difference, effect, draws, clusters)
    p_value = equivalence_p(difference, room, draws, clusters)
    outside = beyond_p(difference, room, draws, clusters)
    within = f"within {1 - margin:g} to {1 + margin:g}"
    verdict, found = UNDECIDED, f"{counted(len(evaluator), 'pair')} do not show whether it lies {within}"
    if p_value is None or outside is None:
        found += f"; it takes {MIN_PAIRS} or more"
    elif p_value <= alpha:
        verdict, found = SUPPORTED, f"shown to lie {within}"
    elif outside <= alpha / 2:
        verdict, found = REFUTED, f"shown not to lie {within}"
    return Verdict(
        claim="equivalence",
        verdict=verdict,
        reason=f"Faithfulness is {faithfulness}{':' if verdict == UNDECIDED else ','} {found}.",
        expectation=f"the circuit does what the model does, to within {margin:.0%} of the behaviour",
        statistic="faithfulness",
        effect=faithfulness,
        p_value=p_value,
        n=len(evaluator),
        alpha=alpha,
        scope="all such pairs",
        edges=len(circuit),
        null=f"faithfulness is at most {1 - margin:g} or at least {1 + margin:g}",
        assumes="Pairs (or clusters of pairs) are independent draws from those of interest.",
        source="two one-sided tests, Schuirmann 1987; BCa bootstrap, Efron 1987",
        power=power_of_equivalence(difference, room, alpha, clusters),
        details={"margin": margin},
    )


def as_faithful(shares: Shares) -> int:
    """How many of the figures after the first are as close to 1 as it is; ties count."""
    closeness = -np.abs(shares - 1)
    return as_extreme(float(closeness[0]), closeness[1:])


# -- inside --------------------------------------------------------------------------------------


class _Ranked(NamedTuple):
    """One figure of the circuit among that of random circuits."""

    own: Estimate
    typical: float
    as_good: int
    outcome: str
    power: float | None

    def verdict(
        self, reason: str, evaluator: Evaluator, circuit: Circuit, randoms: Sequence[Circuit], alpha: float
    ) -> dict[str, Any]:
        """What verdicts against random circuits have in common."""
        n, shared = len(randoms), shared_edges(circuit, randoms)
        if self.outcome == UNDECIDED:
            reason += f" With {n} random circuits that decides nothing at the level {alpha:g}; draw more."
        typical = self.typical if randoms else None
        details = {"random": n, "as_good": self.as_good, "random_mean": typical, "shared": shared}
        return {
            "verdict": self.outcome, "reason": reason, "effect": self.own, "n": len(evaluator),
            "alpha": alpha, "edges": len(circuit), "source": SHI, "power": self.power, "details": details,
        }  # fmt: skip


def _ranked(
    gains: Float[NDArray[np.float64], "circuit pair"],
    effect: Float[NDArray[np.float64], " pair"],
    as_good: Callable[[Shares], int],
    decide: Callable[[int], str],
    draws: Bootstrap,
    clusters: Sequence[str] | None,
) -> _Ranked:
    """The figure `sum(gains) / sum(effect)` of the circuit (row 0) among that of the others.

    Power is the share of resampled sets of pairs on which the verdict would be "supported".
    """
    shares = gains.sum(axis=1) / effect.sum()
    b = as_good(shares)
    sums = np.array(cluster_sums(clusters, effect, *gains))
    n, power = sums.shape[1], None
    if n > 1 and len(gains) > 1:
        redrawn = np.array(resampled_sums(list(sums), POWER_RESAMPLES, draws.seed)).T
        again = [decide(as_good(row[1:] / row[0])) == SUPPORTED for row in redrawn if row[0] != 0]
        power = float(np.mean(again)) if again else None
    return _Ranked(
        own=ratio_interval(gains[0], effect, draws, clusters),
        typical=float(shares[1:].mean()) if len(shares) > 1 else float("nan"),
        as_good=b,
        outcome=decide(b),
        power=power,
    )


def shared_edges(circuit: Circuit, randoms: Sequence[Circuit]) -> float:
    """Which share of the circuit's live edges a random circuit has too, on average."""
    live = circuit.pruned()
    if not randoms or not len(live):
        return 0.0
    return float(np.mean([len(live & each) / len(live) for each in randoms]))

"""Does the circuit do what the model does? Two one-sided tests within an explicit margin."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from circuitvit.graph import Circuit
from circuitvit.verification.bootstrap import MIN_PAIRS, Bootstrap, mean_above, ratio_interval
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


def equivalence_test(
    meter: PairMeter,
    circuit: Circuit,
    *,
    margin: float = 0.2,
    alpha: float = 0.05,
    settings: Bootstrap | None = None,
    clusters: Sequence[str] | None = None,
) -> Outcome:
    """Is the circuit's mean metric that of the whole model, to within a share of the behaviour?

    Null hypothesis: `|mean(m(C) - m(all))| >= margin * |mean(m(all) - m(none))|`, that is, faithfulness is
    outside `1 - margin` to `1 + margin`. That two means "do not differ significantly" shows nothing, as any
    two do when pairs are few; here few pairs give no pass.
    Statistic: the two one-sided BCa p-values of means of pairs, the larger one counting.
    Verdict: passed when the null is rejected; failed when faithfulness is shown to lie outside; else
    undecided. With fewer than 5 pairs there is no test.
    Assumed: pairs (or clusters) are independent draws.
    Power: at a true faithfulness of 1 and the spread seen, by the noncentral t.
    Source: Schuirmann 1987, J. Pharmacokin. Biopharm. 15; the hypothesis of equivalence in Shi et al. 2024,
    arXiv:2410.13032, which tests a sign instead.

    Args:
        meter: of the task.
        circuit: to test.
        margin: largest difference that counts as none, as a share of the behaviour.
        alpha: level of significance.
        settings: of the bootstrap.
        clusters: which cluster each pair belongs to.

    Raises:
        OptionError: if the margin is not positive.
    """
    check_level(alpha)
    check_margin(margin)
    settings = settings or Bootstrap()
    effect = meter.effect * np.sign(meter.effect.mean())
    difference = (meter(circuit.kept) - meter.whole) * np.sign(meter.effect.mean())
    faithfulness = ratio_interval(effect + difference, effect, settings, clusters)
    p_value = equivalence_p(difference, margin * effect, settings, clusters)
    outside = [
        mean_above(sign * difference - margin * effect, 0.0, settings, clusters) for sign in (1.0, -1.0)
    ]
    verdict = _verdict(p_value, outside, alpha)
    within = f"within {1 - margin:g} to {1 + margin:g}"
    reasons = {
        PASSED: f"Faithfulness is {faithfulness}, shown to lie {within}.",
        FAILED: f"Faithfulness is {faithfulness}, shown not to lie {within}.",
        UNDECIDED: (
            f"Faithfulness is {faithfulness}: {len(meter)} pair(s) do not show whether it lies {within}"
            + (f"; it takes {MIN_PAIRS} or more." if p_value is None else ".")
        ),
    }
    powers = [
        power_of_mean(margin * effect + sign * difference, margin * float(effect.mean()), alpha, clusters)
        for sign in (1.0, -1.0)
    ]
    known = [power for power in powers if power is not None]
    return Outcome(
        name="equivalence",
        verdict=verdict,
        reason=reasons[verdict],
        question=f"Does the circuit do what the model does, to within {margin:.0%} of the behaviour?",
        null=f"faithfulness is at most {1 - margin:g} or at least {1 + margin:g}",
        statistic="faithfulness",
        effect=faithfulness,
        p_value=p_value,
        n=len(meter),
        alpha=alpha,
        power=max(0.0, sum(known) - 1) if len(known) == 2 else None,
        assumes="Pairs (or clusters of pairs) are independent draws from those of interest.",
        source="two one-sided tests, Schuirmann 1987; BCa bootstrap, Efron 1987",
        details={"margin": margin},
    )


def _verdict(p_value: float | None, outside: Sequence[float | None], alpha: float) -> str:
    if p_value is None:
        return UNDECIDED
    if p_value <= alpha:
        return PASSED
    return FAILED if min(each for each in outside if each is not None) <= alpha / 2 else UNDECIDED

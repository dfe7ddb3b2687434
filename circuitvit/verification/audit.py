"""All tests of a circuit, one after the other, on the same runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from circuitvit.errors import OptionError
from circuitvit.graph import Circuit
from circuitvit.models import Model
from circuitvit.tasks import PreparedTask, Task
from circuitvit.verification.against_random import necessity_test, sufficiency_test
from circuitvit.verification.bootstrap import Bootstrap
from circuitvit.verification.completeness import completeness_test
from circuitvit.verification.connected import complement_circuits, connected_circuits
from circuitvit.verification.equivalence import equivalence_test
from circuitvit.verification.faithfulness import require_effect
from circuitvit.verification.independence import independence_test
from circuitvit.verification.meter import PairMeter
from circuitvit.verification.minimality import minimality_test
from circuitvit.verification.outcome import Outcome


@dataclass(frozen=True)
class AuditSettings:
    """How the tests of a circuit are run.

    Attributes:
        alpha: level of significance of each test.
        margin: of equivalence, as a share of the behaviour.
        completeness_margin: of completeness, likewise.
        n_random: random connected circuits, for sufficiency.
        n_others: random circuits of the rest of the model, for necessity; 89 make its exact level 4.97 %.
        n_paths: random knock-outs, for minimality; 0 leaves minimality and completeness out, which take most
            of the time.
        n_bootstrap: how often pairs are resampled.
        seed: of everything random.
    """

    alpha: float = 0.05
    margin: float = 0.2
    completeness_margin: float = 0.3
    n_random: int = 99
    n_others: int = 89
    n_paths: int = 199
    n_bootstrap: int = 1000
    seed: int = 0


def audit(
    model: Model,
    task: Task | PreparedTask,
    circuit: Circuit,
    *,
    settings: AuditSettings | None = None,
    clusters: Sequence[str] | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> tuple[Outcome, ...]:
    """Put a circuit to every test of this room.

    Sufficiency, partial necessity and equivalence decide (see `Report.conclusion`); minimality, completeness
    and independence of the complement are ideals that few circuits meet, and say how far this one is
    from them.

    Args:
        model: from `load` or `wrap`.
        task: images, metric and ablation; best on pairs that discovery has not seen.
        circuit: to test.
        settings: see `AuditSettings`.
        clusters: which cluster (photograph, class) each pair belongs to, where pairs are not independent.
        batch_size: pairs at once.
        progress: whether to show bars.

    Raises:
        OptionError: if the circuit belongs to another graph, has no live edge, or a setting makes no sense.
        DataError: if the metric does not differ with and without the behaviour.

    Example:
        >>> outcomes = audit(model, task, circuit)  # doctest: +SKIP
        >>> [outcome.verdict for outcome in outcomes]  # doctest: +SKIP
        ['passed', 'passed', 'passed', 'passed', 'failed', 'failed']
    """
    prepared = task if isinstance(task, PreparedTask) else task.prepare(model)
    meter = PairMeter(prepared, batch_size=batch_size, progress=progress)
    return run_audit(meter, circuit, settings or AuditSettings(), clusters)


def run_audit(
    meter: PairMeter, circuit: Circuit, settings: AuditSettings, clusters: Sequence[str] | None = None
) -> tuple[Outcome, ...]:
    """The tests on a meter at hand. See `audit`."""
    meter.check(circuit)
    live = circuit.pruned()
    if not len(live):
        raise OptionError("the circuit has no edge on a path from input to logits: there is nothing to test")
    if clusters is not None and len(clusters) != len(meter):
        raise OptionError(f"{len(clusters)} clusters for {len(meter)} pairs: give one for each")
    draws = Bootstrap(n_resamples=settings.n_bootstrap, seed=settings.seed)
    names, label = meter.prepared.clean.names, meter.prepared.metric.label
    require_effect(meter.whole, meter.nothing, label=label, names=names, settings=draws)
    alpha, n, seed = settings.alpha, settings.n_random, settings.seed
    found = [
        sufficiency_test(
            meter, circuit, connected_circuits(live, n, seed), alpha=alpha, settings=draws, clusters=clusters
        ),
        necessity_test(
            meter,
            circuit,
            _others(live, settings.n_others, seed),
            alpha=alpha,
            settings=draws,
            clusters=clusters,
        ),
        equivalence_test(
            meter, circuit, margin=settings.margin, alpha=alpha, settings=draws, clusters=clusters
        ),
        independence_test(meter, circuit, alpha=alpha, settings=draws),
    ]
    if settings.n_paths:
        found += [
            minimality_test(
                meter, circuit, n_random=settings.n_paths, alpha=alpha, settings=draws, clusters=clusters
            ),
            completeness_test(
                meter, circuit, margin=settings.completeness_margin, alpha=alpha, settings=draws,
                clusters=clusters,
            ),
        ]  # fmt: skip
    return tuple(found)


def _others(live: Circuit, n: int, seed: int) -> tuple[Circuit, ...]:
    """Circuits of the rest of the model; none where the circuit leaves too little of it."""
    try:
        return complement_circuits(live, n, seed)
    except OptionError:
        return ()

"""`verify`: is the circuit enough, is it needed, and is it better than chance? Asked by ablation."""

from __future__ import annotations

from circuitvit.attribution import provenance_of
from circuitvit.engine import choose_batch_size, kept_edges
from circuitvit.errors import OptionError
from circuitvit.graph import Circuit, Provenance
from circuitvit.models import Model
from circuitvit.tasks import PreparedTask, Task, prepare
from circuitvit.verification.audit import AuditSettings, audit
from circuitvit.verification.bootstrap import Bootstrap
from circuitvit.verification.caveats import caveats
from circuitvit.verification.measure import run_circuits, section
from circuitvit.verification.random_circuits import random_circuits
from circuitvit.verification.report import CircuitSize, Report
from circuitvit.verification.robustness import robustness


def verify(
    model: Model,
    task: Task | PreparedTask,
    circuit: Circuit,
    *,
    held_out: Task | PreparedTask | None = None,
    n_random: int = 20,
    n_bootstrap: int = 1000,
    tests: bool | AuditSettings = False,
    robust: bool = False,
    seed: int = 0,
    batch_size: int | None = None,
    memory: int | None = None,
    progress: bool = True,
) -> Report:
    """Test a circuit by ablation.

    On every pair the model is run whole, with everything ablated, with only the circuit kept, with only the
    circuit ablated, and with each of several random circuits kept. From the metric `m` of these runs:

        faithfulness  f(C) = (m(C) - m(none)) / (m(all) - m(none))         is the circuit enough?
        necessity     1 - f(everything but C)                               is it needed?
        p-value       (b + 1) / (n_random + 1)                              is it better than chance?

    with `b` the number of random circuits whose faithfulness is as close to 1. All three are ratios of means
    over pairs (see `circuitvit.verification.faithfulness`), with 95 % intervals from resampling pairs (see
    `circuitvit.verification.bootstrap`). When denoising, "kept" reads "restored in the corrupt run".

    Wang et al. 2023, arXiv:2211.00593 (faithfulness); Mueller et al. 2025, arXiv:2504.13151; Shi et al. 2024,
    arXiv:2410.13032 (random circuits as a null hypothesis).

    Args:
        model: from `load` or `wrap`.
        task: images, metric and ablation.
        circuit: of the model's graph, with the task's token groups. It is run as given, so prune it first.
        held_out: the same behaviour on images that discovery has not seen; its figures become the headline.
        n_random: how many random circuits; 0 for none.
        n_bootstrap: how often the pairs are resampled.
        tests: put the circuit to the tests of `audit` too, whose verdict is the report's `conclusion`; True
            for the usual settings. On held-out pairs where there are any.
        robust: also run the circuit under other ablations, metrics and images, see `robustness`.
        seed: of the random circuits and the resampling.
        batch_size: pairs at once; chosen from the memory budget by default.
        memory: that budget, in bytes.
        progress: whether to show a bar.

    Raises:
        OptionError: if the circuit belongs to another graph than a task's, or a setting makes no sense.
        DataError: if images cannot be used, or the metric does not differ with and without the behaviour.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> from circuitvit.verification import verify
        >>> model = cv.load("catdog-tiny")
        >>> task = cv.Task(*catdog_pairs(2), metric=cv.logit_diff("cat", "dog"))
        >>> report = verify(model, task, cv.Circuit.full(model.graph), n_random=0, progress=False)
        >>> report.headline.faithfulness.value, report.headline.necessity.value
        (1.0, 1.0)
    """
    settings = Bootstrap(n_resamples=n_bootstrap, seed=seed)
    if batch_size is not None and batch_size < 1:
        raise OptionError(f"batch_size must be at least 1, not {batch_size}")
    randoms = random_circuits(circuit, n_random, seed)
    prepared = [prepare(model, each, progress) for each in (task, held_out) if each is not None]
    for each in prepared:
        kept_edges(each, circuit)  # refuses another graph now, before the first set of pairs has been run
    sections = []
    for images, each in zip(("task", "held-out"), prepared, strict=False):
        runs = run_circuits(each, circuit, randoms, batch_size or choose_batch_size(each, memory), progress)
        sections.append(section(images, runs, circuit, randoms, settings))
    size = _size(circuit)
    asked = AuditSettings(n_bootstrap=n_bootstrap, seed=seed) if tests is True else tests
    judged = prepared[-1]
    return Report(
        size=size,
        task=sections[0],
        held_out=sections[1] if len(sections) > 1 else None,
        warnings=caveats(circuit, size, sections, prepared),
        circuit_provenance=circuit.provenance,
        provenance=_provenance(prepared[0], settings, n_random),
        tests=(
            audit(model, judged, circuit, settings=asked, batch_size=batch_size, progress=progress)
            if asked
            else ()
        ),
        robustness=(
            robustness(model, judged, circuit, settings=settings, batch_size=batch_size) if robust else None
        ),
    )


def _size(circuit: Circuit) -> CircuitSize:
    live, graph = circuit.pruned(), circuit.graph
    asked = circuit.provenance.parameters.get("asked")
    return CircuitSize(
        edges=len(live),
        dead=len(circuit) - len(live),
        nodes=len(live.nodes),
        graph_edges=graph.n_edges,
        graph_nodes=len(graph.nodes),
        density=live.density,
        asked=asked if isinstance(asked, int) else None,
    )


def _provenance(prepared: PreparedTask, settings: Bootstrap, n_random: int) -> Provenance:
    return provenance_of(prepared, "verify", settings.seed).with_parameters(
        n_random=n_random, n_bootstrap=settings.n_resamples, level=settings.level
    )

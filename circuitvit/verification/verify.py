"""`verify`: is the circuit enough, is it needed, and is it better than chance? Asked by ablation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from circuitvit._keywords import running
from circuitvit.attribution import provenance_of
from circuitvit.engine import Evaluator, Measured
from circuitvit.errors import OptionError
from circuitvit.graph import Circuit, CircuitLike, as_circuit
from circuitvit.models import Model
from circuitvit.tasks import PreparedTask, Task, prepare
from circuitvit.tasks.classes import class_label
from circuitvit.verification.audit import as_faithful, run_audit, shared_edges
from circuitvit.verification.caveats import caveats
from circuitvit.verification.cross_effects import CrossEffect, hurt_beside
from circuitvit.verification.faithfulness import faithfulness
from circuitvit.verification.missed import about_missed
from circuitvit.verification.null import connected_circuits
from circuitvit.verification.recipe import recipe_of
from circuitvit.verification.report import (
    QUANTILES,
    CircuitSize,
    PairFailure,
    PairResult,
    RandomBaseline,
    Report,
    Section,
)
from circuitvit.verification.robustness import RobustnessRow, condition_row, robustness
from circuitvit.verification.statistics import (
    ROUNDING,
    Bootstrap,
    mean_interval,
    ratio_interval,
    share_interval,
)
from circuitvit.verification.verdict import AuditSettings, Verdict

WEAK = 0.1
"""A pair is weak when its metric differs by less than this share of the mean difference."""

FAR = 0.5
"""The circuit fails on a pair when its metric is off by more than this share of the mean behaviour."""


@running
def verify(
    model: Model,
    task: Task | PreparedTask,
    circuit: CircuitLike,
    *,
    held_out: Task | PreparedTask | None = None,
    others: Mapping[str, Task | PreparedTask] | None = None,
    n_random: int = 20,
    n_bootstrap: int = 1000,
    tests: bool | AuditSettings = False,
    robust: bool = False,
    processes: bool = False,
    seed: int = 0,
    batch_size: int | None = None,
    memory: int | str | None = None,
    progress: bool = True,
) -> Report:
    """Test a circuit by ablation.

    On every pair the model is run whole, with everything ablated, with only the circuit kept, with only the
    circuit ablated, and with each of several random circuits kept. From the metric `m` of these runs:

        faithfulness  f(C) = (m(C) - m(none)) / (m(all) - m(none))         is the circuit enough?
        necessity     1 - f(everything but C)                               is it needed?
        p-value       (b + 1) / (n_random + 1)                              is it better than chance?

    with `b` the number of random connected circuits, of the circuit's size and profile over stages, whose
    faithfulness is as close to 1 (see `circuitvit.verification.null`). All three are ratios of means over
    pairs (see `circuitvit.verification.faithfulness`), with 95 % intervals from resampling pairs (see
    `circuitvit.verification.statistics`). When denoising, "kept" reads "restored in the corrupt run".

    Wang et al. 2023, arXiv:2211.00593 (faithfulness); Mueller et al. 2025, arXiv:2504.13151; Shi et al. 2024,
    arXiv:2410.13032 (random circuits as a null hypothesis).

    Args:
        model: from `load` or `wrap`.
        task: images, metric and ablation.
        circuit: of the model's graph, with the task's token groups: a `Circuit`, what a search found, edge
            names or a file. It is run as given, so prune it first.
        held_out: the same behaviour on images that discovery has not seen; its figures become the headline.
        others: other behaviours, by name, on pairs of their own: how much of each is lost without the
            circuit, and the p-value of "no less than of its own", as in `specificity`.
        n_random: how many random circuits; 0 for none.
        n_bootstrap: how often the pairs are resampled.
        tests: put the circuit to the tests of `audit` too, whose verdict is the report's `conclusion`; True
            for the usual settings. On held-out pairs where there are any. The random circuits are then those
            of the test of sufficiency, so that there is one p-value.
        robust: also run the circuit under other ablations, metrics and images, see `robustness`.
        processes: share the pairs, or of few pairs the circuits that are run, among the processes of
            `torch.distributed`, which must all make this call; each gets the report.
        seed: of the random circuits and the resampling.
        batch_size: pairs at once; by default what `memory` allows.
        memory: bytes that a batch, and what is kept between runs, may take.
        progress: whether to show a bar.

    Raises:
        OptionError: if the circuit belongs to another graph than a task's, a task was prepared for another
            model, or a setting makes no sense.
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
    audited = AuditSettings(n_bootstrap=n_bootstrap, seed=seed) if tests is True else tests
    prepared = [prepare(model, each, progress, processes) for each in (task, held_out) if each is not None]
    evaluators = [
        Evaluator(each, batch_size=batch_size, memory=memory, progress=progress) for each in prepared
    ]
    if others is not None and not isinstance(others, Mapping):
        raise OptionError(
            f"others= gives tasks by name, such as {{'left or right': task}}, not {others!r:.60}"
        )
    beside = {name: prepare(model, each, progress, processes) for name, each in (others or {}).items()}
    for each in (*prepared, *beside.values()):  # refuse another graph now, before any pairs have been run
        circuit = as_circuit(circuit, each.graph)
    assert isinstance(circuit, Circuit)
    if audited:
        n_random = audited.n_random
    randoms = connected_circuits(circuit, n_random, audited.seed if audited else seed)
    sections: list[Section] = []
    outcomes: tuple[Verdict, ...] = ()
    missed: tuple[str, ...] = ()
    baseline: RobustnessRow | None = None
    hurt: tuple[CrossEffect, ...] = ()
    for images in ("task", "held-out")[: len(prepared)]:
        evaluator = evaluators.pop(0)
        sections.append(_section(images, evaluator, circuit, randoms, settings))
        if not evaluators:
            missed = tuple(about_missed(evaluator))
            outcomes = run_audit(evaluator, circuit, audited, randoms=randoms) if audited else ()
            hurt = hurt_beside(evaluator, circuit, beside, settings, batch_size, memory)
            baseline = condition_row("baseline", evaluator.prepared.label, evaluator, circuit, settings)
        del evaluator  # one set of pairs is held at a time
    table = None
    if robust:
        table = robustness(
            model, prepared[-1], circuit, settings=settings, batch_size=batch_size, memory=memory,
            baseline=baseline,
        )  # fmt: skip
    size = _size(circuit)
    return Report(
        size=size,
        task=sections[0],
        held_out=sections[1] if len(sections) > 1 else None,
        warnings=(*caveats(circuit, size, sections, prepared, hurt), *missed),
        circuit_provenance=circuit.provenance,
        provenance=provenance_of(prepared[0], "verify", seed).with_parameters(
            n_random=n_random, n_bootstrap=n_bootstrap, level=settings.level
        ),
        tests=outcomes,
        robustness=table,
        others=hurt,
        recipe=recipe_of(
            model,
            prepared,
            circuit,
            {"n_random": n_random, "n_bootstrap": n_bootstrap, "seed": seed}
            | ({"tests": True} if tests is True else {})
            | ({"robust": True} if robust else {}),
            others=bool(beside),
        ),
    )


# -- inside --------------------------------------------------------------------------------------


def _section(
    images: str, evaluator: Evaluator, circuit: Circuit, randoms: Sequence[Circuit], settings: Bootstrap
) -> Section:
    """The figures of one set of pairs."""
    prepared, effect = evaluator.prepared, evaluator.effect
    ends = evaluator.graph.edge_mask, np.zeros(evaluator.graph.shape, dtype=bool)
    whole, nothing, kept, rest = evaluator.measure([*ends, circuit.kept, (~circuit).kept])
    evaluator.check_effect()
    weight = effect * np.sign(effect.mean())
    rounding = ROUNDING * np.abs([whole.values, nothing.values]).max()
    pairs = _pairs(prepared, [whole, nothing, kept, rest])
    classes = prepared.model.chooses
    return Section(
        images=images,
        task=prepared.label,
        n_pairs=len(evaluator),
        whole=mean_interval(whole.values, settings),
        nothing=mean_interval(nothing.values, settings),
        circuit=mean_interval(kept.values, settings),
        complement=mean_interval(rest.values, settings),
        faithfulness=ratio_interval(kept.values - nothing.values, effect, settings),
        complement_faithfulness=ratio_interval(rest.values - nothing.values, effect, settings),
        necessity=ratio_interval(whole.values - rest.values, effect, settings),
        agreement=share_interval(whole.tops == kept.tops, settings) if classes else None,
        kl=None if kept.divergence is None else mean_interval(kept.divergence, settings),
        weak_pairs=int((np.abs(weight) < WEAK * weight.mean()).sum()),
        opposite_pairs=int((weight < -rounding).sum()),
        random=_baseline(evaluator, circuit, randoms, settings) if randoms else None,
        pairs=pairs,
        failures=_failures(pairs, float(effect.mean())),
    )


def _baseline(
    evaluator: Evaluator, circuit: Circuit, randoms: Sequence[Circuit], settings: Bootstrap
) -> RandomBaseline:
    whole, nothing, effect = evaluator.whole, evaluator.nothing, evaluator.effect
    own, *drawn = evaluator.many([circuit.kept, *(each.kept for each in randoms)])
    typical = np.mean(drawn, axis=0)
    shares = faithfulness(np.stack([own, *drawn]), whole, nothing, settings=settings)
    as_good, others, live = as_faithful(shares), shares[1:], circuit.pruned()
    return RandomBaseline(
        n=len(randoms),
        faithfulness=tuple(others.tolist()),
        mean=ratio_interval(typical - nothing, effect, settings),
        low=float(others.min()),
        high=float(others.max()),
        quantiles=tuple(np.quantile(others, QUANTILES).tolist()),
        advantage=ratio_interval(own - typical, effect, settings),
        as_good=as_good,
        p_value=(as_good + 1) / (len(randoms) + 1),
        same=sum(each == live for each in randoms),
        shared=shared_edges(circuit, randoms),
    )


def _pairs(prepared: PreparedTask, runs: Sequence[Measured]) -> tuple[PairResult, ...]:
    corrupt = prepared.corrupt.names if prepared.corrupt is not None else (None,) * len(prepared)
    _, _, kept, _ = runs
    tops = [_labels(prepared, each.tops) for each in (runs[0], *runs[2:])]
    kl = (None,) * len(prepared) if kept.divergence is None else kept.divergence.tolist()
    metrics = [each.values.tolist() for each in runs]
    rows = zip(prepared.clean.names, corrupt, *metrics, *tops, kl, strict=True)
    return tuple(PairResult(*row) for row in rows)


def _failures(pairs: Sequence[PairResult], behaviour: float) -> tuple[PairFailure, ...]:
    """The pairs that the circuit fails on, the worst first.

    Args:
        pairs: all of them.
        behaviour: mean metric with every edge kept minus that with none. A pair's own would not do: where it
            is near 0, any circuit is infinitely far off.
    """
    found = [
        PairFailure(pair.clean, pair.corrupt, off, pair.top_whole, pair.top_circuit)
        for pair in pairs
        if abs(off := pair.off(behaviour)) > FAR or pair.top_circuit != pair.top_whole
    ]
    return tuple(sorted(found, key=lambda failure: -abs(failure.off)))


def _labels(prepared: PreparedTask, tops: NDArray[np.int64]) -> list[str | None]:
    """The name of each pair's top class; each class is looked up once, as that is slow among 1000 names."""
    if not prepared.model.chooses:
        return [None] * len(prepared)
    names = {index: class_label(prepared.model, index) for index in set(tops.tolist())}
    return [names[index] for index in tops.tolist()]


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

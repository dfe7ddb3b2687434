"""What a careful reader should know before believing a report, each in one or two plain sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from circuitvit.errors import counted
from circuitvit.graph import Circuit
from circuitvit.graph.fidelity import fidelity_sentence
from circuitvit.tasks import Patch, PerPair, PreparedTask, Resample, Zero
from circuitvit.tasks.ablations import same_ablation
from circuitvit.tasks.classes import taken_on_trust
from circuitvit.tasks.inputs import fingerprint
from circuitvit.tasks.metrics import same_metric
from circuitvit.verification.cross_effects import ALPHA, CrossEffect
from circuitvit.verification.faithfulness import origin_differs
from circuitvit.verification.report import CircuitSize, Section
from circuitvit.verification.statistics import MIN_PAIRS

FEW_PAIRS = 10
"""Below this, intervals cover visibly less than they say."""

SIGNIFICANT = 0.05

LISTED = 5
"""Names of classes in one sentence."""

INSUFFICIENT = 0.5
"""Faithfulness below which a circuit is said not to carry the behaviour."""

FAITHFUL = 0.8
"""Faithfulness from which on a reader takes a circuit for the model's."""

POOR_AGREEMENT = 0.7
"""Agreement below which a faithful circuit is said not to see what the model sees."""


def caveats(
    circuit: Circuit,
    size: CircuitSize,
    sections: Sequence[Section],
    prepared: Sequence[PreparedTask],
    others: Sequence[CrossEffect] = (),
) -> tuple[str, ...]:
    """All caveats of a report.

    Args:
        circuit: that was verified.
        size: of it.
        sections: the figures on the task's pairs and, if there are any, on held-out ones.
        prepared: the task and, if given, the held-out task.
        others: what the circuit does to other behaviours.
    """
    found = [
        *_about_images(prepared),
        *_about_circuit(circuit, size, prepared[0]),
        *_about_ablation(prepared),
        *_about_classes(prepared[0]),
        *_about_others(others),
    ]
    said = [
        [*_about_pairs(each, task), *_about_values(each), *_about_random(each, size)]
        for each, task in zip(sections, prepared, strict=True)
    ]
    for figures, texts in zip(sections, said, strict=True):
        for text in texts:
            everywhere = all(text in others for others in said)
            found.append(text if everywhere else f"On the {figures.images} pairs: {text}")
    return tuple(dict.fromkeys(found))


def _about_images(prepared: Sequence[PreparedTask]) -> Iterator[str]:
    inputs = f"{prepared[0].spec.what}s"
    if len(prepared) == 1:
        yield (
            f"There are no held-out {inputs}: if the circuit was found on these very pairs, its figures are "
            "optimistic. Judge it on other pairs, held out."
        )
        return
    task, other = prepared
    seen = _fingerprints(task)
    shared = len([mark for mark in _fingerprints(other) if mark in seen])
    if shared:
        yield (
            f"{shared} of the {len(other)} held-out clean {inputs} are among the task's own, so not held out."
        )
    same = (
        same_metric(task.metric, other.metric),
        same_ablation(task.ablation, other.ablation),
        task.direction == other.direction,
    )
    if not all(same):
        own, held_out = _measured(task.label), _measured(other.label)
        how = f" ({own}; held out: {held_out})" if own != held_out else ""
        names = zip(("metric", "ablation", "direction"), same, strict=True)
        what = " and ".join(name for name, alike in names if not alike)
        yield f"The two sets are measured differently, by {what}{how}: their figures cannot be compared."


def _measured(label: str) -> str:
    """How a task is measured, from its label: all but the number of its pairs."""
    return label.partition(", ")[2]


def _about_circuit(circuit: Circuit, size: CircuitSize, prepared: PreparedTask) -> Iterator[str]:
    fidelity = circuit.provenance.parameters.get("fidelity")
    if fidelity is not None:
        yield f"Its edges were chosen by scores ({circuit.provenance.method}). {fidelity_sentence(fidelity)}"
    if not len(circuit):
        yield "The circuit is empty: its figures are those of the model with every edge ablated."
    elif len(circuit) == size.graph_edges:
        yield "The circuit is the whole graph: its figures are those of the model, whatever the behaviour."
    if size.dead:
        yield (
            f"The circuit is not pruned: {size.dead:,} of its {len(circuit):,} edges lie on no path from "
            "input to logits. It was run as given, so its necessity also counts ablating those: verify "
            "the pruned circuit instead."
        )
        if not isinstance(prepared.ablation, (Patch, Resample)):
            # The reference is then no run of the model: a node fed with references writes something else.
            yield (
                f"Under {prepared.ablation.name} ablation such edges are not without effect, as a component "
                "that hears nothing of the input does not write its reference: pruning changes the figures."
            )
    found, now = (_measured(label) for label in (circuit.provenance.task, prepared.label))
    if found and re.sub(r"\d+ different", "", found) != re.sub(r"\d+ different", "", now):
        yield f"The circuit was found for another task ({found}) than the one it was verified on ({now})."
    differs = origin_differs(circuit, prepared.model)
    if differs:
        yield differs


def _about_ablation(prepared: Sequence[PreparedTask]) -> Iterator[str]:
    if any(isinstance(each.ablation, Zero) for each in prepared):
        yield (
            "Zero ablation puts the model far from anything it has seen, so effects tend to be exaggerated; "
            "check the conclusion with patch or mean ablation."
        )


def _about_classes(prepared: PreparedTask) -> Iterator[str]:
    sides = prepared.metric.metric.target, prepared.metric.metric.foil
    specs = [each for side in sides for each in (side.classes if isinstance(side, PerPair) else (side,))]
    said = taken_on_trust(prepared.model, specs)
    if said:
        more = f"; and {len(said) - LISTED} more" if len(said) > LISTED else ""
        yield (
            "Members of groups of classes were found by the names of the model's classes, taken for what "
            f"they commonly mean: {'; '.join(said[:LISTED])}{more}."
        )


def _about_others(others: Sequence[CrossEffect]) -> Iterator[str]:
    shared = [each.behaviour for each in others if each.p is not None and each.p >= ALPHA]
    untold = [each.behaviour for each in others if each.p is None]
    if shared:
        yield (
            f"The circuit is not shown to be about this behaviour rather than {_listed(shared)}: without it "
            "no less of that may be lost."
        )
    if untold:
        yield f"There are too few pairs (below {MIN_PAIRS}) to tell this behaviour from {_listed(untold)}."


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} others" if len(names) > LISTED else ""
    return ", ".join(map(repr, names[:LISTED])) + more


def _about_pairs(figures: Section, task: PreparedTask) -> Iterator[str]:
    n_pairs, other = figures.n_pairs, f"other {task.spec.what}s"
    wrong = task.metric.swapped(
        [each.whole for each in figures.pairs], [each.nothing for each in figures.pairs]
    )
    if wrong:
        yield f"Of {counted(n_pairs, 'pair')}, {wrong}."
    if n_pairs == 1:
        yield f"A single pair: no intervals can be given, and nothing is known about {other}."
    elif n_pairs < MIN_PAIRS:
        yield f"Only {n_pairs} pairs: too few for intervals, which need {MIN_PAIRS}; {other} may differ."
    elif n_pairs < FEW_PAIRS:
        yield f"Only {n_pairs} pairs: the 95 % intervals are rough; about 90 % of such hold the truth."
    if figures.opposite_pairs:
        yield (
            f"{figures.opposite_pairs} of {n_pairs} pairs differ in the metric the other way round, and pull "
            "the ratio of means towards themselves."
        )
    if figures.weak_pairs:
        yield (
            f"{figures.weak_pairs} of {n_pairs} pairs hardly differ in the metric by themselves (less than a "
            "tenth of the mean difference) and say little about the circuit."
        )


def _about_values(figures: Section) -> Iterator[str]:
    faithfulness, necessity = figures.faithfulness.value, figures.necessity.value
    if faithfulness > 1.05:
        yield (
            f"Faithfulness is {faithfulness:.3f}, not clipped: the circuit overshoots the model, as edges "
            "that work against the behaviour are left out."
        )
    elif faithfulness < -0.05:
        yield f"Faithfulness is {faithfulness:.3f}, not clipped: the circuit works against the behaviour."
    elif faithfulness < INSUFFICIENT:
        yield (
            f"The circuit keeps only {faithfulness:.0%} of the behaviour: on its own it is not sufficient. "
            "Search for another, or select more edges."
        )
    top = figures.agreement
    if top is not None and faithfulness >= FAITHFUL and top.value < POOR_AGREEMENT:
        on = f"on only {top.value:.0%} of {counted(figures.n_pairs, 'pair')}" if top.value else "on no pair"
        yield (
            f"The circuit keeps {faithfulness:.0%} of the behaviour, but its top class is the model's "
            f"{on}: it carries what the metric "
            "measures, not what the model sees. To search for one that does: find with keep='prediction'."
        )
    if necessity > 1.05:
        yield f"Necessity is {necessity:.3f}, not clipped: the rest of the model works against the behaviour."
    elif necessity < -0.05:
        yield f"Necessity is {necessity:.3f}, not clipped: the behaviour is stronger without the circuit."


def _about_random(figures: Section, size: CircuitSize) -> Iterator[str]:
    random = figures.random
    if random is None:
        yield "No random circuits were drawn: nothing shows that the figures are better than chance."
        return
    if 1 / (random.n + 1) > SIGNIFICANT:
        least = 1 / (random.n + 1)
        yield f"With {random.n} random circuits no p-value can be below {least:.2g}: draw 19 or more."
    elif size.edges and random.p_value > SIGNIFICANT:
        yield (
            f"The circuit is no closer to the model than random circuits are (p = {random.p_value:.2f}): "
            "its faithfulness may be chance."
        )
    if random.same == random.n:
        yield (
            "No other connected circuit was found with as many edges into every stage, so nothing can show "
            "that the circuit is better than chance."
        )
    elif random.shared > 0.5:
        yield (
            f"The random circuits share {random.shared:.0%} of the circuit's edges on average, as it fills "
            "its stages: they are not independent of it."
        )


def _fingerprints(prepared: PreparedTask) -> list[bytes]:
    """A mark of each clean image; one by one, so that memory stays small."""
    return [fingerprint(prepared.clean.take(row, row + 1)) for row in range(len(prepared))]

"""Plain assertions about circuits, with failures that say what was found and what was asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence

from circuitvit.engine import Evaluator
from circuitvit.errors import OptionError, counted, unknown_name
from circuitvit.graph import Circuit, CircuitLike, as_circuit
from circuitvit.models import Model
from circuitvit.tasks import PreparedTask, Task, prepare
from circuitvit.testing.log import record
from circuitvit.verification import (
    SUPPORTED,
    Bootstrap,
    Drift,
    Estimate,
    Hypothesis,
    Verdict,
    diff,
    ratio_interval,
)
from circuitvit.verification.drift import TOLERANCE, UNCHANGED, VERDICTS
from circuitvit.verification.ideals import own_changes

LISTED = 5


def assert_faithful(
    model: Model,
    task: Task | PreparedTask,
    circuit: CircuitLike,
    *,
    at_least: float = 0.8,
    at_most: float | None = None,
    sure: bool = False,
    batch_size: int | None = None,
) -> Estimate:
    """The circuit alone keeps at least this share of the behaviour.

    Args:
        model: from `load` or `wrap`.
        task: images, metric and ablation.
        circuit: to run.
        at_least: smallest faithfulness.
        at_most: largest; by default as far above 1 as `at_least` is below.
        sure: ask it of the whole 95 % interval, not of the value (then it takes 5 pairs).
        batch_size: pairs at once.

    Returns:
        The faithfulness with its interval.

    Raises:
        AssertionError: if it lies outside.
        CircuitViTError: if it cannot be asked, see `verify`.
    """
    __tracebackhide__ = True
    at_most = max(2 - at_least, 1.0) if at_most is None else at_most
    _check_range(at_least, at_most)
    evaluator, circuit = _evaluator(model, task, circuit, batch_size)
    found = ratio_interval(evaluator.values(circuit.kept) - evaluator.nothing, evaluator.effect, Bootstrap())
    size, wish = f"{len(circuit):,} edges", f"{at_least:g} to {at_most:g}"
    said = f"faithfulness of {size} on {counted(len(evaluator), 'pair')} is {found}; asked for: {wish}"
    record("assert_faithful", _sure(said, found, sure), _inside(found, at_least, at_most, sure))
    return found


def assert_necessary(
    model: Model,
    task: Task | PreparedTask,
    circuit: CircuitLike,
    *,
    at_least: float = 0.5,
    sure: bool = False,
    batch_size: int | None = None,
) -> Estimate:
    """Ablating only the circuit loses at least this share of the behaviour.

    Args: as `assert_faithful`.

    Raises:
        AssertionError: if less is lost.
        CircuitViTError: if it cannot be asked, see `verify`.
    """
    __tracebackhide__ = True
    _check_range(at_least, math.inf)
    evaluator, circuit = _evaluator(model, task, circuit, batch_size)
    found = ratio_interval(evaluator.whole - evaluator.values((~circuit).kept), evaluator.effect, Bootstrap())
    said = (
        f"without the circuit's {len(circuit):,} edges {found} of the behaviour is lost on "
        f"{counted(len(evaluator), 'pair')}; asked for: at least {at_least:g}"
    )
    record("assert_necessary", _sure(said, found, sure), _inside(found, at_least, math.inf, sure))
    return found


def assert_minimal(
    model: Model,
    task: Task | PreparedTask,
    circuit: CircuitLike,
    *,
    least: float = 0.001,
    batch_size: int | None = None,
) -> dict[str, float]:
    """No edge is dead, and dropping any single one changes faithfulness by at least `least`.

    Args:
        model: from `load` or `wrap`.
        task: images, metric and ablation.
        circuit: to run, once for each of its edges.
        least: smallest change that counts, as a share of the behaviour.
        batch_size: pairs at once.

    Returns:
        The change for each edge.

    Raises:
        AssertionError: listing the edges that could go.
        CircuitViTError: if it cannot be asked, see `verify`.
    """
    __tracebackhide__ = True
    _check_range(least, math.inf)
    evaluator, circuit = _evaluator(model, task, circuit, batch_size)
    dead = list(circuit - circuit.pruned())
    if dead:
        record("assert_minimal", f"{len(dead)} edges lie on no path: {_some(dead)}", held=False)
    changes = own_changes(evaluator, circuit).sum(axis=1) / float(evaluator.effect.sum())
    found = dict(zip(circuit, changes.tolist(), strict=True))
    idle = [f"{name} ({change:+.2g})" for name, change in found.items() if abs(change) < least]
    few = f"{len(idle)} of {len(found)} edges"
    said = f"{few} change faithfulness by less than {least:g} on {counted(len(evaluator), 'pair')}"
    record("assert_minimal", f"{said}: {_some(idle)}" if idle else said, held=not idle)
    return found


def assert_unchanged(before: CircuitLike, after: CircuitLike, *, at_least: float = 1.0) -> float:
    """Two circuits have the same edges, or share enough of them.

    Args:
        before: such as the one that is committed.
        after: such as the one that was just found.
        at_least: smallest Jaccard index: shared edges over edges in either.

    Returns:
        The Jaccard index.

    Raises:
        AssertionError: listing what is gone and what is new.
        OptionError: if they belong to different graphs.

    Example:
        >>> from circuitvit.graph.eap_ig import transformer_graph
        >>> one = Circuit.from_edges(transformer_graph(1, 1), ["input->m0", "m0->logits"])
        >>> assert_unchanged(one, one)
        1.0
    """
    __tracebackhide__ = True
    _check_range(at_least, 1.0)
    before = as_circuit(before)
    after = as_circuit(after, before.graph)
    alike = before.jaccard(after)
    gone, new = list(before - after), list(after - before)
    said = f"the circuits are alike by {alike:.3f} (Jaccard), asked for: at least {at_least:g}"
    if gone:
        said += f"; {len(gone)} gone: {_some(gone)}"
    if new:
        said += f"; {len(new)} new: {_some(new)}"
    if models := before.provenance.mismatch(after.provenance):
        said += f"; the circuits are of {models}"
    record("assert_unchanged", said, alike >= at_least)
    return alike


def assert_hypothesis(
    model: Model,
    task: Task | PreparedTask,
    hypothesis: Hypothesis,
    *,
    verdict: str = SUPPORTED,
    alpha: float = 0.05,
    seed: int = 0,
    clusters: Sequence[str] | None = None,
    batch_size: int | None = None,
) -> Verdict:
    """A hypothesis gets a certain verdict.

    Args:
        model: from `load` or `wrap`.
        task: images, metric and ablation, where the hypothesis does not bring its own.
        hypothesis: to test.
        verdict: "supported", "refuted" or "not enough evidence".
        alpha: level of significance.
        seed: of everything random.
        clusters: which cluster each pair belongs to.
        batch_size: pairs at once.

    Returns:
        The verdict.

    Raises:
        AssertionError: if it is another.
        CircuitViTError: as `Hypothesis.test`.
    """
    __tracebackhide__ = True
    found = hypothesis.test(
        model, task, alpha=alpha, seed=seed, clusters=clusters, batch_size=batch_size
    )  # fmt: skip
    said = (
        f"{found}. {found.reason} Expected: {found.expectation} ({found.intervention}); asked for: {verdict}"
    )
    record("assert_hypothesis", said, found.verdict == verdict)
    return found


def assert_no_drift(
    old: Model,
    new: Model,
    task: Task | PreparedTask,
    circuit: CircuitLike,
    *,
    tolerance: float = TOLERANCE,
    accept: Sequence[str] = (UNCHANGED,),
    edges: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> Drift:
    """A stored circuit carries the behaviour in new weights as it did in the old ones.

    Args:
        old: the model that the circuit was found in.
        new: the same model with other weights.
        task: images, metric and ablation; 12 pairs or more, on which the circuit was not found.
        circuit: the stored one.
        tolerance: the change that does not count, as a share of the old behaviour.
        accept: the verdicts to be content with; "shifted" lets a behaviour grow.
        edges: how many edges are measured besides the circuit's, see `diff`.
        seed: of the resampling.
        batch_size: pairs at once.

    Returns:
        What `diff` found.

    Raises:
        AssertionError: for another verdict, also where the pairs are too few to tell.
        CircuitViTError: if it cannot be asked, see `diff`.
    """
    __tracebackhide__ = True
    for each in accept:
        if each not in VERDICTS:
            raise unknown_name("verdict", each, VERDICTS)
    found = diff(
        old, new, task, circuit, tolerance=tolerance, edges=edges, seed=seed, batch_size=batch_size,
        progress=False,
    )  # fmt: skip
    lost = ", ".join(f"{each['edge']} ({each['change']:+.2f})" for each in found.moved("lost")[:LISTED])
    said = f"the verdict is {found.verdict!r}: {found.reason}"
    said += f" Edges that lost most: {lost}." if lost else ""
    record("assert_no_drift", f"{said} Asked for: {' or '.join(accept)}", found.verdict in accept)
    return found


# -- inside --------------------------------------------------------------------------------------


def _evaluator(
    model: Model, task: Task | PreparedTask, given: CircuitLike, batch_size: int | None
) -> tuple[Evaluator, Circuit]:
    evaluator = Evaluator(prepare(model, task), batch_size=batch_size)
    circuit = as_circuit(given, evaluator.graph)
    evaluator.check_effect()
    return evaluator, circuit


def _check_range(low: float, high: float) -> None:
    if not low <= high:
        raise OptionError(f"nothing lies between {low!r} and {high!r}")


def _inside(found: Estimate, low: float, high: float, sure: bool) -> bool:
    if not sure:
        return low <= found.value <= high
    return found.low is not None and found.high is not None and low <= found.low and found.high <= high


def _sure(said: str, found: Estimate, sure: bool) -> str:
    if not sure:
        return said
    return said + (
        " by all of the interval" if found.low is not None else " by an interval, for which pairs are too few"
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more

"""Refinement by exact ablation: make a circuit faithful, then as small as it can be.

`refine` first *repairs*: it adds back the edges that bring faithfulness nearest to 1 until it lies in the
band; to keep the prediction, those that bring the circuit's prediction nearest to the model's, until the top
class is the model's often enough. Then it *trims*: it visits the kept edges from the weakest to the strongest
and drops each one without which the circuit stays in the band, first a block at a time, at last one by one,
pass after pass until nothing more can go.

`ddmin` is delta debugging. The circuit is to the behaviour what an input is to a failure: edges are divided
into `n` groups, and the search goes on with the first group that is enough by itself, else with all but the
first group that can be spared, else with twice as many groups. Where few of many edges matter it takes far
fewer runs than trying edge after edge; where most matter it takes more.

Both end with a 1-minimal circuit: no single edge can be dropped. Dead edges are pruned after every step.

Zeller and Hildebrandt 2002, "Simplifying and isolating failure-inducing input", IEEE TSE 28(2), for `ddmin`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from circuitvit._keywords import running
from circuitvit.engine import Evaluator, announce, progress_bar
from circuitvit.errors import DataError, OptionError, check_whole
from circuitvit.graph import Circuit, CircuitLike, EdgeMask, as_circuit
from circuitvit.graph.liveness import live_receivers, reached_senders
from circuitvit.graph.results import Record, Result
from circuitvit.models import Model
from circuitvit.pruning.aims import Aim, Band, Keep, figures
from circuitvit.tasks import Patch, PreparedTask, Resample, Task, prepare

BLOCKS = (8, 2, 1)
"""How many edges trimming tries to drop at once: where many can go, a block goes at the price of one run."""

Place = tuple[int, ...]
"""Sender, receiver and token group of an edge."""

T = TypeVar("T")


@dataclass(frozen=True, eq=False, repr=False)
class Refinement(Result):
    """What refinement found.

    Attributes:
        circuit: the refined circuit.
        faithfulness: on the pairs that it was refined on.
        minimal: whether no single edge (of `find_nodes`, node) can be dropped without leaving the band.
        runs: how many masked runs of all pairs it took.
        agreement: share of these pairs whose top class is the model's; None for a model without classes.
        kl: mean KL(model || circuit) over these pairs, in nats; None likewise.
    """

    circuit: Circuit
    faithfulness: float
    minimal: bool
    runs: int
    agreement: float | None = None
    kl: float | None = None

    def records(self) -> Iterator[Record]:
        """One row: the number of `edges`, their `faithfulness`, `agreement` and `kl`, whether they are
        `minimal`, and the `runs`."""
        yield {
            "edges": len(self.circuit),
            "faithfulness": self.faithfulness,
            "agreement": self.agreement,
            "kl": self.kl,
            "minimal": self.minimal,
            "runs": self.runs,
        }


@running
def refine(
    model: Model,
    task: Task | PreparedTask,
    circuit: CircuitLike,
    *,
    order: NDArray[np.float64] | None = None,
    keep: Keep = "behaviour",
    band: Band = (0.9, 1.1),
    candidates: int = 200,
    max_runs: int | None = None,
    evaluator: Evaluator | None = None,
    batch_size: int | None = None,
    memory: int | str | None = None,
    progress: bool = True,
) -> Refinement:
    """Repair and trim a circuit.

    Where no edge that is tried brings the circuit nearer, or the runs are used up before it is in the band,
    it stays outside, which is said.

    Args:
        model: from `load` or `wrap`.
        task: in the noising direction.
        circuit: to start from.
        order: `(sender, receiver, group)`: which edges to try first when repairing (largest), and to drop
            first when trimming (smallest); the circuit's own scores by default.
        keep: what the result must keep: the metric ("behaviour"), or the model's own top class on the clean
            images ("prediction").
        band: faithfulness that the result must keep; with keep="prediction" its agreement, which is the share
            of pairs whose top class is the model's.
        candidates: how many edges repair tries at each step.
        max_runs: give up after so many masked runs.
        evaluator: of the same task, so that what it has run is not run again.
        batch_size: pairs at once; by default what `memory` allows.
        memory: bytes that a batch, and what is kept between runs, may take.
        progress: whether to show a bar.

    Raises:
        OptionError: if the band is empty, `max_runs` is not positive, `candidates` is negative, the task is
            denoising, the circuit or the order belongs to another graph, or a model without classes is to
            keep its prediction.
        DataError: if the metric does not differ between clean and ablated runs, or the prediction is to be
            kept and does not.
    """
    check_whole("candidates", candidates, 0)
    search = _search(
        model, task, circuit, order, Aim(keep, band), max_runs, evaluator, batch_size, memory, progress
    )
    with progress_bar(len(search.start), "refining", progress) as bar:
        kept = search.repair(without_dead(search.prepared, search.start.kept), candidates)
        kept, minimal = search.trim(kept, bar.update)
    found = search.result(kept, minimal, "refined")
    if not search.inside(kept):
        why = "the runs are used up" if search.spent else "none of the edges tried brings it nearer"
        announce(
            f"The circuit stays outside of {band[0]:g} to {band[1]:g}: its {search.aim.name} is "
            f"{search.aim.value(search.evaluator, kept):.3f}, and {why}.",
            progress,
        )
    return found


@running
def ddmin(
    model: Model,
    task: Task | PreparedTask,
    circuit: CircuitLike,
    *,
    order: NDArray[np.float64] | None = None,
    keep: Keep = "behaviour",
    band: Band = (0.9, 1.1),
    max_runs: int | None = None,
    evaluator: Evaluator | None = None,
    batch_size: int | None = None,
    memory: int | str | None = None,
    progress: bool = True,
) -> Refinement:
    """Make a faithful circuit 1-minimal by removing groups of its edges.

    Dead edges need no rule of their own: a circuit without them gives the very same run, which is made once,
    so that they go for free.

    Zeller and Hildebrandt 2002, "Simplifying and isolating failure-inducing input", IEEE TSE 28(2).

    Args:
        model: from `load` or `wrap`.
        task: in the noising direction.
        circuit: to start from; its faithfulness lies in the band.
        order: `(sender, receiver, group)`: edges next to each other in this order are grouped, and groups of
            small values come first; the magnitudes of the circuit's own scores by default.
        keep: what the result must keep: the metric ("behaviour"), or the model's own top class on the clean
            images ("prediction").
        band: faithfulness that the result must keep; with keep="prediction" its agreement, which is the share
            of pairs whose top class is the model's.
        max_runs: give up after so many masked runs.
        evaluator: of the same task, so that what it has run is not run again.
        batch_size: pairs at once; by default what `memory` allows.
        memory: bytes that a batch, and what is kept between runs, may take.
        progress: whether to show a bar.

    Raises:
        OptionError: if the band is empty, `max_runs` is not positive, the task is denoising, the circuit or
            the order belongs to another graph, or a model without classes is to keep its prediction.
        DataError: if the circuit does not lie in the band to begin with.

    Example:
        >>> import circuitvit as cv  # doctest: +SKIP
        >>> scores = cv.attribute(model, task, "exact")  # doctest: +SKIP
        >>> cv.ddmin(model, task, scores.top(1000)).circuit  # doctest: +SKIP
    """
    search = _search(
        model, task, circuit, order, Aim(keep, band), max_runs, evaluator, batch_size, memory, progress
    )
    left = search.in_order(search.start.kept)
    if not search.enough(left):
        found = search.aim.value(search.evaluator, search.live(left))
        raise DataError(
            f"the circuit's {search.aim.name} is {found:.3f}, outside {band[0]:g} to {band[1]:g}: removing "
            "edges is no way back; `refine` repairs first"
        )
    minimal = True
    with progress_bar(len(search.start), "ddmin", progress) as bar:

        def shrunk(to: Sequence[Place]) -> None:
            nonlocal left
            bar.update(len(left) - len(to))
            left = list(to)

        try:
            minimise(left, search.enough, shrunk)
        except _Spent:
            minimal = False
    return search.result(search.live(left), minimal, "ddmin")


def minimise(
    items: Sequence[T],
    holds: Callable[[Sequence[T]], bool],
    advance: Callable[[Sequence[T]], object] = lambda left: None,
) -> list[T]:
    """The items that are left when no single one can go: the algorithm `ddmin` on anything.

    Zeller and Hildebrandt 2002, figure 5, with its test function answering "does it hold?".

    Args:
        items: for which `holds`, in the order in which they are divided into groups.
        holds: whether some of them, in that order, are enough.
        advance: told what is left whenever that shrinks.

    Example:
        >>> minimise(range(8), lambda some: {2, 5} <= set(some))
        [2, 5]
    """
    left, n = list(items), 2
    while len(left) >= 2:
        ends = [round(len(left) * place / n) for place in range(n + 1)]
        groups = [left[start:stop] for start, stop in pairwise(ends)]
        alone = next((group for group in groups if holds(group)), None)
        rests = ([item for other in groups if other is not group for item in other] for group in groups)
        spared = None if alone is not None or n == 2 else next((rest for rest in rests if holds(rest)), None)
        if alone is not None:
            left, n = alone, 2
        elif spared is not None:
            left, n = spared, n - 1
        elif n < len(left):
            n = min(len(left), 2 * n)
            continue
        else:
            break
        advance(left)
    return left


def trimmed(
    evaluator: Evaluator,
    kept: EdgeMask,
    order: NDArray[np.float64],
    aim: Aim,
    max_runs: int | None,
    note: Callable[[EdgeMask], object],
    progress: bool,
) -> tuple[EdgeMask, bool]:
    """What trimming leaves of a circuit in the band, and whether no single edge of it can go.

    Args:
        evaluator: of the task.
        kept: the circuit, `(sender, receiver, group)`.
        order: likewise, small for edges that go first.
        aim: what is kept.
        max_runs: how many runs there may be; None for any number.
        note: told of every smaller circuit.
        progress: whether to show a bar.
    """
    circuit = Circuit(evaluator.graph, kept)
    search = _Search(evaluator, circuit, order, aim, evaluator.runs, max_runs, note)
    with progress_bar(len(circuit), "trimming", progress) as bar:
        return search.trim(kept, bar.update)


# -- the search ----------------------------------------------------------------------------------


class _Spent(Exception):
    """The runs are used up."""


def _search(
    model: Model,
    task: Task | PreparedTask,
    circuit: CircuitLike,
    order: NDArray[np.float64] | None,
    aim: Aim,
    max_runs: int | None,
    evaluator: Evaluator | None,
    batch_size: int | None,
    memory: int | str | None,
    progress: bool,
) -> _Search:
    """The search that the arguments ask for, checked."""
    if max_runs is not None:
        check_whole("max_runs", max_runs)
    prepared = prepare(model, task if evaluator is None else evaluator.prepared, progress)
    circuit = as_circuit(circuit, prepared.graph)
    order = None if order is None else np.asarray(order)
    if order is not None and order.shape != circuit.graph.shape:
        raise OptionError(
            f"the order has shape {order.shape}, the graph {circuit.graph.shape} (sender, receiver, group)"
        )
    if order is None:
        order = np.zeros(circuit.graph.shape) if circuit.values is None else np.abs(circuit.values)
    evaluator = noising_evaluator(prepared, batch_size, memory, evaluator)
    aim.check(evaluator)
    return _Search(evaluator, circuit, order, aim, evaluator.runs, max_runs)


def require_noising(task: Task | PreparedTask) -> None:
    """Refuse a task in the denoising direction.

    Raises:
        OptionError: saying what to give.
    """
    if task.direction == "denoising":
        raise OptionError(
            "searches and curves ablate edges of the clean run: give the task direction='noising'"
        )


def noising_evaluator(
    prepared: PreparedTask,
    batch_size: int | None = None,
    memory: int | str | None = None,
    given: Evaluator | None = None,
) -> Evaluator:
    """The evaluator of a task that a search by ablation can be made on; the one that is given, if any.

    Raises:
        OptionError: if the task is in the denoising direction, or how pairs are run is said of an evaluator
            that is there already.
        DataError: if the metric does not differ between clean and ablated runs.
    """
    require_noising(prepared)
    if given is not None and (batch_size is not None or memory is not None):
        raise OptionError(
            "an evaluator runs pairs as it was made to: give batch_size= and memory= to the evaluator"
        )
    evaluator = given or Evaluator(prepared, batch_size=batch_size, memory=memory)
    evaluator.check_effect(level=0)
    return evaluator


@dataclass(frozen=True, eq=False)
class _Search:
    """What a search goes by, and its moves.

    Attributes:
        evaluator: of the task.
        start: the circuit that it starts from.
        order: `(sender, receiver, group)`, small for edges that go first.
        aim: what is kept.
        before: the evaluator's runs at the start.
        max_runs: how many more there may be; None for any number.
        note: told of every circuit in the band that trimming goes on from.
    """

    evaluator: Evaluator
    start: Circuit
    order: NDArray[np.float64]
    aim: Aim
    before: int
    max_runs: int | None
    note: Callable[[EdgeMask], object] = lambda kept: None

    @property
    def prepared(self) -> PreparedTask:
        return self.evaluator.prepared

    @property
    def spent(self) -> bool:
        return self.max_runs is not None and self.evaluator.runs >= self.before + self.max_runs

    def inside(self, kept: EdgeMask) -> bool:
        return self.aim.holds(self.evaluator, kept)

    def in_order(self, kept: EdgeMask) -> list[Place]:
        """The kept edges, the first to go first."""
        return sorted((tuple(place) for place in np.argwhere(kept)), key=lambda place: self.order[place])

    def result(self, kept: EdgeMask, minimal: bool, how: str) -> Refinement:
        provenance = self.start.provenance.with_parameters(
            **{how: True}, keep=self.aim.keep, band=list(self.aim.band)
        )
        circuit = Circuit(self.start.graph, kept, self.start.values, provenance)
        runs = self.evaluator.runs - self.before
        found = figures(self.evaluator, kept)
        return Refinement(circuit, found.faithfulness, minimal, runs, found.agreement, found.kl)

    # of `refine`

    def repair(self, kept: EdgeMask, candidates: int) -> EdgeMask:
        """Add the edge that brings the circuit nearest to the model, until it is in the band or nothing
        helps."""
        while not self.inside(kept) and not self.spent:
            best, nearest = None, self.aim.distance(self.evaluator, kept)
            useful = useful_beside(self.prepared, kept) & ~kept
            for place in sorted(map(tuple, np.argwhere(useful)), key=lambda edge: -self.order[edge])[
                :candidates
            ]:
                grown = changed(kept, [place], True)
                distance = self.aim.distance(self.evaluator, grown)
                if distance < nearest:
                    best, nearest = grown, distance
            if best is None:
                break
            kept = best
        return kept

    def trim(self, kept: EdgeMask, advance: Callable[[], object]) -> tuple[EdgeMask, bool]:
        """Drop edges weakest first, in blocks and then one by one, until a whole pass drops none.

        Returns:
            What is left, and whether it is 1-minimal.
        """
        if not self.inside(kept):
            return kept, False
        for size in BLOCKS:
            dropped = True
            while dropped:
                dropped = False
                present = self.in_order(kept)
                for start in range(0, len(present), size):
                    if self.spent:
                        return kept, False
                    advance()
                    smaller = changed(kept, present[start : start + size], False)
                    smaller = without_dead(self.prepared, smaller)
                    if smaller.sum() < kept.sum() and self.inside(smaller):
                        kept, dropped = smaller, True
                        self.note(kept)
                if size > 1:
                    break  # one pass for each size of block is enough: single edges settle the rest
        return kept, True

    # of `ddmin`

    def enough(self, places: Sequence[Place]) -> bool:
        """Whether these edges alone lie in the band."""
        if self.spent:
            raise _Spent
        return self.inside(self.live(places))

    def live(self, places: Sequence[Place]) -> EdgeMask:
        nothing = np.zeros(self.evaluator.graph.shape, dtype=bool)
        return without_dead(self.prepared, changed(nothing, places, True))


def changed(kept: EdgeMask, places: Iterable[Place | NDArray[np.intp]], to: bool) -> EdgeMask:
    """A copy of a mask with some edges kept or not."""
    copy = kept.copy()
    copy[tuple(np.array(list(places), dtype=int).reshape(-1, copy.ndim).T)] = to
    return copy


# -- edges that do nothing -----------------------------------------------------------------------
# An edge whose receiver leads nowhere is heard by nobody, whatever the ablation. An edge whose sender hears
# nothing from the input carries just its reference output when references come from a run on other images
# (patch, resample), and does nothing then. Under mean, zero or noise ablation such a sender still computes
# something from its ablated inputs, which is not its reference; there its edges stay.


def without_dead(prepared: PreparedTask, kept: EdgeMask) -> EdgeMask:
    """The kept edges `(sender, receiver, group)` less those that change no run of the task."""
    return kept & useful_beside(prepared, kept)


def useful_beside(prepared: PreparedTask, kept: EdgeMask) -> EdgeMask:
    """`(sender, receiver, group)`: where an edge, kept beside `kept`, could change a run of the task."""
    graph = prepared.graph
    heard: EdgeMask = np.ones((len(graph.senders), len(graph.groups)), dtype=bool)
    if isinstance(prepared.ablation, (Patch, Resample)):
        heard = reached_senders(graph, kept)
    useful: EdgeMask = heard[:, None, :] & live_receivers(graph, kept)[None] & graph.edge_mask
    return useful

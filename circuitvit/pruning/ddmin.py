"""Delta debugging: drop groups of edges, halves first, until no single edge can go.

The circuit is to the behaviour what an input is to a failure: edges are divided into `n` groups, and the
search goes on with the first group that is enough by itself, else with all but the first group that can be
spared, else with twice as many groups. When the groups are single edges and none can be spared, the circuit
is 1-minimal. Where few of many edges matter it takes far fewer runs than trying edge after edge; where most
matter it takes more.

Zeller and Hildebrandt 2002, "Simplifying and isolating failure-inducing input", IEEE TSE 28(2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from circuitvit.engine import kept_edges, progress_bar
from circuitvit.errors import DataError, OptionError
from circuitvit.graph import Circuit, EdgeMask
from circuitvit.models import Model
from circuitvit.pruning.dead import without_dead
from circuitvit.pruning.meter import FaithfulnessMeter
from circuitvit.pruning.refine import Band, Refinement, order_of
from circuitvit.tasks import PreparedTask, Task, prepare

T = TypeVar("T")


def ddmin(
    model: Model,
    task: Task | PreparedTask,
    circuit: Circuit,
    *,
    order: NDArray[np.float64] | None = None,
    band: Band = (0.9, 1.1),
    max_runs: int | None = None,
    meter: FaithfulnessMeter | None = None,
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
        band: faithfulness that the result must keep.
        max_runs: give up after so many masked runs.
        meter: of the same task, to spare its set-up.
        progress: whether to show a bar.

    Raises:
        OptionError: if the band is empty, the task is denoising, or the circuit or the order belongs to
            another graph.
        DataError: if the circuit does not lie in the band to begin with.

    Example:
        >>> import circuitvit as cv  # doctest: +SKIP
        >>> scores = cv.attribute(model, task, "exact")  # doctest: +SKIP
        >>> cv.ddmin(model, task, scores.top(1000)).circuit  # doctest: +SKIP
    """
    if not band[0] < band[1]:
        raise OptionError(f"the band must go from low to high, not {band}")
    if max_runs is not None and max_runs < 1:
        raise OptionError(f"max_runs must be at least 1, not {max_runs}")
    prepared = prepare(model, task, progress)
    kept_edges(prepared, circuit)  # refuses a circuit of another graph
    meter = meter or FaithfulnessMeter(prepared)
    before = meter.runs
    with progress_bar(len(circuit), "ddmin", progress) as bar:
        reduction = _Reduction(meter, circuit, order_of(circuit, order), band, max_runs, bar.update)
        minimal = reduction.run()
    provenance = circuit.provenance.with_parameters(ddmin=True, band=list(band))
    reduced = Circuit(prepared.graph, reduction.kept, circuit.values, provenance)
    return Refinement(reduced, meter(reduction.kept), minimal, meter.runs - before)


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
        groups = _divided(left, n)
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


class _Spent(Exception):
    """The runs are used up."""


Place = tuple[int, ...]


class _Reduction:
    """The edges that are left, and what is asked of some of them."""

    def __init__(
        self,
        meter: FaithfulnessMeter,
        circuit: Circuit,
        sizes: NDArray[np.float64],
        band: Band,
        max_runs: int | None,
        advance: Callable[[int], object],
    ) -> None:
        self.meter, self.band, self._advance = meter, band, advance
        self.left: list[Place] = sorted(
            (tuple(place) for place in np.argwhere(circuit.kept)), key=lambda place: sizes[place]
        )
        self._last_run = None if max_runs is None else meter.runs + max_runs

    @property
    def kept(self) -> EdgeMask:
        return self._live(self.left)

    def run(self) -> bool:
        """Remove what can be removed; whether the search came to its end."""
        if not self._holds(self.left):
            raise DataError(
                f"the circuit's faithfulness is {self.meter(self.kept):.3f}, outside {self.band[0]:g} to "
                f"{self.band[1]:g}: removing edges is no way back; `refine` repairs first"
            )
        try:
            minimise(self.left, self._holds, self._shrink)
        except _Spent:
            return False
        return True

    def _holds(self, places: Sequence[Place]) -> bool:
        if self._last_run is not None and self.meter.runs >= self._last_run:
            raise _Spent
        return self.band[0] <= self.meter(self._live(places)) <= self.band[1]

    def _shrink(self, left: Sequence[Place]) -> None:
        self._advance(len(self.left) - len(left))
        self.left = list(left)

    def _live(self, places: Sequence[Place]) -> EdgeMask:
        mask: EdgeMask = np.zeros(self.meter.prepared.graph.shape, dtype=bool)
        mask[tuple(np.array(places, dtype=int).reshape(-1, mask.ndim).T)] = True
        return without_dead(self.meter.prepared, mask)


def _divided(items: list[T], n: int) -> list[list[T]]:
    """Items in `n` groups of about equal size, in order."""
    ends = [round(len(items) * place / n) for place in range(n + 1)]
    return [items[start:stop] for start, stop in pairwise(ends)]

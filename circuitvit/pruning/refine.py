"""Refinement: make a circuit faithful, then as small as it can be, by exact ablation.

*Repair* adds back the edges that bring faithfulness nearest to 1 until it lies in the band. *Trimming* then
visits the kept edges from the weakest to the strongest and drops each one without which faithfulness stays
in the band, first a block at a time, at last one by one, pass after pass until nothing more can go. The
result is 1-minimal: no single edge can be dropped. Dead edges are pruned after every step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from circuitvit.engine import kept_edges, progress_bar
from circuitvit.errors import OptionError
from circuitvit.graph import Circuit, EdgeMask
from circuitvit.models import Model
from circuitvit.pruning.dead import useful_beside, without_dead
from circuitvit.pruning.meter import FaithfulnessMeter
from circuitvit.tasks import PreparedTask, Task, prepare

BLOCKS = (8, 2, 1)
"""How many edges trimming tries to drop at once: where many can go, a block goes at the price of one run."""

Band = tuple[float, float]
"""The faithfulness that counts as carrying the behaviour, lowest and highest."""


@dataclass(frozen=True, eq=False)
class Refinement:
    """What refinement found.

    Attributes:
        circuit: the refined circuit.
        faithfulness: on the pairs that it was refined on.
        minimal: whether no single edge can be dropped without leaving the band.
        runs: how many masked runs of all pairs it took.
    """

    circuit: Circuit
    faithfulness: float
    minimal: bool
    runs: int


def refine(
    model: Model,
    task: Task | PreparedTask,
    circuit: Circuit,
    *,
    order: NDArray[np.float64] | None = None,
    band: Band = (0.9, 1.1),
    candidates: int = 200,
    max_runs: int | None = None,
    meter: FaithfulnessMeter | None = None,
    progress: bool = True,
) -> Refinement:
    """Repair and trim a circuit.

    Args:
        model: from `load` or `wrap`.
        task: in the noising direction.
        circuit: to start from.
        order: `(sender, receiver, group)`: which edges to try first when repairing (largest), and to drop
            first when trimming (smallest); the circuit's own scores by default.
        band: faithfulness that the result must keep.
        candidates: how many edges repair tries at each step.
        max_runs: give up after so many masked runs.
        meter: of the same task, to spare its set-up.
        progress: whether to show a bar.

    Raises:
        OptionError: if the band is empty, the task is denoising, or the circuit or the order belongs to
            another graph.
    """
    if not band[0] < band[1]:
        raise OptionError(f"the band must go from low to high, not {band}")
    prepared = prepare(model, task, progress)
    if prepared.denoising:
        raise OptionError("circuits are refined in the clean run: give the task direction='noising'")
    kept_edges(prepared, circuit)  # refuses a circuit of another graph
    order = order_of(circuit, order)
    meter = meter or FaithfulnessMeter(prepared)
    before = meter.runs
    search = _Search(meter, order, band, max_runs)
    with progress_bar(len(circuit), "refining", progress) as bar:
        kept = search.repair(without_dead(prepared, circuit.kept), candidates)
        kept, minimal = search.trim(kept, bar.update)
    provenance = circuit.provenance.with_parameters(refined=True, band=list(band))
    refined = Circuit(prepared.graph, kept, circuit.values, provenance)
    return Refinement(refined, meter(kept), minimal, meter.runs - before)


def order_of(circuit: Circuit, order: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """The order given, or the magnitudes of the circuit's own scores.

    Raises:
        OptionError: if the order is not of the circuit's graph.
    """
    if order is None:
        return np.zeros(circuit.graph.shape) if circuit.values is None else np.abs(circuit.values)
    if order.shape != circuit.graph.shape:
        raise OptionError(
            f"the order has shape {order.shape}, the graph {circuit.graph.shape} (sender, receiver, group)"
        )
    return order


class _Search:
    """The two moves, and what they go by."""

    def __init__(
        self, meter: FaithfulnessMeter, order: NDArray[np.float64], band: Band, max_runs: int | None
    ) -> None:
        self.graph, self.meter, self.order, self.band = meter.prepared.graph, meter, order, band
        self.last_run = None if max_runs is None else meter.runs + max_runs

    @property
    def spent(self) -> bool:
        return self.last_run is not None and self.meter.runs >= self.last_run

    def inside(self, kept: EdgeMask) -> bool:
        return self.band[0] <= self.meter(kept) <= self.band[1]

    def repair(self, kept: EdgeMask, candidates: int) -> EdgeMask:
        """Add the edge that brings faithfulness nearest to 1, until it is in the band or nothing helps."""
        while not self.inside(kept) and not self.spent:
            error = abs(self.meter(kept) - 1)
            best, nearest = None, error
            for place in self._absent(kept)[:candidates]:
                grown = kept.copy()
                grown[place] = True
                distance = abs(self.meter(grown) - 1)
                if distance < nearest:
                    best, nearest = place, distance
            if best is None:
                break
            kept = kept.copy()
            kept[best] = True
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
                present = self._present(kept)
                for start in range(0, len(present), size):
                    if self.spent:
                        return kept, False
                    advance()
                    smaller = kept.copy()
                    smaller[tuple(np.array(present[start : start + size]).T)] = False
                    smaller = without_dead(self.meter.prepared, smaller)
                    if smaller.sum() < kept.sum() and self.inside(smaller):
                        kept, dropped = smaller, True
                if size > 1:
                    break  # one pass for each size of block is enough: single edges settle the rest
        return kept, True

    def _absent(self, kept: EdgeMask) -> list[tuple[int, ...]]:
        """Edges that are not kept but would be live, strongest first."""
        absent = [tuple(place) for place in np.argwhere(self.graph.edge_mask & ~kept)]
        useful = useful_beside(self.meter.prepared, kept)
        return sorted((place for place in absent if useful[place]), key=lambda place: -self.order[place])

    def _present(self, kept: EdgeMask) -> list[tuple[int, ...]]:
        return sorted((tuple(place) for place in np.argwhere(kept)), key=lambda place: self.order[place])

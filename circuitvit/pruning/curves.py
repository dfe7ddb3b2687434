"""Faithfulness against size, for any scores or family of circuits, and the numbers that sum a curve up.

Sizes are counted after dead edges are pruned: a point at 100 edges is the longest selection that leaves at
most 100 live ones. References and runs of the whole model are computed once, so a curve costs little more
than its masked runs.

CPR and CMD: Mueller et al. 2025, "MIB: a mechanistic interpretability benchmark", arXiv:2504.13151.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from circuitvit.engine import progress_bar
from circuitvit.errors import OptionError
from circuitvit.graph import Circuit, EdgeScores, Graph, Ranking
from circuitvit.models import Model
from circuitvit.pruning.meter import FaithfulnessMeter
from circuitvit.pruning.refine import Band
from circuitvit.tasks import PreparedTask, Task, prepare

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The sizes at which MIB runs circuits, as shares of all edges."""


@dataclass(frozen=True)
class Point:
    """One circuit on a curve.

    Attributes:
        fraction: the share of all edges that was asked for.
        size: live edges of the circuit that was run.
        faithfulness: of that circuit.
    """

    fraction: float
    size: int
    faithfulness: float


@dataclass(frozen=True)
class Curve:
    """Faithfulness against size.

    Attributes:
        label: what the circuits come from.
        points: by rising size asked for.
        n_edges: of the whole graph.
    """

    label: str
    points: tuple[Point, ...]
    n_edges: int

    @property
    def cpr(self) -> float:
        """Circuit performance ratio: the area under the curve over shares of edges, by trapezoids."""
        return self._area(lambda point: point.faithfulness, lambda fraction: fraction)

    @property
    def cmd(self) -> float:
        """Circuit-model distance: the area between the curve and 1, by trapezoids; 0 is best."""
        return self._area(lambda point: abs(1 - point.faithfulness), lambda fraction: fraction)

    @property
    def log_cmd(self) -> float:
        """The mean distance from 1 over the logarithm of the size, where small circuits count as much."""
        span = math.log(self.points[-1].fraction / self.points[0].fraction)
        area = self._area(lambda point: abs(1 - point.faithfulness), math.log)
        return area / span if span else abs(1 - self.points[0].faithfulness)

    def k_star(self, band: Band = (0.9, 1.1)) -> int | None:
        """The smallest size from which on the curve stays in the band; None if it does not even end there."""
        smallest = None
        for point in reversed(self.points):
            if not band[0] <= point.faithfulness <= band[1]:
                break
            smallest = point.size
        return smallest

    def _area(self, height: Callable[[Point], float], place: Callable[[float], float]) -> float:
        return sum(
            (place(right.fraction) - place(left.fraction)) * (height(left) + height(right)) / 2
            for left, right in pairwise(self.points)
        )


def score_curve(
    model: Model,
    task: Task | PreparedTask,
    scores: EdgeScores,
    *,
    by: Ranking = "magnitude",
    connected: bool = False,
    fractions: Sequence[float] = FRACTIONS,
    meter: FaithfulnessMeter | None = None,
    progress: bool = True,
) -> Curve:
    """The curve of the best edges by some scores.

    Args:
        model: from `load` or `wrap`.
        task: to run the circuits on, in the noising direction; best other images than the scores come from.
        scores: that rank the edges.
        by: "magnitude" or "signed".
        connected: grow path by path instead of taking the best edges wherever they lie.
        fractions: sizes, as shares of all edges.
        meter: of the same task, to spare its set-up when several curves are drawn.
        progress: whether to show a bar.

    Raises:
        OptionError: if a fraction is not between 0 and 1, or none is given.
    """
    _same_graph(scores.graph, prepare(model, task).graph)
    select = (lambda k: scores.connected(k, by)) if connected else (lambda k: scores.top(k, by))
    n_edges = scores.graph.n_edges
    wanted = [
        (fraction, _largest(select, round(fraction * n_edges), n_edges)) for fraction in _checked(fractions)
    ]
    label = f"{scores.method}, {by}{', connected' if connected else ''}"
    return _run(model, task, label, wanted, meter, progress)


def circuit_curve(
    model: Model,
    task: Task | PreparedTask,
    circuits: Iterable[Circuit],
    label: str,
    *,
    fractions: Sequence[float] = FRACTIONS,
    meter: FaithfulnessMeter | None = None,
    progress: bool = True,
) -> Curve:
    """The curve of a family of circuits, such as those of `find`: at each size the largest that fits.

    Args:
        model: from `load` or `wrap`.
        task: to run the circuits on, in the noising direction.
        circuits: of any sizes; the empty and the full one are added.
        label: what they come from.
        fractions: sizes, as shares of all edges.
        meter: of the same task.
        progress: whether to show a bar.

    Raises:
        OptionError: if a fraction is not between 0 and 1, or none is given.
    """
    graph = model.graph if isinstance(task, Task) and task.groups is None else prepare(model, task).graph
    circuits = tuple(circuits)
    for circuit in circuits:
        _same_graph(circuit.graph, graph)
    family = sorted(
        [Circuit.empty(graph), Circuit.full(graph), *(each.pruned() for each in circuits)], key=len
    )
    wanted = []
    for fraction in _checked(fractions):
        fitting = [circuit for circuit in family if len(circuit) <= round(fraction * graph.n_edges)]
        wanted.append((fraction, fitting[-1]))
    return _run(model, task, label, wanted, meter, progress)


def _run(
    model: Model,
    task: Task | PreparedTask,
    label: str,
    wanted: list[tuple[float, Circuit]],
    meter: FaithfulnessMeter | None,
    progress: bool,
) -> Curve:
    meter = meter or FaithfulnessMeter(prepare(model, task))
    points = []
    with progress_bar(len(wanted), f"curve of {label}", progress) as bar:
        for fraction, circuit in wanted:
            points.append(Point(fraction, len(circuit), meter(circuit.kept)))
            bar.update()
    return Curve(label, tuple(points), meter.prepared.graph.n_edges)


def _largest(select: Callable[[int], Circuit], size: int, n_edges: int) -> Circuit:
    """The longest selection that leaves at most `size` live edges, by bisection."""
    low, high = 0, n_edges
    while low < high:
        middle = (low + high + 1) // 2
        if len(select(middle)) <= size:
            low = middle
        else:
            high = middle - 1
    return select(low)


def _same_graph(found: Graph, wanted: Graph) -> None:
    if found != wanted:
        raise OptionError(f"circuits and scores must belong to the task's graph: {found}, not {wanted}")


def _checked(fractions: Sequence[float]) -> list[float]:
    if not fractions or not all(0 < fraction <= 1 for fraction in fractions):
        raise OptionError(f"sizes are shares of all edges, above 0 and up to 1, not {list(fractions)}")
    return sorted(fractions)

"""Faithfulness against size, for any scores or family of circuits, and the numbers that sum a curve up.

Sizes are counted after dead edges are pruned: a point at 100 edges is the longest selection that leaves at
most 100 live ones. References and runs of the whole model are computed once, so a curve costs little more
than its masked runs.

A scoring method ranks all edges once, and its circuits are the best of them. A learned mask is no ranking to
extend: a size wanted is a size trained for, so its family is one training that rests at each size. Thinning
passes through all of them.

CPR and CMD: Mueller et al. 2025, "MIB: a mechanistic interpretability benchmark", arXiv:2504.13151.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from types import MappingProxyType
from typing import Any

from circuitvit._keywords import running
from circuitvit.attribution.methods import METHODS, find_method
from circuitvit.attribution.paths import Rule
from circuitvit.attribution.scoring import attribute
from circuitvit.engine import Evaluator, progress_bar
from circuitvit.errors import OptionError, counted
from circuitvit.graph import Circuit, CircuitLike, EdgeScores, Ranking, as_circuit
from circuitvit.graph.results import Record, Result
from circuitvit.models import Model
from circuitvit.pruning.aims import Band
from circuitvit.pruning.anytime import Plan
from circuitvit.pruning.find import ROUNDS, find
from circuitvit.pruning.learned import MaskSettings, Over, SamplerName, learn_masks
from circuitvit.pruning.refine import noising_evaluator
from circuitvit.pruning.thinning import ThinSettings, thin
from circuitvit.tasks import PreparedTask, Task, prepare

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The sizes at which MIB runs circuits, as shares of all edges."""

TRAINED = (0.005, 0.5)
"""Masks are trained, and models thinned, to sizes in this range: below hardly a path is left, above hardly
anything is lost."""


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


@dataclass(frozen=True, repr=False)
class Curve(Result):
    """Faithfulness against size.

    Attributes:
        label: what the circuits come from.
        points: by rising size asked for.
        n_edges: of the whole graph.
    """

    label: str
    points: tuple[Point, ...]
    n_edges: int

    def records(self) -> Iterator[Record]:
        """One row for each point: the `label`, the `fraction` of all edges that was asked for, the number of
        `edges` of the circuit that was run, and its `faithfulness`."""
        for point in self.points:
            yield {
                "label": self.label,
                "fraction": point.fraction,
                "edges": point.size,
                "faithfulness": point.faithfulness,
            }

    def _check(self) -> None:
        _checked([point.fraction for point in self.points] or [1.0])

    def __repr__(self) -> str:
        area = f", CPR {self.cpr:.3f}, CMD {self.cmd:.3f}" if self.points else ""
        size = f"{counted(len(self.points), 'point')} of {self.n_edges:,} edges"
        return f"Curve({self.label or 'unnamed'}: {size}{area})"

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


@running
def score_curve(
    model: Model,
    task: Task | PreparedTask,
    scores: EdgeScores,
    *,
    by: Ranking = "magnitude",
    connected: bool = False,
    fractions: Sequence[float] = FRACTIONS,
    evaluator: Evaluator | None = None,
    batch_size: int | None = None,
    memory: int | str | None = None,
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
        evaluator: of the same task, so that what it has run is not run again.
        batch_size: pairs at once; by default what `memory` allows.
        memory: bytes that a batch, and what is kept between runs, may take.
        progress: whether to show a bar.

    Raises:
        OptionError: if a fraction is not between 0 and 1, or none is given.
    """
    evaluator = _evaluator(model, task, evaluator, batch_size, memory)
    evaluator.graph.check_same(scores.graph, "what scores the edges")
    select = scores.connected if connected else scores.top
    n_edges = scores.graph.n_edges

    def live(k: int) -> int:
        return len(select(k, by))

    sizes = [(each, round(each * n_edges)) for each in _checked(fractions)]
    wanted = [
        (each, select(bisect_right(range(n_edges + 1), size, key=live) - 1, by)) for each, size in sizes
    ]
    return _run(f"{scores.method}, {by}{', connected' * connected}", wanted, evaluator, progress)


@running
def circuit_curve(
    model: Model,
    task: Task | PreparedTask,
    circuits: Iterable[CircuitLike],
    label: str,
    *,
    fractions: Sequence[float] = FRACTIONS,
    evaluator: Evaluator | None = None,
    batch_size: int | None = None,
    memory: int | str | None = None,
    progress: bool = True,
) -> Curve:
    """The curve of a family of circuits, such as those of `find`: at each size the largest that fits.

    Args:
        model: from `load` or `wrap`.
        task: to run the circuits on, in the noising direction.
        circuits: of any sizes; the empty and the full one are added.
        label: what they come from.
        fractions: sizes, as shares of all edges.
        evaluator: of the same task, so that what it has run is not run again.
        batch_size: pairs at once; by default what `memory` allows.
        memory: bytes that a batch, and what is kept between runs, may take.
        progress: whether to show a bar.

    Raises:
        OptionError: if a fraction is not between 0 and 1, or none is given.
    """
    evaluator = _evaluator(model, task, evaluator, batch_size, memory)
    graph = evaluator.graph
    ends = Circuit.empty(graph), Circuit.full(graph)
    family = sorted([*ends, *(as_circuit(each, graph).pruned() for each in circuits)], key=len)
    sizes = [len(each) for each in family]
    asked = [(each, round(each * graph.n_edges)) for each in _checked(fractions)]
    wanted = [(each, family[bisect_right(sizes, size) - 1]) for each, size in asked]
    return _run(label, wanted, evaluator, progress)


def _evaluator(
    model: Model,
    task: Task | PreparedTask,
    given: Evaluator | None,
    batch_size: int | None,
    memory: int | str | None,
) -> Evaluator:
    """The evaluator that is given, or one of the task."""
    prepared = prepare(model, task if given is None else given.prepared)
    return noising_evaluator(prepared, batch_size, memory, given)


def _run(label: str, wanted: list[tuple[float, Circuit]], evaluator: Evaluator, progress: bool) -> Curve:
    points = []
    with progress_bar(len(wanted), f"curve of {label}", progress) as bar:
        for fraction, circuit in wanted:
            points.append(Point(fraction, len(circuit), evaluator.faithfulness(circuit)))
            bar.update()
    return Curve(label, tuple(points), evaluator.graph.n_edges)


def _checked(fractions: Sequence[float]) -> list[float]:
    if not fractions or not all(0 < fraction <= 1 for fraction in fractions):
        raise OptionError(f"sizes are shares of all edges, above 0 and up to 1, not {list(fractions)}")
    return sorted(fractions)


# -- families of circuits by method --------------------------------------------------------------


@dataclass(frozen=True)
class FamilySettings:
    """How the circuits of a method are made.

    Attributes:
        fractions: sizes, as shares of all edges.
        by: how scores rank edges, "magnitude" or "signed".
        connected: whether scores select path by path, or the best edges wherever they lie.
        steps: points on the path of integrated gradients.
        rule: where these lie.
        mask: how masks are trained; its seed and batch size also hold for `find`.
        trained: the sizes that masks are trained for; by default the `fractions` from 0.005 to 0.5.
        faithfulness: that `find` searches for.
        batch_size: pairs at once; by default what `memory` allows.
        memory: bytes that a batch, and what is kept between runs, may take.
        progress: whether to show a bar.
    """

    fractions: Sequence[float] = FRACTIONS
    by: Ranking = "magnitude"
    connected: bool = True
    steps: int = 5
    rule: Rule = "midpoint"
    mask: MaskSettings = field(default_factory=MaskSettings)
    trained: Sequence[float] | None = None
    faithfulness: float = 0.9
    batch_size: int | None = None
    memory: int | str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        for name, shares in (("fractions", self.fractions), ("trained", self.trained)):
            if shares is not None and not (shares and all(0 < share <= 1 for share in shares)):
                raise OptionError(f"{name} are shares of all edges, above 0 and up to 1, not {list(shares)}")
        if len(set(self.fractions)) < 2:
            raise OptionError(
                f"CPR and CMD are areas over a range of sizes: give at least two, not {list(self.fractions)}"
            )


Family = Callable[[PreparedTask, FamilySettings], list[Circuit]]


def _masks(
    prepared: PreparedTask,
    settings: FamilySettings,
    sampler: SamplerName = "hard-concrete",
    over: Over = "edges",
) -> list[Circuit]:
    batch_size = min(settings.mask.batch_size, len(prepared))
    mask = replace(settings.mask, batch_size=batch_size, sampler=sampler, over=over)
    sizes = _sizes(prepared, settings)
    learned = learn_masks(prepared.model, prepared, sizes, mask, progress=settings.progress)
    return [each.at_most(size) for each, size in zip(learned, sizes, strict=True)]


def _thinned(prepared: PreparedTask, settings: FamilySettings) -> list[Circuit]:
    batch_size = min(settings.mask.batch_size, len(prepared))
    thinning = ThinSettings(batch_size=batch_size, seed=settings.mask.seed)
    sizes = _sizes(prepared, settings)
    return list(thin(prepared.model, prepared, sizes, thinning, progress=settings.progress).circuits)


def _sizes(prepared: PreparedTask, settings: FamilySettings) -> list[int]:
    """The numbers of edges that searches are asked for, the largest first."""
    low, high = TRAINED
    shares = settings.trained or [share for share in settings.fractions if low <= share <= high]
    return sorted({max(1, round(share * prepared.graph.n_edges)) for share in shares}, reverse=True)


def _found(prepared: PreparedTask, settings: FamilySettings) -> list[Circuit]:
    """The circuits that one `find` passes through, and the one that it ends with."""
    size = min(settings.mask.batch_size, len(prepared))
    plan = Plan(ROUNDS[1] // 2, trim_runs=settings.mask.steps, batch_size=size, seed=settings.mask.seed)
    finding = find(
        prepared.model, prepared, faithfulness=settings.faithfulness, plan=plan, memory=settings.memory,
        progress=settings.progress,
    )  # fmt: skip
    return [*(Circuit(prepared.graph, each.kept) for each in finding.candidates), finding.circuit]


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "learned": _masks,
        "learned-ugs": partial(_masks, sampler="ugs"),
        "learned-nodes": partial(_masks, over="nodes"),
        "thinned": _thinned,
        "find": _found,
    }
)
"""What makes circuits of many sizes without a score for every edge, by name."""


def method_names() -> tuple[str, ...]:
    """Everything that has a curve: scoring methods, then families of learned masks."""
    return (*METHODS, *FAMILIES)


def check_method(name: str) -> None:
    """Refuse a name that is no method.

    Raises:
        NameNotFoundError: if it is not known.
    """
    if name not in FAMILIES:
        find_method(name, FAMILIES)


def family_curve(
    method: str, discovery: PreparedTask, evaluator: Evaluator, settings: FamilySettings
) -> Curve:
    """The curve of one method.

    Args:
        method: one of `method_names()`.
        discovery: the pairs to score, or to train on.
        evaluator: of the pairs to run the circuits on.
        settings: of the method.

    Raises:
        NameNotFoundError: for an unknown method.
        OptionError: if the method cannot be used on this task.
    """
    check_method(method)
    model, judged = discovery.model, evaluator.prepared
    shared: dict[str, Any] = {
        "fractions": settings.fractions, "evaluator": evaluator, "progress": settings.progress,
    }  # fmt: skip
    if method in FAMILIES:
        return circuit_curve(model, judged, FAMILIES[method](discovery, settings), method, **shared)
    own: dict[str, Any] = {"steps": settings.steps, "rule": settings.rule}
    scores = attribute(
        model, discovery, method, batch_size=settings.batch_size, memory=settings.memory,
        progress=settings.progress,
        **{name: value for name, value in own.items() if name in METHODS[method].keywords},
    )  # fmt: skip
    curve = score_curve(model, judged, scores, by=settings.by, connected=settings.connected, **shared)
    return replace(curve, label=method)

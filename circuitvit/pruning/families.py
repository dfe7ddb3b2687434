"""Circuits of many sizes by one method, and their curve on other pairs than they were made on.

A scoring method ranks all edges once, and its circuits are the best of them. A learned mask is no ranking to
extend: a size wanted is a size trained for, so its family is a mask for each size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from circuitvit.attribution import METHODS, attribute
from circuitvit.attribution.methods import find_method
from circuitvit.attribution.paths import Rule
from circuitvit.errors import OptionError
from circuitvit.graph import Circuit, Ranking
from circuitvit.pruning.curves import FRACTIONS, Curve, circuit_curve, score_curve
from circuitvit.pruning.find import Plan, find
from circuitvit.pruning.gates import SamplerName
from circuitvit.pruning.learned import MaskSettings, learn_mask
from circuitvit.pruning.meter import FaithfulnessMeter
from circuitvit.pruning.units import Over
from circuitvit.tasks import PreparedTask

TRAINED = (0.005, 0.5)
"""Masks are trained for sizes in this range: below hardly a path is left, above hardly anything is lost."""


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
        batch_size: pairs at once, for scores.
        memory: budget of a batch, in bytes.
        progress: whether to show bars.
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
    memory: int | None = None
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


def _learned(sampler: SamplerName = "hard-concrete", over: Over = "edges") -> Family:
    """A mask for each size."""

    def family(prepared: PreparedTask, settings: FamilySettings) -> list[Circuit]:
        n_edges = prepared.graph.n_edges
        low, high = TRAINED
        shares = settings.trained or [share for share in settings.fractions if low <= share <= high]
        size = min(settings.mask.batch_size, len(prepared))
        mask = replace(settings.mask, batch_size=size, sampler=sampler, over=over)
        found = []
        for edges in sorted({max(1, round(share * n_edges)) for share in shares}):
            learned = learn_mask(prepared.model, prepared, edges, mask, progress=settings.progress)
            found.append(learned.at_most(edges))
        return found

    return family


def _found(prepared: PreparedTask, settings: FamilySettings) -> list[Circuit]:
    """The circuits that one `find` passes through, and the one that it ends with."""
    size = min(settings.mask.batch_size, len(prepared))
    plan = Plan(settings.mask.steps, trim_runs=settings.mask.steps, batch_size=size, seed=settings.mask.seed)
    finding = find(
        prepared.model, prepared, faithfulness=settings.faithfulness, plan=plan, memory=settings.memory,
        progress=settings.progress,
    )  # fmt: skip
    return [*(Circuit(prepared.graph, each.kept) for each in finding.candidates), finding.circuit]


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "learned": _learned(),
        "learned-ugs": _learned(sampler="ugs"),
        "learned-nodes": _learned(over="nodes"),
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
    method: str, discovery: PreparedTask, meter: FaithfulnessMeter, settings: FamilySettings
) -> Curve:
    """The curve of one method.

    Args:
        method: one of `method_names()`.
        discovery: the pairs to score, or to train on.
        meter: of the pairs to run the circuits on.
        settings: of the method.

    Raises:
        NameNotFoundError: for an unknown method.
        OptionError: if the method cannot be used on this task.
    """
    check_method(method)
    judged, model = meter.prepared, discovery.model
    if method in FAMILIES:
        circuits = FAMILIES[method](discovery, settings)
        return circuit_curve(
            model, judged, circuits, method, fractions=settings.fractions, meter=meter,
            progress=settings.progress,
        )  # fmt: skip
    given: dict[str, Any] = {"steps": settings.steps, "rule": settings.rule}
    scores = attribute(
        model, discovery, method, batch_size=settings.batch_size, memory=settings.memory,
        progress=settings.progress,
        **{name: value for name, value in given.items() if name in METHODS[method].keywords},
    )  # fmt: skip
    curve = score_curve(
        model, judged, scores, by=settings.by, connected=settings.connected, fractions=settings.fractions,
        meter=meter, progress=settings.progress,
    )  # fmt: skip
    return replace(curve, label=method)

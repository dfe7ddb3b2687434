"""One model on a sheet of several: its figures, as a table with the others, and what to bear in mind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from circuitvit.graph import Circuit, Provenance
from circuitvit.verification.report import Report
from circuitvit.verification.statistics import Estimate
from circuitvit.views.model_figures import Ability, Depth, Rightness, Use

LETTERS = "ABCDEFGH"
"""What models are called in drawings, in their order; no sheet has room for more of them."""


@dataclass(frozen=True)
class Cost:
    """What a phase of the work took.

    Attributes:
        phase: such as "search", or the name of a scoring method.
        seconds: that it took.
        forwards: the same in plain forwards of the model on one image, so that models can be compared.
    """

    phase: str
    seconds: float
    forwards: float


@dataclass(frozen=True, eq=False)
class ComparedModel:
    """One model on the sheet.

    Attributes:
        name: what it is called there.
        behaviour: the metric with its classes, in a line.
        layers: blocks of the model.
        heads: attention heads in all of them.
        width: of the residual stream.
        ability: how well it shows the behaviour.
        lens: the same along its depth.
        circuit: that `find` found.
        found: how, in plain sentences.
        minimal: whether no single edge of it can be dropped.
        report: of its verification.
        uses: what it is made of.
        rightness: of the scoring methods.
        costs: what all this took.
        provenance: model, weights, task and settings.
    """

    name: str
    behaviour: str
    layers: int
    heads: int
    width: int
    ability: Ability
    lens: tuple[Depth, ...]
    circuit: Circuit
    found: str
    minimal: bool
    report: Report
    uses: tuple[Use, ...]
    rightness: tuple[Rightness, ...]
    costs: tuple[Cost, ...]
    provenance: Provenance

    @property
    def random(self) -> Estimate | None:
        """The mean faithfulness of random circuits, where there were any."""
        drawn = self.report.headline.random
        return None if drawn is None else drawn.mean

    def uses_among(self, among: str) -> tuple[Use, ...]:
        """The parts of one sort that the circuit is made of: "nodes", "inputs" or "layers"."""
        return tuple(use for use in self.uses if use.among == among)


# -- tables -----------------------------------------------------------------------------------------


def table_of(models: Sequence[ComparedModel]) -> Iterator[tuple[str, list[str]]]:
    """The main figures: what each is, and for each model what it is there.

    Args:
        models: at least one.
    """
    for name, of in _ROWS.items():
        cells = [of(model) for model in models]
        if any(cells):
            yield name, [cell or "-" for cell in cells]
    methods = dict.fromkeys(each.method for model in models for each in model.rightness)
    for method in methods:
        found = [{each.method: each.spearman for each in model.rightness}.get(method) for model in models]
        yield f"{method} against effects, Spearman", [_told(each) or "-" for each in found]
    phases = dict.fromkeys(cost.phase for model in models for cost in model.costs)
    totals = [sum(cost.forwards for cost in model.costs) for model in models]
    if phases:
        yield "cost, forwards of one image", [f"{total:,.0f}" for total in totals]


def _told(estimate: Estimate | None) -> str:
    return "" if estimate is None else str(estimate)


def _of_graph(model: ComparedModel) -> str:
    size = model.report.size
    return f"{size.edges:,} of {size.graph_edges:,} ({size.density:.1%})"


def _random(model: ComparedModel) -> str:
    random = model.report.headline.random
    return "" if random is None else f"{random.mean.value:.3f}, at most {random.high:.3f}"


_ROWS: Mapping[str, Callable[[ComparedModel], str]] = {
    "behaviour": lambda model: model.behaviour,
    "layers, heads, width": lambda model: f"{model.layers}, {model.heads}, {model.width}",
    "pairs told apart": lambda model: _told(model.ability.told_apart),
    "clean answered right": lambda model: _told(model.ability.clean_right),
    "corrupt answered right": lambda model: _told(model.ability.corrupt_right),
    "gap of the metric": lambda model: _told(model.ability.gap),
    "circuit, edges": _of_graph,
    "circuit, nodes": lambda model: f"{model.report.size.nodes} of {model.report.size.graph_nodes}",
    "faithfulness": lambda model: _told(model.report.headline.faithfulness),
    "necessity": lambda model: _told(model.report.headline.necessity),
    "same top class": lambda model: _told(model.report.headline.agreement),
    "random circuits": _random,
}


def figures_of(model: ComparedModel) -> Iterator[tuple[str, str, str, Estimate | float | None]]:
    """Every figure of a model: what it is about, the part or method, its name and value."""
    able, size, judged = model.ability, model.report.size, model.report.headline
    for name in ("told_apart", "clean_right", "corrupt_right", "gap"):
        yield "ability", "", name, getattr(able, name)
    for name in ("edges", "graph_edges", "density", "nodes", "graph_nodes"):
        yield "circuit", "", name, getattr(size, name)
    for name in ("faithfulness", "necessity", "agreement"):
        yield "circuit", "", name, getattr(judged, name)
    yield "circuit", "", "random circuits", model.random
    for use in model.uses:
        yield use.among, use.part, "used", use.used
        yield use.among, use.part, "total", use.total
    for at in model.lens:
        yield "lens", at.position, "depth", at.depth
        yield "lens", at.position, "told_apart", at.told_apart
        yield "lens", at.position, "gap", at.gap
    for each in model.rightness:
        for name in ("spearman", "pearson", "signs"):
            yield "rightness", each.method, name, getattr(each, name)
    for cost in model.costs:
        yield "cost", cost.phase, "seconds", cost.seconds
        yield "cost", cost.phase, "forwards", cost.forwards


def caveats_of(models: Sequence[ComparedModel], held_out: bool) -> tuple[str, ...]:
    """What a reader of the sheet must know before comparing numbers on it."""
    return tuple(_caveats(models, held_out))


def _caveats(models: Sequence[ComparedModel], held_out: bool) -> Iterator[str]:
    if not held_out and models:
        yield "Circuits are judged on the pairs that they were found on, so their faithfulness is optimistic."
    for a, b in combinations(models, 2):
        if a.provenance.weights and a.provenance.weights == b.provenance.weights:
            yield (
                f"{a.name} and {b.name} have the same weights: what differs between them is the noise of the "
                "measurement, or their behaviours."
            )
    for model in models:
        told = model.ability.told_apart
        if told is not None and (told.value if told.low is None else told.low) <= 0.5:
            yield (
                f"{model.name} may tell the pairs apart no better than by chance ({told}): its circuit "
                "explains a difference in the metric, not an ability."
            )
    if len({round(model.report.size.graph_edges, -2) for model in models}) > 1:
        yield "The models have different numbers of edges: compare shares, not numbers."
    unfinished = [model.name for model in models if not model.minimal]
    if unfinished:
        yield f"The search ran out of time on {', '.join(unfinished)}: with more, circuits may be smaller."
    for model in models:
        for each in model.rightness:
            if each.why_not:
                yield f"{each.method} cannot score {model.name}: {each.why_not}."

"""Two or more models on one sheet: one behaviour, the same images, everything measured the same way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from circuitvit.errors import OptionError, counted
from circuitvit.graph import Circuit, Provenance
from circuitvit.graph.files import write_json
from circuitvit.graph.results import Cell, Record, Result
from circuitvit.verification.report import Report
from circuitvit.verification.statistics import Estimate
from circuitvit.verification.templates import row, write_text
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


@dataclass(frozen=True, eq=False, repr=False)
class ModelSheet(Result):
    """What `compare_models` found.

    Attributes:
        models: in the order in which they were given; fewer than were asked for while it is still at work.
        discovery: the pairs that circuits were found on, in one line.
        judged: how many pairs they were judged on, in words.
        held_out: whether these are others.
        caveats: what to bear in mind, in whole sentences.
    """

    models: tuple[ComparedModel, ...]
    discovery: str
    judged: str
    held_out: bool
    caveats: tuple[str, ...] = ()

    def records(self) -> Iterator[Record]:
        """One row for each figure: the `model`, what it is `about` ("ability", "circuit", "lens", ...), the
        `part` of the model or the method that it is of, the `figure`, its `value`, and the ends of its
        interval, `low` and `high`."""
        for model in self.models:
            for about, part, figure, value in _figures(model):
                ends: tuple[Cell, Cell, Cell] = (
                    value if isinstance(value, (int, float)) else None,
                    None,
                    None,
                )
                if isinstance(value, Estimate):
                    ends = value.value, value.low, value.high
                yield {
                    "model": model.name, "about": about, "part": part, "figure": figure,
                    **dict(zip(("value", "low", "high"), ends, strict=True)),
                }  # fmt: skip

    def _check(self) -> None:
        if len(self.models) > len(LETTERS):
            raise OptionError(f"a sheet has room for {len(LETTERS)} models, not for {len(self.models)}")

    def __getitem__(self, name: str) -> ComparedModel:
        """A model by its name.

        Raises:
            OptionError: if it is not on the sheet.
        """
        found = {model.name: model for model in self.models}
        if name not in found:
            raise OptionError(f"there is no model {name!r} on the sheet: it has {', '.join(found)}")
        return found[name]

    @property
    def overlaps(self) -> dict[tuple[str, str], float]:
        """The Jaccard overlap of the circuits of each two models of one graph, 0 to 1."""
        return {
            (a.name, b.name): a.circuit.jaccard(b.circuit)
            for a, b in combinations(self.models, 2)
            if a.circuit.graph == b.circuit.graph
        }

    def __repr__(self) -> str:
        names = ", ".join(f"{each.name} {len(each.circuit):,} edges" for each in self.models)
        return f"ModelSheet({counted(len(self.models), 'model')}: {names})"

    def to_markdown(self) -> str:
        """The sheet's main table, with a column for each model, and the caveats."""
        return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        judged = f"judged on {self.judged} held out" if self.held_out else "judged on the same"
        yield f"Circuits found on {self.discovery}; {judged}."
        yield ""
        yield from row("", *(model.name for model in self.models), header=True)
        for name, cells in table_of(self.models):
            yield from row(name, *cells)
        for text in self.caveats:
            yield f"\n- {text}" if text is self.caveats[0] else f"- {text}"

    def to_html(self) -> str:
        """The sheet as a page that needs no other file: light and dark, on a phone and on paper."""
        from circuitvit.views.model_page import as_page

        return as_page(self)

    def save(self, path: str | Path) -> Path:
        """Write the sheet as a page (`.html`), everything as `.json` or `.safetensors`, or a table as `.csv`
        or `.md`.

        Raises:
            OptionError: for another ending.
            FileError: if the file cannot be written.
        """
        path = Path(path)
        if path.suffix in (".html", ".md"):
            return write_text(path, self.to_html() if path.suffix == ".html" else self.to_markdown())
        if path.suffix == ".json":
            return write_json(path, self.to_dict())
        if path.suffix in (".csv", ".safetensors"):
            return super().save(path)
        raise OptionError(
            f"a ModelSheet is saved as .html, .json, .safetensors, .csv or .md, not as {path.name!r}"
        )


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


_ROWS = {
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


def _figures(model: ComparedModel) -> Iterator[tuple[str, str, str, Estimate | float | None]]:
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

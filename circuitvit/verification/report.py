"""The report of a verification: plain numbers with their intervals, and every caveat said out loud.

The dataclasses below are the report, and JSON (`circuitvit.report/2`) is all of it. Markdown is one page for
a reader, written from the template `templates/report.md.j2`; CSV is the table of all pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from circuitvit.errors import CircuitViTError, OptionError
from circuitvit.graph import Circuit, CircuitLike, Provenance, as_circuit, notebook
from circuitvit.graph.files import write_json
from circuitvit.graph.records import to_json
from circuitvit.graph.results import Record, Result, as_csv
from circuitvit.pruning.several import Agreement
from circuitvit.verification.cross_effects import ALPHA, CrossEffect
from circuitvit.verification.recipe import Recipe, edges_hash
from circuitvit.verification.robustness import Robustness
from circuitvit.verification.statistics import Estimate
from circuitvit.verification.templates import markdown, write_text
from circuitvit.verification.verdict import Verdict, conclusion

REPORT_SCHEMA = "circuitvit.report/2"
VERDICTS_SCHEMA = "circuitvit.verdicts/2"

TELLING = 5
"""How many of the pairs that the circuit fails on a page shows."""

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Which quantiles of the random circuits' faithfulness a report holds."""


@dataclass(frozen=True)
class CircuitSize:
    """How large the circuit is.

    Attributes:
        edges: on a path from input to logits: the size after dead-edge pruning.
        dead: edges given that lie on no such path.
        nodes: that a live edge touches.
        graph_edges: of the whole graph.
        graph_nodes: of the whole graph.
        density: share of the graph's edges that are live in the circuit, 0 to 1.
        asked: how many edges the selection was asked for, where that is known.
    """

    edges: int
    dead: int
    nodes: int
    graph_edges: int
    graph_nodes: int
    density: float
    asked: int | None = None


@dataclass(frozen=True)
class PairResult:
    """What happened on one pair.

    Attributes:
        clean: name of the clean image: its file, or its number.
        corrupt: name of the corrupt image, or None.
        whole: the metric with every edge kept.
        nothing: with every edge ablated.
        circuit: with only the circuit kept.
        complement: with only the circuit ablated.
        top_whole: the top class of the full model; None for a model without classes, like the following.
        top_circuit: that of the circuit alone.
        top_complement: that of the model without the circuit.
        kl: KL(full model || circuit) in nats.
    """

    clean: str
    corrupt: str | None
    whole: float
    nothing: float
    circuit: float
    complement: float
    top_whole: str | None
    top_circuit: str | None
    top_complement: str | None
    kl: float | None

    def off(self, behaviour: float) -> float:
        """How far the circuit's metric is from the model's, as a share of a mean behaviour; negative when it
        shows less of it. A report that was written by hand may have none: then in the metric's own units.
        """
        return (self.circuit - self.whole) / (behaviour or 1.0)


@dataclass(frozen=True)
class PairFailure:
    """A pair that the circuit fails on.

    Attributes:
        clean: name of the clean image.
        corrupt: name of the corrupt image, or None.
        off: the circuit's metric minus the model's, as a share of the mean behaviour over all pairs; negative
            when the circuit shows less of it.
        top_whole: the top class of the full model; None for a model without classes.
        top_circuit: that of the circuit alone.
    """

    clean: str
    corrupt: str | None
    off: float
    top_whole: str | None
    top_circuit: str | None


@dataclass(frozen=True)
class RandomBaseline:
    """The circuit against random connected circuits of its size and profile (`connected_circuits`).

    Attributes:
        n: how many random circuits.
        faithfulness: of each, in the order they were drawn.
        mean: of these, with an interval over pairs.
        low: the smallest.
        high: the largest.
        quantiles: of these, at `QUANTILES`.
        advantage: the circuit's faithfulness minus that mean, with a paired interval.
        as_good: how many come as close to 1 as the circuit, or closer.
        p_value: `(as_good + 1) / (n + 1)`: how likely a random circuit would be as good by chance.
        same: how many are the circuit itself, as all are where no other has its size and profile.
        shared: the share of the circuit's edges that a random one has too, on average.
    """

    n: int
    faithfulness: tuple[float, ...]
    mean: Estimate
    low: float
    high: float
    quantiles: tuple[float, ...]
    advantage: Estimate
    as_good: int
    p_value: float
    same: int
    shared: float


@dataclass(frozen=True)
class Section:
    """All figures on one set of pairs.

    Attributes:
        images: "task" or "held-out".
        task: one line that describes pairs, metric, ablation and direction.
        n_pairs: how many pairs.
        whole: mean metric with every edge kept.
        nothing: with every edge ablated.
        circuit: with only the circuit kept.
        complement: with only the circuit ablated.
        faithfulness: `(circuit - nothing) / (whole - nothing)`, a ratio of means.
        complement_faithfulness: `(complement - nothing) / (whole - nothing)`.
        necessity: `1 - complement_faithfulness`: the share of the behaviour that is lost without the circuit.
        agreement: share of pairs whose top class is the full model's, 0 to 1; None for a model without
            classes, where only the task's metric means something.
        kl: mean KL(full model || circuit) in nats; None likewise.
        weak_pairs: pairs whose own metric differs by less than a tenth of the mean difference.
        opposite_pairs: those among all pairs whose metric differs the other way.
        random: the random circuits, or None if there were none.
        pairs: pair by pair.
        failures: pairs whose top class is another with the circuit alone, or whose metric is off by more than
            half of the mean behaviour; the worst first.
    """

    images: str
    task: str
    n_pairs: int
    whole: Estimate
    nothing: Estimate
    circuit: Estimate
    complement: Estimate
    faithfulness: Estimate
    complement_faithfulness: Estimate
    necessity: Estimate
    agreement: Estimate | None
    kl: Estimate | None
    weak_pairs: int
    opposite_pairs: int
    random: RandomBaseline | None
    pairs: tuple[PairResult, ...]
    failures: tuple[PairFailure, ...] = ()

    @property
    def behaviour(self) -> float:
        """The mean metric with every edge kept minus that with none: what there is to explain."""
        return self.whole.value - self.nothing.value


@dataclass(frozen=True, repr=False)
class Report(Result):
    """What ablation says about a circuit. `print(report)` gives the headline, `to_markdown()` all of it.

    Attributes:
        size: of the circuit.
        task: figures on the task's own pairs.
        held_out: figures on other pairs, or None.
        warnings: every caveat, in whole sentences.
        circuit_provenance: where the circuit came from.
        provenance: of the verification: model, weights, settings, seed, version of the library.
        tests: of the circuit, from `audit`; on held-out pairs where there are any.
        robustness: the circuit under other conditions, or None.
        hypotheses: verdicts on claims.
        edge_stability: how often each edge of the circuit was found again on resampled pairs.
        recipe: how the report is made again.
        others: what the circuit does to other behaviours, where any were given.

    Example:
        >>> import circuitvit as cv  # doctest: +SKIP
        >>> report = cv.verify(model, task, circuit, held_out=other)  # doctest: +SKIP
        >>> report.headline.faithfulness.value, report.save("report.md")  # doctest: +SKIP
    """

    size: CircuitSize
    task: Section
    held_out: Section | None
    warnings: tuple[str, ...]
    circuit_provenance: Provenance
    provenance: Provenance
    schema: str = field(default=REPORT_SCHEMA)
    tests: tuple[Verdict, ...] = ()
    robustness: Robustness | None = None
    hypotheses: tuple[Verdict, ...] = ()
    edge_stability: Mapping[str, float] = field(default_factory=dict)
    recipe: Recipe = field(default_factory=Recipe)
    others: tuple[CrossEffect, ...] = ()

    version = 2

    def records(self) -> Iterator[Record]:
        """One row for each pair, those held out first: "images" says which set it is of; then the fields of
        its `PairResult`, and how far the circuit is `off`, as a share of the mean behaviour."""
        for section in filter(None, (self.held_out, self.task)):
            for pair in section.pairs:
                off = pair.off(section.behaviour) if section.behaviour else None
                yield {"images": section.images, **asdict(pair), "off": off}

    @property
    def conclusion(self) -> str:
        """What the decisive tests say: "passed", "failed" or "not enough evidence" (also without tests)."""
        return conclusion(self.tests)[0]

    @property
    def specific(self) -> bool | None:
        """Whether the circuit is shown to hurt its own behaviour more than each of the others, at a level of
        1 %; None where no others were given, or there are too few pairs to tell."""
        p_values = [each.p for each in self.others]
        known = [p for p in p_values if p is not None]
        return None if not known or len(known) < len(p_values) else max(known) < ALPHA

    @property
    def reasons(self) -> str:
        """Why, in plain sentences."""
        return conclusion(self.tests)[1]

    def with_findings(
        self,
        *,
        hypotheses: Sequence[Verdict] | None = None,
        stability: Agreement | None = None,
        robustness: Robustness | None = None,
        circuit: CircuitLike | None = None,
    ) -> Report:
        """The report with further findings on the same circuit.

        Args:
            hypotheses: verdicts from `Hypothesis.test`.
            stability: of discovery; needs `circuit`, whose edges' frequencies are kept.
            robustness: from `robustness`.
            circuit: that the report is about.

        Raises:
            OptionError: if there is stability and no circuit.
        """
        if stability is not None and circuit is None:
            raise OptionError("the stability of which edges? Give circuit= with the circuit of the report")
        found: dict[str, float] = {}
        notes: list[str] = []
        if stability is not None and circuit is not None:
            first, circuit = stability.circuits[0], as_circuit(circuit, stability.circuits[0].graph)
            found, differs = stability.of(circuit), circuit.provenance.mismatch(first.provenance)
            notes = [f"Stability compares circuits of {differs}."] if differs else []
        return replace(
            self,
            warnings=tuple(dict.fromkeys([*self.warnings, *notes])),
            hypotheses=self.hypotheses if hypotheses is None else tuple(hypotheses),
            edge_stability=found or self.edge_stability,
            robustness=robustness or self.robustness,
        )

    @property
    def headline(self) -> Section:
        """The figures to quote: those on held-out pairs where there are any."""
        return self.held_out or self.task

    @property
    def failures(self) -> tuple[PairFailure, ...]:
        """The pairs that the circuit fails on, of those in the headline."""
        return self.headline.failures

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values; "schema" comes first."""
        content = to_json(self)
        return {"schema": content.pop("schema"), **content}

    def to_markdown(self) -> str:
        """The report as a page of Markdown: what was done, the figures, caveats, and how to do it again. All
        pairs, one by one, are in the JSON and in the CSV."""
        return self._page()

    def _page(self, picture: str = "") -> str:
        """The page; with a picture of the circuit, by its name, where there is one beside it."""
        return markdown("report.md.j2", report=self, picture=picture, shown=_telling(self.headline))

    def _picture(self, folder: Path) -> str:
        """The name of the circuit's picture in a folder, if there is one and it is of this circuit."""
        picture, saved = folder / "circuit.svg", folder / "circuit.json"
        if not (self.recipe.edges and picture.is_file() and saved.is_file()):
            return ""
        try:
            return picture.name if edges_hash(Circuit.load(saved)) == self.recipe.edges else ""
        except CircuitViTError:  # somebody else's file
            return ""

    def to_csv(self) -> str:
        """The pairs of all sections as a table, one line each: "images" says which section."""
        return as_csv(self.records())

    def save(self, path: str | Path) -> Path:
        """Write the report; the ending chooses JSON (`.json`), Markdown (`.md`), or the pairs (`.csv`).

        The page shows `circuit.svg` where that lies beside it, with the `circuit.json` of this very circuit.

        Raises:
            OptionError: for another ending.
            FileError: if the file cannot be written.
        """
        path = Path(path)
        if path.suffix == ".json":
            return write_json(path, self.to_dict())
        if path.suffix == ".md":
            return write_text(path, self._page(self._picture(path.parent)))
        if path.suffix == ".csv":
            return write_text(path, self.to_csv())
        raise OptionError(f"a report is saved as .json, .md or .csv, not as {path.name!r}")

    def __str__(self) -> str:
        section = self.headline
        others = [] if section.random is None else [f"random circuits {section.random.mean.value:.3f}"]
        top = [] if section.agreement is None else [f"same top class {section.agreement.value:.0%}"]
        kept = [f"faithfulness {section.faithfulness}", *top]
        figures = [*kept, f"necessity {section.necessity}", *others]
        pairs = "pair" if section.n_pairs == 1 else "pairs"
        where = f"{section.n_pairs} held-out {pairs}" if self.held_out else f"{section.n_pairs} {pairs}"
        return f"{self.size.edges:,} of {self.size.graph_edges:,} edges, {where}: {', '.join(figures)}"

    def __repr__(self) -> str:
        return f"Report({self})"

    def _repr_html_(self) -> str:
        section = self.headline
        rows: list[tuple[str, object]] = [
            ("edges", f"{self.size.edges:,} of {self.size.graph_edges:,} ({self.size.density:.1%})"),
            ("faithfulness", section.faithfulness),
            ("necessity", section.necessity),
        ]
        if section.agreement is not None:
            share = f"{section.agreement.value:.0%} of {section.n_pairs} {section.images} pairs"
            rows.append(("same top class", share))
        if section.random is not None:
            random = section.random
            rows.append(("random circuits", f"{random.mean.value:.3f} on average, at most {random.high:.3f}"))
        return notebook.card("Verification", [*rows, *(("caveat", text) for text in self.warnings)])


def _telling(section: Section) -> tuple[PairResult, ...]:
    """The pairs that a page shows: some that the circuit fails on, the worst first, and the best one."""
    failed = {(each.clean, each.corrupt, f"{each.off:.6g}") for each in section.failures}
    whole = section.behaviour
    far = sorted(section.pairs, key=lambda pair: -abs(pair.off(whole)))
    worst = [pair for pair in far if (pair.clean, pair.corrupt, f"{pair.off(whole):.6g}") in failed]
    return (*worst[:TELLING], *(pair for pair in far[-1:] if pair not in worst))


def save_verdicts(verdicts: Sequence[Verdict], path: str | Path) -> Path:
    """Write verdicts on claims; the ending chooses JSON (`circuitvit.verdicts/2`) or Markdown (`.md`).

    Raises:
        OptionError: for another ending.
        FileError: if the file cannot be written.
    """
    path = Path(path)
    if path.suffix == ".json":
        return write_json(path, {"schema": VERDICTS_SCHEMA, "verdicts": to_json(tuple(verdicts))})
    if path.suffix == ".md":
        return write_text(path, markdown("hypotheses.md.j2", verdicts=verdicts))
    raise OptionError(f"verdicts are saved as .json or .md, not as {path.name!r}")

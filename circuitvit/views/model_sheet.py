"""Two or more models on one sheet: one behaviour, the same images, everything measured the same way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from circuitvit.errors import OptionError, counted
from circuitvit.graph.files import write_json
from circuitvit.graph.results import Cell, Record, Result
from circuitvit.verification.statistics import Estimate
from circuitvit.verification.templates import row, write_text
from circuitvit.views.compared_model import LETTERS, ComparedModel, figures_of, table_of
from circuitvit.views.model_page import as_page


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
            for about, part, figure, value in figures_of(model):
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

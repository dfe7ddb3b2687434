"""What was removed from a model, and what each way of choosing does on pairs that none was chosen on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from circuitvit.errors import DataError, OptionError, counted, unknown_name
from circuitvit.export.style import FAINT, MUTED
from circuitvit.graph.results import Record, Result
from circuitvit.models import Model
from circuitvit.verification.statistics import (
    Estimate,
    changed_share,
    estimated,
    mean_interval,
    percent,
    ratio_interval,
    share_interval,
)

if TYPE_CHECKING:
    from torch import nn

    from circuitvit.views.canvas import Picture

BEFORE = "as it is"
"""The row of the model without any removal."""

DRAWN = "random"
"""What rows of nodes drawn at random are called, with a number."""

SAID = {
    "right": "accuracy", "as before": "agreement with the model as it was", "same": "answers unturned",
}  # fmt: skip
"""What it is that a share of answers counts."""


@dataclass(frozen=True, eq=False)
class Row:
    """One way of choosing, and what it chose.

    Attributes:
        method: its name.
        removed: the sites, in the order in which they were chosen.
        kinds: what each is: a head, a neuron, a feature, an MLP or a direction.
        constants: what they become, where that is the same for every token and image; {} elsewhere.
        folds: whether what is removed folds into weights.
        tried: runs that it took.
    """

    method: str
    removed: tuple[str, ...]
    kinds: tuple[str, ...]
    constants: Mapping[str, Float[NDArray[np.floating[Any]], " _width"]]
    folds: bool
    tried: int

    along: ClassVar[str] = "removed:site kinds:site"

    @property
    def size(self) -> str:
        """How much was removed, in words."""
        counts = Counter(self.kinds)
        plural = {kind: kind if count == 1 else f"{kind}s" for kind, count in counts.items()}
        return ", ".join(f"{count} {plural[kind]}" for kind, count in counts.items()) or "nothing"

    def _check(self) -> None:
        if self.constants and set(self.constants) != set(self.removed):
            raise OptionError(f"the constants of {self.method} are not those of what it removed")


@dataclass(frozen=True, eq=False)
class Behaviour:
    """A behaviour on pairs that nothing was chosen on, by way of choosing.

    Attributes:
        name: of the behaviour.
        label: of its task.
        counts: what an answer that counts is: "right", "as before", or "same" on both images; "" where there
            are no answers.
        pairs: their names.
        groups: of each pair; () where there are none.
        chosen_on: the number of other pairs that nodes were chosen on.
        effect: metric of the clean image minus that of the corrupt one, or the metric, `(method, pair)`.
        answers: whether each counts, `(method, pair)`; None where there are none.
    """

    name: str
    label: str
    counts: str
    pairs: tuple[str, ...]
    groups: tuple[str, ...]
    chosen_on: int
    effect: Float[NDArray[np.float64], "method pair"]
    answers: Bool[NDArray[np.bool_], "method pair"] | None

    along: ClassVar[str] = "pairs:pair"

    def _check(self) -> None:
        if self.counts not in ("", *SAID) or (self.answers is None) == bool(self.counts):
            raise OptionError(f"there is no such count of answers: {self.counts!r}")
        if self.groups and len(self.groups) != len(self.pairs):
            raise OptionError(f"{len(self.groups)} groups for {counted(len(self.pairs), 'pair')}")

    def left(self, row: int) -> Estimate | None:
        """The share of the effect that is left; None where there was none to speak of."""
        try:
            return ratio_interval(self.effect[row], self.effect[0])
        except DataError:
            return None

    def share(self, row: int) -> Estimate | None:
        """The share of answers that count, with its exact interval."""
        return None if self.answers is None else share_interval(self.answers[row])

    def fall(self, row: int) -> Estimate | None:
        """By how much that share has fallen, image by image."""
        return None if self.answers is None else changed_share(self.answers[row], self.answers[0])

    def worst(self, row: int) -> tuple[str, Estimate] | None:
        """The group with the smallest share of answers that count, and that share."""
        if self.answers is None or not self.groups:
            return None
        own, answers = np.array(self.groups), self.answers[row]
        shares = {name: share_interval(answers[own == name]) for name in dict.fromkeys(self.groups)}
        name = min(shares, key=lambda each: shares[each].value)
        return name, shares[name]

    def figures(self, row: int) -> dict[str, Estimate | None]:
        """Its figures by name: of the unwanted behaviour what is left of it."""
        worst = self.worst(row)
        first = "effect left" if self.counts == "same" else "effect"
        found = {first: self.left(row) if self.counts == "same" else mean_interval(self.effect[row])}
        if self.answers is not None:
            found[SAID[self.counts]] = self.share(row)
        return found | ({} if worst is None else {"worst group": worst[1]})


@dataclass(frozen=True, eq=False, repr=False)
class Mended(Result):
    """What was removed, and the table of methods.

    Attributes:
        name: of the model that was mended.
        weights: its hash, as constants are of these weights alone.
        method: whose choice `model` and `to_module` are.
        rows: the model as it is, then one for each way of choosing.
        behaviours: the one to be removed, then those to be kept, on held-out pairs.
        max_loss: by how much right answers of a behaviour to be kept might fall, where it was chosen.
        constant: what is removed becomes its "mean" or "zero".
        caveats: what to bear in mind.
    """

    name: str
    weights: str
    method: str
    rows: tuple[Row, ...]
    behaviours: tuple[Behaviour, ...]
    max_loss: float
    constant: str
    caveats: tuple[str, ...]

    _given: ClassVar[Model | None] = None

    def _check(self) -> None:
        names = self.methods
        if names[:1] != (BEFORE,) or len(set(names)) < len(names) or self.method not in names[1:]:
            raise OptionError(f"the rows are {BEFORE!r} and others, each once, among them {self.method!r}")
        if not self.behaviours or any(len(each.effect) != len(names) for each in self.behaviours):
            raise OptionError("every behaviour is measured once for each row")

    def records(self) -> Iterator[Record]:
        """One row for each `method`, `behaviour` and `figure`: how many nodes are `removed`, whether it
        `folds`, `value` with the ends of its interval, the worst `group` where it is one's, and by how much
        the share of answers has fallen (`fall`)."""
        for at, row in enumerate(self.rows):
            for each in self.behaviours:
                worst = each.worst(at)
                for figure, estimate in each.figures(at).items():
                    fall = each.fall(at) if figure in SAID.values() else None
                    yield {
                        "method": row.method, "removed": len(row.removed), "folds": row.folds,
                        "behaviour": each.name, "figure": figure, **estimated("value", estimate),
                        "group": worst[0] if worst is not None and figure == "worst group" else None,
                        **estimated("fall", fall),
                    }  # fmt: skip

    # -- the choice ----------------------------------------------------------------------------------

    @property
    def methods(self) -> tuple[str, ...]:
        """The rows' names."""
        return tuple(row.method for row in self.rows)

    def row(self, method: str) -> Row:
        """What a way of choosing chose.

        Raises:
            NameNotFoundError: if there is no such.
        """
        return self.rows[self._place(method)]

    @property
    def chosen(self) -> tuple[str, ...]:
        """The sites that are removed, by the method whose choice this is."""
        return self.row(self.method).removed

    def edits(self, method: str = "") -> dict[str, torch.Tensor]:
        """A choice as an edit: `model.edit(found.edits())`.

        Raises:
            NameNotFoundError: if there is no such method.
            OptionError: if what it removes is no constant.
        """
        row = self.row(method or self.method)
        if row.removed and not row.constants:
            raise OptionError(f"what {row.method} removes depends on the image: it is no edit by constants")
        return {site: torch.from_numpy(row.constants[site]) for site in row.removed}

    def applied(self, model: Model, method: str = "") -> Model:
        """A model without what was removed; the one that is given stays as it is.

        Raises:
            OptionError: if its weights are others: constants are means of what these nodes write.
        """
        if model.weights_hash != self.weights:
            raise OptionError(
                f"{model.name} has other weights than {self.name}, for which this was chosen: mend it anew"
            )
        edits = self.edits(method)
        return model.edit(edits) if edits else model

    @property
    def model(self) -> Model:
        """The mended model, one like any other.

        Raises:
            OptionError: if this was read from a file, which holds no model.
        """
        if self._given is None:
            raise OptionError("a file holds no model: found.applied(model) mends the one that it was made of")
        return self.applied(self._given)

    def to_module(self, *, shrink: bool = False) -> nn.Module:
        """The mended model as a plain `torch.nn.Module`, what is removed being folded into its weights.

        Args:
            shrink: whether to make it smaller where nothing is left of heads and neurons.

        Raises:
            UnsupportedModelError: if what is removed folds into no weights.
        """
        return self.model.to_module(shrink=shrink)

    # -- who does best -------------------------------------------------------------------------------

    @property
    def best(self) -> str:
        """The row that does most, of those that cost no more than `max_loss` on held-out pairs.

        That is the highest accuracy of a worst group, of the first behaviour that has groups; where none has,
        and among equals, the least that is left of the effect. The first of those that are equal in both.
        """
        rows = [row for row in range(len(self.rows)) if self.cost(row) <= self.max_loss + 1e-12]
        return self.rows[max(rows, key=self._merit)].method

    def cost(self, row: int) -> float:
        """The largest fall of the share of answers, of all behaviours to be kept; 0 where none has fallen."""
        falls = [each.fall(row) for each in self.behaviours[1:]]
        return max([0.0, *(fall.value for fall in falls if fall is not None)])

    def _merit(self, row: int) -> tuple[float, float]:
        worst = [found[1].value for each in self.behaviours[1:] if (found := each.worst(row)) is not None]
        return max(worst[:1], default=0.0), -float(abs(self.behaviours[0].effect[row].mean()))

    # -- to be read ----------------------------------------------------------------------------------

    def table(self) -> str:
        """All rows: what is removed and, on held-out pairs with 95 % intervals, what is left and lost.

        Rows drawn at random are one, from the least to the greatest.
        """
        head = ["", "removed", *(f"{each.name}: {name}" for each, name in self._columns())]
        lines = [head]
        for at, row in enumerate(self.rows):
            if not row.method.startswith(DRAWN):
                lines.append([row.method, row.size, *(self._told(at, *column) for column in self._columns())])
        drawn = [at for at, row in enumerate(self.rows) if row.method.startswith(DRAWN)]
        if drawn:
            size = self.rows[drawn[0]].size
            cells = [self._range(drawn, *column) for column in self._columns()]
            lines.append([f"{DRAWN}, {counted(len(drawn), 'draw')}", size, *cells])
        wide = [max(len(line[column]) for line in lines) for column in range(len(head))]
        told = [
            "  ".join(f"{text:<{width}}" for text, width in zip(line, wide, strict=True)).rstrip()
            for line in lines
        ]
        return "\n".join([*told, "", self._verdict()])

    def figure(self) -> Picture:
        """Bars of the table, a panel for each figure, with intervals; dotted the model as it is."""
        from circuitvit.views import canvas

        columns = [column for column in self._columns() if column[1] != "effect"]
        with canvas.styled():
            title = f"{self.name}, mended: {self.behaviours[0].name}"
            figure = canvas.blank(1.6 + 2.1 * len(columns), 1.3 + 0.2 * len(self.rows), title)
            places = range(len(self.rows))
            for axis, (each, name) in zip(
                canvas.panels(figure, len(columns), len(columns)), columns, strict=True
            ):
                for at, row in enumerate(self.rows):
                    estimate = each.figures(at)[name]
                    if estimate is None:
                        continue
                    chosen = row.method == self.method
                    colour = canvas.PALETTE[0] if chosen else FAINT if at == 0 else MUTED
                    axis.barh(at, estimate.value, 0.7, color=colour, alpha=1 if chosen or at == 0 else 0.7)
                    if estimate.low is not None and estimate.high is not None:
                        axis.plot([estimate.low, estimate.high], [at, at], color="black", linewidth=0.9)
                    if at == 0:
                        axis.axvline(estimate.value, color=MUTED, linewidth=0.7, linestyle=":")
                axis.set_yticks(places, [row.method for row in self.rows] if axis is figure.axes[0] else [])
                axis.invert_yaxis()
                axis.set_xlabel(f"{canvas.label(each.name, 24)}\n{name}")
                axis.set_xlim(right=1.02 if name != "effect left" else None)
        return figure

    def __repr__(self) -> str:
        return f"Mended({self.name}: {self._verdict()})"

    def _columns(self) -> list[tuple[Behaviour, str]]:
        """Behaviours and the names of their figures; a metric's mean only where there is nothing else."""
        found = []
        for each in self.behaviours:
            names = list(each.figures(0))
            found += [(each, name) for name in names if name != "effect" or len(names) == 1]
        return found

    def _told(self, row: int, each: Behaviour, name: str) -> str:
        estimate, worst = each.figures(row)[name], each.worst(row)
        if estimate is None:
            return "?"
        if name == "effect":
            return str(estimate)
        group = f" {worst[0]}" if worst is not None and name == "worst group" else ""
        return percent(estimate, 1) + group

    def _range(self, rows: list[int], each: Behaviour, name: str) -> str:
        values = [found.value for row in rows if (found := each.figures(row)[name]) is not None]
        if not values:
            return "?"
        low, high = min(values), max(values)
        return f"{low:.3f} to {high:.3f}" if name == "effect" else f"{100 * low:.1f} to {100 * high:.1f} %"

    def _verdict(self) -> str:
        """What came of it, in a sentence or two."""
        at, row = self._place(self.method), self.row(self.method)
        if not row.removed:
            said = f"{self.method[:1].upper()}{self.method[1:]} removes nothing"
        else:
            left = self.behaviours[0].left(at)
            said = (
                f"Without {row.size} {percent(Estimate(left.value))} of {self.behaviours[0].name} is left"
                if left
                else (f"{row.size} removed")
            )
            for each in self.behaviours[1:]:
                before, after = each.worst(0), each.worst(at)
                if before is not None and after is not None:
                    told = f"{100 * before[1].value:.0f} to {percent(Estimate(after[1].value))}"
                    said += f", the worst group of {each.name} goes from {told}"
            said += f", at a cost of {100 * self.cost(at):.1f} points"
        if self.best == BEFORE:
            return f"{said}. No row does better than the model as it is."
        if self.best == self.method:
            return f"{said}. No other row does better."
        return f"{said}. {self.best} does better."

    def _place(self, method: str) -> int:
        if method not in self.methods:
            raise unknown_name("method", method, self.methods)
        return self.methods.index(method)

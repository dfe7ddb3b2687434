"""Why an image was misread: what turns the answer, what it looks at, and whether it can be spared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from circuitvit.errors import OptionError, counted
from circuitvit.graph.results import Record, ToldResult
from circuitvit.models import Model
from circuitvit.verification.statistics import Estimate, share_interval
from circuitvit.views.misread_words import findings, lines
from circuitvit.views.subjects import Subjects

if TYPE_CHECKING:
    from circuitvit.views.canvas import Picture


@dataclass(frozen=True)
class Counterfactual:
    """A rightly read image, and what of it turns the answer on the misread one.

    Attributes:
        image: its name.
        similarity: cosine of what the two answers are read from, less the mean of all images, from -1 to 1.
        margin: of its own run.
        nodes: that flip the answer together when they are patched from it, none of which can be spared; those
            first that do most alone. Empty where no beginning of the ranking flips it.
        patched: the margin with these patched; None without any.
        answer: what the model then sees; "" without any.
        tried: how many nodes the shortest beginning of the ranking had that flips it; 0 where none does.
        by_chance: the share of random sets of as many nodes that flip it as well; None without any.
    """

    image: str
    similarity: float
    margin: float
    nodes: tuple[str, ...]
    patched: float | None
    answer: str
    tried: int
    by_chance: float | None


@dataclass(frozen=True)
class Suppressed:
    """The misread image with some nodes suppressed: what they write made the same for all images.

    Attributes:
        of: "shared", or the counterfactual that the nodes flip the answer with.
        nodes: that are suppressed.
        margin: with them suppressed.
        answer: what the model then sees.
        by_chance: the share of random sets of as many nodes that repair the image as well; None where that
            was not asked.
    """

    of: str
    nodes: tuple[str, ...]
    margin: float
    answer: str
    by_chance: float | None = None

    @property
    def repairs(self) -> bool:
        """Whether the image is read rightly."""
        return self.margin > 0


@dataclass(frozen=True, eq=False, repr=False)
class Why(ToldResult):
    """Why an image was misread.

    The *margin* is the largest logit of the label's classes minus the largest of all others: above 0 where
    the answer is right.

    Attributes:
        model: its name.
        label: the right class, or classes, in short.
        answer: the class that the model sees.
        margin: of the image.
        tokens: at which outputs are patched: "cls" where the answer is read from the class token, or "all".
        nodes: all heads and MLPs.
        alone: change of the margin with each node alone patched from each counterfactual; NaN where that was
            not run.
        counterfactuals: the nearest first.
        suppressed: the set of `chosen` first, then those of single counterfactuals that differ from it.
        constants: what each suppressed node becomes, by what is edited.
        held_out: names of the images that nothing was chosen on, without the misread one.
        right_before: which of them are read rightly.
        right_after: the same with each set suppressed.
        subjects: the misread image, and the counterfactuals.
        looking: the nodes that there is a map of.
        maps: what they look at, by patch as it lies on paper: of heads the attention of the class token, or
            the mean of all queries; of MLPs how much they write.
        caveats: what to bear in mind.
    """

    model: str
    label: str
    answer: str
    margin: float
    tokens: str
    nodes: tuple[str, ...]
    alone: Float[NDArray[np.float64], "counterfactual node"]
    counterfactuals: tuple[Counterfactual, ...]
    suppressed: tuple[Suppressed, ...]
    constants: Mapping[str, Float[NDArray[np.float32], " _width"]]
    held_out: tuple[str, ...]
    right_before: Bool[NDArray[np.bool_], " held_out"]
    right_after: Bool[NDArray[np.bool_], "suppressed held_out"]
    subjects: Subjects
    looking: tuple[str, ...]
    maps: Float[NDArray[np.float32], "looking image patch_row patch_column"]
    caveats: tuple[str, ...]

    along = (
        "nodes:node counterfactuals:counterfactual suppressed:suppressed held_out:held_out subjects:image "
        "looking:looking"
    )
    may_be_nan = "alone"

    def records(self) -> Iterator[Record]:
        """One row for each `counterfactual` and `node`: the change of the margin with it `alone` patched
        (None where that was not run), whether it `flips` the answer alone, whether it is in the `set` that
        flips it, and whether it is `chosen` for all of them."""
        for row, counterfactual in enumerate(self.counterfactuals):
            for node, value in zip(self.nodes, self.alone[row].tolist(), strict=True):
                known = not np.isnan(value)
                yield {
                    "counterfactual": counterfactual.image,
                    "node": node,
                    "alone": value if known else None,
                    "flips": self.margin + value > 0 if known else None,
                    "set": node in counterfactual.nodes,
                    "chosen": node in self.chosen,
                }

    @property
    def image(self) -> str:
        """The name of the misread image."""
        return self.subjects.names[0]

    @property
    def shared(self) -> tuple[str, ...]:
        """The nodes in the sets of more than half of the counterfactuals, those of most first."""
        sets = [each.nodes for each in self.counterfactuals]
        found = {node: sum(node in nodes for nodes in sets) for nodes in sets for node in nodes}
        often = [node for node, count in found.items() if 2 * count > len(sets)]
        return tuple(sorted(often, key=lambda node: -found[node]))

    @property
    def chosen(self) -> tuple[str, ...]:
        """The nodes that are shared, or else those of the nearest counterfactual that have any."""
        return self.shared or next((each.nodes for each in self.counterfactuals if each.nodes), ())

    def kept(self, number: int = 0) -> Estimate:
        """Of the held-out images that are right, the share that still is with a set suppressed.

        Raises:
            OptionError: if there is no such set, or no held-out image is right.
        """
        return self._share(number, self.right_before, "right")

    def gained(self, number: int = 0) -> Estimate:
        """Of the held-out images that are misread as well, the share that is right with a set suppressed.

        Raises:
            OptionError: if there is no such set, or no held-out image is misread.
        """
        return self._share(number, ~self.right_before, "misread")

    def _share(self, number: int, among: NDArray[np.bool_], what: str) -> Estimate:
        if not 0 <= number < len(self.suppressed):
            raise OptionError(f"there is no set {number}: {counted(len(self.suppressed), 'set')} from 0")
        if not among.any():
            raise OptionError(f"no held-out image is {what}")
        return share_interval(self.right_after[number][among])

    def edits(self, number: int = 0) -> dict[str, Tensor]:
        """A suppressed set as an edit: `model.edit(found.edits())`.

        Raises:
            OptionError: if there is no such set.
        """
        if not 0 <= number < len(self.suppressed):
            raise OptionError(f"there is no set {number}: {counted(len(self.suppressed), 'set')} from 0")
        nodes = self.suppressed[number].nodes
        own = ((site, node) for node in nodes for site in (f"{node}.z", node) if site in self.constants)
        return {site: torch.from_numpy(np.array(self.constants[site])) for site, _ in own}

    def repaired(self, model: Model, number: int = 0) -> Model:
        """A model with a set suppressed; the one that is given stays as it is.

        Raises:
            OptionError: if there is no such set.
            NameNotFoundError: if the model has no such nodes.
        """
        return model.edit(self.edits(number))

    def __str__(self) -> str:
        return " ".join(findings(self))

    def __repr__(self) -> str:
        return f"Why({self})"

    def figure(self) -> Picture:
        """A row for each image, the misread one first: the picture, and what the nodes look at.

        Of the nodes those that are chosen come first; at most six are shown.
        """
        from circuitvit.views.misread_page import figure_of

        return figure_of(self)

    def save(self, path: str | Path) -> Path:
        """Write the finding: `.html` a page that needs no other file, `.md` a text, or as every result.

        Raises:
            OptionError: for another ending.
            FileError: if the file cannot be written.
        """
        path = Path(path)
        if path.suffix == ".html":
            from circuitvit.export.plain_page import write_page
            from circuitvit.views.misread_page import page_of

            return write_page(path, page_of(self))
        return super().save(path)

    def _lines(self) -> Iterator[str]:
        return lines(self)

    def _check(self) -> None:
        known = {*self.nodes}
        for nodes in (*(each.nodes for each in self.counterfactuals), *(e.nodes for e in self.suppressed)):
            if missing := [node for node in nodes if node not in known]:
                raise OptionError(f"{missing[0]!r} is none of the nodes")

"""Top images: which images, or which patches of all of them, a node, neuron or direction answers to most.

One run over the images keeps one number for each image, and of patches the extreme ones and a sample, so that
a folder may have any size; a second run over what was picked fetches its maps. Beside the
top stand the bottom, quantiles and a random draw, because extremes alone make any unit look as if it meant
one thing (Bolukbasi et al. 2021, "An Interpretability Illusion for BERT", arXiv:2104.07143).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

import numpy as np
from jaxtyping import Int64
from numpy.typing import NDArray
from torch import Tensor

from circuitvit._keywords import running
from circuitvit.engine import activation_batches
from circuitvit.errors import DataError, OptionError, check_number, check_whole, unknown_name
from circuitvit.export.examples import Example, lit
from circuitvit.graph.files import write_bytes
from circuitvit.graph.results import Record, Result
from circuitvit.models import Model
from circuitvit.models.sites import LOOKS, kinds_at
from circuitvit.models.tokens import PATCH
from circuitvit.tasks import TokenGroups
from circuitvit.tasks.images import Images, as_images
from circuitvit.tasks.split import SomeImages
from circuitvit.tasks.task import check_size
from circuitvit.views.ranking import Picks, Ranking, Row, Tally
from circuitvit.views.subjects import ImageSpec, Subjects, subjects_of
from circuitvit.views.units import Unit, UnitSpecs, units_of

if TYPE_CHECKING:
    from circuitvit.views.canvas import Picture

By = Literal["image", "patch"]
Reduce = Literal["max", "mean", "cls"]
Overlay = Literal["activation", "attention"]


class Running(TypedDict):
    """How images are run."""

    batch_size: int | None
    progress: bool


MOST_LINES = 20
"""Units that a short form has a line for."""

ROWS: tuple[Row, ...] = ("top", 0.5, "bottom", "random")


@dataclass(frozen=True, eq=False, repr=False)
class TopImages(Mapping[str, Ranking], Result):
    """Rankings by the names of their units.

    Attributes:
        model: its name.
        images: names of all images.
        by: "image" or "patch".
        reduce: how the tokens of an image become its value.
        rankings: by unit.
        shown: places of the images that were picked, `(shown,)`, rising.
        subjects: those images, with their pictures.
    """

    model: str
    images: tuple[str, ...]
    by: By
    reduce: Reduce
    rankings: Mapping[str, Ranking]
    shown: Int64[NDArray[np.int64], " shown"]
    subjects: Subjects

    along = "subjects:shown"

    def records(self) -> Iterator[Record]:
        """One row for each pick: the `unit`, the `row` ("top", "bottom", "random" or a quantile), its `rank`
        in it from 0, the `image`, the `token` that the value is of (None of several), and the `value`."""
        for unit, ranking in self.rankings.items():
            for row, picks in ranking.rows.items():
                for rank in range(len(picks)):
                    token = int(picks.tokens[rank])
                    yield {
                        "unit": unit,
                        "row": str(row),
                        "rank": rank,
                        "image": self.images[picks.images[rank]],
                        "token": None if token < 0 else self.subjects.token_name(token),
                        "value": float(picks.values[rank]),
                    }

    def _check(self) -> None:
        for unit, ranking in self.rankings.items():
            picks = list(ranking.rows.values())
            tokens = np.concatenate([np.empty(0, int), *(each.tokens for each in picks)])
            places = np.concatenate([np.empty(0, int), *(each.images for each in picks)])
            if not (np.isin(places, self.shown).all() and (tokens < len(self.subjects.kinds)).all()):
                raise OptionError(f"the picks of {unit!r} are none of the images, or none of their tokens")
        if ((self.shown < 0) | (self.shown >= len(self.images))).any():
            raise OptionError(f"there are {len(self.images)} images, and others are shown")

    def __getitem__(self, unit: str) -> Ranking:
        if unit not in self.rankings:
            raise unknown_name("unit", unit, tuple(self.rankings))
        return self.rankings[unit]

    def __iter__(self) -> Iterator[str]:
        return iter(self.rankings)

    def __len__(self) -> int:
        return len(self.rankings)

    @cached_property
    def _place(self) -> dict[int, int]:
        return {int(image): place for place, image in enumerate(self.shown)}

    def picture(self, image: int) -> NDArray[np.uint8]:
        """An image that was picked, `(height, width, 3)`, by its place among all."""
        picture: NDArray[np.uint8] = self.subjects.pictures[self._place[image]]
        return picture

    def names(self, unit: str, row: Row = "top") -> list[str]:
        """What was picked in a row: names of images, and by patch also of the patch.

        Raises:
            NameNotFoundError: if there is no such unit or row.
        """
        picks = self.picks(unit, row)
        return [self.label(picks, place) for place in range(len(picks))]

    def picks(self, unit: str, row: Row = "top") -> Picks:
        """What was picked in a row.

        Raises:
            NameNotFoundError: if there is no such unit or row.
        """
        rows = self[unit].rows
        if row not in rows:
            raise unknown_name("row", row, [str(each) for each in rows])
        return rows[row]

    def label(self, picks: Picks, place: int) -> str:
        """What to call one pick."""
        name, token = self.images[picks.images[place]], int(picks.tokens[place])
        return f"{name}, {self.subjects.token_name(token)}" if self.by == "patch" else name

    def examples(self, count: int) -> dict[str, list[Example]]:
        """The top of each unit for a circuit's page, `circuit.draw("circuit.html", examples=found)`."""
        found = {}
        for unit, ranking in self.rankings.items():
            picks = ranking.rows.get("top")
            if picks is not None:
                found[unit] = [self._example(picks, place) for place in range(min(count, len(picks)))]
        return found

    def _example(self, picks: Picks, place: int) -> Example:
        maps = None if picks.maps is None else self.subjects.sheet.lay(picks.maps[place])
        said = f"{self.label(picks, place)}: {float(picks.values[place]):.3g}"
        return Example(lit(self.picture(int(picks.images[place])), maps), said)

    def to_html(self, path: str | Path | None = None) -> str:
        """A contact sheet: one page without scripts, which needs no other file; also written if a path is
        given.

        Maps lie over the images and can be taken off. The value of a picked patch is framed; by patch the
        page shows its surroundings.

        Raises:
            FileError: if it cannot be written.
        """
        from circuitvit.views.top_page import as_page

        page = as_page(self)
        if path is not None:
            write_bytes(path, page.encode())
        return page

    def figure(self, unit: str | None = None, *, picture: bool = True, most: int = 8) -> Picture:
        """A contact sheet: all rows of one unit, or the top of every unit.

        Args:
            unit: which; by default all, or the only one.
            picture: whether the images lie behind the maps.
            most: columns.

        Raises:
            NameNotFoundError: if there is no such unit.
        """
        from circuitvit.views.top_page import as_figure

        return as_figure(self, unit, picture, most)

    def __repr__(self) -> str:
        what = f"by {self.by}" if self.by == "patch" else f"by image, {self.reduce}"
        lines = [f"  {ranking!r}" for ranking in islice(self.rankings.values(), MOST_LINES)]
        lines += [f"  ... {len(self) - MOST_LINES} more"] if len(self) > MOST_LINES else []
        return "\n".join([f"TopImages of {self.model}, {what}, {len(self.images)} images", *lines])


@running
def top_images(
    model: Model,
    images: ImageSpec,
    units: UnitSpecs,
    *,
    by: By = "image",
    reduce: Reduce = "max",
    count: int = 12,
    rows: Sequence[Row] = ROWS,
    overlay: Overlay = "activation",
    masks: Mapping[str, Tensor] | None = None,
    top_share: float = 0.01,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> TopImages:
    """The images, or patches, with the largest, smallest and other values of units, all in one run.

    Args:
        model: from `load` or `wrap`, edited or not.
        images: a folder of any size, files, or a preprocessed tensor.
        units: see `circuitvit.views.units`: `"a5.h2"`, `"m3.hidden[17]"`, `"a5.h2.pattern"`,
            `("resid5", direction)`; several in a list, or by names of one's own in a mapping.
        by: what is ranked: images, or the patches of all images.
        reduce: the value of an image: the largest or the mean over its patches, or that of the class token.
            Tokens after an @ take the place of the patches.
        count: picks in each row.
        rows: what is picked: "top", "bottom", "random", and quantiles such as 0.9 (picks around it; of
            more than 100,000 patches from a sample).
        overlay: what lies over the images: the unit's own values, or the attention of its head: where the
            token looks that the value is of, or all tokens in the mean.
        masks: True on objects, `(image, height, width)` in the model's input size, see
            `circuitvit.tasks.TokenGroups.from_masks` and `circuitvit.tasks.corruptions.read_mask`: how much
            more often the top patches lie on them than patches in general.
        top_share: share of all patches that are the top ones for `masks`.
        seed: of the random draw.
        batch_size: images at once; 32 by default.
        progress: whether to show a bar.

    Raises:
        NameNotFoundError: for an unknown unit, with the nearest, or an unknown choice.
        OptionError: for units, tokens or rows that do not fit.
        DataError: for images or masks that cannot be used.
        ModelError: if an activation is NaN or infinite.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> images = catdog_pairs(20, seed=0).clean
        >>> found = top_images(cv.load("catdog-tiny"), images, ["a2.h3", "m0.hidden[3]"], count=3)
        >>> found.names("m0.hidden[3]"), found["a2.h3"].values.shape
        (['image 5', 'image 15', 'image 18'], (20,))
    """
    _check(by, reduce, count, rows, overlay, top_share)
    model.refresh()
    found = as_images(images, model.preprocessing)
    check_size(found, model)
    grid, tokens = model.grid_at(*found.shape[-2:]), model.tokens_at(*found.shape[-2:])
    chosen = units_of(model, units, tokens, reduce)
    for unit in chosen:
        _refuse(unit, by, masks is not None)
    looked = _patterns(model, chosen, tokens) if overlay == "attention" else {}
    groups = None if masks is None else TokenGroups.from_masks(model, masks)
    if groups is not None and groups.members.ndim == 2 and len(groups.members) != len(found):
        raise DataError(f"masks of {len(groups.members)} images for {len(found)}: one for each, in order")
    found.check(progress)
    size = len(found), prod(grid)
    best = max(1, round(top_share * prod(size)))
    tallies = {unit: Tally(unit, size, by == "patch", reduce == "mean", count, best, seed) for unit in chosen}
    how: Running = {"batch_size": batch_size, "progress": progress}
    asked = list(dict.fromkeys(unit.asked for unit in chosen))
    for first, read in activation_batches(model, found, asked, **how):
        for unit, tally in tallies.items():
            tally.add(unit.by_token(read[unit.asked]).numpy(), first)
    picked = {unit: tally.picked(rows) for unit, tally in tallies.items()}
    shown = np.unique(np.concatenate([picks.images for each in picked.values() for picks in each.values()]))
    with_maps = _with_maps(model, found, shown, picked, looked, how)
    rankings = {
        unit.name: tally.ranking(with_maps[unit.name], groups, looked.get(unit.name, _own_overlay(unit)))
        for unit, tally in tallies.items()
    }
    subjects = subjects_of(model.bare or model, SomeImages(found, tuple(shown.tolist())))
    return TopImages(model.name, found.names, by, reduce, rankings, shown, subjects)


# -- what can be asked ---------------------------------------------------------------------------


def _check(by: str, reduce: str, count: int, rows: Sequence[Row], overlay: str, top_share: float) -> None:
    for kind, value, known in (
        ("way to rank", by, ("image", "patch")),
        ("way to reduce", reduce, ("max", "mean", "cls")),
        ("overlay", overlay, ("activation", "attention")),
    ):
        if value not in known:
            raise unknown_name(kind, value, known)
    check_whole("the number of picks (count)", count)
    check_number("the share of top patches (top_share)", top_share, 0, 1)
    if not rows or isinstance(rows, str):
        raise OptionError("rows are a list of 'top', 'bottom', 'random' and quantiles such as 0.9")
    for row in rows:
        if isinstance(row, str) and row not in ("top", "bottom", "random"):
            raise unknown_name("row", row, ("top", "bottom", "random"))
        if not isinstance(row, str) and not 0 <= row <= 1:
            raise OptionError(f"a quantile lies between 0 and 1, not at {row}")


def _refuse(unit: Unit, by: str, masked: bool) -> None:
    if not unit.has_patches and (by == "patch" or masked):
        raise OptionError(f"{unit.name} has no value at patches: it can be ranked by image alone")
    if by == "patch" and unit.is_told:
        raise OptionError(f"{unit.name}: by='patch' ranks all patches, so name no tokens after the @")


def _patterns(model: Model, units: Sequence[Unit], tokens: int) -> dict[str, str]:
    """The names of the patterns of the units' heads, by unit; none for units that are attention themselves.

    Raises:
        OptionError: if one has none that lies over patches.
    """
    found = {}
    for unit in units:
        name = f"{unit.site.node}.pattern"
        own = next((site for site in model.all_sites if site.name == name), None)
        if own is None or PATCH not in kinds_at(model, own, tokens)[1]:
            raise OptionError(f"{unit.name} has no attention to lay over images: use overlay='activation'")
        if unit.site.kind not in LOOKS:
            found[unit.name] = name
    return found


def _own_overlay(unit: Unit) -> str:
    return unit.asked if unit.site.kind == "pattern" else "activation"


# -- a second run over what was picked -----------------------------------------------------------


def _with_maps(
    model: Model,
    images: Images,
    shown: NDArray[np.int64],
    picked: Mapping[Unit, Mapping[Row, Picks]],
    looked: Mapping[str, str],
    how: Running,
) -> dict[str, dict[Row, Picks]]:
    """The picks of each unit with what lies over their images."""
    grid = model.grid_at(*images.shape[-2:])
    sources = {unit: looked.get(unit.name, unit.asked) for unit in picked}
    sources = {unit: name for unit, name in sources.items() if unit.has_patches or unit.name in looked}
    maps = {
        unit: {row: np.zeros((len(picks), *grid), dtype=np.float32) for row, picks in picked[unit].items()}
        for unit in sources
    }
    # Edits that were made for all images want all of them.
    rows = np.arange(len(images)) if any(change.images for change in model.edits) else shown
    some, names = SomeImages(images, tuple(rows.tolist())), list(dict.fromkeys(sources.values()))
    for first, read in activation_batches(model, some, names, **how) if names else ():
        for unit, name in sources.items():
            values = read[name].float() if unit.name in looked else unit.by_token(read[name])
            for row, picks in picked[unit].items():
                places = np.searchsorted(rows, picks.images) - first
                for pick in np.flatnonzero((places >= 0) & (places < len(values))):
                    own, token = values[places[pick]], int(picks.tokens[pick])
                    if unit.name in looked:  # a pattern `(query, key)`
                        own = own.mean(dim=0) if token < 0 else own[token]
                    maps[unit][row][pick] = own[-prod(grid) :].reshape(grid).numpy()
    found: dict[str, dict[Row, Picks]] = {unit.name: dict(own) for unit, own in picked.items()}
    for unit, own_maps in maps.items():
        for row, picks in picked[unit].items():
            tokens = picks.tokens if unit.has_patches else np.full_like(picks.tokens, -1)
            found[unit.name][row] = replace(picks, tokens=tokens, maps=own_maps[row])
    return found

"""Heads that look at places, not at content: found by a statistic, and named by another.

Both speak of patch queries alone, and of all tokens as keys.

**Is it position?** Let `A[i, q, k]` be a head's pattern on image `i`, and `mean[q, k]` its mean over `n`
images. Of all the ways in which `A` differs from looking everywhere alike (`1/T` for `T` tokens), what share
is the same in every image:

    position share = 1 - sum (A - mean)^2 / (n - 1) / [ sum (A - 1/T)^2 / n ]

1 for a head that does not see what is in the image, 0 or less for one whose mean pattern says nothing. The
`n - 1` makes up for the mean being fitted to the same images.

**Which position?** Each template (see `templates`, below) is a set `S` of query-key pairs. With `p`
the attention that falls on it and `p0` the share of all pairs that it is, the head tells it apart from chance
by `D(S) = p ln(p / p0) + (1 - p) ln((1 - p) / (1 - p0))` nats. A template that is too large has a larger
`p0`, one that is too small a smaller `p`: the head's name is the template of the largest `D` with
`p > p0`. No template can have more than the whole `KL(mean || 1/T)` of the pattern (data processing), so

    fit = D(name) / KL(mean || uniform)

says how much of what the head prefers its name explains, 0 to 1. A head whose rows stay within `UNIFORM`
nats of looking everywhere is `uniform`, and a name with a fit below `LEAST_FIT` is not given: the head is
`other`.

That Vision Transformers have corner, edge, row and column heads is in Joseph and Nanda 2024, "Laying the
Foundations for Vision and Multimodal Mechanistic Interpretability"; the statistics are this library's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.special import rel_entr

from circuitvit._keywords import running
from circuitvit.engine import capture
from circuitvit.errors import DataError, OptionError
from circuitvit.export.style import MUTED
from circuitvit.graph.results import Record, Result
from circuitvit.models import Model
from circuitvit.models.families.family import Grid
from circuitvit.views.attention import attention_places, attentions
from circuitvit.views.subjects import ImageSpec, Subjects, images_of, subjects_of, watched_batches

if TYPE_CHECKING:
    from circuitvit.views.canvas import Picture

UNIFORM = 0.05
"""Nats by which a pattern may differ from looking everywhere and still be called uniform."""

LEAST_FIT = 0.3
"""Share of a pattern's preferences that its name must explain."""


@dataclass(frozen=True)
class HeadPosition:
    """What position has to do with one head's pattern.

    Attributes:
        head: its name.
        layer: of the model.
        share: of the pattern's variation that is the same in every image; at most 1.
        name: of the best template, "uniform" or "other".
        mass: attention on that template, 0 to 1; for "other" on the template that comes closest.
        chance: what a head that looks everywhere alike would have there.
        fit: share of the mean pattern's preferences that the name explains, 0 to 1.
        closest: the best template, also where it fits too badly to be the name.
    """

    head: str
    layer: int
    share: float
    name: str
    mass: float
    chance: float
    fit: float
    closest: str


@dataclass(frozen=True, eq=False, repr=False)
class PositionHeads(Result):
    """All heads of a model, and how much position explains of each.

    Attributes:
        subjects: the images that were averaged over.
        heads: in running order.
        means: each head's mean pattern over images, `(head, query, key)`, float32.
    """

    subjects: Subjects
    heads: tuple[HeadPosition, ...]
    means: Float[NDArray[np.float32], "head query key"]

    along = "heads:head"

    def records(self) -> Iterator[Record]:
        """One row for each head, with the fields of its `HeadPosition`."""
        return (asdict(head) for head in self.heads)

    def _check(self) -> None:
        self.subjects.check_tokens(self.means.shape[2])

    def only(self, at_least: float = 0.8) -> list[HeadPosition]:
        """The heads whose pattern depends on position alone: share at least this, the largest first."""
        return sorted((head for head in self.heads if head.share >= at_least), key=lambda head: -head.share)

    def __getitem__(self, name: str) -> HeadPosition:
        for head in self.heads:
            if head.head == name:
                return head
        raise KeyError(name)

    def figure(self, *, at_least: float = 0.8, queries: int = 3, most: int = 8) -> Picture:
        """The heads that go by position, a column each: their mean patterns at some marked queries.

        Args:
            at_least: share of the pattern's variation that position must explain.
            queries: how many query patches, spread along the diagonal.
            most: how many heads, the largest shares first.

        Raises:
            OptionError: if no head goes by position that much.
        """
        from circuitvit.views import canvas

        found = self.only(at_least)[:most]
        if not found:
            best = max(head.share for head in self.heads)
            raise OptionError(f"no head goes by position to {at_least:.0%}: the most is {best:.0%}")
        subjects, sheet = self.subjects, self.subjects.sheet
        wide, high = canvas.proportions(sheet, 1.45, 4.6)
        with canvas.styled():
            title = f"Heads that go by position (mean over {len(subjects)} images)"
            figure = canvas.blank(wide * max(len(found), 3) + 0.4, (high - 0.15) * queries + 0.9, title)
            axes = figure.subplots(queries, len(found), squeeze=False)
            for line, part in zip(axes, np.linspace(0.25, 0.75, queries), strict=True):
                place = tuple(round(part * (side - 1)) for side in subjects.grid)
                token = subjects.patch(place)
                line[0].set_ylabel(f"query {place}", color=MUTED)
                for axis, head in zip(line, found, strict=True):
                    cells = subjects.on_sheet(self.means[self.heads.index(head), token])
                    norm = canvas.scale(np.append(cells, 0.0))
                    look: dict[str, Any] = {"cmap": canvas.rising_colours(), "norm": norm}
                    canvas.overlay(axis, cells, None, sheet=sheet, **look)
                    canvas.mark(axis, *sheet.place(token - subjects.n_prefix))
            for axis, head in zip(axes[0], found, strict=True):
                there = f"{head.mass:.0%} of attention there\n{head.share:.0%} position"
                axis.set_title(f"{head.head}: {head.name}\n{there}", fontsize=7)
        return figure

    def __repr__(self) -> str:
        found = self.only()
        named = ", ".join(f"{head.head} {head.name}" for head in found[:4])
        count = f"{len(found)} of {len(self.heads)} heads go by position"
        return f"PositionHeads({count}{': ' if named else ''}{named})"


@running
def position_heads(
    model: Model, images: ImageSpec, *, batch_size: int | None = None, progress: bool = True
) -> PositionHeads:
    """How much of each head's pattern is a matter of position, over several images.

    Use a dozen images or more that have nothing in common; on similar ones content looks like position.
    Memory holds the means and one layer's batch, not the patterns of all images.

    Args:
        model: from `load` or `wrap`.
        images: preprocessed `(image, channel, height, width)`, or paths; at least 2.
        batch_size: images at once; 32 by default.
        progress: whether to show a bar.

    Raises:
        DataError: if there are fewer than 2 images, or they cannot be used.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> view = position_heads(cv.load("catdog-tiny"), catdog_pairs(8, seed=0).clean)
        >>> all(head.share <= 1 for head in view.heads)
        True
    """
    found = images_of(model, images)
    if len(found) < 2:
        raise DataError("what depends on position alone shows only across images: give at least 2")
    places = [place for place in attention_places(model) if not model.stages[place].nodes.begins]
    sums: dict[int, NDArray[np.float64]] = {}
    squares: dict[int, NDArray[np.float64]] = {}
    with torch.no_grad():
        for batch in watched_batches(model, found, batch_size, "attention by position", progress):
            run = capture(model, batch)
            for place in places:
                stream = run.stream(place)
                seen = [stage.pattern(stage.read(stream)) for stage in attentions(model, place)]
                pattern = torch.cat(seen, dim=1).double()
                sums[place] = sums.get(place, 0) + pattern.sum(dim=0).cpu().numpy()
                squares[place] = squares.get(place, 0) + pattern.square().sum(dim=0).cpu().numpy()
    subjects = subjects_of(model, found)
    heads: list[HeadPosition] = []
    means: list[NDArray[np.float32]] = []
    for place in places:
        layer = model.stages[place].nodes.layer
        names = [name for stage in attentions(model, place) for name in stage.nodes.senders]
        mean, mean_square = sums[place] / len(found), squares[place] / len(found)
        for index, name in enumerate(names):
            described = describe(mean[index], mean_square[index], len(found), subjects)
            heads.append(HeadPosition(name, layer, **described))
        means.append(mean.astype(np.float32))
    return PositionHeads(subjects, tuple(heads), np.concatenate(means))


def describe(
    mean: NDArray[np.float64], mean_square: NDArray[np.float64], n_images: int, subjects: Subjects
) -> dict[str, Any]:
    """The statistics of one head (see the top of this module), as the fields of `HeadPosition`.

    Args:
        mean: of the pattern over images, `(query, key)`.
        mean_square: of its square.
        n_images: that were averaged.
        subjects: for the layout of the tokens.
    """
    patches = slice(subjects.n_prefix, None)
    pattern, square = mean[patches], mean_square[patches]
    everywhere = 1.0 / pattern.shape[1]
    within = float(np.clip(square - pattern**2, 0, None).sum()) * n_images / (n_images - 1)
    whole = float((square - 2 * everywhere * pattern + everywhere**2).sum())
    divergence = float(rel_entr(pattern.clip(min=0), everywhere).sum(axis=1).mean())
    # How far single images are from uniform, to second order: KL is half the relative squared difference.
    if whole / (2 * everywhere * len(pattern)) < UNIFORM:
        return {"share": 1.0, "name": "uniform", "mass": 1.0, "chance": 1.0, "fit": 1.0, "closest": "uniform"}
    best, told, mass, chance = "other", 0.0, 0.0, 0.0
    for name, cells in _named(subjects.grid, subjects.kinds):
        inside = cells[patches]
        p, p0 = min(1.0, float(pattern[inside].sum() / len(pattern))), float(inside.mean())
        gained = float(rel_entr(p, p0) + rel_entr(1 - p, 1 - p0)) if p > p0 else 0.0
        if gained > told + 1e-12:
            best, told, mass, chance = name, gained, p, p0
    fit = min(1.0, told / divergence) if divergence > 0 else 0.0
    return {
        "share": 1.0 - within / whole,
        "name": best if fit >= LEAST_FIT else "other",
        "mass": mass,
        "chance": chance,
        "fit": fit,
        "closest": best,
    }


# -- the shapes that attention by position can have ----------------------------------------------

Template = NDArray[np.bool_]
"""For each query the keys that it would look at, `(query, key)` over all tokens; only patches look."""

_STEPS = {(0, 0): "self", (0, -1): "previous", (0, 1): "next", (-1, 0): "above", (1, 0): "below"}
"""Steps that have a name: the patch itself, and its neighbours; previous and next are in reading order."""

_IN_TIME = {-1: ("before", "previous frame"), 1: ("after", "next frame")}
"""Steps in time that have a name: to the same place, and to the whole frame."""

FARTHEST = 3
"""How far, in patches or frames, a fixed step is looked for."""


def templates(grid: Grid, kinds: Sequence[str]) -> dict[str, Template]:
    """All shapes by name.

    | name | keys of a query patch |
    | --- | --- |
    | `self`, `previous`, `next`, `above`, `below` | itself; the patch left, right, above, below of it |
    | `step (r, c)` | the patch `r` rows down and `c` columns right |
    | `neighbours` | the patches at most 1 row and column away, itself included |
    | `row`, `column` | those in its row, its column |
    | `corners`, `corner top left` ... | the four corners of the image, or one of them, for every query |
    | `edges`, `edge top` ... | the outermost patches, or those of one side, for every query |
    | `modulus m` | those whose row and column differ from its own by multiples of `m` |
    | `rows modulus m`, `columns modulus m` | every `m`-th row (column), counted from its own |
    | `cls`, `reg` ... | the tokens before the patches, by kind |

    In clips all of these but places (corners, edges) look at the query's own frame alone, and there are also

    | name | keys of a query patch |
    | --- | --- |
    | `same place` | the patches at its row and column in all frames |
    | `frame` | all patches of its own frame |
    | `previous frame`, `next frame`, `frame step t` | all patches of the frame before, after, `t` later |
    | `before`, `after`, `in t` | the patch at its place in the frame before, after, `t` frames later |
    | `past`, `future` | all patches of all earlier, of all later frames |
    | `first frame`, `last frame` | all patches of the first, the last frame, for every query |

    Args:
        grid: rows and columns of patches; time first where there is time.
        kinds: the kind of each token, patches last.
    """
    return dict(_named(grid, kinds))


def _named(grid: Grid, kinds: Sequence[str]) -> Iterator[tuple[str, Template]]:
    """The shapes one by one: those of a clip would fill the memory."""
    n_prefix = len(kinds) - prod(grid)
    for name, cells in _of_patches(grid) if len(grid) == 2 else _of_clips(grid):
        if cells.any() and not cells.all():
            yield name, np.pad(cells, ((n_prefix, 0), (n_prefix, 0)))
    for kind in dict.fromkeys(kinds[:n_prefix]):
        mask = np.zeros((len(kinds), len(kinds)), dtype=bool)
        mask[n_prefix:, :n_prefix] = np.array([each == kind for each in kinds[:n_prefix]])
        yield kind, mask


def _of_clips(grid: Grid) -> Iterator[tuple[str, Template]]:
    """The shapes of a single frame, each in its own time or at all times, and those along time."""
    frames, *frame = grid
    own, everywhere = np.eye(frames, dtype=bool), np.ones((frames, frames), dtype=bool)
    for name, cells in _of_patches(tuple(frame)):
        yield name, np.kron(everywhere if name.startswith(("corner", "edge")) else own, cells)
    all_patches = np.ones((prod(frame), prod(frame)), dtype=bool)
    same = np.eye(prod(frame), dtype=bool)
    time = np.arange(frames)
    later = time[None, :] - time[:, None]  # (query, key)
    yield "same place", np.kron(everywhere, same)
    yield "frame", np.kron(own, all_patches)
    for step in [*range(-FARTHEST, 0), *range(1, FARTHEST + 1)]:
        place, whole = _IN_TIME.get(step, (f"in {step}", f"frame step {step}"))
        yield place, np.kron(later == step, same)
        yield whole, np.kron(later == step, all_patches)
    yield "past", np.kron(later < 0, all_patches)
    yield "future", np.kron(later > 0, all_patches)
    yield "first frame", np.kron(np.broadcast_to(time == 0, (frames, frames)), all_patches)
    yield "last frame", np.kron(np.broadcast_to(time == frames - 1, (frames, frames)), all_patches)


def _of_patches(grid: Grid) -> Iterator[tuple[str, Template]]:
    row, column = (each.ravel() for each in np.indices(grid))
    down, right = row[None, :] - row[:, None], column[None, :] - column[:, None]  # (query, key)
    for rows in range(-FARTHEST, FARTHEST + 1):
        for columns in range(-FARTHEST, FARTHEST + 1):
            named = _STEPS.get((rows, columns), f"step ({rows}, {columns})")
            yield named, (down == rows) & (right == columns)
    yield "neighbours", (abs(down) <= 1) & (abs(right) <= 1)
    yield "row", down == 0
    yield "column", right == 0
    yield from _places(grid, row, column)
    for modulus in range(2, 1 + max(grid) // 2):
        rows_, columns_ = down % modulus == 0, right % modulus == 0
        yield f"modulus {modulus}", rows_ & columns_
        yield f"rows modulus {modulus}", rows_
        yield f"columns modulus {modulus}", columns_


def _places(grid: Grid, row: NDArray[np.int64], column: NDArray[np.int64]) -> Iterator[tuple[str, Template]]:
    """Templates of keys that are the same for every query."""
    sides = {
        "top": row == 0, "bottom": row == grid[0] - 1, "left": column == 0, "right": column == grid[1] - 1,
    }  # fmt: skip
    queries = np.ones((len(row), 1), dtype=bool)
    vertical, horizontal = sides["top"] | sides["bottom"], sides["left"] | sides["right"]
    yield "corners", queries & (vertical & horizontal)
    yield "edges", queries & (vertical | horizontal)
    for name, cells in sides.items():
        yield f"edge {name}", queries & cells
    for up in ("top", "bottom"):
        for side in ("left", "right"):
            yield f"corner {up} {side}", queries & (sides[up] & sides[side])

"""Heads that look at places, not at content: found by a statistic, and named by another.

Both speak of patch queries alone, and of all tokens as keys.

**Is it position?** Let `A[i, q, k]` be a head's pattern on image `i`, and `mean[q, k]` its mean over `n`
images. Of all the ways in which `A` differs from looking everywhere alike (`1/T` for `T` tokens), what share
is the same in every image:

    position share = 1 - sum (A - mean)^2 / (n - 1) / [ sum (A - 1/T)^2 / n ]

1 for a head that does not see what is in the image, 0 or less for one whose mean pattern says nothing. The
`n - 1` makes up for the mean being fitted to the same images.

**Which position?** Each template (see `circuitvit.views.templates`) is a set `S` of query-key pairs. With `p`
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

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from circuitvit.engine import capture
from circuitvit.errors import DataError
from circuitvit.models import Model
from circuitvit.views.heads import attention_places
from circuitvit.views.subjects import ImageSpec, Subjects, batches_of, images_of, subjects_of
from circuitvit.views.templates import templates

if TYPE_CHECKING:
    from circuitvit.views.figures.canvas import Picture

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
class PositionHeads:
    """All heads of a model, and how much position explains of each.

    Attributes:
        subjects: the images that were averaged over.
        heads: in running order.
        means: each head's mean pattern over images, `(head, query, key)`, float32.
    """

    subjects: Subjects
    heads: tuple[HeadPosition, ...]
    means: NDArray[np.float32]

    def only(self, at_least: float = 0.8) -> list[HeadPosition]:
        """The heads whose pattern depends on position alone: share at least this, the largest first."""
        return sorted((head for head in self.heads if head.share >= at_least), key=lambda head: -head.share)

    def __getitem__(self, name: str) -> HeadPosition:
        for head in self.heads:
            if head.head == name:
                return head
        raise KeyError(name)

    def figure(self, **options: Any) -> Picture:
        """Where the heads that go by position look.

        See `circuitvit.views.figures.attention.draw_positions`.
        """
        from circuitvit.views.figures.attention import draw_positions

        return draw_positions(self, **options)

    def __repr__(self) -> str:
        found = self.only()
        named = ", ".join(f"{head.head} {head.name}" for head in found[:4])
        count = f"{len(found)} of {len(self.heads)} heads go by position"
        return f"PositionHeads({count}{': ' if named else ''}{named})"


def position_heads(model: Model, images: ImageSpec, *, batch_size: int | None = None) -> PositionHeads:
    """How much of each head's pattern is a matter of position, over several images.

    Use a dozen images or more that have nothing in common; on similar ones content looks like position.
    Memory holds the means and one layer's batch, not the patterns of all images.

    Args:
        model: from `load` or `wrap`.
        images: preprocessed `(image, channel, height, width)`, or paths; at least 2.
        batch_size: images run at once.

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
    places = attention_places(model)
    sums: dict[int, NDArray[np.float64]] = {}
    squares: dict[int, NDArray[np.float64]] = {}
    with torch.no_grad():
        for batch in batches_of(model, found, batch_size):
            run = capture(model, batch)
            for place in places:
                stage = model.stages[place]
                pattern = stage.pattern(stage.read(run.stream(place))).double()
                sums[place] = sums.get(place, 0) + pattern.sum(dim=0).cpu().numpy()
                squares[place] = squares.get(place, 0) + pattern.square().sum(dim=0).cpu().numpy()
    subjects = subjects_of(model, found)
    heads: list[HeadPosition] = []
    means: list[NDArray[np.float32]] = []
    for place in places:
        nodes = model.stages[place].nodes
        mean, mean_square = sums[place] / len(found), squares[place] / len(found)
        for index, name in enumerate(nodes.senders):
            described = describe(mean[index], mean_square[index], len(found), subjects)
            heads.append(HeadPosition(name, nodes.layer, **described))
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
    divergence = float(_xlog(pattern, pattern / everywhere).sum(axis=1).mean())
    # How far single images are from uniform, to second order: KL is half the relative squared difference.
    if whole / (2 * everywhere * len(pattern)) < UNIFORM:
        return {"share": 1.0, "name": "uniform", "mass": 1.0, "chance": 1.0, "fit": 1.0, "closest": "uniform"}
    best, told, mass, chance = "other", 0.0, 0.0, 0.0
    for name, cells in templates(subjects.grid, subjects.kinds).items():
        inside = cells[patches]
        p, p0 = float(pattern[inside].sum() / len(pattern)), float(inside.mean())
        gained = _bernoulli(p, p0) if p > p0 else 0.0
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


def _bernoulli(p: float, p0: float) -> float:
    """KL divergence of one coin from another, in nats."""
    both = _xlog(np.array([p, 1 - p]), np.array([p / p0, (1 - p) / (1 - p0)]))
    return float(both.sum())


def _xlog(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """`x ln y`, and 0 where `x` is 0."""
    return np.where(x > 1e-15, x * np.log(np.where(x > 1e-15, y, 1.0)), 0.0)

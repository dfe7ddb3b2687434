"""Attention over an image: all heads of a layer, or those heads of the model that go by position."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, Normalize, PowerNorm
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from circuitvit.errors import OptionError
from circuitvit.export.style import COLOURS, MUTED
from circuitvit.views.figures.canvas import Axes, Picture, bare, grey, picture_of, styled

if TYPE_CHECKING:
    from circuitvit.views.attention import AttentionPatterns
    from circuitvit.views.position import PositionHeads

TITLES = {"pattern": "pattern", "scores": "score before the softmax", "weighted": "pattern times value"}
MOST_HEADS = 16


def draw(
    view: AttentionPatterns,
    image: int = 0,
    *,
    query: int | tuple[int, int] = 0,
    kinds: tuple[str, ...] = ("pattern", "scores", "weighted"),
    picture: bool = True,
) -> Picture:
    """A column for each head, a row for each kind: what one query token sees of the image.

    Every map has its own scale, which is written below it: on a common one a head that rests on a corner
    leaves all others white. Patterns are coloured by their root, scores in proportion.

    Args:
        view: the patterns of a layer.
        image: which.
        query: a token by its place, or a patch `(row, column)`, which is marked.
        kinds: which of "pattern", "scores" and "weighted".
        picture: whether the image lies behind.

    Raises:
        NameNotFoundError, OptionError: if there is no such image, query or kind.
    """
    row, token = view.subjects.index(image), view.token(query)
    heads = range(min(len(view.heads), MOST_HEADS))
    behind = view.subjects.pictures[row] if picture else None
    asked = view.subjects.token_name(token)
    title = f"Layer {view.layer}, query {asked}, {view.subjects.names[row]}"
    with styled():
        figure = picture_of(1.55 * max(len(heads), 3) + 0.5, 1.75 * len(kinds) + 0.4, title)
        axes = figure.subplots(len(kinds), len(heads), squeeze=False)
        for line, kind in zip(axes, kinds, strict=True):
            maps = view.maps(token, kind)[row]
            elsewhere = view.of_kind(kind)[row, :, token, : view.subjects.n_prefix]
            for head in heads:
                _map(line[head], maps[head], _scale(maps[head], kind), behind)
                _mark(line[head], view, token)
                line[head].set_xlabel(_said(maps[head], elsewhere[head], kind), color=MUTED, fontsize=6.5)
            line[0].set_ylabel(TITLES[kind])
        for head in heads:
            axes[0][head].set_title(view.heads[head])
    return figure


def draw_positions(view: PositionHeads, *, at_least: float = 0.8, queries: int = 3, most: int = 8) -> Picture:
    """The heads that go by position, a column each: their mean patterns at some queries, which are marked.

    Args:
        view: the heads.
        at_least: share of the pattern's variation that position must explain.
        queries: how many query patches, spread along the diagonal.
        most: how many heads, the largest shares first.

    Raises:
        OptionError: if no head goes by position that much.
    """
    found = view.only(at_least)[:most]
    if not found:
        best = max(head.share for head in view.heads)
        raise OptionError(f"no head goes by position to {at_least:.0%}: the most is {best:.0%}")
    rows, columns = view.subjects.grid
    spots = [
        (round(part * (rows - 1)), round(part * (columns - 1))) for part in np.linspace(0.25, 0.75, queries)
    ]
    place = {head.head: index for index, head in enumerate(view.heads)}
    with styled():
        title = f"Heads that go by position (mean over {len(view.subjects)} images)"
        figure = picture_of(1.45 * max(len(found), 3) + 0.4, 1.3 * queries + 0.9, title)
        axes = figure.subplots(queries, len(found), squeeze=False)
        for line, (row, column) in zip(axes, spots, strict=True):
            token = view.subjects.n_prefix + row * columns + column
            for axis, head in zip(line, found, strict=True):
                cells = view.subjects.on_grid(view.means[place[head.head], token])
                _map(axis, cells, Normalize(0, max(float(cells.max()), 1e-9)), None)
                axis.add_patch(
                    Rectangle((column, row), 1, 1, fill=False, color=COLOURS["opposes"], linewidth=1)
                )
            line[0].set_ylabel(f"query ({row}, {column})", color=MUTED)
        for axis, head in zip(axes[0], found, strict=True):
            axis.set_title(
                f"{head.head}: {head.name}\n{head.mass:.0%} of attention there\n{head.share:.0%} position",
                fontsize=7,
            )
    return figure


# -- inside --------------------------------------------------------------------------------------


def _colours(picture: bool) -> LinearSegmentedColormap:
    """White to dark blue; over an image the weak end is clear, so that it stays visible there."""
    weak = (1.0, 1.0, 1.0, 0.0 if picture else 1.0)
    stops = [weak, (0.55, 0.75, 0.88, 0.65 if picture else 1.0), (0.0, 0.2, 0.42, 0.92 if picture else 1.0)]
    return LinearSegmentedColormap.from_list("attention", stops)


def _scale(values: NDArray[np.float32], kind: str) -> Normalize:
    if kind == "scores":
        return Normalize(float(values.min()), max(float(values.max()), float(values.min()) + 1e-9))
    return PowerNorm(0.5, 0.0, max(float(values.max()), 1e-9))


def _said(values: NDArray[np.float32], elsewhere: NDArray[np.float32], kind: str) -> str:
    """The scale of a map in words, and what of a pattern falls on tokens that are no patches."""
    if kind == "scores":
        return f"{values.min():.1f} to {values.max():.1f} nats"
    if kind == "weighted":
        return f"at most {values.max():.2g}"
    off = f", {elsewhere.sum():.0%} off the image" if elsewhere.size else ""
    return f"at most {values.max():.0%}{off}"


def _map(
    axes: Axes, values: NDArray[np.float32], scale: Normalize, picture: NDArray[np.uint8] | None
) -> None:
    extent = (0.0, float(values.shape[1]), float(values.shape[0]), 0.0)
    if picture is not None:
        axes.imshow(grey(picture, 0.6), extent=extent)
    axes.imshow(values, cmap=_colours(picture is not None), norm=scale, extent=extent)
    bare(axes)


def _mark(axes: Axes, view: AttentionPatterns, token: int) -> None:
    place = token - view.subjects.n_prefix
    if place >= 0:
        row, column = divmod(place, view.subjects.grid[1])
        axes.add_patch(Rectangle((column, row), 1, 1, fill=False, color=COLOURS["opposes"], linewidth=1.2))

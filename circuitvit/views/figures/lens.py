"""The logit lens over an image: which class each patch is, position by position."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from circuitvit.export.style import INK, MUTED
from circuitvit.views.figures.canvas import Axes, Picture, bare, drawable, grey, label, picture_of, styled

if TYPE_CHECKING:
    from circuitvit.views.lens import LogitLens

# Okabe and Ito's colours, which stay apart in every common kind of colour blindness.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#7A5195")
OTHER = "#B4BAC2"
HALO = [withStroke(linewidth=1.2, foreground="white", alpha=0.55)]
MOST_PANELS = 6

Names = NDArray[np.object_]
"""A name for each patch, `(row, column)`."""

ROOM_FOR_TEXT = 160
"""Cells are written in only where a panel has at most this many, else their text would be too small."""


def draw(
    view: LogitLens,
    image: int = 0,
    *,
    positions: Sequence[int | str] | None = None,
    symbols: Mapping[int, str] | None = None,
    picture: bool = True,
) -> Picture:
    """A panel for each position: patches coloured by their top class, stronger where it is more probable.

    The eight classes of most patches have colours of their own, later positions counting more.

    Args:
        view: the lens.
        image: which.
        positions: which; by default six from the embedding to the end.
        symbols: a short text for each class; classes of one symbol are one to the figure, so that a hundred
            breeds can all be "dog". It is written into the patches where the font has it: matplotlib cannot
            draw colour emoji, which `LogitLens.to_html` shows.
        picture: whether the image lies behind.

    Raises:
        NameNotFoundError, OptionError: if there is no such image or position.
    """
    row = view.subjects.index(image)
    chosen = [view.position(each) for each in (positions if positions is not None else _spread(view))]
    grids = [_named(view, grid, symbols) for grid in view.subjects.on_grid(view.top[chosen, row])]
    shares = view.subjects.on_grid(view.confidence[chosen, row])
    wanted = _common(grids)[: len(PALETTE)]
    behind = view.subjects.pictures[row] if picture else None
    across = min(len(chosen), 3 if len(chosen) <= 6 else 4)
    down = -(-len(chosen) // across)
    with styled():
        figure = picture_of(
            2.5 * max(across, 2), 2.75 * down + 0.75, f"Logit lens, {view.subjects.names[row]}"
        )
        axes = figure.subplots(down, across, squeeze=False).ravel()
        for place, axis in enumerate(axes):
            if place >= len(chosen):
                axis.set_visible(False)
                continue
            _panel(axis, grids[place], shares[place], wanted, behind, set((symbols or {}).values()))
            top, sure = int(view.pooled_top[chosen[place], row]), view.pooled_confidence[chosen[place], row]
            axis.set_title(view.positions[chosen[place]], loc="left", fontweight="bold")
            axis.set_xlabel(f"readout: {label(view.labels[top], 26)} {sure:.0%}", color=MUTED)
        _legend(figure, wanted, grids, _members(view, symbols))
    return figure


def draw_curves(view: LogitLens, image: int = 0, *, classes: Sequence[int] | None = None) -> Picture:
    """The probability that the readout, and the share of patches whose top class, is each of some classes.

    Args:
        view: the lens; its kept `classes` must hold those drawn, and their logits are compared among them.
        image: which.
        classes: by default the four that the last position ranks highest.

    Raises:
        NameNotFoundError, OptionError: if there is no such image, or a class was not kept.
    """
    row = view.subjects.index(image)
    last = np.argsort(-view.pooled[-1, row], kind="stable")
    wanted = list(classes or [view.classes[place] for place in last[:4]])
    steps = range(len(view.positions))
    with styled():
        figure = picture_of(6.6, 2.9, f"Logit lens along the layers, {view.subjects.names[row]}")
        left, right = figure.subplots(1, 2)
        for index, colour in zip(wanted, PALETTE, strict=False):
            view.of_class(index)  # says so if it was not kept
            logits = view.pooled[:, row, view.classes.index(index)]
            share = view.subjects.on_grid(view.top[:, row] == index).mean(axis=(1, 2))
            left.plot(steps, logits, color=colour, marker="o", markersize=2.5, linewidth=1.2)
            right.plot(steps, share, color=colour, marker="o", markersize=2.5, linewidth=1.2,
                       label=label(view.labels[index], 28))  # fmt: skip
        for axes, title in ((left, "logit at the readout"), (right, "share of patches with this top class")):
            axes.set_title(title)
            axes.set_xticks(steps, [_short(name) for name in view.positions], rotation=0)
            axes.grid(axis="y", color="#E5E7EB", linewidth=0.5)
            axes.set_xlabel("after layer (E: embedding)")
        right.set_ylim(bottom=0)
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


# -- inside --------------------------------------------------------------------------------------


def _panel(
    axes: Axes,
    grid: Names,
    shares: NDArray[np.float32],
    wanted: list[str],
    picture: NDArray[np.uint8] | None,
    written: set[str],
) -> None:
    rows, columns = grid.shape
    extent = (0.0, float(columns), float(rows), 0.0)
    if picture is not None:
        axes.imshow(grey(picture), extent=extent)
    colours = np.array([[to_rgb(_colour(cell, wanted)) for cell in line] for line in grid])
    # Probabilities of 1000 classes are small far into the model: the root keeps them visible.
    strength = 0.2 + 0.5 * np.sqrt(np.clip(shares, 0, 1))
    strength = np.where(np.isin(grid, wanted), strength, 0.5 * strength)
    axes.imshow(np.concatenate([colours, strength[..., None]], axis=2), extent=extent)
    if not written and rows * columns <= ROOM_FOR_TEXT:
        written = set(wanted)
    room, fonts = (3 if columns > 8 else 5), {name for name in written if drawable(name)}
    for (row, column), cell in np.ndenumerate(grid):
        if cell in wanted and cell in fonts:
            text = axes.text(column + 0.5, row + 0.5, label(cell, 99)[:room], ha="center", va="center")
            text.set(fontsize=min(7.0, 80.0 / columns), color=INK, clip_on=True, path_effects=HALO)
    bare(axes)


def _legend(
    figure: Picture, wanted: list[str], grids: Sequence[Names], members: Mapping[str, list[str]]
) -> None:
    handles: list[Any] = []
    for name in wanted:
        inside = members.get(name, [])
        text = name if drawable(name) else ", ".join(inside[:2]) + (", ..." if len(inside) > 2 else "")
        handles.append(Patch(color=_colour(name, wanted), label=label(text, 30)))
    if not all(np.isin(grid, wanted).all() for grid in grids):
        handles.append(Patch(color=OTHER, label="another class"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)), frameon=False,
                  handlelength=1.0, columnspacing=1.4)  # fmt: skip


def _named(view: LogitLens, grid: NDArray[np.int64], symbols: Mapping[int, str] | None) -> Names:
    """What each cell is called: its symbol, or its class's short name."""
    names = {int(cell): (symbols or {}).get(int(cell), view.labels[int(cell)]) for cell in np.unique(grid)}
    return np.vectorize(names.__getitem__, otypes=[object])(grid)  # type: ignore[no-any-return]


def _members(view: LogitLens, symbols: Mapping[int, str] | None) -> dict[str, list[str]]:
    """The classes behind each symbol, those of most patches at the end of the model first."""
    found: dict[str, list[str]] = {}
    counts = Counter(view.top[-1].ravel().tolist())
    for index in sorted(view.labels, key=lambda each: (-counts[each], each)):
        found.setdefault((symbols or {}).get(index, view.labels[index]), []).append(view.labels[index])
    return found


def _colour(name: str, wanted: list[str]) -> str:
    return PALETTE[wanted.index(name)] if name in wanted else OTHER


def _common(grids: Sequence[Names]) -> list[str]:
    """The names of most patches, later positions counting more: early ones are all noise."""
    votes: Counter[str] = Counter()
    for place, grid in enumerate(grids):
        for cell, count in Counter(grid.ravel().tolist()).items():
            votes[cell] += count * (place + 1) ** 2
    return [cell for cell, _ in sorted(votes.items(), key=lambda item: (-item[1], item[0]))]


def _spread(view: LogitLens) -> list[int]:
    count = min(len(view.positions), MOST_PANELS)
    return [round(place) for place in np.linspace(0, len(view.positions) - 1, count)]


def _short(name: str) -> str:
    return "E" if name == "embedding" else name.removeprefix("layer ")

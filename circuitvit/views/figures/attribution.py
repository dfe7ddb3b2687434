"""Direct logit attribution as a figure: a map of the model, the patches, the constants."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from circuitvit.errors import OptionError
from circuitvit.export.style import COLOURS, INK, MUTED
from circuitvit.views.figures.canvas import (
    Axes,
    Picture,
    bare,
    even_norm,
    grey,
    label,
    picture_of,
    signed_colours,
    styled,
)

if TYPE_CHECKING:
    from circuitvit.views.attribution import DirectAttribution

LISTED = 14
"""How many parts have a bar of their own."""


def draw(
    view: DirectAttribution, image: int | None = None, *, picture: bool = True, heads: int = 3
) -> Picture:
    """Three panels: the strongest parts as bars, layers by heads as a map, and patches over the image.

    Args:
        view: the attribution.
        image: which; by default the mean over all, where patches are shown for the first.
        picture: whether the image lies behind the patches.
        heads: how many single heads get their own map of patches, the strongest ones.

    Raises:
        OptionError: if there is no such image.
    """
    if heads < 0:
        raise OptionError(f"the number of heads cannot be {heads}")
    rows = slice(None) if image is None else [view.subjects.index(image)]
    shown = 0 if image is None else view.subjects.index(image)
    senders, constants = view.by_sender[rows].mean(axis=0), view.constant_values[rows].mean(axis=0)
    mean = image is None and len(view.subjects) > 1
    of = f"mean of {len(view.subjects)} images" if mean else view.subjects.names[shown]
    with styled():
        figure = picture_of(
            9.2, 3.9 + (2.0 if heads else 0.0), f"Direct logit attribution: {view.label}, {of}"
        )
        upper, *lower = np.atleast_1d(
            np.array(figure.subfigures(2 if heads else 1, 1, height_ratios=[3.6, 2] if heads else None))
        )
        bars, grid, patches = upper.subplots(1, 3, width_ratios=[1.15, 1, 1.05])
        whole = float(view.logit_difference[rows].mean())
        _bars(bars, [*view.senders, *view.constants], np.concatenate([senders, constants]), whole)
        _model(grid, view, senders)
        maps = view.by_patch[shown]
        where = f" of {label(view.subjects.names[shown], 18)}" if mean else ""
        behind = view.subjects.pictures[shown] if picture else None
        _patches(patches, maps.sum(axis=0), behind, f"all parts, by source patch{where}")
        if heads:
            chosen = _strongest_heads(view, senders, heads)
            for axes, place in zip(
                lower[0].subplots(1, max(len(chosen), 1), squeeze=False)[0], chosen, strict=False
            ):
                _patches(axes, maps[place], behind, f"{view.senders[place]}  {senders[place]:+.2f}")
    return figure


def _bars(axes: Axes, names: list[str], shares: NDArray[np.float64], whole: float) -> None:
    order = np.argsort(-np.abs(shares), kind="stable")
    first, rest = order[:LISTED], order[LISTED:]
    values = [*shares[first], *([shares[rest].sum()] if len(rest) else []), whole]
    texts = [
        *(names[place] for place in first),
        *([f"{len(rest)} others"] if len(rest) else []),
        "sum = logits",
    ]
    colours = [COLOURS["supports"] if value > 0 else COLOURS["opposes"] for value in values]
    colours[-1] = INK
    axes.barh(range(len(values)), values, color=colours, height=0.72)
    axes.axvline(0, color=MUTED, linewidth=0.6)
    axes.axhline(len(values) - 1.5, color=MUTED, linewidth=0.5)
    axes.set_yticks(range(len(values)), [label(text) for text in texts], color=INK)
    axes.invert_yaxis()
    span = max(abs(value) for value in values) or 1.0
    for place, value in enumerate(values):
        side = 1 if value >= 0 else -1
        axes.text(value + side * 0.02 * span, place, f"{value:+.2f}", va="center", fontsize=6.5,
                  ha="left" if side > 0 else "right")  # fmt: skip
    low, high = min(0.0, *values), max(0.0, *values)
    room = 0.2 * (high - low)
    axes.set_xlim(low - (room if low < 0 else 0.0), high + (room if high > 0 else 0.0))
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("logits")
    axes.set_title("strongest parts")


def _model(axes: Axes, view: DirectAttribution, shares: NDArray[np.float64]) -> None:
    """Layers from bottom to top; heads, then MLPs and the constants of the layer, from left to right."""
    layers = sorted(set(view.layers))
    width = max(
        (sum(1 for each in _heads(view) if view.layers[each] == layer) for layer in layers), default=0
    )
    table = np.full((len(layers), width + 1), np.nan)
    for layer in layers:
        mine = [each for each in _heads(view) if view.layers[each] == layer]
        table[layers.index(layer), : len(mine)] = shares[mine]
    for place, name in enumerate(view.senders):
        if re.fullmatch(r"m\d+", name):
            table[layers.index(view.layers[place]), width] = shares[place]
    image = axes.imshow(table, cmap=signed_colours(), norm=even_norm(table), origin="lower", aspect="auto")
    heads = [f"h{head}" for head in range(width)] if width <= 6 else [
        str(head) if head % 3 == 0 else "" for head in range(width)
    ]  # fmt: skip
    axes.set_xticks(range(width + 1), [*heads, "MLP"])
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_ylabel("layer")
    axes.axvline(width - 0.5, color="white", linewidth=2)
    axes.set_title("by layer and head")
    axes.figure.colorbar(image, ax=axes, shrink=0.7, label="logits")


def _patches(axes: Axes, values: NDArray[np.float64], picture: NDArray[np.uint8] | None, title: str) -> None:
    extent = (0.0, float(values.shape[1]), float(values.shape[0]), 0.0)
    if picture is not None:
        axes.imshow(grey(picture), extent=extent)
    image = axes.imshow(
        values,
        cmap=signed_colours(),
        norm=even_norm(values, 0.985),
        extent=extent,
        alpha=_weight(values, picture),
    )
    bare(axes)
    axes.set_title(title)
    axes.figure.colorbar(image, ax=axes, shrink=0.7, extend="both")


def _weight(values: NDArray[np.float64], picture: NDArray[np.uint8] | None) -> NDArray[np.float64]:
    """How opaque each patch is: those that matter, or all where no image lies behind."""
    if picture is None:
        return np.ones_like(values)
    largest = float(np.quantile(np.abs(values), 0.985)) or 1.0
    return 0.15 + 0.75 * np.sqrt(np.clip(np.abs(values) / largest, 0, 1))


def _heads(view: DirectAttribution) -> list[int]:
    return [place for place, name in enumerate(view.senders) if re.fullmatch(r"a\d+\.h\d+", name)]


def _strongest_heads(view: DirectAttribution, shares: NDArray[np.float64], k: int) -> list[int]:
    return sorted(_heads(view), key=lambda place: -abs(shares[place]))[:k]

"""The contact sheet of top images: a page without scripts that needs no other file, and a figure."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from circuitvit.export.maps import RAMP
from circuitvit.export.plain_page import rendered
from circuitvit.export.sheet import Sheet
from circuitvit.export.style import COLOURS, MUTED, number
from circuitvit.export.svg import image_uri
from circuitvit.graph.files import clean
from circuitvit.views.ranking import Picks, Ranking, Row

if TYPE_CHECKING:
    from circuitvit.views.canvas import Picture
    from circuitvit.views.tops import TopImages

SIDE, QUALITY = 224, 78
"""Pixels of the height of a picture in the page, and how well it is kept."""

AROUND = 2
"""Patches that are shown on each side of a patch."""

WIDTH, HEIGHT = 480, 90
"""Of a histogram."""

Box = tuple[int, int, int, int]
"""Left, top, width and height, in patches."""


def as_page(found: TopImages) -> str:
    """The page."""
    what = "patches of all images" if found.by == "patch" else _reduced(found)
    return rendered(
        "top_images.html",
        title=clean(f"Top images of {found.model}"),
        what=what,
        count=len(found.images),
        sheet=found.subjects.sheet.shape,
        photos=[(int(image), _photo(found.picture(image))) for image in found.shown],
        units=[_unit(found, ranking) for ranking in found.rankings.values()],
    )


def row_title(row: Row) -> str:
    """What a row is called.

    Example:
        >>> row_title("top"), row_title(0.5), row_title(0.999)
        ('top', 'around the 50% quantile', 'around the 99.9% quantile')
    """
    return row if isinstance(row, str) else f"around the {100 * row:.6g}% quantile"


def _reduced(found: TopImages) -> str:
    what = {"max": "the largest of its patches", "mean": "the mean of its patches", "cls": "its class token"}
    return f"images, by {what[found.reduce]} where a unit names no tokens"


def _unit(found: TopImages, ranking: Ranking) -> dict[str, Any]:
    """What the page says of one unit."""
    tint = _Tint(ranking)
    return {
        "name": clean(ranking.unit),
        "measure": ranking.measure,
        "overlay": "" if tint.is_empty else ranking.overlay,
        "histogram": _histogram(ranking),
        "quantiles": [(f"{100 * share:g}%", number(value)) for share, value in ranking.quantiles.items()],
        "lifts": [
            (clean(lift.object), f"{lift.top:.1%}", f"{lift.all:.1%}", str(lift.lift))
            for lift in ranking.lifts
        ],
        "caveats": ranking.caveats,
        "rows": [(row_title(row), list(_cards(found, picks, tint))) for row, picks in ranking.rows.items()],
    }


def _cards(found: TopImages, picks: Picks, tint: _Tint) -> Iterator[dict[str, Any]]:
    sheet = found.subjects.sheet
    for place in range(len(picks)):
        mark = _mark(found, picks, place)
        box: Box = (0, 0, sheet.shape[1], sheet.shape[0])
        overlay = None if picks.maps is None else image_uri(tint.of(sheet.lay(picks.maps[place])))
        yield {
            "image": int(picks.images[place]),
            "label": clean(found.label(picks, place)),
            "value": number(float(picks.values[place])),
            "box": " ".join(map(str, _around(sheet, mark) if found.by == "patch" and mark else box)),
            "mark": mark,
            "overlay": overlay,
        }


def _mark(found: TopImages, picks: Picks, place: int) -> tuple[int, int] | None:
    """Row and column, on the sheet, of the patch that a value is of."""
    patch = int(picks.tokens[place]) - found.subjects.n_prefix
    on_grid = picks.maps is not None and 0 <= patch < prod(found.subjects.grid)
    return found.subjects.sheet.place(patch) if on_grid else None


def _around(sheet: Sheet, mark: tuple[int, int]) -> Box:
    """A patch's surroundings, which stay within its frame."""
    starts, sizes = [], []
    for at, side in zip(mark, sheet.grid[-2:], strict=True):
        size = min(2 * AROUND + 1, side)
        frame = at // side * side
        starts.append(min(max(at - AROUND, frame), frame + side - size))
        sizes.append(size)
    return starts[1], starts[0], sizes[1], sizes[0]


class _Tint:
    """Colours for the maps of a unit: on one scale, but attention each on its own.

    Where all values have one sign they rise from clear to light; else blue is positive and orange negative.
    """

    def __init__(self, ranking: Ranking) -> None:
        maps = [picks.maps for picks in ranking.rows.values() if picks.maps is not None]
        self.is_empty = not maps
        values = np.concatenate([each.ravel() for each in maps]) if maps else np.zeros(1)
        self.each = ranking.overlay != "activation"
        self.signed = bool(values.min() < 0 < values.max())
        self.low = 0.0 if self.signed or self.each else float(values.min())
        self.high = float(np.quantile(np.abs(values) if self.signed else values, 0.995))

    def of(self, values: NDArray[np.float32]) -> NDArray[np.uint8]:
        """`(row, column, 4)`, 8-bit colours and how opaque they are."""
        # Attention that is spread evenly shall look dull, not bright.
        high = max(float(values.max()), 3 * float(values.mean())) if self.each else self.high
        share = np.clip((values - self.low) / max(high - self.low, 1e-30), -1 if self.signed else 0, 1)
        size = np.abs(share)
        if self.signed:
            ends = [
                np.array([int(COLOURS[name][at : at + 2], 16) for at in (1, 3, 5)])
                for name in ("supports", "opposes")
            ]
            colours = np.where(share[..., None] > 0, *ends)
        else:
            stops = np.linspace(0, 1, len(RAMP))
            colours = np.stack([np.interp(size, stops, [stop[at] for stop in RAMP]) for at in range(3)], -1)
        opacity = 255 * (0.85 * size**0.5 if self.each else 0.85 * size if self.signed else 0.2 + 0.65 * size)
        return np.concatenate([colours, opacity[..., None]], axis=-1).round().astype(np.uint8)


def _histogram(ranking: Ranking) -> dict[str, Any]:
    """Bars by the root of their counts, so that single images show; and where the median and the top are."""
    low, high = float(ranking.edges[0]), float(ranking.edges[-1])
    tall = np.sqrt(ranking.counts / ranking.counts.max()) * HEIGHT
    wide = WIDTH / len(tall)
    places = {f"{100 * share:g}%": ranking.quantiles[share] for share in (0.05, 0.5, 0.95)}
    top = ranking.rows.get("top")
    return {
        "size": (WIDTH, HEIGHT),
        "bars": [
            (f"{at * wide:.1f}", f"{HEIGHT - high_:.1f}", f"{wide - 1:.1f}", f"{high_:.1f}", int(count))
            for at, (high_, count) in enumerate(zip(tall, ranking.counts, strict=True))
            if count
        ],
        "lines": [(name, f"{WIDTH * (value - low) / (high - low):.1f}") for name, value in places.items()],
        "top": None if top is None else f"{WIDTH * (float(top.values[-1]) - low) / (high - low):.1f}",
        "ends": (number(low), number(high)),
    }


def _photo(picture: NDArray[np.uint8]) -> str:
    image = Image.fromarray(np.ascontiguousarray(picture))
    scale = min(1.0, SIDE / image.height)
    small = image.resize((round(image.width * scale), round(image.height * scale)))
    return image_uri(np.asarray(small), QUALITY)


# -- a figure ------------------------------------------------------------------------------------


def as_figure(found: TopImages, unit: str | None, picture: bool, most: int) -> Picture:
    """See `TopImages.figure`."""
    from circuitvit.views import canvas

    if unit is None and len(found) > 1:
        first: Row = (
            "top"
            if all("top" in each.rows for each in found.values())
            else next(iter(next(iter(found.values())).rows))
        )
        lines = [(name, first) for name in found]
    else:
        name = next(iter(found)) if unit is None else unit
        lines = [(name, row) for row in found[name].rows]
    across = min(most, max(len(found.picks(*line)) for line in lines))
    sheet = found.subjects.sheet
    wide, high = canvas.proportions(sheet, 1.25, 4.6)
    with canvas.styled():
        what = "patches" if found.by == "patch" else "images"
        title = f"Top {what} of {found.model}, {len(found.images)} images"
        figure = canvas.blank(wide * max(across, 3) + 0.5, (high + 0.3) * len(lines) + 0.4, title)
        axes = figure.subplots(len(lines), across, squeeze=False)
        for line, (name, row) in zip(axes, lines, strict=True):
            picks, tint = found.picks(name, row), _Tint(found[name])
            for axis in line[len(picks) :]:
                axis.set_visible(False)
            for place, axis in enumerate(line[: len(picks)]):
                behind = found.picture(int(picks.images[place])) if picture else None
                blank = np.zeros((*sheet.shape, 4), dtype=np.uint8)
                values = blank if picks.maps is None else tint.of(sheet.lay(picks.maps[place]))
                canvas.overlay(axis, values, behind, 0.9, sheet=sheet)
                if (mark := _mark(found, picks, place)) is not None:
                    canvas.mark(axis, *mark)
                    if found.by == "patch":
                        left, top, width, height = _around(sheet, mark)
                        axis.set(xlim=(left, left + width), ylim=(top + height, top))
                axis.set_title(canvas.label(found.label(picks, place), 22), fontsize=6)
                axis.set_xlabel(number(float(picks.values[place])), color=MUTED, fontsize=6.5)
            line[0].set_ylabel(canvas.label(f"{name}, {row_title(row)}", 34), fontsize=6.5)
    return figure

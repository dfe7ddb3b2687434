"""The canvas that views draw their figures on, and the pieces that several figures share.

This is the only file of the room that imports matplotlib; views import it when the first figure is wanted. A
figure is saved with `save`, shown by a notebook, and the same bytes every time.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from circuitvit.errors import FileError, OptionError
from circuitvit.export.sheet import Sheet
from circuitvit.export.style import COLOURS, FAINT, INK, MUTED
from circuitvit.export.written import CELL, is_written
from circuitvit.graph.files import clean, write_bytes

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize, PowerNorm, TwoSlopeNorm
    from matplotlib.colors import to_rgba as to_rgba
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties, findfont, get_font
    from matplotlib.image import AxesImage
    from matplotlib.patches import Patch as Patch
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import LogLocator, NullFormatter
except ImportError as error:
    raise FileError(
        "figures need matplotlib, which is not installed: pip install circuitvit[plots]"
    ) from error

# Okabe and Ito's colours, which stay apart in every common kind of colour blindness.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#7A5195")

HALO = [withStroke(linewidth=1.2, foreground="white", alpha=0.55)]
"""Around text that is written over a picture."""

FORMATS = ("png", "svg", "pdf")
DPI = 160
IN_NOTEBOOK = 100

SETTINGS: Any = {
    "font.size": 8,
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "Liberation Sans", "DejaVu Sans"],
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "svg.fonttype": "none",  # text stays text: it can be searched, and a browser has the emoji
    "svg.hashsalt": "circuitvit",  # otherwise identifiers differ from run to run
    "pdf.fonttype": 42,
    "text.parse_math": False,  # a class name with dollar signs is no formula
    "text.usetex": False,
}


class Picture(Figure):
    """A matplotlib Figure that saves itself and that a notebook shows."""

    def save(self, path: str | Path, dpi: int = DPI) -> Path:
        """Write the figure, whole or not at all; the ending chooses `.png`, `.svg` or `.pdf`.

        Raises:
            OptionError: for another ending.
            FileError: if the file cannot be written.
        """
        path = Path(path)
        kind = path.suffix.lower().lstrip(".")
        if kind not in FORMATS:
            raise OptionError(
                f"a figure is saved as {', '.join(f'.{name}' for name in FORMATS)}, not as {path.name!r}"
            )
        return write_bytes(path, self._rendered(kind, dpi))

    def _repr_png_(self) -> bytes:
        return self._rendered("png", IN_NOTEBOOK)

    def _rendered(self, kind: str, dpi: int) -> bytes:
        file = io.BytesIO()
        undated: dict[str, Any] = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
        with styled(), warnings.catch_warnings():
            # A glyph that no font has is drawn as a box; in an SVG the browser's fonts may have it.
            warnings.filterwarnings("ignore", message=r"(?s)Glyph .* missing from")
            if self.get_layout_engine() is not None:
                # Laid out once: each run of the layout would start where the last one ended, so that a figure
                # that has been saved before would come out a little different.
                self.draw_without_rendering()
                self.set_layout_engine("none")
            self.savefig(file, format=kind, dpi=dpi, metadata=undated, facecolor="white")
        return file.getvalue()


@contextmanager
def styled() -> Iterator[None]:
    """The library's look, inside the `with` alone."""
    with matplotlib.rc_context(SETTINGS):
        yield


def blank(width: float, height: float, title: str = "") -> Picture:
    """An empty figure of a size in inches, to be filled inside `styled()`."""
    figure = Picture(figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle(label(title, 110), fontsize=9, fontweight="bold")
    return figure


def panels(figure: Picture, count: int, across: int) -> list[Axes]:
    """That many equal panels, row by row; places of the last row that stay empty are not drawn."""
    axes: list[Axes] = figure.subplots(-(-count // across), across, squeeze=False).ravel().tolist()
    for unused in axes[count:]:
        unused.set_visible(False)
    return axes[:count]


def label(text: str, longest: int = 40) -> str:
    """Text from a file or a class name, made harmless and short.

    Example:
        >>> label("a\\nb", 10), label("crossword puzzle", 10)
        ('a b', 'crossword…')
    """
    short = clean(text)
    return short if len(short) <= longest else short[: longest - 1].rstrip() + "…"


def decimals(largest: float, least: int) -> int:
    """How many decimals show two digits of the largest of some numbers; at least so many.

    Example:
        >>> decimals(12.3, 2), decimals(0.0047, 2)
        (2, 4)
    """
    return max(least, 1 - math.floor(math.log10(largest))) if 0 < largest < math.inf else least


def drawable(text: str) -> bool:
    """Whether the figure's font has every sign of a text."""
    with styled():
        font = get_font(findfont(FontProperties()))
    return all(font.get_char_index(ord(sign)) for sign in clean(text))


def bare(axes: Axes) -> None:
    """Take the ticks away, and leave a hair of a frame, for images."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(visible=True, linewidth=0.4, color=FAINT)


def grey(picture: NDArray[np.uint8], strength: float = 0.75) -> NDArray[np.float64]:
    """A picture without its colours and paler, so that what is laid over it has them; `(h, w, 3)`, 0 to 1."""
    light = picture.astype(np.float64).mean(axis=2, keepdims=True) / 255
    return np.repeat(1 - strength * (1 - light), 3, axis=2)


def overlay(
    axes: Axes,
    values: NDArray[Any],
    picture: NDArray[np.uint8] | None,
    strength: float = 0.75,
    size: tuple[int, int] | None = None,
    sheet: Sheet | None = None,
    **look: Any,
) -> AxesImage:
    """A map over a picture made grey, without ticks. The words of a sentence are written once more above it.

    Args:
        axes: to draw on.
        values: `(row, column)`, or colours `(row, column, 4)`.
        picture: what lies behind, `(height, width, 3)`, or None.
        strength: of the picture, see `grey`.
        size: height and width of the axes in their own units; by default the rows and columns of the map.
        sheet: how the patches lie; frames of a clip are parted by lines.
        **look: for matplotlib's `imshow`, such as `cmap`, `norm` and `alpha`.
    """
    height, width = size or values.shape[:2]
    extent = (0.0, float(width), float(height), 0.0)
    if picture is not None:
        axes.imshow(grey(picture, strength), extent=extent)
    drawn = axes.imshow(values, extent=extent, **look)
    if picture is not None and is_written(picture, values.shape[:2]):
        _write_above(axes, drawn, picture, extent)
    if sheet is not None:
        lines, colour = sheet.frames // sheet.across, FAINT if picture is None else "white"
        for place in range(1, sheet.across):
            axes.axvline(width * place / sheet.across, color=colour, linewidth=1.4)
        for place in range(1, lines):
            axes.axhline(height * place / lines, color=colour, linewidth=1.4)
    bare(axes)
    return drawn


def _write_above(
    axes: Axes, drawn: AxesImage, picture: NDArray[np.uint8], extent: tuple[float, float, float, float]
) -> None:
    """Words above the map that lies over them, dark or, where it is dark, white, in cells of their shape."""
    width, height = CELL
    values: Any = np.ma.masked_invalid(np.ma.asarray(drawn.get_array()))
    colours = np.asarray(drawn.to_rgba(values), dtype=np.float64)
    alpha = drawn.get_alpha()
    opacity = colours[..., 3] * (1.0 if alpha is None else np.asarray(alpha))
    light = 1 - opacity * (1 - colours[..., :3] @ np.array([0.299, 0.587, 0.114]))
    ink = np.kron(np.where(light < 0.5, 1.0, 0.1), np.ones((height, width)))
    axes.imshow(np.dstack([ink, ink, ink, 1 - picture.mean(axis=2) / 255]), extent=extent)
    axes.set_aspect(height / width)


def proportions(sheet: Sheet, panel: float, widest: float) -> tuple[float, float]:
    """Width and height in inches of a panel for maps: square for an image, for a strip of frames as wide as
    there is room for.
    """
    if sheet.frames == 1:
        return panel, panel
    rows, columns = sheet.shape
    width = min(widest, panel * columns / rows)
    return width, width * rows / columns


def mark(axes: Axes, row: int, column: int) -> None:
    """A frame around one patch of a map."""
    axes.add_patch(Rectangle((column, row), 1, 1, fill=False, color=COLOURS["opposes"], linewidth=1.2))


def log_axis(axes: Axes, name: str) -> None:
    """A logarithmic x axis of counts: 1, 2, 5, 10, ... written out."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(name)


def model_map(
    axes: Axes, table: NDArray[np.float64], layers: Sequence[int | str], heads: Sequence[str], **look: Any
) -> AxesImage:
    """A map of the model: layers from bottom to top, heads and, last, the MLP from left to right.

    Args:
        axes: to draw on.
        table: `(layer, head + 1)`; NaN where there is no such node.
        layers: number of each row's layer, or what else to call it.
        heads: what to write below the heads.
        **look: for matplotlib's `imshow`.
    """
    drawn = axes.imshow(table, origin="lower", aspect="auto", **look)
    axes.axvline(len(heads) - 0.5, color=INK, linewidth=0.8)
    axes.set_xticks(range(len(heads) + 1), [*heads, "MLP"])
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_ylabel("layer")
    axes.tick_params(length=0)
    return drawn


def scale(values: NDArray[Any]) -> Normalize:
    """From the least to the greatest value; where all are the same, they are the least."""
    least, greatest = float(np.nanmin(values)), float(np.nanmax(values))
    return Normalize(least, greatest if greatest > least else least + 1)


def root_scale(values: NDArray[Any]) -> Normalize:
    """From 0 to the greatest value by the square root, so that small shares show."""
    return PowerNorm(0.5, 0.0, max(float(values.max()), 1e-9))


def rising_colours(clear: bool = False) -> Colormap:
    """White to dark blue; with a clear weak end for what lies over a picture, which stays visible there."""
    weak, middle, strong = (0.0, 0.65, 0.92) if clear else (1.0, 1.0, 1.0)
    stops = [(1.0, 1.0, 1.0, weak), (0.55, 0.75, 0.88, middle), (0.0, 0.2, 0.42, strong)]
    return LinearSegmentedColormap.from_list("rising", stops).with_extremes(bad="#F0F1F3")


def signed_colours() -> Colormap:
    """From the colour of what opposes, by way of white, to that of what supports."""
    return LinearSegmentedColormap.from_list(
        "signed", [COLOURS["opposes"], "#FBE3D3", "#FFFFFF", "#D3E6F3", COLOURS["supports"]]
    ).with_extremes(bad="#F0F1F3")


def even_norm(values: NDArray[Any], quantile: float = 1.0) -> Normalize:
    """A scale from minus to plus the largest magnitude, so that white is 0; of order 1 where all are 0.

    A `quantile` below 1 lets the largest few run over, so that one of them does not leave the rest white.
    """
    finite = np.abs(values[np.isfinite(values)])
    largest = float(np.quantile(finite, quantile)) if finite.size else 0.0
    largest = largest or (float(finite.max()) if finite.size and finite.max() > 0 else 1.0)
    return TwoSlopeNorm(0.0, -largest, largest)

"""The figure that views are drawn on: saved with `save`, shown by a notebook, the same bytes every time."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from circuitvit.errors import FileError, OptionError
from circuitvit.export.style import COLOURS, FAINT, INK, MUTED
from circuitvit.graph.files import write_bytes
from circuitvit.views.tables import plain

try:
    import matplotlib
    from matplotlib.axes import Axes as Axes
    from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize, TwoSlopeNorm
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties, findfont, get_font
except ImportError as error:
    raise FileError(
        "figures need matplotlib, which is not installed: pip install circuitvit[plots]"
    ) from error

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


def picture_of(width: float, height: float, title: str = "") -> Picture:
    """An empty figure of a size in inches, to be filled inside `styled()`."""
    figure = Picture(figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle(label(title, 110), fontsize=9, fontweight="bold")
    return figure


def label(text: str, longest: int = 40) -> str:
    """Text from a file or a class name, made harmless and short.

    Example:
        >>> label("a\\nb", 10), label("crossword puzzle", 10)
        ('a b', 'crossword…')
    """
    clean = plain(text)
    return clean if len(clean) <= longest else clean[: longest - 1].rstrip() + "…"


def drawable(text: str) -> bool:
    """Whether the figure's font has every sign of a text."""
    with styled():
        font = get_font(findfont(FontProperties()))
    return all(font.get_char_index(ord(sign)) for sign in plain(text))


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

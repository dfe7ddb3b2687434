"""Patching maps as pictures: matplotlib, imported when a picture is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from circuitvit.errors import FileError, OptionError

if TYPE_CHECKING:
    from circuitvit.verification.patching import PatchingMap

MOST_LABELS = 40
"""More names than this cannot be read on one axis; every so many are shown."""


def draw_heat_map(found: PatchingMap, path: str | Path) -> Path:
    """Draw the mean change of the metric, one row for each component, one column for each token set.

    Purple is a fall and orange a rise; a dot marks a cell in which the top class changes for at least half
    of the pairs.

    Raises:
        OptionError: if matplotlib is not installed, or the ending is no picture format.
        FileError: if the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError("heat maps need matplotlib: pip install 'circuitvit[plots]'") from error
    effect, path = found.effect, Path(path)
    height, width = effect.shape
    figure = Figure(figsize=(min(16, 3.2 + 0.45 * width), min(14, 1.6 + 0.22 * height)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    limit = float(np.abs(effect).max()) or 1.0
    image = axes.imshow(
        effect, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest"
    )
    for row, column in np.argwhere(found.flipped >= 0.5):
        axes.plot(column, row, marker="o", color="black", markersize=3)
    for ticks, names, set_ticks in (
        (width, found.columns, axes.set_xticks),
        (height, found.rows, axes.set_yticks),
    ):
        shown = range(0, ticks, max(1, -(-ticks // MOST_LABELS)))
        set_ticks(list(shown), [names[at] for at in shown], fontsize=7)
    axes.tick_params(axis="x", rotation=90)
    axes.set_title(f"Patching {found.site}: change of {found.label}", fontsize=9)
    figure.colorbar(image, ax=axes, label="change of the metric (dot: top class changes)")
    try:
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise OptionError(f"cannot draw {path.name}: {error}") from error
    return path

"""Maps of evidence over images, with the outline of the mask that they are scored against."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import ArrayLike

from circuitvit.errors import OptionError
from circuitvit.export.style import INK, MUTED
from circuitvit.views.figures.canvas import (
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
    from circuitvit.views.segmentation import PatchEvidence

MOST = 12


def draw(
    view: PatchEvidence,
    *,
    masks: ArrayLike | None = None,
    ignore: ArrayLike | None = None,
    threshold: float | Literal["mean"] = "mean",
    smooth: bool = True,
    picture: bool = True,
) -> Picture:
    """Each image with its map; with masks also their outlines, and IoU and average precision below.

    White is the threshold: blue patches lie above it, orange ones below.

    Args:
        view: the evidence.
        masks: True on the object, `(image, height, width)`, of the pictures' size.
        ignore: pixels that do not count.
        threshold: the fixed one of the IoU, as in `PatchEvidence.score`.
        smooth: whether maps are interpolated between patches.
        picture: whether the images lie behind.

    Raises:
        OptionError: if masks do not have the pictures' size.
        DataError: if they cannot be scored.
    """
    count = min(len(view.subjects), MOST)
    wanted = None if masks is None else np.asarray(masks, dtype=bool)
    if wanted is not None and wanted.shape[1:] != view.subjects.pictures.shape[1:3]:
        sizes = f"{wanted.shape[1:]} cannot be drawn over pictures of {view.subjects.pictures.shape[1:3]}"
        raise OptionError(f"masks of {sizes}")
    scores = None if wanted is None else view.score(wanted, threshold, ignore)
    across = min(count, 5)
    down = -(-count // across)
    unit = "above the image's mean" if isinstance(threshold, str) else f"above {threshold:g}"
    unit = f"{'log-odds (nats)' if 'lens' in view.label else 'logits'} {unit}"
    maps = (view.upsampled() if smooth else view.values)[:count]
    maps = maps - (maps.mean(axis=(1, 2), keepdims=True) if isinstance(threshold, str) else threshold)
    with styled():
        figure = picture_of(
            1.85 * max(across, 2) + 0.5, 2.15 * down + 0.4, f"Evidence for {label(view.label, 90)}"
        )
        axes = figure.subplots(down, across, squeeze=False).ravel()
        norm = even_norm(maps, 0.99)
        for row, axis in enumerate(axes):
            if row >= count:
                axis.set_visible(False)
                continue
            height, width = view.subjects.pictures.shape[1:3]
            extent = (0.0, float(width), float(height), 0.0)
            if picture:
                axis.imshow(grey(view.subjects.pictures[row], 0.9), extent=extent)
            drawn = axis.imshow(
                maps[row], cmap=signed_colours(), norm=norm, extent=extent, alpha=0.6 if picture else 1.0
            )
            if wanted is not None and scores is not None:
                axis.contour(wanted[row], levels=[0.5], colors=[INK], linewidths=0.9)
                axis.set_xlabel(
                    f"IoU {scores[row].iou_fixed:.2f} (best {scores[row].iou_best:.2f}), "
                    f"AP {scores[row].average_precision:.2f}",
                    color=MUTED,
                    fontsize=6.5,
                )
            bare(axis)
            axis.set_title(label(view.subjects.names[row], 26))
        figure.colorbar(drawn, ax=axes.tolist(), shrink=0.6, extend="both", label=unit)
    return figure

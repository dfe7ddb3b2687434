"""Heat maps: patch values as colours over a dimmed image, for thumbnails in figures and in the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from circuitvit.export.maps import Maps, Side

RAMP = (
    (13, 8, 53),
    (84, 18, 110),
    (155, 35, 100),
    (212, 72, 66),
    (245, 125, 21),
    (250, 194, 40),
    (252, 255, 164),
)
"""Dark to light in even steps of lightness, so that it is read alike in print and by the colour-blind."""

CUT = 0.97  # the ramp ends at this quantile of the patches
LEAST_CUT = 0.25  # but not below this share of the largest value
LEAST_TIMES_MEAN = 3.0  # for attention, nor below this many times the mean

_SIDE = 92  # pixels of a thumbnail: twice what it is drawn at, for sharp print

Array = NDArray[np.float64]


def heat(
    image: NDArray[np.uint8], patches: Array, side: int = _SIDE, least_end: float = 0.0
) -> NDArray[np.uint8]:
    """`(side, side, 3)`: patch values `(row, column)` as colours over the image in dark grey.

    Large values are opaque and at the light end of the ramp; 0 and below show the image alone. The ramp ends
    at the 97th percentile, though not below a quarter of the largest value: a few patches of Vision
    Transformers have values far above all others (Darcet et al. 2024, arXiv:2309.16588), which would leave
    the rest in the dark. It also does not end below `least_end`.

    Example:
        >>> blank = np.zeros((8, 8, 3), dtype=np.uint8)
        >>> heat(blank, np.array([[0.0, 1.0]]), side=4)[0, :, 0].tolist()
        [0, 0, 252, 252]
    """
    grey = Image.fromarray(image).convert("L").resize((side, side), Image.Resampling.BOX)
    base = np.repeat(0.55 * np.asarray(grey, dtype=np.float64)[:, :, None], 3, axis=2)
    end = max(float(np.quantile(patches, CUT)), LEAST_CUT * float(patches.max()), least_end)
    share = np.clip(patches / end, 0, 1) if end > 0 else np.zeros_like(patches)
    rows, columns = (np.arange(side) * count // side for count in share.shape)
    share = share[rows][:, columns]
    stops = np.linspace(0, 1, len(RAMP))
    colours = np.stack([np.interp(share, stops, [stop[i] for stop in RAMP]) for i in range(3)], axis=-1)
    opacity = np.minimum(1, share**0.6)[:, :, None]
    return np.asarray(np.rint(base * (1 - opacity) + colours * opacity), dtype=np.uint8)


def thumbnails(maps: Maps, side: str = "clean") -> Mapping[str, str]:
    """A small heat map as a PNG data URI for every node that has a map."""
    chosen: Side = maps.sides[side]
    found = {}
    for node in maps.nodes:
        patches = chosen.patches(node, maps)
        if patches is not None:
            if node in chosen.heads:  # attention that is spread evenly shall look dull, not bright
                pixels = heat(chosen.image, patches, least_end=LEAST_TIMES_MEAN * float(patches.mean()))
            else:  # norms are never near 0, so they are shown from the least one up
                pixels = heat(chosen.image, patches - patches.min())
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG", optimize=True)
            found[node] = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return found

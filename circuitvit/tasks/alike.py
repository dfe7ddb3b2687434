"""Which pictures look most alike: thumbnails compared as the eye compares colours, no model asked.

A thumbnail is the middle square of a picture at 16 x 16, in CIELAB, where a distance of about 2.3 is a
difference that is just seen (Mahy et al. 1994). Two pictures differ by the root mean square distance of their
thumbnails' colours, place by place; of a clip, four frames are compared, in order. So alike are pictures
with like colours and light at the same places: a dark animal on a lawn and another one. What is shown, its
pose and its mirror image are not seen: where counterfactuals are to differ in one thing only, edit or draw
them. The distances depend on the files alone, so the pairs are the same for every model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from circuitvit.errors import DataError
from circuitvit.models.zoo import ClipSpec, InputSpec
from circuitvit.tasks.clip_files import CLIP_SUFFIXES, load_clip
from circuitvit.tasks.image_files import load_image

MOST = 2000
"""Files of a side that are compared with all of the other: the time grows with the third power of this."""

SIDE = 16
PLAIN = InputSpec((3, SIDE, SIDE), (0.0,) * 3, (1.0,) * 3, interpolation="box")
CLIP = ClipSpec(PLAIN.size, PLAIN.mean, PLAIN.std, "box", frames=4, repeat=True)
"""What a thumbnail is, as the preprocessing of a model that would take it."""


@dataclass(frozen=True)
class Alike:
    """Pictures one to one, so that the sum of their differences is as small as it can be.

    Attributes:
        places: which of the first and which of the second side, in the order of the first.
        mean: root mean square difference of the pairs, in CIELAB units; a mean over pairs.
        in_order: the same where the first belongs to the first, and so on.
    """

    places: tuple[tuple[int, int], ...]
    mean: float
    in_order: float


def most_alike(first: Sequence[Path], second: Sequence[Path]) -> Alike:
    """Pair pictures (or clips) one to one; the larger side keeps some without a partner.

    The same files give the same pairs: distances are rounded, and ties go to those that come first.

    Raises:
        DataError: if a file cannot be read, or there are more than `MOST` on a side.
    """
    for paths in (first, second):
        if len(paths) > MOST:
            raise DataError(
                f"{len(paths):,} files in {paths[0].parent} are too many to compare all with all: nearest "
                f"takes up to {MOST:,} on each side. Give fewer, or pair them by names or order"
            )
    distances = differences(first, second)
    rows, columns = linear_sum_assignment(distances)
    n = min(distances.shape)
    return Alike(
        tuple(zip(rows.tolist(), columns.tolist(), strict=True)),
        float(distances[rows, columns].mean()),
        float(distances[range(n), range(n)].mean()),
    )


def differences(first: Sequence[Path], second: Sequence[Path]) -> Float[np.ndarray, "first second"]:
    """How much each picture differs from each other one, in CIELAB units, to four decimals."""
    sides = [np.stack([_thumbnail(path) for path in paths]) for paths in (first, second)]
    first_flat, second_flat = (side.reshape(len(side), -1) for side in sides)
    distances: NDArray[np.float64] = cdist(first_flat, second_flat) / np.sqrt(first_flat.shape[1] / 3)
    return distances.round(4)


def _thumbnail(path: Path) -> Float[np.ndarray, "time height width 3"]:
    is_clip = path.suffix.lower() in CLIP_SUFFIXES
    frames = load_clip(path, CLIP) if is_clip else load_image(path, PLAIN)[None]
    return _lab(frames.movedim(1, -1).double().clamp(0, 1).numpy())


_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def _lab(srgb: Float[np.ndarray, "*shape 3"]) -> Float[np.ndarray, "*shape 3"]:
    """CIELAB (L from 0 to 100, a, b) of sRGB colours in [0, 1] (IEC 61966-2-1, white D65)."""
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    ratio = linear @ _TO_XYZ.T / _TO_XYZ.sum(axis=1)
    x, y, z = np.moveaxis(np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)

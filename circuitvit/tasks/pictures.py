"""Pictures at hand: of Pillow, or arrays of 8-bit pixels, one or a list of them, as pictures of Pillow.

What a number means decides how it is taken: 8-bit pixels are a picture, which goes through the model's
preprocessing as a file would; floating-point numbers are taken as preprocessed and never come here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from circuitvit.errors import DataError

_COLOURS = (1, 3, 4)
"""How many numbers a pixel may have: grey, red-green-blue, and these with transparency."""

_LAYOUTS = "8-bit pixels are (height, width), (height, width, 3) or (image, height, width, 3)"


def pictures_at_hand(source: object) -> tuple[Image.Image, ...] | None:
    """`source` as pictures, or None where it is something else: paths, or numbers that are no 8-bit pixels.

    Args:
        source: a picture of Pillow, an array or tensor of uint8, or a list of these. Colours may come last,
            as Pillow and OpenCV have them, or first, as torchvision has them.

    Raises:
        DataError: for pixels of another shape, an empty array, and a list that mixes pictures with paths.

    Example:
        >>> [picture.size for picture in pictures_at_hand(np.zeros((2, 40, 60, 3), np.uint8))]
        [(60, 40), (60, 40)]
    """
    if isinstance(source, Image.Image):
        return (source,)
    if _is_pixels(source):
        return _of_pixels(source)
    if not isinstance(source, Sequence) or isinstance(source, str) or not source:
        return None
    held = [isinstance(each, Image.Image) or _is_pixels(each) for each in source]
    if not any(held):
        return None
    if not all(held):
        other = next(each for each, is_held in zip(source, held, strict=True) if not is_held)
        raise DataError(f"a list of pictures holds a {type(other).__name__} too: give one kind of them")
    found = [pictures_at_hand(each) or () for each in source]
    return tuple(picture for pictures in found for picture in pictures)


def name_of(picture: Image.Image, place: int) -> str:
    """What to call a picture: its file's name where it was opened from one, or "image 3"."""
    file = getattr(picture, "filename", "")
    return Path(file).name if isinstance(file, (str, Path)) and str(file) else f"image {place}"


def _is_pixels(source: object) -> bool:
    return isinstance(source, (np.ndarray, Tensor)) and source.dtype in (np.uint8, torch.uint8)


def _of_pixels(source: Any) -> tuple[Image.Image, ...]:
    first = isinstance(source, Tensor)
    pixels = source.detach().cpu().numpy() if first else source
    if 0 in pixels.shape:
        raise DataError(f"no pixels: the array of shape {pixels.shape} is empty")
    if pixels.ndim == 2:
        return (Image.fromarray(np.ascontiguousarray(pixels)),)
    if pixels.ndim not in (3, 4):
        raise DataError(f"{_LAYOUTS}, not of shape {pixels.shape}")
    batch = pixels if pixels.ndim == 4 else pixels[None]
    return tuple(Image.fromarray(each) for each in _colours_last(batch, first))


def _colours_last(batch: UInt8[np.ndarray, "image _ _ _"], channels_first: bool) -> NDArray[np.uint8]:
    """Pixels with colours in the last place, or none: one number a pixel is grey.

    Args:
        batch: with colours first or last; where both could be, what is usual decides.
        channels_first: whether colours usually come first, as in tensors.
    """
    could = [axis for axis in ((1, 3) if channels_first else (3, 1)) if batch.shape[axis] in _COLOURS]
    if not could:
        raise DataError(f"{_LAYOUTS}, not of shape {batch.shape[1:] if len(batch) == 1 else batch.shape}")
    moved = np.ascontiguousarray(np.moveaxis(batch, could[0], 3))
    return moved[..., 0] if moved.shape[-1] == 1 else moved

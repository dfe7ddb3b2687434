"""A sentence as a picture: a cell for each token with what it says, so that maps lie on words as on
patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

CELL = 96, 26
"""Width and height of a token in pixels."""

LARGEST, SMALLEST = 17, 8
"""Sizes of letters: a word that is too long for its cell is written smaller, and then cut."""

INK, PAPER, MARK, RULE = (24, 24, 27), (255, 255, 255), (110, 110, 118), (218, 218, 224)
"""Colours of words, of what is behind them, of tokens that are no words, and between the cells."""


def written(words: Sequence[str], shape: tuple[int, int]) -> UInt8[NDArray[np.uint8], "height width 3"]:
    """What the tokens of a sentence say, in rows and columns.

    Args:
        words: by token, in reading order.
        shape: rows and columns.

    Example:
        >>> written(["[start]", "a", "cat", "[end]"], (4, 1)).shape
        (104, 96, 3)
    """
    (rows, columns), (width, height) = shape, CELL
    picture = Image.new("RGB", (columns * width, rows * height), PAPER)
    draw = ImageDraw.Draw(picture)
    for place, word in enumerate(words):
        left, top = place % columns * width, place // columns * height
        draw.rectangle((left, top, left + width - 1, top + height - 1), outline=RULE)
        said, size = _fitted(word.strip() or "\u2423")
        colour = MARK if word.startswith(("[", "<")) and word.endswith(("]", ">")) else INK
        centre = left + width / 2, top + height / 2
        draw.text(centre, said, font=_font(size), fill=colour, anchor="mm")
    return np.asarray(picture, dtype=np.uint8)


def is_written(picture: UInt8[NDArray[np.uint8], "height width 3"], shape: tuple[int, int]) -> bool:
    """Whether a picture is that of a sentence, in so many rows and columns.

    Example:
        >>> is_written(written(["[start]", "a", "cat", "[end]"], (4, 1)), (4, 1))
        True
    """
    (rows, columns), (width, height) = shape, CELL
    return picture.shape[:2] == (rows * height, columns * width)


def _fitted(word: str) -> tuple[str, int]:
    """A word, and the size of letters in which it fits; the longest are cut."""
    room = CELL[0] - 6
    for size in range(LARGEST, SMALLEST - 1, -1):
        if _font(size).getlength(word) <= room:
            return word, size
    while len(word) > 1 and _font(SMALLEST).getlength(f"{word}...") > room:
        word = word[:-1]
    return f"{word}...", SMALLEST


@lru_cache(maxsize=16)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own, which is the same everywhere."""
    return ImageFont.load_default(size)

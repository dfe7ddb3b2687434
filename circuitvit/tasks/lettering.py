"""A word as it lies on a picture: where, how large, and with what behind it, so that it can be read.

A word is a text, which is written with a font, or a picture of one. What is to be compared (a word, and a
neutral one in its place) gets one plate, as wide as the wider of the two, so that outside of the plate not a
pixel differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Bool
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont

from circuitvit.errors import DataError, FileError, OptionError, check_number, check_whole, unknown_name
from circuitvit.tasks.image_files import read_image
from circuitvit.tasks.pictures import name_of

Look = Literal["plate", "outline"]
"""A plate behind the letters, or an outline around them."""

Word = str | Path | Image.Image
"""A text to write; the path of a picture of a word, or the picture."""

Place = str | tuple[float, float]
"""A name out of `PLACES`, "random", or where the middle is, as shares of width and height."""

PLACES: dict[str, tuple[float, float]] = {
    "top left": (0.0, 0.0), "top": (0.5, 0.0), "top right": (1.0, 0.0),
    "left": (0.0, 0.5), "centre": (0.5, 0.5), "right": (1.0, 0.5),
    "bottom left": (0.0, 1.0), "bottom": (0.5, 1.0), "bottom right": (1.0, 1.0),
}  # fmt: skip
"""By name: the shares of the free room that are left of a word, and above it."""

RANDOM = "random"
FEWEST = 5
"""Pixels of a letter's height, below which it is a smudge."""

_TRIES = 100  # random places that are drawn for words which must not overlap
_LETTERS = 0.72  # height of the font, as a share of the plate's
_NO_LETTER = "\U0010ffff"  # in no font: it looks as everything does that a font lacks


class Box(NamedTuple):
    """Where a word lies, in pixels; right and bottom are the first that are outside."""

    left: int
    top: int
    right: int
    bottom: int

    def overlaps(self, other: Box) -> bool:
        """Whether the two have pixels in common."""
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom


class Layout(NamedTuple):
    """Where words lie on one picture, and whether they had to be made smaller to fit."""

    boxes: tuple[Box, ...]
    shrunk: bool


@dataclass(frozen=True)
class Lettering:
    """How words are put on pictures.

    Attributes:
        places: one or more.
        sizes: the height of each plate, as a share of the picture's shorter side.
        look: a plate behind the letters, or an outline around them.
        ink: the colour of the letters, by name or as "#rrggbb".
        ground: that of the plate or the outline.
        font: a file of a font; by default the one that comes with Pillow.
        seed: of random places.

    Raises:
        NameNotFoundError: for an unknown place or look.
        OptionError: for a size, a colour or numbers of a place that make no sense.
        FileError: if the font cannot be read.
    """

    places: tuple[Place, ...] = ("bottom",)
    sizes: tuple[float, ...] = (0.15,)
    look: Look = "plate"
    ink: str = "black"
    ground: str = "white"
    font: str | Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.places:
            raise OptionError("no place for the word: give one, such as 'bottom'")
        if len(self.sizes) not in (1, len(self.places)):
            raise OptionError(
                f"{len(self.sizes)} sizes for {len(self.places)} places: give one, or one for each"
            )
        if self.look not in get_args(Look):
            raise unknown_name("look", self.look, get_args(Look))
        object.__setattr__(self, "places", tuple(map(_known, self.places)))
        for size in self.sizes:
            check_number("the size of a word", size)
            if size > 1:
                raise OptionError(f"the size of a word is a share of the picture's shorter side, not {size}")
        for colour in (self.ink, self.ground):
            try:
                ImageColor.getrgb(colour)
            except (ValueError, AttributeError, TypeError) as error:
                raise OptionError(f"{colour!r} is no colour: give a name or '#rrggbb'") from error
        if self.look == "plate" and ImageColor.getrgb(self.ink) == ImageColor.getrgb(self.ground):
            raise OptionError(f"letters in {self.ink} cannot be seen on a plate in {self.ground}")
        check_whole("the seed of random places", self.seed, 0)
        font_of(self.font, 20)

    # -- where ---------------------------------------------------------------------------------------

    def lay(self, size: tuple[int, int], words: Sequence[Word], number: int = 0) -> Layout:
        """Where words go on a picture, each in the same boxes as the others.

        Args:
            size: of the picture, (width, height).
            words: of which one at a time will be there; checked, see `check_word`.
            number: of the picture, which with the seed decides random places.

        Raises:
            OptionError: if the letters would be too small to be letters, or words overlap.
        """
        rng = np.random.default_rng((self.seed, number))
        sizes = self.sizes * (len(self.places) if len(self.sizes) == 1 else 1)
        boxes: list[Box] = []
        shrunk = False
        for place, share in zip(self.places, sizes, strict=True):
            across, down, smaller = self._extent(size, words, share)
            shrunk |= smaller
            tries = (_at(place, size, (across, down), rng) for _ in range(_TRIES if place == RANDOM else 1))
            free = (box for box in tries if not any(box.overlaps(other) for other in boxes))
            if (found := next(free, None)) is None:
                raise OptionError(
                    f"the word at {place!r} would overlap another one: make size= smaller, or move them"
                )
            boxes.append(found)
        return Layout(tuple(boxes), shrunk)

    def _extent(self, size: tuple[int, int], words: Sequence[Word], share: float) -> tuple[int, int, bool]:
        """Width and height of the box that holds the widest of some words, and whether it had to shrink."""
        room = size[0] - 2 * _margin(size)
        height = wanted = max(1, round(share * min(size)))
        while (width := max(self._width(word, height) for word in words)) > room and height > 1:
            height = max(1, min(height - 1, int(height * room / width)))
        letters = height * _LETTERS
        if letters < FEWEST and any(isinstance(word, str) for word in words):
            widest = max(words, key=lambda word: self._width(word, wanted))
            why = (
                f"{called(widest)!r} is too long for it"
                if height < wanted
                else f"size={share:g} is too small"
            )
            raise OptionError(
                f"letters of {letters:.0f} pixels cannot be read on a picture of {size[0]} x {size[1]}: {why}"
            )
        return width, height, height < wanted

    def _width(self, word: Word, height: int) -> int:
        if isinstance(word, str):
            return round(font_of(self.font, _points(height)).getlength(word) + height / 2)
        picture = picture_of(word)
        return max(1, round(picture.width * height / picture.height))

    # -- drawing -------------------------------------------------------------------------------------

    def draw(self, size: tuple[int, int], word: Word, boxes: Sequence[Box]) -> Image.Image:
        """A word in its boxes, clear everywhere else: mode "RGBA", of the picture's size."""
        drawn = Image.new("RGBA", size)
        pen = ImageDraw.Draw(drawn)
        for box in boxes:
            left, top, right, bottom = box
            height = bottom - top
            if self.look == "plate":
                pen.rectangle((left, top, right - 1, bottom - 1), fill=self.ground)
            if isinstance(word, str):
                font = font_of(self.font, _points(height))
                edge = max(1, round(height / 18)) if self.look == "outline" else 0
                middle = (left + right) / 2, (top + bottom) / 2
                pen.text(
                    middle, word, self.ink, font, anchor="mm", stroke_width=edge, stroke_fill=self.ground
                )
            else:
                shown = picture_of(word).resize((self._width(word, height), height), Image.Resampling.BICUBIC)
                drawn.alpha_composite(shown, (left + (right - left - shown.width) // 2, top))
        return _inside(drawn, boxes)


def covered(size: tuple[int, int], boxes: Sequence[Box]) -> Bool[NDArray[np.bool_], "height width"]:
    """Which pixels of a picture (width, height) lie in boxes."""
    found = np.zeros((size[1], size[0]), dtype=bool)
    for left, top, right, bottom in boxes:
        found[top:bottom, left:right] = True
    return found


# -- words ---------------------------------------------------------------------------------------


def check_word(word: Any, font: str | Path | None = None) -> Word:
    """A word that can be drawn: texts without space around them, arrays of pixels as pictures.

    Raises:
        OptionError: for an empty text, one of several lines, and what is neither text nor picture.
        DataError: if the font lacks one of its letters, which is named, or a picture cannot be read.
    """
    if isinstance(word, (Path, Image.Image)):
        picture_of(word)
        return word
    if not isinstance(word, str):
        raise OptionError(
            f"a word is a text, or a picture of one (a Path or a picture of Pillow), not {word!r}"
        )
    text = word.strip()
    if not text:
        raise OptionError("an empty word: the image without any is there in any case (`without`)")
    if len(text.splitlines()) > 1 or not text.isprintable():
        raise OptionError(f"{word!r} is no word of one line that can be written")
    own = font_of(font, 40)
    lacking = bytes(own.getmask(_NO_LETTER))
    lost = [
        sign for sign in dict.fromkeys(text) if not sign.isspace() and bytes(own.getmask(sign)) == lacking
    ]
    if lost:
        which = "the font that comes with Pillow" if font is None else f"the font {font}"
        raise DataError(
            f"{which} has no {', '.join(lost)} (of {text!r}): give font=, a file of one that has, or a "
            "picture of the word"
        )
    return text


def called(word: Word) -> str:
    """What to call a word: a text is its own name, a picture has that of its file."""
    if isinstance(word, str):
        return word
    return Path(word).stem if isinstance(word, Path) else Path(name_of(word, 0)).stem


@lru_cache(maxsize=64)
def font_of(path: str | Path | None, points: int) -> ImageFont.FreeTypeFont:
    """A font of a size in pixels.

    Raises:
        FileError: if the file is no font, or Pillow was built without fonts.
    """
    try:
        if path is not None:
            return ImageFont.truetype(str(path), points)
        font = ImageFont.load_default(points)
    except (OSError, ImportError) as error:
        raise FileError(f"cannot write with the font {path or 'of Pillow'}: {error}") from error
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise FileError(
            "Pillow was built without FreeType, so no words can be written: give pictures of words"
        )
    return font


def picture_of(word: Path | Image.Image) -> Image.Image:
    """The picture of a word, in mode "RGBA".

    Raises:
        DataError: if it cannot be read.
    """
    return _read(word) if isinstance(word, Path) else word.convert("RGBA")


@lru_cache(maxsize=64)
def _read(path: Path) -> Image.Image:
    return read_image(path).convert("RGBA")


# -- places --------------------------------------------------------------------------------------


def as_places(place: Place | Sequence[Place]) -> tuple[Place, ...]:
    """One place, or several, as several."""
    if isinstance(place, str) or _is_pair(place):
        return (place,)  # type: ignore[return-value]  # a pair of numbers is one place
    if not isinstance(place, Sequence):
        raise unknown_name("place", place, (*PLACES, RANDOM))
    return tuple(place)  # type: ignore[arg-type]


def as_sizes(size: float | Sequence[float]) -> tuple[float, ...]:
    """One size, or one for each place, as several."""
    return tuple(size) if isinstance(size, (list, tuple, np.ndarray)) else (size,)  # type: ignore[return-value]


def _is_pair(place: Any) -> bool:
    return isinstance(place, tuple) and len(place) == 2 and all(isinstance(at, (int, float)) for at in place)


def _known(place: Any) -> Place:
    if _is_pair(place):
        for share in place:
            if not 0 <= share <= 1:
                raise OptionError(f"the middle of a word is given as shares of width and height, not {place}")
        return float(place[0]), float(place[1])
    words = str(place).lower().replace("-", " ").replace("_", " ")
    name = " ".join("centre" if word in ("center", "middle") else word for word in words.split())
    if name not in (*PLACES, RANDOM):
        raise unknown_name("place", place, (*PLACES, RANDOM))
    return name


def _at(place: Place, size: tuple[int, int], extent: tuple[int, int], rng: np.random.Generator) -> Box:
    """The box of a place: inside of the picture, with a margin where its name says an edge."""
    margin = _margin(size)
    rooms = [max(0, side - own - 2 * margin) for side, own in zip(size, extent, strict=True)]
    if place == RANDOM:
        left, top = (margin + int(rng.integers(room + 1)) for room in rooms)
    elif isinstance(place, str):
        left, top = (margin + round(share * room) for share, room in zip(PLACES[place], rooms, strict=True))
    else:
        left, top = (
            round(min(max(share * side - own / 2, 0), max(0, side - own)))
            for share, side, own in zip(place, size, extent, strict=True)
        )
    left, top = min(left, max(0, size[0] - extent[0])), min(top, max(0, size[1] - extent[1]))
    return Box(left, top, min(left + extent[0], size[0]), min(top + extent[1], size[1]))


def _margin(size: tuple[int, int]) -> int:
    return round(0.02 * min(size))


def _points(height: int) -> int:
    return max(1, round(height * _LETTERS))


def _inside(drawn: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """What was drawn, without what runs over the edge of its box."""
    outside = Image.fromarray(~covered(drawn.size, boxes))
    drawn.paste((0, 0, 0, 0), (0, 0), outside)
    return drawn

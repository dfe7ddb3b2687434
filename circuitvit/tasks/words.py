"""Words pasted on photographs: does a model look, or does it read?

The same image three times: with a word, with a neutral word on the same plate, and without any. Outside of
the plate not a pixel differs, so that what changes between the first two is what the letters say. That is a
counterfactual for a circuit that reads; and a wrong word is the typographic attack (Goh et al. 2021,
"Multimodal Neurons in Artificial Neural Networks", Distill).

Example:
    >>> import circuitvit as cv
    >>> from circuitvit.datasets.catdog import catdog_pairs
    >>> model, photos = cv.load("catdog-tiny"), catdog_pairs(3, seed=0).clean
    >>> signs = paste(model, photos, "dog", neutral="sign", place="top", size=0.3)
    >>> signs
    Pasted('dog' (or 'sign', or nothing) on 3 images)
    >>> signs.task(cv.logit_diff("dog", "cat")).prepare(model).label
    '3 pairs, logit difference (dog - cat), patch ablation, noising'
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from circuitvit.errors import DataError, OptionError, UnsupportedModelError, counted, unknown_name
from circuitvit.models import Model
from circuitvit.models.zoo import ClipSpec, InputSpec
from circuitvit.tasks.corruptions import mask_as_seen
from circuitvit.tasks.groups import TokenGroups
from circuitvit.tasks.image_files import flatten, naming, preprocess, read_image
from circuitvit.tasks.images import FileImages, HeldImages, Images, ImageSpec, as_images
from circuitvit.tasks.lettering import (
    Box,
    Lettering,
    Look,
    Place,
    Word,
    as_places,
    called,
    check_word,
    covered,
)
from circuitvit.tasks.task import Task, check_size

Version = Literal["word", "neutral", "without"]
"""An image with the word, with the neutral word, and as it is."""

On = Literal["picture", "view"]

LEAST_COVER = 0.2
"""Share of a patch that a plate covers, from which on the patch has text on it."""


@dataclass(frozen=True, eq=False, repr=False)
class Pasted:
    """Images with a word, with a neutral one, and without: made when they are needed.

    Attributes:
        model: whose preprocessing and patches are meant.
        source: where the images come from.
        rows: which of them are meant.
        words: what is pasted, one for each image.
        neutral: what comes in its place, likewise; None where there is nothing neutral.
        lettering: how it is written.
        boxes: where it is on each image, in pixels of the picture (or of the view).
        mask: where the model sees it, `(image, height, width)`.
        on: "picture" where it was pasted before preprocessing, "view" where afterwards.
        caveats: what to bear in mind: words that were made smaller, or are cut off.
    """

    model: Model
    source: Images
    rows: tuple[int, ...]
    words: tuple[Word, ...]
    neutral: tuple[Word, ...] | None
    lettering: Lettering
    boxes: tuple[tuple[Box, ...], ...]
    mask: Bool[Tensor, "image height width"]
    on: On
    caveats: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the images."""
        names = self.source.names
        return tuple(names[row] for row in self.rows)

    @property
    def versions(self) -> tuple[Version, ...]:
        """What there is, from the image as it is to the one with the word."""
        return ("without", "word") if self.neutral is None else ("without", "neutral", "word")

    def images(self, version: Version = "word") -> Images:
        """The images in one version, which go wherever images do.

        Raises:
            NameNotFoundError: for another version, or "neutral" where no neutral word was given.
        """
        if version not in self.versions:
            raise unknown_name("version of the images", version, self.versions)
        return PastedImages(self, version)

    def task(self, metric: Any = "logit_diff", *, against: Version | None = None, **options: Any) -> Task:
        """The behaviour of reading: clean images have the word, corrupt ones the neutral one, or none.

        Args:
            metric: as for `Task`, such as `logit_diff("dog", "cat")`.
            against: "neutral" or "without"; the neutral word where there is one.
            **options: as for `Task`.

        Raises:
            NameNotFoundError: for a version that there is not.
        """
        other: Version = against or ("without" if self.neutral is None else "neutral")
        if other == "word":
            raise OptionError("clean images have the word already: against='neutral' or 'without'")
        said = "nothing" if other == "without" else _said(self.neutral or ())
        how = f"{_said(self.words)} pasted on each image, and {said} in its place"
        return Task(self.images(), self.images(other), metric, pairing=how, **options)

    def groups(self, threshold: float = LEAST_COVER) -> TokenGroups:
        """The patches that have the word on them, as the token group "word".

        Args:
            threshold: the share of a patch that must be covered.

        Raises:
            DataError: if the model's patches form no grid, or none is covered so far.
        """
        return TokenGroups.from_masks(self.model, {"word": self.mask}, threshold)

    def tokens(self, threshold: float = LEAST_COVER) -> Bool[Tensor, "image token"]:
        """Which tokens have the word on them; every image has at least one.

        Raises:
            DataError: as `groups`, and for an image of whose patches none is covered so far.
        """
        groups = self.groups(threshold)
        found = groups.members == groups.names.index("word")
        if not found.any(dim=1).all():
            first = self.names[int((~found.any(dim=1)).nonzero()[0, 0])]
            raise DataError(
                f"no patch of {first} is covered to {threshold:.0%} by the word: write it larger (size=), "
                "or lower the threshold"
            )
        return found

    def select(self, rows: Sequence[int]) -> Pasted:
        """The same for some of the images, by their places."""
        own = [int(row) for row in rows]
        return replace(
            self,
            rows=tuple(self.rows[row] for row in own),
            words=tuple(self.words[row] for row in own),
            neutral=None if self.neutral is None else tuple(self.neutral[row] for row in own),
            boxes=tuple(self.boxes[row] for row in own),
            mask=self.mask[own],
        )

    def __repr__(self) -> str:
        others = "or nothing" if self.neutral is None else f"or {_said(self.neutral)}, or nothing"
        return (
            f"Pasted({_said(self.words)} ({others}) on {counted(len(self), self.model.preprocessing.what)})"
        )

    def made(self, row: int, version: Version) -> Float[Tensor, "*shape"]:
        """One image in one version, as the model takes it."""
        spec, place = self.model.preprocessing, self.rows[row]
        words = {"word": self.words, "neutral": self.neutral}.get(version)
        with naming(self.names[row]):
            if self.on == "view":
                image = self.source.take(place, place + 1)[0]
                size = image.shape[-1], image.shape[-2]
                return image if words is None else _over(image, self._drawn(words[row], size, row), spec)
            picture = _picture(self.source, place, spec.size[0])
            if words is not None:
                drawn = self._drawn(words[row], picture.size, row)
                picture.paste(drawn.convert(picture.mode), (0, 0), drawn.getchannel("A"))
            return preprocess(picture, spec)

    def _drawn(self, word: Word, size: tuple[int, int], row: int) -> Image.Image:
        return self.lettering.draw(size, word, self.boxes[row])


@dataclass(frozen=True, eq=False, repr=False)
class PastedImages(Images):
    """One version of pasted images."""

    pasted: Pasted
    version: Version

    def __len__(self) -> int:
        return len(self.pasted)

    def take(self, start: int, stop: int) -> Float[Tensor, "image *shape"]:
        made = [self.pasted.made(row, self.version) for row in range(*slice(start, stop).indices(len(self)))]
        return torch.stack(made) if made else torch.empty(0, *self.shape)

    @property
    def names(self) -> tuple[str, ...]:
        return self.pasted.names

    @property
    def shape(self) -> tuple[int, ...]:
        return self.pasted.source.shape

    def check(self, progress: bool = True) -> None:
        """Nothing is left to find out: every image was read when the place of its word was looked for."""

    def __repr__(self) -> str:
        return f"PastedImages({self.version} of {self.pasted!r})"


def paste(
    model: Model,
    images: ImageSpec,
    word: Word | Sequence[Word],
    *,
    neutral: Word | Sequence[Word] | None = None,
    place: Place | Sequence[Place] = "bottom",
    size: float | Sequence[float] = 0.15,
    look: Look = "plate",
    ink: str = "black",
    ground: str = "white",
    font: Any = None,
    on: On = "view",
    seed: int = 0,
) -> Pasted:
    """Paste a word on images, to be compared with a neutral word and with none.

    A word that is too long for a picture is made smaller until it fits, and this is said.

    Args:
        model: whose preprocessing and patches are meant.
        images: a folder, paths, pictures, or a preprocessed tensor.
        word: a text, or a picture of a word: a `Path` or a picture of Pillow; a list has one for each image.
        neutral: what is pasted in its place for comparison, likewise: something that names no class.
        place: "top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom",
            "bottom right", "random", or the middle as shares of width and height: `(0.5, 0.8)`. A list puts
            the word at several places.
        size: the height of the plate as a share of the picture's shorter side; a list for several places.
        look: "plate" or "outline".
        ink: colour of the letters, by name or as "#rrggbb".
        ground: colour of the plate, or of the outline.
        font: a file of a font; the one that comes with Pillow by default.
        on: "view" pastes on what the model sees, of which nothing is cropped; "picture" before the picture is
            resized and cropped, as a photographed sign would be. Preprocessed tensors and clips are views
            already.
        seed: of random places.

    Raises:
        OptionError: for an empty word, an unknown way to write, and letters too small to be read.
        DataError: for an image that cannot be read, a letter that the font lacks, and a word that
            preprocessing crops away: the message names the image.
        UnsupportedModelError: if the model's inputs are no pictures.

    Example:
        >>> import circuitvit as cv
        >>> photo = Image.new("RGB", (120, 90), "teal")
        >>> signs = paste(cv.load("catdog-tiny"), photo, "dog", place=["top", "bottom"], size=0.25)
        >>> signs.groups()
        TokenGroups(cls: 1, word: 12, patch: 24, in 1 images)
    """
    spec = model.preprocessing
    if spec.what not in ("image", "clip"):
        raise UnsupportedModelError(
            f"words are pasted on pictures, and the inputs of {model.name} are {spec.what}s"
        )
    if on not in get_args(On):
        raise unknown_name("thing to paste on", on, get_args(On))
    sizes = (size,) if isinstance(size, (int, float)) else tuple(size)
    lettering = Lettering(as_places(place), sizes, look, ink, ground, font, seed)
    source = as_images(images, spec)
    source.check(progress=False)
    check_size(source, model)
    words = _one_each(word, len(source), "words", font)
    others = None if neutral is None else _one_each(neutral, len(source), "neutral words", font)
    same = [row for row, own in enumerate(words) if others is not None and own == others[row]]
    if same:
        raise OptionError(f"the neutral word of {source.names[same[0]]} is the word itself: give another one")
    at_hand = isinstance(source, (FileImages, HeldImages)) and not isinstance(spec, ClipSpec)
    where: On = "picture" if on == "picture" and at_hand else "view"
    boxes, masks = [], []
    shrunk, cut = [], []
    for row, name in enumerate(source.names):
        extent = (source.shape[-1], source.shape[-2])
        if where == "picture":
            extent = _picture(source, row, spec.size[0]).size
        each = (words[row],) if others is None else (words[row], others[row])
        with naming(name):
            laid = lettering.lay(extent, each, row)
            seen, is_cut = _seen(extent, laid.boxes, spec, where)
        boxes.append(laid.boxes)
        masks.append(seen)
        shrunk += [name] if laid.shrunk else []
        cut += [name] if is_cut else []
    return Pasted(
        model=model,
        source=source,
        rows=tuple(range(len(source))),
        words=words,
        neutral=others,
        lettering=lettering,
        boxes=tuple(boxes),
        mask=torch.stack(masks),
        on=where,
        caveats=_caveats(len(source), shrunk, cut),
    )


def write(
    images: Float[Tensor, "*image channel height width"],
    word: Word,
    preprocessing: InputSpec,
    *,
    place: Place | Sequence[Place] = "bottom",
    size: float | Sequence[float] = 0.15,
    look: Look = "plate",
    ink: str = "black",
    ground: str = "white",
    font: Any = None,
    seed: int = 0,
) -> Float[Tensor, "*image channel height width"]:
    """Write a word on preprocessed images: a corruption, as those of `circuitvit.tasks.corruptions` are.

    Good for a counterfactual without a photograph: all pixels but those of the plate stay. Bad in that a
    plate also hides what is behind it, and shows a model that cannot read a white rectangle: compare with a
    neutral word (see `paste`) before believing that anything was read.

    Args:
        images: one image or a batch, preprocessed.
        word: a text, or a picture of a word.
        preprocessing: the model's, by which colours become numbers: `model.preprocessing`.
        place: as for `paste`; a random one is the same for all images.
        size: as for `paste`.
        look: "plate" or "outline".
        ink: colour of the letters.
        ground: colour of the plate or the outline.
        font: a file of a font.
        seed: of random places.

    Raises:
        OptionError, DataError: as `paste`.

    Example:
        >>> from functools import partial
        >>> import circuitvit as cv
        >>> model = cv.load("catdog-tiny")
        >>> corrupt = partial(write, word="dog", preprocessing=model.preprocessing, size=0.3)
        >>> task = cv.Task(torch.zeros(2, 3, 48, 48), corrupt, metric="logit_diff")
    """
    sizes = (size,) if isinstance(size, (int, float)) else tuple(size)
    lettering = Lettering(as_places(place), sizes, look, ink, ground, font, seed)
    own = check_word(word, font)
    extent = images.shape[-1], images.shape[-2]
    return _over(images, lettering.draw(extent, own, lettering.lay(extent, (own,)).boxes), preprocessing)


# -- inside --------------------------------------------------------------------------------------


def _one_each(word: Any, count: int, what: str, font: Any) -> tuple[Word, ...]:
    if not isinstance(word, (list, tuple)):
        return (check_word(word, font),) * count
    if len(word) != count:
        raise OptionError(f"{len(word)} {what} for {counted(count, 'image')}: give one, or one for each")
    return tuple(check_word(each, font) for each in word)


def _said(words: Sequence[Word]) -> str:
    """A few of the words."""
    names = list(dict.fromkeys(repr(called(word)) for word in words))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _picture(source: Images, row: int, channels: int) -> Image.Image:
    """One image before preprocessing, upright, in 8-bit colours; a copy."""
    if isinstance(source, FileImages):
        return read_image(source.paths[row], channels)
    assert isinstance(source, HeldImages), "others are pasted on as the model sees them"
    return flatten(source.pictures[row], channels).copy()


def _over(
    images: Float[Tensor, "*image channel height width"], drawn: Image.Image, spec: InputSpec
) -> Float[Tensor, "*image channel height width"]:
    """A drawing laid over preprocessed images; where it is clear they stay bit by bit."""
    grey = images.shape[-3] == 1
    pixels = np.asarray(drawn.convert("LA") if grey else drawn, dtype=np.float32) / 255
    numbers = torch.from_numpy(pixels).to(images).movedim(-1, 0)
    mean, std = (torch.tensor(each).to(images).reshape(-1, 1, 1) for each in (spec.mean, spec.std))
    colours, alpha = (numbers[:-1] - mean) / std, numbers[-1:]
    return torch.where(alpha > 0, images * (1 - alpha) + colours * alpha, images)


def _seen(
    extent: tuple[int, int], boxes: Sequence[Box], spec: InputSpec, on: On
) -> tuple[Bool[Tensor, "height width"], bool]:
    """Where the model sees words, and whether some are cut off.

    Raises:
        DataError: if it does not see one of them.
    """
    each, is_cut = [], False
    for box in boxes:
        own = covered(extent, [box])
        seen = torch.from_numpy(own) if on == "view" else mask_as_seen(own, spec)
        if not seen.any():
            raise DataError(
                "preprocessing crops the word away, as it keeps the middle of a picture: move it towards the "
                "middle (place=), or paste on what the model sees (on='view')"
            )
        at_edge = any(bool(side.any()) for side in (seen[0], seen[-1], seen[:, 0], seen[:, -1]))
        within = box.left > 0 and box.top > 0 and box.right < extent[0] and box.bottom < extent[1]
        is_cut |= at_edge and within
        each.append(seen)
    return torch.stack(each).any(dim=0), is_cut


def _caveats(count: int, shrunk: Sequence[str], cut: Sequence[str]) -> tuple[str, ...]:
    said = []
    if shrunk:
        said.append(
            f"the word was too long for {len(shrunk)} of {counted(count, 'image')}, and made smaller to fit"
        )
    if cut:
        said.append(
            f"preprocessing cuts the word off in {len(cut)} of {counted(count, 'image')}, first {cut[0]}: "
            "move it towards the middle, or paste with on='view'"
        )
    return tuple(said)

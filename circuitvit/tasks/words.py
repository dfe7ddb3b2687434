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
    '3 pairs, logit_diff(dog, cat), patch ablation, noising'
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
from circuitvit.tasks.image_files import flatten, naming, preprocess, read_image
from circuitvit.tasks.images import FileImages, HeldImages, Images, ImageSpec, as_images
from circuitvit.tasks.lettering import (
    Box,
    Lettering,
    Look,
    Place,
    Word,
    as_places,
    as_sizes,
    check_word,
    covered,
)
from circuitvit.tasks.task import check_size
from circuitvit.tasks.with_words import VERSIONS, GivenWords, Version, WithWords, as_masks, listed

On = Literal["picture", "view"]


@dataclass(frozen=True, eq=False, repr=False)
class Pasted(WithWords):
    """Images with a word, with a neutral one, and without: made when they are needed.

    Attributes:
        source: where the images come from.
        rows: which of them are meant.
        neutral: what comes in place of the words, one for each image; None where there is nothing neutral.
        lettering: how they are written.
        boxes: where they are on each image, in pixels of the picture (or of the view).
        on: "picture" where they were pasted before preprocessing, "view" where afterwards.
    """

    source: Images
    rows: tuple[int, ...]
    neutral: tuple[Word, ...] | None
    lettering: Lettering
    boxes: tuple[tuple[Box, ...], ...]
    on: On

    @property
    def names(self) -> tuple[str, ...]:
        names = self.source.names
        return tuple(names[row] for row in self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def versions(self) -> tuple[Version, ...]:
        return VERSIONS[::2] if self.neutral is None else VERSIONS

    def said(self, version: Version) -> str:
        words = {"word": self.words, "neutral": self.neutral}.get(version)
        return "nothing" if words is None else listed(words)

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
        others = "or nothing" if self.neutral is None else f"or {listed(self.neutral)}, or nothing"
        return (
            f"Pasted({listed(self.words)} ({others}) on {counted(len(self), self.model.preprocessing.what)})"
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
        TokenGroups(cls: 1, word: 16, patch: 20, in 1 images)
    """
    spec = model.preprocessing
    if spec.what not in ("image", "clip"):
        raise UnsupportedModelError(
            f"words are pasted on pictures, and the inputs of {model.name} are {spec.what}s"
        )
    if on not in get_args(On):
        raise unknown_name("thing to paste on", on, get_args(On))
    lettering = Lettering(as_places(place), as_sizes(size), look, ink, ground, font, seed)
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


def given(
    model: Model,
    images: ImageSpec,
    without: ImageSpec,
    word: Word | Sequence[Word],
    *,
    neutral: ImageSpec | None = None,
    mask: Bool[Tensor, "*image height width"],
) -> GivenWords:
    """Images that have words on them already: photographed signs and notes, drawn scenes, published attacks.

    Args:
        model: whose preprocessing and patches are meant.
        images: with the words.
        without: the same ones without, in the same order.
        word: what they say: one text for all, or one for each.
        neutral: the same images with neutral words.
        mask: where the words are as the model sees it, `(height, width)` for all or `(image, height, width)`;
            `circuitvit.tasks.corruptions.read_mask` makes one of a file.

    Raises:
        DataError: if images cannot be read, or are not as many or of the same size.
        OptionError: for another number of words.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> photos, mask = catdog_pairs(2, seed=0).clean, torch.zeros(48, 48, dtype=torch.bool)
        >>> mask[:8] = True
        >>> given(cv.load("catdog-tiny"), photos.where(~mask, 1.0), photos, "dog", mask=mask)
        GivenWords('dog' (or nothing) on 2 images)
    """
    each = {"without": without, "neutral": neutral, "word": images}
    sources = {name: source for name, source in each.items() if source is not None}
    found = {name: as_images(source, model.preprocessing) for name, source in sources.items()}
    for name, source in found.items():
        source.check(progress=False)
        check_size(source, model)
        if len(source) != len(found["word"]) or source.shape != found["word"].shape:
            raise DataError(
                f"images with words are {len(found['word'])} of {found['word'].shape}, and those of the "
                f"version {name!r} {len(source)} of {source.shape}: they must be alike"
            )
    count = len(found["word"])
    return GivenWords(
        model=model,
        words=_one_each(word, count, "words", None, drawn=False),
        mask=as_masks(mask, count, found["word"].shape),
        caveats=(),
        sources=found,
        rows=tuple(range(count)),
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
    lettering = Lettering(as_places(place), as_sizes(size), look, ink, ground, font, seed)
    own = check_word(word, font)
    extent = images.shape[-1], images.shape[-2]
    return _over(images, lettering.draw(extent, own, lettering.lay(extent, (own,)).boxes), preprocessing)


# -- inside --------------------------------------------------------------------------------------


def _one_each(word: Any, count: int, what: str, font: Any, drawn: bool = True) -> tuple[Word, ...]:
    if not isinstance(word, (list, tuple)):
        return ((check_word(word, font) if drawn else word),) * count
    if len(word) != count:
        raise OptionError(f"{len(word)} {what} for {counted(count, 'image')}: give one, or one for each")
    return tuple(check_word(each, font) if drawn else each for each in word)


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

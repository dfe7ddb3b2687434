"""Images in versions: with a word on them, with a neutral word, and without, and where the word is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitvit.errors import DataError, OptionError, counted, unknown_name
from circuitvit.models import Model
from circuitvit.tasks.groups import TokenGroups
from circuitvit.tasks.images import Images
from circuitvit.tasks.lettering import Word, called
from circuitvit.tasks.task import Task

Version = Literal["without", "neutral", "word"]
"""An image as it is, with a neutral word, and with the word."""

Own = TypeVar("Own", bound="WithWords")

VERSIONS: tuple[Version, ...] = ("without", "neutral", "word")

LEAST_COVER = 0.2
"""Share of a patch that is covered, from which on the patch has the word on it."""


@dataclass(frozen=True, eq=False, repr=False)
class WithWords(ABC):
    """Images with a word on them, and their counterfactuals; made when they are needed.

    Attributes:
        model: whose preprocessing and patches are meant.
        words: what is written, one for each image.
        mask: where the model sees it, `(image, height, width)`.
        caveats: what to bear in mind: words that were made smaller, or are cut off.
    """

    model: Model
    words: tuple[Word, ...]
    mask: Bool[Tensor, "image height width"]
    caveats: tuple[str, ...]

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Of the images."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of one image, as the model takes it."""

    @property
    @abstractmethod
    def versions(self) -> tuple[Version, ...]:
        """What there is, from the image as it is to the one with the word."""

    @abstractmethod
    def made(self, row: int, version: Version) -> Float[Tensor, "*shape"]:
        """One image in one version, as the model takes it."""

    @abstractmethod
    def said(self, version: Version) -> str:
        """What is written in a version, for people."""

    @abstractmethod
    def select(self: Own, rows: Sequence[int]) -> Own:
        """The same for some of the images, by their places."""

    def __len__(self) -> int:
        return len(self.words)

    def images(self, version: Version = "word") -> Images:
        """The images in one version, which go wherever images do.

        Raises:
            NameNotFoundError: for another version, or "neutral" where no neutral word was given.
        """
        if version not in self.versions:
            raise unknown_name("version of the images", version, self.versions)
        return WordImages(self, version)

    def task(self, metric: Any = "logit_diff", *, against: Version | None = None, **options: Any) -> Task:
        """The behaviour of reading: clean images have the word, corrupt ones the neutral one, or none.

        Args:
            metric: as for `Task`, such as `logit_diff("dog", "cat")`.
            against: "neutral" or "without"; the neutral word where there is one.
            **options: as for `Task`.

        Raises:
            NameNotFoundError: for a version that there is not.
        """
        other: Version = against or ("without" if "neutral" not in self.versions else "neutral")
        if other == "word":
            raise OptionError("clean images have the word already: against='neutral' or 'without'")
        how = f"{self.said('word')} written on each image, and {self.said(other)} in its place"
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

    def __repr__(self) -> str:
        others = ", ".join(f"or {self.said(version)}" for version in reversed(self.versions[:-1]))
        what = counted(len(self), self.model.preprocessing.what)
        return f"{type(self).__name__}({self.said('word')} ({others}) on {what})"


@dataclass(frozen=True, eq=False, repr=False)
class WordImages(Images):
    """One version of images with words."""

    whole: WithWords
    version: Version

    def __len__(self) -> int:
        return len(self.whole)

    def take(self, start: int, stop: int) -> Float[Tensor, "image *shape"]:
        made = [self.whole.made(row, self.version) for row in range(*slice(start, stop).indices(len(self)))]
        return torch.stack(made) if made else torch.empty(0, *self.shape)

    @property
    def names(self) -> tuple[str, ...]:
        return self.whole.names

    @property
    def shape(self) -> tuple[int, ...]:
        return self.whole.shape

    def check(self, progress: bool = True) -> None:
        """Nothing is left to find out: every image was read when its word was."""

    def __repr__(self) -> str:
        return f"WordImages({self.version} of {self.whole!r})"


@dataclass(frozen=True, eq=False, repr=False)
class GivenWords(WithWords):
    """Images that have words on them already.

    Attributes:
        sources: the images of every version.
        rows: which of them are meant.
    """

    sources: Mapping[str, Images]
    rows: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        names = self.sources["word"].names
        return tuple(names[row] for row in self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.sources["word"].shape

    @property
    def versions(self) -> tuple[Version, ...]:
        return tuple(version for version in VERSIONS if version in self.sources)

    def said(self, version: Version) -> str:
        others = {"without": "nothing", "neutral": "a neutral word"}
        return others.get(version) or listed(self.words)

    def made(self, row: int, version: Version) -> Float[Tensor, "*shape"]:
        place = self.rows[row]
        return self.sources[version].take(place, place + 1)[0]

    def select(self, rows: Sequence[int]) -> GivenWords:
        own = [int(row) for row in rows]
        return replace(
            self,
            rows=tuple(self.rows[row] for row in own),
            words=tuple(self.words[row] for row in own),
            mask=self.mask[own],
        )


def as_masks(mask: Any, count: int, shape: tuple[int, ...]) -> Bool[Tensor, "image height width"]:
    """One mask for each image.

    Raises:
        DataError: if it does not fit them.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape[-2:] != shape[-2:]:
        raise DataError(
            f"where words are is a boolean mask of {' x '.join(map(str, shape[-2:]))} pixels, for all images "
            "or for each"
        )
    if mask.ndim == 2:
        return mask.expand(count, -1, -1)
    if mask.ndim != 3 or len(mask) != count:
        raise DataError(f"a mask of shape {tuple(mask.shape)} for {counted(count, 'image')}")
    return mask


def listed(words: Sequence[Word]) -> str:
    """A few of some words."""
    names = list(dict.fromkeys(repr(called(word)) for word in words))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

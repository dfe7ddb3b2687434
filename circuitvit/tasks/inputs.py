"""What every kind of inputs can do: images, clips and sentences alike."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor


class Images(ABC):
    """A fixed, ordered set of model inputs, taken a slice at a time, be it a tensor or files on a disk."""

    @abstractmethod
    def __len__(self) -> int:
        """How many images there are; at least 1."""

    @abstractmethod
    def take(self, start: int, stop: int) -> Float[Tensor, "image *shape"]:
        """Images `start` to `stop` (exclusive, as in a slice), in float32 on the CPU."""

    @property
    def slow(self) -> bool:
        """Whether taking them is work, such as decoding, that is better done while a model runs."""
        return False

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """What to call each image in messages and reports."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of each image: (channels, height, width), and of clips (frames, channels, height, width)."""

    @abstractmethod
    def check(self, progress: bool = True) -> None:
        """Find out now, before long work, whether every image can be read.

        Files are decoded once; `progress` shows a bar when that takes more than a second.

        Raises:
            DataError: for the first image that cannot be read; the message names it.
        """


def fingerprint(images: Float[Tensor, "image *shape"]) -> bytes:
    """The same for images that are equal pixel by pixel."""
    return hashlib.sha256(images.contiguous().numpy().tobytes()).digest()


def fingerprint_in_order(images: Images) -> str:
    """The same for the same images in the same order."""
    each = (fingerprint(images.take(row, row + 1)) for row in range(len(images)))
    return hashlib.sha256(b"".join(each)).hexdigest()


def few(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"

"""Real handwritten digits, 8 x 8 pixels, from scikit-learn (an optional extra).

The set is the test part of the UCI "Optical Recognition of Handwritten Digits" data (E. Alpaydin and
C. Kaynak, 1998): 1797 digits by 13 people, each pixel a count from 0 to 16. It comes with scikit-learn, so
nothing is downloaded.

Example:
    >>> train, held_out = digits_split()
    >>> train.images.shape, held_out.images.shape
    (torch.Size([1438, 1, 8, 8]), torch.Size([359, 1, 8, 8]))
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from circuitvit.errors import DataError, OptionError, check_whole, unknown_name

CLASSES: tuple[str, ...] = tuple("0123456789")
"""Names of the classes, in the order of the logits of `digits-tiny`."""

SIZE = 8
"""Side of a picture in pixels: 4 x 4 patches of 2."""

MEAN = (0.5,)
STD = (0.5,)
"""What `digits-tiny` normalises with: ink in [0, 1] becomes a number in [-1, 1]."""

SPLIT_SEED = 0
"""The split that the bundled `digits-tiny` was trained and measured on."""


@dataclass(frozen=True, eq=False)
class Digits:
    """Some of the digits.

    Attributes:
        images: (n, 1, 8, 8) float32, preprocessed: -1 is paper, 1 is ink.
        labels: (n,) int64, 0 to 9.
        indices: (n,) int64, their numbers in scikit-learn's `load_digits`.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def of(self, digit: int) -> Digits:
        """Only the pictures of one digit."""
        chosen = self.labels == digit
        return Digits(self.images[chosen], self.labels[chosen], self.indices[chosen])


def digits_split(seed: int = SPLIT_SEED, held_out: float = 0.2) -> tuple[Digits, Digits]:
    """The digits, shuffled and cut into a part to train on and a part held out, each digit in proportion.

    Args:
        seed: the same seed always gives the same split.
        held_out: fraction that is held out.

    Returns:
        The training part and the held-out part.

    Raises:
        DataError: when scikit-learn is not installed.
        OptionError: for a fraction outside 0..1.
    """
    if not 0 < held_out < 1:
        raise OptionError(f"held_out is a fraction between 0 and 1, not {held_out}")
    images, labels = _load()
    rng = np.random.default_rng(seed)
    parts: tuple[list[int], list[int]] = ([], [])
    for digit in range(len(CLASSES)):
        members = rng.permutation(np.flatnonzero(labels == digit)).tolist()
        cut = round(len(members) * held_out)
        parts[1].extend(members[:cut])
        parts[0].extend(members[cut:])
    train, kept_back = (_select(images, labels, np.sort(rng.permutation(part))) for part in parts)
    return train, kept_back


@dataclass(frozen=True, eq=False)
class DigitPairs:
    """Pictures of a digit and of another that is most like each; unpacks as `clean, corrupt`.

    Attributes:
        clean: (n, 1, 8, 8) float32.
        corrupt: (n, 1, 8, 8) float32.
        clean_indices: (n,) int64, numbers of the clean pictures in scikit-learn's `load_digits`.
        corrupt_indices: (n,) int64, of the corrupt ones; one may be the most similar to several.
    """

    clean: Tensor
    corrupt: Tensor
    clean_indices: Tensor
    corrupt_indices: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.clean, self.corrupt))

    def __len__(self) -> int:
        return len(self.clean)


def digits_pairs(
    n: int,
    seed: int = 0,
    clean: int | str = 3,
    corrupt: int | str = 8,
    *,
    preprocessed: bool = True,
) -> DigitPairs:
    """`n` pairs of held-out pictures of two digits: each clean one with the most similar corrupt one.

    Real digits have no exact counterfactuals, as `catdog_pairs` has. The picture of the other digit that
    differs least (in squared ink) is the nearest there is.

    Args:
        n: how many pairs; at most as many as there are held-out pictures of `clean`, about 35.
        seed: which of the clean pictures are taken; the first ones do not depend on `n`.
        clean: the digit in the clean pictures, such as 3, or "3" as the classes of `digits-tiny` are called.
        corrupt: the digit in the corrupt pictures.
        preprocessed: True gives what the model takes (-1 is paper, 1 is ink); False gives ink in [0, 1], to
            look at.

    Raises:
        DataError: when scikit-learn is not installed, or n is more than there are.
        OptionError: for the same digit twice, or a negative seed.
        NameNotFoundError: for a digit that is none.

    Example:
        >>> import circuitvit as cv
        >>> task = cv.Task(*digits_pairs(4), metric=cv.logit_diff("3", "8"))
        >>> len(task.prepare(cv.load("digits-tiny")))
        4
    """
    check_whole("a seed", seed, 0)
    for digit in (clean, corrupt):
        if str(digit) not in CLASSES:
            raise unknown_name("digit", digit, CLASSES)
    if str(clean) == str(corrupt):
        raise OptionError(f"clean and corrupt are both {clean!r}, so the pairs would not differ")
    _, held_out = digits_split()
    ours, others = held_out.of(int(clean)), held_out.of(int(corrupt))
    check_whole("n", n)
    if n > len(ours):
        raise DataError(f"n is 1 to {len(ours)}, the number of held-out pictures of {clean}, not {n}")
    taken = torch.from_numpy(np.random.default_rng(seed).permutation(len(ours))[:n])
    pictures = ours.images[taken]
    nearest = (pictures[:, None] - others.images[None]).square().sum(dim=(2, 3, 4)).argmin(dim=1)
    sides = (pictures, others.images[nearest])
    if not preprocessed:
        sides = (sides[0] * STD[0] + MEAN[0], sides[1] * STD[0] + MEAN[0])
    return DigitPairs(*sides, ours.indices[taken], others.indices[nearest])


def _load() -> tuple[np.ndarray, np.ndarray]:
    """Ink (1797, 8, 8) in [0, 1] and labels (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the digits come with scikit-learn: pip install circuitvit[digits]") from error
    loaded = load_digits()
    return np.asarray(loaded.images, dtype=np.float32) / 16, np.asarray(loaded.target, dtype=np.int64)


def _select(images: np.ndarray, labels: np.ndarray, indices: np.ndarray) -> Digits:
    ink = torch.from_numpy(images[indices])[:, None]
    return Digits((ink - MEAN[0]) / STD[0], torch.from_numpy(labels[indices]), torch.from_numpy(indices))

"""Tokens by name: kinds, numbers, places among the patches, frames of a clip, groups, masks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from circuitvit.errors import DataError, OptionError

PATCH = "patch"

LATENT = "latent"
"""The kind of the tokens of a pool."""

TokenSpec = str | int | Sequence[str | int] | Tensor | None
"""Tokens: "cls+reg", a number, several of them, or a boolean mask `(token,)` or `(image, token)`; None for
all.
"""

Mask = Bool[Tensor, " token"] | Bool[Tensor, "image token"]


class Groups(Protocol):
    """What names tokens beyond their kinds: `circuitvit.TokenGroups`."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def members(self) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Chosen:
    """Which tokens are meant, whatever their number.

    Attributes:
        mask: of all tokens of an image of the model's own size, `(token,)` or `(image, token)`; None for all.
        kinds: where only these kinds are meant, wherever they are: such a choice fits any size of image.
    """

    mask: Mask | None = None
    kinds: tuple[str, ...] | None = None

    @property
    def images(self) -> int | None:
        """For how many images it is made; None for any."""
        return None if self.mask is None or self.mask.ndim == 1 else len(self.mask)

    @property
    def is_bound(self) -> bool:
        """Whether it holds for one size of image only."""
        return self.mask is not None and self.kinds is None

    def of(self, kinds: Sequence[str]) -> Mask | None:
        """The mask for tokens of these kinds, which may be the first of all tokens; None for all."""
        if self.kinds is not None:
            return torch.tensor([kind in self.kinds for kind in kinds])
        return None if self.mask is None else self.mask[..., : len(kinds)]


def chosen(
    spec: TokenSpec, kinds: Sequence[str], grid: Callable[[], tuple[int, ...]], groups: Groups | None = None
) -> Chosen:
    """What tokens are meant.

    Args:
        spec: see `TokenSpec`.
        kinds: of all tokens.
        grid: rows and columns of the patches, of a clip with time first.
        groups: whose names may be used.

    Raises:
        OptionError: if there are no such tokens.
    """
    if spec is None or spec == "all":
        return Chosen()
    if isinstance(spec, Tensor):
        return Chosen(_checked(spec, kinds))
    if not isinstance(spec, (int, str, Iterable)):
        raise OptionError(f"tokens are names, numbers or a boolean mask, not {spec!r}")
    words = [spec] if isinstance(spec, int) else spec.split("+") if isinstance(spec, str) else list(spec)
    words = [word.strip() if isinstance(word, str) else word for word in words]
    own = () if groups is None else groups.names  # such as those patches that no mask covers
    if words and all(word in kinds and word not in own for word in words):
        names = tuple(str(word) for word in words)
        return Chosen(torch.tensor([kind in names for kind in kinds]), names)
    masks = [_of_word(word, kinds, grid, groups) for word in words]
    if not masks:
        raise OptionError("no tokens are named: leave them out for all, or name some, such as 'cls'")
    together = masks[0]
    for mask in masks[1:]:
        together = together | mask
    return Chosen(together)


def _way(mask: Tensor, kinds: Sequence[str]) -> str:
    """How edits at places fit sentences of another number of tokens."""
    return (
        f": make the text tower for these, .text(images, tokens={mask.shape[-1]})" if "word" in kinds else ""
    )


def _checked(mask: Tensor, kinds: Sequence[str]) -> Tensor:
    count = len(kinds)
    if mask.dtype != torch.bool or mask.ndim not in (1, 2) or mask.shape[-1] != count:
        kind = str(mask.dtype).removeprefix("torch.")
        raise OptionError(
            f"a mask of tokens is boolean, (token,) or (image, token) with {count} tokens, not {kind} of "
            f"shape {tuple(mask.shape)}{_way(mask, kinds)}"
        )
    return mask.clone().cpu()


_PLACE = re.compile(r"patch\s*\(([\d\s,]+)\)")
_FRAME = re.compile(r"frame\s*(\d+)")


def _of_word(
    word: str | int, kinds: Sequence[str], grid: Callable[[], tuple[int, ...]], groups: Groups | None
) -> Mask:
    count = len(kinds)
    if groups is not None and word in groups.names:
        return _checked(groups.members == groups.names.index(str(word)), kinds)
    if isinstance(word, str) and word in kinds:
        return torch.tensor([kind == word for kind in kinds])
    if isinstance(word, bool) or (isinstance(word, str) and not word):
        raise OptionError(f"{word!r} is no token")
    if isinstance(word, int) or re.fullmatch(r"-?\d+", word):
        number = int(word)
        if not -count <= number < count:
            raise OptionError(f"there is no token {number}: there are {count}, from 0")
        return torch.arange(count) == number % count
    if match := _PLACE.fullmatch(word):
        return _patches(word, kinds, grid(), [int(each) for each in match[1].split(",") if each.strip()])
    if (match := _FRAME.fullmatch(word)) and len(grid()) == 3:
        return _patches(word, kinds, grid(), [int(match[1])])
    known = list(dict.fromkeys((*kinds, "all", *(() if groups is None else groups.names))))
    raise OptionError(
        f"no tokens are called {word!r}: there are {', '.join(known)}; "
        "numbers; and patch(3,5) by row and column"
    )


def _patches(word: str, kinds: Sequence[str], grid: tuple[int, ...], place: Sequence[int]) -> Mask:
    """The patches of a frame, or the one at a place."""
    if (
        len(place) > len(grid)
        or any(not at < size for at, size in zip(place, grid, strict=False))
        or (len(place) != len(grid) and word.startswith("patch"))
    ):
        sides = " x ".join(map(str, grid))
        raise OptionError(f"there is no {word}: the patches are {sides}, counted from 0")
    patches = torch.zeros(grid, dtype=torch.bool)
    patches[tuple(place)] = True
    return torch.cat([torch.zeros(len(kinds) - prod(grid), dtype=torch.bool), patches.flatten()])


def token_name(kinds: Sequence[str], place: int, grid_of: Callable[[], tuple[int, ...]] | None = None) -> str:
    """What to call a token: "cls", "reg 2", "latent 0", or "patch (3, 5)" for row and column, time first.

    Args:
        kinds: of all tokens.
        place: of the token.
        grid_of: gives rows and columns of the patches, which are numbered without it: "patch 17".
    """
    kind = kinds[place]
    alike = [each for each, other in enumerate(kinds) if other == kind]
    number = alike.index(place)
    if kind == PATCH and grid_of is not None:
        try:
            grid = grid_of()
        except DataError:  # its patches form none
            return f"patch {number}"
        if prod(grid) != len(alike):
            return f"patch {number}"
        return f"patch {tuple(int(at) for at in np.unravel_index(number, grid))}"
    return kind if len(alike) == 1 else f"{kind} {number}"

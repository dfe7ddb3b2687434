"""Images in which a block of patches occurs twice, by construction, and where heads would look in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from circuitvit._keywords import running
from circuitvit.errors import DataError, check_whole
from circuitvit.graph.results import Record, Result, cells
from circuitvit.models import Model
from circuitvit.models.families.family import Grid
from circuitvit.tasks.images import Images
from circuitvit.tasks.sentences import refuse_sentences
from circuitvit.views.subjects import ImageSpec, images_of

MATCHES = {
    "same patch": (0, 0),
    "induction": (0, 1),
    "induction left": (0, -1),
    "induction above": (-1, 0),
    "induction below": (1, 0),
}
"""Kinds that look at a twin or beside it, and the step from the twin, down and right."""

CONTEXT = "same context"
"""The kind for queries around the second copy."""

FEWEST = 8
"""Images of repeated patches without which an interval says little."""


class Look(NamedTuple):
    """Pairs of a query and a key, as tokens: where a head of some kind would look.

    Attributes:
        query: `(pair,)`.
        key: `(pair,)`.
        queries: how many different queries there are.
        chance: share of attention on these keys where it is everywhere alike.
    """

    query: NDArray[np.int64]
    key: NDArray[np.int64]
    queries: int
    chance: float


@dataclass(frozen=True, eq=False, repr=False)
class RepeatedPatches(Result):
    """Images in which a block of patches occurs twice, and the same with another first block.

    Attributes:
        images: `(image, *shape)`, preprocessed.
        controls: with fresh patches in place of the first copy, and nothing else changed.
        grid: rows and columns of patches; of clips with time first, where all frames have the block at once.
        block: rows and columns of the block.
        first: row and column of the first copy's corner, `(image, 2)`.
        second: of the second copy's.
    """

    images: Float[Tensor, "image *shape"]
    controls: Float[Tensor, "image *shape"]
    grid: Grid
    block: tuple[int, int]
    first: Int64[NDArray[np.int64], "image 2"]
    second: Int64[NDArray[np.int64], "image 2"]

    def records(self) -> Iterator[Record]:
        """One row for each `image` (its number): `row` and `column` of the corners of both copies, counted
        in patches: `first_row`, `first_column`, `second_row`, `second_column`."""
        corners = np.concatenate([self.first, self.second], axis=1)
        names = ("first_row", "first_column", "second_row", "second_column")
        figures = dict(zip(names, corners.T, strict=True))
        return cells({"image": range(len(corners))}, **figures)

    def looks(self, row: int, n_prefix: int) -> dict[str, Look]:
        """Where heads of each kind would look in one image, for as many tokens before the patches."""
        *_, rows, columns = self.grid
        first, second = self.first[row], self.second[row]
        cells = np.stack([each.ravel() for each in np.indices((rows, columns))], axis=1)
        inside = self._within(cells - second)
        found = {}
        for kind, step in MATCHES.items():
            twin = cells[inside] - second + first + step
            kept = self._within(twin - first)
            if kept.any():
                found[kind] = self._look(cells[inside][kept], twin[kept], n_prefix)
        around = self._within(cells - second, margin=1) & ~inside & ~self._within(cells - first)
        key = cells - second + first
        on_grid = ((key >= 0) & (key < (rows, columns))).all(axis=1)
        around &= on_grid & ~self._within(key - second)
        found[CONTEXT] = self._look(cells[around], key[around], n_prefix)
        return found

    def _within(self, offset: NDArray[np.int64], margin: int = 0) -> NDArray[np.bool_]:
        inside = (offset >= -margin) & (offset < np.array(self.block) + margin)
        return np.asarray(inside.all(axis=1))

    def _look(self, query: NDArray[np.int64], key: NDArray[np.int64], n_prefix: int) -> Look:
        """Cells as tokens, in every frame."""
        *frames, rows, columns = self.grid
        starts = n_prefix + np.arange(prod(frames))[:, None] * rows * columns
        tokens = [(starts + each[:, 0] * columns + each[:, 1]).ravel() for each in (query, key)]
        count = n_prefix + prod(self.grid)
        return Look(tokens[0], tokens[1], len(tokens[0]), 1 / count)

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.block))
        return f"RepeatedPatches({len(self.images)} images, a block of {size} patches twice in each)"


@running
def repeated_patches(
    model: Model, images: ImageSpec | None = None, *, n: int = 32, seed: int = 0
) -> RepeatedPatches:
    """Images of random patches in which a block of patches is repeated at another place.

    Args:
        model: whose patches they are.
        images: whose patches are shuffled; by default patches are noise: cells, four to a side, in which each
            channel is black or full.
        n: how many, at least 8.
        seed: images of one seed are always the same.

    Raises:
        DataError: if the grid has no room for a block and its copy, or patches do not tile the image.

    Example:
        >>> import circuitvit as cv
        >>> repeated_patches(cv.load("catdog-tiny"), n=8)
        RepeatedPatches(8 images, a block of 2 x 3 patches twice in each)
    """
    check_whole("the number of images (n)", n, FEWEST)
    refuse_sentences(model.preprocessing, "patches are repeated in pictures")
    found = None if images is None else images_of(model, images)
    shape = model.preprocessing.shape if found is None else found.shape
    grid = model.grid_at(*shape[-2:])
    *frames, rows, columns = grid
    block = max(1, rows // 3), max(2, columns // 2)
    if 2 * block[0] > rows and 2 * block[1] > columns:
        raise DataError(f"a grid of {rows} x {columns} patches has no room for a block of them and its copy")
    made, controls, corners = [], [], []
    for row in range(n):
        rng = np.random.default_rng([seed, row])
        corner = _corners(rng, (rows, columns), block)
        patches, fresh = (_patches(model, found, shape, grid, rng, row + other) for other in (0, 1))
        first, second = (
            np.ravel(np.arange(prod(frames))[:, None] * rows * columns + _cells(at, block, columns))
            for at in corner
        )
        patches[second] = patches[first]
        made.append(_joined(patches, shape, grid))
        patches[first] = fresh[first]
        controls.append(_joined(patches, shape, grid))
        corners.append(corner)
    places = np.array(corners)
    return RepeatedPatches(torch.stack(made), torch.stack(controls), grid, block, places[:, 0], places[:, 1])


def _corners(
    rng: np.random.Generator, grid: tuple[int, int], block: tuple[int, int]
) -> list[tuple[int, int]]:
    """Corners of two blocks that do not overlap, in reading order."""
    while True:
        drawn = [
            tuple(int(rng.integers(side - size + 1)) for side, size in zip(grid, block, strict=True))
            for _ in range(2)
        ]
        if any(abs(one - two) >= size for one, two, size in zip(*drawn, block, strict=True)):
            return sorted((row, column) for row, column in drawn)


def _cells(corner: tuple[int, int], block: tuple[int, int], columns: int) -> NDArray[np.int64]:
    """The patches of a block, numbered in reading order."""
    down, right = np.indices(block)
    return np.ravel((corner[0] + down) * columns + corner[1] + right)


def _patches(
    model: Model,
    images: Images | None,
    shape: Sequence[int],
    grid: Grid,
    rng: np.random.Generator,
    number: int,
) -> Float[Tensor, "patch time channel height width"]:
    """As many patches as an image has: of noise, or those of an image, shuffled."""
    if images is not None:
        at = number % len(images)
        return _cut(images.take(at, at + 1)[0], grid)[torch.from_numpy(rng.permutation(prod(grid)))]
    *times, channels, height, width = _patch_size(shape, grid)
    cell = max(2, height // 4)
    coarse = (prod(grid), *times, channels, -(-height // cell), -(-width // cell))
    noise = torch.from_numpy(rng.integers(0, 2, coarse)).float()
    noise = noise.repeat_interleave(cell, -2).repeat_interleave(cell, -1)[..., :height, :width]
    mean, std = torch.tensor((model.preprocessing.mean, model.preprocessing.std))[:, :, None, None]
    return torch.sub(noise, mean).div(std)


def _patch_size(shape: Sequence[int], grid: Grid) -> tuple[int, int, int, int]:
    """Time, channels, height and width of a patch; images are clips of one frame.

    Raises:
        DataError: if patches do not tile the image.
    """
    time, channels, height, width = (1, *shape)[-4:]
    frames, rows, columns = (1, *grid)[-3:]
    if time % frames or height % rows or width % columns:
        raise DataError(f"{rows} x {columns} patches do not tile an image of {height} x {width} pixels")
    return time // frames, channels, height // rows, width // columns


def _cut(image: Tensor, grid: Grid) -> Float[Tensor, "patch time channel height width"]:
    time, channels, height, width = _patch_size(image.shape, grid)
    frames, rows, columns = (1, *grid)[-3:]
    pieces = image.reshape(frames, time, channels, rows, height, columns, width)
    return pieces.permute(0, 3, 5, 1, 2, 4, 6).flatten(0, 2)


def _joined(patches: Tensor, shape: Sequence[int], grid: Grid) -> Float[Tensor, " *shape"]:
    pieces: Tensor = patches.reshape(*(1, *grid)[-3:], *patches.shape[1:])
    return pieces.permute(0, 3, 4, 1, 5, 2, 6).reshape(tuple(shape))

"""How the patches of an input lie on paper: an image's as they are, a clip's as a strip of its frames.

Long strips go on below, like the lines of a text. Whatever draws maps over a picture draws them on a sheet,
so that it need not know of time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from circuitvit.models.families.family import Grid

LONGEST = 8
"""Frames in one line, where there is a way to have all lines alike."""


@dataclass(frozen=True)
class Sheet:
    """The arrangement of a grid of patches on paper.

    Attributes:
        grid: rows and columns, with time first where there is time.

    Example:
        >>> Sheet((6, 7)).shape, Sheet((5, 16, 16)).shape, Sheet((16, 14, 14)).shape
        ((6, 7), (16, 80), (28, 112))
    """

    grid: Grid

    @property
    def frames(self) -> int:
        """How many frames lie on it; 1 for an image."""
        return prod(self.grid[:-2])

    @property
    def across(self) -> int:
        """How many frames lie side by side."""
        fitting = [count for count in range(1, LONGEST + 1) if self.frames % count == 0]
        return self.frames if fitting[-1] < min(3, self.frames) else fitting[-1]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        rows, columns = self.grid[-2:]
        return rows * self.frames // self.across, columns * self.across

    def lay(self, values: NDArray[Any]) -> NDArray[Any]:
        """What is on the grid on the sheet: `(..., *grid)` to `(..., row, column)`; cells may be anything."""
        before = values.shape[: values.ndim - len(self.grid)]
        return self.tile(values.reshape(*before, self.frames, *self.grid[-2:]))

    def tile(self, frames: NDArray[Any]) -> NDArray[Any]:
        """One map for each frame, of any height and width, side by side: `(..., frame, height, width)` to
        `(..., height, width)`.
        """
        *before, count, height, width = frames.shape
        lines = frames.reshape(*before, count // self.across, self.across, height, width)
        return lines.swapaxes(-3, -2).reshape(*before, -1, self.across * width)

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """The patches by their numbers among all, in the order of the sheet."""
        return np.asarray(self.lay(np.arange(prod(self.grid)).reshape(self.grid)).ravel())

    def place(self, patch: int) -> tuple[int, int]:
        """Row and column of a patch on the sheet."""
        row, column = divmod(int(np.flatnonzero(self.order == patch)[0]), self.shape[1])
        return row, column

    def shown(self, frames: int) -> list[int]:
        """Which frames of a clip stand for the slices of the grid: the one in the middle of each."""
        return [(2 * place + 1) * frames // (2 * self.frames) for place in range(self.frames)]

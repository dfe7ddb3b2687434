"""What compiled models look at: a few patches, each with some binary features, and what changes between two.

A scene speaks of *roles*: role 0 may be the cue, role 1 a patch that it could have been. Which patch plays
which role is drawn for every image, so nothing but the features themselves gives the answer away. Clean and
corrupt images share the roles and differ in the features that one *change* moves. Changes move features and
seldom add any: where the number of patches with a feature stays the same, so does what soft attention leaks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

GRID = 3
"""Rows and columns of patches."""

N_PATCHES = GRID * GRID
PATCH = 2
"""Side of a patch in pixels."""

SIDE = GRID * PATCH
"""Side of an image in pixels."""

Roles = Mapping[str, tuple[int, ...]]
"""For pixel features, the roles at whose patches they are on."""


@dataclass(frozen=True)
class Scene:
    """A clean picture and the ways to corrupt it.

    Attributes:
        clean: where each pixel feature is on.
        changes: by name, the features that are elsewhere in the corrupt picture.
        in_order: roles are played by neighbours, from a patch drawn at random on, in reading order and round
            the end; otherwise the order is random.
    """

    clean: Roles
    changes: Mapping[str, Roles] = field(default_factory=dict)
    in_order: bool = False

    def corrupt(self, change: str) -> Roles:
        """The corrupt picture; a scene that does not know the change makes its own first one."""
        first = next(iter(self.changes))
        return {**self.clean, **self.changes[change if change in self.changes else first]}

    def places(self, rng: np.random.Generator) -> NDArray[np.intp]:
        """The patch of each role `(role,)`."""
        if self.in_order:
            return (np.arange(N_PATCHES) + rng.integers(N_PATCHES)) % N_PATCHES
        return rng.permutation(N_PATCHES)


def draw(
    scenes: tuple[Scene, ...], change: str | None, n: int, seed: int
) -> tuple[Bool[Tensor, "image feature patch"], Bool[Tensor, "image feature patch"]]:
    """The clean and the corrupt features of `n` pairs; the first pairs do not depend on `n`.

    Args:
        scenes: the first is the program's own.
        change: one of its changes, or None for all of them in turn.
        n: how many pairs.
        seed: of the roles.
    """
    changes = (change,) if change is not None else tuple(scenes[0].changes)
    clean, corrupt = [], []
    for image in range(n):
        rng = np.random.default_rng([seed, image])
        for scene in scenes:
            places = scene.places(rng)
            clean.append(_marked(scene.clean, places))
            corrupt.append(_marked(scene.corrupt(changes[image % len(changes)]), places))
    return _stacked(clean, n), _stacked(corrupt, n)


def images_of(grids: Bool[Tensor, "image feature patch"]) -> Float[Tensor, "image channel height width"]:
    """Images that show these features: channel `i` is +1 in the patches where feature `i` is on, else -1."""
    signs = (2 * grids.float() - 1).view(*grids.shape[:-1], GRID, GRID)
    return signs.repeat_interleave(PATCH, dim=-2).repeat_interleave(PATCH, dim=-1)


def _marked(roles: Roles, places: NDArray[np.intp]) -> NDArray[np.bool_]:
    """`(feature, patch)`: whether the feature is on."""
    grid = np.zeros((len(roles), N_PATCHES), dtype=bool)
    for row, marked in enumerate(roles.values()):
        grid[row, places[list(marked)]] = True
    return grid


def _stacked(grids: list[NDArray[np.bool_]], n: int) -> Bool[Tensor, "image feature patch"]:
    return torch.from_numpy(np.concatenate(grids)).view(n, -1, N_PATCHES)

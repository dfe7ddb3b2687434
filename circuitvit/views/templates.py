"""The shapes that attention by position can have: for each query patch, the keys that it would look at.

A template is a boolean `(query, key)` matrix over all tokens; only queries that are patches have keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Template = NDArray[np.bool_]

_STEPS = {(0, 0): "self", (0, -1): "previous", (0, 1): "next", (-1, 0): "above", (1, 0): "below"}
"""Steps that have a name: the patch itself, and its neighbours; previous and next are in reading order."""

FARTHEST = 3
"""How far, in patches, a fixed step is looked for."""


def templates(grid: tuple[int, int], kinds: Sequence[str]) -> dict[str, Template]:
    """All shapes by name.

    | name | keys of a query patch |
    | --- | --- |
    | `self`, `previous`, `next`, `above`, `below` | itself; the patch left, right, above, below of it |
    | `step (r, c)` | the patch `r` rows down and `c` columns right |
    | `neighbours` | the patches at most 1 row and column away, itself included |
    | `row`, `column` | those in its row, its column |
    | `corners`, `corner top left` ... | the four corners of the image, or one of them, for every query |
    | `edges`, `edge top` ... | the outermost patches, or those of one side, for every query |
    | `modulus m` | those whose row and column differ from its own by multiples of `m` |
    | `rows modulus m`, `columns modulus m` | every `m`-th row (column), counted from its own |
    | `cls`, `reg` ... | the tokens before the patches, by kind |

    Args:
        grid: rows and columns of patches.
        kinds: the kind of each token, patches last.
    """
    n_prefix = len(kinds) - grid[0] * grid[1]
    found: dict[str, Template] = {}
    for name, cells in _of_patches(grid):
        if cells.any() and not cells.all():
            found[name] = np.pad(cells, ((n_prefix, 0), (n_prefix, 0)))
    for kind in dict.fromkeys(kinds[:n_prefix]):
        mask = np.zeros((len(kinds), len(kinds)), dtype=bool)
        mask[n_prefix:, :n_prefix] = np.array([each == kind for each in kinds[:n_prefix]])
        found[kind] = mask
    return found


def _of_patches(grid: tuple[int, int]) -> Iterator[tuple[str, Template]]:
    row, column = (each.ravel() for each in np.indices(grid))
    down, right = row[None, :] - row[:, None], column[None, :] - column[:, None]  # (query, key)
    for rows in range(-FARTHEST, FARTHEST + 1):
        for columns in range(-FARTHEST, FARTHEST + 1):
            named = _STEPS.get((rows, columns), f"step ({rows}, {columns})")
            yield named, (down == rows) & (right == columns)
    yield "neighbours", (abs(down) <= 1) & (abs(right) <= 1)
    yield "row", down == 0
    yield "column", right == 0
    yield from _places(grid, row, column)
    for modulus in range(2, 1 + max(grid) // 2):
        rows_, columns_ = down % modulus == 0, right % modulus == 0
        yield f"modulus {modulus}", rows_ & columns_
        yield f"rows modulus {modulus}", rows_
        yield f"columns modulus {modulus}", columns_


def _places(
    grid: tuple[int, int], row: NDArray[np.int64], column: NDArray[np.int64]
) -> Iterator[tuple[str, Template]]:
    """Templates of keys that are the same for every query."""
    sides = {
        "top": row == 0, "bottom": row == grid[0] - 1, "left": column == 0, "right": column == grid[1] - 1,
    }  # fmt: skip
    queries = np.ones((len(row), 1), dtype=bool)
    vertical, horizontal = sides["top"] | sides["bottom"], sides["left"] | sides["right"]
    yield "corners", queries & (vertical & horizontal)
    yield "edges", queries & (vertical | horizontal)
    for name, cells in sides.items():
        yield f"edge {name}", queries & cells
    for up in ("top", "bottom"):
        for side in ("left", "right"):
            yield f"corner {up} {side}", queries & (sides[up] & sides[side])

"""Rows and columns: where each node of a picture stands, before any pixel.

A row is a stage. Heads have the columns; nodes that are alone in their stage (`input`, MLPs, `logits`)
share one column of their own in the middle, the spine, so that edges between them are short and straight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from circuitvit.export.picture import DrawnNode, Picture
from circuitvit.graph import EdgeMask

Cell = tuple[int, int]
"""Row, counted from the bottom, and column, counted from the left."""


@dataclass(frozen=True)
class Grid:
    """Where nodes stand.

    Attributes:
        cells: row and column of each node.
        boxes: `(row, column)`, True where a node of the circuit stands: what edges must go around.
        spine: the column of the nodes that are alone in their row.
        heads: the column of each head.
        has_mlps: whether the MLPs are on the spine, one to a row, so that it can be called after them.
    """

    cells: Mapping[str, Cell]
    boxes: EdgeMask
    spine: int
    heads: tuple[int, ...]
    has_mlps: bool

    @property
    def n_rows(self) -> int:
        return int(self.boxes.shape[0])

    @property
    def n_columns(self) -> int:
        return int(self.boxes.shape[1])

    def is_clear(self, low: int, high: int, one: int, other: int) -> bool:
        """Whether rows `low` to `high` hold no box from column `one` to column `other`, all ends included."""
        left, right = min(one, other), max(one, other)
        return not bool(self.boxes[low : high + 1, left : right + 1].any())


def grid_of(picture: Picture) -> Grid:
    """Give every node of the picture a row and a column of its own."""
    by_row: dict[int, tuple[list[DrawnNode], list[DrawnNode]]] = {}
    for node in picture.nodes:
        heads, others = by_row.setdefault(node.row, ([], []))
        (heads if node.kind == "head" else others).append(node)
    n_heads = max((len(heads) for heads, _ in by_row.values()), default=0)
    shared = n_heads % 2 == 1 and not any(heads and others for heads, others in by_row.values())
    spine = n_heads // 2  # with an odd number of heads, the middle head's column
    head_columns = _head_columns(n_heads, spine, shared)
    cells: dict[str, Cell] = {}
    for row, (heads, others) in by_row.items():
        for index, node in enumerate(heads):
            cells[node.name] = (row, head_columns[index])
        for column, node in zip(
            _columns_of_others(len(others), bool(heads), spine, n_heads), others, strict=True
        ):
            cells[node.name] = (row, column)
    n_columns = 1 + max((column for _, column in cells.values()), default=0)
    boxes = np.zeros((len(picture.rows), n_columns), dtype=bool)
    for node in picture.nodes:
        boxes[cells[node.name]] = node.present
    mlps = [node for node in picture.nodes if node.kind == "mlp"]
    has_mlps = bool(mlps) and all(cells[node.name][1] == spine for node in mlps)
    return Grid(cells, boxes, spine, tuple(head_columns), has_mlps)


def _head_columns(n_heads: int, spine: int, shared: bool) -> list[int]:
    return [head if head < spine or shared else head + 1 for head in range(n_heads)]


def _columns_of_others(count: int, beside_heads: bool, spine: int, n_heads: int) -> list[int]:
    """Columns for the nodes of a row that are no heads: the spine, and for several a run around it."""
    if beside_heads:  # a parallel block: the first has the spine, others stand right of the last head
        return [spine, *range(n_heads + 1, n_heads + count)][:count]
    start = max(0, spine - count // 2)
    return list(range(start, start + count))

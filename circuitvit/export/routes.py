"""Where each node of a picture stands and which way each edge goes, before any pixel.

Heads have the columns; nodes that are alone in their row (`input`, MLPs, `logits`) share one column of their
own in the middle, the spine, so that edges between them are short and straight. Where a row has many (the
neurons of an MLP, the pieces of heads) they stand side by side around the spine, and those outside the
circuit in one cell at the end.

Edges go straight where nothing is in between, else through a lane. Lanes are the vertical strips left and
right of the columns, where no node ever stands; lane `j` is left of column `j`. Edges of one sender that
have the same sign and token group and use the same lane share one line in it, a trunk, and leave it one by
one below their targets. So a crowded picture has as many lines side by side as it has active senders, not
as many as it has edges, and no line crosses a box.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from circuitvit.export.picture import DrawnEdge, DrawnNode, Picture
from circuitvit.graph import EdgeMask

_CROWDING = 0.07  # how many columns of detour one more line in a lane is worth
_NEW_TRUNK = 0.3
_NEAR_TARGET = 0.02


@dataclass(frozen=True)
class Grid:
    """Where nodes stand.

    Attributes:
        cells: row, counted from the bottom, and column, counted from the left, of each node.
        boxes: `(row, column)`, True where a node of the circuit stands: what edges must go around.
        spine: the column of the nodes that are alone in their row.
        heads: the column of each head.
        has_mlps: whether the MLPs are on the spine, one to a row, so that it can be called after them.
    """

    cells: Mapping[str, tuple[int, int]]
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
    widest = max(len(_side_by_side(others)) for _, others in by_row.values())
    spine = max(n_heads // 2, widest // 2)  # with an odd number of heads, the middle head's column
    shared = n_heads % 2 == 1 and not any(heads and others for heads, others in by_row.values())
    first = spine - n_heads // 2
    columns = range(first, first + n_heads)
    head_columns = tuple(column if column < spine or shared else column + 1 for column in columns)
    cells: dict[str, tuple[int, int]] = {}
    for row, (heads, others) in by_row.items():
        cells.update({node.name: (row, column) for node, column in zip(heads, head_columns, strict=False)})
        together = _side_by_side(others)
        for column, nodes in enumerate(together, spine - len(together) // 2):
            cells.update({node.name: (row, column) for node in nodes})
    n_columns = 1 + max((column for _, column in cells.values()), default=0)
    boxes = np.zeros((len(picture.blocks), n_columns), dtype=bool)
    for node in picture.nodes:
        boxes[cells[node.name]] = node.present
    mlps = [node for node in picture.nodes if node.kind == "mlp"]
    has_mlps = bool(mlps) and all(cells[node.name][1] == spine for node in mlps)
    return Grid(cells, boxes, spine, head_columns, has_mlps)


def _side_by_side(others: list[DrawnNode]) -> list[list[DrawnNode]]:
    """The nodes of a row that are no heads, by column: each that is drawn as a box has one to itself."""
    boxes = [[node] for node in others if node.present]
    dots = [node for node in others if not node.present]
    return [*boxes, dots] if dots else boxes


@dataclass(eq=False)
class Trunk:
    """A line in a lane, shared by edges of one sender.

    Attributes:
        sender: name of the node it comes from.
        lane: index of its lane.
        start: row of the sender.
        stop: highest row that one of its edges ends in.
        first_stop: lowest row that one of its edges ends in.
        column: column of the sender.
        targets: columns in which its edges end.
        width: of its widest edge, in pixels.
    """

    sender: str
    lane: int
    start: int
    column: int
    stop: int = 0
    first_stop: int = 1_000_000
    targets: list[int] = field(default_factory=list)
    width: float = 0.0

    def carry(self, edge: DrawnEdge, row: int, column: int) -> None:
        """Add an edge that ends in this row and column."""
        self.stop, self.first_stop = max(self.stop, row), min(self.first_stop, row)
        self.targets.append(column)
        self.width = max(self.width, edge.look.width)

    def overlaps(self, other: Trunk) -> bool:
        """Whether the two need lines side by side, when they are in one lane."""
        return self.start <= other.stop and other.start <= self.stop

    @property
    def lean(self) -> float:
        """-1 when all it joins is left of its lane, 1 when all is right of it."""
        sides = [1 if column >= self.lane else -1 for column in (self.column, *self.targets)]
        return sum(sides) / len(sides)


@dataclass(frozen=True)
class Route:
    """The way of one edge: through `trunk`, or straight from sender to target when it is None."""

    edge: DrawnEdge
    trunk: Trunk | None

    @property
    def line(self) -> object:
        """What leaves the sender: the edge itself, or the trunk that it shares with others."""
        return self.edge.name if self.trunk is None else id(self.trunk)


def routes_of(picture: Picture, grid: Grid) -> list[Route]:
    """The way of every edge of the picture, in the picture's order."""

    def rise(edge: DrawnEdge) -> int:
        return grid.cells[edge.target][0] - grid.cells[edge.sender][0]

    def is_straight(edge: DrawnEdge) -> bool:
        """Whether no box stands in the rectangle between the ends, so that one curve can join them."""
        (start, from_column), (stop, to_column) = grid.cells[edge.sender], grid.cells[edge.target]
        return grid.is_clear(start + 1, stop - 1, from_column, to_column)

    chosen: dict[str, Route] = {}
    lanes = _Lanes(grid)
    # Long edges first: they have the fewest good lanes, and short ones fit in around them.
    for edge in sorted(picture.edges, key=lambda edge: (-rise(edge), edge.name)):
        chosen[edge.name] = Route(edge, None if is_straight(edge) else lanes.trunk_for(edge))
    return [chosen[edge.name] for edge in picture.edges]


def ordered_tracks(trunks: Iterable[Trunk]) -> list[tuple[Trunk, int]]:
    """Each trunk of one lane with its place from left to right; trunks that never meet may share a place.

    Lines that turn left stand left, the short ones outside, so that a line that leaves crosses few others.
    """

    def key(trunk: Trunk) -> tuple[bool, float, str, float]:
        length = trunk.stop - trunk.start
        left = trunk.lean < 0
        return (not left, length if left else -length, trunk.sender, trunk.lean)

    placed: list[tuple[Trunk, int]] = []
    for trunk in sorted(trunks, key=key):
        taken = [place for other, place in placed if other.overlaps(trunk)]
        placed.append((trunk, 1 + max(taken, default=-1)))
    return placed


class _Lanes:
    """All trunks, and how many of them each lane holds beside each row."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.load = np.zeros((grid.n_columns + 1, grid.n_rows), dtype=int)
        self.trunks: dict[tuple[str, str, int, int], Trunk] = {}  # for edges that look alike

    def trunk_for(self, edge: DrawnEdge) -> Trunk:
        """The trunk that serves `edge` best: little detour, little crowding, shared when possible."""
        (start, from_column), (stop, to_column) = self.grid.cells[edge.sender], self.grid.cells[edge.target]
        lane = min(range(len(self.load)), key=lambda lane: (self._cost(edge, lane), lane))
        key = (edge.sender, edge.look.colour, edge.group, lane)
        trunk = self.trunks.setdefault(key, Trunk(edge.sender, lane, start, from_column))
        self.load[lane, max(trunk.stop, start) : max(trunk.stop, stop)] += 1
        trunk.carry(edge, stop, to_column)
        return trunk

    def _cost(self, edge: DrawnEdge, lane: int) -> float:
        (start, from_column), (stop, to_column) = self.grid.cells[edge.sender], self.grid.cells[edge.target]
        at = lane - 0.5
        travel = abs(at - from_column) + abs(at - to_column)
        trunk = self.trunks.get((edge.sender, edge.look.colour, edge.group, lane))
        crowding = int(self.load[lane, start if trunk is None else trunk.stop : stop].max(initial=0))
        new = _NEW_TRUNK if trunk is None else 0.0
        return travel + _CROWDING * crowding + new + _NEAR_TARGET * abs(at - to_column)

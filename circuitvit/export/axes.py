"""Sizes, columns and rows: how wide and how high the parts of a picture are, and so where they stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import sqrt

from circuitvit.export.grid import Grid
from circuitvit.export.picture import DrawnNode, Picture
from circuitvit.export.routes import Route, Trunk, ordered_tracks
from circuitvit.export.text import clean, fit, text_width

NAME_SIZE = 12.0  # font size of node names
NAME_MAX = 132.0  # a longer name is cut
PORT_SIZE = 10.5  # font size of the names of inputs
PORT_MAX = 60.0
PORT_PITCH = 17.0  # least distance between the inputs of a head
BOX_HEIGHTS = {"head": 34.0, "mlp": 21.0, "end": 24.0}
THUMB_PAD = 5.0  # around a thumbnail within its box
DOT_SPACE = 7.0  # height and width kept for a node outside the circuit
LANE_MARGIN = 8.0  # from the outermost line of a lane to the boxes beside it
LANE_MAX = 160.0
LEAST_LANES = 200.0  # room for all lanes together, so that a graph of few heads is not a tower
TRACK_GAP = 2.2
STUB = 4.0  # edges leave and enter boxes straight, for this long
SPREAD = 3.4  # between lines that leave one sender


Point = tuple[float, float]


@dataclass(frozen=True)
class Box:
    """A rectangle; y grows downwards, as in SVG."""

    left: float
    top: float
    width: float
    height: float

    @property
    def right(self) -> float:
        return self.left + self.width

    @property
    def bottom(self) -> float:
        return self.top + self.height

    @property
    def middle(self) -> float:
        return self.left + self.width / 2


def box_width(node: DrawnNode) -> float:
    """How wide a node's box must be for its name and its ports."""
    name = min(text_width(clean(node.name), NAME_SIZE), NAME_MAX)
    return max(name + 14, port_pitch(node) * len(node.ports) + 8, 46.0, node.thumb + 2 * THUMB_PAD)


def box_height(node: DrawnNode) -> float:
    """How high a node's box must be for its name, its ports and its thumbnail."""
    return BOX_HEIGHTS[node.kind] + (node.thumb + THUMB_PAD if node.thumb else 0.0)


def port_pitch(node: DrawnNode) -> float:
    """From one port to the next: enough for the longest of their names."""
    return max(
        PORT_PITCH,
        *(text_width(fit(clean(port), PORT_SIZE, PORT_MAX), PORT_SIZE) + 6 for port in ("", *node.ports)),
    )


class Columns:
    """x of every column, and of every trunk in its lane."""

    def __init__(self, picture: Picture, grid: Grid, routes: Sequence[Route]) -> None:
        widths = [DOT_SPACE] * grid.n_columns
        for node in picture.nodes:
            if node.present:
                column = grid.cells[node.name][1]
                widths[column] = max(widths[column], box_width(node))
        by_lane: list[dict[int, Trunk]] = [{} for _ in range(grid.n_columns + 1)]
        for route in routes:
            if route.trunk is not None:
                by_lane[route.trunk.lane][id(route.trunk)] = route.trunk
        self.middles: list[float] = []
        self.track: dict[int, float] = {}
        x = 0.0
        least = max(2 * LANE_MARGIN, LEAST_LANES / len(by_lane))
        for lane, trunks in enumerate(by_lane):
            offsets, width = _tracks(list(trunks.values()), least)
            for key, offset in offsets.items():
                self.track[key] = x + offset
            x += width
            if lane < grid.n_columns:
                self.middles.append(x + widths[lane] / 2)
                x += widths[lane]
        self.width = x


def _tracks(trunks: Sequence[Trunk], least: float) -> tuple[dict[int, float], float]:
    """x of each trunk within its lane, and the width of the lane."""
    placed = ordered_tracks(trunks)
    widths = [0.0] * (1 + max((place for _, place in placed), default=-1))
    for trunk, place in placed:
        widths[place] = max(widths[place], trunk.width + TRACK_GAP)
    squeeze = min(1.0, (LANE_MAX - 2 * LANE_MARGIN) / max(sum(widths), 1.0))
    total = max(least, squeeze * sum(widths) + 2 * LANE_MARGIN)
    edges = list(
        accumulate((width * squeeze for width in widths), initial=(total - squeeze * sum(widths)) / 2)
    )
    middles = [(left + right) / 2 for left, right in pairwise(edges)]
    return {id(trunk): middles[place] for trunk, place in placed}, total


class Rows:
    """y of every row: high where boxes stand, gaps wide where many curves turn."""

    def __init__(self, picture: Picture, grid: Grid, routes: Sequence[Route], columns: Columns) -> None:
        heights = [DOT_SPACE] * grid.n_rows
        for node in picture.nodes:
            if node.present:
                heights[node.row] = max(heights[node.row], box_height(node))
        self.gaps = _gaps(grid, routes, columns)
        self.height = sum(heights) + sum(self.gaps)
        self.tops: list[float] = []
        self.bottoms: list[float] = []
        y = self.height
        for row, height in enumerate(heights):
            self.bottoms.append(y)
            self.tops.append(y - height)
            y -= height + self.gap_above(row)

    def gap_above(self, row: int) -> float:
        """Height of the gap between this row and the next one up; 0 past the ends."""
        return self.gaps[row] if 0 <= row < len(self.gaps) else 0.0


def _gaps(grid: Grid, routes: Sequence[Route], columns: Columns) -> list[float]:
    """Height of the gap above each row but the last."""
    turns: list[dict[object, float]] = [{} for _ in range(grid.n_rows)]
    for route in routes:
        (start, from_column), (stop, to_column) = grid.cells[route.edge.sender], grid.cells[route.edge.target]
        x0, x1 = columns.middles[from_column], columns.middles[to_column]
        if route.trunk is None:
            turns[start][route.edge.name] = abs(x1 - x0)
        else:
            track = columns.track[id(route.trunk)]
            turns[start][id(route.trunk)] = abs(track - x0)
            turns[stop - 1][route.edge.name] = abs(x1 - track)
    return [_gap(list(turn.values()), columns.width) for turn in turns[:-1]]


def _gap(sideways: Sequence[float], width: float) -> float:
    """Room for that many curves that go that far sideways; far ones need height, or they get flat."""
    if not sideways:
        return 8.0
    return min(34.0 + 0.013 * width, 17.0 + 0.025 * max(sideways) + 2.2 * sqrt(len(sideways)))

"""Curves: the way of each edge in pixels.

The promise that no curve touches a box it does not end at needs no search. Curves only move sideways
within a gap between rows, or across rows that hold no box on their way; past all other rows they run
straight up a lane, where no box stands. A Bezier curve stays within the rectangle of its control points,
and these stay within the gap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from circuitvit.export.axes import SPREAD, STUB, Box, Columns, Point, Rows
from circuitvit.export.grid import Grid
from circuitvit.export.picture import DrawnEdge
from circuitvit.export.routes import Route


@dataclass(frozen=True)
class Line:
    """The curve of one edge: a start, then cubic Bezier pieces given by two control points and an end.

    A straight piece is a cubic one too, so that every reader needs to know one kind only.
    """

    edge: DrawnEdge
    start: Point
    pieces: tuple[tuple[Point, Point, Point], ...]


class Pen:
    """Draws routes as curves."""

    def __init__(
        self,
        grid: Grid,
        columns: Columns,
        rows: Rows,
        boxes: Mapping[str, Box],
        ports: Mapping[str, Mapping[str, float]],
        routes: Sequence[Route],
    ) -> None:
        self.grid, self.columns, self.rows, self.boxes, self.ports = grid, columns, rows, boxes, ports
        self.leaving = self._places_to_leave(routes)

    def line(self, route: Route) -> Line:
        """The curve of one edge."""
        edge = route.edge
        sender, target = self.boxes[edge.sender], self.boxes[edge.target]
        (start, _), (stop, column) = self.grid.cells[edge.sender], self.grid.cells[edge.target]
        x0 = self.leaving[self._exit_key(route)]
        x1 = self.ports[edge.target][edge.port]
        bend, land = (x0, self.rows.tops[start] - STUB), (x1, self.rows.bottoms[stop] + STUB)
        points: list[Point] = [(x0, sender.top), bend]
        if route.trunk is not None:
            track = self.columns.track[id(route.trunk)]
            up = self._last_row_to_cross(
                start, route.trunk.first_stop, route.trunk.column, route.trunk.lane, track - x0
            )
            off = self._first_row_to_cross(stop, up, column, route.trunk.lane, track - x1)
            points += [(track, self.rows.bottoms[up] + STUB), (track, self.rows.tops[off] - STUB)]
        points += [land, (x1, target.bottom)]
        turns = self._turns(points)
        return Line(
            edge,
            points[0],
            tuple(_piece(*ends, turn) for ends, turn in zip(pairwise(points), turns, strict=True)),
        )

    def _turns(self, points: Sequence[Point]) -> list[float]:
        """For each piece, how soon it turns sideways, 0.3 (at once) to 0.8 (late).

        Of the lines that fan out of a sender the far ones turn first, and of those that come together at a
        target the far ones turn last, so that neighbours nest in each other and do not cross.
        """
        turns = [0.55] * (len(points) - 1)
        if len(points) > 4:
            far = [
                min(1.0, abs(high[0] - low[0]) / (0.4 * self.columns.width)) for low, high in pairwise(points)
            ]
            turns[1], turns[3] = 0.8 - 0.5 * far[1], 0.3 + 0.5 * far[3]
        return turns

    def _last_row_to_cross(self, start: int, stop: int, column: int, lane: int, sideways: float) -> int:
        """The row below which the way into the lane ends: the next one, or higher where that is free."""
        row = start + 1
        inner = lane if lane <= column else lane - 1  # the column beside the lane, on the way to it
        while (
            row < stop - 1
            and self.rows.tops[start] - self.rows.bottoms[row] < 0.4 * abs(sideways)
            and self.grid.is_clear(row, row, column, inner)
        ):
            row += 1
        return row

    def _first_row_to_cross(self, stop: int, lowest: int, column: int, lane: int, sideways: float) -> int:
        """The row above which the way out of the lane begins: the one before the target, or lower."""
        row = stop - 1
        inner = lane if lane <= column else lane - 1
        while (
            row > lowest
            and self.rows.tops[row] - self.rows.bottoms[stop] < 0.4 * abs(sideways)
            and self.grid.is_clear(row, row, column, inner)
        ):
            row -= 1
        return row

    def _places_to_leave(self, routes: Sequence[Route]) -> dict[object, float]:
        """x at which each line leaves its sender: side by side on its box, in order of where they go."""
        aims: dict[str, dict[object, float]] = {}
        for route in routes:
            edge, trunk = route.edge, route.trunk
            aim = self.ports[edge.target][edge.port] if trunk is None else self.columns.track[id(trunk)]
            aims.setdefault(edge.sender, {}).setdefault(self._exit_key(route), aim)
        places: dict[object, float] = {}
        for sender, goals in aims.items():
            box = self.boxes[sender]
            pitch = min(SPREAD, 0.7 * box.width / len(goals))
            ordered = sorted(goals, key=lambda key: goals[key])
            first = box.middle - pitch * (len(goals) - 1) / 2
            above = next(
                (index for index, key in enumerate(ordered) if abs(goals[key] - box.middle) < 0.5), None
            )
            if above is not None:  # a target right above: that line shall be straight, the others give way
                room = box.width / 2 - 8
                first = min(
                    max(box.middle - pitch * above, box.middle - room),
                    box.middle + room - pitch * (len(goals) - 1),
                )
            places.update({key: first + pitch * index for index, key in enumerate(ordered)})
        return places

    @staticmethod
    def _exit_key(route: Route) -> object:
        return route.edge.name if route.trunk is None else id(route.trunk)


def _piece(low: Point, high: Point, turn: float) -> tuple[Point, Point, Point]:
    """The cubic curve from `low` up to `high` that is upright at both ends."""
    (x0, y0), (x1, y1) = low, high
    return (x0, y0 + turn * (y1 - y0)), (x1, y1 - (1.1 - turn) * (y1 - y0)), (x1, y1)

"""Coordinates: where every box, port and curve of a picture is, in pixels; y grows downwards, as in SVG.

The promise that no curve touches a box it does not end at needs no search. Curves only move sideways
within a gap between rows, or across rows that hold no box on their way; past all other rows they run
straight up a lane, where no box stands. A Bezier curve stays within the rectangle of its control points,
and these stay within the gap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import sqrt

from circuitvit.export.picture import DrawnEdge, DrawnNode, Picture
from circuitvit.export.routes import Grid, Route, Trunk, grid_of, ordered_tracks, routes_of
from circuitvit.export.style import fit, text_width
from circuitvit.graph.files import clean

NAME_SIZE = 12.0  # font size of node names
NAME_MAX = 132.0  # a longer name is cut
LABEL_SIZE = 9.5  # of what is said of a node
LABEL_MAX = 96.0  # a longer label is cut
LABEL_LINE = 12.0  # height that it takes
PORT_SIZE = 10.5  # font size of the names of inputs
PORT_MAX = 60.0
PORT_PITCH = 17.0  # least distance between the inputs of a head
BOX_HEIGHTS = {"head": 34.0, "part": 21.0, "mlp": 21.0, "end": 24.0}
THUMB_PAD = 5.0  # around a thumbnail within its box
DOT_SPACE = 7.0  # height and width kept for a node outside the circuit
DOTS_HIGH = 4  # of many in one cell, how many stand above each other
LANE_MARGIN = 8.0  # from the outermost line of a lane to the boxes beside it
LANE_MAX = 160.0
LEAST_LANES = 200.0  # room for all lanes together, so that a graph of few heads is not a tower
TRACK_GAP = 2.2
STUB = 4.0  # edges leave and enter boxes straight, for this long
SPREAD = 3.4  # between lines that leave one sender

Point = tuple[float, float]


@dataclass(frozen=True)
class Box:
    """A rectangle."""

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
    def centre(self) -> Point:
        return self.left + self.width / 2, self.top + self.height / 2


@dataclass(frozen=True)
class Line:
    """The curve of one edge.

    Attributes:
        edge: that it stands for.
        points: a start, then for each cubic Bezier piece two control points and an end. A straight piece is
            a cubic one too, so that every reader needs to know one kind only.
    """

    edge: DrawnEdge
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Layout:
    """A picture with coordinates, its upper left corner at (0, 0).

    Attributes:
        width: of the picture, without labels around it.
        height: likewise.
        boxes: rectangle of each node of the circuit.
        dots: centre of each node outside the circuit.
        ports: for each node, x of each of its inputs, on the lower side of its box.
        lines: the curves, in the picture's order of edges.
        stripes: top and bottom of each block, by its name, the lowest first.
        heads: centre x of the column of each head.
        spine: centre x of the column of MLPs, or None when there is none.
    """

    width: float
    height: float
    boxes: Mapping[str, Box]
    dots: Mapping[str, Point]
    ports: Mapping[str, Mapping[str, float]]
    lines: tuple[Line, ...]
    stripes: Mapping[str, tuple[float, float]]
    heads: tuple[float, ...]
    spine: float | None

    def column_names(self, head: str = "head ") -> dict[float, str]:
        """What each column holds, by its centre: "head 2", "MLP", or both where they share one."""
        names = {} if self.spine is None else {self.spine: "MLP"}
        for index, x in enumerate(self.heads):
            names[x] = f"{head}{index}, {names[x]}" if x in names else f"{head}{index}"
        return names


def lay_out(picture: Picture) -> Layout:
    """Give everything in the picture its coordinates; the same picture always gets the same ones.

    Example:
        >>> from circuitvit.export.picture import picture_of
        >>> from circuitvit.graph import Circuit
        >>> from circuitvit.graph.eap_ig import transformer_graph
        >>> layout = lay_out(picture_of(Circuit.from_edges(transformer_graph(1, 2), ["input->logits"])))
        >>> layout.boxes["logits"].bottom < layout.boxes["input"].top
        True
    """
    grid = grid_of(picture)
    routes = routes_of(picture, grid)
    columns = _Columns(picture, grid, routes)
    rows = _Rows(picture, grid, routes, columns)
    boxes, dots, ports = {}, _dots(picture, grid, columns, rows), {}
    for node in picture.nodes:
        if node.present:
            x, y = _middle(grid.cells[node.name], columns, rows)
            width, height = _box_width(node), _box_height(node)
            boxes[node.name] = Box(x - width / 2, y - height / 2, width, height)
            pitch = _port_pitch(node)
            first = x - pitch * (len(node.ports) - 1) / 2
            ports[node.name] = {port: first + pitch * index for index, port in enumerate(node.ports)}
    curves = _Curves(grid, columns, rows, boxes, ports, routes)
    return Layout(
        width=columns.width,
        height=rows.height,
        boxes=boxes,
        dots=dots,
        ports=ports,
        lines=tuple(curves.line(route) for route in routes),
        stripes=rows.stripes(picture.blocks),
        heads=tuple(columns.middles[column] for column in grid.heads),
        spine=columns.middles[grid.spine] if grid.has_mlps else None,
    )


# -- sizes, columns and rows ---------------------------------------------------------------------


def _middle(cell: tuple[int, int], columns: _Columns, rows: _Rows) -> Point:
    row, column = cell
    return columns.middles[column], (rows.tops[row] + rows.bottoms[row]) / 2


def _dots(picture: Picture, grid: Grid, columns: _Columns, rows: _Rows) -> dict[str, Point]:
    """Where nodes outside the circuit are: in the middle of their cell, several as a small block."""
    found = {}
    for cell, names in _outside(picture, grid).items():
        x, y = _middle(cell, columns, rows)
        across, high = _block(len(names))
        for place, name in enumerate(names):
            right, down = place % across, place // across
            offset = right - (across - 1) / 2, down - (high - 1) / 2
            found[name] = (x + DOT_SPACE * offset[0], y + DOT_SPACE * offset[1])
    return found


def _outside(picture: Picture, grid: Grid) -> dict[tuple[int, int], list[str]]:
    """The nodes outside the circuit in each cell that has some."""
    found: dict[tuple[int, int], list[str]] = {}
    for node in picture.nodes:
        if not node.present:
            found.setdefault(grid.cells[node.name], []).append(node.name)
    return found


def _block(count: int) -> tuple[int, int]:
    """How many dots of one cell stand side by side, and above each other."""
    across = max(-(-count // DOTS_HIGH), min(count, DOTS_HIGH))
    return across, -(-count // across)


def _box_width(node: DrawnNode) -> float:
    """How wide a node's box must be for its name, its ports and its thumbnail."""
    name = min(text_width(clean(node.name), NAME_SIZE), NAME_MAX)
    thumb = node.thumb[0] + 2 * THUMB_PAD if node.thumb else 0.0
    label = text_width(fit(node.label, LABEL_SIZE, LABEL_MAX), LABEL_SIZE)
    return max(name + 14, label + 10, _port_pitch(node) * len(node.ports) + 8, 46.0, thumb)


def _box_height(node: DrawnNode) -> float:
    label = LABEL_LINE if node.label else 0.0
    return BOX_HEIGHTS[node.kind] + label + (node.thumb[1] + THUMB_PAD if node.thumb else 0.0)


def _port_pitch(node: DrawnNode) -> float:
    """From one port to the next: enough for the longest of their names."""
    names = [fit(clean(port), PORT_SIZE, PORT_MAX) for port in ("", *node.ports)]
    return max(PORT_PITCH, *(text_width(name, PORT_SIZE) + 6 for name in names))


class _Columns:
    """x of every column, and of every trunk in its lane."""

    def __init__(self, picture: Picture, grid: Grid, routes: Sequence[Route]) -> None:
        widths = [DOT_SPACE] * grid.n_columns
        for node in picture.nodes:
            if node.present:
                column = grid.cells[node.name][1]
                widths[column] = max(widths[column], _box_width(node))
        for (_, column), names in _outside(picture, grid).items():
            widths[column] = max(widths[column], DOT_SPACE * _block(len(names))[0])
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
            self.track.update({key: x + offset for key, offset in offsets.items()})
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
    start = (total - squeeze * sum(widths)) / 2
    edges = list(accumulate((width * squeeze for width in widths), initial=start))
    middles = [(left + right) / 2 for left, right in pairwise(edges)]
    return {id(trunk): middles[place] for trunk, place in placed}, total


class _Rows:
    """y of every row: high where boxes stand, gaps wide where many curves turn."""

    def __init__(self, picture: Picture, grid: Grid, routes: Sequence[Route], columns: _Columns) -> None:
        heights = [DOT_SPACE] * grid.n_rows
        for node in picture.nodes:
            if node.present:
                heights[node.row] = max(heights[node.row], _box_height(node))
        for (row, _), names in _outside(picture, grid).items():
            heights[row] = max(heights[row], DOT_SPACE * _block(len(names))[1])
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

    def stripes(self, blocks: Sequence[str | None]) -> dict[str, tuple[float, float]]:
        """Top and bottom of each block, meeting half way between neighbours."""
        found: dict[str, tuple[float, float]] = {}
        for row, block in enumerate(blocks):
            if block is not None:
                top = self.tops[row] - self.gap_above(row) / 2
                bottom = self.bottoms[row] + self.gap_above(row - 1) / 2
                found[block] = (top, found[block][1] if block in found else bottom)
        return found


def _gaps(grid: Grid, routes: Sequence[Route], columns: _Columns) -> list[float]:
    """Height of the gap above each row but the last."""
    turns: list[dict[object, float]] = [{} for _ in range(grid.n_rows)]
    for route in routes:
        (start, from_column), (stop, to_column) = grid.cells[route.edge.sender], grid.cells[route.edge.target]
        x0, x1 = columns.middles[from_column], columns.middles[to_column]
        if route.trunk is None:
            turns[start][route.line] = abs(x1 - x0)
        else:
            track = columns.track[id(route.trunk)]
            turns[start][route.line] = abs(track - x0)
            turns[stop - 1][route.edge.name] = abs(x1 - track)
    return [_gap(list(turn.values()), columns.width) for turn in turns[:-1]]


def _gap(sideways: Sequence[float], width: float) -> float:
    """Room for that many curves that go that far sideways; far ones need height, or they get flat."""
    if not sideways:
        return 8.0
    return min(34.0 + 0.013 * width, 17.0 + 0.025 * max(sideways) + 2.2 * sqrt(len(sideways)))


# -- curves --------------------------------------------------------------------------------------


@dataclass
class _Curves:
    """Draws routes as curves."""

    grid: Grid
    columns: _Columns
    rows: _Rows
    boxes: Mapping[str, Box]
    ports: Mapping[str, Mapping[str, float]]
    routes: Sequence[Route]

    def __post_init__(self) -> None:
        self.leaving = self._places_to_leave()

    def line(self, route: Route) -> Line:
        """The curve of one edge."""
        edge, trunk = route.edge, route.trunk
        (start, _), (stop, column) = self.grid.cells[edge.sender], self.grid.cells[edge.target]
        x0, x1 = self.leaving[route.line], self.ports[edge.target][edge.port]
        bend, land = (x0, self.rows.tops[start] - STUB), (x1, self.rows.bottoms[stop] + STUB)
        points: list[Point] = [(x0, self.boxes[edge.sender].top), bend]
        if trunk is not None:
            track = self.columns.track[id(trunk)]
            tops, bottoms = self.rows.tops, self.rows.bottoms
            rows = range(start + 1, max(trunk.first_stop, start + 2))
            height = tops[start]
            up = self._turn_at(rows, trunk.column, trunk.lane, track - x0, lambda row: height - bottoms[row])
            rows = range(stop - 1, min(up, stop - 1) - 1, -1)
            floor = bottoms[stop]
            off = self._turn_at(rows, column, trunk.lane, track - x1, lambda row: tops[row] - floor)
            points += [(track, bottoms[up] + STUB), (track, tops[off] - STUB)]
        points += [land, (x1, self.boxes[edge.target].bottom)]
        curve = [points[0]]
        for (low, high), turn in zip(pairwise(points), self._turns(points), strict=True):
            curve += _piece(low, high, turn)
        return Line(edge, tuple(curve))

    def _turns(self, points: Sequence[Point]) -> list[float]:
        """For each piece, how soon it turns sideways, 0.3 (at once) to 0.8 (late).

        Of the lines that fan out of a sender the far ones turn first, and of those that come together at a
        target the far ones turn last, so that neighbours nest in each other and do not cross.
        """
        turns = [0.55] * (len(points) - 1)
        if len(points) > 4:
            reach = 0.4 * self.columns.width
            far = [min(1.0, abs(high[0] - low[0]) / reach) for low, high in pairwise(points)]
            turns[1], turns[3] = 0.8 - 0.5 * far[1], 0.3 + 0.5 * far[3]
        return turns

    def _turn_at(
        self, rows: range, column: int, lane: int, sideways: float, height: Callable[[int], float]
    ) -> int:
        """The row at which the way between a column and a lane ends: the first, or a later free one.

        It needs a `height` in proportion to how far it goes `sideways`, or the curve gets flat.
        """
        inner = lane if lane <= column else lane - 1  # the column beside the lane, on the way to it
        for row in rows[:-1]:
            if height(row) >= 0.4 * abs(sideways) or not self.grid.is_clear(row, row, column, inner):
                return row
        return rows[-1]

    def _places_to_leave(self) -> dict[object, float]:
        """x at which each line leaves its sender: side by side on its box, in order of where they go."""
        aims: dict[str, dict[object, float]] = {}
        for route in self.routes:
            edge, trunk = route.edge, route.trunk
            aim = self.ports[edge.target][edge.port] if trunk is None else self.columns.track[id(trunk)]
            aims.setdefault(edge.sender, {}).setdefault(route.line, aim)
        places: dict[object, float] = {}
        for sender, goals in aims.items():
            width, (middle, _) = self.boxes[sender].width, self.boxes[sender].centre
            pitch = min(SPREAD, 0.7 * width / len(goals))
            ordered = sorted(goals, key=lambda line: goals[line])
            first = middle - pitch * (len(goals) - 1) / 2
            above = [index for index, line in enumerate(ordered) if abs(goals[line] - middle) < 0.5]
            if above:  # a target right above: that line shall be straight, the others give way
                room = width / 2 - 8
                first = max(middle - pitch * above[0], middle - room)
                first = min(first, middle + room - pitch * (len(goals) - 1))
            places.update({line: first + pitch * index for index, line in enumerate(ordered)})
        return places


def _piece(low: Point, high: Point, turn: float) -> tuple[Point, Point, Point]:
    """The cubic curve from `low` up to `high` that is upright at both ends."""
    (x0, y0), (x1, y1) = low, high
    return (x0, y0 + turn * (y1 - y0)), (x1, y1 - (1.1 - turn) * (y1 - y0)), (x1, y1)

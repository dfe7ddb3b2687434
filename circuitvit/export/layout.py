"""Coordinates: where every box, port and curve of a picture is, in pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from circuitvit.export.axes import Box, Columns, Point, Rows, box_height, box_width, port_pitch
from circuitvit.export.curves import Line, Pen
from circuitvit.export.grid import grid_of
from circuitvit.export.picture import DrawnNode, Picture
from circuitvit.export.routes import routes_of


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
        stripes: top and bottom of each layer.
        heads: centre x of the column of each head.
        spine: centre x of the column of MLPs, or None when there is none.
    """

    width: float
    height: float
    boxes: Mapping[str, Box]
    dots: Mapping[str, Point]
    ports: Mapping[str, Mapping[str, float]]
    lines: tuple[Line, ...]
    stripes: Mapping[int, tuple[float, float]]
    heads: tuple[float, ...]
    spine: float | None


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
    columns = Columns(picture, grid, routes)
    rows = Rows(picture, grid, routes, columns)
    boxes, dots = {}, {}
    for node in picture.nodes:
        row, column = grid.cells[node.name]
        if node.present:
            boxes[node.name] = _box(node, columns.middles[column], (rows.tops[row] + rows.bottoms[row]) / 2)
        else:
            dots[node.name] = (columns.middles[column], (rows.tops[row] + rows.bottoms[row]) / 2)
    ports = {node.name: _ports(node, boxes[node.name].middle) for node in picture.nodes if node.present}
    pen = Pen(grid, columns, rows, boxes, ports, routes)
    return Layout(
        width=columns.width,
        height=rows.height,
        boxes=boxes,
        dots=dots,
        ports=ports,
        lines=tuple(pen.line(route) for route in routes),
        stripes=_stripes(picture, rows),
        heads=tuple(columns.middles[column] for column in grid.heads),
        spine=columns.middles[grid.spine] if grid.has_mlps else None,
    )


def _box(node: DrawnNode, x: float, y: float) -> Box:
    width, height = box_width(node), box_height(node)
    return Box(x - width / 2, y - height / 2, width, height)


def _ports(node: DrawnNode, middle: float) -> dict[str, float]:
    pitch = port_pitch(node)
    first = middle - pitch * (len(node.ports) - 1) / 2
    return {port: first + pitch * index for index, port in enumerate(node.ports)}


def _stripes(picture: Picture, rows: Rows) -> dict[int, tuple[float, float]]:
    """Top and bottom of each layer, meeting half way between neighbours."""
    found: dict[int, tuple[float, float]] = {}
    for row, layer in enumerate(picture.layers):
        if layer is None:
            continue
        top, bottom = (
            rows.tops[row] - rows.gap_above(row) / 2,
            rows.bottoms[row] + rows.gap_above(row - 1) / 2,
        )
        found[layer] = (top, found[layer][1]) if layer in found else (top, bottom)
    return found

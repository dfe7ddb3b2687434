"""What the interactive page is told: the picture with its coordinates, the graph behind it, and the maps.

All JSON values, in an order that depends on nothing but the circuit. Names are inert here already (`clean`);
the page puts them into the document as text, never as markup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from circuitvit.errors import OptionError, unknown_name
from circuitvit.export import style
from circuitvit.export.heat import CUT, LEAST_CUT, LEAST_TIMES_MEAN, RAMP
from circuitvit.export.layout import Layout, lay_out
from circuitvit.export.legend import PORT_NAMES
from circuitvit.export.maps import Maps
from circuitvit.export.packing import packed_maps
from circuitvit.export.picture import DrawnEdge, DrawnNode, Picture
from circuitvit.export.svg import path_of
from circuitvit.export.text import clean
from circuitvit.graph import Circuit, Graph, node_of, port_of

Curve = Sequence[tuple[int, float]]
"""Faithfulness at several sizes: `(edges, faithfulness)`."""

Intervals = Mapping[str, tuple[float, float]]
"""For some edges, by name, the ends of the confidence interval of the effect."""


def page_data(
    circuit: Circuit,
    picture: Picture,
    maps: Maps | None = None,
    curve: Curve | None = None,
    intervals: Intervals | None = None,
) -> dict[str, Any]:
    """Everything that the page shows, as JSON values.

    Args:
        circuit: that `picture` is of.
        picture: made with room for thumbnails where `maps` has some.
        maps: what nodes do on a pair of images.
        curve: faithfulness at several sizes.
        intervals: of the effects of edges.

    Raises:
        OptionError: if a size of the curve is negative, or an interval's ends are in the wrong order.
        NameNotFoundError: if an interval belongs to no edge of the graph.
    """
    unknown = next((name for name in intervals or () if name not in circuit.graph), None)
    if unknown is not None:
        raise unknown_name("edge", unknown, circuit.graph.edges)
    layout = lay_out(picture)
    places = {node.name: index for index, node in enumerate(picture.nodes)}
    return {
        "title": picture.title,
        "counts": picture.counts,
        "origin": picture.origin,
        "size": [_n(layout.width), _n(layout.height)],
        "stripes": [[layer, _n(top), _n(bottom)] for layer, (top, bottom) in sorted(layout.stripes.items())],
        "columns": _columns(layout),
        "groups": list(picture.groups),
        "dashes": [style.dash_of(group) for group in range(len(picture.groups))],
        "ports": PORT_NAMES,
        "meanings": {sign: picture.meaning(sign) for sign in ("supports", "opposes", "unscored")},
        "maxWidth": picture.max_width,
        "strongest": picture.strongest,
        "total": len(circuit),
        "thumb": max((node.thumb for node in picture.nodes), default=0.0),
        "nodes": [_node(node, layout) for node in picture.nodes],
        **_wiring(circuit, places),
        "edges": [
            _edge(edge, circuit.graph, path_of(line), _interval(edge.name, intervals))
            for edge, line in zip(picture.edges, layout.lines, strict=True)
        ],
        "curve": _checked(curve),
        "ramp": [list(stop) for stop in RAMP],
        "rampEnd": [CUT, LEAST_CUT, LEAST_TIMES_MEAN],
        "maps": None if maps is None else packed_maps(maps, _by_strength(picture)),
    }


def _columns(layout: Layout) -> list[list[Any]]:
    """The name and the centre of each column."""
    names: dict[float, str] = {} if layout.spine is None else {layout.spine: "MLP"}
    for head, x in enumerate(layout.heads):
        names[x] = f"head {head}, {names[x]}" if x in names else f"head {head}"
    return [[name, _n(x)] for x, name in sorted(names.items())]


def _node(node: DrawnNode, layout: Layout) -> dict[str, Any]:
    said: dict[str, Any] = {"name": clean(node.name), "kind": node.kind, "layer": node.layer, "row": node.row}
    if not node.present:
        x, y = layout.dots[node.name]
        return {**said, "dot": [_n(x), _n(y)]}
    box = layout.boxes[node.name]
    ports = [[clean(port), _n(x), port in node.used] for port, x in layout.ports[node.name].items()]
    where = [_n(box.left), _n(box.top), _n(box.width), _n(box.height)]
    return {**said, "box": where, "ports": ports, "thumb": node.thumb}


def _wiring(circuit: Circuit, places: Mapping[str, int]) -> dict[str, Any]:
    """How the graph hangs together, for following paths: nodes of senders, and what receivers feed."""
    graph = circuit.graph
    receivers = []
    for index, name in enumerate(graph.receivers):
        stage = graph.receiver_stages[index]
        nodes = graph.stages[stage]
        local, first = index - graph.receiver_slices[stage].start, graph.sender_slices[stage].start
        fed = [first + sender for sender in (nodes.feeds or ())[local]]
        mixes = bool((nodes.mixes or ())[local])
        readout = not nodes.senders
        receivers.append([places[node_of(name)], clean(port_of(name)), fed, int(mixes), int(readout)])
    senders = [
        [places[name], int(not graph.stages[stage].receivers)]
        for name, stage in zip(graph.senders, graph.sender_stages, strict=True)
    ]
    return {"senders": senders, "receivers": receivers}


def _edge(edge: DrawnEdge, graph: Graph, path: str, interval: tuple[float, float] | None) -> list[Any]:
    receiver = f"{edge.target}<{edge.port}>" if edge.port else edge.target
    signs = ("unscored", "supports", "opposes")
    return [
        graph.sender_index[edge.sender],
        graph.receiver_index[receiver],
        edge.group,
        None if edge.score is None else float(f"{edge.score:.6g}"),
        signs.index(edge.sign),
        round(edge.look.width, 2),
        round(edge.look.opacity, 2),
        path,
        *([] if interval is None else interval),
    ]


def _interval(name: str, intervals: Intervals | None) -> tuple[float, float] | None:
    if not intervals or name not in intervals:
        return None
    low, high = map(float, intervals[name])
    if not low <= high:
        raise OptionError(f"the interval of {name} runs from {low:g} to {high:g}: give the lower end first")
    return low, high


def _checked(curve: Curve | None) -> list[list[float]]:
    points = [] if curve is None else [(int(size), float(value)) for size, value in curve]
    if any(size < 0 or not isfinite(value) for size, value in points):
        raise OptionError("the curve is a list of (edges, faithfulness): finite numbers, no size below 0")
    return [[size, float(f"{value:.4g}")] for size, value in sorted(points)]


def _by_strength(picture: Picture) -> list[str]:
    """Nodes by the sum of the magnitudes of their edges, largest first; ties in graph order."""
    totals = {node.name: 0.0 for node in picture.nodes if node.present}
    for edge in picture.edges:
        for end in (edge.sender, edge.target):
            totals[end] += abs(edge.score or 0.0)
    return sorted(totals, key=lambda name: -totals[name])


def _n(value: float) -> float:
    rounded = round(value, 1)
    return int(rounded) if rounded == int(rounded) else rounded

"""The interactive page: one HTML file that holds everything it needs and may ask for nothing else.

The template, the styles and the scripts are files of their own in `page/`. They are put into the document
here, and a content security policy names their hashes: the browser runs these scripts and no others, and is
forbidden every connection, whatever a name or a title may hold.

What the page is told are JSON values, in an order that depends on nothing but the circuit: the picture with
its coordinates, the graph behind it, and the maps. Names are inert here already (`clean`); the page puts them
into the document as text, never as markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from math import isfinite
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from markupsafe import Markup

from circuitvit.errors import OptionError, unknown_name
from circuitvit.export import style
from circuitvit.export.figure import PORT_NAMES
from circuitvit.export.findings import findings_of
from circuitvit.export.layout import DOT_SPACE, Layout, Line, lay_out
from circuitvit.export.maps import CUT, LEAST_CUT, LEAST_TIMES_MEAN, RAMP, Array, Maps, Side
from circuitvit.export.picture import DrawnEdge, DrawnNode, Picture
from circuitvit.export.svg import image_uri, path_of
from circuitvit.graph import Circuit, Graph, node_of, port_of
from circuitvit.graph.files import clean

if TYPE_CHECKING:
    from circuitvit.verification import Report

_NAMES = ("wiring", "maps", "diagram", "rows", "bundles", "state", "details", "figure", "search", "main")
SCRIPTS = ("common.js", *(f"{name}.js" for name in _NAMES))  # in the order in which they need each other

FINE_STEP = 16.0 / 255  # nats between levels in the default row: 16 nats below the largest is nothing
ROUGH_STEP = 0.5
ROUGH_LEVELS = 16
FULL_BYTES = 1_000_000  # base64 letters that all full patterns together may take

COLOURS = {"ramp": [list(stop) for stop in RAMP], "rampEnd": [CUT, LEAST_CUT, LEAST_TIMES_MEAN]}
"""What a page is told of the colours of its maps."""

Curve = Sequence[tuple[int, float]]
"""Faithfulness at several sizes: `(edges, faithfulness)`."""

Intervals = Mapping[str, tuple[float, float]]
"""For some edges, by name, the ends of the confidence interval of the effect."""

_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def page_of(
    data: Mapping[str, Any], report: Report | None = None, gallery: Sequence[Mapping[str, Any]] = ()
) -> str:
    """The page as HTML; the same data gives the same text, byte for byte.

    Args:
        data: from `page_data`.
        report: of the circuit's verification, which is written under the diagram.
        gallery: top images of nodes, which stand there too.
    """
    return document(
        "page/page.html",
        [f"page/{name}" for name in SCRIPTS],
        ["page/page.css"],
        data,
        title=data["title"] or "Circuit",
        counts=data["counts"],
        origin=data["origin"],
        report=report,
        findings=[] if report is None else findings_of(report),
        gallery=gallery,
    )


def document(
    template: str, scripts: Sequence[str], styles: Sequence[str], data: Mapping[str, Any], **texts: Any
) -> str:
    """A page that holds all it needs and may ask for nothing else: the same data gives the same text.

    Args:
        template: and all other files: their places below this folder.
        scripts: in the order in which they need each other.
        styles: one after the other.
        data: what the scripts find in the element `data`.
        texts: what else the template names; it goes in as text.
    """
    script, style = ("\n".join(map(_resource, names)) for names in (scripts, styles))
    return (
        _environment()
        .get_template(template)
        .render(
            **texts,
            policy=_policy(script, style),
            style=Markup(style),  # our own files, whose hashes must not change
            script=Markup(script),
            data=Markup(safe_json(data)),
        )
    )


@lru_cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_resource),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: clean(value) if type(value) is str else value,  # names of files and classes
    )
    environment.filters["number"] = style.number
    return environment


def safe_json(data: Mapping[str, Any]) -> str:
    """JSON that may stand inside a script element: no character in it can end the element.

    Example:
        >>> safe_json({"title": "</script>"})
        '{"title":"\\\\u003c/script\\\\u003e"}'
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for letter, escape in _ESCAPES.items():
        text = text.replace(letter, escape)
    return text


def _policy(script: str, style: str) -> str:
    """The content security policy: nothing is allowed but our script, our style and images in the file."""
    script_hash, style_hash = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, style)
    )
    return (
        f"default-src 'none'; script-src 'sha256-{script_hash}'; style-src 'sha256-{style_hash}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


@lru_cache
def _resource(name: str) -> str:
    return (files("circuitvit.export") / name).read_text(encoding="utf-8")


# -- the picture and the graph --------------------------------------------------------------------


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
        "rows": _rows(picture, layout),
        "rowBlocks": list(picture.blocks),
        "columns": [[name, _n(x)] for x, name in sorted(layout.column_names().items())],
        "groups": list(picture.groups),
        "dashes": [style.dash_of(group) for group in range(len(picture.groups))],
        "ports": PORT_NAMES,
        "meanings": {sign: picture.meaning(sign) for sign in ("supports", "opposes", "unscored")},
        "measure": "share" if picture.shares_of else "effect",
        "maxWidth": picture.max_width,
        "strongest": picture.strongest,
        "total": len(circuit),
        "thumb": next((node.thumb for node in picture.nodes if node.thumb), None),
        "nodes": [_node(node, layout) for node in picture.nodes],
        **_wiring(circuit, places),
        "edges": [
            _edge(edge, circuit.graph, line, intervals or {})
            for edge, line in zip(picture.edges, layout.lines, strict=True)
        ],
        "curve": _checked(curve),
        **COLOURS,
        "maps": None if maps is None else packed_maps(maps, by_strength(picture)),
    }


def _rows(picture: Picture, layout: Layout) -> list[list[float]]:
    """Top and bottom of each row, the lowest first: what the page moves when it folds layers."""
    found: list[list[float]] = [[] for _ in picture.blocks]
    for node in picture.nodes:
        if node.present:
            box = layout.boxes[node.name]
            found[node.row] += [box.top, box.bottom]
        else:
            y = layout.dots[node.name][1]
            found[node.row] += [y - DOT_SPACE / 2, y + DOT_SPACE / 2]
    return [[_n(min(row)), _n(max(row))] for row in found]


def _node(node: DrawnNode, layout: Layout) -> dict[str, Any]:
    said: dict[str, Any] = {"name": clean(node.name), "kind": node.kind, "block": node.block, "row": node.row}
    if not node.present:
        x, y = layout.dots[node.name]
        return {**said, "dot": [_n(x), _n(y)]}
    box = layout.boxes[node.name]
    ports = [[clean(port), _n(x), port in node.used] for port, x in layout.ports[node.name].items()]
    where = [_n(box.left), _n(box.top), _n(box.width), _n(box.height)]
    return {**said, "box": where, "ports": ports, "thumb": node.thumb, "label": node.label}


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


def _edge(edge: DrawnEdge, graph: Graph, line: Line, intervals: Intervals) -> list[Any]:
    receiver = f"{edge.target}<{edge.port}>" if edge.port else edge.target
    low, high = map(float, intervals.get(edge.name, (0.0, 0.0)))
    if not low <= high:
        raise OptionError(
            f"the interval of {edge.name} is from {low:g} to {high:g}: give the lower end first"
        )
    return [
        graph.sender_index[edge.sender],
        graph.receiver_index[receiver],
        edge.group,
        None if edge.score is None else float(f"{edge.score:.6g}"),
        ("unscored", "supports", "opposes").index(edge.sign),
        round(edge.look.width, 2),
        round(edge.look.opacity, 2),
        path_of(line.points),
        *((low, high) if edge.name in intervals else ()),
    ]


def _checked(curve: Curve | None) -> list[list[float]]:
    points = [] if curve is None else [(int(size), float(value)) for size, value in curve]
    if any(size < 0 or not isfinite(value) for size, value in points):
        raise OptionError("the curve is a list of (edges, faithfulness): finite numbers, no size below 0")
    return [[size, float(f"{value:.4g}")] for size, value in sorted(points)]


def by_strength(picture: Picture) -> list[str]:
    """Nodes by the sum of the magnitudes of their edges, largest first; ties in graph order."""
    totals = {node.name: 0.0 for node in picture.nodes if node.present}
    for edge in picture.edges:
        for end in (edge.sender, edge.target):
            totals[end] += abs(edge.score or 0.0)
    return sorted(totals, key=lambda name: -totals[name])


def _n(value: float) -> float:
    rounded = round(value, 1)
    return int(rounded) if rounded == int(rounded) else rounded


# -- maps ----------------------------------------------------------------------------------------


def packed_maps(maps: Maps, by_strength: Sequence[str]) -> dict[str, Any]:
    """The maps as JSON values: quantised, compressed, base64.

    An attention pattern is stored as the logarithm of its entries, which serves twice: a softmax of it is the
    pattern, and with each row's largest score added it is the scores. The row that is shown by default has
    256 levels; all other rows have 16, half a nat apart, which is as fine as a heat map shows. Each head's
    full pattern is packed apart, since the browser unpacks it when a patch is clicked and not before.

    Args:
        maps: of the nodes that are shown.
        by_strength: names of heads; where full patterns get too large, the first ones keep theirs.
    """
    heads = {name for side in maps.sides.values() for name in side.heads}
    full: dict[str, dict[str, str]] = {name: {} for name in maps.sides}
    room = FULL_BYTES
    for head in by_strength:
        if head not in heads:
            continue
        packs = {
            name: _pack(_levels(side.heads[head].pattern, ROUGH_STEP, ROUGH_LEVELS))
            for name, side in maps.sides.items()
        }
        room -= sum(map(len, packs.values()))
        if room < 0:
            break
        for name, pack in packs.items():
            full[name][head] = pack
    return {
        "grid": list(maps.grid),
        "frame": list(maps.sheet.grid[-2:]),
        "prefix": list(maps.prefix),
        "groups": list(maps.groups),
        "fineStep": FINE_STEP,
        "roughStep": ROUGH_STEP,
        "sides": {name: _side(side, maps, full[name]) for name, side in maps.sides.items()},
    }


def _side(side: Side, maps: Maps, full: dict[str, str]) -> dict[str, Any]:
    """One image: its nodes' default rows one after the other in one pack, each with its scale.

    A head has three rows in the pack (pattern, weights, largest score of each query), all else has one.
    """
    rows: list[bytes] = []
    nodes: dict[str, Any] = {}
    for name, head in side.heads.items():
        tops = head.scores.max(axis=1)
        low, high = float(tops.min()), float(tops.max())
        row = head.row(maps.has_class_token)
        rows += [
            _levels(row, FINE_STEP, 256),
            _linear(head.weights, 0.0, float(head.weights.max())),
            _linear(tops, low, high),
        ]
        # Without a class token the row is an average, whose logarithm stands for the scores.
        top = tops[0] if maps.has_class_token else np.log(row.max())
        nodes[name] = {
            "top": _round(top),
            "weight": _round(head.weights.max()),
            "low": _round(low),
            "high": _round(high),
        }
    for name, values in side.units.items():
        low, high = float(values.min()), float(values.max())
        rows.append(_linear(values, low, high))
        nodes[name] = {"least": _round(low), "most": _round(high)}
    for name, values in side.writes.items():
        rows.append(_linear(values, 0.0, float(values.max())))
        nodes[name] = {"norm": _round(values.max())}
    return {
        "image": image_uri(side.image),
        "words": [clean(word) for word in side.words],
        "nodes": nodes,
        "rows": _pack(b"".join(rows)),
        "full": full,
    }


def _levels(shares: Array, step: float, count: int) -> bytes:
    """Shares as how far their logarithms are below the row's largest, in steps."""
    logs = np.log(np.maximum(shares, 1e-30))
    return _bytes(np.minimum(np.rint((logs.max(axis=-1, keepdims=True) - logs) / step), count - 1))


def _linear(values: Array, low: float, high: float) -> bytes:
    share = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return _bytes(np.rint(255 * np.clip(share, 0, 1)))


def _bytes(values: Array) -> bytes:
    return bytes(values.astype(np.uint8).tobytes())


def _round(value: Any) -> float:
    """Five digits: more than a quantised row can use, and the same on machines that round otherwise."""
    return float(f"{float(value):.5g}")


def _pack(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content, 9)).decode()

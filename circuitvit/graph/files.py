"""Circuits and scores as JSON: versioned, validated on load, never executable.

Our own layout names the graph's stages, so a file can be drawn and compared without the model. The
layout of EAP-IG and MIB (`cfg`, `nodes`, `edges`) is read and written beside it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import jsonschema
import numpy as np

from circuitvit.errors import CircuitViTError, FileError, OptionError
from circuitvit.graph import eap_ig
from circuitvit.graph.circuit import Circuit
from circuitvit.graph.fidelity_file import FIDELITY, fidelity_from_dict, fidelity_to_dict
from circuitvit.graph.provenance import Provenance
from circuitvit.graph.scores import EdgeScores
from circuitvit.graph.topology import EdgeMask, Graph, StageNodes

T = TypeVar("T", Circuit, EdgeScores)

CIRCUIT_SCHEMA = "circuitvit.circuit/1"
SCORES_SCHEMA = "circuitvit.scores/1"
MAX_BYTES = 256 * 2**20  # far above any real file; a larger one is not read into memory

_NAMES = {"type": "array", "items": {"type": "string", "maxLength": 200}, "maxItems": 100_000}
_INDEX = {"type": "integer", "minimum": 0, "maximum": 100_000}
_STAGE = {
    "type": "object",
    "required": ["name", "kind", "layer", "senders", "receivers", "feeds", "mixes"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string"},
        "kind": {"type": "string"},
        "layer": _INDEX,
        "senders": _NAMES,
        "receivers": _NAMES,
        "feeds": {"type": "array", "items": {"type": "array", "items": _INDEX}},
        "mixes": {"type": "array", "items": {"type": "boolean"}},
        "reads_from": {"type": "string"},
        "writes_to": {"type": "string"},
    },
}
_GRAPH = {
    "type": "object",
    "required": ["stages", "groups"],
    "additionalProperties": False,
    "properties": {
        "stages": {"type": "array", "items": _STAGE, "minItems": 1, "maxItems": 10_000},
        "groups": {**_NAMES, "minItems": 1},
        "d_model": {"type": "integer", "minimum": 0},
    },
}
_PROVENANCE = {
    "type": "object",
    "properties": {
        "model": {"type": "string"},
        "weights": {"type": "string"},
        "task": {"type": "string"},
        "method": {"type": "string"},
        "parameters": {"type": "object"},
        "seed": {"type": ["integer", "null"]},
        "library": {"type": "string"},
    },
}
_SCORE_MAP = {"type": "object", "additionalProperties": {"type": "number"}}
_CIRCUIT_FILE = {
    "type": "object",
    "required": ["schema", "graph", "edges", "provenance"],
    "properties": {
        "schema": {"const": CIRCUIT_SCHEMA},
        "graph": _GRAPH,
        "edges": {**_NAMES, "maxItems": 10_000_000},
        "scores": _SCORE_MAP,
        "provenance": _PROVENANCE,
    },
}
_SCORES_FILE = {
    "type": "object",
    "required": ["schema", "graph", "method", "direction", "scores", "provenance"],
    "properties": {
        "schema": {"const": SCORES_SCHEMA},
        "graph": _GRAPH,
        "method": {"type": "string"},
        "direction": {"enum": ["noising", "denoising"]},
        "scores": _SCORE_MAP,
        "measured": {**_NAMES, "maxItems": 10_000_000},
        "fidelity": FIDELITY,
        "provenance": _PROVENANCE,
    },
}


# -- circuits ------------------------------------------------------------------------------------


def circuit_to_dict(circuit: Circuit) -> dict[str, Any]:
    """A circuit as JSON values; scores are those of its own edges."""
    edges = list(circuit)
    content: dict[str, Any] = {
        "schema": CIRCUIT_SCHEMA,
        "provenance": circuit.provenance.to_dict(),
        "edges": edges,
        "graph": graph_to_dict(circuit.graph),
    }
    if circuit.values is not None:
        content["scores"] = dict(zip(edges, circuit.values[circuit.kept].tolist(), strict=True))
    return content


def save_circuit(circuit: Circuit, path: str | Path, layout: str = "circuitvit") -> Path:
    """Write a circuit. See `Circuit.save`."""
    if layout == "circuitvit":
        return write_json(path, circuit_to_dict(circuit))
    if layout == "eap-ig":
        return write_json(path, eap_ig.circuit_to_dict(circuit))
    raise OptionError(f"unknown layout {layout!r}: choose 'circuitvit' or 'eap-ig'")


def load_circuit(path: str | Path, graph: Graph | None = None) -> Circuit:
    """Read a circuit. See `Circuit.load`."""
    content = read_json(path)
    if "cfg" in content:
        return _guarded(path, lambda: _same_graph(path, eap_ig.circuit_from_dict(content, graph), graph))
    check_version(path, content, _CIRCUIT_FILE, CIRCUIT_SCHEMA)

    def build() -> Circuit:
        own = graph_from_dict(content["graph"])
        for name, count in Counter(content["edges"]).items():
            if count > 1:
                raise FileError(f"{path}: edge {name!r} is listed {count} times")
        circuit = Circuit.from_edges(own, content["edges"], Provenance.from_dict(content["provenance"]))
        if "scores" in content:
            circuit = Circuit(own, circuit.kept, _values(own, content["scores"]), circuit.provenance)
        return _same_graph(path, circuit, graph)

    return _guarded(path, build)


# -- scores --------------------------------------------------------------------------------------


def save_scores(scores: EdgeScores, path: str | Path) -> Path:
    """Write scores. See `EdgeScores.save`."""
    content: dict[str, Any] = {
        "schema": SCORES_SCHEMA,
        "method": scores.method,
        "direction": scores.direction,
        "provenance": scores.provenance.to_dict(),
        "scores": scores.to_dict(),
        "graph": graph_to_dict(scores.graph),
    }
    if scores.measured is not None:
        content["measured"] = list(scores.graph.names_of(scores.measured & scores.graph.edge_mask))
    if scores.fidelity is not None:
        content["fidelity"] = fidelity_to_dict(scores.graph, scores.fidelity)
    return write_json(path, content)


def load_scores(path: str | Path, graph: Graph | None = None) -> EdgeScores:
    """Read scores. See `EdgeScores.load`."""
    content = read_json(path)
    check_version(path, content, _SCORES_FILE, SCORES_SCHEMA)

    def build() -> EdgeScores:
        own = graph_from_dict(content["graph"])
        missing = set(own.edges) - set(content["scores"])
        if missing:
            raise FileError(f"{path}: {len(missing)} edges have no score, such as {min(missing)!r}")
        values = _values(own, content["scores"])
        provenance = Provenance.from_dict(content["provenance"])
        measured = _mask(own, content["measured"]) if "measured" in content else None
        fidelity = fidelity_from_dict(own, content["fidelity"]) if "fidelity" in content else None
        scores = EdgeScores(
            own, values, content["method"], content["direction"], provenance, measured, fidelity
        )
        return _same_graph(path, scores, graph)

    return _guarded(path, build)


# -- graphs --------------------------------------------------------------------------------------


def graph_to_dict(graph: Graph) -> dict[str, Any]:
    """A graph as JSON values: its stages, token groups and width."""
    stages = [
        {
            "name": stage.name,
            "kind": stage.kind,
            "layer": stage.layer,
            "senders": list(stage.senders),
            "receivers": list(stage.receivers),
            "feeds": [list(fed) for fed in stage.feeds or ()],
            "mixes": list(stage.mixes or ()),
            "reads_from": stage.reads_from,
            "writes_to": stage.writes_to,
        }
        for stage in graph.stages
    ]
    return {"stages": stages, "groups": list(graph.groups), "d_model": graph.d_model}


def graph_from_dict(content: Mapping[str, Any]) -> Graph:
    """The inverse of `graph_to_dict`, for content that fits the schema."""
    stages = []
    for stage in content["stages"]:
        feeds = tuple(tuple(int(index) for index in fed) for fed in stage["feeds"])  # 1.0 is an integer too
        n_receivers = len(stage["receivers"])
        if len(feeds) != n_receivers or len(stage["mixes"]) != n_receivers:
            raise FileError(f"stage {stage['name']!r}: feeds and mixes need one entry for each receiver")
        if any(sender >= len(stage["senders"]) for fed in feeds for sender in fed):
            raise FileError(f"stage {stage['name']!r}: feeds points past the last sender")
        stages.append(
            StageNodes(
                stage["name"],
                stage["kind"],
                int(stage["layer"]),
                tuple(stage["senders"]),
                tuple(stage["receivers"]),
                feeds,
                tuple(stage["mixes"]),
                stage.get("reads_from", "residual"),
                stage.get("writes_to", "residual"),
            )
        )
    graph = Graph(tuple(stages), tuple(content["groups"]), int(content.get("d_model", 0)))
    if prod(graph.shape) > eap_ig.MAX_ENTRIES:
        raise FileError(f"a graph of {graph.shape} senders, receivers and groups is no model we know")
    return graph


# -- plumbing ------------------------------------------------------------------------------------


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Write a file whole or not at all: to a file beside it first, which then takes its place.

    Raises:
        FileError: if the folder is missing or cannot be written.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileError(f"cannot write {path}: there is no folder {path.parent}")
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise FileError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def write_json(path: str | Path, content: Mapping[str, Any]) -> Path:
    """Write JSON whole or not at all; numbers of numpy become plain ones.

    Raises:
        FileError: if the folder is missing or cannot be written, or a number is NaN or infinite.
    """
    try:
        text = json.dumps(content, indent=1, allow_nan=False, default=_plain)
    except ValueError as error:
        raise FileError(f"cannot write {path}: it would hold a number that is NaN or infinite") from error
    except TypeError as error:
        raise FileError(f"cannot write {path}: {error}") from error
    return write_bytes(path, f"{text}\n".encode())


def _plain(value: object) -> Any:
    """What JSON can hold instead of numpy's numbers and arrays, which reach us as settings of a method."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not a JSON value")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileError: if the file is missing, too large, not JSON, or not an object.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise FileError(f"{path}: {size / 2**20:.0f} MiB is too large for one of our files")
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, parse_constant=_refuse, parse_float=_finite, parse_int=_moderate)
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise FileError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    return value if np.isfinite(value) else _refuse(digits[:40])


def _moderate(digits: str) -> int:
    """An integer that fits a float, so that it can stand where a score is expected."""
    return int(digits) if len(digits) < 300 else int(_refuse(f"{digits[:40]}..."))


def check_version(
    path: str | Path, content: Mapping[str, Any], schema: Mapping[str, Any], version: str
) -> None:
    """Refuse the content of a file that names another schema, or does not fit its own.

    Raises:
        FileError: naming the file, and the place in it.
    """
    found = content.get("schema")
    if found != version:
        said = f"says {found[:80]!r}" if isinstance(found, str) else "names no schema"
        raise FileError(f"{path}: this version of circuitvit reads {version!r}, the file {said}")
    check_shape(path, content, schema)


def check_shape(path: str | Path, content: Any, schema: Mapping[str, Any]) -> None:
    """Refuse the content of a file that does not fit a JSON schema.

    Raises:
        FileError: naming the file, and the place in it.
    """
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(content))
    if error is not None:
        place = "/".join(str(part) for part in error.absolute_path) or "the file"
        raise FileError(f"{path}: {place}: {error.message[:300]}")


def _guarded(path: str | Path, build: Callable[[], T]) -> T:
    try:
        return build()
    except FileError as error:
        raise error if str(error).startswith(str(path)) else FileError(f"{path}: {error}") from error
    except CircuitViTError as error:  # an unknown edge name or a clash of names is a fault of the file here
        raise FileError(f"{path}: {error}") from error


def _values(graph: Graph, scores: Mapping[str, float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    values = np.zeros(graph.shape)
    for name, score in scores.items():
        values[graph.edge_index(name)] = score
    return values


def _mask(graph: Graph, names: Sequence[str]) -> EdgeMask:
    mask = np.zeros(graph.shape, dtype=bool)
    for name in names:
        mask[graph.edge_index(name)] = True
    return mask


def _same_graph(path: str | Path, item: T, graph: Graph | None) -> T:
    if graph is not None and item.graph != graph:
        raise FileError(f"{path} belongs to another graph: {item.graph} in the file, {graph} asked for")
    return item

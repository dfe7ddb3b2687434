"""Fidelity as JSON values: a part of the files that hold scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from circuitvit.errors import FileError
from circuitvit.graph.fidelity import Fidelity
from circuitvit.graph.topology import Graph

_NUMBER_OR_NONE = {"type": ["number", "null"]}
_COUNT = {"type": "integer", "minimum": 0}
_SHARE = {"type": "number", "minimum": 0, "maximum": 1.000001}
FIDELITY = {
    "type": "object",
    "required": ["n_measured", "n_edges", "pearson", "spearman", "top_k", "top_precision", "sign_agreement",
                 "level", "intervals"],
    "properties": {
        "n_measured": _COUNT,
        "n_edges": _COUNT,
        "pearson": _NUMBER_OR_NONE,
        "spearman": _NUMBER_OR_NONE,
        "top_k": _COUNT,
        "top_precision": _SHARE,
        "sign_agreement": _SHARE,
        "layer_errors": {"type": "object", "patternProperties": {r"^\d{1,6}$": {"type": "number"}},
                         "additionalProperties": False},
        "level": _SHARE,
        "seed": {"type": "integer"},
        "intervals": {
            "type": "object",
            "additionalProperties": {
                "type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2,
            },
        },
    },
}  # fmt: skip
"""What a file may say of it, as a JSON schema."""


def fidelity_to_dict(graph: Graph, fidelity: Fidelity) -> dict[str, Any]:
    """The figures, and for every edge the two ends of its interval."""
    ends = np.stack([fidelity.low[graph.edge_mask], fidelity.high[graph.edge_mask]], axis=1)
    return {**fidelity.summary(), "intervals": dict(zip(graph.edges, ends.tolist(), strict=True))}


def fidelity_from_dict(graph: Graph, content: Mapping[str, Any]) -> Fidelity:
    """The inverse of `fidelity_to_dict`, for content that fits the schema.

    Raises:
        FileError: if an edge has no interval.
        NameNotFoundError: if an interval belongs to no edge.
    """
    missing = set(graph.edges) - set(content["intervals"])
    if missing:
        raise FileError(f"{len(missing)} edges have no interval, such as {min(missing)!r}")
    low, high = np.zeros(graph.shape), np.zeros(graph.shape)
    for name, (lower, upper) in content["intervals"].items():
        place = graph.edge_index(name)
        low[place], high[place] = lower, upper
    return Fidelity.from_summary(content, low, high)

"""How right scores are: their agreement with measured exact effects, and an interval for every edge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from circuitvit.errors import FileError, OptionError
from circuitvit.graph.files import COUNT, record
from circuitvit.graph.topology import Graph, Remade, frozen

_NUMBER = {"type": "number"}
_CORRELATION = {"type": ["number", "null"]}
_SHARE = {"type": "number", "minimum": 0, "maximum": 1.000001}
FIDELITY_SCHEMA = record(
    "n_measured n_edges pearson spearman top_k top_precision sign_agreement level intervals",
    n_measured=COUNT,
    n_edges=COUNT,
    pearson=_CORRELATION,
    spearman=_CORRELATION,
    top_k=COUNT,
    top_precision=_SHARE,
    sign_agreement=_SHARE,
    layer_errors={"patternProperties": {r"^\d{1,6}$": _NUMBER}, **record("", closed=True)},
    level=_SHARE,
    seed={"type": "integer"},
    intervals={
        "type": "object",
        "additionalProperties": {"type": "array", "items": _NUMBER, "minItems": 2, "maxItems": 2},
    },
)
"""What a file of scores says of it."""


@dataclass(frozen=True, eq=False)
class Fidelity(Remade):
    """What measuring the exact effects of some edges says about the scores of all.

    Correlations and shares are estimates for all edges of the graph: an edge that was drawn with a small
    chance counts for the many like it that were not. None stands for what cannot be told, such as a
    correlation with effects that are all alike.

    Attributes:
        n_measured: edges whose exact effects were measured.
        n_edges: edges of the graph.
        pearson: correlation of scores and effects.
        spearman: rank correlation of their magnitudes.
        top_k: how many strongest edges the next figure speaks of.
        top_precision: share of the `top_k` edges by score that are among the `top_k` by effect.
        sign_agreement: share of the edges whose score and effect have one sign.
        layer_errors: mean |score - effect| by the receiver's layer, in units of the metric.
        level: share of the edges whose effect should lie in its interval, such as 0.95.
        low: lower ends of the intervals, `(sender, receiver, group)`, in units of the metric.
        high: upper ends.
        seed: that the measured edges were drawn with.
    """

    n_measured: int
    n_edges: int
    pearson: float | None
    spearman: float | None
    top_k: int
    top_precision: float
    sign_agreement: float
    level: float
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    layer_errors: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.low.shape != self.high.shape or (self.low > self.high).any():
            raise OptionError("the lower ends of intervals must not lie above the upper ends")
        for side in ("low", "high"):
            object.__setattr__(self, side, frozen(np.array(getattr(self, side), dtype=np.float64)))
        object.__setattr__(self, "layer_errors", dict(self.layer_errors))

    @property
    def sentence(self) -> str:
        """All of it in one plain sentence."""
        return fidelity_sentence(self.summary())

    def summary(self) -> dict[str, Any]:
        """Everything but the intervals, as JSON values."""
        plain = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in _ARRAYS}
        return {**plain, "layer_errors": {str(layer): error for layer, error in self.layer_errors.items()}}

    def to_dict(self, graph: Graph) -> dict[str, Any]:
        """The summary, and for every edge of the graph the two ends of its interval."""
        ends = np.stack([self.low[graph.edge_mask], self.high[graph.edge_mask]], axis=1)
        return {**self.summary(), "intervals": dict(zip(graph.edges, ends.tolist(), strict=True))}

    @classmethod
    def from_dict(cls, graph: Graph, content: Mapping[str, Any]) -> Fidelity:
        """The inverse of `to_dict`, for content that fits `FIDELITY_SCHEMA`; unknown keys are left out.

        Raises:
            FileError: if an edge has no interval.
            NameNotFoundError: if an interval belongs to no edge.
        """
        intervals = content["intervals"]
        missing = set(graph.edges) - set(intervals)
        if missing:
            raise FileError(f"{len(missing)} edges have no interval, such as {min(missing)!r}")
        low, high = (
            graph.array_of({name: ends[side] for name, ends in intervals.items()}) for side in (0, 1)
        )
        known = {each.name for each in fields(cls)} - _ARRAYS
        values = {key: value for key, value in content.items() if key in known}
        layers = {int(layer): error for layer, error in content.get("layer_errors", {}).items()}
        return cls(**{**values, "layer_errors": layers, "low": low, "high": high})


_ARRAYS = {"low", "high"}


def fidelity_sentence(summary: Mapping[str, Any]) -> str:
    """A fidelity in one plain sentence, from what `Fidelity.summary` gives and files carry."""
    measured, edges = summary["n_measured"], summary["n_edges"]
    if measured == edges:
        start = f"The exact effects of all {edges:,} edges are known"
    else:
        start = f"Held against the exact effects of {measured:,} of {edges:,} edges"
    return (
        f"{start}: the scores have Pearson correlation {_number(summary['pearson'])} with the effects and "
        f"Spearman correlation {_number(summary['spearman'])} in magnitude; {summary['top_precision']:.0%} "
        f"of their top {summary['top_k']} edges and {summary['sign_agreement']:.0%} of their signs are right."
    )


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"

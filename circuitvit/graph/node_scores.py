"""Node scores: what a method says of every head, every MLP and the input, by token group."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from circuitvit.errors import OptionError, unknown_name
from circuitvit.graph.provenance import Provenance
from circuitvit.graph.scores import Direction
from circuitvit.graph.topology import Graph


@dataclass(frozen=True, eq=False, repr=False)
class NodeScores:
    """One number for each sender and token group: the effect of ablating it for all that hear it.

    Attributes:
        graph: whose senders are scored.
        values: `(sender, group)`, in units of the metric; signed as those of `EdgeScores`. Read-only.
        method: name of the method.
        direction: "noising" or "denoising".
        provenance: where the scores came from.

    Example:
        >>> nodes["a3.h1"], nodes["m11@cls"]  # doctest: +SKIP
        (-0.41, -1.7)
    """

    graph: Graph
    values: NDArray[np.float64]
    method: str = ""
    direction: Direction = "noising"
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        values = np.array(self.values, dtype=np.float64)
        shape = (len(self.graph.senders), len(self.graph.groups))
        if values.shape != shape or not np.isfinite(values).all():
            raise OptionError(f"node scores must be finite and of shape {shape}, not {values.shape}")
        values.setflags(write=False)
        object.__setattr__(self, "values", values)

    def __getitem__(self, name: str) -> float:
        scores = self.to_dict()
        if name not in scores:
            raise unknown_name("node", name, scores)
        return scores[name]

    def __len__(self) -> int:
        return self.values.size

    def __repr__(self) -> str:
        strongest = ", ".join(f"{name} {score:+.3g}" for name, score in self.strongest(3))
        return f"NodeScores({self.method or 'unnamed'}, {len(self):,} nodes; strongest: {strongest})"

    def to_dict(self) -> dict[str, float]:
        """Every node's name and score, in graph order; where there are token groups, as `node@group`."""
        single = len(self.graph.groups) == 1
        return {
            sender if single else f"{sender}@{group}": float(self.values[row, column])
            for row, sender in enumerate(self.graph.senders)
            for column, group in enumerate(self.graph.groups)
        }

    def strongest(self, k: int) -> list[tuple[str, float]]:
        """The `k` nodes of largest magnitude and their scores, strongest first."""
        if k < 0:
            raise OptionError(f"a number of nodes cannot be negative: {k}")
        return sorted(self.to_dict().items(), key=lambda item: -abs(item[1]))[:k]

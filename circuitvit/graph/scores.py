"""Edge scores: what a method says of every edge, and how edges are selected by them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from circuitvit.errors import OptionError
from circuitvit.graph import notebook
from circuitvit.graph.circuit import Circuit
from circuitvit.graph.fidelity import Fidelity
from circuitvit.graph.provenance import Provenance
from circuitvit.graph.topology import EdgeMask, Graph

Direction = Literal["noising", "denoising"]
"""Whether an effect is that of ablating an edge in a clean run, or of restoring it in a corrupt run."""

Ranking = Literal["magnitude", "signed"]
"""Whether edges are ranked by the size of their effect, or by how much they support the behaviour."""


@dataclass(frozen=True, eq=False, repr=False)
class EdgeScores:
    """One number for each edge: an estimate of its effect on the metric, or the effect itself.

    In the noising direction the effect is metric(edge ablated) - metric(clean), so an edge that
    supports the behaviour has a negative score; in the denoising direction it is metric(edge restored)
    - metric(corrupt) and a supporting edge has a positive score.

    Attributes:
        graph: the graph that is scored.
        values: `(sender, receiver, group)`, in units of the metric; 0 where there is no edge. Read-only.
        method: name of the method.
        direction: "noising" or "denoising".
        provenance: where the scores came from.
        measured: `(sender, receiver, group)`: True where the score is the exact effect itself and no
            estimate; None where no score is.
        fidelity: how far the scores agree with exact effects, from `calibrate`; None where nobody asked.

    Example:
        >>> scores["a0.h1->a3.h2<q>"]  # doctest: +SKIP
        -0.0173
        >>> circuit = scores.top(200)  # doctest: +SKIP
    """

    graph: Graph
    values: NDArray[np.float64]
    method: str = ""
    direction: Direction = "noising"
    provenance: Provenance = field(default_factory=Provenance)
    measured: EdgeMask | None = None
    fidelity: Fidelity | None = None

    def __post_init__(self) -> None:
        values = np.array(self.values, dtype=np.float64)
        if values.shape != self.graph.shape:
            raise OptionError(
                f"scores of shape {values.shape} do not fit {self.graph} of shape {self.graph.shape}"
            )
        if not np.isfinite(values[self.graph.edge_mask]).all():
            raise OptionError("scores must be finite numbers: some are NaN or infinite")
        values[~self.graph.edge_mask] = 0.0
        values.setflags(write=False)
        object.__setattr__(self, "values", values)
        for part in (self.measured, None if self.fidelity is None else self.fidelity.low):
            if part is not None and part.shape != self.graph.shape:
                raise OptionError(
                    f"what is said of edges has shape {part.shape}, the graph {self.graph.shape}"
                )

    def __getitem__(self, edge: str) -> float:
        return float(self.values[self.graph.edge_index(edge)])

    def __len__(self) -> int:
        return self.graph.n_edges

    def __repr__(self) -> str:
        strongest = ", ".join(f"{name} {score:+.3g}" for name, score in self.strongest(3))
        return f"EdgeScores({self.method or 'unnamed'}, {len(self):,} edges; strongest: {strongest})"

    def _repr_html_(self) -> str:
        return notebook.of_scores(self)

    def interval(self, edge: str) -> tuple[float, float]:
        """The interval in which an edge's exact effect should lie, in units of the metric.

        Raises:
            NameNotFoundError: if there is no such edge.
            OptionError: if the scores have not been held against exact effects.
        """
        place = self.graph.edge_index(edge)
        if self.fidelity is None:
            raise OptionError("these scores have no intervals: circuitvit.calibrate measures them")
        return float(self.fidelity.low[place]), float(self.fidelity.high[place])

    @property
    def support(self) -> NDArray[np.float64]:
        """`(sender, receiver, group)`: the scores with the sign that makes supporting edges positive."""
        return -self.values if self.direction == "noising" else self.values

    def to_dict(self) -> dict[str, float]:
        """Every edge's name and score, in graph order."""
        return dict(zip(self.graph.edges, self.values[self.graph.edge_mask].tolist(), strict=True))

    def strongest(self, k: int) -> list[tuple[str, float]]:
        """The `k` edges of largest magnitude and their scores, strongest first."""
        if k < 0:
            raise OptionError(f"a number of edges cannot be negative: {k}")
        flat = self.values[self.graph.edge_mask]
        order = np.argsort(-np.abs(flat), kind="stable")[:k]
        return [(self.graph.edges[index], float(flat[index])) for index in order]

    # -- selection -------------------------------------------------------------------------------

    def top(self, k: int, by: Ranking = "magnitude", prune: bool = True) -> Circuit:
        """The circuit of the `k` best edges; ties go to the edge that comes first in the graph.

        Args:
            k: how many edges to select, before dead edges are pruned.
            by: "magnitude", or "signed": the edges that support the behaviour most, never those against it.
            prune: leave out selected edges that lie on no path from input to logits.
        """
        from circuitvit.graph import selection

        return selection.top(self, k, by, prune)

    def threshold(self, at_least: float, by: Ranking = "magnitude", prune: bool = True) -> Circuit:
        """The circuit of all edges whose magnitude (or support) is at least this, in units of the metric."""
        from circuitvit.graph import selection

        return selection.threshold(self, at_least, by, prune)

    def connected(self, k: int, by: Ranking = "magnitude") -> Circuit:
        """A circuit of at most `k` edges, grown path by path so that none is dead.

        See `circuitvit.graph.selection.connected`.
        """
        from circuitvit.graph import selection

        return selection.connected(self, k, by)

    # -- files -----------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write the scores as JSON in the versioned schema of `docs/formats.md`.

        Raises:
            FileError: if the file cannot be written.
        """
        from circuitvit.graph import files

        return files.save_scores(self, path)

    @classmethod
    def load(cls, path: str | Path, graph: Graph | None = None) -> EdgeScores:
        """Read scores from JSON; `graph` is the graph that they must belong to.

        Raises:
            FileError: if the file is missing, malformed, of another version, or of another graph.
        """
        from circuitvit.graph import files

        return files.load_scores(path, graph)

"""Scores: what a method says of every edge, node or part of a node, and how edges are selected by them."""

from __future__ import annotations

import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from circuitvit.errors import FileError, OptionError, check_number, check_whole, counted, unknown_name
from circuitvit.graph import notebook, selection
from circuitvit.graph.circuit import SCORE_MAP_SCHEMA, Circuit, check_graph, scores_of
from circuitvit.graph.fidelity import FIDELITY_SCHEMA, Fidelity
from circuitvit.graph.files import TEXT, check_version, naming, read_json, record, write_json
from circuitvit.graph.liveness import live_edges
from circuitvit.graph.names import parse_edge
from circuitvit.graph.provenance import PROVENANCE_SCHEMA, Provenance
from circuitvit.graph.results import OTHER_ENDINGS, Record, Result, cells
from circuitvit.graph.topology import GRAPH_SCHEMA, NAMES_SCHEMA, EdgeMask, Graph, Remade, frozen

SCORES_SCHEMA = "circuitvit.scores/1"
_FILE = record(
    "schema graph method direction scores provenance",
    schema={"const": SCORES_SCHEMA},
    graph=GRAPH_SCHEMA,
    method=TEXT,
    direction={"enum": ["noising", "denoising"]},
    scores=SCORE_MAP_SCHEMA,
    measured={**NAMES_SCHEMA, "maxItems": 10_000_000},
    fidelity=FIDELITY_SCHEMA,
    provenance=PROVENANCE_SCHEMA,
)

Direction = Literal["noising", "denoising"]
"""Whether an effect is that of ablating an edge in a clean run, or of restoring it in a corrupt run."""

Array = NDArray[np.float64]

Ranking = Literal["magnitude", "signed"]
"""Whether edges are ranked by the size of their effect, or by how much they support the behaviour."""


@dataclass(frozen=True, eq=False, repr=False)
class EdgeScores(Remade, Result):
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
    values: Array
    method: str = ""
    direction: Direction = "noising"
    provenance: Provenance = field(default_factory=Provenance)
    measured: EdgeMask | None = None
    fidelity: Fidelity | None = None

    kind = "scores"

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", self.graph.checked(self.values))
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
        title = f"{self.method or 'Scores'} of {len(self):,} edges, {self.direction}; the strongest"
        return notebook.card(title, _bars(self.strongest(10), self.direction, self.provenance.shares_of))

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
    def support(self) -> Array:
        """`(sender, receiver, group)`: the scores with the sign that makes supporting edges positive."""
        return -self.values if self.direction == "noising" else self.values

    def records(self) -> Iterator[Record]:
        """One row for each edge: `edge`, its `sender`, `receiver` and `group` ("" without groups), `score`
        in units of the metric, the ends `low` and `high` of its interval, and whether the score was
        `measured` exactly; None where that is not known."""
        for name in self.graph.edges:
            edge, place = parse_edge(name), self.graph.edge_index(name)
            low, high = (None, None) if self.fidelity is None else self.interval(name)
            yield {
                "edge": name,
                "sender": edge.sender,
                "receiver": edge.receiver,
                "group": edge.group,
                "score": float(self.values[place]),
                "low": low,
                "high": high,
                "measured": None if self.measured is None else bool(self.measured[place]),
            }

    def to_dict(self) -> dict[str, float]:
        """Every edge's name and score, in graph order; `save` writes all else too."""
        return dict(zip(self.graph.edges, self.values[self.graph.edge_mask].tolist(), strict=True))

    def strongest(self, k: int) -> list[tuple[str, float]]:
        """The `k` edges of largest magnitude and their scores, strongest first."""
        return _strongest("edge", self.graph.edges, self.values[self.graph.edge_mask], k)

    # -- selection -------------------------------------------------------------------------------

    def top(self, k: int, by: Ranking = "magnitude", prune: bool = True) -> Circuit:
        """The circuit of the `k` best edges; ties go to the edge that comes first in the graph.

        Args:
            k: how many edges to select, before dead edges are pruned.
            by: "magnitude", or "signed": the edges that support the behaviour most, never those against it.
            prune: leave out selected edges that lie on no path from input to logits.

        Raises:
            OptionError: if `k` is not between 0 and the number of edges, or `by` is unknown.
        """
        ranks, k = self._ranks(by), self._size(k)
        kept = selection.top(self.graph, ranks, k)
        if by == "signed":
            kept &= ranks > 0
        return self._circuit(kept, prune, asked=k, by=by, selection="top")

    def threshold(self, at_least: float, by: Ranking = "magnitude", prune: bool = True) -> Circuit:
        """The circuit of all edges whose magnitude (or support) is at least this, in units of the metric.

        Raises:
            OptionError: if the threshold is not a positive number, or `by` is unknown.
        """
        check_number("a threshold, in units of the metric,", at_least)
        kept = (self._ranks(by) >= at_least) & self.graph.edge_mask
        said = {"asked": int(kept.sum()), "by": by, "selection": "threshold", "threshold": float(at_least)}
        return self._circuit(kept, prune, **said)

    def connected(self, k: int, by: Ranking = "magnitude") -> Circuit:
        """A circuit of at most `k` edges, grown path by path so that none is dead.

        See `circuitvit.graph.selection.connected`.

        Raises:
            OptionError: if `k` is not between 0 and the number of edges, or `by` is unknown.
        """
        ranks, k = self._ranks(by), self._size(k)
        kept = selection.connected(self.graph, ranks, k, 0.0 if by == "signed" else -np.inf)
        return self._circuit(kept, True, asked=k, by=by, selection="connected")

    def _ranks(self, by: Ranking) -> Array:
        if by == "magnitude":
            return np.abs(self.values)
        if by == "signed":
            return self.support
        raise OptionError(f"edges are ranked by 'magnitude' or 'signed', not by {by!r}")

    def _size(self, k: int) -> int:
        try:
            size = operator.index(k)  # also an integer of numpy; what JSON can hold is a plain one
        except TypeError:
            raise OptionError(f"the number of edges must be a whole number, not {k!r}") from None
        if not 0 <= size <= self.graph.n_edges:
            raise OptionError(f"asked for {size} edges of a graph that has {self.graph.n_edges}")
        return size

    def _circuit(self, kept: EdgeMask, prune: bool, **parameters: object) -> Circuit:
        kept = live_edges(self.graph, kept) if prune else kept
        if self.fidelity is not None:
            parameters["fidelity"] = self.fidelity.summary()
        made = self.provenance.with_parameters(direction=self.direction, **parameters)
        return Circuit(self.graph, kept, self.values, made)

    # -- files -----------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write the scores as JSON in the versioned schema of `docs/formats.md`.

        The ending `.csv` writes the table of `records`, `.safetensors` the JSON in such a file's header.

        Raises:
            FileError: if the file cannot be written.
        """
        if Path(path).suffix in OTHER_ENDINGS:
            return super().save(path)
        return write_json(path, self.to_record())

    def to_record(self) -> dict[str, Any]:
        """Everything as JSON values."""
        content: dict[str, Any] = {
            "schema": SCORES_SCHEMA,
            "method": self.method,
            "direction": self.direction,
            "provenance": self.provenance.to_dict(),
            "scores": self.to_dict(),
            "graph": self.graph.to_dict(),
        }
        if self.measured is not None:
            content["measured"] = list(self.graph.names_of(self.measured & self.graph.edge_mask))
        if self.fidelity is not None:
            content["fidelity"] = self.fidelity.to_dict(self.graph)
        return content

    @classmethod
    def load(cls, path: str | Path, graph: Graph | None = None) -> EdgeScores:
        """Read scores from JSON; `graph` is the graph that they must belong to.

        Raises:
            FileError: if the file is missing, malformed, of another version, or of another graph.
        """
        if Path(path).suffix == ".safetensors":
            scores = super().load(path)
        else:
            with naming(path):
                scores = cls.from_record(read_json(path), str(path))
        check_graph(path, scores.graph, graph)
        return scores

    @classmethod
    def from_record(cls, content: Mapping[str, Any], place: str) -> EdgeScores:
        """The scores that stand at a place of a file.

        Raises:
            FileError: if they are none, of another version, or contradict themselves.
        """
        check_version(place, content, _FILE, SCORES_SCHEMA)
        graph = Graph.from_dict(content["graph"])
        missing = set(graph.edges) - set(content["scores"])
        if missing:
            raise FileError(f"{len(missing)} edges have no score, such as {min(missing)!r}")
        return cls(
            graph,
            scores_of(graph, content["scores"]),
            content["method"],
            content["direction"],
            Provenance.from_dict(content["provenance"]),
            graph.mask_of(content["measured"]) if "measured" in content else None,
            Fidelity.from_dict(graph, content["fidelity"]) if "fidelity" in content else None,
        )


class _ByNode(Remade, ABC):
    """What scores of nodes and of parts of nodes have in common: a number for each name and token group."""

    values: Array
    method: str
    direction: Direction

    @property
    @abstractmethod
    def _axes(self) -> tuple[Sequence[str], Sequence[str]]:
        """The names that are scored, and the token groups."""

    def _checked(self) -> None:
        """Make the values read-only numbers, or refuse them."""
        values = np.array(self.values, dtype=np.float64)
        shape = tuple(map(len, self._axes))
        if values.shape != shape or not np.isfinite(values).all():
            raise OptionError(f"node scores must be finite and of shape {shape}, not {values.shape}")
        object.__setattr__(self, "values", frozen(values))

    def __getitem__(self, name: str) -> float:
        scores = self.to_dict()
        if name not in scores:
            raise unknown_name("node", name, scores)
        return scores[name]

    def __len__(self) -> int:
        return self.values.size

    def __repr__(self) -> str:
        strongest = ", ".join(f"{name} {score:+.3g}" for name, score in self.strongest(3))
        return f"{type(self).__name__}({self.method or 'unnamed'}, {self._said()}; strongest: {strongest})"

    def _said(self) -> str:
        return f"{len(self):,} nodes"

    def _repr_html_(self) -> str:
        title = f"{self.method or 'Scores'} of {self._said()}, {self.direction}; the strongest"
        return notebook.card(title, _bars(self.strongest(10), self.direction))

    def to_dict(self) -> dict[str, float]:
        """Every name and score, in order; where there are token groups, as `node@group`.

        `save` writes everything else too.
        """
        names, groups = self._axes
        single = len(groups) == 1
        return {
            name if single else f"{name}@{group}": score
            for name, row in zip(names, self.values.tolist(), strict=True)
            for group, score in zip(groups, row, strict=True)
        }

    def strongest(self, k: int) -> list[tuple[str, float]]:
        """The `k` names of largest magnitude and their scores, strongest first."""
        scores = self.to_dict()
        return _strongest("node", list(scores), np.array(list(scores.values())), k)


@dataclass(frozen=True, eq=False, repr=False)
class NodeScores(_ByNode, Result):
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
    values: Array
    method: str = ""
    direction: Direction = "noising"
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        self._checked()

    @property
    def _axes(self) -> tuple[Sequence[str], Sequence[str]]:
        return self.graph.senders, self.graph.groups

    def records(self) -> Iterator[Record]:
        """One row for each node and token group: `node`, `group`, and `score` in units of the metric."""
        return cells({"node": self.graph.senders, "group": self.graph.groups}, score=self.values)


@dataclass(frozen=True, eq=False, repr=False)
class UnitScores(_ByNode, Result):
    """One number for each neuron or feature of some nodes, and token group: the effect of ablating it alone.

    A node's units sum to the node: its neurons `m5.n0`, `m5.n1`, ... and `m5.rest`, what it writes without
    them (its bias); or its features `m8.f0`, ..., `m8.rest` and `m8.error`, what the dictionary misses.

    Attributes:
        units: names of what is scored, node by node.
        groups: names of the token groups; a single one where tokens are not told apart.
        values: `(unit, group)`, in units of the metric; signed as those of `NodeScores`. Read-only.
        method: name of the method.
        direction: "noising" or "denoising".
        provenance: where the scores came from.

    Example:
        >>> scores = UnitScores(("m1.n0", "m1.n1", "m1.rest"), ("all",), np.array([[0.25], [-0.5], [0.0]]))
        >>> scores, scores["m1.n0"], scores.top(1)
        (UnitScores(unnamed, 2 units of 1 node; strongest: m1.n1 -0.5, m1.n0 +0.25), 0.25, {'m1': (1,)})
    """

    units: tuple[str, ...]
    groups: tuple[str, ...]
    values: Array
    method: str = ""
    direction: Direction = "noising"
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        wrong = [name for name in self.units if not _UNIT.fullmatch(name)]
        if wrong or len(set(self.units)) < len(self.units):
            what = f"{wrong[0][:80]!r} is none" if wrong else "some stand there twice"
            raise OptionError(f"units are named m5.n17, m8.f3, m8.rest or m8.error, each once: {what}")
        self._checked()

    @property
    def _axes(self) -> tuple[Sequence[str], Sequence[str]]:
        return self.units, self.groups

    @property
    def nodes(self) -> tuple[str, ...]:
        """The nodes whose units are scored, in order."""
        return tuple(dict.fromkeys(name.rpartition(".")[0] for name in self.units))

    def _said(self) -> str:
        return f"{len(self._numbered):,} units of {counted(len(self.nodes), 'node')}"

    @cached_property
    def _numbered(self) -> dict[int, tuple[str, int]]:
        """The places of neurons and features, with their nodes and numbers; `rest` and `error` have none."""
        parts = ((place, *name.rpartition(".")[::2]) for place, name in enumerate(self.units))
        return {place: (node, int(unit[1:])) for place, node, unit in parts if unit[1:].isdigit()}

    def strongest(self, k: int) -> list[tuple[str, float]]:
        """The `k` neurons or features of largest magnitude and their scores, strongest first.

        Neither `rest` nor `error`, which are no units: `scores["m8.error"]` is how much of the node's effect
        a dictionary misses.
        """
        named = list(self.to_dict().items())
        width = len(self.groups)
        kept = [named[place * width + column] for place in self._numbered for column in range(width)]
        return _strongest("unit", [name for name, _ in kept], np.array([score for _, score in kept]), k)

    def top(self, k: int) -> dict[str, tuple[int, ...]]:
        """The numbers of the `k` units of largest magnitude over all token groups, by node, in rising order.

        Raises:
            OptionError: if `k` is negative.
        """
        places = list(self._numbered)
        best = _strongest("unit", list(map(str, places)), self.values.sum(axis=1)[places], k)
        chosen = [self._numbered[place] for place in sorted(int(name) for name, _ in best)]
        nodes = dict.fromkeys(node for node, _ in chosen)
        return {node: tuple(sorted(number for own, number in chosen if own == node)) for node in nodes}

    def of(self, node: str) -> Array:
        """The scores of a node's neurons or features `(unit, group)`, in order of their numbers.

        Raises:
            NameNotFoundError: for a node whose units are not scored.
        """
        if node not in self.nodes:
            raise unknown_name("node", node, self.nodes)
        return self.values[[place for place, (own, _) in self._numbered.items() if own == node]]

    def records(self) -> Iterator[Record]:
        """One row for each unit and token group: `node`, `unit` (such as "n17"), `group`, and `score` in
        units of the metric."""
        for row in cells({"node": self.units, "group": self.groups}, score=self.values):
            node, _, unit = str(row.pop("node")).rpartition(".")
            yield {"node": node, "unit": unit, **row}


_UNIT = re.compile(r".+\.([nf]\d+|rest|error)", re.DOTALL | re.ASCII)


def _strongest(kind: str, names: Sequence[str], values: Array, k: int) -> list[tuple[str, float]]:
    """The `k` names of largest magnitude with their values; ties in their own order."""
    check_whole(f"a number of {kind}s", k, 0)
    return [(names[place], float(values[place])) for place in np.argsort(-np.abs(values), kind="stable")[:k]]


def _bars(
    strongest: Sequence[tuple[str, float]], direction: Direction, shares_of: str = ""
) -> list[tuple[object, ...]]:
    """Names and scores as rows, each with a bar as long as its share of the strongest."""
    largest = max((abs(score) for _, score in strongest), default=0.0) or 1.0
    plus = "" if shares_of else "+"

    def row(name: str, score: float) -> tuple[object, ...]:
        side = side_of(score, direction, shares_of)
        return name, f"{score:{plus}.4g}", notebook.bar(abs(score) / largest, side == "supports"), side

    return [row(*each) for each in strongest]


def side_of(score: float, direction: Direction, shares_of: str = "") -> Literal["supports", "opposes", ""]:
    """What a component of this score does for the behaviour; "" for no effect, and for a share.

    Args:
        score: its effect on the metric.
        direction: of the runs; an ablation that lowers the metric says that the component supports it.
        shares_of: what the score is a share of; "" for effects.

    Example:
        >>> side_of(-0.5, "noising"), side_of(-0.5, "denoising"), side_of(0.5, "noising", "what is read")
        ('supports', 'opposes', '')
    """
    if shares_of or not abs(score) > 0:  # nor for what was not measured, NaN
        return ""
    return "supports" if (score < 0) == (direction == "noising") else "opposes"

"""From ranks of edges to circuits: the best edges, or the best connected paths.

Selection is plain arithmetic on `(sender, receiver, group)` arrays; see `EdgeScores` for what ranks edges.
Searches that run the model (ACDC and others) are in `circuitvit.pruning`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from circuitvit.graph.topology import EdgeMask, Graph, StageNodes


def top(graph: Graph, ranks: NDArray[np.float64], k: int) -> EdgeMask:
    """The `k` best edges; ties go to the edge that comes first in the graph."""
    kept = np.zeros(graph.shape, dtype=bool)
    kept[tuple(_best_first(graph, ranks)[:k].T)] = True
    return kept


def connected(graph: Graph, ranks: NDArray[np.float64], k: int, least: float = -np.inf) -> EdgeMask:
    """At most `k` edges, grown path by path from the best edges down; none is taken for a rank up to `least`.

    Edge after edge, best first: each is added together with the strongest way from a source to it and the
    strongest way from it to a readout (strongest: the way whose weakest edge is best, and of such ways the
    one with the fewest edges), unless that would exceed `k`. So every edge of the result lies on a path
    from input to logits.
    """
    network = _PathFinder(graph, ranks)
    kept, size = np.zeros(graph.shape, dtype=bool), 0
    for sender, receiver, group in _best_first(graph, ranks).tolist():
        edge = (sender, receiver, group)
        if size >= k:
            break
        if kept[edge] or ranks[edge] <= least or not network.joins(edge):
            continue
        new = [step for step in network.through(edge) if not kept[step]]
        if size + len(new) <= k:
            kept[tuple(zip(*new, strict=True))] = True
            size += len(new)
    return kept


def _best_first(graph: Graph, ranks: NDArray[np.float64]) -> NDArray[np.intp]:
    """The places `(edge, 3)` of all edges; ties in graph order."""
    places: NDArray[np.intp] = np.argwhere(graph.edge_mask)
    return places[np.argsort(-ranks[graph.edge_mask], kind="stable")]


Step = tuple[int, int, int]
Ways = tuple[NDArray[np.float64], dict[tuple[int, int], Step]]
"""How good the best way to (or from) each `(node, group)` is, and the edge that it ends (or begins) with."""

Join = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]
"""How good a way is that consists of an edge and of another way."""


class _PathFinder:
    """The strongest ways: widest first (their weakest edge is as strong as can be), then shortest.

    These two wishes cannot be met in one pass: the shortest of the widest ways to a node may run through
    a neighbour by a way that is not the neighbour's widest. So one pass finds the widths, and then, for a
    node when it is first asked for, another finds the shortest way among the edges that are wide enough.
    """

    def __init__(self, graph: Graph, ranks: NDArray[np.float64]) -> None:
        self.graph = graph
        self.ranks: NDArray[np.float64] = np.where(graph.edge_mask, ranks, -np.inf)
        self.width_in, _ = _ways_in(graph, self.ranks, np.inf, np.minimum)
        self.width_out, _ = _ways_out(graph, self.ranks, np.inf, np.minimum)
        self.known: dict[tuple[str, int, int], list[Step]] = {}

    def joins(self, edge: Step) -> bool:
        """Whether any path from a source to a readout runs through `edge`."""
        sender, receiver, group = edge
        ends = self.width_in[sender, group], self.width_out[receiver, group]
        return bool(np.min(ends) > -np.inf)

    def through(self, edge: Step) -> list[Step]:
        """The edges of the strongest source-to-readout path through `edge`."""
        sender, receiver, group = edge
        if ("in", sender, group) not in self.known:
            _, steps = _ways_in(self.graph, self._lengths(self.width_in[sender, group]), 0.0, np.add)
            self.known["in", sender, group] = _followed(steps, (sender, group), end=0)
        if ("out", receiver, group) not in self.known:
            _, steps = _ways_out(self.graph, self._lengths(self.width_out[receiver, group]), 0.0, np.add)
            self.known["out", receiver, group] = _followed(steps, (receiver, group), end=1)
        return [*self.known["in", sender, group], edge, *self.known["out", receiver, group]]

    def _lengths(self, at_least: float) -> NDArray[np.float64]:
        """-1 for every edge that is wide enough, so that the best sum is the shortest way."""
        wide = (self.ranks >= at_least) & self.graph.edge_mask
        lengths: NDArray[np.float64] = np.where(wide, -1.0, -np.inf)
        return lengths


def _followed(steps: Mapping[tuple[int, int], Step], at: tuple[int, int], end: int) -> list[Step]:
    """The steps of a way: from one to the next by its sender (`end` 0) or its receiver (1), and its group."""
    way: list[Step] = []
    while at in steps:
        way.append(steps[at])
        at = (way[-1][end], way[-1][2])
    return way


def _ways_in(graph: Graph, edges: NDArray[np.float64], start: float, join: Join) -> Ways:
    """The best way from any source to each `(sender, group)`; ties go to the sender that comes first."""
    best = np.full((len(graph.senders), len(graph.groups)), -np.inf)
    steps: dict[tuple[int, int], Step] = {}
    for stage, senders, receivers, heard in zip(
        graph.stages, graph.sender_slices, graph.receiver_slices, graph.upstream, strict=True
    ):
        if not stage.receivers:
            best[senders] = start
        elif stage.senders and heard.start < heard.stop:
            arrivals = join(edges[heard, receivers], best[heard, None, :])
            origin, value = heard.start + arrivals.argmax(axis=0), arrivals.max(axis=0)
            fed = np.where(_feeds(stage, len(graph.groups)), value[:, :, None, None], -np.inf)
            best[senders], receiver, group = _first_best(fed)
            for local, to in np.argwhere(best[senders] > -np.inf).tolist():
                came = int(receiver[local, to]), int(group[local, to])
                steps[senders.start + local, to] = int(origin[came]), receivers.start + came[0], came[1]
    return best, steps


def _ways_out(graph: Graph, edges: NDArray[np.float64], start: float, join: Join) -> Ways:
    """The best way from each `(receiver, group)` to any readout; ties go to the receiver that comes last."""
    best = np.full((len(graph.receivers), len(graph.groups)), -np.inf)
    steps: dict[tuple[int, int], Step] = {}
    stages = list(zip(graph.stages, graph.sender_slices, graph.receiver_slices, strict=True))
    for stage, senders, receivers in stages[::-1]:
        after = slice(receivers.stop, None)
        if not stage.senders:
            best[receivers] = start
        elif stage.receivers and len(best[after]):
            onward = join(edges[senders, after], best[None, after])
            target = len(best) - 1 - onward[:, ::-1].argmax(axis=1)
            leads = np.moveaxis(_feeds(stage, len(graph.groups)), (2, 3), (0, 1))
            best[receivers], sender, group = _first_best(
                np.where(leads, onward.max(axis=1)[:, :, None, None], -np.inf)
            )
            for local, at in np.argwhere(best[receivers] > -np.inf).tolist():
                goes = int(sender[local, at]), int(group[local, at])
                steps[receivers.start + local, at] = senders.start + goes[0], int(target[goes]), goes[1]
    return best, steps


def _feeds(stage: StageNodes, groups: int) -> NDArray[np.bool_]:
    """`(receiver, group, sender, group)`: whether what is read at one group reaches a sender at another."""
    reaches: NDArray[np.bool_] = stage.mixing[:, None, None, None] | np.eye(groups, dtype=bool)[:, None, :]
    return stage.feeding[:, None, :, None] & reaches


def _first_best(
    values: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.intp], NDArray[np.intp]]:
    """The largest number along the first two dimensions, and where it stands there first."""
    flat = values.reshape(-1, *values.shape[2:])
    return flat.max(axis=0), *np.unravel_index(flat.argmax(axis=0), values.shape[:2])

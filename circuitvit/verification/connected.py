"""Random *connected* circuits of the same size and layer profile: the null hypothesis of a circuit.

Edges drawn at random seldom join up, so a random circuit of 40 edges is nearly empty after dead-edge pruning
and beating it means little. Here every edge of every random circuit lies on a path from input to logits, and
as many edges enter each stage (at each token group) as in the circuit that is tested.

Such circuits cannot be drawn outright, so a reversible Markov chain walks among them. Each step proposes
either to exchange the roles of two nodes of one stage, or to replace one or two edges by others into the same
stages; a proposal that breaks connectedness is not taken. Proposals are symmetric, so the uniform
distribution is stationary. The chain first walks from the circuit to a hub, and every random circuit then
walks from the hub on its own: under the null hypothesis that the circuit is itself a uniform draw, circuit
and random circuits are exchangeable *however slowly the chain mixes*, and `(b + 1) / (n + 1)` is an exact
p-value (Besag and Clifford 1989, "Generalized Monte Carlo significance tests", Biometrika 76). Slow mixing
costs power only: random circuits then resemble the circuit, and reports say how much they share.

Random circuits as a null: Shi et al. 2024, "Hypothesis testing the circuit hypothesis in LLMs",
arXiv:2410.13032.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from circuitvit.errors import OptionError
from circuitvit.graph import Circuit, EdgeMask, Graph, Provenance, node_of, port_of

Place = tuple[int, int, int]
"""An edge as `(sender, receiver, group)`."""

STEPS_PER_EDGE = 10
"""Steps that each random circuit walks from the hub, for each of its edges."""

LEAST_STEPS = 200

MOST_PATHS = 200
"""Paths that are tried for each edge before a random circuit of the rest is taken as it is."""


def connected_circuits(
    circuit: Circuit, n: int, seed: int = 0, *, steps: int | None = None
) -> tuple[Circuit, ...]:
    """Random circuits without dead edges, with as many edges into each stage as the pruned circuit has.

    Args:
        circuit: to match; its dead edges are left out first.
        n: how many; the first ones do not depend on how many follow.
        seed: of the walks.
        steps: of each walk; by default 10 for each edge, and at least 200.

    Returns:
        `n` circuits, each pruned, exchangeable with `circuit` if it is itself such a random circuit.

    Raises:
        OptionError: if `n` or `seed` is negative, or `steps` is not positive.

    Example:
        >>> from circuitvit.graph.eap_ig import transformer_graph
        >>> circuit = Circuit.from_edges(transformer_graph(2, 4), ["input->a1.h0<v>", "a1.h0->logits"])
        >>> drawn = connected_circuits(circuit, 20)
        >>> {len(each.pruned()) for each in drawn}, len(set(drawn)) > 1
        ({2}, True)
    """
    if n < 0 or seed < 0 or (steps is not None and steps < 1):
        raise OptionError(f"n and seed are 0 or more and steps positive, not {n}, {seed} and {steps}")
    live = circuit.pruned()
    length = steps or max(LEAST_STEPS, STEPS_PER_EDGE * len(live))
    map_ = _Map(circuit.graph)
    streams = np.random.SeedSequence(seed).spawn(n + 1)
    hub = _Walk(map_, live.kept)
    hub.walk(length, np.random.default_rng(streams[0]))
    found = circuit.provenance
    origin = Provenance(found.model, found.weights, method="random-connected", seed=seed)
    drawn = []
    for stream in streams[1:]:
        walk = _Walk(map_, hub.mask())
        walk.walk(length, np.random.default_rng(stream))
        drawn.append(Circuit(circuit.graph, walk.mask(), provenance=origin))
    return tuple(drawn)


def complement_circuits(circuit: Circuit, n: int, seed: int = 0) -> tuple[Circuit, ...]:
    """Random circuits of the rest of the model: random paths, added until there are as many edges.

    No path uses an edge of the circuit, and each has at least as many edges as the pruned circuit (the last
    path may bring a few more, which makes it harder for the circuit to be the more important one).

    Args:
        circuit: whose edges are avoided.
        n: how many.
        seed: of the draws.

    Raises:
        OptionError: if `n` or `seed` is negative, or the rest has too few paths.

    Example:
        >>> from circuitvit.graph.eap_ig import transformer_graph
        >>> circuit = Circuit.from_edges(transformer_graph(2, 4), ["input->a1.h0<v>", "a1.h0->logits"])
        >>> [len(each) >= 2 and not len(each & circuit) for each in complement_circuits(circuit, 3)]
        [True, True, True]
    """
    if n < 0 or seed < 0:
        raise OptionError(f"n and seed are 0 or more, not {n} and {seed}")
    rest = (~circuit).pruned()
    wanted = len(circuit.pruned())
    if len(rest) < wanted:
        raise OptionError(
            f"the rest of the model has {len(rest)} live edges, fewer than the circuit's {wanted}: there is "
            "nothing of its size to compare with"
        )
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(n):
        kept = np.zeros(circuit.graph.shape, dtype=bool)
        tries = 0
        while kept.sum() < wanted and tries < MOST_PATHS * wanted:
            kept |= random_path(circuit.graph, rng, rest.kept)
            tries += 1
        drawn.append(Circuit(circuit.graph, kept))
    return tuple(drawn)


def random_path(graph: Graph, rng: np.random.Generator, among: EdgeMask | None = None) -> EdgeMask:
    """A path from a source to a readout, each step uniform among the edges that leave.

    With token groups it goes on from a random group that it can have reached.

    Args:
        graph: to walk in.
        rng: that draws the steps.
        among: edges that may be used `(sender, receiver, group)`, none of them dead; all by default.

    Returns:
        `(sender, receiver, group)`, True on the path.
    """
    among = graph.edge_mask if among is None else among
    path = np.zeros(graph.shape, dtype=bool)
    sources = [place for place, stage in enumerate(graph.sender_stages) if not graph.stages[stage].receivers]
    starts = [(int(sender), int(group)) for sender, group in np.argwhere(among[sources].any(axis=1))]
    sender, group = starts[rng.integers(len(starts))]
    sender = sources[sender]
    while True:
        receiver = int(rng.choice(np.flatnonzero(among[sender, :, group])))
        path[sender, receiver, group] = True
        onward = graph.fed(receiver, group)
        if not onward:
            return path
        open_ = [place for place in onward if among[place[0], :, place[1]].any()]
        sender, group = open_[rng.integers(len(open_))]


@dataclass(frozen=True)
class _Map:
    """What the walk needs to know of a graph, looked up once."""

    graph: Graph

    @cached_property
    def into_stage(self) -> dict[tuple[int, int], list[Place]]:
        """All edges into each `(stage, group)`."""
        found: dict[tuple[int, int], list[Place]] = {}
        for sender, receiver, group in np.argwhere(self.graph.edge_mask).tolist():
            found.setdefault((self.graph.receiver_stages[receiver], group), []).append(
                (sender, receiver, group)
            )
        return found

    @cached_property
    def fed(self) -> dict[tuple[int, int], list[tuple[int, int]]]:
        """For each `(receiver, group)` the `(sender, group)` that depend on it; none for readouts."""
        receivers, groups = range(len(self.graph.receivers)), range(len(self.graph.groups))
        return {
            (receiver, group): self.graph.fed(receiver, group) for receiver in receivers for group in groups
        }

    @cached_property
    def feeders(self) -> dict[tuple[int, int], list[tuple[int, int]]]:
        """The inverse: what each `(sender, group)` depends on; none for sources."""
        found: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for source, targets in self.fed.items():
            for target in targets:
                found.setdefault(target, []).append(source)
        return found

    @cached_property
    def exchanges(self) -> list[tuple[dict[int, int], dict[int, int]]]:
        """For every two like nodes of a stage, which senders and which receivers change places."""
        found = []
        for place, stage in enumerate(self.graph.stages):
            first, start = self.graph.sender_slices[place].start, self.graph.receiver_slices[place].start
            ports = {
                name: {
                    port_of(each): start + at
                    for at, each in enumerate(stage.receivers)
                    if node_of(each) == name
                }
                for name in stage.senders
            }
            for one, name in enumerate(stage.senders):
                for two, other in enumerate(stage.senders[:one]):
                    if ports[name].keys() == ports[other].keys() and ports[name]:
                        pairs = [(ports[name][port], ports[other][port]) for port in ports[name]]
                        found.append((_swap([(first + one, first + two)]), _swap(pairs)))
        return found


class _Walk:
    """A circuit on its way: its edges, and how many enter and leave every place."""

    def __init__(self, map_: _Map, kept: EdgeMask) -> None:
        self.map = map_
        self.edges: list[Place] = [(int(u), int(v), int(g)) for u, v, g in np.argwhere(kept)]
        self.present = set(self.edges)
        self.leaving: Counter[tuple[int, int]] = Counter((u, g) for u, _, g in self.edges)
        self.entering: Counter[tuple[int, int]] = Counter((v, g) for _, v, g in self.edges)

    def mask(self) -> EdgeMask:
        kept = np.zeros(self.map.graph.shape, dtype=bool)
        for edge in self.edges:
            kept[edge] = True
        return kept

    def walk(self, steps: int, rng: np.random.Generator) -> None:
        """Take so many steps of the chain, standing still counted."""
        if not self.edges:
            return
        for move in rng.integers(4, size=steps).tolist():
            if move == 0 and self.map.exchanges:
                self._exchange(*self.map.exchanges[rng.integers(len(self.map.exchanges))])
            else:
                self._replace(2 if move == 1 and len(self.edges) > 1 else 1, rng)

    def _exchange(self, senders: dict[int, int], receivers: dict[int, int]) -> None:
        """Let two nodes change places: what was connected stays connected, whatever the circuit."""
        self.edges = [(senders.get(u, u), receivers.get(v, v), g) for u, v, g in self.edges]
        self.present = set(self.edges)
        self.leaving = Counter((u, g) for u, _, g in self.edges)
        self.entering = Counter((v, g) for _, v, g in self.edges)

    def _replace(self, count: int, rng: np.random.Generator) -> None:
        """Put other edges into the same stages in the place of `count` edges, if all stay connected."""
        places = rng.choice(len(self.edges), size=count, replace=False).tolist()
        old = [self.edges[place] for place in places]
        choices = [self.map.into_stage[self.map.graph.receiver_stages[v], g] for _, v, g in old]
        new = [choice[rng.integers(len(choice))] for choice in choices]
        if len(set(new)) < count or any(edge in self.present and edge not in old for edge in new):
            return
        self._change(old, new)
        if self._connected([*old, *new]):
            for place, edge in zip(places, new, strict=True):
                self.edges[place] = edge
        else:
            self._change(new, old)

    def _change(self, gone: list[Place], come: list[Place]) -> None:
        for sign, edges in ((-1, gone), (1, come)):
            for u, v, g in edges:
                self.leaving[u, g] += sign
                self.entering[v, g] += sign
        self.present.difference_update(gone)
        self.present.update(come)

    def _connected(self, touched: list[Place]) -> bool:
        """Whether nothing is dead near the touched edges.

        It is enough that every node which sends hears something and every receiver which hears is heard:
        in a graph without cycles such chains can only end at a source and at a readout.
        """
        senders = {(u, g) for u, _, g in touched}
        receivers = {(v, g) for _, v, g in touched}
        for receiver in list(receivers):
            senders.update(self.map.fed[receiver])
        for sender in list(senders):
            receivers.update(self.map.feeders.get(sender, ()))
        heard = all(
            not self.leaving[each]
            or each not in self.map.feeders
            or self._any(self.entering, self.map.feeders[each])
            for each in senders
        )
        return heard and all(
            not self.entering[each] or not self.map.fed[each] or self._any(self.leaving, self.map.fed[each])
            for each in receivers
        )

    @staticmethod
    def _any(counts: Counter[tuple[int, int]], places: list[tuple[int, int]]) -> bool:
        return any(counts[place] > 0 for place in places)


def _swap(pairs: list[tuple[int, int]]) -> dict[int, int]:
    return {one: other for pair in pairs for one, other in (pair, pair[::-1])}

"""The null hypothesis of a circuit: random connected circuits of its size and its profile over stages.

Edges drawn at random seldom join up, so a random set of 40 edges is nearly empty after dead-edge pruning and
beating it means little. Here every edge of every random circuit lies on a path from input to logits, and as
many edges enter each stage (at each token group) as in the circuit that is tested, dead edges left out.

Such circuits cannot be drawn outright, so a reversible Markov chain walks among them. Each step proposes to
replace one or two edges by others into the same stages, and is not taken where that would leave a dead edge;
after the last step, like nodes of each stage (the heads of a layer) change places at random. Proposals are
symmetric and changing places commutes with them, so the uniform distribution is stationary. The chain first
walks from the circuit to a hub, and every random circuit then walks from the hub on its own: under the null
hypothesis that the circuit is itself a uniform draw, circuit and random circuits are exchangeable *however
slowly the chain mixes*, and `(b + 1) / (n + 1)` is an exact p-value (Besag and Clifford 1989, "Generalized
Monte Carlo significance tests", Biometrika 76). Slow mixing costs power only: random circuits then resemble
the circuit, and reports say how much they share, and how many are the circuit itself, as all are where no
other circuit has its size and profile.

Random circuits as a null: Shi et al. 2024, "Hypothesis testing the circuit hypothesis in LLMs",
arXiv:2410.13032.

Two neighbours answer other questions. `complement_circuits` are circuits of the *rest* of the model, which a
necessary circuit must outdo. `edges_of_same_kind` is what a claim about single edges is compared with: such
edges are no circuit, so there is no connected circuit of their size.
"""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from itertools import combinations, product
from math import comb, prod

import numpy as np
from jaxtyping import Int64
from numpy.typing import NDArray

from circuitvit.errors import OptionError, check_whole
from circuitvit.graph import Circuit, CircuitLike, EdgeMask, Graph, Provenance, as_circuit, node_of, port_of

Place = tuple[int, int, int]
"""An edge as `(sender, receiver, group)`."""

STEPS_PER_EDGE = 10
"""Steps that each random circuit walks from the hub, for each of its edges."""

LEAST_STEPS = 200

MOST_STEPS = 100_000
"""Of a walk, however large the circuit: p-values are exact after any number of steps."""

BLOCK = 4096
"""Steps whose random numbers are drawn at once."""

MOST_PATHS = 200
"""Paths that are tried for each edge before a random circuit of the rest is taken as it is."""

MOST_TRIES = 100
"""Draws for each set of edges of the same kind that is wanted, as equal ones are not counted."""


def connected_circuits(
    circuit: CircuitLike, n: int, seed: int = 0, *, steps: int | None = None
) -> tuple[Circuit, ...]:
    """Random circuits without dead edges, with as many edges into each stage as the pruned circuit has.

    Args:
        circuit: to match; its dead edges are left out first.
        n: how many; the first ones do not depend on how many follow.
        seed: of the walks.
        steps: of each walk; by default 10 for each edge, and between 200 and 100,000.

    Returns:
        `n` circuits, each pruned, exchangeable with `circuit` if it is itself such a random circuit. Where no
        other circuit has its size and profile (the empty circuit, the whole graph), all are the circuit.

    Raises:
        OptionError: if `n` or `seed` is negative, or `steps` is not positive.

    Example:
        >>> from circuitvit.graph.eap_ig import transformer_graph
        >>> circuit = Circuit.from_edges(transformer_graph(2, 4), ["input->a1.h0<v>", "a1.h0->logits"])
        >>> drawn = connected_circuits(circuit, 20)
        >>> {len(each.pruned()) for each in drawn}, len(set(drawn)) > 1
        ({2}, True)
    """
    check_whole("the number of random circuits", n, 0)
    check_whole("a seed", seed, 0)
    if steps is not None:
        check_whole("steps", steps)
    circuit = as_circuit(circuit)
    live = circuit.pruned()
    length = steps or min(max(LEAST_STEPS, STEPS_PER_EDGE * len(live)), MOST_STEPS)
    chain = _Chain(circuit.graph)
    streams = np.random.SeedSequence(seed).spawn(n + 1)
    hub = chain.walk(live.kept, length, np.random.default_rng(streams[0]))
    found = circuit.provenance
    origin = Provenance(found.model, found.weights, method="random-connected", seed=seed)
    return tuple(
        Circuit(circuit.graph, chain.walk(hub, length, np.random.default_rng(stream)), provenance=origin)
        for stream in streams[1:]
    )


def relabelled_circuits(circuit: CircuitLike, n: int, seed: int = 0) -> tuple[Circuit, ...]:
    """The circuit with like nodes (the heads of a layer) in one another's places, at random.

    To whoever does not know which head is which, all of them are the same circuit: what they carry in a model
    is what the circuit's shape carries, whatever its heads do.

    Args:
        circuit: whose nodes change places.
        n: how many; the circuit itself may be among them.
        seed: of the draws.

    Returns:
        `n` circuits of as many edges; none where no two nodes are alike, or where all of them have the same
        edges.

    Raises:
        OptionError: if `n` or `seed` is negative.

    Example:
        >>> from circuitvit.graph.eap_ig import transformer_graph
        >>> circuit = Circuit.from_edges(transformer_graph(1, 4), ["input->a0.h1<v>", "a0.h1->logits"])
        >>> sorted({str(each.nodes[1]) for each in relabelled_circuits(circuit, 20)})
        ['a0.h0', 'a0.h1', 'a0.h2', 'a0.h3']
    """
    check_whole("the number of circuits", n, 0)
    check_whole("a seed", seed, 0)
    circuit = as_circuit(circuit)
    chain = _Chain(circuit.graph)
    rng = np.random.default_rng(seed)
    drawn = [chain.relabelled(circuit.kept, rng) for _ in range(n)]
    if all((kept == circuit.kept).all() for kept in drawn):
        return ()
    return tuple(Circuit(circuit.graph, kept) for kept in drawn)


def stage_profile(circuit: CircuitLike) -> Int64[NDArray[np.int64], "stage group"]:
    """How many live edges of the circuit enter each stage at each token group, `(stage, group)`.

    Example:
        >>> from circuitvit.graph.eap_ig import transformer_graph
        >>> stage_profile(Circuit.full(transformer_graph(1, 1)))[
        ...     :, 0
        ... ].tolist()  # input, attention, MLP, logits
        [0, 3, 2, 3]
    """
    circuit = as_circuit(circuit)
    graph = circuit.graph
    into = circuit.pruned().kept.sum(axis=0, dtype=np.int64)  # (receiver, group)
    return np.array([into[receivers].sum(axis=0) for receivers in graph.receiver_slices], dtype=np.int64)


def complement_circuits(circuit: CircuitLike, n: int, seed: int = 0) -> tuple[Circuit, ...]:
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
    check_whole("the number of random circuits", n, 0)
    check_whole("a seed", seed, 0)
    circuit = as_circuit(circuit)
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


def edges_of_same_kind(edges: Circuit, n: int, seed: int = 0) -> list[Circuit]:
    """Other sets of edges with as many of each kind, none of them in the given set.

    Where there are at most `n` such sets, each is given once, so that a rank among them is exact; else `n`
    different ones are drawn at random.

    Args:
        edges: to match.
        n: most sets to give.
        seed: of the draws.

    Example:
        >>> from circuitvit.graph.eap_ig import transformer_graph
        >>> one = Circuit.from_edges(transformer_graph(3, 1), ["m0->logits"])
        >>> [list(each) for each in edges_of_same_kind(one, 10)]
        [['m1->logits'], ['m2->logits']]
    """
    graph = edges.graph
    kinds = _edge_kinds(graph)
    kind_of = {place: kind for kind, places in kinds.items() for place in places}
    own = {(int(u), int(v), int(g)) for u, v, g in np.argwhere(edges.kept)}
    wanted = Counter(kind_of[place] for place in own)
    pools = [([place for place in kinds[kind] if place not in own], count) for kind, count in wanted.items()]
    if not own or any(len(pool) < count for pool, count in pools):
        return []
    if prod(comb(len(pool), count) for pool, count in pools) <= n:
        sets = product(*(combinations(pool, count) for pool, count in pools))
        return [_circuit(graph, [place for part in parts for place in part]) for parts in sets]
    rng = np.random.default_rng(seed)
    drawn: dict[frozenset[Place], Circuit] = {}
    for _ in range(MOST_TRIES * n):
        if len(drawn) == n:
            break
        chosen = [pool[at] for pool, count in pools for at in rng.permutation(len(pool))[:count]]
        drawn.setdefault(frozenset(chosen), _circuit(graph, chosen))
    return list(drawn.values())


# -- inside --------------------------------------------------------------------------------------


class _Chain:
    """The Markov chain among connected circuits of a graph.

    Edges are numbered, as are the places `(sender, group)` and `(receiver, group)`, so that a step is a few
    list look-ups.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        n_groups = len(graph.groups)
        self.edges = np.argwhere(graph.edge_mask)
        senders, receivers, groups = self.edges.T
        self.leaves = (senders * n_groups + groups).tolist()
        self.enters = (receivers * n_groups + groups).tolist()
        into: dict[tuple[int, int], list[int]] = {}
        keys = [
            (graph.receiver_stages[v], g) for v, g in zip(receivers.tolist(), groups.tolist(), strict=True)
        ]
        for edge, key in enumerate(keys):
            into.setdefault(key, []).append(edge)
        self.choices = [into[key] for key in keys]
        self.fed = [
            [u * n_groups + h for u, h in graph.fed(v, g)]
            for v in range(len(graph.receivers))
            for g in range(n_groups)
        ]
        self.feeders: list[list[int]] = [[] for _ in range(len(graph.senders) * n_groups)]
        for source, targets in enumerate(self.fed):
            for target in targets:
                self.feeders[target].append(source)

    def walk(self, kept: EdgeMask, steps: int, rng: np.random.Generator) -> EdgeMask:
        """The circuit after so many steps, standing still counted, with like nodes in new places."""
        edges = np.flatnonzero(kept[tuple(self.edges.T)]).tolist()
        if not edges:
            return kept
        self.present = [False] * len(self.edges)
        self.leaving, self.entering = [0] * len(self.feeders), [0] * len(self.fed)
        self._change([], edges)
        for start in range(0, steps, BLOCK):
            for numbers in rng.random((min(BLOCK, steps - start), 5)).tolist():
                self._step(edges, *numbers)
        walked = np.zeros(self.graph.shape, dtype=bool)
        walked[tuple(self.edges[edges].T)] = True
        return self.relabelled(walked, rng)

    def relabelled(self, kept: EdgeMask, rng: np.random.Generator) -> EdgeMask:
        """The circuit with like nodes in new places."""
        senders, receivers = self._new_places(rng)
        return kept[senders][:, receivers]

    def _step(self, edges: list[int], kind: float, a: float, b: float, c: float, d: float) -> None:
        """Put other edges into the same stages in the place of one or two, if all stays connected."""
        first = int(a * len(edges))
        places = [first]
        if kind < 1 / 3 and len(edges) > 1:
            second = int(b * (len(edges) - 1))
            places.append(second + (second >= first))
        old = [edges[place] for place in places]
        new = []
        for edge, number in zip(old, (c, d), strict=False):
            choices = self.choices[edge]
            new.append(choices[int(number * len(choices))])
        if new == old or (len(new) == 2 and new[0] == new[1]):
            return
        if any(self.present[edge] and edge not in old for edge in new):
            return
        self._change(old, new)
        if self._connected([*old, *new]):
            for place, edge in zip(places, new, strict=True):
                edges[place] = edge
        else:
            self._change(new, old)

    def _change(self, gone: list[int], come: list[int]) -> None:
        for edge in gone:
            self.present[edge] = False
            self.leaving[self.leaves[edge]] -= 1
            self.entering[self.enters[edge]] -= 1
        for edge in come:
            self.present[edge] = True
            self.leaving[self.leaves[edge]] += 1
            self.entering[self.enters[edge]] += 1

    def _connected(self, touched: list[int]) -> bool:
        """Whether nothing is dead near the touched edges.

        It is enough that every node which sends hears something and every receiver which hears is heard:
        in a graph without cycles such chains can only end at a source and at a readout.
        """
        leaving, entering, fed, feeders = self.leaving, self.entering, self.fed, self.feeders
        senders = {self.leaves[edge] for edge in touched}
        receivers = {self.enters[edge] for edge in touched}
        for receiver in tuple(receivers):
            senders.update(fed[receiver])
        for sender in tuple(senders):
            receivers.update(feeders[sender])
        for sender in senders:
            if leaving[sender] and feeders[sender] and not any(entering[each] for each in feeders[sender]):
                return False
        for receiver in receivers:
            if entering[receiver] and fed[receiver] and not any(leaving[each] for each in fed[receiver]):
                return False
        return True

    def _new_places(self, rng: np.random.Generator) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Who stands in for each sender and each receiver: like nodes of a stage, in random order."""
        senders, receivers = np.arange(len(self.graph.senders)), np.arange(len(self.graph.receivers))
        for alike in self._like_nodes:
            order = rng.permutation(len(alike))
            for (sender, ports), place in zip(alike, order.tolist(), strict=True):
                other, other_ports = alike[place]
                senders[sender] = other
                receivers[list(ports)] = other_ports
        return senders, receivers

    @cached_property
    def _like_nodes(self) -> list[list[tuple[int, tuple[int, ...]]]]:
        """Nodes of a stage that have the same ports and nothing in common: as (sender, receivers)."""
        found: dict[tuple[int, tuple[str, ...]], list[tuple[int, tuple[int, ...]]]] = {}
        n_groups = len(self.graph.groups)
        for sender, name in enumerate(self.graph.senders):
            mine = [v for v, receiver in enumerate(self.graph.receivers) if node_of(receiver) == name]
            heard = {
                each // n_groups for g in range(n_groups) for each in self.feeders[sender * n_groups + g]
            }
            feeds = {
                each // n_groups for v in mine for g in range(n_groups) for each in self.fed[v * n_groups + g]
            }
            if mine and heard == set(mine) and feeds == {sender}:
                mine.sort(key=lambda v: port_of(self.graph.receivers[v]))
                ports = tuple(port_of(self.graph.receivers[v]) for v in mine)
                stage = self.graph.sender_stages[sender]
                found.setdefault((stage, ports), []).append((sender, tuple(mine)))
        return [alike for alike in found.values() if len(alike) > 1]


def _edge_kinds(graph: Graph) -> dict[tuple[str, ...], list[Place]]:
    """All edges by kind: kinds of sender and receiver, port, and token group."""
    found: dict[tuple[str, ...], list[Place]] = {}
    for sender, receiver, group in np.argwhere(graph.edge_mask).tolist():
        kind = (
            graph.stages[graph.sender_stages[sender]].kind_of(graph.senders[sender]),
            graph.stages[graph.receiver_stages[receiver]].kind_of(node_of(graph.receivers[receiver])),
            port_of(graph.receivers[receiver]),
            graph.groups[group],
        )
        found.setdefault(kind, []).append((sender, receiver, group))
    return found


def _circuit(graph: Graph, places: list[Place]) -> Circuit:
    kept = np.zeros(graph.shape, dtype=bool)
    for place in places:
        kept[place] = True
    return Circuit(graph, kept)

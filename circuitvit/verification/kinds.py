"""Random edges of the same kind as given ones: what an effect is compared with."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, product
from math import comb, prod

import numpy as np

from circuitvit.graph import Circuit, Graph, port_of

Kind = tuple[str, str, str, str]
Place = tuple[int, int, int]

MOST_TRIES = 100


def edge_kinds(graph: Graph) -> dict[Kind, list[Place]]:
    """All edges by kind: kinds of sender and receiver, port, and token group.

    Example:
        >>> from circuitvit.graph.eap_ig import transformer_graph
        >>> kinds = edge_kinds(transformer_graph(2, 1))
        >>> len(kinds["mlp", "readout", "", "all"]), len(kinds["attention", "attention", "q", "all"])
        (2, 1)
    """
    found: dict[Kind, list[Place]] = {}
    for sender, receiver, group in np.argwhere(graph.edge_mask).tolist():
        kind = (
            graph.stages[graph.sender_stages[sender]].kind,
            graph.stages[graph.receiver_stages[receiver]].kind,
            port_of(graph.receivers[receiver]),
            graph.groups[group],
        )
        found.setdefault(kind, []).append((sender, receiver, group))
    return found


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
    kinds = edge_kinds(graph)
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


def _circuit(graph: Graph, places: list[Place]) -> Circuit:
    kept = np.zeros(graph.shape, dtype=bool)
    for place in places:
        kept[place] = True
    return Circuit(graph, kept)

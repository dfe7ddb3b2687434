"""What a gate opens: an edge, a node with all its edges, or both at once.

Gates over nodes give circuits in which every edge between kept nodes is kept. With both, an edge is as
open as the product of its own gate and those of the two nodes that it joins, so whole nodes can go at once.
Sources and readouts are always in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from circuitvit.graph import EdgeMask, Graph, node_of

Over = Literal["edges", "nodes", "both"]


@dataclass(frozen=True, eq=False)
class GatedUnits:
    """Which gates an edge goes through.

    Attributes:
        graph: whose edges.
        factors: `(edge, factor)`: places of the gates whose product opens an edge. The last place of all is
            a gate that is always open.
        n_gates: number of gates that are learned.
    """

    graph: Graph
    factors: Int64[Tensor, "edge factor"]
    n_gates: int

    def mask(self, gates: Float[Tensor, " gate"]) -> Float[Tensor, "sender receiver group"]:
        """The mask of all edges from the learned gates; 0 where there is no edge."""
        places = torch.from_numpy(np.flatnonzero(self.graph.edge_mask)).to(gates.device)
        always = torch.cat([gates, gates.new_ones(1)])
        opened = always[self.factors.to(gates.device)].prod(dim=1)
        blank = torch.zeros(int(np.prod(self.graph.shape)), dtype=gates.dtype, device=gates.device)
        return blank.scatter(0, places, opened).view(self.graph.shape)

    def kept(self, phi: Float[Tensor, " gate"]) -> EdgeMask:
        """The edges all of whose gates are more open than not."""
        kept: EdgeMask = self.mask((phi.detach() > 0).float()).cpu().numpy() > 0.5
        return kept


def gated_units(graph: Graph, over: Over) -> GatedUnits:
    """The gates of a graph.

    Args:
        graph: whose edges or nodes are gated.
        over: "edges", "nodes" or "both".
    """
    n_edges = graph.n_edges
    own = np.arange(n_edges)[:, None]
    if over == "edges":
        return GatedUnits(graph, torch.from_numpy(own), n_edges)
    inner = [
        node
        for node in graph.nodes
        if graph.stage_of_node[node].senders and graph.stage_of_node[node].receivers
    ]
    first = 0 if over == "nodes" else n_edges
    place = {node: first + index for index, node in enumerate(inner)}
    n_gates = first + len(inner)
    ends = np.array(
        [
            [
                place.get(graph.senders[sender], n_gates),
                place.get(node_of(graph.receivers[receiver]), n_gates),
            ]
            for sender, receiver, _ in np.argwhere(graph.edge_mask)
        ]
    )
    factors = ends if over == "nodes" else np.concatenate([own, ends], axis=1)
    return GatedUnits(graph, torch.from_numpy(factors), n_gates)

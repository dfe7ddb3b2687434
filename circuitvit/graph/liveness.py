"""Which edges of a circuit do anything: those on a path from a source to a readout.

An edge whose sender hears nothing from the input carries only reference values (where these come from a run
on other images), and an edge whose receiver leads nowhere is heard by nobody; such edges are dead, and sizes
are counted without them. Searches under other ablations keep more, see `circuitvit.pruning.dead`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from circuitvit.graph.topology import EdgeMask, Graph

__all__ = [
    "EVERYWHERE",
    "LEADING",
    "NEVER",
    "live_edges",
    "live_receivers",
    "needed_senders",
    "reached_senders",
]

NEVER, LEADING, EVERYWHERE = 0, 1, 2
"""At which tokens a sender's output matters."""


def live_edges(graph: Graph, kept: EdgeMask) -> EdgeMask:
    """The kept edges `(sender, receiver, group)` that lie on a kept path from a source to a readout."""
    heard = reached_senders(graph, kept)
    leads = live_receivers(graph, kept)
    return kept & heard[:, None, :] & leads[None, :, :]


def reached_senders(graph: Graph, kept: EdgeMask) -> EdgeMask:
    """`(sender, group)`: whether a kept path leads from a source to the sender's output at those tokens."""
    heard: EdgeMask = np.zeros((len(graph.senders), len(graph.groups)), dtype=bool)
    for stage, senders, receivers in zip(
        graph.stages, graph.sender_slices, graph.receiver_slices, strict=True
    ):
        if not stage.receivers:
            heard[senders] = True
            continue
        arrives: EdgeMask = np.any(kept[:, receivers] & heard[:, None, :], axis=0)
        _spread(stage.mixes, arrives)
        for arrived, fed in zip(arrives, stage.feeds or (), strict=True):
            for sender in fed:
                heard[senders.start + sender] |= arrived
    return heard


def needed_senders(graph: Graph, kept: EdgeMask, leading: bool) -> NDArray[np.int8]:
    """For each sender whether its output reaches a readout on kept paths: `NEVER`, at the `LEADING` tokens
    or `EVERYWHERE`.

    Queries and MLPs keep tokens apart, so what only they carry on to a readout that reads the first tokens
    alone matters nowhere else.

    Args:
        graph: the graph.
        kept: `(sender, receiver, group)`.
        leading: whether the readouts read the leading tokens alone.
    """
    needed = np.any(kept & live_receivers(graph, kept)[None], axis=(1, 2))
    apart = np.repeat(np.any(kept, axis=2, keepdims=True), 2, axis=2)
    reads = np.array([True, not leading])
    beyond = np.any(
        apart & live_receivers(graph.with_groups(("leading", "rest")), apart, reads)[None], axis=1
    )
    return np.where(needed, np.where(beyond[:, 1], EVERYWHERE, LEADING), NEVER).astype(np.int8)


def live_receivers(graph: Graph, kept: EdgeMask, reads: NDArray[np.bool_] | None = None) -> EdgeMask:
    """`(receiver, group)`: whether a kept path leads from what it reads at those tokens to a readout.

    Args:
        graph: the graph.
        kept: `(sender, receiver, group)`.
        reads: the groups that readouts read; by default all.
    """
    leads = np.zeros((len(graph.receivers), len(graph.groups)), dtype=bool)
    backwards = list(zip(graph.stages, graph.sender_slices, graph.receiver_slices, strict=True))[::-1]
    for stage, senders, receivers in backwards:
        if not stage.senders:
            leads[receivers] = True if reads is None else reads
            continue
        wanted: EdgeMask = np.any(kept[senders] & leads[None, :, :], axis=1)
        onward = np.zeros((len(stage.receivers), len(graph.groups)), dtype=bool)
        for index, fed in enumerate(stage.feeds or ()):
            for sender in fed:
                onward[index] |= wanted[sender]
        _spread(stage.mixes, onward)
        leads[receivers] = onward
    return leads


def _spread(mixes: tuple[bool, ...] | None, by_group: EdgeMask) -> None:
    """Let what a mixing receiver has at one group count for every group, in place `(receiver, group)`."""
    for index, mixing in enumerate(mixes or ()):
        if mixing:
            by_group[index] = by_group[index].any()

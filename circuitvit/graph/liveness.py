"""Which edges of a circuit do anything: those on a path from a source to a readout.

An edge whose sender hears nothing from the input carries only reference values (where these come from a run
on other images), and an edge whose receiver leads nowhere is heard by nobody; such edges are dead, and sizes
are counted without them. Searches under other ablations keep more, see `useful_beside` of
`circuitvit.pruning.refine`.

All is asked of one mask `(sender, receiver, group)` or of many at once, `(*mask, sender, receiver, group)`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from circuitvit.graph.topology import EdgeMask, Graph, StageNodes

NEVER, LEADING, EVERYWHERE = 0, 1, 2
"""At which tokens a sender's output matters."""


def live_edges(graph: Graph, kept: EdgeMask) -> EdgeMask:
    """The kept edges `(*mask, sender, receiver, group)` on a kept path from a source to a readout."""
    heard = reached_senders(graph, kept)
    leads = live_receivers(graph, kept)
    return kept & heard[..., :, None, :] & leads[..., None, :, :]


def reached_senders(graph: Graph, kept: EdgeMask) -> EdgeMask:
    """`(*mask, sender, group)`: whether a kept path leads from a source to the sender's output at those
    tokens."""
    kept = graph.in_run(kept)
    heard: EdgeMask = np.zeros((*kept.shape[:-3], len(graph.senders), len(graph.groups)), dtype=bool)
    for stage, senders, receivers in zip(
        graph.stages, graph.sender_slices, graph.receiver_slices, strict=True
    ):
        if not stage.receivers:
            heard[..., senders, :] = True
            continue
        before = slice(0, senders.start)
        arriving = kept[..., before, receivers, :] & heard[..., before, None, :]
        arrives = _spread(stage, np.any(arriving, axis=-3))
        heard[..., senders, :] |= np.any(stage.feeding[:, :, None] & arrives[..., :, None, :], axis=-3)
    return heard


def needed_senders(graph: Graph, kept: EdgeMask, leading: bool) -> NDArray[np.int8]:
    """For each sender `(*mask, sender)` whether its output reaches a readout on kept paths: `NEVER`, at the
    `LEADING` tokens or `EVERYWHERE`.

    Queries and MLPs keep tokens apart, so what only they carry on to a readout that reads the first tokens
    alone matters nowhere else.

    Args:
        graph: the graph.
        kept: `(*mask, sender, receiver, group)`.
        leading: whether the readouts read the leading tokens alone.
    """
    kept = graph.in_run(kept)
    apart = np.repeat(np.any(kept, axis=-1, keepdims=True), 2, axis=-1)  # the leading tokens, and the others
    leads = live_receivers(graph, apart, np.array([True, not leading]))
    beyond = np.any(apart & leads[..., None, :, :], axis=-2)
    # A path to a readout reaches it at the leading tokens, so that with one group these say it all.
    needed = beyond[..., 0]
    if kept.shape[-1] > 1:
        needed = np.any(kept & live_receivers(graph, kept)[..., None, :, :], axis=(-2, -1))
    return np.where(needed, np.where(beyond[..., 1], EVERYWHERE, LEADING), NEVER).astype(np.int8)


def live_receivers(graph: Graph, kept: EdgeMask, reads: NDArray[np.bool_] | None = None) -> EdgeMask:
    """`(*mask, receiver, group)`: whether a kept path leads from what it reads at those tokens to a readout.

    Args:
        graph: the graph.
        kept: `(*mask, sender, receiver, group)`, of any groups of tokens, not only the graph's.
        reads: the groups that readouts read; by default all.
    """
    kept = graph.in_run(kept)
    leads = np.zeros((*kept.shape[:-3], *kept.shape[-2:]), dtype=bool)
    backwards = list(zip(graph.stages, graph.sender_slices, graph.receiver_slices, strict=True))[::-1]
    for stage, senders, receivers in backwards:
        if not stage.senders:
            leads[..., receivers, :] = True if reads is None else reads
            continue
        downstream = slice(receivers.stop, None)
        carried = kept[..., senders, downstream, :] & leads[..., None, downstream, :]
        wanted = np.any(carried, axis=-2)
        fed = np.any(stage.feeding[:, :, None] & wanted[..., None, :, :], axis=-2)
        leads[..., receivers, :] = _spread(stage, fed)
    return leads


def _spread(stage: StageNodes, by_group: EdgeMask) -> EdgeMask:
    """What mixing receivers have at one group counted for every group, `(*mask, receiver, group)`."""
    return by_group | (stage.mixing[:, None] & by_group.any(axis=-1, keepdims=True))

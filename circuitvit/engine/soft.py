"""Masked runs with real-valued masks, differentiable with respect to the mask: what mask learning needs.

Receiver `v` sees `base + sum of M[u, v] (x_u - r_u)` with `M` anywhere between 0 (ablated) and 1 (kept). With
a mask of zeros and ones the logits are those of `masked_run`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvit.engine.masked import Sources, mix

__all__ = ["soft_run"]


def soft_run(sources: Sources, mask: Float[Tensor, "sender receiver group"]) -> Float[Tensor, "batch class"]:
    """The logits under a real-valued mask; the model's weights get no gradient.

    Args:
        sources: of the batch.
        mask: 1 keeps an edge, 0 ablates it; entries that are no edges are not looked at.
    """
    model, graph = sources.model, sources.graph
    changes: Tensor | None = None  # current minus reference output of all senders so far
    for index, stage in enumerate(model.stages):
        senders, receivers = graph.sender_slices[index], graph.receiver_slices[index]
        if stage.is_source:
            changes = -sources.deltas[senders]
            continue
        base = sources.reference_streams[index]
        assert base is not None
        assert changes is not None, "the first stage is the source"
        streams = base + mix(mask[: senders.start, receivers], changes, sources.members)
        compact = stage.write(stage.read_each(streams, range(len(stage.nodes.receivers))))
        if stage.is_readout:
            return compact
        changes = torch.cat([changes, stage.expand(compact) - sources.reference[senders]])
    raise AssertionError("a model ends with its readout")

"""Masked runs with real-valued masks, differentiable with respect to the mask: what mask learning needs.

Receiver `v` sees `base + sum of M[u, v] (x_u - r_u)` with `M` anywhere between 0 (ablated) and 1 (kept). With
a mask of zeros and ones the logits are those of `masked_run`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from circuitvit.engine.sources import Sources
from circuitvit.engine.sums import mix


def soft_run(
    sources: Sources, mask: Float[Tensor, "sender receiver group"], checkpoint: bool = False
) -> Float[Tensor, "batch class"]:
    """The logits under a real-valued mask; the model's weights get no gradient.

    Args:
        sources: of the batch.
        mask: 1 keeps an edge, 0 ablates it; entries that are no edges are not looked at.
        checkpoint: keep only the senders' outputs for the backward pass and compute each stage again there.
    """
    graph = sources.graph
    changes = -sources.deltas[graph.sender_slices[0]]  # current minus reference output of all senders so far
    for index, stage in enumerate(sources.model.essential[1:], 1):
        arguments = (sources, index, mask[: len(changes), graph.receiver_slices[index]], changes)
        written = recompute(_stage, *arguments, use_reentrant=False) if checkpoint else _stage(*arguments)
        if stage.is_readout:
            return written
        changes = torch.cat([changes[:, :, : written.shape[2]], written])
    raise AssertionError("a model ends with its readout")


def _stage(sources: Sources, index: int, mask: Tensor, changes: Tensor) -> Tensor:
    """What the senders of a stage write, less their reference outputs; of the readout, the logits.

    Args:
        sources: of the batch.
        index: number of the stage.
        mask: `(upstream sender, receiver of the stage, group)`.
        changes: current minus reference output of the upstream senders.
    """
    stage, base = sources.model.essential[index], sources.reference_streams[index]
    assert base is not None, "the source reads no stream"
    members = None if sources.members is None else sources.members[..., : base.shape[1]]
    streams = base + mix(mask, changes, members)
    compact = stage.write(stage.read_each(streams, range(len(stage.nodes.receivers))))
    if stage.is_readout:
        return compact
    reference = sources.reference[sources.graph.sender_slices[index]]
    return stage.expand(compact) - reference[:, :, : compact.shape[-2]]

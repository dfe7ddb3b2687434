"""Runs of a circuit of nodes: all edges among some nodes, and what the others write is replaced.

Every node that is kept then sees the same stream, that of the kept nodes' own outputs and the reference
outputs of all others, so that such a run costs one plain forward whatever the number of nodes. Masked runs
give the same, edge by edge.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitvit.engine.gradients import refuse_inference_mode
from circuitvit.engine.references import Sources
from circuitvit.models import Stage


@torch.no_grad()
def node_run(sources: Sources, kept: Bool[np.ndarray, " sender"]) -> Float[Tensor, "batch class"] | None:
    """The logits with these senders kept and all others replaced by their reference outputs.

    Args:
        sources: of the batch.
        kept: for each sender, in graph order.

    Returns:
        None where reference outputs are no outputs of stages, as with noise: a masked run is needed there.
    """
    found = _run(sources, kept)
    return None if found is None else found[0]


def node_losses(
    sources: Sources,
    kept: Bool[np.ndarray, " sender"],
    metric: Callable[[Float[Tensor, "batch class"]], Float[Tensor, " batch"]],
) -> Float[np.ndarray, " sender"] | None:
    """What the metric of such a run would lose without each node, to first order, summed over the batch.

    For a node that is not kept, what it would gain with it. One run forward and one backward.

    Args:
        sources: of the batch.
        kept: for each sender, in graph order.
        metric: of the logits, for each image.

    Returns:
        None as with `node_run`.
    """
    refuse_inference_mode()
    with torch.enable_grad():
        found = _run(sources, kept)
        if found is None:
            return None
        logits, streams, changes = found
        value = metric(logits).sum()
    if not value.requires_grad:  # a metric that does not look at the logits
        return np.zeros(len(kept))
    slopes = torch.autograd.grad(value, streams, materialize_grads=True)
    stages = sources.model.essential
    losses = [
        stage.factored(change).times_stream(slope).double()
        for stage, change, slope in zip(stages, changes, slopes, strict=False)
    ]
    return torch.cat(losses).cpu().numpy()


Run = tuple[Tensor, list[Tensor], list[Tensor]]
"""The logits; the stream after each stage, and what the stage changed of its reference output, compact."""


def _run(sources: Sources, kept: Bool[np.ndarray, " sender"]) -> Run | None:
    if sources.reference.wide is not None:
        return None
    stream = sources.base.compacts[0]  # for the source, which reads none
    streams: list[Tensor] = []
    changes: list[Tensor] = []
    for index, (stage, senders) in enumerate(
        zip(sources.model.essential, sources.graph.sender_slices, strict=True)
    ):
        compact = sources.base.compacts[0] if stage.is_source else stage.write(stage.read(stream))
        if stage.is_readout:
            return compact, streams, changes
        other = _reference(sources, index, compact)
        stream = _after(stage, stream, compact, other, kept[senders])
        if torch.is_grad_enabled() and not stream.requires_grad:
            stream = stream.detach().requires_grad_()
        streams.append(stream)
        changes.append((compact - other).detach())
    raise AssertionError("a model ends with its readout")


def _reference(sources: Sources, index: int, compact: Tensor) -> Tensor:
    """What a stage's senders write when they are ablated, in the form of what they wrote."""
    if sources.reference.compacts is None:
        return torch.zeros_like(compact)
    return sources.reference.compacts[index][..., : compact.shape[-2], :].expand_as(compact)


def _after(
    stage: Stage, stream: Tensor, compact: Tensor, other: Tensor, kept: Bool[np.ndarray, " sender"]
) -> Float[Tensor, "batch token d_model"]:
    """The stream after a stage some of whose senders write `compact`, the rest `other`."""
    mixed = compact if kept.all() else other
    after = stage.total(mixed) if stage.is_source else stage.add(stream, mixed)
    if kept.all() or not kept.any():
        return after
    part = stage.restrict(np.flatnonzero(kept).tolist())
    (change,) = part.pick((compact - other,))
    if len(stage.branches) > 1:  # one of which may be whole, and add its constant again
        return after + part.expand(change).sum(dim=0)
    return after + part.total(change)

"""Masked runs: the model with some edges kept and all others ablated.

Stage after stage, receiver `v` sees

    X_v = base + sum over kept edges of (x_u - r_u),

where `base` is the stream of reference outputs `r_u` and constants, and `x_u` is what sender `u` writes in
this very run. All receivers of a stage are one matrix product over the senders that some kept edge leaves;
receivers with equal kept edges share a stream; senders that no kept path joins to the logits do not run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitvit.engine.capture import Capture, outputs
from circuitvit.graph import EdgeMask, Graph
from circuitvit.graph.liveness import live_receivers
from circuitvit.models import Model, Stage

__all__ = ["Sources", "masked_run", "mix", "new_workspace"]


@dataclass(frozen=True, eq=False)
class Sources:
    """What masked runs of one batch start from; made once, used for any number of masks.

    Attributes:
        model: to run.
        graph: the model's graph with the task's token groups.
        base: the captured run that is intervened on.
        reference: every sender's reference output.
        members: token group of each token, `(token,)` or `(batch, token)`; None for one group.
    """

    model: Model
    graph: Graph
    base: Capture
    reference: Float[Tensor, "sender batch token d_model"]
    members: Tensor | None = None

    @cached_property
    def deltas(self) -> Float[Tensor, "sender batch token d_model"]:
        """Reference minus base output of every sender: what ablating all of its edges adds."""
        return self.reference - outputs(self.model.stages, self.base.compacts)

    @cached_property
    def reference_streams(self) -> tuple[Tensor | None, ...]:
        """What each stage would read if every edge were ablated: constants and reference outputs, summed."""
        streams: list[Tensor | None] = []
        stream = torch.zeros_like(self.reference[0])
        for stage, senders in zip(self.model.stages, self.graph.sender_slices, strict=True):
            streams.append(None if stage.is_source else stream)
            if not stage.is_readout:
                stream = stream + self.reference[senders].sum(dim=0)
            if stage.constant is not None:
                stream = stream + stage.constant
        return tuple(streams)


@torch.no_grad()
def masked_run(
    sources: Sources, kept: EdgeMask, *, start: int = 1, workspace: Tensor | None = None
) -> Float[Tensor, "batch class"]:
    """The logits with the edges of `kept` kept and all others ablated.

    Args:
        sources: of the batch.
        kept: `(sender, receiver, group)`.
        start: number of the first stage with ablated edges; all before it are taken from the base run.
        workspace: from `new_workspace`, to spare many runs on one batch the allocation; overwritten.
    """
    model, graph = sources.model, sources.graph
    needed = np.any(kept & live_receivers(graph, kept)[None], axis=(1, 2))
    changes = new_workspace(sources) if workspace is None else workspace
    for index, stage in enumerate(model.stages[start:], start):
        senders, receivers = graph.sender_slices[index], graph.receiver_slices[index]
        wanted = np.flatnonzero(needed[senders])
        if not stage.is_readout and not len(wanted):
            continue
        part, places = (
            (stage, list(range(receivers.start, receivers.stop)))
            if stage.is_readout
            else _part(stage, graph, wanted)
        )
        streams, source = _receiver_streams(
            sources, index, kept[: senders.start, places], changes[: senders.start]
        )
        compact = part.write(part.read_each(streams, source))
        if stage.is_readout:
            return compact
        rows = wanted + senders.start
        if len(rows) == senders.stop - senders.start:
            torch.sub(part.expand(compact), sources.reference[senders], out=changes[senders])
        else:
            changes[rows] = part.expand(compact) - sources.reference[rows]
    raise AssertionError("a model ends with its readout")


def new_workspace(sources: Sources) -> Float[Tensor, "sender batch token d_model"]:
    """Room for every sender's current minus reference output, filled with that of the base run.

    A masked run overwrites what it computes, so a workspace serves again for runs that start no earlier.
    """
    return sources.deltas.neg()


def _part(stage: Stage, graph: Graph, wanted: np.ndarray) -> tuple[Stage, list[int]]:
    """The stage cut to the wanted senders, and the places of its receivers in the graph."""
    part = stage.restrict(wanted.tolist())
    return part, [graph.receiver_index[name] for name in part.nodes.receivers]


def _receiver_streams(
    sources: Sources, stage: int, kept: EdgeMask, changes: Float[Tensor, "sender batch token d_model"]
) -> tuple[Float[Tensor, "stream batch token d_model"], list[int]]:
    """The distinct streams that the receivers of a stage see, and which receiver sees which.

    Args:
        sources: of the run.
        stage: its number.
        kept: `(upstream sender, receiver of the stage, group)`.
        changes: current minus reference output of the upstream senders; garbage where no kept edge leaves.
    """
    base = sources.reference_streams[stage]
    assert base is not None
    patterns, source = np.unique(kept, axis=1, return_inverse=True)
    streams = base.expand(patterns.shape[1], *base.shape)
    used = np.flatnonzero(patterns.any(axis=(1, 2)))
    if len(used):
        rows = changes if len(used) == len(changes) else changes[used]
        weights = torch.from_numpy(patterns[used]).to(base.device, base.dtype)  # (sender, pattern, group)
        streams = streams + mix(weights, rows, sources.members)
    return streams, source.ravel().tolist()


def mix(
    weights: Tensor, changes: Tensor, members: Tensor | None
) -> Float[Tensor, "pattern batch token d_model"]:
    """Sum of the changes that each pattern lets through, `weights` `(sender, pattern, group)`."""
    flat = changes.flatten(1)
    if members is None:
        return (weights[..., 0].t() @ flat).view(-1, *changes.shape[1:])
    mixed: Tensor | None = None
    for group in range(weights.shape[2]):
        inside = (members == group).to(changes.dtype)[..., None]
        part = (weights[..., group].t() @ flat).view(-1, *changes.shape[1:]) * inside
        mixed = part if mixed is None else mixed.add_(part)
    assert mixed is not None
    return mixed

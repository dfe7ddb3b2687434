"""Exact effects: ablate each edge alone and run. The oracle that every estimator is compared with.

Before the receiver nothing changes, so a run restarts at the receiver's own stage from the captured stream;
within that stage only the senders that the receiver feeds are computed again; and all senders of a receiver
are one batch. Cost: for each edge, the part of the network from its receiver on.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from circuitvit.attribution.method import Settings, check_effects
from circuitvit.engine import BatchRun, batch_runs, progress_bar, run_from
from circuitvit.graph import EdgeMask
from circuitvit.tasks import PreparedTask

__all__ = ["edge_effects", "exact"]

CANDIDATE_IMAGES = 32
"""Candidates times images that run at once: enough to fill the machine, small enough for its caches."""


def exact(prepared: PreparedTask, settings: Settings) -> NDArray[np.float64]:
    """The effect of every edge `(sender, receiver, group)`, summed over pairs."""
    total = edge_effects(prepared, prepared.graph.edge_mask, settings)
    check_effects(prepared, total)
    return total


def edge_effects(prepared: PreparedTask, wanted: EdgeMask, settings: Settings) -> NDArray[np.float64]:
    """The effects of the edges marked in `wanted`, summed over pairs; 0 elsewhere."""
    total = np.zeros(prepared.graph.shape)
    with progress_bar(int(wanted.sum()) * len(prepared), "exact effects", settings.progress) as bar:
        for run in batch_runs(prepared, settings.batch_size):
            if not run.sources.deltas.any():  # as with equal images: no edge can have an effect
                continue
            clean = run.metric(run.base.logits)
            for index, stage in enumerate(prepared.model.stages):
                for local in range(len(stage.nodes.receivers)):
                    receiver = prepared.graph.receiver_slices[index].start + local
                    places = np.argwhere(wanted[:, receiver])
                    for chunk, values in _receiver_runs(run, index, local, places):
                        effects = (values - clean).double().sum(dim=-1).cpu().numpy()
                        total[chunk[:, 0], receiver, chunk[:, 1]] += effects
                        bar.update(len(chunk) * len(run.batch.rows))
    return total


def _receiver_runs(
    run: BatchRun, index: int, local: int, places: NDArray[np.intp]
) -> Iterator[tuple[NDArray[np.intp], Float[Tensor, "candidate batch"]]]:
    """The metric with each of the edges into one receiver ablated, a chunk of edges at a time.

    Args:
        run: the batch.
        index: number of the receiver's stage.
        local: the receiver's place in its stage.
        places: `(edge, 2)`: sender and token group of each edge.
    """
    stage = run.sources.model.stages[index]
    stream = run.base.stream(index)
    fed = list((stage.nodes.feeds or ())[local])
    part = stage if stage.is_readout else stage.restrict(fed)
    place = part.nodes.receivers.index(stage.nodes.receivers[local])
    size = max(1, CANDIDATE_IMAGES // len(stream))
    for start in range(0, len(places), size):
        chunk = places[start : start + size]
        ablated = (stream + _group_deltas(run, chunk)).flatten(0, 1)  # (candidate * batch, token, d_model)
        shared = stream.expand(len(chunk), *stream.shape).flatten(0, 1)
        source = [int(receiver == place) for receiver in range(len(part.nodes.receivers))]
        with torch.no_grad():
            compact = part.write(part.read_each(torch.stack([shared, ablated]), source))
            if stage.is_readout:
                logits = compact
            else:
                change = part.expand(compact).sum(dim=0) - _own_output(run, index, fed).repeat(
                    len(chunk), 1, 1
                )
                after = run.base.stream(index + 1).repeat(len(chunk), 1, 1) + change
                logits = run_from(run.sources.model, index + 1, after)
        yield chunk, run.metric(logits.view(len(chunk), len(stream), -1))


def _group_deltas(run: BatchRun, chunk: NDArray[np.intp]) -> Float[Tensor, "candidate batch token d_model"]:
    """Reference minus base output of each edge's sender, at the tokens of the edge's group."""
    deltas = run.sources.deltas[chunk[:, 0]]
    members = run.sources.members
    if members is None:
        return deltas
    groups = torch.from_numpy(chunk[:, 1]).to(members.device)
    inside = members == groups.reshape(-1, *(1,) * members.ndim)  # (candidate, [batch,] token)
    if members.ndim == 1:
        inside = inside[:, None]
    return deltas * inside.to(deltas.dtype)[..., None]


def _own_output(run: BatchRun, index: int, senders: list[int]) -> Float[Tensor, "batch token d_model"]:
    """What these senders of a stage wrote, together, in the base run."""
    start = run.prepared.graph.sender_slices[index].start
    rows = [start + sender for sender in senders]
    return (run.sources.reference[rows] - run.sources.deltas[rows]).sum(dim=0)

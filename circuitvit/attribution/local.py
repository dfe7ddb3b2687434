"""Locally exact scores: the receiver answers exactly, everything after it to first order.

    s(u->v) = sum over tokens of ( node_v(X_v + r_u - x_u) - node_v(X_v) ) . d metric / d x_v

Norm, softmax, values and MLP of the receiver are computed anew on its ablated input; its change is weighed by
the gradient at its own output in the base run. An edge into the logits is the exact difference of the metric.
AtP*'s fix of saturated attention is the special case for queries and keys.

Cost: 2 forwards, 1 backward, and for each edge its receiver alone; senders are batched, heads share norm and
projections, and the change of a head is never expanded to `d_model`. On ViT-Ti some 28 forwards in all.

Blind to: how the rest of the model bends, above all after early receivers; a saturated metric; backup heads.

Kramár, Lieberum, Shah and Nanda 2024, "AtP*", arXiv:2403.00745, for the case of queries and keys.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from circuitvit.attribution.costs import local_cost, tell_time
from circuitvit.attribution.eap import new_total, objective
from circuitvit.attribution.scoring import Running, check_effects, require_slope
from circuitvit.engine import BatchRun, Gradients, batch_runs, gradients, output_gradients, progress_bar
from circuitvit.models import Stage
from circuitvit.tasks import PreparedTask

CANDIDATE_IMAGES = 16
"""Ablated streams at once: enough for large matrix products, few enough for the caches."""


def local(prepared: PreparedTask, how: Running) -> NDArray[np.float64]:
    """Locally exact scores `(sender, receiver, group)`, summed over pairs."""
    require_slope(prepared, "local")
    tell_time(prepared, "local", local_cost(prepared.graph), how.batch_size, how.progress)
    total = np.zeros(prepared.graph.shape)
    with progress_bar(len(prepared), "local", how.progress) as bar:
        for run, found in differentiated_runs(prepared, how.batch_size):
            total += local_effects(run, found)
            bar.update(len(run.batch.rows))
    check_effects(prepared, total)
    return total


def differentiated_runs(prepared: PreparedTask, batch_size: int) -> Iterator[tuple[BatchRun, Gradients]]:
    """The batches of a task in which there is something to ablate, with the gradient at every read."""
    for run in batch_runs(prepared, batch_size):
        if run.sources.differs:
            metric = objective(prepared, run.batch, run.base.logits)
            yield run, gradients(prepared.model, run.base.compacts[0], metric)


@torch.no_grad()
def local_effects(run: BatchRun, found: Gradients) -> NDArray[np.float64]:
    """Locally exact scores of one batch, summed over its pairs."""
    graph, total = run.prepared.graph, new_total(run.prepared)
    d_compacts = (*output_gradients(found), None)
    for index, stage in enumerate(run.prepared.model.essential):
        if stage.is_source:
            continue
        for places, streams in candidate_streams(run, index, found.capture.stream(index)):
            effects = _effects(run, found, d_compacts[index], index, stage, streams)
            total[places[:, 0], graph.receiver_slices[index], places[:, 1]] = effects.double().sum(dim=-1).T
    return np.where(graph.edge_mask, total.cpu().numpy(), 0.0)


def _effects(
    run: BatchRun, found: Gradients, d_compact: Tensor | None, index: int, stage: Stage, streams: Tensor
) -> Float[Tensor, "receiver candidate batch"]:
    """What each receiver of a stage makes of each of the candidate streams."""
    if d_compact is None:
        logits = stage.write(stage.read(streams.flatten(0, 1))).view(*streams.shape[:2], -1)
        return (run.metric(logits) - run.metric(run.base.logits))[None]
    stream, reads = found.capture.stream(index), found.reads[index]
    return stage.local_effects(reads, found.d_reads[index], d_compact, stream, streams)


def candidate_streams(
    run: BatchRun, index: int, stream: Float[Tensor, "batch token d_model"]
) -> Iterator[tuple[Int64[Tensor, "candidate 2"], Float[Tensor, "candidate batch token d_model"]]]:
    """What a receiver of a stage reads when one of its edges is ablated, a chunk of edges at a time.

    Args:
        run: the batch.
        index: number of the stage.
        stream: what the stage reads in the base run, at the tokens that matter.

    Yields:
        Sender and token group of each edge `(candidate, 2)`, on the model's device, and the streams.
    """
    graph = run.prepared.graph
    places = on_device(np.argwhere(graph.edge_mask[:, graph.receiver_slices[index].start]), stream)
    size = max(1, CANDIDATE_IMAGES // len(stream))
    for start in range(0, len(places), size):
        chunk = places[start : start + size]
        yield chunk, stream + edge_deltas(run, index, chunk, stream)


def edge_deltas(
    run: BatchRun, index: int, edges: Int64[Tensor, "edge 2"], like: Float[Tensor, "batch token d_model"]
) -> Float[Tensor, "edge batch token d_model"]:
    """What ablating each of some edges adds to its receiver's input: reference minus base output.

    Args:
        run: the batch.
        index: number of the receiver's stage.
        edges: sender and token group of each, on the model's device; other tokens than the group's have 0.
        like: what the stage reads, at the tokens that are asked for.
    """
    _, tokens, width = like.shape
    deltas = run.sources.all_deltas[edges[:, 0], :, :tokens, :width]
    members = run.sources.members_at(index, tokens)
    if members is None:
        return deltas
    inside = members == edges[:, 1].reshape(-1, 1, 1)  # (edge, batch or 1, token)
    return deltas * inside.to(deltas.dtype)[..., None]


def on_device(places: NDArray[np.intp], like: Tensor) -> Int64[Tensor, "place axis"]:
    """Places in a graph on a tensor's device, where they index without its queue being stopped."""
    return torch.from_numpy(places).to(like.device, torch.int64, non_blocking=True)

"""Exact effects: ablate each edge alone and run. The oracle that every estimator is compared with.

Before the receiver nothing changes, so a run restarts at the receiver's own stage from the captured stream;
within that stage only the senders that the receiver feeds are computed again; and all senders of a receiver
are one batch. Cost: for each edge, the part of the network from its receiver on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from circuitvit.attribution.eap import new_total
from circuitvit.attribution.local import edge_deltas, on_device
from circuitvit.attribution.scoring import Running, check_effects
from circuitvit.engine import BatchRun, Saved, StateFile, batch_runs, progress_bar, run_from
from circuitvit.graph import EdgeMask
from circuitvit.models import repeated
from circuitvit.tasks import PreparedTask

CANDIDATE_IMAGES = 32
"""Candidates times images that run at once: enough to fill the machine, small enough for its caches."""


def exact(prepared: PreparedTask, how: Running, *, state: str | Path | None = None) -> NDArray[np.float64]:
    """The effect of every edge `(sender, receiver, group)`, summed over pairs.

    Blind to: nothing about single edges; how edges act together (AND and OR).

    Args:
        state: a file in which the run keeps what it has done: given again after an interruption, with the
            same model and task, it goes on where it was and gives the same scores. Deleted at the end.

    Raises:
        FileError: if the file is no state file.
        OptionError: if it belongs to another run.
    """
    total = edge_effects(prepared, prepared.graph.edge_mask, how, state)
    check_effects(prepared, total)
    return total


def edge_effects(
    prepared: PreparedTask, wanted: EdgeMask, how: Running, state_path: str | Path | None = None
) -> NDArray[np.float64]:
    """The effects of the edges marked in `wanted`, summed over pairs; 0 elsewhere."""
    graph = prepared.graph
    total, done = new_total(prepared), 0
    prices = len(graph.stages) - np.array(graph.receiver_stages)  # stages that run: an honest bar
    work = int(wanted.sum(axis=(0, 2)) @ prices) * len(prepared)
    with (
        StateFile(state_path, prepared, "exact effects", {"size": how.batch_size}) as state,
        progress_bar(work, "exact effects", how.progress, unit="stage") as bar,
    ):
        if state.saved is not None:
            total, done = state.saved.tensors["total"].to(total.device), int(state.saved.numbers["done"])
        size = int(state.settings["size"])
        visits = _visits(prepared, wanted, size)
        for place, (_, receiver, edges, effects) in enumerate(visits):
            if place >= done:
                total = total.clone()  # so that the state kept last stays what it is
                total[edges[:, 0], receiver, edges[:, 1]] += effects().sum(dim=1)
                state.keep(partial(_state, total, place + 1))
            bar.update(len(edges) * int(prices[receiver]) * min(size, len(prepared)))
    return total.cpu().numpy()


def pair_effects(prepared: PreparedTask, wanted: EdgeMask, how: Running) -> Float[np.ndarray, "pair edge"]:
    """The effects of the edges marked in `wanted` on every pair, in the order of `graph.names_of`."""
    wanted = wanted & prepared.graph.edge_mask
    found = new_total(prepared).new_zeros(len(prepared), int(wanted.sum()))
    column = np.cumsum(wanted).reshape(wanted.shape) - 1
    with progress_bar(len(prepared) * int(wanted.sum()), "effects by pair", how.progress) as bar:
        for rows, receiver, edges, effects in _visits(prepared, wanted, how.batch_size):
            own = on_device(column[:, receiver][wanted[:, receiver]], found)
            found[rows.start : rows.stop, own] = effects().T
            bar.update(len(rows) * len(edges))
    return found.cpu().numpy()


def _state(total: Tensor, done: int) -> Saved:
    return Saved({"total": total}, {"done": done})


def _visits(
    prepared: PreparedTask, wanted: EdgeMask, batch_size: int
) -> Iterator[tuple[range, int, Int64[Tensor, "edge 2"], Callable[[], Float[Tensor, "edge batch"]]]]:
    """Every receiver of every batch in turn: the batch's pairs, the receiver's place, its wanted edges
    `(edge, 2)`, and how to get their effects `(edge, pair)`."""
    for run in batch_runs(prepared, batch_size):
        if not run.sources.differs:  # as with equal images: no edge can have an effect
            continue
        clean, first = run.metric(run.base.logits), int(run.batch.rows[0])
        rows = range(first, first + len(clean))
        for index, stage in enumerate(prepared.model.stages):
            for local in range(len(stage.nodes.receivers)):
                receiver = prepared.graph.receiver_slices[index].start + local
                places = on_device(np.argwhere(wanted[:, receiver]), clean)
                yield rows, receiver, places, partial(_effects, run, index, local, places, clean)


def _effects(
    run: BatchRun, index: int, local: int, places: Int64[Tensor, "edge 2"], clean: Float[Tensor, " batch"]
) -> Float[Tensor, "edge batch"]:
    """The effects of edges into one receiver on each pair of a batch, `(edge, pair)`."""
    chunks = [(values - clean).double() for values in _receiver_runs(run, index, local, places)]
    return torch.cat(chunks) if chunks else clean.new_zeros(0, len(clean), dtype=torch.float64)


def _receiver_runs(
    run: BatchRun, index: int, local: int, places: Int64[Tensor, "edge 2"]
) -> Iterator[Float[Tensor, "candidate batch"]]:
    """The metric with each of the edges into one receiver ablated, a chunk of edges at a time.

    Args:
        run: the batch.
        index: number of the receiver's stage.
        local: the receiver's place in its stage.
        places: `(edge, 2)`: sender and token group of each edge.
    """
    model = run.sources.model
    stage, stream = model.essential[index], _essential(run, index)
    fed = list((stage.nodes.feeds or ())[local])
    part = stage if stage.is_readout else stage.restrict(fed)
    place = part.nodes.receivers.index(stage.nodes.receivers[local])
    source = [0 if receiver == place else -1 for receiver in range(len(part.nodes.receivers))]
    with torch.no_grad():
        known = part.read(stream)
        rest = None if stage.is_readout else _essential(run, index + 1) - part.total(part.write(known))
    size = max(1, CANDIDATE_IMAGES // len(stream))
    for start in range(0, len(places), size):
        chunk = places[start : start + size]
        ablated = stream + edge_deltas(run, index, chunk, stream)  # (candidate, batch, token, d_model)
        with torch.no_grad():
            reads = part.read_each(ablated.flatten(0, 1)[None], source, repeated(known, len(chunk)))
            compact = part.write(reads)
            if rest is None:
                logits = compact
            else:
                after = rest + part.total(compact).view(len(chunk), *rest.shape)
                logits = run_from(model, index + 1, after.flatten(0, 1))
        yield run.metric(logits.view(len(chunk), len(stream), -1))


def _essential(run: BatchRun, index: int) -> Float[Tensor, "batch token d_model"]:
    """What a stage reads in the base run, at the tokens that the logits depend on."""
    reference = run.sources.reference_streams[index]
    assert reference is not None, "the source has no receivers"
    return run.base.stream(index)[:, : reference.shape[1]]

"""Exact effects: ablate each edge alone and run. The oracle that every estimator is compared with.

Before the receiver nothing changes, so a run restarts at the receiver's own stage from the captured stream;
within that stage only the senders that the receiver feeds are computed again; and many edges into a receiver
are one batch. Processes take such batches in turn, so that one pair is enough for all of them. Cost: for each
edge, the part of the network from its receiver on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from circuitvit.attribution.costs import exact_cost, tell_time
from circuitvit.attribution.eap import new_total
from circuitvit.attribution.local import edge_deltas, on_device
from circuitvit.attribution.scoring import Running, check_effects
from circuitvit.engine import (
    BatchRun,
    Saved,
    StateFile,
    batch_runs,
    place_in_group,
    progress_bar,
    run_from,
    summed,
)
from circuitvit.graph import EdgeMask
from circuitvit.models import Reads, repeated
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
    tell_time(prepared, "exact", exact_cost(prepared.graph), how.batch_size, how.progress)
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
        work_of = prices * min(size, len(prepared))
        for visit in islice(visits, done):
            bar.update(len(visit.edges) * int(work_of[visit.receiver]))
        while at_once := list(islice(visits, place_in_group(prepared.processes)[1])):
            total = total.clone()  # so that the state kept last stays what it is
            for visit, effects in zip(at_once, _sums(at_once, prepared), strict=True):
                total[visit.edges[:, 0], visit.receiver, visit.edges[:, 1]] += effects
                bar.update(len(visit.edges) * int(work_of[visit.receiver]))
            done += len(at_once)
            state.keep(partial(_state, total, done))
    return total.cpu().numpy()


def _sums(visits: list[_Visit], prepared: PreparedTask) -> list[Float[Tensor, " edge"]]:
    """The effects of some visits, summed over the pairs of a batch; each process makes one of them."""
    number, among = place_in_group(prepared.processes)
    if among == 1:  # nothing is fetched, so that a GPU's queue goes on
        return [visit.effects().sum(dim=1) for visit in visits]
    sums = np.zeros((among, max(len(visit.edges) for visit in visits)))
    if number < len(visits):
        sums[number, : len(visits[number].edges)] = visits[number].effects().sum(dim=1).cpu().numpy()
    found = torch.from_numpy(summed(sums, prepared.processes)).to(prepared.model.device)
    return [found[place, : len(visit.edges)] for place, visit in enumerate(visits)]


def pair_effects(prepared: PreparedTask, wanted: EdgeMask, how: Running) -> Float[np.ndarray, "pair edge"]:
    """The effects of the edges marked in `wanted` on every pair, in the order of `graph.names_of`."""
    wanted = wanted & prepared.graph.edge_mask
    found = new_total(prepared).new_zeros(len(prepared), int(wanted.sum()))
    columns = on_device(np.cumsum(wanted).reshape(wanted.shape) - 1, found)
    with progress_bar(len(prepared) * int(wanted.sum()), "effects by pair", how.progress) as bar:
        for visit in _visits(prepared, wanted, how.batch_size):
            rows, edges = visit.run.batch.rows, visit.edges
            first = int(rows[0])  # which are on the CPU, and follow each other
            own = columns[edges[:, 0], visit.receiver, edges[:, 1]]
            found[first : first + len(rows), own] = visit.effects().T
            bar.update(len(rows) * len(edges))
    return found.cpu().numpy()


def _state(total: Tensor, done: int) -> Saved:
    return Saved({"total": total}, {"done": done})


@dataclass(frozen=True, eq=False)
class _Visit:
    """Some edges into one receiver on a batch, as many as run at once.

    Attributes:
        at: the receiver, and what all visits to it have in common.
        edges: sender and token group of each, on the model's device.
    """

    at: _Receiver
    edges: Int64[Tensor, "edge 2"]

    @property
    def run(self) -> BatchRun:
        return self.at.run

    @property
    def receiver(self) -> int:
        """Its place in the graph."""
        return int(self.run.prepared.graph.receiver_slices[self.at.index].start) + self.at.local

    def effects(self) -> Float[Tensor, "edge pair"]:
        """Of each edge on each pair of the batch, in float64."""
        return (self.at.without(self.edges) - self.at.clean).double()


def _visits(prepared: PreparedTask, wanted: EdgeMask, batch_size: int) -> Iterator[_Visit]:
    """Every receiver of every batch in turn, some of its wanted edges at a time."""
    for run in batch_runs(prepared, batch_size):
        if not run.sources.differs:  # as with equal images: no edge can have an effect
            continue
        clean, size = run.metric(run.base.logits), max(1, CANDIDATE_IMAGES // len(run.batch.rows))
        for index, stage in enumerate(prepared.model.stages):
            for local in range(len(stage.nodes.receivers)):
                receiving = prepared.graph.receiver_slices[index].start + local
                places = on_device(np.argwhere(wanted[:, receiving]), clean)
                receiver = _Receiver(run, index, local, clean)
                for edges in places.tensor_split(max(1, -(-len(places) // size))):
                    if len(edges):  # as many each time, as processes take them in turn
                        yield _Visit(receiver, edges)


class _Receiver:
    """The runs of a batch without edges into one receiver.

    Args:
        run: the batch.
        index: number of the receiver's stage.
        local: the receiver's place in its stage.
        clean: the metric with all edges.
    """

    def __init__(self, run: BatchRun, index: int, local: int, clean: Float[Tensor, " batch"]) -> None:
        self.run, self.index, self.local, self.clean = run, index, local, clean
        stage = run.sources.model.essential[index]
        self.part = stage if stage.is_readout else stage.restrict(list((stage.nodes.feeds or ())[local]))
        place = self.part.nodes.receivers.index(stage.nodes.receivers[local])
        self.source = [0 if other == place else -1 for other in range(len(self.part.nodes.receivers))]

    @cached_property
    def stream(self) -> Float[Tensor, "batch token d_model"]:
        return _essential(self.run, self.index)

    @cached_property
    @torch.no_grad()
    def known(self) -> Reads:
        """What the senders that it feeds read."""
        return self.part.read(self.stream)

    @cached_property
    @torch.no_grad()
    def rest(self) -> Float[Tensor, "batch token d_model"]:
        """The stream after its stage without what these senders write."""
        return _essential(self.run, self.index + 1) - self.part.total(self.part.write(self.known))

    @torch.no_grad()
    def without(self, edges: Int64[Tensor, "edge 2"]) -> Float[Tensor, "edge batch"]:
        """The metric with each of some edges ablated."""
        ablated = self.stream + edge_deltas(self.run, self.index, edges, self.stream)
        count, batch = len(edges), len(self.stream)
        reads = self.part.read_each(ablated.flatten(0, 1)[None], self.source, repeated(self.known, count))
        logits = self.part.write(reads)
        if not self.part.is_readout:
            after = self.rest + self.part.total(logits).view(count, *self.rest.shape)
            logits = run_from(self.run.sources.model, self.index + 1, after.flatten(0, 1))
        return self.run.metric(logits.view(count, batch, -1))


def _essential(run: BatchRun, index: int) -> Float[Tensor, "batch token d_model"]:
    """What a stage reads in the base run, at the tokens that the logits depend on."""
    reference = run.sources.reference_streams[index]
    assert reference is not None, "the source has no receivers"
    return run.base.stream(index)[:, : reference.shape[1]]

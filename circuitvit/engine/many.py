"""Many masks in one run: what several of them agree on is computed once.

A node is in the same *state* under two masks if they keep the same edges into it, from senders that are in
the same states; it then writes the same. Masks that searches ask for differ in few edges, so that a node has
far fewer states than there are masks: what lies before the edges in which they differ has one.

States are found first, from the masks alone, stage after stage. Then every node runs once, with its states
one after the other as images of one batch, and each of its receivers reads each of its different streams
once.

Results are those of `masked_run` up to rounding, as products of other shapes add in another order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from circuitvit.engine.masked import (
    CUDA_ROOM_BYTES,
    ROOM_BYTES,
    Piece,
    difference,
    masked_run,
    mix,
    padded,
    pieces,
)
from circuitvit.engine.references import Sources
from circuitvit.graph import EdgeMask, Graph
from circuitvit.graph.liveness import EVERYWHERE, LEADING, NEVER, needed_senders
from circuitvit.models import Reads, places

Numbers = NDArray[np.int64]

FEW, CUDA_FEW = 8, 512
"""Streams times images that are summed, and that run, at once: few enough to stay in a processor's cache."""

NODE, STARTED, COPIED, HEARD = 25.0, 12.0, 1.5, 0.1
"""Times in units of one more stream: of a node that runs and, run for a single mask, of starting it, which
images share; of an output that is brought together with others to be summed, and of an edge in a run of a
single mask. Measured on the ViT-Ti; only speed hangs on them."""


@torch.no_grad()
def masked_runs(sources: Sources, kept: EdgeMask) -> Float[Tensor, "mask batch class"]:
    """The logits under each of several masks `(mask, sender, receiver, group)`, as many as fit in memory.

    Masks that have little in common are run one after the other, where that takes less time.
    """
    large = kept.sum(axis=(1, 2, 3)) > sources.graph.n_edges // 4
    if large.any() and not large.all():
        found = [masked_runs(sources, kept[own]) for own in (large, ~large)]
        return torch.cat(found)[np.argsort(np.argsort(~large, kind="stable")).tolist()]
    plan, stream = planned(sources, kept), sources.base.stream(1)
    if not plan.pays(len(stream)):
        return torch.stack([masked_run(sources, each) for each in kept])
    room = (CUDA_ROOM_BYTES if stream.is_cuda else ROOM_BYTES) // (stream[0].numel() * stream.element_size())
    fitting = sources.model.batch_of(len(stream), min(len(stream), max(1, room // plan.starts[-1])))
    if plan.starts[-1] * fitting > room and len(kept) > 1:
        half = len(kept) // 2
        return torch.cat([masked_runs(sources, kept[:half]), masked_runs(sources, kept[half:])])
    return torch.cat([_run(part, plan) for part in sources.parts(fitting)], dim=1)


# -- what runs -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Heard:
    """What one receiver hears in some states of its node.

    Attributes:
        rows: `(stream, sender, group)`: the numbers of the outputs that each of its different streams hears;
            -1 for none.
        stream: for each state the number of its stream.
    """

    rows: Numbers
    stream: Numbers


@dataclass(frozen=True, eq=False)
class Unit:
    """Nodes that the same receivers feed, in all states in which they are needed at the same tokens.

    Attributes:
        piece: the nodes, as a part of their stage.
        heard: by each receiver of the piece.
        states: how many there are.
    """

    piece: Piece
    heard: list[Heard]
    states: int


@dataclass(frozen=True, eq=False)
class Plan:
    """What runs for some masks.

    Attributes:
        units: in order; the last one is the readout.
        starts: outputs are counted: those of the source, then unit after unit, node after node and state
            after state. The numbers at which the source and the units begin, and the number of all outputs.
        found: for each mask the state of the readout.
        nodes: how many run under the masks, one mask after the other.
        edges: how many all masks keep.
    """

    units: list[Unit]
    starts: list[int]
    found: Numbers
    nodes: int
    edges: int

    def pays(self, images: int) -> bool:
        """Whether it takes less time than one mask after the other."""
        heard = [each.rows for unit in self.units for each in unit.heard]
        few = max(1, FEW // images)
        copied = sum(
            len(np.unique(rows[start : start + few])) for rows in heard for start in range(0, len(rows), few)
        )
        together = NODE * self.starts[-1] + COPIED * copied + sum(map(len, heard))
        return together < (NODE + STARTED / images) * self.nodes + HEARD * self.edges


def planned(sources: Sources, kept: EdgeMask) -> Plan:
    """The states of all nodes under some masks `(mask, sender, receiver, group)`."""
    graph = sources.graph
    kept = graph.in_run(kept)
    need = needed_senders(graph, kept, sources.model.leading is not None)
    source = graph.sender_slices[0]
    rows = np.full(need.shape, -1)  # the numbers of what the senders write under each mask
    rows[:, source] = np.arange(source.stop)
    units, starts, state = list[Unit](), [0, source.stop], np.zeros(len(kept), dtype=np.int64)
    for index in range(1, len(graph.stages)):
        upstream = graph.upstream[index]
        for senders, receivers in _together(graph, index, need):
            heard = np.where(kept[:, upstream][:, :, receivers], rows[:, upstream, None, None], -1)
            level = need[:, senders].max(axis=1, initial=EVERYWHERE if not len(senders) else NEVER)
            for now, state in _states(heard, level):
                asked = np.zeros_like(need[0])
                asked[senders] = now
                (piece,) = pieces(sources, index, asked)
                inside = np.flatnonzero(state >= 0)
                firsts = heard[inside[np.unique(state[inside], return_index=True)[1]]]
                own = {each: firsts[:, :, place] for place, each in enumerate(receivers)}
                none = np.full_like(firsts[:, :, 0], -1)  # of receivers that are there, and feed others alone
                streams = [_streams(own.get(each, none)) for each in piece.receivers]
                units.append(Unit(piece, streams, len(firsts)))
                for place, sender in enumerate(senders):
                    rows[inside, sender] = starts[-1] + place * len(firsts) + state[inside]
                starts.append(starts[-1] + len(senders) * len(firsts))
    return Plan(units, starts, state, int(np.count_nonzero(rows >= 0)), int(np.count_nonzero(kept)))


def _together(graph: Graph, index: int, need: NDArray[np.int8]) -> Iterator[tuple[Numbers, list[int]]]:
    """The senders of a stage that any mask needs, in groups that the same receivers feed, and these; of a
    readout no senders and all receivers.
    """
    slots, receivers = graph.sender_slices[index], graph.receiver_slices[index]
    feeding, first = graph.stages[index].feeding, receivers.start
    if not feeding.shape[1]:
        yield np.arange(0), list(range(first, receivers.stop))
        return
    needed = np.flatnonzero(np.any(need[:, slots] != NEVER, axis=0))
    numbers = _numbered(feeding[:, needed].T)
    for number in range(1 + max(numbers, default=-1)):
        mine = needed[numbers == number]
        yield slots.start + mine, (first + np.flatnonzero(feeding[:, mine[0]])).tolist()


def _states(heard: Numbers, level: NDArray[np.int8]) -> Iterator[tuple[int, Numbers]]:
    """The states of nodes by where they are needed: the number of each mask's, -1 for those that are in none.

    Args:
        heard: `(mask, sender, receiver, group)`: the numbers of the outputs that are heard.
        level: where each mask needs the nodes.
    """
    asking = np.flatnonzero(level != NEVER)
    number = _numbered(heard[asking])
    highest = np.zeros(1 + number.max(), dtype=level.dtype)
    np.maximum.at(highest, number, level[asking])
    for now in (EVERYWHERE, LEADING):
        mine = highest == now
        if mine.any():
            state = np.full(len(level), -1)
            state[asking] = np.where(mine, np.cumsum(mine) - 1, -1)[number]
            yield now, state


def _streams(rows: Numbers) -> Heard:
    """The different ones of what is heard in each state, `(state, sender, group)`."""
    stream = _numbered(rows)
    return Heard(rows[np.unique(stream, return_index=True)[1]], stream)


def _numbered(rows: NDArray[np.generic]) -> Numbers:
    """Equal rows by the same number, counted as they come."""
    known: dict[bytes, int] = {}
    return np.array([known.setdefault(row.tobytes(), len(known)) for row in rows], dtype=np.int64)


# -- running it ----------------------------------------------------------------------------------


def _run(sources: Sources, plan: Plan) -> Float[Tensor, "mask batch class"]:
    blocks = [difference(sources, 0, sources.base.compacts[0])]  # `(output, batch, token, d_model)`
    batch = sources.shape[0]
    for unit in plan.units:
        stage, reads = unit.piece.stage, _reads(sources, unit, plan.starts, blocks)
        few = batch * max(1, (CUDA_FEW if blocks[0].is_cuda else FEW) // batch)
        compact = torch.cat(
            [stage.write(some) for some in zip(*(torch.split(read, few) for read in reads), strict=True)]
        )
        if stage.is_readout:
            return compact.view(unit.states, batch, -1)[torch.from_numpy(plan.found).to(compact.device)]
        changes = unit.piece.changes(sources, compact, unit.states)
        blocks.append(changes.reshape(-1, batch, *changes.shape[2:]))
    raise AssertionError("a model ends with its readout")


def _reads(sources: Sources, unit: Unit, starts: list[int], blocks: list[Tensor]) -> Reads:
    """What the receivers of a unit read in all of its states."""
    piece, batch = unit.piece, sources.shape[0]
    tokens = [piece.tokens if mixes else piece.apart for mixes in piece.stage.nodes.mixes or ()]
    each = list(zip(tokens, unit.heard, strict=True))
    if piece.stage.n_reads == len(each):  # every receiver reads a tensor of its own
        reads = []
        for place, (count, heard) in enumerate(each):
            source = [0 if other == place else -1 for other in range(len(each))]
            some = _summed(sources, piece.index, count, heard, starts, blocks)
            read = torch.cat([piece.stage.read_each(few.flatten(0, 1)[None], source)[place] for few in some])
            reads.append(_taken(read.view(-1, batch, *read.shape[1:]), heard).flatten(0, 1))
        return tuple(reads)
    streams = [
        _taken(torch.cat(list(_summed(sources, piece.index, max(tokens), heard, starts, blocks))), heard)
        for heard in unit.heard
    ]
    return piece.stage.read_each(torch.stack(streams).flatten(1, 2), range(len(each)))


def _taken(by_stream: Tensor, heard: Heard) -> Tensor:
    """Something of each stream for each state."""
    if np.array_equal(heard.stream, np.arange(len(by_stream))):
        return by_stream
    return by_stream[torch.from_numpy(heard.stream).to(by_stream.device)]


def _summed(
    sources: Sources, stage: int, tokens: int, heard: Heard, starts: list[int], blocks: list[Tensor]
) -> Iterator[Float[Tensor, "stream batch token d_model"]]:
    """The streams of a receiver, a few at a time.

    Args:
        sources: of the run.
        stage: number of the receiver's.
        tokens: how many of the first tokens it reads.
        heard: what it hears.
        starts: the numbers of the first outputs of each block.
        blocks: outputs, less those of the reference.
    """
    base = sources.reference_streams[stage]
    assert base is not None, "the source reads no stream"
    members = sources.members_at(stage, tokens)
    few = CUDA_FEW if base.is_cuda else max(1, FEW // len(base))
    for first in range(0, len(heard.rows), few):
        rows = heard.rows[first : first + few]
        used = np.unique(rows[rows >= 0])
        weights = np.zeros((1 + len(used), len(rows), rows.shape[2]), dtype=bool)
        weights[0] = True
        stream, sender, group = np.nonzero(rows >= 0)
        weights[1 + np.searchsorted(used, rows[stream, sender, group]), stream, group] = True
        taken = [base[None, :, :tokens]]
        block_of = np.searchsorted(starts, used, side="right") - 1
        for number in np.unique(block_of).tolist():
            mine = places((used[block_of == number] - starts[number]).tolist())
            taken.append(padded(blocks[number][mine, :, :tokens], tokens))
        yield mix(torch.from_numpy(weights).to(base), torch.cat(taken), members)

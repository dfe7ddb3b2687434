"""Masked runs: the model with some edges kept and all others ablated.

Stage after stage, receiver `v` sees

    X_v = base + sum over kept edges of (x_u - r_u),

where `base` is the stream of reference outputs `r_u` and constants, and `x_u` is what sender `u` writes in
this very run. All receivers of a stage are one matrix product over the senders that some kept edge leaves;
receivers with equal kept edges share a stream; senders that no kept path joins to the logits do not run, and
those that only queries and MLPs carry on to a readout of the leading tokens run at these tokens alone. Only
the senders that run are ever expanded, for a few images at a time.

`circuitvit.engine.soft` is the same with masks anywhere between 0 and 1, differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from circuitvit.engine.references import Sources
from circuitvit.graph import EdgeMask
from circuitvit.graph.liveness import EVERYWHERE, LEADING, NEVER, needed_senders
from circuitvit.models import Reads, Stage, places

ROOM_BYTES, CUDA_ROOM_BYTES = 2**28, 2**31
"""What the expanded senders of the images that run at once may take."""

SPARSE = 3
"""A stage gathers the senders that it uses once they are fewer than one in so many."""


@torch.no_grad()
def masked_run(
    sources: Sources, kept: EdgeMask, *, start: int = 1, workspace: Workspace | None = None
) -> Float[Tensor, "batch class"]:
    """The logits with the edges of `kept` kept and all others ablated.

    Args:
        sources: of the batch.
        kept: `(sender, receiver, group)`.
        start: number of the first stage with ablated edges; all before it are taken from the base run.
        workspace: from `new_workspace`, for the whole batch at once; overwritten.
    """
    kept = sources.graph.in_run(kept)
    need = needed_senders(sources.graph, kept, sources.model.leading is not None)
    if workspace is not None:
        return _run(sources, kept, need, start, workspace)
    senders = np.flatnonzero(need != NEVER)
    parts = sources.parts(_images_at_once(sources, len(senders)))
    room = _allocated(sources, senders, max(part.shape[0] for part in parts), _widest(sources, kept))
    logits = []
    for part in parts:
        mine = room.of(part.shape[0])
        mine.fill(part, start)
        logits.append(_run(part, kept, need, start, mine))
    return torch.cat(logits) if len(logits) > 1 else logits[0]


def _run(
    sources: Sources, kept: EdgeMask, need: NDArray[np.int8], start: int, room: Workspace
) -> Float[Tensor, "batch class"]:
    stages = range(start, len(sources.model.stages))
    plan = [piece for index in stages for piece in pieces(sources, index, need)]
    begun: Begun | None = None
    for piece, after in zip_longest(plan, plan[1:]):
        reads, begun = _reads(sources, piece, kept, room, begun, after)
        compact = piece.stage.write(reads)
        if piece.stage.is_readout:
            return compact
        room.store(sources, piece, compact)
    raise AssertionError("a model ends with its readout")


# -- the workspace -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Workspace:
    """Room for masked runs of some images, so that many runs share one allocation.

    Attributes:
        changes: row 0 for what a stage would read with every edge ablated, then the current minus the
            reference output of each of `senders`; finite, as what is not heard is multiplied by 0. A run
            overwrites what it computes and leaves the rest, so a workspace of all senders serves again for
            runs that start no earlier.
        streams: room for what the receivers of one stage see, and one of the next.
        senders: places in the graph of the senders that have a row, in increasing order.
    """

    changes: Float[Tensor, "row batch token d_model"]
    streams: Float[Tensor, " number"]
    senders: NDArray[np.intp]

    def of(self, images: int) -> Workspace:
        """The same room for fewer images."""
        if images == self.changes.shape[1]:
            return self
        shape = (len(self.changes), images, *self.changes.shape[2:])
        changes = self.changes.view(-1)[: math.prod(shape)].view(shape)
        return Workspace(changes, self.streams, self.senders)

    def fill(self, sources: Sources, start: int) -> None:
        """Take in what the senders before a stage wrote in the base run."""
        end = sources.graph.sender_slices[start].start
        before = self.senders[: np.searchsorted(self.senders, end)].tolist()
        rows = self.changes[1:]
        for index, part, compact, senders, mine in sources.written(before):
            room = rows[mine, :, : compact.shape[-2], : sources.written_shape(index)[1]]
            sources.reference.subtracted(sources.graph, index, part, senders, compact, out=room)

    def store(self, sources: Sources, piece: Piece, compact: Tensor) -> None:
        """Take in what the senders of a piece wrote."""
        tokens, width = compact.shape[-2], sources.written_shape(piece.index)[1]
        rows = places((1 + np.searchsorted(self.senders, piece.senders)).tolist())
        if isinstance(rows, slice):
            piece.changes(sources, compact, out=self.changes[rows, :, :tokens, :width])
        else:
            self.changes[rows, :, :tokens, :width] = piece.changes(sources, compact)


def new_workspace(sources: Sources) -> Workspace:
    """A workspace of all senders and images, filled with the changes of the base run."""
    room = _allocated(sources, np.arange(len(sources.graph.senders)), sources.shape[0])
    room.fill(sources, len(sources.graph.stages) - 1)
    return room


def _allocated(
    sources: Sources, senders: NDArray[np.intp], images: int, widest: int | None = None
) -> Workspace:
    _, tokens, width = sources.shape
    if widest is None:
        widest = 1 + max(len(stage.receivers) for stage in sources.graph.stages)
    like = sources.base.stream(1)
    # Zeros, as senders write some tokens only, and 0 times what memory held before may be NaN.
    changes = like.new_zeros(1 + len(senders), images, tokens, width)
    return Workspace(changes, like.new_empty(widest * images * tokens * width), senders)


def _widest(sources: Sources, kept: EdgeMask) -> int:
    """The most streams that a stage and the next have to see."""
    hearing = np.any(kept, axis=(0, 2))
    return 1 + max(int(hearing[receivers].sum()) for receivers in sources.graph.receiver_slices)


def _images_at_once(sources: Sources, senders: int) -> int:
    stream = sources.base.stream(1)
    each = (1 + senders) * stream[0].numel() * stream.element_size()
    fitting = max(1, (CUDA_ROOM_BYTES if stream.is_cuda else ROOM_BYTES) // each)
    return sources.model.batch_of(len(stream), fitting)


# -- pieces of stages ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of a stage that is run: some of its senders, and the receivers that feed them.

    Attributes:
        index: number of the stage.
        stage: the part.
        senders: places of its senders in the graph.
        receivers: places of its receivers in the graph.
        tokens: how many of the first tokens its receivers read.
        apart: the same for receivers that keep tokens apart, as queries do.
    """

    index: int
    stage: Stage
    senders: NDArray[np.intp]
    receivers: list[int]
    tokens: int
    apart: int

    @cached_property
    def by_tokens(self) -> dict[int, list[int]]:
        """Numbers of its receivers by how many tokens they read."""
        found: dict[int, list[int]] = {}
        for number, mixes in enumerate(self.stage.nodes.mixes or ()):
            found.setdefault(self.tokens if mixes else self.apart, []).append(number)
        return found

    def changes(
        self, sources: Sources, compact: Tensor, count: int = 1, out: Tensor | None = None
    ) -> Float[Tensor, "sender image token d_model"]:
        """What the senders wrote minus their reference outputs.

        Args:
            sources: of the run.
            compact: from the stage's `write`, for `count` candidates of the batch one after the other.
            count: of candidates.
            out: room for the result.
        """
        rows = places(self.senders.tolist())
        return sources.reference.subtracted(sources.graph, self.index, self.stage, rows, compact, count, out)


def pieces(sources: Sources, index: int, need: NDArray[np.int8]) -> Iterator[Piece]:
    """The parts of a stage that have to run: what is needed everywhere, and what at leading tokens alone.

    Args:
        sources: of the run.
        index: number of the stage.
        need: of every sender, from `needed_senders`.
    """
    graph, stage = sources.graph, sources.model.essential[index]
    base, slots = sources.reference_streams[index], sources.graph.sender_slices[index]
    assert base is not None, "the source is not run again"
    if stage.is_readout:
        slot = graph.receiver_slices[index]
        every = base.shape[1]
        yield Piece(index, stage, np.arange(0), list(range(slot.start, slot.stop)), every, every)
        return
    leading = sources.model.leading
    for level in (EVERYWHERE, LEADING):
        wanted = np.flatnonzero(need[slots] == level)
        if not len(wanted):
            continue
        part, tokens = stage.restrict(wanted.tolist()), base.shape[1]
        apart = tokens
        if level == LEADING and leading is not None:
            apart = min(leading, tokens)
            mixes = any(stage.nodes.mixes or ())
            part, tokens = (part.leading(leading), tokens) if mixes else (part, apart)
            apart = tokens if mixes and part.cut is None else apart
        receivers = [graph.receiver_index[name] for name in part.nodes.receivers]
        yield Piece(index, part, wanted + slots.start, receivers, tokens, apart)


# -- what receivers read -------------------------------------------------------------------------


def piece_reads(sources: Sources, piece: Piece, kept: EdgeMask, room: Workspace) -> Reads:
    """What the receivers of a piece read under a mask `(sender, receiver, group)`.

    The workspace's changes must be up to date wherever a kept edge leaves. Receivers without a kept edge
    read what they would with every edge ablated, which is computed once for all masks.
    """
    return _reads(sources, piece, kept, room)[0]


@dataclass(frozen=True, eq=False)
class Begun:
    """What a single receiver hears of the first senders, which was summed along with the stage before.

    Attributes:
        index: number of its stage.
        upstream: how many senders are in it.
        stream: what it hears of them, and the reference outputs of all others.
    """

    index: int
    upstream: int
    stream: Float[Tensor, "batch token d_model"]


def _reads(
    sources: Sources,
    piece: Piece,
    kept: EdgeMask,
    room: Workspace,
    begun: Begun | None = None,
    after: Piece | None = None,
) -> tuple[Reads, Begun | None]:
    """What the receivers of a piece read; and the sum of the piece `after` it begun, where that pays.

    One more row in a matrix product costs less than another pass over all senders.
    """
    heard = sources.graph.upstream[piece.index]
    if begun is not None and begun.index == piece.index:
        return piece.stage.read_each(_ended(sources, piece, kept, room, begun), [0]), None
    reads: Reads = ()
    following = None
    for tokens, numbers in piece.by_tokens.items():
        joining = [] if after is None else _joining(sources, piece, after, tokens)
        columns = [*(piece.receivers[number] for number in numbers), *joining]
        patterns, found = distinct(kept[heard, columns])
        own = dict(zip(numbers, found, strict=False))
        source = [own.get(number, -1) for number in range(len(piece.receivers))]
        if -1 in source and not reads:
            reads = piece.stage.pick(sources.reference_reads(piece.index))
        if not patterns.shape[1]:
            continue
        streams = summed(sources, piece.index, tokens, patterns, room)
        if joining and found[-1] >= 0:
            following = _begun(sources, piece.index + 1, heard.stop, streams[found[-1]])
        if max(source) >= 0:
            reads = piece.stage.read_each(streams[: max(source) + 1], source, reads)
    return reads, following


def _joining(sources: Sources, piece: Piece, after: Piece, tokens: int) -> list[int]:
    """The receiver of the piece after another, if it is a single one of the next stage with these tokens."""
    follows = (after.index, after.tokens) == (piece.index + 1, tokens) and not after.stage.is_readout
    follows &= not sources.graph.stages[piece.index].begins
    return after.receivers if follows and len(after.receivers) == 1 else []


def _begun(sources: Sources, stage: int, upstream: int, stream: Tensor) -> Begun:
    """What a stage hears of senders so far, with the reference outputs of those since."""
    before, base = sources.reference_streams[stage - 1 : stage + 1]
    assert before is not None, "the source reads no stream"
    assert base is not None, "nor is it after anything"
    tokens = stream.shape[1]
    return Begun(stage, upstream, (base[:, :tokens] - before[:, :tokens]).add_(stream))


def _ended(
    sources: Sources, piece: Piece, kept: EdgeMask, room: Workspace, begun: Begun
) -> Float[Tensor, "1 batch token d_model"]:
    """The stream that was begun, with the senders since then."""
    end = sources.graph.upstream[piece.index].stop
    first, last = np.searchsorted(room.senders, [begun.upstream, end]).tolist()
    heard = kept[room.senders[first:last]][:, piece.receivers]
    used = np.flatnonzero(np.any(heard, axis=(1, 2)))
    if not len(used):
        return begun.stream[None]
    rows = room.changes[1 + first + used, :, : piece.tokens, : begun.stream.shape[2]]
    members = sources.members_at(piece.index, piece.tokens)
    return mix(torch.from_numpy(heard[used]).to(rows), rows, members).add_(begun.stream)


def summed(
    sources: Sources, stage: int, tokens: int, patterns: EdgeMask, room: Workspace
) -> Float[Tensor, "pattern batch token d_model"]:
    """The streams of receivers that hear these senders and the reference outputs of all others.

    Args:
        sources: of the run.
        stage: number of the one that reads them.
        tokens: how many of the first tokens it reads.
        patterns: `(upstream sender, pattern, group)`, see `Graph.upstream`.
        room: with the senders' changes.
    """
    base = sources.reference_streams[stage]
    assert base is not None, "the source reads no stream"
    heard, width = sources.graph.upstream[stage], base.shape[2]
    first, last = np.searchsorted(room.senders, [heard.start, heard.stop]).tolist()
    patterns = patterns[room.senders[first:last] - heard.start]
    used = np.flatnonzero(patterns.any(axis=(1, 2)))
    room.changes[0, :, :tokens, :width] = base[:, :tokens]
    rows = room.changes[: 1 + last, :, :tokens, :width]
    if first or SPARSE * len(used) < len(patterns):  # else reading all costs less than moving what is used
        rows, patterns = rows[np.concatenate([[0], 1 + first + used])], patterns[used]
    weights = np.concatenate([np.ones((1, *patterns.shape[1:]), dtype=bool), patterns])
    members = sources.members_at(stage, tokens)
    count = patterns.shape[1]
    shape = (base.shape[0], count, tokens, width)
    fits = math.prod(shape) <= room.streams.numel()
    out = room.streams[: math.prod(shape)].view(shape) if fits else None
    return mix(torch.from_numpy(weights).to(base.device, base.dtype), rows, members, out)


def distinct(kept: EdgeMask) -> tuple[EdgeMask, list[int]]:
    """The different columns of `(sender, receiver, group)`, and for each receiver the place of its own.

    Columns without a kept edge are left out: their place is -1.
    """
    numbers: dict[bytes, int] = {}
    firsts: list[int] = []
    source: list[int] = []
    for receiver, hears in enumerate(np.any(kept, axis=(0, 2)).tolist()):
        if not hears:
            source.append(-1)
            continue
        key = kept[:, receiver].tobytes()
        if key not in numbers:
            numbers[key] = len(numbers)
            firsts.append(receiver)
        source.append(numbers[key])
    return kept[:, firsts], source


def mix(
    weights: Tensor, changes: Tensor, members: Tensor | None, out: Tensor | None = None
) -> Float[Tensor, "pattern batch token d_model"]:
    """Sum of the changes that each pattern lets through.

    Args:
        weights: `(sender, pattern, group)`.
        changes: of the senders.
        members: token group of each token; None for one group.
        out: room for the result of an ungrouped sum, `(batch, pattern, token, d_model)`, which is then
            written there image by image: many small products keep all cores busy where one of few rows
            does not.
    """
    if members is None and out is not None:
        by_image = changes.flatten(2).transpose(0, 1)  # (batch, sender, token * d_model)
        torch.bmm(weights[..., 0].t().expand(len(out), -1, -1), by_image, out=out.flatten(2))
        return out.transpose(0, 1)
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


def reads_apart(
    sources: Sources, piece: Piece, heard: EdgeMask, streams: Callable[[list[int], int], Tensor]
) -> Reads:
    """What the receivers of a piece read, each from a stream of its own; those that hear nothing read what
    they would with every edge ablated.

    Args:
        sources: of the run.
        piece: with the receivers.
        heard: `(sender, receiver, group)`, the edges that something is heard on.
        streams: gives `(receiver, batch, token, d_model)` for the places of some of these, and the number of
            tokens that they read.
    """
    hears = np.any(heard[sources.graph.upstream[piece.index]], axis=(0, 2))
    reads: Reads = ()
    for tokens, numbers in piece.by_tokens.items():
        hearing = [number for number in numbers if hears[piece.receivers[number]]]
        source = [hearing.index(each) if each in hearing else -1 for each in range(len(piece.receivers))]
        if -1 in source and not reads:
            reads = piece.stage.pick(sources.reference_reads(piece.index))
        if hearing:
            own = streams([piece.receivers[number] for number in hearing], tokens)
            reads = piece.stage.read_each(own, source, reads)
    return reads


def padded(changes: Tensor, tokens: int) -> Tensor:
    """Changes that were written at the first tokens alone, with zeros at the others, where nobody looks."""
    return F.pad(changes, (0, 0, 0, tokens - changes.shape[2])) if changes.shape[2] < tokens else changes


def difference(sources: Sources, index: int, compact: Tensor) -> Tensor:
    """What a stage's senders wrote, less their reference outputs; differentiable."""
    stage, senders = sources.model.essential[index], sources.graph.sender_slices[index]
    return sources.reference.subtracted(sources.graph, index, stage, senders, compact)

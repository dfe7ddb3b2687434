"""Masked runs: the model with some edges kept and all others ablated.

Stage after stage, receiver `v` sees

    X_v = base + sum over kept edges of (x_u - r_u),

where `base` is the stream of reference outputs `r_u` and constants, and `x_u` is what sender `u` writes in
this very run. All receivers of a stage are one matrix product over the senders that some kept edge leaves;
receivers with equal kept edges share a stream; senders that no kept path joins to the logits do not run, and
those that only queries and MLPs carry on to a readout of the leading tokens run at these tokens alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from circuitvit.engine.capture import Capture, outputs
from circuitvit.graph import EdgeMask, Graph
from circuitvit.graph.liveness import EVERYWHERE, LEADING, needed_senders
from circuitvit.models import Model, Reads, Stage

__all__ = [
    "Piece",
    "Sources",
    "Workspace",
    "masked_run",
    "mix",
    "new_workspace",
    "piece_reads",
    "pieces",
    "summed",
]


SPARSE = 3
"""A stage gathers the senders that it uses once they are fewer than one in so many."""


@dataclass(frozen=True, eq=False)
class Sources:
    """What masked runs of one batch start from; made once, used for any number of masks.

    Attributes:
        model: to run.
        graph: the model's graph with the task's token groups.
        base: the captured run that is intervened on.
        reference: every sender's reference output.
        compacts: the same in compact form, for each stage; None where it is not what a run writes.
        members: token group of each token, `(token,)` or `(batch, token)`; None for one group.
    """

    model: Model
    graph: Graph
    base: Capture
    reference: Float[Tensor, "sender batch token d_model"]
    compacts: tuple[Tensor, ...] | None = None
    members: Tensor | None = None
    _known: dict[int, Reads] = field(default_factory=dict, init=False, repr=False)

    def reference_reads(self, stage: int) -> Reads:
        """What the receivers of a stage read if every edge is ablated; computed when first asked for."""
        if stage not in self._known:
            stream = self.reference_streams[stage]
            assert stream is not None, "the source reads no stream"
            self._known[stage] = self.model.essential[stage].read(stream)
        return self._known[stage]

    @cached_property
    def deltas(self) -> Float[Tensor, "sender batch token d_model"]:
        """Reference minus base output of every sender: what ablating all of its edges adds."""
        return self.reference - outputs(self.model.stages, self.base.compacts)

    @cached_property
    def reference_streams(self) -> tuple[Tensor | None, ...]:
        """What each stage would read if every edge were ablated: constants and reference outputs, summed."""
        streams: list[Tensor | None] = []
        stream = torch.zeros_like(self.reference[0])
        for stage, senders in zip(self.model.essential, self.graph.sender_slices, strict=True):
            streams.append(None if stage.is_source else stream)
            if not stage.is_readout:
                stream = stream + self.reference[senders, :, : stream.shape[1]].sum(dim=0)
            if stage.constant is not None:
                stream = stream + stage.constant
            stream = stream[:, : stage.cut]
        return tuple(streams)


@dataclass(frozen=True, eq=False)
class Workspace:
    """Room for masked runs of one batch, so that many runs share one allocation.

    Attributes:
        changes: row 0 for what a stage would read with every edge ablated, then every sender's current minus
            reference output. A run overwrites what it computes and leaves the rest, so a workspace serves
            again for runs that start no earlier.
        streams: room for what the receivers of one stage see, and one of the next.
    """

    changes: Float[Tensor, "row batch token d_model"]
    streams: Float[Tensor, " number"]

    def store(self, sources: Sources, piece: Piece, compact: Tensor) -> None:
        """Take in what the senders of a piece wrote."""
        tokens, changes = compact.shape[-2], self.changes[1:]
        if isinstance(piece.rows, slice):
            piece.changes(sources, compact, out=changes[piece.rows, :, :tokens])
        else:
            changes[piece.rows, :, :tokens] = piece.changes(sources, compact)


def new_workspace(sources: Sources) -> Workspace:
    """A workspace filled with the changes of the base run."""
    shape = sources.reference.shape
    changes = sources.reference.new_empty(1 + shape[0], *shape[1:])
    torch.neg(sources.deltas, out=changes[1:])
    widest = 1 + max(len(stage.receivers) for stage in sources.graph.stages)
    return Workspace(changes, changes.new_empty(widest * shape[1:].numel()))


@torch.no_grad()
def masked_run(
    sources: Sources, kept: EdgeMask, *, start: int = 1, workspace: Workspace | None = None
) -> Float[Tensor, "batch class"]:
    """The logits with the edges of `kept` kept and all others ablated.

    Args:
        sources: of the batch.
        kept: `(sender, receiver, group)`.
        start: number of the first stage with ablated edges; all before it are taken from the base run.
        workspace: from `new_workspace`; overwritten.
    """
    room = new_workspace(sources) if workspace is None else workspace
    need = needed_senders(sources.graph, kept, sources.model.leading is not None)
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


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of a stage that is run: some of its senders, and the receivers that feed them.

    Attributes:
        index: number of the stage.
        stage: the part.
        senders: places of its senders in the graph.
        receivers: places of its receivers in the graph.
        tokens: how many of the first tokens its streams have.
    """

    index: int
    stage: Stage
    senders: NDArray[np.intp]
    receivers: list[int]
    tokens: int

    @cached_property
    def rows(self) -> slice | NDArray[np.intp]:
        """`senders`, as a slice where they follow each other."""
        first, last = self.senders[0], self.senders[-1]
        return slice(first, last + 1) if last - first + 1 == len(self.senders) else self.senders

    def changes(
        self, sources: Sources, compact: Tensor, count: int = 1, out: Tensor | None = None
    ) -> Float[Tensor, "sender image token d_model"]:
        """What the senders wrote minus their reference outputs, taken where it is narrow if it can be.

        Args:
            sources: of the run.
            compact: from the stage's `write`, for `count` candidates of the batch one after the other.
            count: of candidates.
            out: room for the result.
        """
        tokens = compact.shape[-2]
        if sources.compacts is not None:
            (own,) = self.stage.pick((sources.compacts[self.index],))
            between = compact.view(count, -1, *compact.shape[1:]) - own[..., :tokens, :]
            return self.stage.expand(between.flatten(0, 1), out)
        made = self.stage.expand(compact, out)
        reference = sources.reference[self.rows, None, :, :tokens]
        made.view(len(made), count, -1, *made.shape[2:]).sub_(reference)
        return made


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
        yield Piece(index, stage, np.arange(0), list(range(slot.start, slot.stop)), base.shape[1])
        return
    leading = sources.model.leading
    for level in (EVERYWHERE, LEADING):
        wanted = np.flatnonzero(need[slots] == level)
        if not len(wanted):
            continue
        part, tokens = stage.restrict(wanted.tolist()), base.shape[1]
        if level == LEADING and leading is not None:
            mixes = any(stage.nodes.mixes or ())
            part, tokens = (part.leading(leading), tokens) if mixes else (part, min(leading, tokens))
        places = [graph.receiver_index[name] for name in part.nodes.receivers]
        yield Piece(index, part, wanted + slots.start, places, tokens)


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
    upstream = sources.graph.sender_slices[piece.index].start
    if begun is not None and begun.index == piece.index:
        return piece.stage.read_each(_ended(sources, piece, kept, room, begun), [0]), None
    joins = after is not None and _joins(piece, after)
    columns = piece.receivers + (after.receivers if after is not None and joins else [])
    patterns, source = _distinct(kept[:upstream, columns])
    own = source[: len(piece.receivers)]
    known: Reads = piece.stage.pick(sources.reference_reads(piece.index)) if -1 in own else ()
    if not patterns.shape[1]:
        return known, None
    streams, following = summed(sources, piece, patterns, room), None
    if joins and source[-1] >= 0:
        base, later = sources.reference_streams[piece.index : piece.index + 2]
        assert base is not None, "the source reads no stream"
        assert later is not None, "nor is it after anything"
        following = Begun(piece.index + 1, upstream, (later - base).add_(streams[source[-1]]))
    reads = piece.stage.read_each(streams[: max(own) + 1], own, known) if max(own) >= 0 else known
    return reads, following


def _joins(piece: Piece, after: Piece) -> bool:
    """Whether the piece after another has one receiver, which reads the same tokens one stage later."""
    follows = (after.index, after.tokens) == (piece.index + 1, piece.tokens)
    return follows and len(after.receivers) == 1 and not after.stage.is_readout


def _ended(
    sources: Sources, piece: Piece, kept: EdgeMask, room: Workspace, begun: Begun
) -> Float[Tensor, "1 batch token d_model"]:
    """The stream that was begun, with the senders since then."""
    since = slice(begun.upstream, sources.graph.sender_slices[piece.index].start)
    heard = kept[since, piece.receivers]
    used = np.flatnonzero(heard.any(axis=(1, 2)))
    if not len(used):
        return begun.stream[None]
    rows = room.changes[1 + begun.upstream + used, :, : piece.tokens]
    members = None if sources.members is None else sources.members[..., : piece.tokens]
    return mix(torch.from_numpy(heard[used]).to(rows), rows, members).add_(begun.stream)


def summed(
    sources: Sources, piece: Piece, patterns: EdgeMask, room: Workspace
) -> Float[Tensor, "pattern batch token d_model"]:
    """The streams of receivers that hear these senders and the reference outputs of all others.

    Args:
        sources: of the run.
        piece: that reads them.
        patterns: `(upstream sender, pattern, group)`.
        room: with the senders' changes.
    """
    base, tokens = sources.reference_streams[piece.index], piece.tokens
    assert base is not None, "the source reads no stream"
    used = np.flatnonzero(patterns.any(axis=(1, 2)))
    room.changes[0, :, :tokens] = base[:, :tokens]
    rows = room.changes[: 1 + len(patterns), :, :tokens]
    if SPARSE * len(used) < len(patterns):  # else reading what is not used costs less than moving what is
        rows, patterns = rows[np.concatenate([[0], 1 + used])], patterns[used]
    weights = np.concatenate([np.ones((1, *patterns.shape[1:]), dtype=bool), patterns])
    members = None if sources.members is None else sources.members[..., :tokens]
    count = patterns.shape[1]
    shape = (base.shape[0], count, tokens, base.shape[2])
    fits = math.prod(shape) <= room.streams.numel()
    out = room.streams[: math.prod(shape)].view(shape) if fits else None
    return mix(torch.from_numpy(weights).to(base.device, base.dtype), rows, members, out)


def _distinct(kept: EdgeMask) -> tuple[EdgeMask, list[int]]:
    """The different columns of `(sender, receiver, group)`, and for each receiver the place of its own.

    Columns without a kept edge are left out: their place is -1.
    """
    places: dict[bytes, int] = {}
    firsts: list[int] = []
    source: list[int] = []
    for receiver, hears in enumerate(np.any(kept, axis=(0, 2)).tolist()):
        if not hears:
            source.append(-1)
            continue
        key = kept[:, receiver].tobytes()
        if key not in places:
            places[key] = len(places)
            firsts.append(receiver)
        source.append(places[key])
    return kept[:, firsts], source


def mix(
    weights: Tensor, changes: Tensor, members: Tensor | None, out: Tensor | None = None
) -> Float[Tensor, "pattern batch token d_model"]:
    """Sum of the changes that each pattern lets through, `weights` `(sender, pattern, group)`.

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

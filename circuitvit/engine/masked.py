"""Masked runs: the model with some edges kept and all others ablated.

Stage after stage, receiver `v` sees

    X_v = base + sum over kept edges of (x_u - r_u),

where `base` is the stream of reference outputs `r_u` and constants, and `x_u` is what sender `u` writes in
this very run. All receivers of a stage are one matrix product over the senders that some kept edge leaves;
receivers with equal kept edges share a stream; senders that no kept path joins to the logits do not run, and
those that only queries and MLPs carry on to a readout of the leading tokens run at these tokens alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitvit.engine.sources import Piece, Sources, pieces
from circuitvit.engine.sums import Workspace, distinct, mix, new_workspace, summed
from circuitvit.graph import EdgeMask
from circuitvit.graph.liveness import needed_senders
from circuitvit.models import Reads


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
    reads: Reads = ()
    following = None
    for tokens, numbers in piece.by_tokens.items():
        joining = [] if after is None else _joining(piece, after, tokens)
        columns = [*(piece.receivers[number] for number in numbers), *joining]
        patterns, found = distinct(kept[:upstream, columns])
        own = dict(zip(numbers, found, strict=False))
        source = [own.get(number, -1) for number in range(len(piece.receivers))]
        if -1 in source and not reads:
            reads = piece.stage.pick(sources.reference_reads(piece.index))
        if not patterns.shape[1]:
            continue
        streams = summed(sources, piece.index, tokens, patterns, room)
        if joining and found[-1] >= 0:
            following = _begun(sources, piece.index + 1, upstream, streams[found[-1]])
        if max(source) >= 0:
            reads = piece.stage.read_each(streams[: max(source) + 1], source, reads)
    return reads, following


def _joining(piece: Piece, after: Piece, tokens: int) -> list[int]:
    """The receiver of the piece after another, if it is a single one of the next stage with these tokens."""
    follows = (after.index, after.tokens) == (piece.index + 1, tokens) and not after.stage.is_readout
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
    since = slice(begun.upstream, sources.graph.sender_slices[piece.index].start)
    heard = kept[since, piece.receivers]
    used = np.flatnonzero(heard.any(axis=(1, 2)))
    if not len(used):
        return begun.stream[None]
    rows = room.changes[1 + begun.upstream + used, :, : piece.tokens]
    members = None if sources.members is None else sources.members[..., : piece.tokens]
    return mix(torch.from_numpy(heard[used]).to(rows), rows, members).add_(begun.stream)

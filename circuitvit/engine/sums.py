"""What receivers see in a masked run: reference outputs, and the changes of the senders that they hear."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitvit.engine.sources import Piece, Sources
from circuitvit.graph import EdgeMask

SPARSE = 3
"""A stage gathers the senders that it uses once they are fewer than one in so many."""


@dataclass(frozen=True, eq=False)
class Workspace:
    """Room for masked runs of one batch, so that many runs share one allocation.

    Attributes:
        changes: row 0 for what a stage would read with every edge ablated, then every sender's current minus
            reference output; finite, as what is not heard is multiplied by 0. A run overwrites what it
            computes and leaves the rest, so a workspace serves again for runs that start no earlier.
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


def summed(
    sources: Sources, stage: int, tokens: int, patterns: EdgeMask, room: Workspace
) -> Float[Tensor, "pattern batch token d_model"]:
    """The streams of receivers that hear these senders and the reference outputs of all others.

    Args:
        sources: of the run.
        stage: number of the one that reads them.
        tokens: how many of the first tokens it reads.
        patterns: `(upstream sender, pattern, group)`.
        room: with the senders' changes.
    """
    base = sources.reference_streams[stage]
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


def distinct(kept: EdgeMask) -> tuple[EdgeMask, list[int]]:
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

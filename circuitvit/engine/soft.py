"""Runs with masks anywhere between 0 and 1, differentiable: what learning a mask and thinning a circuit need.

Receiver `v` sees `base + sum of M[u, v] (x_u - r_u)`. With a mask of zeros and ones the logits are those of
`masked_run`. Where it is known which gates may be open at all, nothing is run that only the others lead to:
the run shrinks with the circuit, and its values and slopes are those of the full one.

Senders write their changes into one room, where every later stage reads them; its twin gathers the gradients
on the way back. Autograd sees neither, only the order in which they are written and read, so that nothing is
copied from stage to stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint as recompute

from circuitvit.engine.masked import Piece, difference, mix, pieces, reads_apart
from circuitvit.engine.references import Sources
from circuitvit.graph import EdgeMask
from circuitvit.graph.liveness import NEVER, needed_senders
from circuitvit.models import Reads, places


def soft_run(
    sources: Sources,
    mask: Float[Tensor, "sender receiver group"],
    checkpoint: bool = False,
    possible: EdgeMask | None = None,
) -> Float[Tensor, "batch class"]:
    """The logits under a real-valued mask; the model's weights get no gradient.

    Args:
        sources: of the batch.
        mask: 1 keeps an edge, 0 ablates it; entries that are no edges are not looked at.
        checkpoint: keep only the senders' outputs for the backward pass and compute each stage again there.
        possible: the edges that may be open, by default all; the mask of others counts as 0 and has no
            gradient.
    """
    graph = sources.graph
    possible = graph.in_run(graph.edge_mask if possible is None else possible & graph.edge_mask)
    mask = mask.masked_fill(torch.from_numpy(~possible).to(mask.device), 0.0)
    mask = mask.masked_fill(torch.from_numpy(graph.always.copy()).to(mask.device), 1.0)
    need = needed_senders(graph, possible, sources.model.leading is not None)
    room = _Room.of(sources, np.flatnonzero(need != NEVER))
    order = mask.sum() * 0.0  # so that the logits have a gradient even where no path is left
    order = room.store(
        _of_source(sources, need), np.flatnonzero(need[graph.sender_slices[0]] != NEVER), order
    )
    for index in range(1, len(graph.stages)):
        for piece in pieces(sources, index, need):
            arguments = (sources, piece, mask, possible, room, order)
            written = recompute(_run, *arguments, use_reentrant=False) if checkpoint else _run(*arguments)
            if piece.stage.is_readout:
                return written + order
            order = room.store(written, piece.senders, order)
    raise AssertionError("a model ends with its readout")


def _of_source(sources: Sources, need: NDArray[np.int8]) -> Float[Tensor, "sender batch token d_model"]:
    """What the senders that read images wrote, less their reference outputs."""
    written = difference(sources, 0, sources.base.compacts[0])
    wanted = np.flatnonzero(need[sources.graph.sender_slices[0]] != NEVER).tolist()
    return written if len(wanted) == len(written) else written[wanted]


def _run(
    sources: Sources, piece: Piece, mask: Tensor, possible: EdgeMask, room: _Room, order: Tensor
) -> Tensor:
    """What the senders of a piece write, less their reference outputs; of the readout, the logits."""
    compact = piece.stage.write(_reads(sources, piece, mask, possible, room, order))
    return compact if piece.stage.is_readout else piece.changes(sources, compact)


def _reads(
    sources: Sources, piece: Piece, mask: Tensor, possible: EdgeMask, room: _Room, order: Tensor
) -> Reads:
    """What the receivers of a piece read; those that can hear nothing read what they would in any run."""
    base, heard = sources.reference_streams[piece.index], sources.graph.upstream[piece.index]
    assert base is not None, "the source reads no stream"
    first, last = np.searchsorted(room.senders, [heard.start, heard.stop]).tolist()
    rows = room.senders[first:last].tolist()

    def streams(receivers: list[int], tokens: int) -> Tensor:
        members, shape = sources.members_at(piece.index, tokens), (tokens, base.shape[2])
        weights = mask[rows][:, receivers]
        summed: Tensor = _Mix.apply(weights, order, room, (first, last), shape, members)  # type: ignore[no-untyped-call]
        return base[:, :tokens] + summed

    return reads_apart(sources, piece, possible, streams)


# -- the room ------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Room:
    """What the senders that run have written, less their reference outputs, and the gradients there.

    Attributes:
        senders: places in the graph of the senders that have a row, in increasing order.
        changes: `(row, batch, token, d_model)`, 0 where a sender writes nothing.
        slopes: of the loss by the changes, gathered on the way back.
    """

    senders: NDArray[np.intp]
    changes: Float[Tensor, "row batch token d_model"]
    slopes: Float[Tensor, "row batch token d_model"] | None = None

    @classmethod
    def of(cls, sources: Sources, senders: NDArray[np.intp]) -> _Room:
        return cls(senders, sources.base.stream(1).new_zeros(len(senders), *sources.shape))

    def store(self, written: Tensor, senders: NDArray[np.intp], order: Tensor) -> Float[Tensor, ""]:
        """Take in what senders wrote.

        Args:
            written: `(sender, batch, token, d_model)`.
            senders: their places in the graph.
            order: a zero, from what was stored before.

        Returns:
            A zero that whatever reads the room depends on, so that it is gone back through first.
        """
        if not len(senders):
            return order
        rows = np.searchsorted(self.senders, senders).tolist()
        found: Tensor = _Store.apply(written, order, self, rows)  # type: ignore[no-untyped-call]
        return found


class _Store(torch.autograd.Function):
    """Write to the room; on the way back, what was gathered there is the gradient."""

    @staticmethod
    def forward(ctx: Any, written: Tensor, order: Tensor, room: _Room, rows: list[int]) -> Tensor:
        ctx.room, ctx.rows, ctx.shape = room, places(rows), written.shape[2:]
        room.changes[ctx.rows, :, : written.shape[2], : written.shape[3]] = written
        return order.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_order: Tensor) -> tuple[Tensor | None, ...]:
        room, (tokens, width) = ctx.room, ctx.shape
        if room.slopes is None:  # nobody reads it
            room.slopes = torch.zeros_like(room.changes)
        found = room.slopes[ctx.rows, :, :tokens, :width].clone()
        room.slopes[ctx.rows] = 0.0  # for another way back
        return found, d_order, None, None


class _Mix(torch.autograd.Function):
    """Sum of the changes in some rows of the room, weighed for each receiver."""

    @staticmethod
    def forward(
        ctx: Any,
        weights: Float[Tensor, "sender receiver group"],
        order: Tensor,
        room: _Room,
        rows: tuple[int, int],
        shape: tuple[int, int],
        members: Tensor | None,
    ) -> Float[Tensor, "receiver batch token d_model"]:
        ctx.save_for_backward(weights)
        ctx.room, ctx.place, ctx.members = (
            room,
            (slice(*rows), slice(None), slice(shape[0]), slice(shape[1])),
            members,
        )
        return mix(weights, room.changes[ctx.place], members)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_streams: Tensor) -> tuple[Tensor | None, ...]:
        (weights,), room = ctx.saved_tensors, ctx.room
        if room.slopes is None:
            room.slopes = torch.zeros_like(room.changes)
        changes, slopes = room.changes[ctx.place].flatten(1), room.slopes[ctx.place]
        d_weights = torch.empty_like(weights)
        for group in range(weights.shape[2]):
            inside = d_streams
            if ctx.members is not None:
                inside = d_streams * (ctx.members == group).to(d_streams.dtype)[..., None]
            flat = inside.flatten(1)
            d_weights[..., group] = changes @ flat.t()
            slopes += (weights[..., group] @ flat).view(slopes.shape)
        return d_weights, d_streams.new_zeros(()), None, None, None, None

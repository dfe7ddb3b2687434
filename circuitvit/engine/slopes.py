"""How a behaviour moves with each edge's gate at a circuit: all edges from one forward and one backward pass.

At a mask receiver `v` hears `base + sum over edges of M[u, v] (x_u - r_u)`, so that the slope along an edge
is the gradient at what `v` hears times `x_u - r_u`. What a masked run leaves out is neither run nor
differentiated. For the slopes of ablated edges all other nodes run as well, without gradients, as nobody that
matters hears them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from circuitvit.engine.gradients import refuse_inference_mode
from circuitvit.engine.masked import Piece, difference, mix, padded, pieces, reads_apart
from circuitvit.engine.references import Sources
from circuitvit.graph import EdgeMask
from circuitvit.graph.liveness import EVERYWHERE, NEVER, needed_senders
from circuitvit.models import Reads, places

Objective = Callable[[Float[Tensor, "batch class"]], Float[Tensor, " batch"]]
"""Logits to one number for each image."""


def edge_slopes(
    sources: Sources, kept: EdgeMask, objective: Objective, *, absent: bool = False
) -> Float[NDArray[np.float64], "sender receiver group"]:
    """The derivative of an objective, summed over images, by each kept edge's gate; 0 elsewhere.

    Args:
        sources: of the batch.
        kept: `(sender, receiver, group)`.
        objective: of the logits.
        absent: give the derivatives by the gates of ablated edges as well.
    """
    refuse_inference_mode()
    graph = sources.graph
    kept = graph.in_run(kept)
    need = needed_senders(graph, kept, sources.model.leading is not None)
    beside = np.where(need == NEVER, EVERYWHERE, NEVER).astype(np.int8)
    if absent:  # an edge may come from any token
        need = EVERYWHERE - beside
    run = _Run(sources, kept, absent)
    with torch.enable_grad():
        for index, stage in enumerate(graph.stages[1:], 1):
            for piece in pieces(sources, index, need):
                written = run.write(piece)
            if absent and stage.senders:
                with torch.no_grad():
                    for piece in pieces(sources, index, beside):
                        run.write(piece)
        values = objective(written)
    return run.slopes(values)


@dataclass(frozen=True, eq=False)
class _Tap:
    """What some receivers hear.

    Attributes:
        stage: their number.
        receivers: their places in the graph.
        streams: what they hear, `(receiver, batch, token, d_model)`.
    """

    stage: int
    receivers: list[int]
    streams: Tensor


class _Run:
    """A masked run that keeps what its senders write and its receivers hear.

    Args:
        sources: of the batch.
        kept: `(sender, receiver, group)`.
        absent: whether receivers are asked about edges that are ablated.
    """

    def __init__(self, sources: Sources, kept: EdgeMask, absent: bool) -> None:
        self.sources, self.kept, self.absent = sources, kept, absent
        first = difference(sources, 0, sources.base.compacts[0])
        self.written = [(np.arange(len(first)), first)]  # senders, and what they write less the reference
        self.taps: list[_Tap] = []

    def write(self, piece: Piece) -> Tensor:
        """Run a piece, and give what it writes in compact form."""
        compact = piece.stage.write(self._reads(piece))
        if not piece.stage.is_readout:
            self.written.append((piece.senders, piece.changes(self.sources, compact)))
        return compact

    def slopes(self, values: Float[Tensor, " batch"]) -> Float[NDArray[np.float64], "sender receiver group"]:
        """By every gate that was asked about, the derivative of the sum of values."""
        graph = self.sources.graph
        found = np.zeros(graph.shape)
        if values.requires_grad:  # else nothing that is kept leads anywhere, or the objective is a constant
            streams = [tap.streams for tap in self.taps]
            grads = torch.autograd.grad(values.sum(), streams, materialize_grads=True)
            for tap, slope in zip(self.taps, grads, strict=True):
                self._contract(tap, slope, found)
        found[~(graph.edge_mask if self.absent else self.kept & graph.edge_mask)] = 0.0
        return found

    def _contract(self, tap: _Tap, slope: Tensor, found: NDArray[np.float64]) -> None:
        tokens, members = slope.shape[2], self.sources.members_at(tap.stage, slope.shape[2])
        senders, rows = self._heard(tap.stage, tap.receivers, tokens, self.absent)
        flat = rows.detach().flatten(1)
        for group in range(found.shape[2]):
            mine = slope if members is None else slope * (members == group).to(slope)[..., None]
            product = (flat @ mine.flatten(1).t()).double().cpu().numpy()
            found[senders[:, None], tap.receivers, group] = product

    def _reads(self, piece: Piece) -> Reads:
        """What the receivers of a piece read; what they hear is tapped, where gradients are wanted."""
        heard = self.sources.graph.edge_mask if self.absent else self.kept
        return reads_apart(self.sources, piece, heard, partial(self._streams, piece.index))

    def _streams(self, stage: int, receivers: list[int], tokens: int) -> Tensor:
        base = self.sources.reference_streams[stage]
        assert base is not None, "the source reads no stream"
        senders, rows = self._heard(stage, receivers, tokens, False)
        streams = base[:, :tokens].expand(len(receivers), -1, -1, -1)
        if len(senders):
            weights = torch.from_numpy(self.kept[senders][:, receivers]).to(rows)
            streams = streams + mix(weights, rows, self.sources.members_at(stage, tokens))
        if torch.is_grad_enabled():
            streams = streams if streams.requires_grad else streams.clone().requires_grad_()
            self.taps.append(_Tap(stage, receivers, streams))
        return streams

    def _heard(
        self, stage: int, receivers: list[int], tokens: int, every: bool
    ) -> tuple[NDArray[np.intp], Float[Tensor, "sender batch token d_model"]]:
        """The senders that some receivers hear, or every one that they could, and what these write."""
        upstream = self.sources.graph.upstream[stage]
        hears = np.zeros(len(self.kept), dtype=bool)
        hears[upstream] = every or self.kept[upstream][:, receivers].any(axis=(1, 2))
        senders, rows = [], []
        for own, written in self.written:
            mine = np.flatnonzero(hears[own])
            if len(mine):
                senders.append(own[mine])
                rows.append(padded(written[places(mine.tolist()), :, :tokens], tokens))
        empty = self.sources.base.stream(1)[:0]
        return np.concatenate([np.arange(0), *senders]), torch.cat(rows) if rows else empty

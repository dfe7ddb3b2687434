"""Masked runs that differ at one receiver alone, as searches make them by the hundred.

Whatever the receiver sees, only what hears it on kept paths answers. A replay keeps everything else as the
workspace has it: of each later stage it runs the senders that answer, reads anew what hears a change, and
takes many candidates for what the receiver hears at once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitvit.engine.masked import Piece, Workspace, mix, piece_reads, pieces, summed
from circuitvit.engine.references import Sources
from circuitvit.graph import EdgeMask
from circuitvit.graph.liveness import NEVER, needed_senders
from circuitvit.models import Reads, repeated


@dataclass(frozen=True, eq=False)
class _Step:
    """A piece that answers, and what its receivers have from elsewhere.

    Attributes:
        piece: the part of a stage that is run.
        hearing: for each receiver of the piece the number of its stream; -1 if it hears no change.
        tokens: how many of the first tokens the hearing receivers read.
        known: what the receivers read at present; looked at for those that hear no change.
        still: what the hearing receivers hear of senders that do not answer; None at the receiver itself.
        weights: `(answering sender before, hearing receiver, group)`: the kept edges between them.
    """

    piece: Piece
    hearing: list[int]
    tokens: int
    known: Reads
    still: Float[Tensor, "receiver batch token d_model"] | None
    weights: Float[Tensor, "sender receiver group"] | None


class Replay:
    """The runs in which the kept edges into one receiver vary and those into all others stay.

    Args:
        sources: of the batch.
        kept: the present mask `(sender, receiver, group)`.
        receiver: its place in the graph.
        room: holds the run under the present mask: the changes of every sender whose output matters in it.
    """

    def __init__(self, sources: Sources, kept: EdgeMask, receiver: int, room: Workspace) -> None:
        self.sources, self.receiver, self.room = sources, receiver, room
        kept = sources.graph.in_run(kept)
        upstream = sources.graph.upstream[sources.graph.receiver_stages[receiver]]
        self._always = sources.graph.always[upstream, receiver, None]
        self.answering: list[int] = []
        self.changes: Tensor | None = None
        with torch.no_grad():
            self.steps = list(self._steps(kept))

    @torch.no_grad()
    def __call__(self, heard: EdgeMask) -> Float[Tensor, "candidate batch class"]:
        """The logits for each candidate for the edges into the receiver.

        Args:
            heard: `(upstream sender, candidate, group)`: whether the receiver hears the sender.
        """
        heard = heard | self._always
        count, batch = heard.shape[1], self.sources.shape[0]
        changes = self.room.changes.new_empty(
            len(self.answering), count * batch, *self.room.changes.shape[2:]
        )
        written = 0
        for step in self.steps:
            if step.still is None:
                streams = summed(self.sources, step.piece.index, step.tokens, heard, self.room)
                streams = streams.flatten(0, 1)[None]
            else:
                streams = self._moved(step, changes[:written], count)
            reads = step.piece.stage.read_each(streams, step.hearing, repeated(step.known, count))
            compact = step.piece.stage.write(reads)
            if step.piece.stage.is_readout:
                self.changes = changes
                return compact.view(count, batch, -1)
            rows, tokens = changes[written : written + len(step.piece.senders)], compact.shape[-2]
            every, width = self.sources.written_shape(step.piece.index)
            step.piece.changes(self.sources, compact, count, out=rows[:, :, :tokens, :width])
            rows[:, :, tokens:every] = 0  # nobody hears them there, but nothing times old memory may be NaN
            written += len(rows)
        raise AssertionError("a model ends with its readout")

    def commit(self, candidate: int) -> None:
        """Make one of the last candidates the present run of the workspace."""
        assert self.changes is not None, "nothing has been run"
        batch = self.sources.shape[0]
        rows = [1 + sender for sender in self.answering]
        self.room.changes[rows] = self.changes[:, candidate * batch : (candidate + 1) * batch]

    def _steps(self, kept: EdgeMask) -> Iterator[_Step]:
        """What answers, stage after stage; `answering` grows on the way."""
        graph = self.sources.graph
        need = needed_senders(graph, kept, self.sources.model.leading is not None)
        first = graph.receiver_stages[self.receiver]
        for index in range(first, len(graph.stages)):
            hearing = self._hearing(kept) if index > first else {self.receiver}
            answers = {sender for receiver in hearing for sender, _ in graph.fed(receiver, 0)}
            mine = np.array([level if u in answers else NEVER for u, level in enumerate(need)], dtype=np.int8)
            parts = list(pieces(self.sources, index, mine))
            for piece in parts:
                yield self._step(piece, kept, hearing, index == first)
            self.answering += [int(sender) for piece in parts for sender in piece.senders]

    def _hearing(self, kept: EdgeMask) -> set[int]:
        """The receivers to which a kept edge leads from a sender that answers."""
        return set(np.flatnonzero(np.any(kept[self.answering], axis=(0, 2))).tolist())

    def _step(self, piece: Piece, kept: EdgeMask, hearing: set[int], is_first: bool) -> _Step:
        places = [receiver for receiver in piece.receivers if receiver in hearing]
        numbers = {receiver: number for number, receiver in enumerate(places)}
        source = [numbers.get(receiver, -1) for receiver in piece.receivers]
        by_tokens = piece.by_tokens.items()
        tokens = max(count for count, mine in by_tokens if any(source[number] >= 0 for number in mine))
        known = piece_reads(self.sources, piece, kept, self.room) if -1 in source else ()
        if is_first:
            return _Step(piece, source, tokens, known, None, None)
        others = kept[:, places]  # a copy
        others[self.answering] = False
        still = summed(self.sources, piece.index, tokens, others[self._upstream(piece)], self.room)
        still = still.clone(memory_format=torch.contiguous_format)
        answering = self.answering[self._heard(piece)]
        weights = torch.from_numpy(kept[answering][:, places]).to(still)
        return _Step(piece, source, tokens, known, still, weights)

    def _upstream(self, piece: Piece) -> slice:
        return self.sources.graph.upstream[piece.index]

    def _heard(self, piece: Piece) -> slice:
        """Which of the answering senders a piece can hear."""
        upstream = self._upstream(piece)
        return slice(bisect_left(self.answering, upstream.start), bisect_left(self.answering, upstream.stop))

    def _moved(
        self, step: _Step, changes: Tensor, count: int
    ) -> Float[Tensor, "receiver image token d_model"]:
        """The streams of the hearing receivers, given the changes of the answering senders so far."""
        assert step.still is not None, "at the receiver itself nothing has answered yet"
        assert step.weights is not None, "these come together"
        members = self.sources.members_at(step.piece.index, step.tokens)
        if members is not None and members.ndim == 2:
            members = members.repeat(count, 1)
        heard = changes[self._heard(step.piece), :, : step.tokens, : step.still.shape[-1]]
        moved = mix(step.weights, heard, members)
        moved.view(len(moved), count, -1).add_(step.still.view(len(moved), 1, -1))
        return moved

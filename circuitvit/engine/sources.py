"""What masked runs of a batch start from, and the parts of stages that they are made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from circuitvit.engine.capture import Capture, outputs
from circuitvit.graph import Graph
from circuitvit.graph.liveness import EVERYWHERE, LEADING
from circuitvit.models import Model, Reads, Stage, places


@dataclass(frozen=True, eq=False)
class Sources:
    """What masked runs of one batch start from; made once, used for any number of masks.

    Attributes:
        model: to run.
        graph: the model's graph with the task's token groups.
        base: the captured run that is intervened on.
        reference: every sender's reference output.
        members: token group of each token, `(token,)` or `(batch, token)`; None for one group.
        compacts: the reference outputs in compact form, for each stage; None where no run wrote them.
    """

    model: Model
    graph: Graph
    base: Capture
    reference: Float[Tensor, "sender batch token d_model"]
    members: Tensor | None = None
    compacts: tuple[Tensor, ...] | None = None
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
    def rows(self) -> slice | list[int]:
        """`senders`, as a slice where they follow each other."""
        return places(self.senders.tolist())

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
        by_candidate = made.view(len(made), count, -1, *made.shape[2:])
        if out is None:  # what was made may be `compact` itself
            return (by_candidate - reference).view(made.shape)
        by_candidate.sub_(reference)
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
        receivers = [graph.receiver_index[name] for name in part.nodes.receivers]
        yield Piece(index, part, wanted + slots.start, receivers, tokens, apart)

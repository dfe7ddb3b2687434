"""Stages side by side, attention and MLP or several of a kind: all read one stream and add to it at once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from math import prod

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from circuitvit.graph import StageNodes
from circuitvit.models.factored import Factored, Stacked
from circuitvit.models.rules import BackwardRules
from circuitvit.models.stages import Content, Reads, Stage

NAMES = {"attention": "attn", "mlp": "mlp", "block": "block"}
"""What a stage is called, by its kind."""


class ParallelStage(Stage):
    """Attentions and MLPs that read the same stream; no edge joins them, as all add to it at once.

    Receivers and senders are those of the parts, one part after the other, and so are the reads. What the
    parts write lies side by side, `(batch, token, width)`, the heads of an attention one after the other.

    Args:
        layer: number of the block, for the names.
        parts: attentions and MLPs that keep tokens apart or mix them.
    """

    def __init__(self, layer: int, parts: Sequence[Stage]) -> None:
        self.layer = layer
        self.whole: tuple[Stage, ...] = tuple(parts)
        self.chosen = tuple(range(len(self.whole)))
        self.apart = self.whole
        self._named: tuple[tuple[StageNodes, ...], StageNodes] | None = None

    def with_parts(self, parts: Sequence[Stage]) -> ParallelStage:
        """The same of other parts."""
        return ParallelStage(self.layer, parts)

    def behind(self, part: str) -> ParallelStage:
        return self.with_parts([each.behind(part) for each in self.whole])

    @property
    def branches(self) -> tuple[Stage, ...]:
        return self.apart

    @property
    def nodes(self) -> StageNodes:  # type: ignore[override]
        """Those of the parts, made anew when one of them has found out that it mixes no tokens."""
        own = tuple(part.nodes for part in self.apart)
        if self._named is None or any(a is not b for a, b in zip(self._named[0], own, strict=True)):
            self._named = own, self._joined_nodes(own)
        return self._named[1]

    def _joined_nodes(self, own: Sequence[StageNodes]) -> StageNodes:
        kinds = {part.nodes.kind for part in self.whole}
        kind = kinds.pop() if len(kinds) == 1 else "block"
        feeds: list[tuple[int, ...]] = []
        first = 0
        for nodes in own:
            feeds += [tuple(first + sender for sender in fed) for fed in nodes.feeds or ()]
            first += len(nodes.senders)
        return StageNodes(
            f"{NAMES[kind]}{self.layer}",
            kind,
            self.layer,
            tuple(name for nodes in own for name in nodes.senders),
            tuple(name for nodes in own for name in nodes.receivers),
            tuple(feeds),
            tuple(mixes for nodes in own for mixes in nodes.mixes or ()),
            own[0].reads_from,
            own[0].writes_to,
            tuple(name for nodes in own for name in nodes.kept),
        )

    # -- side by side --------------------------------------------------------------------------------

    @property
    def n_reads(self) -> int:
        return sum(part.n_reads for part in self.apart)

    def split_reads(self, reads: Reads) -> tuple[Reads, ...]:
        return tuple(_split(self.apart, reads))

    def join(self, written: Sequence[Tensor]) -> Float[Tensor, "batch token width"]:
        return _joined(written)

    def split(self, compact: Tensor) -> tuple[Tensor, ...]:
        return _unjoined(self.apart, compact)

    @property
    def constant(self) -> Tensor | None:
        known = [part.constant for part in self.apart if part.constant is not None]
        return torch.stack(known).sum(dim=0) if known else None

    def read(self, stream: Tensor) -> Reads:
        return tuple(read for part in self.apart for read in part.read(stream))

    def read_each(self, streams: Tensor, source: Sequence[int], known: Reads = ()) -> Reads:
        before = self.split_reads(known) if known else ((),) * len(self.apart)
        reads: Reads = ()
        first = 0
        for part, own in zip(self.apart, before, strict=True):
            seen = list(source[first : first + len(part.nodes.receivers)])
            first += len(seen)
            if max(seen) >= 0:
                reads += part.read_each(streams, seen, own)
            elif part.nodes.kind == "attention":
                reads += own
            else:  # what is known may be of more tokens than are read now
                reads += tuple(read[:, : streams.shape[2]] for read in own)
        return reads

    def write(self, reads: Reads) -> Float[Tensor, "batch token width"]:
        pairs = zip(self.apart, self.split_reads(reads), strict=True)
        return self.join([part.write(own) for part, own in pairs])

    def total(self, compact: Tensor) -> Tensor:
        first, *others = (part.total(own) for part, own in self._each(compact))
        for other in others:
            first = first + other
        return first

    def factored(self, compact: Tensor) -> Factored:
        return Stacked(*(part.factored(own) for part, own in self._each(compact)))

    def _each(self, compact: Tensor) -> zip[tuple[Stage, Tensor]]:
        return zip(self.apart, self.split(compact), strict=True)

    def pull_back(self, stream: Tensor, reads: Reads, d_reads: Reads) -> Factored:
        each = zip(self.apart, self.split_reads(reads), self.split_reads(d_reads), strict=True)
        return Stacked(*(part.pull_back(stream, own, d_own) for part, own, d_own in each))

    def local_effects(
        self, reads: Reads, d_reads: Reads, d_compact: Tensor, stream: Tensor, streams: Tensor
    ) -> Tensor:
        found = [
            part.local_effects(*own, stream, streams)
            for part, own in self._each_of(reads, d_reads, d_compact)
        ]
        return torch.cat(found)

    def answers(
        self, reads: Reads, others: Reads, d_reads: Reads, d_compact: Tensor
    ) -> Float[Tensor, "receiver candidate batch"]:
        moved = self.split_reads(others)
        each = zip(self._each_of(reads, d_reads, d_compact), moved, strict=True)
        return torch.cat([part.answers(own[0], other, *own[1:]) for (part, own), other in each])

    def exchanged(self, reads: Reads, others: Reads, receiver: int) -> Reads:
        found: list[Tensor] = []
        first = 0
        for part, own, other in zip(
            self.apart, self.split_reads(reads), self.split_reads(others), strict=True
        ):
            mine = 0 <= receiver - first < len(part.nodes.receivers)
            found += part.exchanged(own, other, receiver - first) if mine else own
            first += len(part.nodes.receivers)
        return tuple(found)

    def _each_of(
        self, reads: Reads, d_reads: Reads, d_compact: Tensor
    ) -> list[tuple[Stage, tuple[Reads, Reads, Tensor]]]:
        values = zip(self.split_reads(reads), self.split_reads(d_reads), self.split(d_compact), strict=True)
        return list(zip(self.apart, values, strict=True))

    # -- the same with fewer senders, or another gradient --------------------------------------------

    def restrict(self, senders: Sequence[int]) -> ParallelStage:
        twin, first, wanted = copy.copy(self), 0, set(senders)
        kept = []
        for number, part in zip(self.chosen, self.apart, strict=True):
            count = len(part.nodes.senders)
            mine = [place for place in range(count) if first + place in wanted]
            first += count
            if mine:
                kept.append((number, part.restrict(mine)))
        twin.chosen = tuple(number for number, _ in kept)
        twin.apart, twin._named = tuple(part for _, part in kept), None
        return twin

    def pick(self, reads: Reads) -> Reads:
        if len(reads) == 1:  # what the whole stage wrote; it always reads more than one thing
            written = _unjoined(self.whole, reads[0])
            own = [part.pick((written[number],))[0] for number, part in self._numbered()]
            return (_joined(own),)
        read = _split(self.whole, reads)
        return tuple(each for number, part in self._numbered() for each in part.pick(read[number]))

    def _numbered(self) -> list[tuple[int, Stage]]:
        return list(zip(self.chosen, self.apart, strict=True))

    def with_rules(self, rules: BackwardRules) -> ParallelStage:
        return self.with_parts([part.with_rules(rules) for part in self.whole])

    def contents(self) -> tuple[Content, ...]:
        return tuple(content for part in self.whole for content in part.contents())

    def forget(self) -> None:
        for part in self.whole:
            part.forget()


def _split(parts: Sequence[Stage], reads: Reads) -> list[Reads]:
    found, first = [], 0
    for part in parts:
        found.append(reads[first : first + part.n_reads])
        first += part.n_reads
    return found


def _joined(written: Sequence[Tensor]) -> Float[Tensor, "batch token width"]:
    """Outputs of parts side by side."""
    flat = [rearrange(each, "b h t k -> b t (h k)") if each.ndim == 4 else each for each in written]
    return torch.cat(flat, dim=-1)


def _unjoined(parts: Sequence[Stage], compact: Tensor) -> tuple[Tensor, ...]:
    """The outputs of parts as each of them has them."""
    shapes = [part.narrow for part in parts]
    known = [None if shape is None else prod(shape) for shape in shapes]
    others = known.count(None)
    rest = compact.shape[-1] - sum(width or 0 for width in known)
    widths = [rest // others if width is None else width for width in known]
    return tuple(
        rearrange(each, "b t (h k) -> b h t k", h=shape[0]) if shape is not None and len(shape) == 2 else each
        for shape, each in zip(shapes, torch.split(compact, widths, dim=-1), strict=True)
    )

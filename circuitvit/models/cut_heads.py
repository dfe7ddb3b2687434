"""Heads cut into pieces that sum to them, by the tokens whose values they take or by a dictionary of their z.

What a head writes is linear in what it mixed, so pieces of that are senders that sum to the head. Receivers
stay the heads' own: `a9.h2<q>` feeds every piece of `a9.h2`. By sources,

    z_t = sum over groups of  sum over s in group of  A[t, s] v_s,

each piece is the head run on values that are 0 at all other tokens: whatever turns, masks or gates the head,
it is linear in them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitvit.errors import OptionError
from circuitvit.graph import StageNodes, port_of
from circuitvit.models.attention import AttentionStage
from circuitvit.models.encoders import features_of
from circuitvit.models.factored import Factored
from circuitvit.models.fine import ERROR, REST, directions_of, without
from circuitvit.models.rules import BackwardRules
from circuitvit.models.stages import Content, Reads, Stage

Heads = Float[Tensor, "batch head token d_head"]


@dataclass(frozen=True, eq=False)
class BySource:
    """A head by the tokens that it takes values from.

    Attributes:
        names: what follows the head's name in those of its pieces: the groups, in brackets.
        masks: the tokens of each group, `(group, token)`, or `(group, image, token)`.
    """

    names: tuple[str, ...]
    masks: Bool[Tensor, "group token"] | Bool[Tensor, "group image token"]

    @property
    def images(self) -> int | None:
        """For how many images it is made; None for any."""
        return None if self.masks.ndim == 2 else self.masks.shape[1]

    @property
    def is_bound(self) -> bool:
        """Whether it holds for images of the model's own size alone."""
        return True

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Nothing that a model's numbers come from can be edited in place."""
        return ()

    @property
    def description(self) -> tuple[str, list[Tensor]]:
        """What it is, for the hash of a model: in words, and tensors."""
        return f"{self.names}", [self.masks]

    def at(self, group: int, value: Heads) -> Heads:
        """Values that are 0 outside of a group; candidates of a batch follow each other as images."""
        mask = self.masks[group, ..., : value.shape[2]].to(value.device)
        if mask.ndim == 2:
            if len(value) % len(mask):
                raise OptionError(
                    f"source groups are of {len(mask)} images, and {len(value)} are run: split the sources "
                    "of these images, or by groups that are the same for all"
                )
            mask = mask.repeat(len(value) // len(mask), 1)[:, None, :, None]
        else:
            mask = mask[:, None]
        return value * mask.to(value.dtype)


@dataclass(frozen=True, eq=False)
class ByFeature:
    """A head by the features of a dictionary of what it mixed, and what is left.

    Attributes:
        dictionary: has `encode` and `decode`.
        chosen: numbers of features.
    """

    dictionary: Any
    chosen: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """What follows the head's name in those of its pieces: chosen features, then remainders."""
        return *(f".f{number}" for number in self.chosen), f".{REST}", f".{ERROR}"

    def of(self, mixed: Float[Tensor, "batch token d_head"]) -> list[Tensor]:
        """The pieces of what the head mixed."""
        encoder = features_of(self.dictionary, self.chosen)
        units = encoder.activate(encoder.read(mixed))
        features = self.dictionary.encode(mixed)
        rest = self.dictionary.decode(without(features, self.chosen))
        error = mixed - self.dictionary.decode(features)
        each = units[..., None] * directions_of(self.dictionary, self.chosen)
        return [*each.unbind(2), rest, error]


Pieces = BySource | ByFeature
"""How a head is cut."""


class CutHeads(Stage):
    """An attention some of whose heads are senders by pieces.

    Reads are those of the attention; compact is what every piece mixed, `(batch, sender, token, d_head)`.

    Args:
        inner: the attention.
        cuts: by the names of heads.
    """

    def __init__(self, inner: AttentionStage, cuts: Mapping[str, Pieces]) -> None:
        self.inner, self.cuts = inner, dict(cuts)
        pieces = [
            (head, number)
            for head in inner.nodes.senders
            for number in range(len(cuts[head].names) if head in cuts else 1)
        ]
        self.is_whole, self._sent = True, tuple(range(len(pieces)))
        self._take(pieces)

    def _take(self, pieces: Sequence[tuple[str, int]]) -> None:
        """Become the stage that writes these pieces of heads."""
        inner = self.inner.nodes
        self._pieces = tuple(pieces)
        self._owners = [inner.senders.index(head) for head, _ in pieces]
        # Heads that are normed together compute with those that do not send, too.
        self._heads = [self.inner.heads.index(self.inner.senders[owner]) for owner in self._owners]
        self._ranks = [self._owners[:place].count(owner) for place, owner in enumerate(self._owners)]
        names = tuple(
            f"{head}{self.cuts[head].names[number]}" if head in self.cuts else head for head, number in pieces
        )
        feeds = tuple(
            tuple(sender for sender, owner in enumerate(self._owners) if owner in fed)
            for fed in inner.feeds or ()
        )
        self._nodes = replace(inner, senders=names, feeds=feeds)

    @property
    def nodes(self) -> StageNodes:  # type: ignore[override]
        return self._nodes

    @property
    def n_reads(self) -> int:
        return self.inner.n_reads

    @property
    def narrow(self) -> tuple[int, int]:
        return len(self._pieces), self.inner.d_head

    # -- reading and writing -------------------------------------------------------------------------

    def read(self, stream: Tensor) -> Reads:
        return self.inner.read(stream)

    def read_each(self, streams: Tensor, source: Sequence[int], known: Reads = ()) -> Reads:
        return self.inner.read_each(streams, source, known)

    def pull_back(self, stream: Tensor, reads: Reads, d_reads: Reads) -> Factored:
        return self.inner.pull_back(stream, reads, d_reads)

    def write(self, reads: Reads) -> Heads:
        return self._cut(reads, self.inner.write(reads), self.inner.write)

    def _cut(self, reads: Reads, whole: Heads, run: Callable[[Reads], Heads]) -> Heads:
        """The pieces of what heads mixed.

        Args:
            reads: of the heads.
            whole: what they mixed.
            run: the same function of other reads.
        """
        by_group: dict[tuple[int, int], Heads] = {}
        by_head: dict[str, list[Tensor]] = {}
        found = []
        for (name, number), head in zip(self._pieces, self._heads, strict=True):
            cut = self.cuts.get(name)
            if cut is None:
                found.append(whole[:, head])
            elif isinstance(cut, BySource):
                key = id(cut), number
                if key not in by_group:
                    by_group[key] = run(self._with_values(reads, cut, number))
                found.append(by_group[key][:, head])
            else:
                if name not in by_head:
                    by_head[name] = cut.of(whole[:, head])
                found.append(by_head[name][number])
        return torch.stack(found, dim=1)

    def _with_values(self, reads: Reads, cut: BySource, group: int) -> Reads:
        """The reads with values of a group of tokens alone."""
        place = self._value
        return tuple(cut.at(group, read) if each == place else read for each, read in enumerate(reads))

    @property
    def _value(self) -> int:
        """The place of the values among the reads."""
        ports = list(dict.fromkeys(port_of(receiver) for receiver in self.inner.nodes.receivers))
        return ports.index("v")

    def _by_head(self, compact: Heads, rank: int | None = None) -> Heads:
        """The heads from their pieces, or from those of one rank alone; what has none is 0."""
        heads = compact.new_zeros(compact.shape[0], len(self.inner.heads), *compact.shape[2:])
        mine = [place for place, own in enumerate(self._ranks) if rank in (None, own)]
        into = torch.tensor([self._heads[place] for place in mine], device=compact.device)
        return heads.index_add(1, into, compact[:, mine])

    def total(self, compact: Tensor) -> Tensor:
        if self.is_whole:
            return self.inner.total(self._by_head(compact))
        return self.factored(compact).expand().sum(dim=0)

    def add(self, stream: Tensor, compact: Tensor) -> Tensor:
        return self.inner.add(stream, self._by_head(compact))

    def factored(self, compact: Tensor) -> Factored:
        each = [self.inner.factored(self._by_head(compact, rank)) for rank in range(1 + max(self._ranks))]
        weight = each[0].weight
        assert weight is not None, "heads write through a projection"
        rows = [each[rank].narrow[owner] for rank, owner in zip(self._ranks, self._owners, strict=True)]
        return Factored(torch.stack(rows), weight[self._owners])

    @property
    def constant(self) -> Tensor | None:
        return self.inner.constant

    def answers(
        self, reads: Reads, others: Reads, d_reads: Reads, d_compact: Tensor
    ) -> Float[Tensor, "receiver candidate batch"]:
        """The literal ones: all heads are run anew for each receiver."""
        count, base, found = len(others[0]), self.write(reads), []
        same = [read.expand(count, *read.shape).flatten(0, 1) for read in reads]
        moved = tuple(other.flatten(0, 1) for other in others)
        for receiver in range(len(self.nodes.receivers)):
            written = self.write(self.exchanged(tuple(same), moved, receiver)).view(count, *base.shape)
            found.append(((written - base) * d_compact).flatten(2).sum(dim=-1))
        return torch.stack(found)

    def exchanged(self, reads: Reads, others: Reads, receiver: int) -> Reads:
        return self.inner.exchanged(reads, others, receiver)

    # -- looking inside ------------------------------------------------------------------------------

    def scores(self, reads: Reads) -> Float[Tensor, "batch head query key"]:
        return self.inner.scores(reads)

    def pattern(self, reads: Reads) -> Float[Tensor, "batch head query key"]:
        return self.inner.pattern(reads)

    def attend(self, reads: Reads, pattern: Tensor) -> Tensor:
        return self._cut(
            reads, self.inner.attend(reads, pattern), lambda other: self.inner.attend(other, pattern)
        )

    def gain(self, reads: Reads) -> tuple[Tensor, Tensor] | None:
        return self.inner.gain(reads)

    def carried(self, reads: Reads) -> Tensor:
        return self._cut(reads, self.inner.carried(reads), self.inner.carried)

    def seen(self, reads: Reads) -> Reads:
        return self.inner.seen(reads)

    def mixed(self, reads: Reads, compact: Tensor) -> Heads:
        return self.inner.mixed(reads, self._by_head(compact))

    def direction(self, sender: str) -> Float[Tensor, " d_model"] | None:
        place = self.nodes.senders.index(sender)
        head, number = self._pieces[place]
        cut = self.cuts.get(head)
        if not isinstance(cut, ByFeature) or number >= len(cut.chosen):
            return None
        own = directions_of(cut.dictionary, cut.chosen)[number]
        alone = own.new_zeros(1, len(self._pieces), 1, len(own))
        alone[0, place, 0] = own
        return self.expand(alone)[place, 0, 0]

    def sources(self, sender: str) -> Bool[Tensor, " token"] | Bool[Tensor, "image token"] | None:
        head, number = self._pieces[self.nodes.senders.index(sender)]
        cut = self.cuts.get(head)
        return cut.masks[number] if isinstance(cut, BySource) else None

    # -- the same, but for something -----------------------------------------------------------------

    def restrict(self, senders: Sequence[int]) -> CutHeads:
        if list(senders) == list(range(len(self._pieces))):
            return self
        heads = sorted({self._owners[sender] for sender in senders})
        twin = self._around(self.inner.restrict(heads))
        twin.is_whole, twin._sent = False, tuple(self._sent[sender] for sender in senders)
        twin._take([self._pieces[sender] for sender in senders])
        return twin

    def _around(self, inner: AttentionStage) -> CutHeads:
        twin = copy.copy(self)
        twin.inner = inner
        return twin

    def pick(self, reads: Reads) -> Reads:
        if len(reads) == 1:  # what was written: attention reads more than one thing
            return (reads[0][:, list(self._sent)],)
        return self.inner.pick(reads)

    def behind(self, part: str) -> CutHeads:
        twin = self._around(self.inner.behind(part))
        twin._take(self._pieces)
        return twin

    def leading(self, tokens: int) -> Stage:
        return self._around(self.inner.leading(tokens))

    @property
    def cut(self) -> int | None:
        return self.inner.cut

    def with_rules(self, rules: BackwardRules) -> CutHeads:
        return self._around(self.inner.with_rules(rules))

    def contents(self) -> tuple[Content, ...]:
        return self.inner.contents()

    def forget(self) -> None:
        self.inner.forget()

"""Multi-head self-attention behind its norm, as a stage."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from circuitvit.errors import UnsupportedModelError
from circuitvit.graph import RESIDUAL, StageNodes
from circuitvit.models.factored import Factored, products
from circuitvit.models.parts import Attention, Linear, Norm
from circuitvit.models.rules import BackwardRules, damped, ruled_attention
from circuitvit.models.stages import Content, Reads, Stage, places

Projections = tuple[Float[Tensor, "receiver d_head d_model"], Float[Tensor, "receiver d_head"]]
"""Weights and offsets."""

PARTS = 64
"""Parts of a stage that are kept at hand, as searches come back to them; they hold no weights."""

MIXES = "kv"
"""The ports whose reads at one token reach others; the rest is used where it was read."""


class AttentionStage(Stage):
    """Multi-head self-attention: receivers are the heads' queries, then keys, values and gates; senders the
    heads.

    Reads are the raw queries, keys and values `(batch, head, token, d_head)` before they are normed or
    turned, so that norm and projection are all that lies between a receiver's stream and its read; and the
    raw gates, where heads are gated. With `queries` set only the first that many tokens have a query and a
    gate and are written.

    Where a norm goes across all heads before the output projection, every sender depends on the receivers of
    all: cut to some senders, the stage still reads and writes with all heads, and leaves the others' outputs
    out when it is expanded or summed.

    Args:
        layer: number of the block, for the names.
        norm: before the projections.
        attention: the parts.
        gamma: LayerScale's factor `(d_model,)`, or None.
        first: number of its first head, for the names.
    """

    def __init__(
        self, layer: int, norm: Norm, attention: Attention, gamma: Tensor | None = None, *, first: int = 0
    ) -> None:
        self.layer, self.norm, self.attention, self.gamma, self.first = layer, norm, attention, gamma, first
        self.rules: BackwardRules | None = None
        self.queries: int | None = None
        self.reads_from = getattr(self, "reads_from", RESIDUAL)
        self._derived = attention.derived
        self._take(range(attention.heads))

    def _take(self, senders: Sequence[int]) -> None:
        """Become the stage that writes for these heads."""
        every, joined = tuple(range(self.attention.heads)), self.attention.across is not None
        self.senders = tuple(senders)
        self.heads = every if joined else self.senders
        self.has_all, self.sends_all = self.heads == every, self.senders == every
        self._chosen, self._sent = places(self.heads), places(self.senders)
        self._parts: dict[tuple[tuple[int, ...], int | None], AttentionStage] = {}
        names, reading = (
            [f"{self.name}.h{self.first + head}" for head in each] for each in (self.senders, self.heads)
        )
        ports = self.attention.ports
        receivers = tuple(f"{name}<{port}>" for port in ports for name in reading)
        mixes = tuple(port in MIXES for port in ports for _ in reading)
        # A gate is behind the norm across heads: it feeds its own head alone.
        own = [tuple(place for place, each in enumerate(names) if each == name) for name in reading]
        whole = tuple(range(len(names)))
        feeds = tuple(fed if port == "g" else whole for port in ports for fed in own) if joined else None
        self.nodes = StageNodes(
            f"attn{self.layer}",
            "attention",
            self.layer,
            tuple(names),
            receivers,
            feeds,
            mixes,
            self.reads_from,
            self.reads_from,
        )

    def behind(self, part: str) -> AttentionStage:
        twin = copy.copy(self)
        twin.reads_from = part
        twin._take(self.senders)
        return twin

    @property
    def n_reads(self) -> int:
        return len(self.attention.ports)

    @property
    def d_head(self) -> int:
        """How wide the values of a head are."""
        return self.attention.out.weight.shape[1] // self.attention.heads

    @property
    def narrow(self) -> tuple[int, int]:
        return len(self.heads), self.d_head

    @property
    def name(self) -> str:
        """What its heads are called after."""
        return f"a{self.layer}"

    def _part(self, senders: tuple[int, ...], queries: int | None) -> AttentionStage:
        """The stage with some senders, writing at the first so many tokens; the latest are kept at hand.

        A copy of this very object, so that what a subclass does differently holds for its parts.
        """
        key = senders, queries
        if key not in self._parts:
            if len(self._parts) == PARTS:
                self._parts.pop(next(iter(self._parts)))
            part = copy.copy(self)
            part.queries = queries
            part._take(senders)
            self._parts[key] = part
        return self._parts[key]

    # -- weights -------------------------------------------------------------------------------------

    @cached_property
    def _gamma_and_out(self) -> tuple[Tensor | None, ...]:
        return self.gamma, self.attention.out.full_weight

    @property
    def _out_weight(self) -> Float[Tensor, "head d_head d_model"]:
        return self._derived.get("out", self._gamma_and_out, self._split_out)[self._sent]

    def _split_out(self) -> Tensor:
        weight = self.attention.out.weight
        if self.gamma is not None:
            weight = weight * self.gamma[:, None]
        by_head: Tensor = rearrange(weight, "d (head k) -> head k d", head=self.attention.heads)
        return by_head

    @property
    def _folded(self) -> Projections:
        """The projections with the norm's affine part in them, and what they add to every token."""
        sources = (*self.attention.weights, self.norm.weight, self.norm.bias)
        weight, offset = self._derived.get("folded", sources, self._fold)
        return self._cut(weight), self._cut(offset)

    def _fold(self) -> Projections:
        ports = self.attention.ports.values()
        weight = torch.cat([self.norm.fold(port.weight) for port in ports])
        offset = torch.cat([self.norm.offset(port.weight, port.bias) for port in ports])
        count = len(ports) * self.attention.heads
        return weight.view(count, -1, weight.shape[-1]), offset.view(count, -1)

    def _cut(self, by_receiver: Tensor) -> Tensor:
        """Of something of all heads' receivers, that of this stage's."""
        if self.has_all:
            return by_receiver
        ports = by_receiver.view(len(self.attention.ports), -1, *by_receiver.shape[1:])
        return ports[:, self._chosen].flatten(0, 1)

    def contents(self) -> tuple[Content, ...]:
        parts = self.attention
        norms = self.norm, parts.query_norm, parts.key_norm, parts.across
        learned = parts.latents and (parts.latents.norm, parts.latents.tokens, parts.latents.query)
        return *norms, *parts.ports.values(), parts.out, self.gamma, *(learned or ())

    def forget(self) -> None:
        self._derived.forget()

    @property
    def constant(self) -> Tensor | None:
        bias = self.attention.out.bias
        return bias if bias is None or self.gamma is None else bias * self.gamma

    # -- reading -------------------------------------------------------------------------------------

    def read(self, stream: Tensor) -> Reads:
        normed, ports, packed = self.norm(stream), self.attention.ports, self.attention.packed
        held = sum(port != "g" for port in ports)
        reads = () if packed is None else self._projected(normed, packed, held)
        alone = list(ports.values())[len(reads) :]
        reads += tuple(self._projected(normed, port, 1)[0] for port in alone)
        return tuple(read[:, :, : self._tokens(port)] for port, read in zip(ports, reads, strict=True))

    def _tokens(self, port: str) -> int | None:
        """How many of the first tokens are read through a port; None for all."""
        return None if port in MIXES else self.queries

    def _projected(
        self, normed: Float[Tensor, "batch token d_model"], linear: Linear, ports: int
    ) -> tuple[Float[Tensor, "batch head token d_head"], ...]:
        """What one of the model's own projections gives for each of the ports that it holds."""
        weight, bias = linear.weight, linear.bias
        if not self.has_all:
            weight, bias = self._rows(weight, ports), None if bias is None else self._rows(bias, ports)
        split: Tensor = rearrange(
            F.linear(normed, weight, bias),
            "b t (port head k) -> port b head t k",
            port=ports,
            head=len(self.heads),
        )
        return split.unbind(0)

    def _rows(self, stacked: Tensor, ports: int) -> Tensor:
        """The rows of these heads, of a weight or bias of all heads, port after port."""
        by_head = stacked.view(ports, self.attention.heads, -1, *stacked.shape[1:])
        return by_head[:, self._chosen].flatten(0, 2)

    def read_each(self, streams: Tensor, source: Sequence[int], known: Reads = ()) -> Reads:
        seeing = [place for place, stream in enumerate(source) if stream >= 0]
        if len(streams) == 1 and len(seeing) == len(source):
            return self.read(streams[0])
        weight, offset = self._folded
        inverse = self.norm.inverse(streams)
        if inverse is None:  # where the shortcut below would lose digits
            streams, inverse = self.norm.standardise(streams)[0], torch.ones_like(streams[..., :1])
        seen = [source[place] for place in seeing]
        if seen != list(range(len(streams))):
            streams, inverse = streams[seen], inverse[seen]
        if len(seeing) < len(source):
            weight, offset = weight[places(seeing)], offset[places(seeing)]
        # The norm comes after the projection, where the stream is d_head wide: nothing normed is written.
        projected = _project(streams, weight.transpose(1, 2))
        projected = torch.addcmul(offset[:, None, None, :], projected, inverse)
        return self._with_known(projected, seeing, known)

    def _with_known(
        self, projected: Float[Tensor, "seeing batch token d_head"], seeing: Sequence[int], known: Reads
    ) -> Reads:
        """What is read through each port: projected for some receivers, known for the others."""
        reads, done, ports = [], 0, self.attention.ports
        for place, (port, before) in enumerate(zip(ports, known or [None] * len(ports), strict=True)):
            first, tokens = place * len(self.heads), self._tokens(port)
            mine = [each - first for each in seeing if first <= each < first + len(self.heads)]
            read = projected[done : done + len(mine), :, :tokens].transpose(0, 1)
            done += len(mine)
            if before is not None and len(mine) < len(self.heads):
                new, read = read, before[:, :, :tokens]
                if mine:
                    read = read.clone()
                    read[:, places(mine)] = new
            reads.append(read)
        return tuple(reads)

    def pick(self, reads: Reads) -> Reads:
        return reads if self.has_all else tuple(read[:, self._chosen] for read in reads)

    # -- attending -----------------------------------------------------------------------------------

    def turned(self, reads: Reads) -> tuple[Tensor, Tensor]:
        """Queries and keys as they are multiplied: normed over `d_head` and turned by their place."""
        parts = self.attention
        query, key = self._normed(parts.query_norm, reads[0]), self._normed(parts.key_norm, reads[1])
        if parts.turn is not None:
            query, key = parts.turn(query, self.heads), parts.turn(key, self.heads)
        return query, key

    def _normed(self, norm: Norm | None, read: Tensor) -> Tensor:
        """Queries or keys normed; each half of them, where heads are differential."""
        if norm is None:
            return read
        if self.attention.difference is None:
            return norm(read)
        return torch.cat([norm(half) for half in read.chunk(2, dim=-1)], dim=-1)

    def _added(self, query: Tensor, key: Tensor) -> Float[Tensor, "1 head query key"] | None:
        """What is added to the scores of these queries, of the first tokens, in their dtype; of sentences
        there may be fewer keys than a mask has.

        With a dimension for images: fused attention takes its time over a bias without one.
        """
        added = self.attention.added
        if added is None:
            return None
        return added(self.heads)[None, :, : query.shape[2], : key.shape[2]].to(query.dtype)

    def scores(self, reads: Reads) -> Float[Tensor, "batch head query key"]:
        if self.attention.difference is not None:
            raise UnsupportedModelError(
                f"the heads of {self.nodes.name} subtract one softmax from another, so they have no scores; "
                "their pattern is the difference"
            )
        return self._scores(*self.turned(reads))

    def _scores(self, query: Tensor, key: Tensor) -> Float[Tensor, "batch head query key"]:
        products_: Tensor = query @ key.transpose(-2, -1) * self.attention.scale
        added = self._added(query, key)
        return products_ if added is None else products_ + added

    def pattern(self, reads: Reads) -> Float[Tensor, "batch head query key"]:
        less = self.attention.difference
        if less is None:
            return super().pattern(reads)
        pairs = zip(*(part.chunk(2, dim=-1) for part in self.turned(reads)), strict=True)
        return less.of(*(self._scores(query, key).softmax(dim=-1) for query, key in pairs))

    def attend(
        self, reads: Reads, pattern: Float[Tensor, "batch head query key"]
    ) -> Float[Tensor, "batch head token d_head"]:
        return self._gated(self._finished(pattern @ self.carried(reads)), reads)

    def carried(self, reads: Reads) -> Float[Tensor, "batch head token d_head"]:
        return reads[2]

    def mixed(self, reads: Reads, compact: Tensor) -> Float[Tensor, "batch head token d_head"]:
        return compact

    def write(self, reads: Reads) -> Float[Tensor, "batch head token d_head"]:
        written = self._gated(self._finished(self._mixture(reads)), reads)
        return written if self.rules is None else damped(written, self.rules.output_share)

    def _mixture(self, reads: Reads) -> Float[Tensor, "batch head token d_head"]:
        """The values mixed by the pattern."""
        (query, key), value, less = self.turned(reads), reads[2], self.attention.difference
        if less is None:
            return self._mixed(query, key, value)
        pairs = zip(query.chunk(2, dim=-1), key.chunk(2, dim=-1), strict=True)
        return less.of(*(self._mixed(*pair, value) for pair in pairs))

    def _mixed(self, query: Tensor, key: Tensor, value: Tensor) -> Float[Tensor, "batch head token d_head"]:
        added, scale = self._added(query, key), self.attention.scale
        if self.rules is not None:
            return ruled_attention(query, key, value, scale, added, self.rules)
        return F.scaled_dot_product_attention(query, key, value, added, scale=scale)

    def _finished(self, mixture: Tensor) -> Float[Tensor, "batch head token d_head"]:
        """The mixed values, normed: each head by itself where they are differential, all of them together."""
        less, across = self.attention.difference, self.attention.across
        if less is not None:
            mixture = less.norm(mixture) * less.factor
        if across is None:
            return mixture
        return self._by_head(across(rearrange(mixture, "b head t k -> b t (head k)")))

    def _gated(self, written: Tensor, reads: Reads) -> Float[Tensor, "batch head token d_head"]:
        if self.attention.gate is None:
            return written
        share = 1.0 if self.rules is None else self.rules.gate_share
        return damped(written, share) * damped(reads[3].sigmoid(), share)

    def gain(self, reads: Reads) -> tuple[Tensor, Tensor] | None:
        less, across, gate = self.attention.difference, self.attention.across, self.attention.gate
        if less is None and across is None and gate is None:
            return None
        mixture = self._mixture(reads)
        factor, summand = torch.ones_like(mixture), torch.zeros_like(mixture)
        if less is not None:
            _, inverse = less.norm.standardise(mixture)
            factor = less.norm.affine(inverse) * less.factor
        if across is not None:
            if less is not None:  # whose pattern does not sum to 1, so that nothing can be shared out by it
                raise UnsupportedModelError(
                    f"the heads of {self.nodes.name} are differential and normed together"
                )
            joined = rearrange(mixture, "b head t k -> b t (head k)")
            _, inverse = across.standardise(joined)
            factor = self._by_head(
                (inverse if across.weight is None else inverse * across.weight).expand_as(joined)
            )
            summand = self._finished(mixture) - factor * mixture
        if gate is not None:
            opened = reads[3].sigmoid()
            factor, summand = factor * opened, summand * opened
        return factor, summand

    def _by_head(self, joined: Tensor) -> Float[Tensor, "batch head token d_head"]:
        split: Tensor = rearrange(joined, "b t (head k) -> b head t k", head=len(self.heads))
        return split

    def _own(
        self, compact: Float[Tensor, "batch head token d_head"]
    ) -> Float[Tensor, "batch sender token d_head"]:
        """Of what the heads write, that of the senders."""
        return compact if self.heads == self.senders else compact[:, self._sent]

    def total(self, compact: Tensor) -> Tensor:
        joined: Tensor = rearrange(self._own(compact), "b head t k -> b t (head k)")
        if not self.sends_all:
            return F.linear(joined, self._out_weight.flatten(0, 1).t())
        added = self.attention.out(joined)
        return added if self.gamma is None else added * self.gamma

    @property
    def cut(self) -> int | None:
        return self.queries

    def add(self, stream: Tensor, compact: Tensor) -> Tensor:
        return stream[:, : self.queries] + self.total(compact)

    def factored(self, compact: Tensor) -> Factored:
        return Factored(self._own(compact).transpose(0, 1), self._out_weight)

    # -- gradients and answers -----------------------------------------------------------------------

    def pull_back(self, stream: Tensor, reads: Reads, d_reads: Reads) -> Factored:
        weight, offset = self._folded
        x_hat, inverse = self.norm.standardise(stream)
        tokens = stream.shape[1]
        narrow = self._by_receiver(d_reads, tokens).mul_(inverse)
        if not self.norm.bends:
            return Factored(narrow, weight)
        values = self._by_receiver(reads, tokens).sub_(offset[:, None, None, :])
        along = values.mul_(narrow).sum(dim=-1, keepdim=True) / stream.shape[-1]
        return Factored(narrow, weight, (along,), (x_hat,))

    def _by_receiver(self, reads: Reads, tokens: int) -> Float[Tensor, "receiver batch token d_head"]:
        """The reads stacked, in memory of their own; queries and gates that were not asked for are 0."""
        whole = [
            read if read.shape[2] == tokens else F.pad(read, (0, 0, 0, tokens - read.shape[2]))
            for read in reads
        ]
        return torch.stack(whole).transpose(1, 2).flatten(0, 1)

    def local_effects(
        self, reads: Reads, d_reads: Reads, d_compact: Tensor, stream: Tensor, streams: Tensor
    ) -> Tensor:
        others = tuple(
            read.view(*streams.shape[:2], *read.shape[1:]) for read in self.read(streams.flatten(0, 1))
        )
        return self.answers(reads, others, d_reads, d_compact)

    def answers(
        self, reads: Reads, others: Reads, d_reads: Reads, d_compact: Tensor
    ) -> Float[Tensor, "receiver candidate batch"]:
        if self.attention.across is not None:
            return self._joint_answers(reads, others, d_compact)
        base = (self.write(reads) * d_compact).sum(dim=(2, 3)).t()[:, None]  # (head, 1, batch)
        count = len(others[0])
        # Candidates are more images, never more tokens: a token's place decides how it is turned.
        same = [part.expand(count, *part.shape).flatten(0, 1) for part in reads]
        found = []
        for place, port in enumerate(self.attention.ports):
            moved = self._moved(place, port, reads, others[place], d_reads[place], d_compact)
            if moved is None:
                mixed = (*same[:place], others[place].flatten(0, 1), *same[place + 1 :])
                written = self.write(mixed)
                written = written.view(count, -1, *written.shape[1:])
                moved = torch.einsum("cbhtk,bhtk->hcb", written, d_compact) - base
            found.append(moved)
        return torch.cat(found)

    def exchanged(self, reads: Reads, others: Reads, receiver: int) -> Reads:
        place, head = divmod(receiver, len(self.heads))
        own = reads[place].clone()
        own[:, head] = others[place][:, head]
        return *reads[:place], own, *reads[place + 1 :]

    def _moved(
        self, place: int, port: str, reads: Reads, others: Tensor, d_read: Tensor, d_compact: Tensor
    ) -> Float[Tensor, "head candidate batch"] | None:
        """The answers at a port that a head is linear in, or in its sigmoid, without attention; else None."""
        if port == "v" and self.attention.difference is None:
            return torch.einsum("cbhtk,bhtk->hcb", others - reads[place], d_read)
        return self._opened(reads, others, d_compact) if port == "g" else None

    def _opened(
        self, reads: Reads, others: Tensor, d_compact: Tensor
    ) -> Float[Tensor, "head candidate batch"]:
        """The answers of the gates."""
        change, gated = others.sigmoid() - reads[3].sigmoid(), self._finished(self._mixture(reads))
        return torch.einsum("cbhtk,bhtk->hcb", change, gated * d_compact)

    def _joint_answers(
        self, reads: Reads, others: Reads, d_compact: Tensor
    ) -> Float[Tensor, "receiver candidate batch"]:
        """The same where what one head reads changes what all of them write."""
        base, count = self._mixture(reads), len(others[0])
        same = tuple(part.expand(count, *part.shape).flatten(0, 1) for part in reads)
        written = self._gated(self._finished(base), reads)
        found: list[Tensor] = []
        for place, (port, other) in enumerate(zip(self.attention.ports, others, strict=True)):
            if port == "g":
                found += self._opened(reads, other, d_compact).unbind()
                continue
            mixture = self._mixture((*same[:place], other.flatten(0, 1), *same[place + 1 :]))
            for head in range(len(self.heads)):
                moved = base.repeat(count, 1, 1, 1)
                moved[:, head] = mixture[:, head]
                change = self._gated(self._finished(moved), same).view(count, *base.shape) - written
                found.append((change * d_compact).flatten(2).sum(dim=-1))
        return torch.stack(found)

    def restrict(self, senders: Sequence[int]) -> AttentionStage:
        wanted = tuple(self.senders[sender] for sender in senders)
        return self if wanted == self.senders else self._part(wanted, self.queries)

    def leading(self, tokens: int) -> AttentionStage:
        return self if self.queries == tokens else self._part(self.senders, tokens)

    def with_rules(self, rules: BackwardRules) -> AttentionStage:
        twin = copy.copy(self)
        twin.norm, twin.attention = self.norm.with_rules(rules), self.attention.with_rules(rules)
        twin.rules, twin._parts = rules, {}
        return twin


def _project(
    streams: Float[Tensor, "receiver batch token d_model"], weight: Float[Tensor, "receiver d_model d_head"]
) -> Float[Tensor, "receiver batch token d_head"]:
    """Each receiver's stream times its own weight; image by image where the streams lie so in memory."""
    if streams.is_contiguous():
        return products(streams.flatten(1, 2), weight).view(*streams.shape[:3], -1)
    return torch.stack([products(image, weight) for image in streams.unbind(1)]).transpose(0, 1)

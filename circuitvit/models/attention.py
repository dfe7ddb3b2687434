"""Multi-head self-attention behind its norm, as a stage."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from circuitvit.graph import StageNodes
from circuitvit.models.factored import Factored, products
from circuitvit.models.parts import Attention, Derived, Linear, Norm
from circuitvit.models.rules import BackwardRules, ruled_attention
from circuitvit.models.stages import Reads, Stage, Weight, places

Projections = tuple[Float[Tensor, "receiver d_head d_model"], Float[Tensor, "receiver d_head"]]
"""Weights and offsets."""

PARTS = 64
"""Parts of a stage that are kept at hand, as searches come back to them; they hold no weights."""


class AttentionStage(Stage):
    """Multi-head self-attention: receivers are the heads' queries, then keys, then values; senders the heads.

    Reads are the raw queries, keys and values `(batch, head, token, d_head)` before they are normed or
    turned, so that norm and projection are all that lies between a receiver's stream and its read. With
    `queries` set only the first that many tokens have a query and are written.

    Args:
        layer: number of the block, for the names.
        norm: before the projections.
        attention: the parts.
        gamma: LayerScale's factor `(d_model,)`, or None.
    """

    def __init__(self, layer: int, norm: Norm, attention: Attention, gamma: Tensor | None = None) -> None:
        self.layer, self.norm, self.attention, self.gamma = layer, norm, attention, gamma
        self.rules: BackwardRules | None = None
        self.queries: int | None = None
        self._derived = Derived()
        self._take(range(attention.heads))

    def _take(self, heads: Sequence[int]) -> None:
        """Become the stage of these heads."""
        self.heads = tuple(heads)
        self.has_all = self.heads == tuple(range(self.attention.heads))
        self._chosen = places(self.heads)
        self._parts: dict[tuple[tuple[int, ...], int | None], AttentionStage] = {}
        names = tuple(f"a{self.layer}.h{head}" for head in self.heads)
        ports = tuple(f"{name}<{port}>" for port in "qkv" for name in names)
        mixes = tuple(port != "q" for port in "qkv" for _ in names)
        self.nodes = StageNodes(f"attn{self.layer}", "attention", self.layer, names, ports, mixes=mixes)

    def _part(self, heads: tuple[int, ...], queries: int | None) -> AttentionStage:
        """The stage with some heads, writing at the first so many tokens; the latest are kept at hand.

        A copy of this very object, so that what a subclass does differently holds for its parts.
        """
        key = heads, queries
        if key not in self._parts:
            if len(self._parts) == PARTS:
                self._parts.pop(next(iter(self._parts)))
            part = copy.copy(self)
            part.queries = queries
            part._take(heads)
            self._parts[key] = part
        return self._parts[key]

    # -- weights -------------------------------------------------------------------------------------

    @cached_property
    def _gamma_and_out(self) -> tuple[Tensor | None, ...]:
        return self.gamma, self.attention.out.full_weight

    @property
    def _out_weight(self) -> Float[Tensor, "head d_head d_model"]:
        return self._derived.get("out", self._gamma_and_out, self._split_out)[self._chosen]

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
        ports = [self.attention.query, self.attention.key, self.attention.value]
        weight = torch.cat([self.norm.fold(port.weight) for port in ports])
        offset = torch.cat([self.norm.offset(port.weight, port.bias) for port in ports])
        count = 3 * self.attention.heads
        return weight.view(count, -1, weight.shape[-1]), offset.view(count, -1)

    def _cut(self, by_receiver: Tensor) -> Tensor:
        """Of something of all heads' receivers, that of this stage's."""
        if self.has_all:
            return by_receiver
        ports = by_receiver.view(3, -1, *by_receiver.shape[1:])
        return ports[:, self._chosen].flatten(0, 1)

    def weights(self) -> Iterator[Weight]:
        parts = self.attention
        for norm in (self.norm, parts.query_norm, parts.key_norm):
            yield from ((norm.weight, 1.0), (norm.bias, 0.0)) if norm is not None else ((None, None),) * 2
        for linear in (parts.query, parts.key, parts.value, parts.out):
            yield from ((linear.weight, None), (linear.bias, 0.0))
        yield self.gamma, 1.0

    def forget(self) -> None:
        self._derived.forget()

    @property
    def constant(self) -> Tensor | None:
        bias = self.attention.out.bias
        return bias if bias is None or self.gamma is None else bias * self.gamma

    # -- reading -------------------------------------------------------------------------------------

    def read(self, stream: Tensor) -> Reads:
        normed, parts = self.norm(stream), self.attention
        if parts.packed is not None:
            query, key, value = self._projected(normed, parts.packed, 3)
        else:
            ports = parts.query, parts.key, parts.value
            query, key, value = (self._projected(normed, port, 1)[0] for port in ports)
        return query[:, :, : self.queries], key, value

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
        """Queries, keys and values: projected for some receivers, known for the others."""
        reads, done = [], 0
        for port, before in enumerate(known or (None, None, None)):
            first, tokens = port * len(self.heads), self.queries if port == 0 else None
            mine = [place - first for place in seeing if first <= place < first + len(self.heads)]
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
        query, key, parts = reads[0], reads[1], self.attention
        query = query if parts.query_norm is None else parts.query_norm(query)
        key = key if parts.key_norm is None else parts.key_norm(key)
        if parts.turn is not None:
            query, key = parts.turn(query, self.heads), parts.turn(key, self.heads)
        return query, key

    def _added(self, queries: int) -> Float[Tensor, "head query key"] | None:
        """What is added to the scores of the first so many queries."""
        added = self.attention.added
        return None if added is None else added(self.heads)[:, :queries]

    def scores(self, reads: Reads) -> Float[Tensor, "batch head query key"]:
        query, key = self.turned(reads)
        products_: Tensor = query @ key.transpose(-2, -1) * self.attention.scale
        added = self._added(query.shape[2])
        return products_ if added is None else products_ + added

    def attend(
        self, reads: Reads, pattern: Float[Tensor, "batch head query key"]
    ) -> Float[Tensor, "batch head token d_head"]:
        return pattern @ reads[2]

    def write(self, reads: Reads) -> Float[Tensor, "batch head token d_head"]:
        (query, key), value, scale = self.turned(reads), reads[2], self.attention.scale
        added = self._added(query.shape[2])
        if self.rules is not None:
            return ruled_attention(query, key, value, scale, added, self.rules)
        return F.scaled_dot_product_attention(query, key, value, added, scale=scale)

    def total(self, compact: Tensor) -> Tensor:
        joined: Tensor = rearrange(compact, "b head t k -> b t (head k)")
        if not self.has_all:
            return F.linear(joined, self._out_weight.flatten(0, 1).t())
        added = self.attention.out(joined)
        return added if self.gamma is None else added * self.gamma

    @property
    def cut(self) -> int | None:
        return self.queries

    def add(self, stream: Tensor, compact: Tensor) -> Tensor:
        return stream[:, : self.queries] + self.total(compact)

    def factored(self, compact: Tensor) -> Factored:
        return Factored(compact.transpose(0, 1), self._out_weight)

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
        """The reads stacked, in memory of their own; queries that were not asked for are 0."""
        query, key, value = reads
        query = F.pad(query, (0, 0, 0, tokens - query.shape[2]))
        return torch.stack((query, key, value)).transpose(1, 2).flatten(0, 1)

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
        value = reads[2]
        base = (self.write(reads) * d_compact).sum(dim=(2, 3)).t()[:, None]  # (head, 1, batch)
        count = len(others[0])
        # Candidates are more images, never more tokens: a token's place decides how it is turned.
        same = [part.expand(count, *part.shape).flatten(0, 1) for part in reads]
        found = []
        for port in range(2):
            mixed = tuple(others[place].flatten(0, 1) if place == port else same[place] for place in range(3))
            written = self.write(mixed)
            written = written.view(count, -1, *written.shape[1:])
            found.append(torch.einsum("cbhtk,bhtk->hcb", written, d_compact) - base)
        # A head is linear in its values, so that these need no attention at all.
        by_value = torch.einsum("cbhtk,bhtk->hcb", others[2] - value, d_reads[2])
        return torch.cat([*found, by_value])

    def restrict(self, senders: Sequence[int]) -> AttentionStage:
        heads = tuple(self.heads[sender] for sender in senders)
        return self if heads == self.heads else self._part(heads, self.queries)

    def leading(self, tokens: int) -> AttentionStage:
        return self if self.queries == tokens else self._part(self.heads, tokens)

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

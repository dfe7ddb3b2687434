"""Multi-head self-attention behind its norm, as a stage."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from circuitvit.graph import StageNodes
from circuitvit.models.answers import attention_answers
from circuitvit.models.factored import Factored, products
from circuitvit.models.norms import Norm, ruled_norm, ruled_part
from circuitvit.models.rules import BackwardRules, ruled_attention, with_children
from circuitvit.models.stages import Reads, Stage, places

Projections = tuple[Float[Tensor, "receiver d_head d_model"], Float[Tensor, "receiver d_head"]]
"""Weights and offsets."""

PARTS = 64
"""Parts of a stage that are kept at hand, as searches come back to them; they hold no weights."""


class _Weights:
    """The weights of all heads, which a stage shares with its parts: views of the module's own, or kept."""

    def __init__(self, norm: Norm, attention: Any, gamma: Tensor | None) -> None:
        self.norm, self.attention, self.gamma = norm, attention, gamma

    @cached_property
    def qkv(self) -> Float[Tensor, "receiver d_head d_model"]:
        weight: Tensor = self.attention.qkv.weight
        return weight.view(3 * self.attention.num_heads, -1, weight.shape[-1])

    @cached_property
    def folded(self) -> Projections:
        """The projections with the norm's affine part in them."""
        weight = self.qkv.flatten(0, 1)
        folded = self.norm.fold(weight).view_as(self.qkv)
        return folded, self.norm.offset(weight, self.attention.qkv.bias).view(folded.shape[:2])

    @cached_property
    def out(self) -> Float[Tensor, "head d_head d_model"]:
        weight: Tensor = self.attention.proj.weight
        if self.gamma is not None:
            weight = weight * self.gamma[:, None]
        by_head: Tensor = rearrange(weight, "d (head k) -> head k d", head=self.attention.num_heads)
        return by_head


class AttentionStage(Stage):
    """Multi-head self-attention: receivers are the heads' queries, then keys, then values; senders the heads.

    Reads are the raw queries, keys and values `(batch, head, token, d_head)` before `qk_norm`, so that norm
    and projection are all that lies between a receiver's stream and its read. With `queries` set only the
    first that many tokens have a query and are written.
    """

    def __init__(
        self,
        layer: int,
        norm: Norm,
        attention: Any,
        gamma: Tensor | None,
        rules: BackwardRules | None = None,
        *,
        heads: Sequence[int] | None = None,
        queries: int | None = None,
        weights: _Weights | None = None,
    ) -> None:
        self.layer, self.norm, self.attention, self.gamma, self.rules = layer, norm, attention, gamma, rules
        self.heads = tuple(range(attention.num_heads) if heads is None else heads)
        self.queries = queries
        self.has_all = self.heads == tuple(range(attention.num_heads))
        self._weights = _Weights(norm, attention, gamma) if weights is None else weights
        self._parts: dict[tuple[tuple[int, ...], int | None], AttentionStage] = {}
        names = tuple(f"a{layer}.h{head}" for head in self.heads)
        ports = tuple(f"{name}<{port}>" for port in "qkv" for name in names)
        mixes = tuple(port != "q" for port in "qkv" for _ in names)
        self.nodes = StageNodes(f"attn{layer}", "attention", layer, names, ports, mixes=mixes)

    def _part(self, heads: tuple[int, ...], queries: int | None) -> AttentionStage:
        """The stage with some heads, writing at the first so many tokens; the latest are kept at hand."""
        key = heads, queries
        if key not in self._parts:
            if len(self._parts) == PARTS:
                self._parts.pop(next(iter(self._parts)))
            arguments = self.layer, self.norm, self.attention, self.gamma, self.rules
            self._parts[key] = AttentionStage(*arguments, heads=heads, queries=queries, weights=self._weights)
        return self._parts[key]

    @cached_property
    def _chosen(self) -> slice | list[int]:
        """The heads' places, as a slice where they follow each other."""
        return places(self.heads)

    @property
    def _out_weight(self) -> Float[Tensor, "head d_head d_model"]:
        return self._weights.out[self._chosen]

    @property
    def _folded(self) -> Projections:
        """The projections with the norm's affine part in them, and what they add to every token."""
        weight, offset = self._weights.folded
        return self._cut(weight), self._cut(offset)

    def _cut(self, by_receiver: Tensor) -> Tensor:
        """Of something of all heads' receivers, that of this stage's."""
        if self.has_all:
            return by_receiver
        ports = by_receiver.view(3, -1, *by_receiver.shape[1:])
        return ports[:, self._chosen].flatten(0, 1)

    @property
    def constant(self) -> Tensor | None:
        bias: Tensor | None = self.attention.proj.bias
        return bias if bias is None or self.gamma is None else bias * self.gamma

    def read(self, stream: Tensor) -> Reads:
        weight, bias = self.attention.qkv.weight, self.attention.qkv.bias
        if not self.has_all:
            weight = self._cut(self._weights.qkv).flatten(0, 1)
            bias = None if bias is None else self._cut(bias.view(3 * self.attention.num_heads, -1)).flatten()
        qkv = F.linear(self.norm(stream), weight, bias)
        split: Tensor = rearrange(qkv, "b t (port head k) -> port b head t k", port=3, head=len(self.heads))
        return self._asked(split.unbind(0))

    def read_each(self, streams: Tensor, source: Sequence[int], known: Reads = ()) -> Reads:
        seeing = [place for place, stream in enumerate(source) if stream >= 0]
        if len(streams) == 1 and len(seeing) == len(source):
            return self.read(streams[0])
        weight, offset = self._folded
        inverse = self.norm.inverse(streams)
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

    def _asked(self, reads: Reads) -> Reads:
        """The reads with only the queries that are asked for."""
        query, *rest = reads
        return (query[:, :, : self.queries], *rest)

    def write(self, reads: Reads) -> Float[Tensor, "batch head token d_head"]:
        query, key, value = reads
        query, key = self.attention.q_norm(query), self.attention.k_norm(key)
        if self.rules is not None:
            return ruled_attention(query, key, value, self.attention.scale, self.rules)
        return F.scaled_dot_product_attention(query, key, value, scale=self.attention.scale)

    def total(self, compact: Tensor) -> Tensor:
        joined: Tensor = rearrange(compact, "b head t k -> b t (head k)")
        if not self.has_all:
            return F.linear(joined, self._out_weight.flatten(0, 1).t())
        added = F.linear(joined, self.attention.proj.weight, self.attention.proj.bias)
        return added if self.gamma is None else added * self.gamma

    @property
    def cut(self) -> int | None:
        return self.queries

    def add(self, stream: Tensor, compact: Tensor) -> Tensor:
        return stream[:, : self.queries] + self.total(compact)

    def factored(self, compact: Tensor) -> Factored:
        return Factored(compact.transpose(0, 1), self._out_weight)

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
        return attention_answers(self.write, reads, others, d_reads[2], d_compact)

    def restrict(self, senders: Sequence[int]) -> AttentionStage:
        heads = tuple(self.heads[sender] for sender in senders)
        return self if heads == self.heads else self._part(heads, self.queries)

    def leading(self, tokens: int) -> AttentionStage:
        return self if self.queries == tokens else self._part(self.heads, tokens)

    def with_rules(self, rules: BackwardRules) -> AttentionStage:
        parts = {name: ruled_part(getattr(self.attention, name), rules) for name in ("q_norm", "k_norm")}
        attention = with_children(self.attention, **parts)
        norm = ruled_norm(self.norm, rules)
        arguments = self.layer, norm, attention, self.gamma, rules
        return AttentionStage(*arguments, heads=self.heads, queries=self.queries)


def _project(
    streams: Float[Tensor, "receiver batch token d_model"], weight: Float[Tensor, "receiver d_model d_head"]
) -> Float[Tensor, "receiver batch token d_head"]:
    """Each receiver's stream times its own weight; image by image where the streams lie so in memory."""
    if streams.is_contiguous():
        return products(streams.flatten(1, 2), weight).view(*streams.shape[:3], -1)
    return torch.stack([products(image, weight) for image in streams.unbind(1)]).transpose(0, 1)

"""Attention pooling, as a stage: learned queries gather the tokens of the stream into a new part of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from circuitvit.errors import UnsupportedModelError
from circuitvit.graph import RESIDUAL
from circuitvit.models.attention import AttentionStage
from circuitvit.models.parts import Attention, Norm
from circuitvit.models.stages import Content, Reads

POOL = "pool"
"""What a pool is called: its nodes `pool.h0`, ..., `pool.mlp`, and the part of the stream that they write."""


class PoolingStage(AttentionStage):
    """Attention whose queries are learned latents: receivers are the heads' keys, then values.

    Nothing of the stream that it reads is carried on: `add` gives one of the latents' tokens alone, to which
    the pool's MLP adds and which the readout reads, another part of the stream. So no edge leads past a pool.

    Args:
        layer: one more than the last block's, for diagrams.
        norm: before the projections.
        attention: the parts, with `latents` and without `query`.
        skip: how many of the first tokens are not pooled.
        positions: what is added to the normed tokens that are pooled, `(token, d_model)`, or None.
        name: of the part of the stream that is written; its nodes are called after it.
        reads_from: the part of the stream that is pooled.
    """

    def __init__(
        self,
        layer: int,
        norm: Norm,
        attention: Attention,
        *,
        skip: int = 0,
        positions: Float[Tensor, "token d_model"] | None = None,
        name: str = POOL,
        reads_from: str = RESIDUAL,
    ) -> None:
        self.skip, self.positions, self.pool, self.reads_from = skip, positions, name, reads_from
        super().__init__(layer, norm, attention)

    @property
    def name(self) -> str:
        return self.pool

    def _take(self, heads: Sequence[int]) -> None:
        super()._take(heads)
        self.nodes = replace(self.nodes, name=self.pool, writes_to=self.pool)

    def contents(self) -> tuple[Content, ...]:
        latents = self.attention.latents
        assert latents is not None, "a pool has learned queries"
        return (*super().contents(), latents.tokens, latents.norm, latents.query, self.positions)

    def add(self, stream: Tensor, compact: Tensor) -> Tensor:
        return self.total(compact)

    # -- attending -----------------------------------------------------------------------------------

    def scores(self, reads: Reads) -> Float[Tensor, "batch head query key"]:
        return F.pad(super().scores(self._attended(reads)), (self.skip, 0), value=-torch.inf)

    def write(self, reads: Reads) -> Float[Tensor, "batch head token d_head"]:
        return super().write(self._attended(reads))

    def carried(self, reads: Reads) -> Float[Tensor, "batch head token d_head"]:
        return F.pad(self._attended(reads)[2], (0, 0, self.skip, 0))

    def _attended(self, reads: Reads) -> Reads:
        """The queries, and keys and values of what is pooled."""
        latents = self.attention.latents
        assert latents is not None, "a pool has learned queries"
        query = rearrange(latents()[: self.queries], "q (head k) -> head q k", head=self.attention.heads)
        key, value = (read[:, :, self.skip :] for read in reads)
        if self.positions is not None:
            key, value = (read + shift for read, shift in zip((key, value), self._shifts(key), strict=True))
        return query[self._chosen].expand(len(key), -1, -1, -1), key, value

    def _shifts(self, key: Tensor) -> Float[Tensor, "port head token d_head"]:
        """What positions add to keys and values."""
        sources = (self.positions, *self.attention.weights)
        shifts = self._derived.get("shifts", sources, self._shift)[:, self._chosen]
        if shifts.shape[2] != key.shape[2]:
            raise UnsupportedModelError(
                f"{self.name} adds {shifts.shape[2]} positions to the {key.shape[2]} tokens that it pools"
            )
        return shifts

    def _shift(self) -> Tensor:
        assert self.positions is not None, "it is asked for where there are some"
        added = [self.positions @ port.weight.t() for port in self.attention.ports.values()]
        by_head: Tensor = rearrange(
            torch.stack(added), "port t (head k) -> port head t k", head=self.attention.heads
        )
        return by_head

"""Attention divided between time and space, as two stages: every token looks along time at its own place, and
then around in its own frame.

Tokens are a class token and then the patches, place by place, and at each place frame by frame. Along time
the class token takes no part. In space it is seen in every frame, looks around in each of them apart, by a
softmax of its own, and takes the mean of what it finds.

Bertasius et al. 2021, "Is Space-Time Attention All You Need for Video Understanding?", arXiv:2102.05095.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from circuitvit.errors import UnsupportedModelError
from circuitvit.models.attention import AttentionStage
from circuitvit.models.factored import Factored
from circuitvit.models.parts import Attention, Linear, Norm
from circuitvit.models.rules import BackwardRules
from circuitvit.models.stages import Reads


@dataclass(frozen=True, eq=False)
class Twice(Linear):
    """Two linear maps in a row where a single one is meant.

    Attributes:
        then: the second.
    """

    then: Linear | None = None

    @property
    def second(self) -> Linear:
        assert self.then is not None
        return self.then

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return *super().tensors, *self.second.tensors

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        return self.second.weight @ super().weight

    @property
    def bias(self) -> Float[Tensor, " out"] | None:
        first, second = super().bias, self.second.bias
        turned = None if first is None else self.second.weight @ first
        return turned if second is None else second if turned is None else turned + second

    def __call__(self, x: Tensor) -> Tensor:
        return self.second(F.linear(x, super().weight, super().bias))


class _Grouped(AttentionStage):
    """What the two stages share: each token attends inside groups.

    Args:
        layer: number of the block, for the names.
        norm: before the projections.
        attention: the parts.
        grid: how many places and how many frames.
    """

    def __init__(self, layer: int, norm: Norm, attention: Attention, grid: tuple[int, int]) -> None:
        self.places, self.frames = grid
        super().__init__(layer, norm, attention)

    def _take(self, senders: Sequence[int]) -> None:
        super()._take(senders)
        # Queries are grouped too: all tokens are read at every port, however many are needed.
        self.nodes = replace(self.nodes, mixes=(True,) * len(self.nodes.receivers))

    def _inside(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, scale=self.attention.scale)

    def _pattern_inside(self, query: Tensor, key: Tensor) -> Tensor:
        return (query @ key.transpose(-2, -1) * self.attention.scale).softmax(dim=-1)

    def _by_place(self, read: Tensor) -> Float[Tensor, "batch head place time d_head"]:
        """What is read at the patches."""
        patches: Tensor = rearrange(read[:, :, 1:], "b h (p t) k -> b h p t k", t=self.frames)
        return patches

    def scores(self, reads: Reads) -> Float[Tensor, "batch head query key"]:
        raise UnsupportedModelError(
            f"the heads of {self.nodes.name} attend in groups apart, so they have no scores over all tokens; "
            "their pattern is put together"
        )

    def leading(self, tokens: int) -> AttentionStage:
        return self  # the class token looks around in every frame: nothing is left out

    def with_rules(self, rules: BackwardRules) -> AttentionStage:
        raise UnsupportedModelError(
            f"{type(self).__name__} knows no backward rules: use a method without, such as 'eap' or 'local'"
        )


class TimeAttention(_Grouped):
    """Patches look along time at their own place, by heads called `t0.h0`; the class token stays as it is."""

    @property
    def name(self) -> str:
        return f"t{self.layer}"

    def _take(self, senders: Sequence[int]) -> None:
        super()._take(senders)
        self.nodes = replace(self.nodes, name=f"time{self.layer}")

    @property
    def _gamma_and_out(self) -> tuple[Tensor | None, ...]:
        return self.attention.out.tensors

    @property
    def constant(self) -> Float[Tensor, "token d_model"] | None:
        bias = self.attention.out.bias
        return None if bias is None else F.pad(bias.expand(self.places * self.frames, -1), (0, 0, 1, 0))

    def total(self, compact: Tensor) -> Tensor:
        return F.pad(self._each(super().total(compact))[:, 1:], (0, 0, 1, 0))

    def factored(self, compact: Tensor) -> Factored:
        return super().factored(F.pad(self._each(compact)[..., 1:, :], (0, 0, 1, 0)))

    def _each(self, x: Tensor) -> Tensor:
        """Something of every token, where one may stand for all."""
        return x.expand(*x.shape[:-2], 1 + self.places * self.frames, -1)

    def _mixed(self, query: Tensor, key: Tensor, value: Tensor) -> Float[Tensor, "batch head token d_head"]:
        mixed = self._inside(*(self._by_place(read) for read in (query, key, value)))
        return F.pad(mixed.flatten(2, 3), (0, 0, 1, 0))

    def pattern(self, reads: Reads) -> Float[Tensor, "batch head query key"]:
        inside = self._pattern_inside(*(self._by_place(read) for read in self.turned(reads)))
        same = torch.eye(self.places, dtype=inside.dtype, device=inside.device)
        whole = torch.einsum("bhpts,pq->bhptqs", inside, same).flatten(4, 5).flatten(2, 3)
        return F.pad(whole, (1, 0, 1, 0))  # the class token looks nowhere


class SpaceAttention(_Grouped):
    """Patches and the class token look around in a frame; the class token takes the mean over frames."""

    def _by_frame(self, read: Tensor) -> Float[Tensor, "batch head time token d_head"]:
        """The class token and the patches of each frame."""
        patches = self._by_place(read).transpose(2, 3)
        return torch.cat([read[:, :, None, :1].expand(-1, -1, self.frames, -1, -1), patches], dim=3)

    def _mixed(self, query: Tensor, key: Tensor, value: Tensor) -> Float[Tensor, "batch head token d_head"]:
        mixed = self._inside(*(self._by_frame(read) for read in (query, key, value)))
        patches = mixed[:, :, :, 1:].transpose(2, 3).flatten(2, 3)
        return torch.cat([mixed[:, :, :, 0].mean(dim=2, keepdim=True), patches], dim=2)

    def pattern(self, reads: Reads) -> Float[Tensor, "batch head query key"]:
        inside = self._pattern_inside(*(self._by_frame(read) for read in self.turned(reads)))
        same = torch.eye(self.frames, dtype=inside.dtype, device=inside.device)
        patches = torch.einsum("bhtpq,ts->bhptqs", inside[..., 1:, 1:], same).flatten(4, 5).flatten(2, 3)
        to_class = inside[..., 1:, :1].transpose(2, 3).flatten(2, 3)
        of_class = inside[..., 0, 1:].transpose(2, 3).flatten(2, 3) / self.frames
        itself = inside[..., 0, 0].mean(dim=2)[..., None]
        first = torch.cat([itself, of_class], dim=-1)[:, :, None]
        return torch.cat([first, torch.cat([to_class, patches], dim=-1)], dim=2)

"""timm's blocks whose attention and MLP, or several of each, run side by side on one stream.

`ParallelScalingBlock` and `DiffParallelScalingBlock` keep their projections in one tensor (`in_proj`, and
mostly `out_proj`), from which each part takes its rows and columns. `ParallelThingsBlock` has several
attentions, then several MLPs: heads are numbered through, and the second MLP of block 3 is `m3.1`.

Dehghani et al. 2023, "Scaling Vision Transformers to 22 Billion Parameters", arXiv:2302.05442; Touvron et al.
2022, "Three things everyone should know about Vision Transformers", arXiv:2203.09795.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from circuitvit.models.attention import AttentionStage
from circuitvit.models.layers import MLPStage
from circuitvit.models.parallel import ParallelStage
from circuitvit.models.parts import MLP, Attention, Difference, Linear, norm_of
from circuitvit.models.stages import Stage

GammaOf = Callable[[nn.Module, str], Tensor | None]


def scaling_block(block: Any, layer: int, where: str, gamma_of: GammaOf) -> tuple[Stage, ...]:
    """The one stage of a `ParallelScalingBlock`, or of its differential kind."""
    hidden, width = block.in_split[:2]
    projection = block.in_proj
    packed = Linear(projection.weight, projection.bias, rows=(hidden, hidden + 3 * width))
    query, key, value = (
        Linear(projection.weight, projection.bias, rows=(hidden + port * width, hidden + (port + 1) * width))
        for port in range(3)
    )
    norms: dict[str, Any] = {
        ours: norm_of(getattr(block, own), f"{where}.{own}")
        for ours, own in (("query_norm", "q_norm"), ("key_norm", "k_norm"))
        if not isinstance(getattr(block, own), nn.Identity)
    }
    less = None
    if hasattr(block, "sub_norm"):
        norm = norm_of(block.sub_norm, f"{where}.sub_norm")
        less = Difference(block._compute_lambda, norm, 1 - block.lambda_init)
    attention = Attention(
        block.num_heads, query, key, value, _out(block, width), block.scale, packed, difference=less, **norms
    )
    norm1, gamma = norm_of(block.in_norm, f"{where}.in_norm"), gamma_of(block.ls, f"{where}.ls")
    mlp = MLP(FusedMLP(block), known=True, act="act", out="last")
    return (
        ParallelStage(
            layer, [AttentionStage(layer, norm1, attention, gamma), MLPStage(layer, norm1, mlp, gamma)]
        ),
    )


def _out(block: Any, width: int) -> Linear:
    """The output projection of the heads; a bias that is shared with the MLP belongs to no sender."""
    if block.out_proj is not None:
        return Linear(block.out_proj.weight[:, :width], block.out_proj.bias)
    return Linear.of(block.attn_out_proj)


class FusedMLP(nn.Module):
    """The MLP of a block that keeps its weights together with those of attention."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.act = block.mlp_act
        self.first = block.in_proj
        self.own_bias: Tensor | None = block.mlp_bias
        self.hidden, attention = block.in_split[:2]
        fused = block.out_proj is not None
        self.last = Columns(block.out_proj, attention) if fused else block.mlp_out_proj

    def forward(self, normed: Tensor) -> Tensor:
        bias = self.own_bias if self.first.bias is None else self.first.bias[: self.hidden]
        hidden = self.act(F.linear(normed, self.first.weight[: self.hidden], bias))
        return self.last(hidden)  # type: ignore[no-any-return]


class Columns(nn.Module):
    """The last columns of a projection, whose bias is not theirs."""

    def __init__(self, whole: nn.Linear, first: int) -> None:
        super().__init__()
        self.whole, self.first = whole, first

    @property
    def linear(self) -> Linear:
        return Linear(self.whole.weight[:, self.first :])

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.linear.weight)


def things_block(
    block: Any,
    layer: int,
    where: str,
    gamma_of: GammaOf,
    attention_of: Callable[[Any, str], Attention],
    mlp_of: Callable[[nn.Module], MLP],
) -> tuple[Stage, ...]:
    """The two stages of a `ParallelThingsBlock`."""
    attentions: list[Stage] = []
    mlps: list[Stage] = []
    first = 0
    for number, branch in enumerate(block.attns):
        place = f"{where}.attns.{number}"
        attention = attention_of(branch.attn, place)
        norm, gamma = norm_of(branch.norm, f"{place}.norm"), gamma_of(branch.ls, f"{place}.ls")
        attentions.append(AttentionStage(layer, norm, attention, gamma, first=first))
        first += attention.heads
    for number, branch in enumerate(block.ffns):
        place = f"{where}.ffns.{number}"
        norm, gamma = norm_of(branch.norm, f"{place}.norm"), gamma_of(branch.ls, f"{place}.ls")
        mlps.append(MLPStage(layer, norm, mlp_of(branch.mlp), gamma, number=number))
    return ParallelStage(layer, attentions), ParallelStage(layer, mlps)

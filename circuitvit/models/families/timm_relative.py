"""timm's models with biases by relative position: `Beit` (BEiT, BEiT v2) and `VisionTransformerRelPos`.

What is added to the scores of attention comes from tables of weights, or from a small MLP on coordinates, of
each block or of the model, and has rows and columns for the class token. Biases of queries and values apart,
`gamma_1` and `gamma_2` or LayerScale, `qk_norm`, token and average pooling are known; everything else is
refused by name.

Bao et al. 2022, "BEiT", arXiv:2106.08254; Liu et al. 2022, "Swin Transformer V2", arXiv:2111.09883.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial, reduce
from operator import add
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitvit.models.attention import AttentionStage
from circuitvit.models.families.timm_vit import TimmViT, attention_of, gamma_of, mlp_of, refuse_block
from circuitvit.models.layers import MLPStage
from circuitvit.models.parts import Added, Derived, norm_of
from circuitvit.models.stages import Stage, places

Biases = tuple[Callable[[], Tensor], nn.Module]
"""What gives biases `(..., head, query, key)`, and the module whose tensors they are made of."""

KEPT_BYTES = 2**25
"""Larger biases are computed for every run, as the module itself does: attention then costs far more."""


class TimmRelative(TimmViT):
    """What both have in common."""

    block_kind: str
    attention_kind: str

    @abstractmethod
    def biases(self, module: Any, attention: Any) -> list[Biases]:
        """What a block adds to the scores of its attention."""

    @abstractmethod
    def gammas(self, block: Any, where: str) -> tuple[Tensor | None, Tensor | None]:
        """The factors of what attention and MLP write."""

    def embed(self, module: Any, images: Tensor) -> Tensor:
        embedded: Tensor = module.patch_embed(images)
        if module.cls_token is not None:
            embedded = torch.cat((module.cls_token.expand(len(embedded), -1, -1), embedded), dim=1)
        positions = getattr(module, "pos_embed", None)
        return embedded if positions is None else embedded + positions

    def block(self, module: Any, block: Any, layer: int, where: str) -> tuple[Stage, ...]:
        refuse_block(block, where, self.block_kind, (self.attention_kind,))
        derived, biases = Derived(), self.biases(module, block.attn)
        tokens = module.patch_embed.num_patches + module.num_prefix_tokens
        size = block.attn.num_heads * tokens**2 * block.attn.proj.weight.element_size()
        added = _added(biases, derived, keep=size <= KEPT_BYTES) if biases else None
        attention = attention_of(block.attn, where, added=added, derived=derived)
        norm1, norm2 = (norm_of(getattr(block, name), f"{where}.{name}") for name in ("norm1", "norm2"))
        gamma1, gamma2 = self.gammas(block, where)
        first = AttentionStage(layer, norm1, attention, gamma1)
        return first, MLPStage(layer, norm2, mlp_of(block.mlp), gamma2)

    def pooled(self, module: Any, normed: Tensor) -> Float[Tensor, "batch 1 d_model"]:
        average = module.global_pool == "avg"
        return normed[:, module.num_prefix_tokens :].mean(dim=1, keepdim=True) if average else normed[:, :1]


class TimmBeit(TimmRelative):
    """timm's `Beit`."""

    block_kind, attention_kind = "Block", "Attention"

    def biases(self, module: Any, attention: Any) -> list[Biases]:
        own = attention.relative_position_bias_table is not None
        of_block: list[Biases] = [(attention._get_rel_pos_bias, attention)] if own else []
        shared = module.rel_pos_bias
        return of_block if shared is None else [*of_block, (shared, shared)]

    def gammas(self, block: Any, where: str) -> tuple[Tensor | None, Tensor | None]:
        return block.gamma_1, block.gamma_2


class TimmRelPos(TimmRelative):
    """timm's `VisionTransformerRelPos`."""

    block_kind, attention_kind = "RelPosBlock", "RelPosAttention"

    def biases(self, module: Any, attention: Any) -> list[Biases]:
        table = module.shared_rel_pos if attention.rel_pos is None else attention.rel_pos
        return [] if table is None else [(table.get_bias, table)]

    def gammas(self, block: Any, where: str) -> tuple[Tensor | None, Tensor | None]:
        return gamma_of(block.ls1, f"{where}.ls1"), gamma_of(block.ls2, f"{where}.ls2")


BEIT, RELPOS = TimmBeit(), TimmRelPos()


def _added(biases: Sequence[Biases], derived: Derived, keep: bool) -> Added:
    """The sum of biases; kept, if it may be, until one of the weights that they are made of is edited."""
    sources = [tensor for _, module in biases for tensor in (*module.parameters(), *module.buffers())]
    make = partial(_sum, [give for give, _ in biases])
    return partial(_of_heads, partial(derived.get, "added", sources, make) if keep else make)


def _sum(biases: Sequence[Callable[[], Tensor]]) -> Float[Tensor, "head query key"]:
    total = reduce(add, (give() for give in biases))
    return total.view(total.shape[-3:])


def _of_heads(biases: Callable[[], Tensor], heads: Sequence[int]) -> Float[Tensor, "head query key"]:
    return biases()[places(heads)]

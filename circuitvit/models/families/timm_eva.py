"""timm's `Eva`: EVA, EVA-02, DINOv3, Perception Encoder and ViTs with rotary positions.

Known: rotations of the patches by any of timm's tables, learned ones included ("mixed"), in both layouts;
projections together or apart, with biases of their own; `qk_norm`, a norm across heads
(`scale_attn_inner`), `gamma_1` and `gamma_2`, any MLP, any pooling that `VisionTransformer` may have.
Everything else is refused by name. A model with rotations takes images of its own size alone, as the angles
of a token follow from rows and columns of patches, which the stream does not show.

Fang et al. 2023, "EVA-02", arXiv:2303.11331; Siméoni et al. 2025, "DINOv3", arXiv:2508.10104; Heo et al.
2024, "Rotary position embedding for Vision Transformer", arXiv:2403.13298.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from circuitvit.errors import DataError
from circuitvit.models.attention import AttentionStage
from circuitvit.models.families.timm_vit import TimmViT, attention_of, mlp_of, refuse_block
from circuitvit.models.layers import MLPStage
from circuitvit.models.parts import Derived, Turn, norm_of
from circuitvit.models.stages import Stage, places
from circuitvit.models.timm_import import import_timm


class TimmEva(TimmViT):
    """timm's `Eva`."""

    def embed(self, module: Any, images: Tensor) -> Tensor:
        self.refuse_size(module, images)
        return module.norm_pre(module._pos_embed(module.patch_embed(images))[0])  # type: ignore[no-any-return]

    def refuse_size(self, module: Any, images: Tensor) -> None:
        """Refuse images of other sizes than the one that tokens are turned for.

        Raises:
            DataError: naming both.
        """
        given = tuple(images.shape[-2:])
        own = given if module.rope is None else tuple(self.own_size(module))
        if given != own:
            raise DataError(
                f"{self.name(module)} turns queries and keys by their place among patches of "
                f"{own[0]} x {own[1]} pixels, not of {given[0]} x {given[1]}: resize the images, or "
                "build the module for that size and wrap it anew"
            )

    def own_size(self, module: Any) -> tuple[int, int]:
        """Height and width of the images that tokens are turned for."""
        return module.patch_embed.img_size  # type: ignore[no-any-return]

    def rotations(self, module: Any, blank: Tensor) -> Tensor:
        """Sines and cosines of all patches of an image, as the forward hands them to the blocks."""
        return module._pos_embed(module.patch_embed(blank))[1]  # type: ignore[no-any-return]

    def block(self, module: Any, block: Any, layer: int, where: str) -> tuple[Stage, ...]:
        refuse_block(block, where, "EvaBlock", ("EvaAttention", "AttentionRope"))
        derived = Derived()
        turn = None if module.rope is None else self.turn(module, block.attn, layer, derived)
        attention = attention_of(block.attn, where, turn=turn, derived=derived)
        norm1, norm2 = (norm_of(getattr(block, name), f"{where}.{name}") for name in ("norm1", "norm2"))
        first = AttentionStage(layer, norm1, attention, block.gamma_1)
        return first, MLPStage(layer, norm2, mlp_of(block.mlp), block.gamma_2)

    def resizable(self, module: Any) -> bool:
        return module.rope is None and super().resizable(module)

    def turn(self, module: Any, attention: Any, layer: int, derived: Derived) -> Turn:
        """What a block does to queries and keys, with the table that the module hands it."""
        sources = (*module.rope.parameters(), *module.rope.buffers())
        make = partial(self._table, module, layer, attention.num_prefix_tokens)
        apply = partial(import_timm().layers.apply_rot_embed_cat, half=bool(attention.rotate_half))
        return partial(_turned, partial(derived.get, "turn", sources, make), apply)

    def _table(self, module: Any, layer: int, prefix: int) -> Tensor:
        """Sines, then cosines, of every token: `(token, 2 * d_head)`, or `(head, token, 2 * d_head)`.

        Tokens before the patches are not turned.
        """
        channels = self.preprocessing(module).size[0]
        blank = next(module.parameters()).new_zeros(1, channels, *self.own_size(module))
        table = self.rotations(module, blank)
        table = table[layer] if table.ndim == 4 else table  # of each layer, where they are learned
        sines, cosines = table.chunk(2, dim=-1)
        shape = (*sines.shape[:-2], prefix, sines.shape[-1])
        still = torch.cat([sines.new_zeros(shape), cosines.new_ones(shape)], dim=-1)
        return torch.cat([still, table], dim=-2)


FAMILY = TimmEva()


def _turned(
    table_of: Callable[[], Tensor], apply: Callable[[Tensor, Tensor], Tensor], x: Tensor, heads: Sequence[int]
) -> Tensor:
    table = table_of()[..., : x.shape[2], :]
    return apply(x, table if table.ndim == 2 else table[places(heads)])

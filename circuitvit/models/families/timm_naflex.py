"""timm's `NaFlexVit` on whole images: any size and shape that its patches fit, or are padded to.

Known: linear and convolutional patches, learned and factorised positions, with or without their aspect kept,
class token, registers, `pre_norm`, plain blocks and those of EVA, any pooling that is known of timm's Vision
Transformers. With rotary positions it takes images of the size alone that it was built for (`img_size`).
Patches that are cut beforehand, padded to one number and masked are not what it is run on: a batch has images
of one size.

Dehghani et al. 2023, "Patch n' Pack: NaViT", arXiv:2307.06304; Tschannen et al. 2025, "SigLIP 2",
arXiv:2502.14786.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvit.errors import UnsupportedModelError
from circuitvit.models.families.family import Grid
from circuitvit.models.families.timm_eva import TimmEva
from circuitvit.models.families.timm_vit import TimmViT
from circuitvit.models.stages import Stage
from circuitvit.models.zoo import InputSpec


class TimmNaFlex(TimmEva):
    """timm's `NaFlexVit`; its blocks, norms and pooling are those of `VisionTransformer` and `Eva`."""

    def embed(self, module: Any, images: Tensor) -> Tensor:
        self.refuse_size(module, images)
        return module._forward_embeds(images, None, None, None)["patches"]  # type: ignore[no-any-return]

    def block(self, module: Any, block: Any, layer: int, where: str) -> tuple[Stage, ...]:
        turns = module.rope is not None or type(block).__name__.startswith("Eva")
        family = TimmEva if turns else TimmViT
        return family.block(self, module, block, layer, where)

    def pooled(self, module: Any, normed: Tensor) -> Float[Tensor, "batch 1 width"]:
        return torch.unsqueeze(module._pool(normed), 1)

    def refuse(self, module: Any) -> None:
        super().refuse(module)
        if module.rope is not None and module.embeds.default_img_size is None:
            raise UnsupportedModelError(
                "rope turns queries and keys by their place among patches, and the module does not say for "
                "images of which size: build it with img_size=... and pos_embed_grid_size=None"
            )

    def prefix(self, module: Any) -> tuple[str, ...]:
        kinds = ["cls"] * module.has_class_token + ["reg"] * module.num_reg_tokens
        return tuple(kinds)

    def grid(self, module: Any, height: int, width: int) -> Grid | None:
        return tuple(int(side) for side in module.embeds.dynamic_feat_size((height, width)))

    def resizable(self, module: Any) -> bool:
        return module.rope is None

    def preprocessing(self, module: Any) -> InputSpec:
        return self.configured(module, module.in_chans, module.embeds.default_img_size)

    # -- rotations -----------------------------------------------------------------------------------

    def own_size(self, module: Any) -> tuple[int, int]:
        return module.embeds.default_img_size  # type: ignore[no-any-return]

    def rotations(self, module: Any, blank: Tensor) -> Tensor:
        return module._forward_embeds(blank, None, None, None)["rope_embeds"]  # type: ignore[no-any-return]


FAMILY = TimmNaFlex()

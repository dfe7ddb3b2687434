"""timm's `NaFlexVit` on whole images: any size and shape that its patches fit, or are padded to.

Known: linear and convolutional patches, learned and factorised positions, with or without their aspect kept,
class token, registers, `pre_norm`, plain and EVA blocks, any pooling that is known of timm's Vision
Transformers. Patches that are cut beforehand, padded to one number and masked are not what it is run on:
a batch has images of one size.

Dehghani et al. 2023, "Patch n' Pack: NaViT", arXiv:2307.06304; Tschannen et al. 2025, "SigLIP 2",
arXiv:2502.14786.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvit.models.families.family import Grid
from circuitvit.models.families.timm_vit import TimmViT
from circuitvit.models.timm_import import import_timm
from circuitvit.models.zoo import InputSpec


class TimmNaFlex(TimmViT):
    """timm's `NaFlexVit`; its blocks, norms and pooling are those of `VisionTransformer` and `Eva`."""

    def embed(self, module: Any, images: Tensor) -> Tensor:
        return module._forward_embeds(images, None, None, None)["patches"]  # type: ignore[no-any-return]

    def pooled(self, module: Any, normed: Tensor) -> Float[Tensor, "batch 1 width"]:
        return torch.unsqueeze(module._pool(normed), 1)

    def prefix(self, module: Any) -> tuple[str, ...]:
        kinds = ["cls"] * module.has_class_token + ["reg"] * module.num_reg_tokens
        return tuple(kinds)

    def grid(self, module: Any, height: int, width: int) -> Grid | None:
        return tuple(int(side) for side in module.embeds.dynamic_feat_size((height, width)))

    def resizable(self, module: Any) -> bool:
        return True

    def preprocessing(self, module: Any) -> InputSpec:
        config = import_timm().data.resolve_model_data_config(module)
        return InputSpec(
            (module.in_chans, *config["input_size"][1:]),
            tuple(config["mean"]),
            tuple(config["std"]),
            config["interpolation"],
            config["crop_pct"],
        )


FAMILY = TimmNaFlex()

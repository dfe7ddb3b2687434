"""timm's vision encoders of Qwen3-VL and DeepSeek, and classifiers on them.

A classifier is wrapped as it is; an encoder alone where it gives one vector for an image
(`global_pool="avg"`), as what it hands to a language model is one for each token. Rotary positions, positions
and norms around the blocks, and the projector ("merge", "align") before the classifier are the module's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from circuitvit.errors import UnsupportedModelError
from circuitvit.models.attention import AttentionStage
from circuitvit.models.families.family import Grid
from circuitvit.models.families.timm_eva import TimmEva
from circuitvit.models.families.timm_vit import attention_of, mlp_of, refuse_block
from circuitvit.models.layers import MLPStage
from circuitvit.models.parts import Derived, Readout, norm_of
from circuitvit.models.stages import Stage
from circuitvit.models.zoo import InputSpec

PROJECTORS = ("merger", "aligner")
"""What makes tokens of a language model of the patches."""


class TimmVLM(TimmEva):
    """timm's vision encoders of vision-language models, and classifiers on them."""

    def embed(self, module: Any, images: Tensor) -> Tensor:
        encoder = encoder_of(module)
        self.refuse_size(encoder, images)
        return encoder._pos_embed(encoder.patch_embed(images))[0]  # type: ignore[no-any-return]

    def blocks(self, module: Any) -> Sequence[nn.Module]:
        return tuple(encoder_of(module).blocks)

    def block(self, module: Any, block: Any, layer: int, where: str) -> tuple[Stage, ...]:
        encoder = encoder_of(module)
        if type(block).__name__ != "DeepseekVitBlock":
            return super().block(encoder, block, layer, where)
        refuse_block(block, where, "DeepseekVitBlock", ("AttentionRope",))
        derived = Derived()
        turn = self.turn(encoder, block.attn, layer, derived)
        norm1, norm2 = (norm_of(getattr(block, name), f"{where}.{name}") for name in ("norm1", "norm2"))
        first = AttentionStage(layer, norm1, attention_of(block.attn, where, turn=turn, derived=derived))
        return first, MLPStage(layer, norm2, mlp_of(block.mlp))

    def readout(self, module: Any, stream: Tensor) -> Tensor:
        encoder = encoder_of(module)
        normed = encoder.norm(stream) if hasattr(encoder, "norm") else stream
        patches = normed.unflatten(1, encoder.patch_embed.grid_size)
        projector = projector_of(encoder)
        tokens = patches if projector is None else projector(patches)
        logits: Tensor = patches.mean(dim=(1, 2)) if encoder is module else module.forward_head(tokens)
        return logits

    def readout_parts(self, module: Any) -> Readout | None:
        encoder = encoder_of(module)
        if encoder is module or projector_of(encoder) is not None:
            return None
        norm = norm_of(getattr(encoder, "norm", nn.Identity()), "encoder.norm")
        return Readout(norm, _mean, norm_of(module.norm, "norm"), (module.head,))

    def refuse(self, module: Any) -> None:
        encoder = encoder_of(module)
        if not len(encoder.blocks):
            raise UnsupportedModelError("the model has no blocks, so there is no circuit to look for")
        if module.global_pool != "avg":
            raise UnsupportedModelError(
                f"global_pool={module.global_pool!r} gives one vector for each token, for a language model "
                "to read; the logits must be (batch, class): build it with global_pool='avg'"
            )

    def prefix(self, module: Any) -> tuple[str, ...]:
        return ()

    def grid(self, module: Any, height: int, width: int) -> Grid | None:
        return tuple(int(side) for side in encoder_of(module).patch_embed.grid_size)

    def resizable(self, module: Any) -> bool:
        return False

    def preprocessing(self, module: Any) -> InputSpec:
        return self.configured(module, module.in_chans, encoder_of(module).patch_embed.img_size)


FAMILY = TimmVLM()


def encoder_of(module: Any) -> Any:
    """The encoder in a classifier, or the module itself."""
    return getattr(module, "encoder", module)


def projector_of(encoder: Any) -> nn.Module | None:
    """What makes tokens of a language model of the patches, or None."""
    return next((part for name in PROJECTORS if (part := getattr(encoder, name, None)) is not None), None)


def _mean(normed: Tensor) -> Float[Tensor, "batch 1 d_model"]:
    """Of all patches."""
    return normed.mean(dim=1, keepdim=True)

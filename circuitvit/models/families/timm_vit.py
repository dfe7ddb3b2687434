"""timm's `VisionTransformer` with plain `Block` and `Attention`.

Known: class token or none, registers, the distillation token of DeiT, `no_embed_class`, `dynamic_img_size`,
`norm_pre`, LayerScale, `qkv_bias`, `qk_norm`, LayerNorm or RMSNorm with any eps, any MLP, `attn_head_dim`,
any pooling, that of one or several latents included (`timm_pool`), `fc_norm` or `norm`, `num_classes=0`.
Everything else is refused by name.

Dosovitskiy et al. 2021, "An image is worth 16x16 words", arXiv:2010.11929.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitvit.errors import UnsupportedModelError
from circuitvit.models.attention import AttentionStage
from circuitvit.models.families.family import Family, Grid
from circuitvit.models.families.timm_pool import attention_pool, pooled
from circuitvit.models.layers import MLPStage
from circuitvit.models.parts import MLP, Attention, Linear, Norm, Readout, norm_of
from circuitvit.models.stages import Stage
from circuitvit.models.timm_import import import_timm
from circuitvit.models.zoo import InputSpec

REASONS = {
    "ResPostBlock": "it norms after attention and MLP (post-norm)",
    "ParallelScalingBlock": "its attention and MLP run in parallel",
    "DiffParallelScalingBlock": "its attention and MLP run in parallel, with differential attention",
    "ParallelThingsBlock": "it has several attentions and MLPs in parallel",
    "DiffAttention": "differential attention subtracts two patterns",
    "AttentionRope": "rotary position embeddings are not supported yet",
}


class TimmViT(Family):
    """timm's `VisionTransformer`, and DeiT's with a distillation token."""

    def embed(self, module: Any, images: Tensor) -> Tensor:
        embedded = module._pos_embed(module.patch_embed(images))
        return module.norm_pre(module.patch_drop(embedded))  # type: ignore[no-any-return]

    def blocks(self, module: Any) -> Sequence[nn.Module]:
        return tuple(module.blocks)

    def block(self, module: Any, block: Any, layer: int, where: str) -> tuple[Stage, ...]:
        kind = type(block).__name__
        if kind != "Block":
            reason = REASONS.get(kind, "its parts are unknown")
            raise UnsupportedModelError(
                f"{where} is a {kind} (block_fn={kind}): {reason}; only timm's plain Block is supported"
            )
        for cause in _attention_problems(block.attn):
            raise UnsupportedModelError(f"{where}.attn {cause}")
        norm = norm_of(block.norm1, f"{where}.norm1")
        attention = AttentionStage(
            layer, norm, _attention(block.attn, where), _gamma(block.ls1, f"{where}.ls1")
        )
        norm = norm_of(block.norm2, f"{where}.norm2")
        return attention, MLPStage(layer, norm, _mlp(block.mlp), _gamma(block.ls2, f"{where}.ls2"))

    def pool(self, module: Any) -> tuple[Stage, ...]:
        if not _pools_by_attention(module):
            return ()
        skip = 0 if module.pool_include_prefix else module.num_prefix_tokens
        norm = norm_of(module.norm, "norm")
        return attention_pool(module.attn_pool, len(module.blocks), norm, skip, _mlp)

    def readout(self, module: Any, stream: Tensor) -> Tensor:
        if _pools_by_attention(module):
            return module.head(module.head_drop(module.fc_norm(pooled(module.attn_pool, stream))))  # type: ignore[no-any-return]
        return module.forward_head(module.norm(stream))  # type: ignore[no-any-return]

    def readout_parts(self, module: Any) -> Readout | None:
        try:
            norm = norm_of(module.norm, "norm")
            if _pools_by_attention(module):
                none, after = norm_of(nn.Identity(), ""), norm_of(module.fc_norm, "fc_norm")
                return Readout(none, partial(_pooled_latents, module.attn_pool), after, (module.head,))
            if _is_distilled(module):
                heads, none = (
                    (module.head, module.head_dist),
                    Norm(nn.Identity(), centred=False, scaled=False),
                )
                return Readout(norm, _first_two, none, heads, ("head", "head_dist"))
            return Readout(norm, partial(_pooled, module), norm_of(module.fc_norm, "fc_norm"), (module.head,))
        except (
            UnsupportedModelError
        ):  # it runs as it is; only direct attribution and backward rules need its parts
            return None

    def refuse(self, module: Any) -> None:
        if not len(module.blocks):
            raise UnsupportedModelError("the model has no blocks, so there is no circuit to look for")
        if module.global_pool == "" and not _is_distilled(module):
            raise UnsupportedModelError(
                "global_pool='' gives one vector for each token; the logits must be (batch, class)"
            )

    def prefix(self, module: Any) -> tuple[str, ...]:
        kinds: list[str] = ["cls"] if module.cls_token is not None else []
        kinds += ["dist"] if getattr(module, "dist_token", None) is not None else []
        kinds += ["reg"] * (module.num_prefix_tokens - len(kinds))
        return tuple(kinds)

    def grid(self, module: Any, height: int, width: int) -> Grid | None:
        embed = module.patch_embed
        own, size = getattr(embed, "grid_size", None), getattr(embed, "img_size", None)
        if own is not None and size is not None and (height, width) == tuple(size):
            return tuple(int(side) for side in own)
        if not hasattr(embed, "dynamic_feat_size") or not self.resizable(module):
            return None
        return tuple(int(side) for side in embed.dynamic_feat_size((height, width)))

    def resizable(self, module: Any) -> bool:
        return bool(getattr(module, "dynamic_img_size", False))

    def classifies(self, module: Any) -> bool:
        return bool(module.num_classes > 0)

    def preprocessing(self, module: Any) -> InputSpec:
        config = import_timm().data.resolve_model_data_config(module)
        # The first convolution, wherever it is: a hybrid's own projection reads feature maps, not images.
        first = next((weight for weight in module.patch_embed.parameters() if weight.ndim == 4), None)
        channels = config["input_size"][0] if first is None else first.shape[1]
        height, width = getattr(module.patch_embed, "img_size", None) or config["input_size"][1:]
        mean, std = tuple(config["mean"]), tuple(config["std"])
        if len(mean) != channels:
            mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
        return InputSpec((channels, height, width), mean, std, config["interpolation"], config["crop_pct"])

    def name(self, module: Any) -> str:
        config = getattr(module, "pretrained_cfg", None) or {}
        return str(config.get("architecture") or type(module).__name__)


FAMILY = TimmViT()


# -- parts ---------------------------------------------------------------------------------------


def _gamma(scale: nn.Module, where: str) -> Tensor | None:
    """The factor `(d_model,)` of a LayerScale, or None of an Identity."""
    if isinstance(scale, nn.Identity):
        return None
    gamma = getattr(scale, "gamma", None)
    if type(scale).__name__ != "LayerScale" or not isinstance(gamma, Tensor):
        raise UnsupportedModelError(
            f"{where} is a {type(scale).__name__}: only LayerScale and Identity are known"
        )
    return gamma


def _attention(module: Any, where: str) -> Attention:
    norms = [
        None if isinstance(norm, nn.Identity) else norm_of(norm, f"{where}.attn.{name}")
        for name, norm in (("q_norm", module.q_norm), ("k_norm", module.k_norm))
    ]
    packed, out = Linear.of(module.qkv), Linear.of(module.proj)
    return Attention.of_packed(
        module.num_heads, packed, out, module.scale, query_norm=norms[0], key_norm=norms[1]
    )


def _mlp(module: Any) -> MLP:
    """An MLP of timm's with the names of its parts; of any other class the module alone."""
    kinds = import_timm().layers
    gates = {kinds.Mlp: (), kinds.GluMlp: ("fc1",), kinds.SwiGLU: ("fc1_g", "fc1_x")}
    found = gates.get(type(module))
    return MLP(module) if found is None else MLP(module, True, "act", found, "norm", "fc2")


def _attention_problems(attention: Any) -> Iterator[str]:
    kind = type(attention).__name__
    if kind != "Attention":
        reason = REASONS.get(kind, "its parts are unknown")
        yield f"is a {kind} (attn_layer): {reason}; only timm's plain Attention is supported"
        return
    for name, part in (("qkv", attention.qkv), ("proj", attention.proj)):
        if not isinstance(part, nn.Linear):
            yield f"has a {type(part).__name__} as {name}: only a plain nn.Linear can be told apart by head"
            return
    if not isinstance(attention.norm, nn.Identity):
        norm = type(attention.norm).__name__
        yield (
            f"has a {norm} across heads before the output projection (scale_attn_norm=True), "
            "which is not supported"
        )
    if getattr(attention, "gate", None) is not None:
        yield "is gated (gated=True), which is not supported"
    if attention.proj.weight.shape[1] != attention.num_heads * attention.head_dim:
        yield "has an output projection whose width does not match its heads"


def _is_distilled(module: Any) -> bool:
    return hasattr(module, "head_dist")


def _pools_by_attention(module: Any) -> bool:
    return getattr(module, "attn_pool", None) is not None


def _pooled_latents(pool: Any, latents: Tensor) -> Float[Tensor, "batch 1 width"]:
    return torch.unsqueeze(pooled(pool, latents), 1)


def _first_two(normed: Tensor) -> Float[Tensor, "batch 2 d_model"]:
    """The class token for the one classifier, the distillation token for the other."""
    return normed[:, :2]


def _pooled(module: Any, normed: Tensor) -> Float[Tensor, "batch 1 width"]:
    pooled: Tensor = module.pool(normed)
    return torch.unsqueeze(pooled, 1)

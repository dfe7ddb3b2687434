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
from circuitvit.models.families.timm_parallel import scaling_block, things_block
from circuitvit.models.families.timm_pool import attention_pool, pooled, refuse_pool
from circuitvit.models.layers import MLPStage
from circuitvit.models.parts import MLP, Attention, Difference, Linear, Norm, Readout, norm_of
from circuitvit.models.stages import Stage
from circuitvit.models.timm_import import import_timm
from circuitvit.models.zoo import InputSpec

POST_NORM = (
    "it norms after attention and MLP (post-norm): what its heads write passes one norm together, so that no "
    "head has an output of its own from which an edge could lead"
)

REASONS = {
    "ResPostBlock": POST_NORM,
    "EvaBlockPostNorm": f"with use_post_norm=True {POST_NORM}",
    "ResPostRelPosBlock": POST_NORM,
}

NORMS = {"query_norm": "q_norm", "key_norm": "k_norm", "across": "norm"}
"""Norms of an attention: what parts call them, and what timm does."""

APART = ("q_proj", "k_proj", "v_proj")
"""Projections that are kept apart."""


class TimmViT(Family):
    """timm's `VisionTransformer`, and DeiT's with a distillation token."""

    def embed(self, module: Any, images: Tensor) -> Tensor:
        embedded = module._pos_embed(module.patch_embed(images))
        return module.norm_pre(module.patch_drop(embedded))  # type: ignore[no-any-return]

    def blocks(self, module: Any) -> Sequence[nn.Module]:
        return tuple(module.blocks)

    def block(self, module: Any, block: Any, layer: int, where: str) -> tuple[Stage, ...]:
        attentions = "Attention", "AttentionRope", "DiffAttention"
        kinds = import_timm().models.vision_transformer
        if type(block) in (kinds.ParallelScalingBlock, kinds.DiffParallelScalingBlock):
            return scaling_block(block, layer, where, gamma_of)
        if type(block) is kinds.ParallelThingsBlock:
            for number, branch in enumerate(block.attns):
                refuse_attention(branch.attn, f"{where}.attns.{number}", attentions)
            return things_block(block, layer, where, gamma_of, attention_of, mlp_of)
        refuse_block(block, where, "Block", attentions)
        norm1, norm2 = (norm_of(getattr(block, name), f"{where}.{name}") for name in ("norm1", "norm2"))
        gamma1, gamma2 = (gamma_of(getattr(block, name), f"{where}.{name}") for name in ("ls1", "ls2"))
        attention = AttentionStage(layer, norm1, attention_of(block.attn, where), gamma1)
        return attention, MLPStage(layer, norm2, mlp_of(block.mlp), gamma2)

    def pool(self, module: Any) -> tuple[Stage, ...]:
        if not _pools_by_attention(module):
            return ()
        skip = 0 if getattr(module, "pool_include_prefix", True) else module.num_prefix_tokens
        norm = norm_of(module.norm, "norm")
        return attention_pool(module.attn_pool, len(module.blocks), norm, skip, mlp_of)

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
            pool = partial(self.pooled, module)
            return Readout(norm, pool, norm_of(module.fc_norm, "fc_norm"), (module.head,))
        except (
            UnsupportedModelError
        ):  # it runs as it is; only direct attribution and backward rules need its parts
            return None

    def pooled(self, module: Any, normed: Tensor) -> Float[Tensor, "batch 1 width"]:
        """What the classifier is given, before a norm of its own."""
        pooled: Tensor = module.pool(normed)
        return torch.unsqueeze(pooled, 1)

    def refuse(self, module: Any) -> None:
        if not len(module.blocks):
            raise UnsupportedModelError("the model has no blocks, so there is no circuit to look for")
        if _pools_by_attention(module):
            refuse_pool(module.attn_pool)
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
        sized = own is not None and size is not None and (height, width) == tuple(size)
        if hasattr(embed, "dynamic_feat_size") and (sized or self.resizable(module)):
            return tuple(int(side) for side in embed.dynamic_feat_size((height, width)))
        return None if own is None or not sized else tuple(int(side) for side in own)

    def resizable(self, module: Any) -> bool:
        return bool(getattr(module, "dynamic_img_size", False))

    def classifies(self, module: Any) -> bool:
        return bool(module.num_classes > 0)

    def preprocessing(self, module: Any) -> InputSpec:
        # The first convolution, wherever it is: a hybrid's own projection reads feature maps, not images.
        first = next((weight for weight in module.patch_embed.parameters() if weight.ndim == 4), None)
        return self.configured(
            module, None if first is None else first.shape[1], getattr(module.patch_embed, "img_size", None)
        )

    def configured(self, module: Any, channels: int | None, size: tuple[int, int] | None) -> InputSpec:
        """What the module's configuration says, but for channels and size where these are known better."""
        config = import_timm().data.resolve_model_data_config(module)
        channels = channels or config["input_size"][0]
        height, width = size or config["input_size"][1:]
        mean, std = tuple(config["mean"]), tuple(config["std"])
        if len(mean) != channels:
            mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
        return InputSpec((channels, height, width), mean, std, config["interpolation"], config["crop_pct"])

    def name(self, module: Any) -> str:
        config = getattr(module, "pretrained_cfg", None) or {}
        return str(config.get("architecture") or type(module).__name__)


FAMILY = TimmViT()


# -- parts ---------------------------------------------------------------------------------------


def gamma_of(scale: nn.Module, where: str) -> Tensor | None:
    """The factor `(d_model,)` of a LayerScale, or None of an Identity."""
    if isinstance(scale, nn.Identity):
        return None
    gamma = getattr(scale, "gamma", None)
    if type(scale).__name__ != "LayerScale" or not isinstance(gamma, Tensor):
        raise UnsupportedModelError(
            f"{where} is a {type(scale).__name__}: only LayerScale and Identity are known"
        )
    return gamma


def attention_of(module: Any, where: str, **others: Any) -> Attention:
    """The attention of any of timm's plain blocks; `others` is what turns queries and keys and the like."""
    parts: dict[str, Any] = {
        ours: norm_of(getattr(module, own), f"{where}.attn.{own}")
        for ours, own in NORMS.items()
        if not isinstance(getattr(module, own, None), (nn.Identity, type(None)))
    }
    gate = getattr(module, "gate", None)
    parts |= {"gate": None if gate is None else Linear.of(gate), "difference": _difference(module, where)}
    if hasattr(module, "attn_dim"):  # else heads are as wide together as the stream
        parts["resize"] = partial(_resize, module)
    heads, out, scale = module.num_heads, Linear.of(module.proj), module.scale
    if module.qkv is None:
        groups = getattr(module, "num_kv_heads", heads)
        shared = None if groups == heads else (groups, heads // groups)
        parts |= {} if shared is None else {"resize": None}  # groups would be of different sizes
        query = Linear.of(getattr(module, APART[0]))
        key, value = (Linear.of(getattr(module, name), shared) for name in APART[1:])
        return Attention(heads, query, key, value, out, scale, **parts, **others)
    packed, apart = Linear.of(module.qkv), getattr(module, "q_bias", None)
    if apart is not None:  # biases of queries and values are weights, that of keys is a constant
        packed = Linear(packed.full_weight, (apart, module.k_bias, module.v_bias))
    return Attention.of_packed(heads, packed, out, scale, **parts, **others)


def _resize(module: Any, heads: int) -> None:
    """Note how many heads an attention has, whose projections are of so many."""
    module.attn_dim = heads * module.attn_dim // module.num_heads
    module.num_heads = heads
    if hasattr(module, "num_kv_heads"):
        module.num_kv_heads = heads


def _difference(module: Any, where: str) -> Difference | None:
    """What makes an attention differential; None of a plain one."""
    if type(module).__name__ != "DiffAttention":
        return None
    norm = norm_of(module.sub_norm, f"{where}.attn.sub_norm")
    return Difference(module._compute_lambda, norm, 1 - module.lambda_init)


def mlp_of(module: Any) -> MLP:
    """An MLP of timm's with the names of its parts; of any other class the module alone."""
    kinds = import_timm().layers
    gates = {kinds.Mlp: (), kinds.GluMlp: ("fc1",), kinds.SwiGLU: ("fc1_g", "fc1_x")}
    found = gates.get(type(module))
    return MLP(module) if found is None else MLP(module, True, "act", found, "norm", "fc2")


def refuse_block(block: Any, where: str, kind: str, attentions: tuple[str, ...]) -> None:
    """Refuse a block that is of another class than the family's, or holds an attention that is not known.

    Raises:
        UnsupportedModelError: naming the part and the switch.
    """
    found = type(block).__name__
    if found != kind:
        reason = REASONS.get(found, "its parts are unknown")
        raise UnsupportedModelError(
            f"{where} is a {found} (block_fn={found}): {reason}; only timm's plain {kind} is supported"
        )
    refuse_attention(block.attn, where, attentions)


def refuse_attention(attention: Any, where: str, kinds: tuple[str, ...]) -> None:
    """Refuse an attention that is not known.

    Raises:
        UnsupportedModelError: naming the part and the switch.
    """
    for cause in _attention_problems(attention, kinds):
        raise UnsupportedModelError(f"{where}.attn {cause}")


def _attention_problems(attention: Any, kinds: tuple[str, ...]) -> Iterator[str]:
    kind = type(attention).__name__
    if kind not in kinds:
        reason = REASONS.get(kind, "its parts are unknown")
        yield f"is a {kind} (attn_layer): {reason}; only timm's plain {' and '.join(kinds)} is supported"
        return
    projections = ("proj", "qkv") if getattr(attention, "qkv", None) is not None else ("proj", *APART)
    for name in (*projections, "gate"):
        part = getattr(attention, name, None)
        if not isinstance(part, nn.Linear) and not (part is None and name == "gate"):
            yield f"has a {type(part).__name__} as {name}: only a plain nn.Linear can be told apart by head"
            return
    width = attention.proj.weight.shape[1]
    own = getattr(attention, "head_dim", width // attention.num_heads)
    if width != attention.num_heads * own * (2 if kind == "DiffAttention" else 1):
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

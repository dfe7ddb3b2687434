"""Which of timm's architectural switches a `VisionTransformer` may have; all others are refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from circuitvit.errors import UnsupportedModelError


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


def refuse_unknown_outside(vit: Any) -> None:
    """Refuse a model with a part around its blocks that is not known."""
    if not len(vit.blocks):
        raise UnsupportedModelError("the model has no blocks, so there is no circuit to look for")
    if getattr(vit, "attn_pool", None) is not None:
        kind = type(vit.attn_pool).__name__
        raise UnsupportedModelError(
            f"attn_pool is a {kind} (global_pool={vit.global_pool!r}): attention pooling is not supported, "
            "token and average pooling are"
        )
    if vit.global_pool == "" and not hasattr(vit, "head_dist"):
        raise UnsupportedModelError(
            "global_pool='' gives one vector for each token; the logits must be (batch, class)"
        )


def refuse_unknown_block(block: Any, where: str) -> None:
    """Refuse a block that is not timm's plain one with plain attention; the message names the switch."""
    known = {"Block": "a plain pre-norm block"}
    reasons = {
        "ResPostBlock": "it norms after attention and MLP (post-norm)",
        "ParallelScalingBlock": "its attention and MLP run in parallel",
        "DiffParallelScalingBlock": "its attention and MLP run in parallel, with differential attention",
        "ParallelThingsBlock": "it has several attentions and MLPs in parallel",
    }
    kind = type(block).__name__
    if kind not in known:
        reason = reasons.get(kind, "its parts are unknown")
        raise UnsupportedModelError(
            f"{where} is a {kind} (block_fn={kind}): {reason}; only timm's plain Block is supported"
        )
    for cause in _attention_problems(block.attn):
        raise UnsupportedModelError(f"{where}.attn {cause}")


def _attention_problems(attention: Any) -> Iterator[str]:
    kind = type(attention).__name__
    reasons = {
        "DiffAttention": "differential attention subtracts two patterns",
        "AttentionRope": "rotary position embeddings are not supported yet",
    }
    if kind != "Attention":
        reason = reasons.get(kind, "its parts are unknown")
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

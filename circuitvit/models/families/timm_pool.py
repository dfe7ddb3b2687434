"""timm's `AttentionPoolLatent` (`global_pool="map"`), as SigLIP, SigLIP 2 and the perception encoder have it.

Known: `qk_norm`, `q_proj`, `pos_embed`, `latent_len`, `latent_dim`, `pool_type`, `out_features` of any width,
or 0 (no output projection and no MLP). Other classes are refused by name.

Zhai et al. 2022, "Scaling Vision Transformers", arXiv:2106.04560 (the MAP head).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitvit.errors import UnsupportedModelError
from circuitvit.models.layers import MLPStage
from circuitvit.models.parts import MLP, Attention, Latents, Linear, Norm, norm_of
from circuitvit.models.pooling import POOL, PoolingStage
from circuitvit.models.stages import Stage
from circuitvit.models.timm_import import import_timm


def refuse_pool(pool: Any) -> None:
    """Refuse another attention pooling than `AttentionPoolLatent`, or one that gives several vectors.

    Raises:
        UnsupportedModelError: naming it and its switch.
    """
    if type(pool) is not import_timm().layers.AttentionPoolLatent:
        raise UnsupportedModelError(
            f"attn_pool is a {type(pool).__name__}: only timm's AttentionPoolLatent (global_pool='map') is "
            "known of what pools by attention"
        )
    if pool.pool not in ("token", "avg"):
        raise UnsupportedModelError(
            f"attn_pool gives one vector for each latent (pool_type={pool.pool!r}); the logits must be "
            "(batch, class)"
        )


def attention_pool(
    pool: Any, layer: int, norm: Norm, skip: int, mlp_of: Callable[[nn.Module], MLP]
) -> tuple[Stage, ...]:
    """The stages of an `AttentionPoolLatent`: its attention, and its MLP where it has one.

    Args:
        pool: the module.
        layer: one more than the last block's.
        norm: of the stream, before it.
        skip: how many of the first tokens it is not given.
        mlp_of: from timm's MLPs to parts.
    """
    both, norms = Linear.of(pool.kv), []
    for name, each in (("q_norm", pool.q_norm), ("k_norm", pool.k_norm)):
        norms.append(None if isinstance(each, nn.Identity) else norm_of(each, f"attn_pool.{name}"))
    attention = Attention(
        heads=pool.num_heads,
        query=None,
        key=both.part(0, 2),
        value=both.part(1, 2),
        out=_output(pool),
        scale=pool.scale,
        packed=both,
        query_norm=norms[0],
        key_norm=norms[1],
        latents=Latents(pool.latent, Linear.of(pool.q) if isinstance(pool.q, nn.Linear) else None),
    )
    stage = PoolingStage(layer, norm, attention, skip=skip, positions=pool.pos_embed)
    if pool.mlp is None:
        return (stage,)
    return stage, MLPStage(layer, norm_of(pool.norm, "attn_pool.norm"), mlp_of(pool.mlp), part=POOL)


def pooled(pool: Any, latents: Float[Tensor, "batch latent width"]) -> Float[Tensor, "batch width"]:
    """What an `AttentionPoolLatent` makes of its latents at the end."""
    return latents[:, 0] if pool.pool == "token" else latents.mean(dim=1)


def _output(pool: Any) -> Linear:
    """The output projection; where there is none, heads write side by side."""
    if isinstance(pool.proj, nn.Linear):
        return Linear.of(pool.proj)
    return Linear(torch.eye(pool.kv.weight.shape[1]).to(pool.kv.weight))

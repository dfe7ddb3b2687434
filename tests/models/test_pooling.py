"""Attention pooling: heads whose queries are learned latents, an MLP behind them, and a stream of latents."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import circuitvit as cv
from circuitvit.errors import UnsupportedModelError
from circuitvit.models.timm_import import import_timm
from tests.models import test_hooked
from tests.reference.hooked import HookedModule, Receiver, Sender, gives, written_by_head
from tests.reference.literal_pool import PooledViT
from tests.rightness import CLEAN, CORRUPT, assert_right, finished, micro, prove, task_of

AttentionPoolLatent = import_timm().layers.AttentionPoolLatent

POOLS: dict[str, dict[str, Any]] = {
    "siglip": {},
    "two-latents": {"latent_len": 2},
    "mean-of-three-latents": {"latent_len": 3, "pool_type": "avg", "latent_dim": 10},
    "normed-queries": {"qk_norm": True, "norm_layer": nn.LayerNorm},
    "positions": {"pos_embed": "abs", "feat_size": 4, "qkv_bias": False},
    "latents-are-queries": {"q_proj": False},
    "narrow": {"out_features": 16},
    "wide": {"out_features": 36, "latent_len": 6},
    "attention-alone": {"out_features": 0},
}


def pooled(class_token: bool = False, **pool: Any) -> Any:
    """A micro-model with attention pooling of four patches, after a class token that is not pooled."""
    module = micro(global_pool="map", class_token=class_token)
    if pool:
        module.attn_pool = AttentionPoolLatent(24, num_heads=2, **pool)
        module.head = nn.Linear(module.attn_pool.out_features, 5)
    return finished(module)


def hooked(module: Any) -> HookedModule:
    """Where timm's `VisionTransformer` with `global_pool="map"` keeps its nodes."""
    plain, pool, width = test_hooked.hooked(module), module.attn_pool, module.attn_pool.head_dim
    senders, receivers = dict(plain.senders), dict(plain.receivers)

    def given_to_pool(normed: Tensor) -> Tensor:
        tokens = normed[:, module.num_prefix_tokens :]
        return tokens if pool.pos_embed is None else tokens + pool.pos_embed

    def given_to_readout(latents: Tensor) -> Tensor:
        return latents[:, 0] if pool.pool == "token" else latents.mean(dim=1)

    for head in range(pool.num_heads):
        written = written_by_head(head, width)
        if isinstance(pool.proj, nn.Identity):
            written = alone(head, width)
        senders[f"pool.h{head}"] = Sender(pool.proj, written)
        for port, name in enumerate("kv"):
            first = (port * pool.num_heads + head) * width
            columns = slice(first, first + width)
            place = Receiver(module.norm, pool.kv, columns, between=given_to_pool)
            receivers[f"pool.h{head}<{name}>"] = place
    if pool.mlp is not None:
        senders["pool.mlp"] = Sender(pool.mlp, gives)
        receivers["pool.mlp"] = Receiver(pool.norm, pool.norm)
    receivers["logits"] = Receiver(module.fc_norm, module.fc_norm, pool=given_to_readout)
    return HookedModule(module, senders, receivers)


def alone(head: int, width: int) -> Any:
    """What a head writes where heads are put side by side."""

    def of(projection: Any, joined: Tensor, _: Tensor) -> Tensor:
        written = torch.zeros_like(joined)
        written[..., head * width : (head + 1) * width] = joined[..., head * width : (head + 1) * width]
        return written

    return of


@pytest.mark.parametrize("options", POOLS.values(), ids=POOLS)
def test_edges_are_those_of_hooks_on_the_original(options: dict[str, Any]) -> None:
    module = pooled(**options)
    prove(cv.wrap(module), hooked(module), CLEAN, CORRUPT)


@pytest.mark.parametrize("options", POOLS.values(), ids=POOLS)
def test_masked_runs_and_scores_are_the_literal_ones(options: dict[str, Any]) -> None:
    module = pooled(class_token=True, **options)
    assert_right(cv.wrap(module), module, PooledViT(module))


def test_no_edge_leads_past_the_pool() -> None:
    edges = cv.wrap(pooled()).graph.edges
    assert {"m1->pool.h0<k>", "pool.h1->pool.mlp", "pool.mlp->logits"} <= set(edges)
    assert not [edge for edge in edges if edge.endswith(("->logits", "->pool.mlp")) and edge[0] != "p"]


def test_the_pooled_token_is_a_group_of_its_own() -> None:
    model = cv.wrap(pooled(class_token=True))
    scores = cv.attribute(model, task_of(groups="kind"), "exact", progress=False)
    assert scores.graph.groups == ("cls", "patch", "pool")
    edges = set(scores.graph.edges)
    assert {"m1->pool.h0<v>@cls", "m1->pool.h0<v>@patch", "pool.h0->logits@pool"} <= edges
    assert not {"m1->pool.h0<v>@pool", "pool.h0->logits@cls", "pool.h0->logits@patch"} & edges
    assert np.abs(scores.values[scores.graph.edge_index("pool.h0->logits@pool")]) > 1e-3
    # the class token is not pooled, and says what it says through other tokens alone
    assert abs(scores.values[scores.graph.edge_index("m1->pool.h0<v>@cls")]) < 1e-12


def test_another_pool_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match=r"attn_pool is a AttentionPoolPrr.*global_pool='map'"):
        cv.wrap(micro(global_pool="prr"))
    with pytest.raises(UnsupportedModelError, match="pool_type=''"):
        cv.wrap(pooled(pool_type=""))

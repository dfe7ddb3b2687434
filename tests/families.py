"""A micro-model of every family, and where each keeps what can be read and changed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

import circuitvit as cv
from tests import hf_models
from tests.models import (
    test_gated,
    test_hf_video,
    test_hf_vit,
    test_hooked,
    test_multihead,
    test_parallel,
    test_pooling,
    test_timm_naflex,
    test_timm_positions,
)
from tests.reference.hooked import HookedModule, Receiver
from tests.reference.sites import Original
from tests.rightness import micro


@dataclass(frozen=True)
class Family:
    """How to make a micro-model and what is known of it.

    Attributes:
        build: makes the module.
        wrap: makes it a model.
        nodes: where it keeps its nodes.
        blocks: its blocks.
        mlps: of a block, in order, by what comes after the layer in their names.
        shape: of an image or a clip.
        options: of `Original`.
        branches: attentions of a block.
        prepared: a copy of the module, so that its attention is torch's function.
    """

    build: Callable[[], Any]
    nodes: Callable[[Any], HookedModule]
    blocks: Callable[[Any], Any] = lambda module: module.blocks
    mlps: Callable[[Any], list[Any]] = lambda block: [block.mlp]
    wrap: Callable[[Any], cv.Model] = cv.wrap
    shape: tuple[int, ...] = (3, 32, 32)
    options: dict[str, Any] | None = None
    branches: int = 1
    prepared: Callable[[Any], Any] = lambda module: module

    def make(self) -> tuple[cv.Model, Original]:
        module = self.build()
        own = self.prepared(copy.deepcopy(module))
        nodes = self.nodes(own)
        own = nodes.run if isinstance(nodes.run, nn.Module) else own
        blocks = self.blocks(own)
        neurons = {}
        for layer, block in enumerate(blocks):
            for number, mlp in enumerate(self.mlps(block)):
                neurons[f"m{layer}.{number}" if number else f"m{layer}"] = last_linear(mlp)
        heads = [
            [f"a{layer}.h{branch * 2 + head}" for head in range(2)]
            for layer in range(len(blocks))
            for branch in range(self.branches)
        ]
        if "pool.h0" in nodes.senders:
            heads.append([name for name in nodes.senders if name.startswith("pool.h")])
            if "pool.mlp" in nodes.senders:
                mlp = nodes.senders["pool.mlp"].module
                neurons["pool.mlp"] = last_linear(mlp)
        options = dict(self.options or {})
        if "pool" in options:
            options["pool"] = options["pool"](own)
        model = self.wrap(module)
        skipped = (
            len(model.prefix)
            if not getattr(own, "pool_include_prefix", True) or "pool.h0" in nodes.senders
            else 0
        )
        return model, Original(nodes, blocks, neurons, heads, skipped=skipped, **options)

    def images(self, count: int = 2, seed: int = 0) -> Tensor:
        drawn = torch.randn(count, *self.shape, generator=torch.Generator().manual_seed(seed))
        return drawn.bfloat16().double()


def last_linear(mlp: Any) -> tuple[nn.Module, slice | None]:
    """What reads an MLP's neurons, or where that is said, its columns that do."""
    if isinstance(mlp, tuple):
        return mlp
    return [part for part in mlp.modules() if isinstance(part, nn.Linear)][-1], None


def _proved(name: str) -> Family:
    """One of transformers' models, whose nodes are where another test proves them to be."""
    last, places = test_hf_vit.PROOFS[name]

    def nodes(module: Any) -> HookedModule:
        norm = module.get_submodule(last)
        reads = Receiver(norm, norm, pool=lambda stream: stream[:, 0] if "clip" in name else stream)
        return hf_models.hooked(module, **{"attention": "attention", "out": "o_proj", **places}, last=reads)

    return Family(
        lambda: test_hf_vit.micro(name), nodes, attrgetter(places["blocks"]), wrap=test_hf_vit.wrapped
    )


def _with_biases(module: Any) -> HookedModule:
    """Nodes of timm's with biases of their own, which their projections are given."""
    nodes = test_timm_positions.hooked(module)
    for block in nodes.run.blocks:  # type: ignore[attr-defined]
        own = block.attn
        if own.qkv is not None and own.q_bias is not None:
            none = torch.zeros_like(own.q_bias) if own.k_bias is None else own.k_bias
            own.qkv.bias = nn.Parameter(torch.cat([own.q_bias, none, own.v_bias]))
            own.q_bias = None
    return nodes


def _fused(module: Any) -> HookedModule:
    """Blocks with one output projection, and a mean over patches before the last norm."""
    nodes = test_parallel.scaling(module)
    first = module.num_prefix_tokens
    last = Receiver(module.fc_norm, module.fc_norm, pool=lambda stream: stream[:, first:].mean(dim=1))
    return HookedModule(module, nodes.senders, {**nodes.receivers, "logits": last})


def _without_weights(module: Any) -> Any:
    """SigLIP's pool asks torch for weights that it does not use, by way of another function."""
    pool = module.head.attention
    pool.forward = partial(pool.forward, need_weights=False)
    return module


def _from_places(x: Tensor) -> Tensor:
    """What TimeSformer has for each place and time, with the class token, for which it has nothing."""
    patches = x.reshape(-1, test_hf_video.PLACES * test_hf_video.FRAMES, x.shape[-1])
    return torch.cat([torch.full_like(patches[:, :1], math.nan), patches], dim=1)


def _from_frames(x: Tensor) -> Tensor:
    """What TimeSformer has in each frame, of the class token the mean."""
    found = x.unflatten(0, (-1, test_hf_video.FRAMES))
    patches = found[:, :, 1:].transpose(1, 2).flatten(1, 2)
    return torch.cat([found[:, :, 0].mean(dim=1, keepdim=True), patches], dim=1)


def _timm(
    build: Callable[[], Any], nodes: Callable[[Any], HookedModule] = test_hooked.hooked, **others: Any
) -> Family:
    return Family(build, nodes, **others)


def _clip(build: Callable[[], Any], nodes: Callable[[Any], HookedModule], blocks: str, mlp: str) -> Family:
    return Family(
        build, nodes, attrgetter(blocks), lambda block: [attrgetter(mlp)(block)], shape=(4, 3, 16, 16)
    )


def _multihead(module: Any) -> HookedModule:
    if hasattr(module, "encoder"):
        return test_multihead.hooked(module, module.encoder.layers, "self_attention", module.encoder.ln)
    return test_multihead.hooked(module, module.transformer.resblocks, "attn", module.ln_post)


FAMILIES: dict[str, Family] = {
    "timm": _timm(micro),
    "timm, registers": _timm(partial(micro, reg_tokens=2, init_values=0.1, qk_norm=True)),
    "timm, average": _timm(partial(micro, global_pool="avg", fc_norm=False)),
    "timm, gated": _timm(test_gated.gated, test_gated.hooked_gates),
    "timm, gated and normed together": _timm(test_gated.gated_together, test_gated.hooked_gates),
    "timm, differential": _timm(test_gated.differential, options={"looks": False}),
    "timm, parallel": _timm(
        test_parallel.ALL["apart"], test_parallel.scaling, mlps=lambda block: [block.mlp_out_proj]
    ),
    "timm, parallel and fused": _timm(
        test_parallel.ALL["fused"],
        _fused,
        mlps=lambda block: [(block.out_proj, slice(block.in_split[1], None))],
    ),
    "timm, two of each": _timm(
        test_parallel.ALL["two-of-each"],
        test_parallel.things,
        mlps=lambda block: [branch.mlp for branch in block.ffns],
        branches=2,
    ),
    "timm, pool": _timm(
        test_pooling.pooled, test_pooling.hooked, options={"pool": lambda module: module.attn_pool}
    ),
    "timm, pool beside a class token": _timm(
        partial(test_pooling.pooled, True),
        test_pooling.hooked,
        options={"pool": lambda module: module.attn_pool},
    ),
    "timm, rotary": _timm(test_timm_positions.ALL["Eva-rotary"], _with_biases),
    "timm, norm across heads": _timm(test_timm_positions.ALL["Eva-norm-across-heads"], _with_biases),
    "timm, relative": _timm(test_timm_positions.ALL["Beit-both-tables"], _with_biases),
    "timm, NaFlex": _timm(
        partial(test_timm_naflex.naflex, class_token=True, reg_tokens=2, global_pool="token"),
        wrap=partial(cv.wrap, preprocessing=test_timm_naflex.SPEC),
    ),
    "torchvision": Family(test_multihead.torchvision_vit, _multihead, attrgetter("encoder.layers")),
    "open_clip": Family(
        test_multihead.open_clip_tower,
        _multihead,
        attrgetter("transformer.resblocks"),
        wrap=partial(cv.wrap, classes=test_multihead.NAMES),
    ),
    **{
        f"transformers, {name}": _proved(name)
        for name in (
            "vit, classes",
            "dinov2, registers and classes",
            "dinov3",
            "beit, shared",
            "clip, projected",
        )
    },
    "transformers, siglip": Family(
        lambda: test_hf_vit.micro("siglip"),
        hf_models.siglip,
        attrgetter("encoder.layers"),
        wrap=test_hf_vit.wrapped,
        prepared=_without_weights,
        options={"pool": lambda module: module.head},
    ),
    "transformers, vivit": _clip(test_hf_video.vivit, test_hf_video.hooked_vivit, "vivit.layers", "mlp"),
    "transformers, timesformer": Family(
        test_hf_video.timesformer,
        test_hf_video.hooked_timesformer,
        attrgetter("timesformer.encoder.layer"),
        lambda block: [block.output],
        shape=(4, 3, 16, 16),
        options={"looks": False, "arranged": {"t": _from_places, "a": _from_frames}, "second": "mid{}.2"},
    ),
}


@cache
def made(name: str) -> tuple[cv.Model, Original]:
    """A model and its original, for tests that change neither."""
    return FAMILIES[name].make()

"""Modules that are nearly of a known class, and things that users do to them: right, or refused by name."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import circuitvit as cv
from circuitvit.engine import Evaluator
from circuitvit.errors import CircuitViTError, DataError, ModelError, OptionError, UnsupportedModelError
from circuitvit.models import registry
from circuitvit.models.families.timm_vit import TimmViT
from circuitvit.models.timm_import import import_timm
from tests.reference import literal_methods, literal_scores
from tests.reference.literal_methods import RelevanceViT
from tests.reference.literal_module import ModuleViT
from tests.reference.literal_vit import LiteralViT
from tests.rightness import (
    CLEAN,
    CORRUPT,
    METRIC,
    MICRO,
    VisionTransformer,
    assert_right,
    assert_right_or_refused,
    drawn_circuit,
    finished,
    formula,
    micro,
    scored,
    task_of,
    wrapped_or_told,
)
from tests.strategies import Recipe, assert_close, assert_same_scores

timm = import_timm()
Block = timm.models.vision_transformer.Block
layers = timm.layers


# -- sizes at the edges ----------------------------------------------------------------------------


def with_d_head(width: int, heads: int, d_head: int, **options: Any) -> Any:
    module = VisionTransformer(**{**MICRO, **options, "embed_dim": width, "num_heads": 1})
    for block in module.blocks:
        block.attn = layers.Attention(width, heads, attn_head_dim=d_head, qkv_bias=True)
    return finished(module)


ODD: dict[str, Callable[[], Any]] = {
    "one-head": partial(micro, num_heads=1),
    "one-block": partial(micro, depth=1),
    "one-head-one-block": partial(micro, num_heads=1, depth=1),
    "odd-width": partial(micro, embed_dim=25, num_heads=5),
    "heads-that-do-not-fill-the-width": partial(with_d_head, 25, 3, 7),
    "heads-wider-than-the-stream": partial(with_d_head, 10, 2, 16),
    "heads-of-width-one": partial(micro, embed_dim=6, num_heads=6),
    "one-patch": partial(micro, patch_size=32),
    "one-patch-no-class-token": partial(micro, patch_size=32, class_token=False, global_pool="avg"),
    "one-logit-and-one": partial(micro, num_classes=2),
    "four-registers-no-class-token": partial(micro, reg_tokens=4, class_token=False, global_pool="max"),
}


@pytest.mark.parametrize("build", ODD.values(), ids=ODD)
def test_odd_sizes_are_right(build: Callable[[], Any]) -> None:
    assert_right_or_refused(build(), refusable=False)


# -- shared and unusual tensors --------------------------------------------------------------------


def with_tied_weights() -> Any:
    module = VisionTransformer(**MICRO)
    module.blocks[1].attn.qkv.weight = module.blocks[0].attn.qkv.weight
    module.blocks[1].mlp.fc1 = module.blocks[0].mlp.fc1
    return finished(module)


def with_tied_blocks() -> Any:
    """One block that runs twice, as in ALBERT."""
    module = VisionTransformer(**MICRO)
    module.blocks = nn.Sequential(module.blocks[0], module.blocks[0])
    return finished(module)


def with_tied_norms() -> Any:
    module = VisionTransformer(**MICRO)
    module.blocks[0].norm2 = module.blocks[0].norm1
    return finished(module)


def with_weights_as_buffers() -> Any:
    module = micro(init_values=0.5)
    for part, name in (
        (module.blocks[0].attn.qkv, "weight"),
        (module.blocks[0].norm1, "weight"),
        (module.blocks[1].ls1, "gamma"),
        (module.blocks[1].mlp.fc2, "bias"),
    ):
        tensor = getattr(part, name).detach().clone()
        delattr(part, name)
        part.register_buffer(name, tensor)
    return module


def with_weights_that_are_views() -> Any:
    """Rows of one large tensor, not contiguous, as flattened optimizers leave them."""
    module = micro()
    store = torch.randn(24, 2 * 72, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) / 5
    module.blocks[0].attn.qkv.weight = nn.Parameter(store[:, ::2].t())
    return module


def with_gradient_checkpoints() -> Any:
    module = micro()
    module.set_grad_checkpointing(True)
    return module


SHARED: dict[str, Callable[[], Any]] = {
    "tied-weights": with_tied_weights,
    "tied-norms": with_tied_norms,
    "weights-as-buffers": with_weights_as_buffers,
    "weights-that-are-views": with_weights_that_are_views,
    "gradient-checkpoints": with_gradient_checkpoints,
}


@pytest.mark.parametrize("build", SHARED.values(), ids=SHARED)
def test_unusual_tensors_are_right(build: Callable[[], Any]) -> None:
    assert_right_or_refused(build(), refusable=False)


def test_a_block_that_runs_twice_is_right_or_refused() -> None:
    assert_right_or_refused(with_tied_blocks(), ("blocks",))


def edited_data(module: Any) -> None:
    module.blocks[0].norm1.weight.data.mul_(1.7)
    module.blocks[1].attn.proj.weight.data[0] += 1


def edited_buffer(module: Any) -> None:
    module.blocks[0].norm1.weight.mul_(1.7)


def replaced_buffer(module: Any) -> None:
    module.blocks[1].ls1.gamma = module.blocks[1].ls1.gamma * 1.7


def replaced_parameter(module: Any) -> None:
    module.blocks[1].attn.proj = nn.Linear(24, 24).double().eval()


def assigned_state(module: Any) -> None:
    state = {name: 1.3 * tensor for name, tensor in module.state_dict().items()}
    module.load_state_dict(state, assign=True)


def moved_back_and_forth(module: Any) -> None:
    module.float().double()


def edited_through_numpy(module: Any) -> None:
    module.blocks[0].norm1.weight.detach().numpy()[:] *= 1.7


def set_data(module: Any) -> None:
    weight = module.blocks[0].attn.proj.weight
    weight.data = weight.data * 1.7


EDITS: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "by-way-of-data": (micro, edited_data),
    "data-that-is-set": (micro, set_data),
    "through-numpy": (micro, edited_through_numpy),
    "of-a-buffer": (with_weights_as_buffers, edited_buffer),
    "by-a-buffer-that-is-replaced": (with_weights_as_buffers, replaced_buffer),
    "by-a-part-that-is-replaced": (micro, replaced_parameter),
    "by-load-with-assign": (micro, assigned_state),
    "by-a-change-of-dtype-and-back": (micro, moved_back_and_forth),
}


@pytest.mark.parametrize("ask", ["run", "eap", "local", "exact"])
@pytest.mark.parametrize(("build", "edit"), EDITS.values(), ids=EDITS)
def test_edits_that_torch_does_not_count_are_seen_or_refused(
    build: Callable[[], Any], edit: Callable[[Any], None], ask: str
) -> None:
    """The same numbers as from a fresh wrap, or an error of ours that says to wrap again."""
    module = build()
    model = cv.wrap(module)
    circuit = drawn_circuit(model.graph, 0.4)

    def answer(model: cv.Model) -> Tensor:
        if ask == "run":
            return cv.run(model, task_of(), circuit)
        return torch.tensor(list(scored(model, ask).values()))

    answer(model)
    edit(module)
    refusal, found = "", None
    try:
        found = answer(model)
    except CircuitViTError as error:
        refusal = str(error)
    if found is None:
        assert "wrap" in refusal
    else:
        assert_close(found, answer(cv.wrap(module)))


def with_old_weight_norm(place: str) -> Any:
    """torch's older weight norm, which computes the weight in a hook before every forward."""
    module = micro()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(module.get_submodule(place))
    with torch.no_grad():
        module(CLEAN)  # after this the weight is a plain tensor, which can be copied
    return module


@pytest.mark.parametrize("place", ["blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.1.mlp.fc1", "head"])
def test_weight_norm_of_the_older_kind_is_right_or_refused_also_after_training(place: str) -> None:
    module = with_old_weight_norm(place)
    model = wrapped_or_told(module)
    if isinstance(model, str):
        assert place in model or "weight_norm" in model
        return
    with torch.no_grad():
        module.get_submodule(place).weight_g.mul_(1.5)
        module(CLEAN)
    assert_right(model, module, ModuleViT(module))


# -- MLPs that are not quite MLPs ------------------------------------------------------------------


class Wrapped(nn.Module):
    def __init__(self, in_features: int, hidden_features: int, **_: Any) -> None:
        super().__init__()
        self.inner = layers.Mlp(in_features, hidden_features)


class ToClass(Wrapped):
    """Carries the mean of the patches to the class token, and nothing else to anyone."""

    def forward(self, x: Tensor) -> Tensor:
        written = self.inner(x)
        first = written[:, :1] + x[:, 1:].mean(dim=1, keepdim=True)
        return torch.cat([first, written[:, 1:]], dim=1)


class FromClass(Wrapped):
    """Carries the class token to the patches."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.cat([x[:, :1], x[:, 1:] + x[:, :1]], dim=1))


class Neighbours(Wrapped):
    """Carries the last token to the one before it."""

    def forward(self, x: Tensor) -> Tensor:
        written = self.inner(x)
        return torch.cat([written[:, :-2], written[:, -2:-1] + x[:, -1:], written[:, -1:]], dim=1)


class LastToFirst(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        written = self.inner(x)
        return torch.cat([written[:, :1] + x[:, -1:], written[:, 1:]], dim=1)


class ByPosition(Wrapped):
    """Keeps tokens apart, but treats each as its place says."""

    def __init__(self, in_features: int, hidden_features: int, **_: Any) -> None:
        super().__init__(in_features, hidden_features)
        self.place = nn.Parameter(torch.zeros(5, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + self.place)


class InPlace(Wrapped):
    """Works in its own input, which nobody else needs any more where it comes from."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.mul_(1.5).add_(0.25))


class HoldsATensor(Wrapped):
    """With a tensor that is neither parameter nor buffer."""

    def __init__(self, in_features: int, hidden_features: int, **_: Any) -> None:
        super().__init__(in_features, hidden_features)
        self.factor = torch.linspace(0.5, 1.5, in_features, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.factor)


class GatedByNothing(Wrapped):
    """Mixes tokens by a strength that is zero until somebody trains it."""

    def __init__(self, in_features: int, hidden_features: int, **_: Any) -> None:
        super().__init__(in_features, hidden_features)
        self.strength = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + self.strength * x.mean(dim=1, keepdim=True))


MLPS = [ToClass, FromClass, Neighbours, LastToFirst, ByPosition, InPlace, HoldsATensor]


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("mlp", MLPS)
def test_whatever_an_mlp_does_with_tokens_is_right_or_refused(mlp: type, pool: str) -> None:
    assert_right_or_refused(micro(mlp_layer=mlp, global_pool=pool), ("blocks.0.mlp", "blocks.0"))


@pytest.mark.parametrize("tokens", [2, 3, 4, 6])
@pytest.mark.parametrize("mlp", [ToClass, LastToFirst, Neighbours])
def test_mixing_is_found_whatever_the_number_of_tokens(mlp: type, tokens: int) -> None:
    """Told by the graph: an edge into an MLP that mixes is alive for every group of tokens."""
    size = {"img_size": (16, 16 * (tokens - 1)), "mlp_layer": mlp}
    model = wrapped_or_told(micro(**size))
    if not isinstance(model, str):
        mixes = [stage.nodes.mixes for stage in model.stages if stage.nodes.kind == "mlp"]
        assert mixes == [(True,), (True,)]


def test_an_mlp_that_begins_to_mix_is_right_or_refused() -> None:
    module = micro(mlp_layer=GatedByNothing)
    with torch.no_grad():
        for block in module.blocks:
            block.mlp.strength.zero_()
    model = wrapped_or_told(module)
    if isinstance(model, str):
        assert "blocks.0" in model
        return
    with torch.no_grad():
        for block in module.blocks:
            block.mlp.strength.fill_(0.7)
    assert_right(model, module, ModuleViT(module))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.Hardswish])
def test_activations_that_work_in_place_are_right(activation: type) -> None:
    module = micro(act_layer=partial(activation, inplace=True))
    assert_right_or_refused(module, refusable=False)


class PlainRelevanceViT(RelevanceViT):
    """The literal rules with the activation as a formula that changes nothing in place."""

    def activation(self, module: nn.Module, x: Tensor) -> Tensor:
        plain = type(module)()
        return x * (plain(x) / x).detach()


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.Hardswish])
def test_rules_for_activations_that_work_in_place_are_those_of_others(activation: type) -> None:
    module = micro(act_layer=partial(activation, inplace=True))
    reference = literal_scores.patch_reference(ModuleViT(module), CORRUPT)
    told = literal_scores.eap(PlainRelevanceViT(module), CLEAN, reference, formula)
    assert_same_scores(scored(cv.wrap(module), "relp"), {name: float(score) for name, score in told.items()})


# -- what hides from a check -----------------------------------------------------------------------


class QuietAttention(layers.Attention):  # type: ignore[misc, name-defined]
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return 0.95 * super().forward(x, attn_mask, is_causal)


QuietAttention.__name__ = "Attention"


def behind(change: Callable[[Any], None], dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    module = VisionTransformer(**{**MICRO, "init_values": 0.5, **options})
    for block in module.blocks:
        block.attn = QuietAttention(24, 2, qkv_bias=True)
    module = finished(module)
    with torch.no_grad():
        for block in module.blocks:
            change(block)
    return module.to(dtype)


def faint_attention(block: Any) -> None:
    block.ls1.gamma.fill_(1e-6)


def huge_mlp(block: Any) -> None:
    block.ls2.gamma.fill_(1e7)


def faint_projection(block: Any) -> None:
    block.attn.proj.weight.mul_(1e-7)
    block.attn.proj.bias.zero_()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hide", [faint_attention, huge_mlp, faint_projection])
def test_attention_that_does_less_cannot_hide_behind_the_mlp(
    hide: Callable[[Any], None], dtype: torch.dtype
) -> None:
    """LayerScale may be 1e-6 for attention alone: a stage is measured by what it adds, not by its block."""
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0"):
        cv.wrap(behind(hide, dtype))


class QuietEnd(VisionTransformer):  # type: ignore[misc, valid-type]
    """What comes out of the final norm is less than it is."""

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return 0.95 * super().forward_features(x)


class QuietStart(VisionTransformer):  # type: ignore[misc, valid-type]
    """Something happens between the embedding and the first block."""

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        embedded = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        return self.norm(self.blocks(0.95 * embedded))


class QuietMiddle(VisionTransformer):  # type: ignore[misc, valid-type]
    """Something happens between two blocks."""

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        stream = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        for block in self.blocks:
            stream = 0.95 * block(stream)
        return self.norm(stream)


class Residual(VisionTransformer):  # type: ignore[misc, valid-type]
    """The readout also gets a hundredth of the embedding, past all blocks."""

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        stream = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        return self.norm(self.blocks(stream) + 0.01 * stream)


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", [QuietEnd, QuietStart, QuietMiddle, Residual])
def test_what_happens_between_parts_is_found_in_every_precision(family: type, dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedModelError, match="does something"):
        cv.wrap(micro(family).to(dtype))


@pytest.mark.parametrize("family", [QuietEnd, QuietStart, QuietMiddle])
def test_also_behind_a_head_that_is_zero(family: type) -> None:
    module = micro(family)
    nn.init.zeros_(module.head.weight)
    nn.init.zeros_(module.head.bias)
    with pytest.raises(UnsupportedModelError, match="does something"):
        cv.wrap(module)


class ClassAndMean(VisionTransformer):  # type: ignore[misc, valid-type]
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.head = nn.Linear(2 * self.embed_dim, self.num_classes)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        return torch.cat([x[:, 0], x[:, self.num_prefix_tokens :].mean(dim=1)], dim=-1)


def test_a_probe_whose_half_for_the_patches_is_still_zero_is_right_once_it_is_trained() -> None:
    module = micro(ClassAndMean)
    trained = module.head.weight.detach().clone()
    with torch.no_grad():
        module.head.weight[:, 24:] = 0
    model = cv.wrap(module)
    cv.run(model, task_of(), drawn_circuit(model.graph, 0.5))
    with torch.no_grad():
        module.head.weight.copy_(trained)
    assert_right(model, module, ModuleViT(module))


def test_a_norm_whose_weight_is_zero_in_places_is_right_once_it_is_trained() -> None:
    module = micro(init_values=0.5)
    with torch.no_grad():
        module.norm.weight[::2] = 0
        module.blocks[1].ls1.gamma.zero_()
        module.blocks[0].attn.proj.weight.zero_()
    model = cv.wrap(module)
    scored(model, "local")
    with torch.no_grad():
        module.norm.weight[::2] = 1.5
        module.blocks[1].ls1.gamma.fill_(0.4)
        module.blocks[0].attn.proj.weight.copy_(module.blocks[1].attn.proj.weight)
    assert_right(model, module, ModuleViT(module))


class LoRA(nn.Linear):
    """A Linear by its class with a low-rank branch, whose second factor is zero in the beginning."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.down, self.up = nn.Linear(in_features, 2, bias=False), nn.Linear(2, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up(self.down(x))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    ("place", "sizes"),
    [("attn.qkv", (24, 72)), ("attn.proj", (24, 24)), ("mlp.fc1", (24, 48)), ("mlp.fc2", (48, 24))],
)
def test_low_rank_branches_are_right_or_refused(place: str, sizes: tuple[int, int], trained: bool) -> None:
    module = VisionTransformer(**MICRO)
    module.set_submodule(f"blocks.0.{place}", LoRA(*sizes))
    module = finished(module)
    branch = module.get_submodule(f"blocks.0.{place}").up.weight
    with torch.no_grad():
        branch.mul_(float(trained))
    model = assert_right_or_refused(module, (f"blocks.0.{place}", "blocks.0"))
    if model is not None:
        with torch.no_grad():
            branch.add_(0.3)
        assert_right(model, module, ModuleViT(module))


class Doubling(nn.Identity):
    """An Identity by its class, and not by what it does."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


PLACES = (
    "norm_pre",
    "pos_drop",
    "patch_drop",
    "blocks.0.ls1",
    "blocks.1.ls2",
    "blocks.0.drop_path1",
    "blocks.1.drop_path2",
    "blocks.0.attn.q_norm",
    "blocks.0.attn.norm",
    "blocks.0.attn.attn_drop",
    "blocks.0.attn.proj_drop",
    "blocks.1.mlp.norm",
    "blocks.1.mlp.drop1",
    "fc_norm",
    "head_drop",
)


@pytest.mark.parametrize("place", PLACES)
def test_an_identity_that_is_none_is_right_or_refused(place: str) -> None:
    module = micro()
    module.set_submodule(place, Doubling())
    assert_right_or_refused(module.eval(), (".".join(place.split(".")[:2]),))


class SameBlock(Block):  # type: ignore[misc, valid-type]
    """A subclass that adds a method and computes the same."""


SameBlock.__name__ = "Block"


class CausalBlock(Block):  # type: ignore[misc, valid-type]
    """The same parts, but no token sees those after it."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return super().forward(x, is_causal=True)


CausalBlock.__name__ = "Block"


def test_a_block_that_computes_the_same_is_right() -> None:
    assert_right_or_refused(micro(block_fn=SameBlock), refusable=False)


def test_a_block_with_a_mask_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0"):
        cv.wrap(micro(block_fn=CausalBlock))


def test_another_scale_of_scores_is_right_or_refused() -> None:
    module = micro()
    for block in module.blocks:
        block.attn.scale, block.attn.fused_attn = 0.9, False
    assert_right_or_refused(module, ("blocks.0",), literal=ModuleViT(module))


@pytest.mark.parametrize("name", ["pool", "forward_head", "_pos_embed", "forward_features", "norm.forward"])
def test_a_method_replaced_on_the_object_is_right_or_refused(name: str) -> None:
    module = micro()
    where, _, method = name.rpartition(".")
    part = module.get_submodule(where)
    own = getattr(part, method)
    setattr(part, method, lambda *inputs, **options: 0.9 * own(*inputs, **options))
    assert_right_or_refused(module, (where, name, "VisionTransformer"), literal=ModuleViT(module))


# -- other methods, and what lies between wrapping and asking --------------------------------------


class PoolsGeM(VisionTransformer):  # type: ignore[misc, valid-type]
    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        return x.clamp_min(1e-3).pow(3).mean(dim=1).pow(1 / 3)


METHODS: dict[str, Callable[..., dict[str, float]]] = {
    "eap-ig": lambda model, reference: literal_scores.eap_ig(model, CLEAN, reference, formula, 5, "midpoint"),
    "ceap": lambda model, reference: literal_methods.ceap(model, CLEAN, reference, formula, 5),
    "ifr": lambda model, reference: literal_methods.ifr(model, CLEAN),
    "atp-qk": lambda model, reference: literal_methods.atp_qk(model, CLEAN, reference, formula),
}
UNUSUAL: dict[str, Callable[[], Any]] = {
    "gem": partial(micro, PoolsGeM),
    "class-and-mean": partial(micro, ClassAndMean),
    "an-mlp-that-mixes": partial(micro, mlp_layer=ToClass),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("build", UNUSUAL.values(), ids=UNUSUAL)
def test_every_method_is_right_for_unusual_modules_too(build: Callable[[], Any], method: str) -> None:
    module = build()
    literal = ModuleViT(module)
    told = METHODS[method](literal, literal_scores.patch_reference(literal, CORRUPT))
    assert_same_scores(scored(cv.wrap(module), method), {name: float(score) for name, score in told.items()})


class OwnPoolRelevanceViT(RelevanceViT):
    def readout(self, stream: Tensor) -> Tensor:
        pooled = self.vit.pool(self.norm(self.vit.norm, stream))
        return self.linear(self.vit.head, self.norm(self.vit.fc_norm, pooled))


@pytest.mark.parametrize("family", [PoolsGeM, ClassAndMean])
def test_backward_rules_reach_the_norm_before_a_pooling_of_ones_own(family: type) -> None:
    module = micro(family)
    reference = literal_scores.patch_reference(ModuleViT(module), CORRUPT)
    told = literal_scores.eap(OwnPoolRelevanceViT(module), CLEAN, reference, formula)
    assert_same_scores(scored(cv.wrap(module), "relp"), {name: float(score) for name, score in told.items()})


HEADS: dict[str, Callable[[], nn.Module]] = {
    "put-on-after-eval": lambda: nn.Linear(24, 5),
    "of-two-layers": lambda: nn.Sequential(nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 5)).eval(),
    "behind-a-batch-norm": lambda: nn.Sequential(nn.BatchNorm1d(24), nn.Linear(24, 5)).eval(),
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_a_head_of_ones_own_is_right(head: Callable[[], nn.Module]) -> None:
    module = micro()
    module.head = head().double()
    assert_right_or_refused(module, refusable=False)


@pytest.mark.parametrize("ablation", ["patch", "mean", "zero"])
@pytest.mark.parametrize("metric", [cv.logit_diff(0, 1), cv.kl_divergence()], ids=lambda metric: metric.name)
def test_a_task_prepared_before_an_edit_is_right_after_it(metric: Any, ablation: str) -> None:
    module = micro()
    model, task = cv.wrap(module), cv.Task(CLEAN, CORRUPT, metric, ablation=ablation)
    prepared, circuit = task.prepare(model), drawn_circuit(model.graph, 0.4)
    cv.run(model, prepared, circuit)
    cv.attribute(model, prepared, "exact", progress=False)
    scale_some(module)
    fresh = cv.wrap(module)
    assert_close(cv.run(model, prepared, circuit), cv.run(fresh, task, circuit))
    found, told = (
        cv.attribute(each, given, "exact", progress=False).to_dict()
        for each, given in ((model, prepared), (fresh, task))
    )
    assert_same_scores(found, told)


def scale_some(module: Any) -> None:
    with torch.no_grad():
        module.blocks[0].norm1.weight.mul_(1.7)
        module.blocks[1].mlp.fc2.weight.mul_(1.5)


@pytest.mark.parametrize("edit", [scale_some, edited_data], ids=["counted", "by-way-of-data"])
def test_an_evaluator_forgets_what_it_measured_before_an_edit(edit: Callable[[Any], None]) -> None:
    module = micro()
    model = cv.wrap(module)
    kept, evaluator = drawn_circuit(model.graph, 0.4).kept, Evaluator(task_of().prepare(model))
    before = evaluator.values(kept)
    edit(module)
    model.refresh()  # as every public function does: torch does not count edits by way of .data
    fresh = Evaluator(task_of().prepare(cv.wrap(module)))
    assert not np.allclose(before, fresh.values(kept))
    assert np.allclose(evaluator.values(kept), fresh.values(kept))
    assert np.allclose(evaluator.whole, fresh.whole)
    assert evaluator.faithfulness(kept) == pytest.approx(fresh.faithfulness(kept))


# -- around the model ------------------------------------------------------------------------------


def test_the_users_module_is_as_it_was() -> None:
    module = micro(init_values=0.5)
    module.blocks[0].attn.qkv.weight.requires_grad_(False)
    handle = module.norm.register_forward_hook(lambda *_: None)
    flags = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    values = copy.deepcopy(module.state_dict())
    model = cv.wrap(module)
    for method in ("eap", "local", "exact", "relp"):
        scored(model, method)
    assert flags == {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    assert all(torch.equal(values[name], tensor) for name, tensor in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert list(module.norm._forward_hooks) == [handle.id]


def test_training_mode_after_wrapping_changes_nothing() -> None:
    module = micro(drop_rate=0.5, proj_drop_rate=0.5, drop_path_rate=0.5)
    model = cv.wrap(module)
    before = scored(model, "eap")
    module.train()
    assert_same_scores(scored(model, "eap"), before)


def test_a_model_outlives_its_module() -> None:
    model = cv.wrap(micro())
    assert_right(model, micro(), LiteralViT(micro()))


def test_two_models_of_one_module_do_not_disturb_each_other() -> None:
    module = micro()
    one, other = cv.wrap(module), cv.wrap(module)
    found = scored(one, "local")
    with torch.no_grad():
        module.blocks[0].norm1.weight.mul_(1.5)
    assert_same_scores(scored(other, "local"), scored(one, "local"))
    assert found != scored(one, "local")


@pytest.mark.parametrize("default", [torch.float16, torch.float64], ids=str)
def test_the_default_dtype_of_torch_does_not_matter(default: torch.dtype) -> None:
    module = micro().float()
    told = scored(cv.wrap(module), "eap")
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        found = scored(cv.wrap(module), "eap")
    finally:
        torch.set_default_dtype(before)
    assert np.allclose(list(found.values()), list(told.values()), atol=1e-6)


def test_strided_images_are_taken() -> None:
    """Images as channels-last, and as views of larger tensors."""
    model = cv.wrap(micro())
    told = scored(model, "exact")
    for clean in (CLEAN.contiguous(memory_format=torch.channels_last), torch.cat([CLEAN, CLEAN], 1)[:, :3]):
        task = cv.Task(clean, CORRUPT, cv.logit_diff(0, 1))
        assert_same_scores(cv.attribute(model, task, "exact", progress=False).to_dict(), told)


# -- hooks and attributes that hinder --------------------------------------------------------------


def picky(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
    if len(output) != 8:
        raise ValueError("only for batches of eight")


def test_a_hook_that_raises_ends_in_an_error_of_ours_or_nowhere() -> None:
    module = micro()
    module.blocks[0].mlp.register_forward_hook(picky)
    model = wrapped_or_told(module)
    if isinstance(model, str):
        assert "blocks.0.mlp" in model
    else:
        cv.run(model, task_of(), cv.Circuit.full(model.graph))


@pytest.mark.filterwarnings("ignore:the forward hooks of")
def test_a_hook_that_looks_at_a_slice_is_not_taken_for_one_that_changes() -> None:
    """What a gate's activation gets is a slice, and a copy of it is rounded otherwise; found by chance."""
    recipe = Recipe(grid=(3, 3), mlp="glu", pool="avg", class_token=False, norm="layer-coarse", seed=458)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        module = recipe.build(dtype)
        module.blocks[0].mlp.act.register_forward_pre_hook(lambda *_: None)
        module.blocks[0].mlp.act.register_forward_hook(lambda *_: None)
        cv.wrap(module)


class Remembers(layers.Attention):  # type: ignore[misc, name-defined]
    """Keeps what it wrote last, as code for pictures of attention does."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        self.written = super().forward(x, attn_mask, is_causal)
        return self.written


Remembers.__name__ = "Attention"


def test_a_module_that_remembers_what_it_did_is_right_or_refused() -> None:
    module = VisionTransformer(**MICRO)
    module.blocks[1].attn = Remembers(24, 2, qkv_bias=True)
    module = finished(module)
    module(CLEAN)  # with gradients: what is kept cannot be copied
    assert_right_or_refused(module, ("blocks.1.attn",))


# -- families that say what is not so --------------------------------------------------------------


class Taught(VisionTransformer):  # type: ignore[misc, valid-type]
    """A class that some other family is registered for."""


def swapped(attention: Any) -> Any:
    return dataclasses.replace(attention, query=attention.key, key=attention.value, packed=None)


def of_another_scale(attention: Any) -> Any:
    return dataclasses.replace(attention, scale=attention.scale * 1.001)


def without_out_bias(attention: Any) -> Any:
    return dataclasses.replace(attention, out=dataclasses.replace(attention.out, full_bias=None))


def without_value_bias(attention: Any) -> Any:
    value = dataclasses.replace(attention.value, full_bias=None)
    return dataclasses.replace(attention, value=value, packed=None)


def of_other_projections(attention: Any) -> Any:
    """What reads one shared stream is right, what reads streams apart is not."""
    return dataclasses.replace(attention, query=attention.value)


ATTENTIONS = [swapped, of_another_scale, without_out_bias, without_value_bias, of_other_projections]


@pytest.mark.parametrize("lie", ATTENTIONS)
def test_a_family_that_is_wrong_about_attention_is_refused(
    lie: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lying(TimmViT):
        def block(self, module: Any, block: Any, layer: int, where: str) -> Any:
            stages = super().block(module, block, layer, where)
            stages[0].attention = lie(stages[0].attention)
            return stages

    with taught(Lying(), monkeypatch), pytest.raises(UnsupportedModelError, match=r"blocks\.0"):
        cv.wrap(micro(Taught))


def of_another_eps(stage: Any) -> None:
    stage.norm = dataclasses.replace(stage.norm, eps=1e-3)


def without_norm_bias(stage: Any) -> None:
    stage.norm = dataclasses.replace(stage.norm, bias=None)


def without_layer_scale(stage: Any) -> None:
    stage.gamma = None


def with_the_norm_of_the_other(stage: Any) -> None:
    stage.norm = dataclasses.replace(stage.norm, weight=stage.norm.weight * 1.001)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    "lie", [of_another_eps, without_norm_bias, without_layer_scale, with_the_norm_of_the_other]
)
def test_a_family_that_is_wrong_about_norms_or_scales_is_refused(
    lie: Callable[[Any], None], place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lying(TimmViT):
        def block(self, module: Any, block: Any, layer: int, where: str) -> Any:
            stages = super().block(module, block, layer, where)
            lie(stages[place])
            return stages

    with taught(Lying(), monkeypatch), pytest.raises(UnsupportedModelError, match=r"blocks\.0"):
        cv.wrap(micro(Taught, init_values=0.5))


def less_embedding(family: type[TimmViT]) -> None:
    own = family.embed
    family.embed = lambda self, module, images: 0.99 * own(self, module, images)  # type: ignore[method-assign]


def backwards(family: type[TimmViT]) -> None:
    own = family.blocks
    family.blocks = lambda self, module: own(self, module)[::-1]  # type: ignore[method-assign]


def one_block_less(family: type[TimmViT]) -> None:
    own = family.blocks
    family.blocks = lambda self, module: own(self, module)[:-1]  # type: ignore[method-assign]


def no_final_norm(family: type[TimmViT]) -> None:
    family.readout = lambda self, module, stream: module.forward_head(stream)  # type: ignore[method-assign]


@pytest.mark.parametrize("zero_head", [False, True])
@pytest.mark.parametrize("lie", [less_embedding, backwards, one_block_less, no_final_norm])
def test_a_family_that_is_wrong_about_the_whole_is_refused(
    lie: Callable[[type[TimmViT]], None], zero_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lying(TimmViT):
        pass

    lie(Lying)
    module = micro(Taught)
    if zero_head:
        nn.init.zeros_(module.head.weight)
        nn.init.zeros_(module.head.bias)
    with taught(Lying(), monkeypatch), pytest.raises(UnsupportedModelError):
        cv.wrap(module)


@contextmanager
def taught(family: TimmViT, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A family registered for `Taught`, and forgotten afterwards."""
    monkeypatch.setattr(registry, "FAMILIES", dict(registry.FAMILIES))
    registry.register(Taught, family)
    yield


def test_an_honest_family_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with taught(TimmViT(), monkeypatch):
        assert_right_or_refused(micro(Taught), refusable=False)


# -- parts that are exchanged between two calls ------------------------------------------------------


def other_activation(module: Any) -> None:
    module.blocks[0].mlp.act = nn.ReLU()


def other_pooling(module: Any) -> None:
    module.global_pool = "avg"


def other_eps(module: Any) -> None:
    module.norm.eps = 0.5


def one_part_more(module: Any) -> None:
    module.blocks[1].mlp.extra = nn.Identity()


def other_heads(module: Any) -> None:
    module.blocks[1].attn.num_heads, module.blocks[1].attn.head_dim = 4, 6


def other_forward(module: Any) -> None:
    module.blocks[0].mlp.forward = torch.zeros_like


def test_images_that_patches_do_not_fit_are_refused_where_any_size_is_taken() -> None:
    model = cv.wrap(micro(dynamic_img_size=True))
    oblong = torch.zeros(2, 3, 40, 32, dtype=torch.float64)
    with pytest.raises(DataError, match=r"takes no image of 40 x 32: .*divisible by patch size"):
        cv.attribute(model, cv.Task(oblong, metric=METRIC, ablation="zero"), progress=False)


CHANGES = [other_activation, other_pooling, other_eps, one_part_more, other_heads, other_forward]


@pytest.mark.parametrize("change", CHANGES)
def test_a_part_that_is_exchanged_after_wrapping_is_told(change: Callable[[Any], None]) -> None:
    module = micro()
    model = cv.wrap(module)
    module.note = "what a user writes on a module harms nobody"
    scored(model, "eap")
    change(module)
    with pytest.raises(ModelError, match=r"has been changed since.*wrap the module again"):
        scored(model, "eap")
    if change not in (other_heads, other_forward):  # which are refused
        scored(cv.wrap(module), "eap")


def test_a_part_exchanged_on_the_models_own_module_is_told() -> None:
    model = cv.wrap(micro())
    edited = model.edit({"m0": 0})
    scored(model, "eap")
    model.module.head = nn.Linear(1, 3)
    for late in (
        partial(scored, model, "eap"),
        partial(scored, edited, "eap"),
        partial(model.edit, {"m0": 1}),
    ):
        with pytest.raises(ModelError, match=r"head of model.module has been exchanged.* cv.with_head"):
            late()


class MoreTokens(VisionTransformer):  # type: ignore[misc, valid-type]
    """With registers that its attributes do not tell."""

    def _pos_embed(self, patches: Tensor) -> Tensor:
        tokens = super()._pos_embed(patches)
        return torch.cat([tokens[:, :1], tokens[:, :1] / 2, tokens[:, 1:]], dim=1)


def test_tokens_that_the_family_does_not_count_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="has 6 tokens in its blocks, which are not 1 before 2x2"):
        cv.wrap(finished(MoreTokens(**MICRO)))


class Counting(VisionTransformer):  # type: ignore[misc, valid-type]
    runs = 0

    def forward(self, images: Tensor) -> Tensor:
        self.runs += 1
        return super().forward(images)  # type: ignore[no-any-return]


def test_a_number_that_counts_runs_is_no_setting() -> None:
    module = finished(Counting(**MICRO))
    module.runs = 1
    model = cv.wrap(module)
    module(CLEAN)
    scored(model, "eap")


# -- what is switched on or off around searches -------------------------------------------------------


def test_masks_are_learned_whatever_the_caller_does_with_gradients() -> None:
    model = cv.wrap(micro())
    settings = cv.MaskSettings(steps=2)
    expected = cv.learn_mask(model, task_of(), edges=20, settings=settings, progress=False)
    with torch.no_grad():
        found = cv.learn_mask(model, task_of(), edges=20, settings=settings, progress=False)
    assert np.array_equal(found.circuit.kept, expected.circuit.kept)
    with torch.inference_mode(), pytest.raises(OptionError, match="inference_mode gives no gradients"):
        cv.learn_mask(model, task_of(), edges=20, settings=settings, progress=False)


def test_resampling_a_task_with_fixed_classes_says_why_it_cannot_be_verified() -> None:
    model = cv.wrap(micro())
    task = task_of().with_options(ablation="resample")
    with pytest.raises(DataError, match="images are only exchanged, and their mean stays"):
        cv.verify(model, task, drawn_circuit(model.graph, 0.4), progress=False)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda model: (model.module, task_of()), "wrap it with cv.wrap first"),
        (lambda model: (task_of(), model), "give what cv.load gave"),
        (lambda model: (model, model), "is no task"),
    ],
    ids=["a-plain-module", "the-wrong-way-round", "no-task"],
)
def test_what_is_no_model_or_no_task_is_refused(given: Callable[[cv.Model], Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        cv.attribute(*given(cv.wrap(micro())), progress=False)


@pytest.mark.parametrize("memory", ["2 lots", 0, -1, 1.5])
def test_a_memory_budget_is_a_number_of_bytes_or_a_size(memory: Any) -> None:
    with pytest.raises(OptionError, match=r"positive number of bytes|takes a size such as 500MB"):
        cv.attribute(cv.wrap(micro()), task_of(), memory=memory, progress=False)

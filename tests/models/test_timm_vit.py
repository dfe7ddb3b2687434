"""timm's Vision Transformers: every switch is taken apart correctly, everything else is refused by name."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

import circuitvit as cv
from circuitvit.engine import capture, outputs
from circuitvit.errors import ModelError, OptionError, UnsupportedModelError
from circuitvit.models.timm_import import import_timm
from tests.strategies import PATCH, Case, Recipe, assert_close, cases, scramble

timm = import_timm()
VisionTransformer = timm.models.vision_transformer.VisionTransformer
layers = timm.layers

MICRO = {
    "img_size": 8,
    "patch_size": 4,
    "num_classes": 4,
    "embed_dim": 12,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 2.0,
}


def micro(**options: Any) -> nn.Module:
    """A small `VisionTransformer` of timm's with unusual weights, in evaluation mode."""
    module = VisionTransformer(**{**MICRO, **options})
    scramble(module, seed=3, gain=1.0)
    return module.eval()


def named(name: str, **options: Any) -> nn.Module:
    """One of timm's models by name, made small, with unusual weights."""
    small = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5, **options}
    module = timm.create_model(name, pretrained=False, **small)
    scramble(module, seed=4, gain=1.0)
    return module.eval()


def image_for(module: Any, n: int = 3) -> Tensor:
    height, width = module.patch_embed.img_size
    channels = next(weight.shape[1] for weight in module.patch_embed.parameters() if weight.ndim == 4)
    return torch.randn(n, channels, height, width, generator=torch.Generator().manual_seed(5))


def with_heads(*heads: int) -> nn.Module:
    """Blocks with different numbers of heads, as pruning leaves them."""
    module = micro(depth=len(heads))
    for block, count in zip(module.blocks, heads, strict=True):
        block.attn = layers.Attention(12, count, attn_head_dim=5, qkv_bias=True)
    scramble(module, seed=6, gain=1.0)
    return module.eval()


def assert_reconstructs(module: nn.Module, images: Tensor, tolerance: float = 1e-5) -> cv.Model:
    """The stages give the module's own logits: run in turn, summed sender by sender, and run with a mask."""
    model = cv.wrap(module)
    with torch.no_grad():
        expected = module(images)
    captured = capture(model, images)
    summed = outputs(model.stages, captured.compacts).sum(dim=0)
    for stage in model.stages:
        if stage.constant is not None:
            summed = summed + stage.constant
    readout = model.stages[-1]
    masked = cv.run(
        model, cv.Task(images, images.flip(0), lambda logits: logits[:, 0]), cv.Circuit.full(model.graph)
    )
    for found in (captured.logits, readout.write(readout.read(summed)), masked):
        assert (found - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max()))
    return model


# -- one micro-model for each switch ---------------------------------------------------------------

SWITCHES: dict[str, Callable[[], nn.Module]] = {
    "class-token": micro,
    "no-class-token": partial(micro, class_token=False, global_pool="avg"),
    "registers": partial(micro, reg_tokens=2),
    "registers-without-class-token": partial(micro, class_token=False, reg_tokens=3, global_pool="avg"),
    "no-embed-class": partial(micro, no_embed_class=True),
    "no-embed-class-with-registers": partial(micro, no_embed_class=True, reg_tokens=2),
    "no-positions": partial(micro, pos_embed="none"),
    "dynamic-img-size": partial(micro, dynamic_img_size=True),
    "norm-pre": partial(micro, pre_norm=True),
    "embed-norm": partial(micro, embed_norm_layer="layernorm"),
    "layer-scale": partial(micro, init_values=0.1),
    "qkv-bias-off": partial(micro, qkv_bias=False),
    "proj-bias-off": partial(micro, proj_bias=False),
    "all-biases-off": partial(micro, qkv_bias=False, proj_bias=False),
    "qk-norm": partial(micro, qk_norm=True),
    "qk-norm-rms": partial(micro, qk_norm=True, norm_layer=layers.RmsNorm),
    "layernorm-eps-1e-5": partial(micro, norm_layer=partial(nn.LayerNorm, eps=1e-5)),
    "layernorm-eps-0.5": partial(micro, norm_layer=partial(nn.LayerNorm, eps=0.5)),
    "layernorm-without-affine": partial(micro, norm_layer=partial(nn.LayerNorm, elementwise_affine=False)),
    "layernorm-without-bias": partial(micro, norm_layer=partial(nn.LayerNorm, bias=False)),
    "layernorm-in-float32": partial(micro, norm_layer=layers.LayerNormFp32),
    "rmsnorm": partial(micro, norm_layer=layers.RmsNorm),
    "rmsnorm-in-float32": partial(micro, norm_layer=layers.RmsNormFp32),
    "rmsnorm-of-torch": partial(micro, norm_layer=nn.RMSNorm),
    "no-norm": partial(micro, norm_layer=nn.Identity),
    "attention-for-rotations-without-them": partial(micro, attn_layer=layers.AttentionRope),
    "norm-across-heads": partial(micro, scale_attn_norm=True),
    "attn-head-dim": partial(with_heads, 2, 2),
    "different-numbers-of-heads": partial(with_heads, 3, 1),
    "one-head": partial(micro, num_heads=1),
    "mlp-gelu-tanh": partial(micro, act_layer="gelu_tanh"),
    "mlp-quickgelu": partial(micro, act_layer="quick_gelu"),
    "mlp-relu": partial(micro, act_layer=nn.ReLU),
    "mlp-swiglu": partial(micro, mlp_layer=layers.SwiGLU, act_layer=nn.SiLU),
    "mlp-swiglu-packed": partial(micro, mlp_layer=layers.SwiGLUPacked, act_layer=nn.SiLU),
    "mlp-glu": partial(micro, mlp_layer=layers.GluMlp, act_layer=nn.Sigmoid),
    "mlp-gated": partial(micro, mlp_layer=layers.GatedMlp),
    "mlp-with-norm-inside": partial(micro, scale_mlp_norm=True),
    "pool-token-fc-norm": partial(micro, fc_norm=True),
    "pool-avg": partial(micro, global_pool="avg"),
    "pool-avg-norm-before": partial(micro, global_pool="avg", fc_norm=False),
    "pool-avg-with-prefix": partial(micro, global_pool="avg", pool_include_prefix=True),
    "pool-max": partial(micro, global_pool="max"),
    "pool-avgmax": partial(micro, global_pool="avgmax"),
    "no-final-norm": partial(micro, final_norm=False),
    "num-classes-0": partial(micro, num_classes=0),
    "one-channel": partial(micro, in_chans=1),
    "five-channels": partial(micro, in_chans=5),
    "rectangular-image": partial(micro, img_size=(8, 12)),
    "rectangular-patches": partial(micro, img_size=(8, 12), patch_size=(2, 4)),
    "one-patch": partial(micro, img_size=4),
    "one-block": partial(micro, depth=1),
    "dropout-in-evaluation": partial(
        micro, drop_rate=0.5, pos_drop_rate=0.5, patch_drop_rate=0.5, proj_drop_rate=0.5, attn_drop_rate=0.5,
        drop_path_rate=0.5,
    ),
}  # fmt: skip

FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "augreg": partial(named, "vit_tiny_patch16_224"),
    "deit": partial(named, "deit_tiny_patch16_224"),
    "deit-distilled": partial(named, "deit_tiny_distilled_patch16_224"),
    "deit3": partial(named, "deit3_small_patch16_224"),
    "clip-quickgelu": partial(named, "vit_base_patch16_clip_quickgelu_224"),
    "clip": partial(named, "vit_base_patch32_clip_224"),
    "dino": partial(named, "vit_small_patch8_224"),
    "dinov2": partial(named, "vit_small_patch14_dinov2", img_size=28),
    "dinov2-registers": partial(named, "vit_small_patch14_reg4_dinov2", img_size=28),
    "dinov2-giant-swiglu": partial(named, "vit_giant_patch14_dinov2", img_size=28),
    "gap": partial(named, "vit_base_patch16_siglip_gap_224"),
    "registers-gap": partial(named, "vit_medium_patch16_reg4_gap_256"),
    "little-rmsnorm": partial(named, "vit_little_patch16_reg4_gap_256"),
    "hybrid-with-convolutions": partial(named, "vit_tiny_r_s16_p8_224", img_size=64),
}


@pytest.mark.parametrize("build", SWITCHES.values(), ids=SWITCHES)
def test_each_switch_is_taken_apart(build: Callable[[], nn.Module]) -> None:
    module = build()
    assert_reconstructs(module, image_for(module))


@pytest.mark.parametrize("build", FAMILIES.values(), ids=FAMILIES)
def test_timms_own_configurations_are_taken_apart(build: Callable[[], nn.Module]) -> None:
    module = build()
    assert_reconstructs(module, image_for(module))


@given(cases())
def test_any_combination_of_switches_is_taken_apart(case: Case) -> None:
    assert_reconstructs(case.module, case.clean, tolerance=1e-12)


@pytest.mark.parametrize("prefix", ["class-token", "registers", "none"])
@pytest.mark.parametrize("size", [(8, 8), (12, 12), (8, 20)])
def test_dynamic_img_size_takes_other_sizes(prefix: str, size: tuple[int, int]) -> None:
    options = {"registers": {"reg_tokens": 2}, "none": {"class_token": False, "global_pool": "avg"}}.get(
        prefix, {}
    )
    module = micro(dynamic_img_size=True, **options)
    images = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(0))
    model = assert_reconstructs(module, images)
    n_prefix = 3 if prefix == "registers" else int(prefix == "class-token")
    assert model.embed(images).shape == (3, size[0] * size[1] // 16 + n_prefix, 12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_are_taken_apart(dtype: torch.dtype) -> None:
    module = micro().to(dtype)
    assert_reconstructs(module, image_for(module).to(dtype), 1e-12 if dtype == torch.float64 else 0.05)


def test_unfused_attention_is_taken_apart() -> None:
    module = micro(qk_norm=True)
    for block in module.blocks:
        block.attn.fused_attn = False
    assert_reconstructs(module, image_for(module))


def test_the_input_sender_is_taken_after_norm_pre() -> None:
    module = micro(pre_norm=True)
    images = image_for(module)
    seen: list[Tensor] = []
    handle = module.norm_pre.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        module(images)
    handle.remove()
    model = cv.wrap(module)
    written = outputs(model.stages, capture(model, images).compacts)[model.graph.sender_index["input"]]
    assert torch.equal(written, seen[0])
    assert not torch.allclose(written, module.patch_embed(images).mean())


@pytest.mark.parametrize(
    ("recipe", "kinds"),
    [
        (Recipe(), ("cls", "patch", "patch", "patch", "patch")),
        (Recipe(registers=1), ("cls", "reg", "patch", "patch", "patch", "patch")),
        (Recipe(distilled=True), ("cls", "dist", "patch", "patch", "patch", "patch")),
        (Recipe(class_token=False, pool="avg"), ("patch",) * 4),
        (Recipe(class_token=False, registers=2, pool="avg"), ("reg", "reg", *("patch",) * 4)),
    ],
    ids=["cls", "cls-reg", "cls-dist", "none", "reg"],
)
def test_tokens_before_the_patches_are_known(recipe: Recipe, kinds: tuple[str, ...]) -> None:
    model = cv.wrap(recipe.build())
    assert model.token_kinds(recipe.n_tokens) == kinds


def test_the_graph_has_the_names_of_the_eap_ig_files() -> None:
    graph = cv.wrap(Recipe(depth=1, heads=2).build()).graph
    assert graph.senders == ("input", "a0.h0", "a0.h1", "m0")
    assert graph.receivers == (
        "a0.h0<q>",
        "a0.h1<q>",
        "a0.h0<k>",
        "a0.h1<k>",
        "a0.h0<v>",
        "a0.h1<v>",
        "m0",
        "logits",
    )
    assert graph.n_edges == 6 + 3 + 4


# -- refusals --------------------------------------------------------------------------------------


def with_part(place: str, part: Callable[[nn.Module], nn.Module], **options: Any) -> nn.Module:
    """A micro-model one of whose modules, such as "blocks.0.attn", is replaced."""
    module = micro(**options)
    parent, _, name = place.rpartition(".")
    setattr(module.get_submodule(parent), name, part(module.get_submodule(place)))
    return module.eval()


def with_bad_weight(value: float, name: str) -> nn.Module:
    module = micro()
    with torch.no_grad():
        module.get_parameter(name).view(-1)[3] = value
    return module


class Shifted(VisionTransformer):  # type: ignore[misc, valid-type]
    """Does something in its forward that no part shows."""

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return super().forward_features(x, attn_mask, is_causal) * 1.001


class Pair(VisionTransformer):  # type: ignore[misc, valid-type]
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = super().forward(x)
        return logits, logits


class SkippingBlock(timm.models.vision_transformer.Block):
    """Calls itself a Block, and is not one."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return x + self.mlp(self.norm2(x))


SkippingBlock.__name__ = "Block"


class Doubled(nn.LayerNorm):
    """A LayerNorm by its class, and not by what it does."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Adapter(nn.Module):
    """A low-rank adapter around a projection."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x)


def weight_norm(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and still found in old code
        return nn.utils.weight_norm(module)


blocks = timm.models.vision_transformer

# What it is; how it is made; what the message must say: the module, the switch, the reason.
REFUSALS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "post-norm": (
        partial(micro, block_fn=blocks.ResPostBlock),
        ("blocks.0", "ResPostBlock", "block_fn", "post-norm"),
    ),
    "attention-pooling-prr": (partial(micro, global_pool="prr"), ("attn_pool", "AttentionPoolPrr")),
    "no-pooling": (partial(micro, global_pool=""), ("global_pool=''",)),
    "unknown-block": (
        partial(with_part, "blocks.1", lambda block: nn.Sequential(block)),
        ("blocks.1", "Sequential"),
    ),
    "unknown-norm": (partial(micro, norm_layer=layers.SimpleNorm), ("blocks.0.norm1", "SimpleNorm")),
    "unknown-second-norm": (
        partial(with_part, "blocks.1.norm2", lambda _: layers.SimpleNorm(12)),
        ("blocks.1.norm2", "SimpleNorm"),
    ),
    "a-norm-that-does-more": (
        partial(with_part, "blocks.1.norm1", lambda _: Doubled(12)),
        ("blocks.1.norm1", "Doubled", "something else"),
    ),
    "adapter-on-the-projections": (
        partial(with_part, "blocks.0.attn.qkv", Adapter),
        ("blocks.0.attn", "Adapter", "qkv"),
    ),
    "weights-computed-in-every-forward": (
        partial(with_part, "blocks.0.attn.proj", weight_norm),
        ("blocks.0.attn.proj", "remove_weight_norm"),
    ),
    "unknown-branch-scale": (
        partial(with_part, "blocks.1.ls2", lambda _: nn.Linear(12, 12)),
        ("blocks.1.ls2", "Linear"),
    ),
    "no-blocks": (partial(micro, depth=0), ("no blocks",)),
    "a-subclass-that-does-more": (
        lambda: scrambled(Shifted(**MICRO)),
        ("Shifted", "differs from its own forward"),
    ),
    "a-block-that-is-none": (
        lambda: micro(block_fn=SkippingBlock),
        ("VisionTransformer", "differs from its own forward"),
    ),
    "not-logits": (lambda: scrambled(Pair(**MICRO)), ("(batch, class)",)),
    "swin": (
        lambda: timm.models.swin_transformer.SwinTransformer(
            img_size=16, patch_size=4, window_size=4, embed_dim=8, depths=(1,), num_heads=(1,), num_classes=3
        ).eval(),
        ("SwinTransformer", "merged on the way"),
    ),
    "resnet": (
        lambda: timm.create_model("resnet10t", num_classes=3).eval(),
        ("ResNet", "Vision Transformers of"),
    ),
    "not-timm": (lambda: nn.Linear(3, 3).eval(), ("Linear", "Vision Transformers of")),
}


def scrambled(module: nn.Module) -> nn.Module:
    scramble(module, seed=3, gain=1.0)
    return module.eval()


@pytest.mark.parametrize(("build", "words"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_taken_apart_is_refused_by_name(
    build: Callable[[], nn.Module], words: tuple[str, ...]
) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        cv.wrap(build())
    for word in words:
        assert word in str(caught.value)


UNUSABLE: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "training-mode": (lambda: micro().train(), ("training mode", "eval()")),
    "nan-weight": (
        partial(with_bad_weight, float("nan"), "blocks.1.mlp.fc1.weight"),
        ("NaN", "blocks.1.mlp.fc1.weight"),
    ),
    "infinite-weight": (partial(with_bad_weight, float("inf"), "pos_embed"), ("infinite", "pos_embed")),
    "overflowing-weight": (
        partial(with_bad_weight, 3e38, "patch_embed.proj.weight"),
        ("logits", "NaN or infinite"),
    ),
    "meta-device": (lambda: micro().to("meta"), ("meta device",)),
    "broken-part": (partial(with_part, "head", lambda _: nn.Linear(7, 3)), ("(2, 3, 8, 8)",)),
}


@pytest.mark.parametrize(("build", "words"), UNUSABLE.values(), ids=UNUSABLE)
def test_what_cannot_be_run_is_refused_with_its_cause(
    build: Callable[[], nn.Module], words: tuple[str, ...]
) -> None:
    with pytest.raises(ModelError) as caught:
        cv.wrap(build())
    for word in words:
        assert word in str(caught.value)


def test_a_hook_that_changes_the_forward_is_refused() -> None:
    module = micro()
    module.blocks[0].register_forward_hook(lambda _module, _inputs, output: output * 1.5)
    with pytest.raises(UnsupportedModelError, match=r"forward hook on blocks\.0 changes what it computes"):
        cv.wrap(module)


def test_class_names_must_fit_the_logits() -> None:
    with pytest.raises(OptionError, match="2 class names for a model with 4 logits"):
        cv.wrap(micro(), classes=["cat", "dog"])


# -- the user's module -----------------------------------------------------------------------------


def snapshot(module: nn.Module) -> dict[str, Any]:
    """All that could be changed about a module, by value."""
    parts = dict(module.named_modules())
    return {
        "tensors": {
            name: (id(tensor), tensor.data_ptr(), tensor._version, tensor.clone())
            for name, tensor in module.state_dict(keep_vars=True).items()
        },
        "requires_grad": {name: parameter.requires_grad for name, parameter in module.named_parameters()},
        "grads": {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()},
        "training": {name: part.training for name, part in parts.items()},
        "hooks": {
            name: (len(part._forward_hooks), len(part._forward_pre_hooks), len(part._backward_hooks))
            for name, part in parts.items()
        },
        "types": {name: type(part) for name, part in parts.items()},
        "attributes": {name: sorted(vars(part)) for name, part in parts.items()},
    }


def same(before: Any, after: Any) -> bool:
    if isinstance(before, Tensor):
        return torch.equal(before, after)
    if isinstance(before, dict):
        return before.keys() == after.keys() and all(same(before[key], after[key]) for key in before)
    if isinstance(before, tuple):
        return len(before) == len(after) and all(map(same, before, after))
    return bool(before == after)


def test_a_whole_workflow_leaves_the_users_module_and_torch_as_they_were() -> None:
    module = micro(init_values=0.3)
    module.blocks[0].attn.qkv.weight.requires_grad_(False)
    module.norm.weight.grad = torch.full_like(module.norm.weight, 0.25)
    calls: list[str] = []
    module.blocks[1].mlp.register_forward_hook(lambda *_: calls.append("mlp"))
    images, others = image_for(module), image_for(module).flip(-1)
    with torch.no_grad():
        expected = module(images)
    before, random_state = snapshot(module), torch.random.get_rng_state()

    model = cv.wrap(module)
    task = cv.Task(images, others, cv.logit_diff(0, 1))
    for method in cv.METHODS:
        scores = cv.attribute(model, task, method, progress=False)
    for ablation in ("patch", "mean", "mean-tokens", "zero", "noise", "resample"):
        cv.run(
            model,
            task.with_options(ablation=ablation, groups="kind"),
            cv.Circuit.empty(model.graph.with_groups(("cls", "patch"))),
        )
    cv.acdc(model, task, tau=0.5, progress=False)
    cv.run(model, task, scores.top(5))

    assert same(before, snapshot(module))
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
    with torch.no_grad():
        assert torch.equal(module(images), expected)


def test_the_model_shares_memory_with_the_users_module() -> None:
    module = micro()
    model = cv.wrap(module)
    own = dict(module.named_parameters())
    for name, parameter in model.module.named_parameters():
        assert parameter.data_ptr() == own[name].data_ptr()
        assert not parameter.requires_grad


def test_a_dropped_model_is_gone_at_once_with_all_its_parts() -> None:
    """Weights must not wait for the collector of cycles, which a full GPU does not wake."""
    model = cv.wrap(micro())
    images = image_for(model.module)
    capture(model, images, essential=True)
    stage = model.stages[1]
    assert stage.restrict([0]).leading(1) is stage.restrict([0]).leading(1), "parts are kept at hand"
    gone = weakref.ref(stage)
    gc.disable()
    try:
        del model, stage
        assert gone() is None
    finally:
        gc.enable()


def test_a_copy_of_a_model_runs_on_weights_of_its_own() -> None:
    model = cv.wrap(micro())
    images = image_for(model.module)
    capture(model, images, essential=True)
    twin = copy.deepcopy(model)
    for parameter in twin.module.blocks[0].mlp.parameters():
        parameter.data.mul_(0.5)
    _, attention, mlp, *_ = twin.stages
    assert attention.restrict([1]).attention.packed.full_weight is twin.module.blocks[0].attn.qkv.weight
    assert mlp.mlp.module is twin.module.blocks[0].mlp
    assert_close(capture(twin, images, essential=True).logits, twin(images), 1e-5)
    assert not torch.allclose(twin(images), model(images))


def test_a_model_with_a_part_left_in_training_mode_is_refused_by_its_name() -> None:
    module = micro(proj_drop_rate=0.5, attn_drop_rate=0.5)
    module.blocks[0].train()
    with pytest.raises(ModelError, match=r"blocks\.0 is in training mode"):
        cv.wrap(module)
    assert module.blocks[0].training


def test_patches_are_those_of_the_reference() -> None:
    """The micro-models of the strategies are cut into as many patches as the tests believe."""
    recipe = Recipe(grid=(2, 3), registers=1)
    stream = cv.wrap(recipe.build()).embed(recipe.images(1))
    assert stream.shape[1] == recipe.n_tokens
    assert recipe.images(1).shape[-2:] == (2 * PATCH, 3 * PATCH)
    assert_close(stream, Case(recipe).literal.embed(recipe.images(1)))

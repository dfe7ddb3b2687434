"""Hypothesis strategies: tiny random Vision Transformers with every switch that is known, and tasks on them.

A `Recipe` says everything about a model, so a failing example prints as one line that builds it again:

    >>> module = Recipe(depth=1, heads=2).build()

Weights are drawn larger than any initialisation would, so that attention is far from uniform, norms matter
and no part of the model is nearly linear.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import circuitvit as cv
from circuitvit.models.timm_import import import_timm
from tests.reference.literal_scores import MetricFunction, mean_reference, patch_reference, zero_reference
from tests.reference.literal_vit import Groups, LiteralViT

PATCH = 2
CHANNELS = 2

MLPS = ("gelu", "quick_gelu", "relu", "glu", "swiglu", "swiglu_packed", "normed")
NORMS = ("layer", "layer-coarse", "rms", "torch-rms", "none")


@dataclass(frozen=True)
class Recipe:
    """All switches of a tiny Vision Transformer, and the seed of its weights.

    Attributes:
        grid: rows and columns of patches.
        d_head: width of a head; None for timm's own choice.
        norm: "layer", "layer-coarse" (a large eps), "rms", "torch-rms" (torch's own, eps unset) or "none".
        mlp: one of `MLPS`; "normed" has a norm inside the MLP.
        pool: "token", "avg", "max" or "avgmax".
        fc_norm: norm after the pooling, not before; None for timm's choice.
        layer_scale: whether branches are scaled (by values of order 1, of both signs).
    """

    depth: int = 1
    heads: int = 1
    width: int = 6
    d_head: int | None = None
    grid: tuple[int, int] = (2, 2)
    classes: int = 3
    class_token: bool = True
    registers: int = 0
    no_embed_class: bool = False
    pre_norm: bool = False
    layer_scale: bool = False
    qkv_bias: bool = True
    proj_bias: bool = True
    qk_norm: bool = False
    norm: str = "layer"
    mlp: str = "gelu"
    pool: str = "token"
    fc_norm: bool | None = None
    pool_include_prefix: bool = False
    dynamic: bool = False
    distilled: bool = False
    seed: int = 0

    def build(self, dtype: torch.dtype = torch.float64) -> Any:
        """The module, in evaluation mode, with all weights drawn from the seed."""
        timm = import_timm()
        family = timm.models.deit.VisionTransformerDistilled if self.distilled else None
        family = family or timm.models.vision_transformer.VisionTransformer
        width = self.width * self.heads if self.d_head is None else self.width
        module = family(
            img_size=(self.grid[0] * PATCH, self.grid[1] * PATCH),
            patch_size=PATCH,
            in_chans=CHANNELS,
            num_classes=self.classes,
            global_pool=self.pool,
            embed_dim=width,
            depth=self.depth,
            num_heads=self.heads if self.d_head is None else 1,
            mlp_ratio=2.0,
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
            scale_mlp_norm=self.mlp == "normed",
            proj_bias=self.proj_bias,
            init_values=0.5 if self.layer_scale else None,
            class_token=self.class_token,
            no_embed_class=self.no_embed_class,
            reg_tokens=self.registers,
            pre_norm=self.pre_norm,
            fc_norm=self.fc_norm,
            pool_include_prefix=self.pool_include_prefix,
            dynamic_img_size=self.dynamic,
            norm_layer=self._norm_layer(),
            act_layer={"quick_gelu": "quick_gelu", "relu": nn.ReLU, "glu": nn.Sigmoid}.get(self.mlp),
            mlp_layer=self._mlp_layer(),
        )
        if self.d_head is not None:  # no argument of timm's ViT reaches it, but pruned models have it
            for block in module.blocks:
                block.attn = timm.layers.Attention(
                    width,
                    self.heads,
                    attn_head_dim=self.d_head,
                    qkv_bias=self.qkv_bias,
                    qk_norm=self.qk_norm,
                    proj_bias=self.proj_bias,
                    norm_layer=self._norm_layer(),
                )
        module = module.to(dtype).eval()
        scramble(
            module, self.seed, gain=0.5 if self.norm == "none" else 1.5
        )  # unnormed streams grow from block to block
        return module

    def images(self, n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
        """Random images that fit, `(n, channel, height, width)`; exact in float32, as tasks hold them."""
        generator = torch.Generator().manual_seed(1_000 + seed)
        size = (self.grid[0] * PATCH, self.grid[1] * PATCH)
        return torch.randn(n, CHANNELS, *size, generator=generator).to(dtype)

    @property
    def n_tokens(self) -> int:
        return self.grid[0] * self.grid[1] + int(self.class_token) + self.registers + int(self.distilled)

    def _norm_layer(self) -> Any:
        layers = import_timm().layers
        return {
            "layer": partial(layers.LayerNorm, eps=1e-6),
            "layer-coarse": partial(nn.LayerNorm, eps=0.3),
            "rms": partial(layers.RmsNorm, eps=1e-2),
            "torch-rms": nn.RMSNorm,
            "none": nn.Identity,
        }[self.norm]

    def _mlp_layer(self) -> Any:
        layers = import_timm().layers
        kinds = {"glu": layers.GluMlp, "swiglu": _swiglu, "swiglu_packed": _swiglu_packed}
        return kinds.get(self.mlp, layers.Mlp)


def _swiglu(act_layer: object = None, **options: Any) -> nn.Module:
    return import_timm().layers.SwiGLU(**options)


def _swiglu_packed(act_layer: object = None, **options: Any) -> nn.Module:
    return import_timm().layers.SwiGLUPacked(**options)


def scramble(module: nn.Module, seed: int, gain: float = 1.5) -> None:
    """Redraw every parameter: matrices with `gain` times the usual scale, everything else of order 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if "norm" in name and name.endswith("weight"):
                value = 1 + 0.5 * noise
            elif name.endswith(("gamma", "bias")):
                value = 0.5 * noise + (0.7 if name.endswith("gamma") else 0.0)
            elif parameter.ndim >= 2 and name.endswith("weight"):
                value = gain * noise / math.sqrt(parameter[0].numel())
            else:  # class token, registers, positions
                value = 0.7 * noise
            parameter.copy_(value)


# -- strategies ----------------------------------------------------------------------------------


@st.composite
def recipes(draw: st.DrawFn, max_depth: int = 3, max_heads: int = 3, smooth: bool = False) -> Recipe:
    """Recipes with every switch drawn.

    Args:
        draw: given by hypothesis.
        max_depth: most blocks.
        max_heads: most heads.
        smooth: leave out what has kinks (ReLU, max pooling), where gradients are one-sided.
    """
    distilled = draw(st.integers(0, 9)) == 9
    class_token = distilled or draw(st.booleans())
    smooth_pools = ["token", "avg"] if class_token else ["avg"]
    return Recipe(
        depth=draw(st.integers(1, max_depth)),
        heads=draw(st.integers(1, max_heads)),
        width=draw(st.sampled_from((4, 6))),
        d_head=draw(st.sampled_from((None, None, 3, 5))),
        grid=draw(st.sampled_from(((2, 2), (2, 3), (3, 3)))),
        classes=draw(st.integers(2, 4)),
        class_token=class_token,
        registers=0 if distilled else draw(st.integers(0, 2)),
        no_embed_class=not distilled and draw(st.booleans()),
        pre_norm=draw(st.booleans()),
        layer_scale=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        proj_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        norm=draw(st.sampled_from(NORMS)),
        mlp=draw(st.sampled_from([kind for kind in MLPS if not (smooth and kind == "relu")])),
        pool="token"
        if distilled
        else draw(st.sampled_from(smooth_pools + ([] if smooth else ["max", "avgmax"]))),
        fc_norm=draw(st.sampled_from((None, True, False))),
        pool_include_prefix=draw(st.booleans()),
        distilled=distilled,
        seed=draw(st.integers(0, 2**16)),
    )


METRICS: dict[str, tuple[Any, MetricFunction]] = {
    "logit_diff": (cv.logit_diff(0, 1), lambda logits: logits[:, 0] - logits[:, 1]),
    "logit": (cv.logit(1), lambda logits: logits[:, 1]),
    "log_probability": (cv.log_probability(0), lambda logits: logits[:, 0] - torch.logsumexp(logits, dim=1)),
    "probability": (
        cv.probability(1),
        lambda logits: torch.exp(logits[:, 1] - torch.logsumexp(logits, dim=1)),
    ),
    "curved": (_curved := lambda logits: (logits * logits[:, :1]).sum(dim=1) / 4 - logits[:, 1], _curved),
}
"""Metrics by name: as the library says them, and as a formula of logits `(batch, class)`."""

GROUP_NAMES = ("cls", "dog", "rest")


@dataclass(frozen=True)
class Case:
    """A tiny model with a task, said twice: for the library, and in the reference's words.

    Attributes:
        recipe: of the model.
        n_pairs: how many pairs of images.
        groups: "none", "shared" by all images, or "per-image".
        metric: one of `METRICS`.
        ablation: by name; the reference knows "patch", "mean", "mean-tokens" and "zero".
        direction: "noising" or "denoising".
        seed: of images and token groups.
        distance: of the corrupt images from the clean ones; at 1 they have nothing in common.
    """

    recipe: Recipe
    n_pairs: int = 2
    groups: str = "none"
    metric: str = "logit_diff"
    ablation: str = "patch"
    direction: str = "noising"
    seed: int = 0
    distance: float = 1.0

    @cached_property
    def module(self) -> Any:
        return self.recipe.build()

    @cached_property
    def model(self) -> cv.Model:
        return cv.wrap(self.module)

    @cached_property
    def clean(self) -> Tensor:
        return self.recipe.images(self.n_pairs, 2 * self.seed)

    @cached_property
    def corrupt(self) -> Tensor:
        others = self.recipe.images(self.n_pairs, 2 * self.seed + 1)
        return torch.lerp(self.clean, others, self.distance).float().double()

    def task(self, **changes: Any) -> cv.Task:
        """The task as a user would write it down."""
        groups = None if self.token_groups is None else cv.TokenGroups(GROUP_NAMES, self.token_groups.members)
        given = {
            "metric": METRICS[self.metric][0],
            "ablation": self.ablation,
            "direction": self.direction,
            "groups": groups,
        }
        return cv.Task(self.clean, self.corrupt, **{**given, **changes})

    # -- the same in the reference's words ---------------------------------------------------------

    @cached_property
    def literal(self) -> LiteralViT:
        return LiteralViT(self.module)

    @cached_property
    def token_groups(self) -> Groups | None:
        if self.groups == "none":
            return None
        shape = (self.recipe.n_tokens,) if self.groups == "shared" else (self.n_pairs, self.recipe.n_tokens)
        generator = torch.Generator().manual_seed(self.seed)
        return Groups(GROUP_NAMES, torch.randint(len(GROUP_NAMES), shape, generator=generator))

    @property
    def formula(self) -> MetricFunction:
        return METRICS[self.metric][1]

    @property
    def base(self) -> Tensor:
        """The images whose run is intervened on."""
        return self.clean if self.direction == "noising" else self.corrupt

    @property
    def paired(self) -> Tensor:
        """The images that the base images are paired with."""
        return self.corrupt if self.direction == "noising" else self.clean

    @cached_property
    def reference(self) -> dict[str, Tensor]:
        """What the senders write on ablated edges."""
        if self.ablation == "patch":
            return patch_reference(self.literal, self.paired)
        if self.ablation == "zero":
            return zero_reference(self.literal, self.base)
        both = torch.cat([self.clean, self.corrupt])
        return mean_reference(self.literal, self.base, both, per_token=self.ablation == "mean")

    def random_mask(self, seed: int, density: float) -> dict[str, bool]:
        """Edge names to whether they are kept."""
        edges = self.literal.edges(self.token_groups)
        drawn = torch.rand(len(edges), generator=torch.Generator().manual_seed(seed)) < density
        return {name: bool(keep) for (_, _, _, name), keep in zip(edges, drawn, strict=True)}


@st.composite
def cases(
    draw: st.DrawFn, *, ablations: Sequence[str] = ("patch", "mean", "mean-tokens", "zero"), **limits: Any
) -> Case:
    """Cases with a drawn model and a drawn task; `limits` are those of `recipes`."""
    recipe = draw(recipes(**limits))
    ablation = draw(st.sampled_from(ablations))
    directions = (
        ("noising", "denoising") if ablation == "patch" else ("noising",)
    )  # only a paired image can be restored
    return Case(
        recipe,
        n_pairs=draw(st.integers(1, 3)),
        groups=draw(st.sampled_from(("none", "shared", "per-image"))),
        metric=draw(st.sampled_from(sorted(METRICS))),
        ablation=ablation,
        direction=draw(st.sampled_from(directions)),
        seed=draw(st.integers(0, 2**16)),
    )


# -- comparisons -----------------------------------------------------------------------------------


def assert_same_scores(
    found: Mapping[str, float], expected: Mapping[str, float], relative: float = 1e-6
) -> None:
    """The same edges with the same scores, but for rounding at the size of the largest score (or of 1)."""
    assert list(found) == list(expected)
    scale = max(abs(score) for score in expected.values())
    for name, score in expected.items():
        allowed = relative * abs(score) + 1e-11 * max(1.0, scale)
        assert abs(found[name] - score) <= allowed, f"{name}: {found[name]!r} instead of {score!r}"


def assert_close(found: Tensor, expected: Tensor, relative: float = 1e-10) -> None:
    """Equal to rounding, for numbers of the size of the largest (or of 1)."""
    found, expected = found.detach(), expected.detach()
    scale = max(1.0, float(expected.abs().max()))
    difference = float((found - expected).abs().max())
    assert difference <= relative * scale, f"differs by {difference:.3g}, of {scale:.3g}"

"""Vision Transformers of transformers 5: a table of where each architecture keeps its parts.

Known: ViT, DeiT (with a teacher or without), MSN, I-JEPA, MAE's encoder, DINOv2 (with registers or without),
DINOv3, BEiT, CLIP, SigLIP and SigLIP 2, each alone and with what transformers puts on it to classify or to
project. Without a classifier the logits are features: what the model itself calls its pooled output,
projected where it has a projection; and of a model that pools nothing the class token after the last norm, or
the mean of all tokens where there is none.

Attention runs by torch's own kernel in the frozen copy, whatever backend the user's module has: it computes
the same, in any dtype.

Dosovitskiy et al. 2021, arXiv:2010.11929; Touvron et al. 2021, "DeiT", arXiv:2012.12877; Radford et al. 2021,
"CLIP", arXiv:2103.00020; Oquab et al. 2023, "DINOv2", arXiv:2304.07193; Siméoni et al. 2025, "DINOv3",
arXiv:2508.10104; He et al. 2022, "MAE", arXiv:2111.06377; Bao et al. 2022, "BEiT", arXiv:2106.08254.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib import import_module
from operator import attrgetter
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from circuitvit.errors import UnsupportedModelError
from circuitvit.models.attention import AttentionStage
from circuitvit.models.families.family import Family, Grid
from circuitvit.models.families.hf_load import spec_beside
from circuitvit.models.families.torch_layers import multihead
from circuitvit.models.layers import MLPStage
from circuitvit.models.parts import MLP, Attention, Derived, Latents, Linear, Readout, norm_of
from circuitvit.models.pooling import POOL, PoolingStage
from circuitvit.models.processor import ProcessorSpec
from circuitvit.models.stages import Stage, places
from circuitvit.models.zoo import InputSpec

HALF = ((0.5,) * 3, (0.5,) * 3)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Means and standard deviations of colours."""

PORTS = "query", "key", "value"
"""What projections were called before they were `q_proj`, `k_proj` and `v_proj`."""

LABEL = re.compile(r"LABEL_\d+")
"""What transformers calls classes that nobody has named."""


class ViT(Family):
    """ViT, MSN, and what the others have in common; each says what is different in it.

    Places are separated by "|" where versions of transformers differ.

    Attributes:
        inner: what holds the tower, in a model with something on it.
        layers: the blocks, from the tower.
        norms: of a block.
        attention: of a block, what holds the projections to queries, keys and values.
        out: the output projection, from a block.
        gammas: of LayerScale, from a block; None where there is none.
        last: the norm after the last block, from the tower.
        colours: mean and standard deviation that its images usually have.
        squeezed: whether its images are usually resized without regard to their proportions, and not cropped.
    """

    inner = "vit"
    layers = "layers|encoder.layer"
    norms = ("layernorm_before", "layernorm_after")
    attention = "attention.attention|attention"
    out = "attention.o_proj|attention.output.dense"
    gammas: tuple[str, str] | None = None
    last = "layernorm"
    colours, squeezed = HALF, True

    def tower(self, module: Any) -> Any:
        """The model without what is put on it to classify or to project."""
        return getattr(module, self.inner, module)

    # -- before the blocks ---------------------------------------------------------------------------

    def embed(self, module: Any, images: Tensor) -> Tensor:
        given = self.tower(module).embeddings(images)
        embedded: Tensor = given[0] if isinstance(given, tuple) else given
        return embedded

    def prefix(self, module: Any) -> tuple[str, ...]:
        return ("cls",)

    def grid(self, module: Any, height: int, width: int) -> Grid:
        rows, columns = pair(self.tower(module).config.patch_size)
        return height // rows, width // columns

    # -- the blocks ----------------------------------------------------------------------------------

    def blocks(self, module: Any) -> Sequence[nn.Module]:
        return tuple(at(self.tower(module), self.layers)[1])

    def block(self, module: Any, block: Any, layer: int, where: str) -> tuple[Stage, ...]:
        place, own = at(block, self.attention)
        named = [at(own, f"{port}_proj|{name}") for port, name in zip("qkv", PORTS, strict=True)]
        query, key, value = (linear(part, f"{where}.{place}.{name}") for name, part in named)
        name, part = at(block, self.out)
        out = linear(part, f"{where}.{name}")
        called, heads = at(own, "num_heads|num_attention_heads")
        scale = (len(query.full_weight) / heads) ** -0.5
        positions = {"resize": partial(setattr, own, called), **self.positions(module, block)}
        attention = Attention(heads, query, key, value, out, scale, **positions)
        norm1, norm2 = (norm_of(getattr(block, name), f"{where}.{name}") for name in self.norms)
        gamma1, gamma2 = (_gamma(block, name) for name in self.gammas or (None, None))
        first = AttentionStage(layer, norm1, attention, gamma1)
        return first, MLPStage(layer, norm2, mlp_of(block), gamma2)

    def positions(self, module: Any, block: Any) -> dict[str, Any]:
        """What in attention depends on places: `turn` or `added`, and what is derived for it."""
        return {}

    # -- after the blocks ----------------------------------------------------------------------------

    def readout(self, module: Any, stream: Tensor) -> Tensor:
        parts = self.readout_parts(module)
        assert parts is not None, "a family whose readout has no known parts says itself what it does"
        return parts(stream)

    def readout_parts(self, module: Any) -> Readout | None:
        tower, none = self.tower(module), norm_of(nn.Identity(), "none")
        norm = norm_of(attrgetter(self.last)(tower), self.last)
        if hasattr(module, "classifier"):
            return Readout(norm, self.classified(module), none, (module.classifier,), ("classifier",))
        pooler = getattr(tower, "pooler", None)
        if pooler is None:
            return Readout(norm, self.featured, none, (nn.Identity(),))
        return Readout(norm, _first, none, (nn.Sequential(pooler.dense, pooler.activation),), ("pooler",))

    def classified(self, module: Any) -> Any:
        """From the normed stream to what the classifier is given."""
        return _first

    def featured(self, normed: Tensor) -> Float[Tensor, "batch 1 d_model"]:
        """The features of a model that pools nothing."""
        return _first(normed)

    def run(self, module: Any, images: Tensor) -> Tensor:
        given = module(images, return_dict=True)
        for name in ("logits", "image_embeds", "pooler_output"):
            if given.get(name) is not None:
                return given[name]  # type: ignore[no-any-return]
        return self.featured(given.last_hidden_state)[:, 0]

    # -- the whole -----------------------------------------------------------------------------------

    def refuse(self, module: Any) -> None:
        if not len(self.blocks(module)):
            raise UnsupportedModelError("the model has no blocks, so there is no circuit to look for")

    def settle(self, module: Any, spec: InputSpec) -> None:
        for config in {
            id(part.config): part.config for part in module.modules() if hasattr(part, "config")
        }.values():
            # What is recorded on the side would be hooks in the copy, and some backends know few dtypes.
            config.output_attentions = config.output_hidden_states = False
            config.return_dict = True
            config._attn_implementation = "sdpa"

    def classifies(self, module: Any) -> bool:
        heads = (getattr(module, name, None) for name in ("classifier", "cls_classifier"))
        return any(isinstance(head, nn.Module) and not isinstance(head, nn.Identity) for head in heads)

    def classes(self, module: Any) -> tuple[str, ...] | None:
        names = tuple(str(name) for _, name in sorted(module.config.id2label.items()))
        is_named = self.classifies(module) and not all(LABEL.fullmatch(name) for name in names)
        return names if is_named else None

    def preprocessing(self, module: Any) -> InputSpec:
        beside = spec_beside(module.config)
        return self.usual(module) if beside is None else beside

    def usual(self, module: Any) -> InputSpec:
        """How images of this architecture usually become inputs, where nothing says it of this one."""
        config = self.tower(module).config
        height, width = pair(config.image_size)
        channels = config.num_channels
        mean, std = self.colours if channels == 3 else (HALF[0][:1] * channels,) * 2
        resize = (height, width) if self.squeezed else (min(height, width),)
        return ProcessorSpec((channels, height, width), mean, std, "bicubic", resize=resize)

    def name(self, module: Any) -> str:
        return module.config.name_or_path or type(module).__name__


class DeiT(ViT):
    """DeiT, whose second token learned from a teacher; with a head for each the logits are their mean."""

    inner, colours = "deit", IMAGENET

    def prefix(self, module: Any) -> tuple[str, ...]:
        return ("cls", "dist")

    def readout_parts(self, module: Any) -> Readout | None:
        if not hasattr(module, "cls_classifier"):
            return super().readout_parts(module)
        norm, none = norm_of(module.deit.layernorm, "layernorm"), norm_of(nn.Identity(), "none")
        heads = module.cls_classifier, module.distillation_classifier
        return Readout(norm, _first_two, none, heads, ("cls_classifier", "distillation_classifier"))


class MAE(ViT):
    """The encoder of MAE, with its masking off."""

    def embed(self, module: Any, images: Tensor) -> Tensor:
        return module.embeddings(images, noise=self._order(module, images))[0]  # type: ignore[no-any-return]

    def run(self, module: Any, images: Tensor) -> Tensor:
        given = module(images, noise=self._order(module, images), return_dict=True)
        return given.last_hidden_state[:, 0]  # type: ignore[no-any-return]

    def refuse(self, module: Any) -> None:
        super().refuse(module)
        if module.config.mask_ratio != 0:
            raise UnsupportedModelError(
                f"{type(module).__name__} hides {module.config.mask_ratio:.0%} of the patches, others in "
                "every run (mask_ratio): set module.config.mask_ratio = 0.0 before wrapping"
            )

    @staticmethod
    def _order(module: Any, images: Tensor) -> Float[Tensor, "batch patch"]:
        """Noise by which the patches stay in order; without it even patches that all stay are shuffled."""
        patches = module.embeddings.patch_embeddings.num_patches
        return torch.arange(patches, device=images.device, dtype=torch.float32).expand(len(images), -1)


class IJepa(ViT):
    """I-JEPA, which has no class token: its features are the mean of the patches."""

    inner, colours = "ijepa", IMAGENET

    def prefix(self, module: Any) -> tuple[str, ...]:
        return ()

    def classified(self, module: Any) -> Any:
        return _patches

    def featured(self, normed: Tensor) -> Float[Tensor, "batch 1 d_model"]:
        return _patches(normed)


class Dinov2(ViT):
    """DINOv2; a classifier reads the class token beside the mean of the patches."""

    inner, norms = "dinov2", ("norm1", "norm2")
    gammas = "layer_scale1.lambda1", "layer_scale2.lambda1"
    colours, squeezed = IMAGENET, False

    def classified(self, module: Any) -> Any:
        return partial(_first_and_patches, skip=len(self.prefix(module)))


class Dinov2WithRegisters(Dinov2):
    """DINOv2 with registers behind the class token."""

    inner = "dinov2_with_registers"

    def prefix(self, module: Any) -> tuple[str, ...]:
        return ("cls", *("reg",) * module.config.num_register_tokens)


class DINOv3(Dinov2WithRegisters):
    """DINOv3: queries and keys of the patches are turned by their places, so that images have one size."""

    layers, last, squeezed = "model.layer|layer", "norm", True

    def positions(self, module: Any, block: Any) -> dict[str, Any]:
        derived = Derived()
        return {"turn": partial(_turned, module, len(self.prefix(module)), derived), "derived": derived}

    def settle(self, module: Any, spec: InputSpec) -> None:
        super().settle(module, spec)
        module.config.image_size = spec.size[1:]  # nothing reads it but what is above


class Beit(ViT):
    """BEiT: scores have biases by relative position, of each block or of all; images have one size."""

    inner = "beit"
    gammas = "lambda_1", "lambda_2"

    def positions(self, module: Any, block: Any) -> dict[str, Any]:
        tower = self.tower(module)
        shared = _if_any(tower, "shared_position_bias|encoder.relative_position_bias")
        own = _if_any(block, "relative_position_bias|attention.attention.relative_position_bias")
        tables = [each for each in (shared, own) if each is not None]
        if not tables:
            return {}
        derived = Derived()
        weight = at(block, self.out)[1].weight
        added = partial(_biases, tables, self.grid(module, *tower.config.image_size), weight, derived)
        return {"added": added, "derived": derived}

    def readout_parts(self, module: Any) -> Readout:
        tower, none = self.tower(module), norm_of(nn.Identity(), "none")
        norm = norm_of(tower.layernorm, "layernorm")
        head, name = (
            (module.classifier, "classifier") if hasattr(module, "classifier") else (nn.Identity(), "pooler")
        )
        if tower.pooler is None or tower.pooler.layernorm is None:
            return Readout(norm, _first, none, (head,), (name,))
        after = norm_of(tower.pooler.layernorm, "pooler.layernorm")
        return Readout(norm, partial(_patches, skip=1), after, (head,), (name,))

    def settle(self, module: Any, spec: InputSpec) -> None:
        super().settle(module, spec)
        self.tower(module).config.image_size = spec.size[
            1:
        ]  # the tables that are interpolated are made already


class CLIP(ViT):
    """CLIP's image tower, alone, projected, with a classifier, and in the whole model; texts take no part."""

    inner, layers, norms = "vision_model", "encoder.layers", ("layer_norm1", "layer_norm2")
    attention, out, last = "self_attn", "self_attn.out_proj", "post_layernorm"
    colours, squeezed = OPENAI, False

    def embed(self, module: Any, images: Tensor) -> Tensor:
        tower = self.tower(module)
        return tower.pre_layrnorm(tower.embeddings(images))  # type: ignore[no-any-return]

    def readout_parts(self, module: Any) -> Readout:
        tower, none = self.tower(module), norm_of(nn.Identity(), "none")
        if hasattr(module, "classifier"):  # which reads the stream as it is
            return Readout(none, partial(_patches, skip=1), none, (module.classifier,), ("classifier",))
        head = getattr(module, "visual_projection", nn.Identity())
        return Readout(
            norm_of(tower.post_layernorm, self.last), _first, none, (head,), ("visual_projection",)
        )

    def unused(self, module: Any) -> Sequence[nn.Module]:
        return (module.text_model,) if hasattr(module, "text_model") else ()

    def run(self, module: Any, images: Tensor) -> Tensor:
        if hasattr(module, "text_model"):
            found: Tensor = module.get_image_features(images, return_dict=True).pooler_output
            return found
        return super().run(module, images)


class Siglip(CLIP):
    """SigLIP's image tower, alone, with a classifier, and in the whole model; it has no class token."""

    colours, squeezed = HALF, True

    def embed(self, module: Any, images: Tensor) -> Tensor:
        return self.tower(module).embeddings(images)  # type: ignore[no-any-return]

    def prefix(self, module: Any) -> tuple[str, ...]:
        return ()

    def pool(self, module: Any) -> tuple[Stage, ...]:
        tower = self.tower(module)
        if not self._pools(module):
            return ()
        layer, head = len(self.blocks(module)), tower.head
        both, own = multihead(head.attention, "head.attention"), head.attention
        packed = Linear(own.in_proj_weight, own.in_proj_bias)
        width = own.embed_dim
        attention = replace(
            both,
            query=None,
            packed=replace(packed, rows=(width, 3 * width)),
            latents=Latents(head.probe, packed.part(0, 3)),
        )
        first = PoolingStage(layer, norm_of(tower.post_layernorm, self.last), attention)
        norm = norm_of(head.layernorm, "head.layernorm")
        return first, MLPStage(layer, norm, mlp_of(head), part=POOL)

    def readout_parts(self, module: Any) -> Readout:
        none = norm_of(nn.Identity(), "none")
        if self._pools(module):
            return Readout(none, _first, none, (nn.Identity(),))
        norm = norm_of(self.tower(module).post_layernorm, self.last)
        return Readout(norm, _patches, none, (getattr(module, "classifier", nn.Identity()),), ("classifier",))

    def featured(self, normed: Tensor) -> Float[Tensor, "batch 1 d_model"]:
        return _patches(normed)

    def _pools(self, module: Any) -> bool:
        """Whether its features are what a head with a query of its own gathers; a classifier has none."""
        return not hasattr(module, "classifier") and self.tower(module).use_head


class Siglip2(Siglip):
    """SigLIP 2 with images of one size, whose patches are cut here as its image processor cuts them."""

    def embed(self, module: Any, images: Tensor) -> Tensor:
        return self.tower(module).embeddings(*self._cut(module, images))  # type: ignore[no-any-return]

    def run(self, module: Any, images: Tensor) -> Tensor:
        patches, shapes = self._cut(module, images)
        options = {"pixel_attention_mask": None, "spatial_shapes": shapes, "return_dict": True}
        if hasattr(module, "text_model"):
            return module.get_image_features(patches, **options).pooler_output  # type: ignore[no-any-return]
        given = module(patches, **options)
        if given.get("logits") is not None:
            return given.logits  # type: ignore[no-any-return]
        pooled = given.pooler_output
        return self.featured(given.last_hidden_state)[:, 0] if pooled is None else pooled

    def usual(self, module: Any) -> InputSpec:
        config = self.tower(module).config
        side = int(config.num_patches**0.5) * config.patch_size
        mean = (0.5,) * config.num_channels
        return ProcessorSpec((config.num_channels, side, side), mean, mean, "bilinear", resize=(side, side))

    def _cut(self, module: Any, images: Tensor) -> tuple[Float[Tensor, "batch patch pixel"], Tensor]:
        """The patches, row by row, colours last; and how many rows and columns each image has."""
        rows, columns = self.grid(module, *images.shape[2:])
        patches = rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", h=rows, w=columns)
        return patches, torch.tensor([[rows, columns]] * len(images), device=images.device)


VIT, DEIT, MAE_ENCODER, I_JEPA = ViT(), DeiT(), MAE(), IJepa()
DINOV2, DINOV2_REGISTERS, DINOV3, BEIT = Dinov2(), Dinov2WithRegisters(), DINOv3(), Beit()
CLIP_TOWER, SIGLIP, SIGLIP2 = CLIP(), Siglip(), Siglip2()


# -- parts ---------------------------------------------------------------------------------------


def at(owner: Any, places: str) -> tuple[str, Any]:
    """The first of these places that an owner has, and what is there.

    Raises:
        AttributeError: if it has none of them.
    """
    for place in places.split("|"):
        with suppress(AttributeError):
            return place, attrgetter(place)(owner)
    raise AttributeError(f"{type(owner).__name__} has no {places.replace('|', ' and no ')}")


def _if_any(owner: Any, places: str) -> Any:
    """What is at the first of these places that an owner has; None where it has none of them."""
    with suppress(AttributeError):
        return at(owner, places)[1]
    return None


def mlp_of(block: Any) -> MLP:
    """The MLP of a block, with the names of its parts if it is one of transformers' own."""
    if hasattr(block, "intermediate"):
        first, last = block.intermediate, block.output.dense
        return MLP(nn.Sequential(first.dense, first.intermediate_act_fn, last), True, "1", (), None, "2")
    module = block.mlp
    names = {name for name, _ in module.named_children()}
    known = {
        ("activation", "fc1", "fc2"): ("activation", (), "fc2"),
        ("activation_fn", "fc1", "fc2"): ("activation_fn", (), "fc2"),
        ("act_fn", "down_proj", "up_proj"): ("act_fn", (), "down_proj"),
        ("act_fn", "down_proj", "gate_proj", "up_proj"): ("act_fn", ("gate_proj", "up_proj"), "down_proj"),
    }.get(tuple(sorted(names)))
    if known is None or not type(module).__module__.startswith("transformers.models."):
        return MLP(module)
    act, gates, out = known
    return MLP(module, True, act, gates, None, out)


def linear(part: Any, where: str) -> Linear:
    if not isinstance(part, nn.Linear):
        raise UnsupportedModelError(
            f"{where} is a {type(part).__name__}: only a plain nn.Linear can be told apart by head"
        )
    return Linear.of(part)


def _gamma(block: Any, name: str | None) -> Tensor | None:
    """The factor `(d_model,)` of a LayerScale; None where the block has none, or a number that is 1."""
    found = None if name is None else attrgetter(name)(block)
    return found if isinstance(found, Tensor) else None


def _turned(module: Any, prefix: int, derived: Derived, x: Tensor, heads: Sequence[int]) -> Tensor:
    """What DINOv3 does to queries and keys: patches are turned, tokens before them are not."""
    rope = module.rope_embeddings
    tables = derived.get("turn", tuple(rope.buffers()), partial(_tables, module, prefix))
    cosines, sines = (each[: x.shape[2]].to(x) for each in tables)
    rotate_half = import_module("transformers.models.dinov3_vit.modeling_dinov3_vit").rotate_half
    turned: Tensor = x * cosines + rotate_half(x) * sines
    return turned


def _tables(module: Any, prefix: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines by token, `(token, d_head)` each."""
    weight = module.embeddings.patch_embeddings.weight
    blank = weight.new_zeros(1, weight.shape[1], *pair(module.config.image_size))
    cosines, sines = module.rope_embeddings(blank)
    still = cosines.new_zeros(prefix, cosines.shape[1])
    return torch.cat([still + 1, cosines]), torch.cat([still, sines])


def _biases(
    tables: Sequence[Any], grid: Grid, weight: Tensor, derived: Derived, heads: Sequence[int]
) -> Float[Tensor, "head query key"]:
    """The sum of BEiT's biases for a grid of patches, in the dtype of a weight."""

    def make() -> Float[Tensor, "head query key"]:
        return torch.stack([table(grid)[0].to(weight) for table in tables]).sum(dim=0)

    sources = [table.relative_position_bias_table for table in tables]
    return derived.get("added", sources, make)[places(heads)]


def _first(normed: Tensor) -> Float[Tensor, "batch 1 d_model"]:
    return normed[:, :1]


def _first_two(normed: Tensor) -> Float[Tensor, "batch 2 d_model"]:
    """The class token for the one classifier, the distillation token for the other."""
    return normed[:, :2]


def _patches(normed: Tensor, skip: int = 0) -> Float[Tensor, "batch 1 d_model"]:
    """The mean of the patches, behind so many other tokens."""
    return normed[:, skip:].mean(dim=1, keepdim=True)


def _first_and_patches(normed: Tensor, skip: int) -> Float[Tensor, "batch 1 width"]:
    return torch.cat([normed[:, :1], _patches(normed, skip)], dim=-1)


def pair(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)

"""CLIP's image towers as OpenAI's `clip` and `open_clip` write them: `VisionTransformer` with packed
projections.

Their features are the logits of a model without classes: the class token, or the mean of the patches, after
the last norm and times `proj`. A whole `CLIP` model is taken for its image tower, `visual`.

Radford et al. 2021, "Learning transferable visual models from natural language supervision",
arXiv:2103.00020.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from circuitvit.errors import UnsupportedModelError
from circuitvit.models.attention import AttentionStage
from circuitvit.models.families.family import Family, Grid
from circuitvit.models.families.torch_layers import cross_attention, multihead
from circuitvit.models.layers import MLPStage
from circuitvit.models.parts import MLP, Attention, Latents, Linear, Norm, Readout, norm_of
from circuitvit.models.pooling import PoolingStage
from circuitvit.models.stages import Stage
from circuitvit.models.zoo import InputSpec

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of OpenAI's images, which open_clip takes too unless a model says otherwise."""


class OpenAIClip(Family):
    """`VisionTransformer` of OpenAI's `clip`, whose blocks take tokens first."""

    def embed(self, module: Any, images: Tensor) -> Tensor:
        patches = module.conv1(images).flatten(2).transpose(1, 2)
        classes = module.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        stream = torch.cat([classes, patches], dim=1) + module.positional_embedding.to(patches.dtype)
        return module.ln_pre(stream)  # type: ignore[no-any-return]

    def blocks(self, module: Any) -> Sequence[nn.Module]:
        return tuple(module.transformer.resblocks)

    def block(self, module: Any, block: Any, layer: int, where: str) -> tuple[Stage, ...]:
        for cause in _block_problems(block):
            raise UnsupportedModelError(f"{where} {cause}")
        norms = [
            norm_of(norm, f"{where}.ln_{place}") for place, norm in enumerate((block.ln_1, block.ln_2), 1)
        ]
        gammas = [_gamma(getattr(block, name, None), f"{where}.{name}") for name in ("ls_1", "ls_2")]
        attention = _attention(block.attn, f"{where}.attn")
        return (
            AttentionStage(layer, norms[0], attention, gammas[0]),
            MLPStage(layer, norms[1], _mlp(block.mlp), gammas[1]),
        )

    def token_first(self, module: Any) -> bool:
        return True

    def readout(self, module: Any, stream: Tensor) -> Tensor:
        return _projected(module, module.ln_post(stream[:, 0]))

    def readout_parts(self, module: Any) -> Readout:
        none = norm_of(nn.Identity(), "none")
        return Readout(norm_of(module.ln_post, "ln_post"), _first, none, (_projection(module),), ("proj",))

    def refuse(self, module: Any) -> None:
        if not len(module.transformer.resblocks):
            raise UnsupportedModelError("the model has no blocks, so there is no circuit to look for")
        dtypes = {tensor.dtype for tensor in module.parameters()}
        if len(dtypes) > 1:
            found = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            raise UnsupportedModelError(
                f"the weights of {type(module).__name__} are {found} together (convert_weights): "
                "make them one with module.float()"
            )

    def classifies(self, module: Any) -> bool:
        return False

    def grid(self, module: Any, height: int, width: int) -> Grid:
        rows, columns = module.conv1.stride
        return height // rows, width // columns

    def preprocessing(self, module: Any) -> InputSpec | None:
        side, channels = module.input_resolution, module.conv1.in_channels
        return InputSpec((channels, side, side), MEAN, STD)


class OpenClip(OpenAIClip):
    """`VisionTransformer` of `open_clip`, with its switches; its blocks take the batch first by now."""

    def embed(self, module: Any, images: Tensor) -> Tensor:
        patches = module.conv1(images).flatten(2).transpose(1, 2)
        classes = module.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        stream = torch.cat([classes, patches], dim=1) + module.positional_embedding.to(patches.dtype)
        return module.ln_pre(module.patch_dropout(stream))  # type: ignore[no-any-return]

    def run(self, module: Any, images: Tensor) -> Tensor:
        return module(images)[0] if module.output_tokens else module(images)  # type: ignore[no-any-return]

    def token_first(self, module: Any) -> bool:
        return not getattr(module.transformer, "batch_first", False)

    def pool(self, module: Any) -> tuple[Stage, ...]:
        if module.attn_pool is None:
            return ()
        return (PoolingStage(len(module.transformer.resblocks), *_pooling(module.attn_pool)),)

    def readout(self, module: Any, stream: Tensor) -> Tensor:
        norms_after = _norms_after(module)
        pooled = module._global_pool(stream if norms_after else module.ln_post(stream))[0]
        return _projected(module, module.ln_post(pooled) if norms_after else pooled)

    def readout_parts(self, module: Any) -> Readout:
        none, norm = norm_of(nn.Identity(), "none"), norm_of(module.ln_post, "ln_post")
        before, after = (none, norm) if _norms_after(module) else (norm, none)
        return Readout(before, partial(_pooled, module), after, (_projection(module),), ("proj",))

    def refuse(self, module: Any) -> None:
        super().refuse(module)
        if getattr(module, "attn_pool_contrastive", None) is not None:
            raise UnsupportedModelError(
                f"attn_pool_contrastive (attentional_pool={module.attn_pool_type!r}) is a second pool, "
                "which is not supported: attentional_pool=True is"
            )
        if module.pool_type == "none":
            raise UnsupportedModelError(
                "pool_type='none' gives one vector for each token; the features must be (batch, feature)"
            )

    def preprocessing(self, module: Any) -> InputSpec | None:
        return _input_spec(module)


class TimmTrunk(Family):
    """open_clip's `TimmModel`: a model of timm's, of a family of its own, and a projection behind it."""

    def _family(self, module: Any) -> Family:
        from circuitvit.models.registry import family_of  # which looks families up and comes after them

        found = family_of(module.trunk)
        if not isinstance(found, Family):
            raise UnsupportedModelError(
                "trunk is of a class that only a layout is known of: wrap model.visual.trunk"
            )
        return found

    def embed(self, module: Any, images: Tensor) -> Tensor:
        return self._family(module).embed(module.trunk, images)

    def blocks(self, module: Any) -> Sequence[nn.Module]:
        return self._family(module).blocks(module.trunk)

    def block(self, module: Any, block: Any, layer: int, where: str) -> tuple[Stage, ...]:
        return self._family(module).block(module.trunk, block, layer, where)

    def pool(self, module: Any) -> tuple[Stage, ...]:
        return self._family(module).pool(module.trunk)

    def token_first(self, module: Any) -> bool:
        return self._family(module).token_first(module.trunk)

    def readout(self, module: Any, stream: Tensor) -> Tensor:
        return module.head(self._family(module).readout(module.trunk, stream))  # type: ignore[no-any-return]

    def readout_parts(self, module: Any) -> Readout | None:
        parts, head = self._family(module).readout_parts(module.trunk), module.head
        layers = list(head) if isinstance(head, nn.Sequential) else [head]
        layers = [layer for layer in layers if not isinstance(layer, nn.Dropout)]
        if parts is None or not layers:
            return parts
        if len(layers) > 1 or not all(isinstance(head, nn.Identity) for head in parts.heads):
            return None
        return replace(parts, heads=(layers[0],), names=("head",))

    def refuse(self, module: Any) -> None:
        self._family(module).refuse(module.trunk)

    def prefix(self, module: Any) -> tuple[str, ...]:
        return self._family(module).prefix(module.trunk)

    def grid(self, module: Any, height: int, width: int) -> Grid | None:
        return self._family(module).grid(module.trunk, height, width)

    def resizable(self, module: Any) -> bool:
        return self._family(module).resizable(module.trunk)

    def classifies(self, module: Any) -> bool:
        return False

    def preprocessing(self, module: Any) -> InputSpec | None:
        if not hasattr(module, "preprocess_cfg"):
            return self._family(module).preprocessing(module.trunk)
        return _input_spec(module)

    def name(self, module: Any) -> str:
        return self._family(module).name(module.trunk)


OPENAI, OPEN_CLIP, TIMM_TRUNK = OpenAIClip(), OpenClip(), TimmTrunk()


def _input_spec(module: Any) -> InputSpec | None:
    """What open_clip's `preprocess_cfg` says of images.

    None where it fills up what is not square, or crops to what is not square, which it does by an
    interpolation of its own.
    """
    config = getattr(module, "preprocess_cfg", None) or {}
    modes = {"shortest": "center", "squash": "squash"}
    if (mode := modes.get(config.get("resize_mode") or "shortest")) is None:
        return None
    size = config.get("size") or module.image_size
    height, width = (size, size) if isinstance(size, int) else size
    if mode == "center" and height != width:
        return None
    mean, std = (tuple(map(float, config.get(name) or own)) for name, own in (("mean", MEAN), ("std", STD)))
    interpolation = config.get("interpolation") or "bicubic"
    return InputSpec((3, int(height), int(width)), mean, std, interpolation, crop_mode=mode)


# -- parts ---------------------------------------------------------------------------------------


def _block_problems(block: Any) -> Iterator[str]:
    kinds = {base.__name__ for base in type(block).__mro__}
    if not kinds & {"ResidualAttentionBlock", "CustomResidualAttentionBlock"}:
        yield f"is a {type(block).__name__}: only CLIP's ResidualAttentionBlock is supported"
    if hasattr(block, "ln_1_kv"):
        yield "attends to other tokens than its own (is_cross_attention=True)"
    if not isinstance(getattr(block, "ln_attn", nn.Identity()), nn.Identity):
        yield "norms what its heads write together (scale_attn=True), so that none has an output of its own"


def _attention(module: Any, where: str) -> Attention:
    if isinstance(module, nn.MultiheadAttention):
        return multihead(module, where)
    if type(module).__name__ != "Attention" or not isinstance(module.out_proj, nn.Linear):
        raise UnsupportedModelError(f"{where} is a {type(module).__name__}, whose parts are unknown")
    if module.logit_scale is not None:
        raise UnsupportedModelError(
            f"{where} compares by cosine (scaled_cosine=True), which is not supported"
        )
    if module.head_scale is not None:
        raise UnsupportedModelError(f"{where} scales its heads (scale_heads=True), which is not supported")
    places = {"query_norm": "ln_q", "key_norm": "ln_k", "across": "ln_inner"}
    norms = {
        name: norm_of(norm, f"{where}.{place}")
        for name, place in places.items()
        if not isinstance(norm := getattr(module, place, nn.Identity()), nn.Identity)
    }
    packed, out = Linear(module.in_proj_weight, module.in_proj_bias), Linear.of(module.out_proj)
    return Attention.of_packed(module.num_heads, packed, out, module.head_dim**-0.5, **norms)


def _mlp(module: Any) -> MLP:
    """An MLP of CLIP's with the names of its parts; of any other making the module alone."""
    names = tuple(name for name, _ in module.named_children())
    if names not in (("c_fc", "gelu", "c_proj"), ("c_fc", "gelu", "ln", "c_proj")):
        return MLP(module)
    return MLP(module, True, "gelu", (), "ln" if "ln" in names else None, "c_proj")


def _gamma(scale: Any, where: str) -> Tensor | None:
    """The factor `(d_model,)` of a LayerScale, or None where there is none."""
    if scale is None or isinstance(scale, nn.Identity):
        return None
    if type(scale).__name__ != "LayerScale":
        raise UnsupportedModelError(
            f"{where} is a {type(scale).__name__}: only LayerScale and Identity are known"
        )
    return scale.gamma  # type: ignore[no-any-return]


def _pooling(pool: Any) -> tuple[Norm, Attention]:
    """CoCa's `AttentionalPooler`: learned queries of torch's attention, which has a width of its own.

    Yu et al. 2022, "CoCa: contrastive captioners are image-text foundation models", arXiv:2205.01917.
    """
    if type(pool).__name__ != "AttentionalPooler":
        raise UnsupportedModelError(
            f"attn_pool is a {type(pool).__name__}: only open_clip's AttentionalPooler is known"
        )
    query, attention = cross_attention(pool.attn, "attn_pool.attn")
    latents = Latents(pool.query, query, norm_of(pool.ln_q, "attn_pool.ln_q"))
    return norm_of(pool.ln_k, "attn_pool.ln_k"), replace(attention, latents=latents)


def _norms_after(module: Any) -> bool:
    """Whether the last norm comes after pooling; of latents it never does."""
    return bool(module.final_ln_after_pool and module.attn_pool is None)


def _projection(module: Any) -> nn.Module | Linear:
    return nn.Identity() if module.proj is None else Linear(module.proj, transposed=True)


def _projected(module: Any, pooled: Tensor) -> Tensor:
    return pooled if module.proj is None else pooled @ module.proj


def _first(normed: Tensor) -> Tensor:
    return normed[:, :1]


def _pooled(module: Any, normed: Tensor) -> Tensor:
    pooled: Tensor = module._global_pool(normed)[0]
    return pooled[:, None]

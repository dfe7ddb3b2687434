"""A Vision Transformer of timm's on its raw weights, in which attention and tokens can be changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import circuitvit as cv
from circuitvit.models import Model
from circuitvit.models.timm_import import import_timm
from circuitvit.models.zoo import InputSpec

Lost = Mapping[tuple[int, int], Tensor]
"""For (layer, head) the attention that is lost, `(query, key)`."""


def micro(seed: int = 0, **more: object) -> tuple[Model, nn.Module]:
    """Two layers, two heads, four patches of 4 x 4 pixels, with weights large enough to matter."""
    torch.manual_seed(seed)
    options = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 3}
    module = import_timm().models.VisionTransformer(**{**options, **more}).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))
    spec = InputSpec((3, 8, 8), (0.5,) * 3, (0.5,) * 3, "bilinear")
    return cv.wrap(module, name="micro", preprocessing=spec), module


def embedded(module: nn.Module, images: Tensor) -> Tensor:
    patches = F.conv2d(images, module.patch_embed.proj.weight, module.patch_embed.proj.bias, stride=4)
    patches = patches.flatten(2).transpose(1, 2)
    return torch.cat([module.cls_token.expand(len(images), -1, -1), patches], dim=1) + module.pos_embed


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


@torch.no_grad()
def literal(
    module: nn.Module,
    images: Tensor,
    lost: Lost | None = None,
    instead: Mapping[tuple[int, int], tuple[Tensor, Tensor]] | None = None,
    change: Callable[[int, Tensor], Tensor] = lambda layer, x: x,
    seen: dict[tuple[int, int], tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """Logits.

    Args:
        lost: attention that is not paid: its scores are minus infinity.
        instead: pattern and values of another run, whose message stands in for what is lost.
        change: of the stream before each block.
        seen: a table that pattern and values are written into.
    """
    x = embedded(module, images)
    for layer, block in enumerate(module.blocks):
        x = change(layer, x)
        query, key, value = F.linear(
            normed(block.norm1, x), block.attn.qkv.weight, block.attn.qkv.bias
        ).chunk(3, dim=-1)
        written, width = [], x.shape[-1] // 2
        for head in range(2):
            part = slice(head * width, (head + 1) * width)
            scores = query[..., part] @ key[..., part].transpose(1, 2) / width**0.5
            gone = (lost or {}).get((layer, head))
            if gone is not None and instead is None:
                scores = scores.masked_fill(gone, -torch.inf)
            pattern = scores.softmax(dim=-1)
            if seen is not None:
                seen[layer, head] = pattern, value[..., part]
            mixed = pattern @ value[..., part]
            if gone is not None and instead is not None:
                other_pattern, other_value = instead[layer, head]
                mixed = (pattern * ~gone) @ value[..., part] + (other_pattern * gone) @ other_value
            written.append(mixed)
        x = x + F.linear(torch.cat(written, dim=-1), block.attn.proj.weight, block.attn.proj.bias)
        hidden = F.gelu(F.linear(normed(block.norm2, x), block.mlp.fc1.weight, block.mlp.fc1.bias))
        x = x + F.linear(hidden, block.mlp.fc2.weight, block.mlp.fc2.bias)
    return F.linear(normed(module.norm, x)[:, 0], module.head.weight, module.head.bias)

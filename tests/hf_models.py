"""Micro-models of transformers, from configurations alone, and where each keeps what are nodes here."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from circuitvit.models.timm_import import import_timm
from tests.reference.hooked import (
    HookedModule,
    Receiver,
    Sender,
    exchanged_in_multihead,
    given,
    gives,
    one_head,
    written_by_head,
)

import_timm()  # after which torchvision can be imported, which transformers would trip over
import transformers as hf  # noqa: E402
from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches  # noqa: E402

CLASSES, HEADS, WIDTH = 5, 2, 12
SMALL: dict[str, Any] = {
    "hidden_size": HEADS * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 16,
}
TEXT: dict[str, Any] = {
    "vocab_size": 9,
    "hidden_size": 12,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def vit(kind: type, config: type, **options: Any) -> Callable[[], Any]:
    return lambda: kind(config(**{**SMALL, "num_labels": CLASSES, **options}))


def two_towers(kind: type, config: type, **options: Any) -> Callable[[], Any]:
    vision = {**SMALL, "num_patches": 4} if config is hf.Siglip2Config else SMALL
    return lambda: kind(config(text_config=TEXT, vision_config=dict(vision), num_labels=CLASSES, **options))


RELATIVE = {"use_relative_position_bias": True}
SHARED = {"use_shared_relative_position_bias": True, "use_absolute_position_embeddings": True}
REGISTERS = {"num_register_tokens": 2}

MODELS: dict[str, Callable[[], Any]] = {
    "vit": vit(hf.ViTModel, hf.ViTConfig),
    "vit, no pooler": lambda: hf.ViTModel(hf.ViTConfig(**SMALL, qkv_bias=False), add_pooling_layer=False),
    "vit, classes": vit(hf.ViTForImageClassification, hf.ViTConfig),
    "vit, no classes": vit(hf.ViTForImageClassification, hf.ViTConfig, num_labels=0),
    "deit": vit(hf.DeiTModel, hf.DeiTConfig),
    "deit, classes": vit(hf.DeiTForImageClassification, hf.DeiTConfig),
    "deit, teacher": vit(hf.DeiTForImageClassificationWithTeacher, hf.DeiTConfig),
    "msn": vit(hf.ViTMSNModel, hf.ViTMSNConfig),
    "msn, classes": vit(hf.ViTMSNForImageClassification, hf.ViTMSNConfig),
    "mae": vit(hf.ViTMAEModel, hf.ViTMAEConfig, mask_ratio=0.0),
    "ijepa": vit(hf.IJepaModel, hf.IJepaConfig),
    "ijepa, classes": vit(hf.IJepaForImageClassification, hf.IJepaConfig),
    "dinov2": vit(hf.Dinov2Model, hf.Dinov2Config),
    "dinov2, swiglu": vit(hf.Dinov2Model, hf.Dinov2Config, use_swiglu_ffn=True),
    "dinov2, classes": vit(hf.Dinov2ForImageClassification, hf.Dinov2Config),
    "dinov2, no classes": vit(hf.Dinov2ForImageClassification, hf.Dinov2Config, num_labels=0),
    "dinov2, registers": vit(hf.Dinov2WithRegistersModel, hf.Dinov2WithRegistersConfig, **REGISTERS),
    "dinov2, registers and classes": vit(
        hf.Dinov2WithRegistersForImageClassification, hf.Dinov2WithRegistersConfig, **REGISTERS
    ),
    "dinov3": vit(hf.DINOv3ViTModel, hf.DINOv3ViTConfig, **REGISTERS),
    "dinov3, gated": vit(
        hf.DINOv3ViTModel, hf.DINOv3ViTConfig, num_register_tokens=0, use_gated_mlp=True, key_bias=True
    ),
    "beit": vit(hf.BeitModel, hf.BeitConfig, **RELATIVE),
    "beit, shared": vit(hf.BeitModel, hf.BeitConfig, **RELATIVE, **SHARED, use_mean_pooling=False),
    "beit, no pooler": lambda: hf.BeitModel(hf.BeitConfig(**SMALL, **RELATIVE), add_pooling_layer=False),
    "beit, classes": vit(hf.BeitForImageClassification, hf.BeitConfig, **RELATIVE),
    "beit, plain": vit(hf.BeitForImageClassification, hf.BeitConfig, layer_scale_init_value=0.0),
    "clip": vit(hf.CLIPVisionModel, hf.CLIPVisionConfig),
    "clip, projected": vit(hf.CLIPVisionModelWithProjection, hf.CLIPVisionConfig, projection_dim=CLASSES),
    "clip, both towers": two_towers(hf.CLIPModel, hf.CLIPConfig, projection_dim=CLASSES),
    "clip, classes": two_towers(hf.CLIPForImageClassification, hf.CLIPConfig),
    "siglip": vit(hf.SiglipVisionModel, hf.SiglipVisionConfig),
    "siglip, both towers": two_towers(hf.SiglipModel, hf.SiglipConfig),
    "siglip2": vit(hf.Siglip2VisionModel, hf.Siglip2VisionConfig, num_patches=4),
    "siglip2, both towers": two_towers(hf.Siglip2Model, hf.Siglip2Config),
    "siglip, no head": vit(hf.SiglipVisionModel, hf.SiglipVisionConfig, vision_use_head=False),
    "siglip, classes": two_towers(hf.SiglipForImageClassification, hf.SiglipConfig),
    "siglip2, no head": vit(
        hf.Siglip2VisionModel, hf.Siglip2VisionConfig, num_patches=4, vision_use_head=False
    ),
    "siglip2, classes": two_towers(hf.Siglip2ForImageClassification, hf.Siglip2Config),
}


def own_output(module: Any, images: Tensor) -> Tensor:
    """What the documentation calls the logits, by the plainest call of the original module."""
    options = {}
    if type(module).__name__.startswith("Siglip2"):
        rows, columns = (side // 16 for side in images.shape[2:])
        images = torch.stack([convert_image_to_patches(image, 16) for image in images])
        options = {
            "spatial_shapes": torch.tensor([[rows, columns]] * len(images)),
            "pixel_attention_mask": torch.ones(len(images), rows * columns),
        }
    if hasattr(module, "text_model"):
        return module.get_image_features(images, **options).pooler_output  # type: ignore[no-any-return]
    found = module(images, **options)
    for name in ("logits", "image_embeds", "pooler_output"):
        if found.get(name) is not None:
            return found[name]  # type: ignore[no-any-return]
    last = found.last_hidden_state
    without_class_token = isinstance(module, (hf.IJepaModel, hf.SiglipVisionModel, hf.Siglip2VisionModel))
    return last.mean(dim=1) if without_class_token else last[:, 0]  # type: ignore[no-any-return]


def hooked(
    module: Any,
    blocks: str,
    norms: tuple[str, str],
    attention: str,
    out: str,
    last: Receiver,
    scales: str = "",
) -> HookedModule:
    """Where a module keeps its nodes.

    Args:
        module: of `MODELS`.
        blocks: the list of blocks, from the module.
        norms: of a block.
        attention: of a block.
        out: the output projection, from the attention.
        last: what reads the stream after the last block.
        scales: the names of LayerScale's factors in a block, with a number in the place of "#".
    """
    found = attrgetter(blocks)(module)
    senders, receivers = {"input": Sender(found[0], given)}, {"logits": last}
    for layer, block in enumerate(found):
        gammas = [attrgetter(scales.replace("#", str(place)))(block) if scales else None for place in (1, 2)]
        own, norm = getattr(block, attention), getattr(block, norms[0])
        second = getattr(block, norms[1])
        receivers[f"m{layer}"] = Receiver(second, second)
        senders[f"m{layer}"] = Sender(block.mlp, gives if gammas[1] is None else _scaled(gammas[1]))
        for head in range(HEADS):
            name, columns = f"a{layer}.h{head}", slice(head * WIDTH, (head + 1) * WIDTH)
            senders[name] = Sender(getattr(own, out), written_by_head(head, WIDTH, gammas[0]))
            for port in "qkv":
                receivers[f"{name}<{port}>"] = Receiver(norm, getattr(own, f"{port}_proj"), columns)
    return HookedModule(lambda images: own_output(module, images), senders, receivers)


def siglip(module: Any) -> HookedModule:
    """Where SigLIP's image tower keeps its nodes, those of its pool among them."""
    head, norm, last = module.head, module.post_layernorm, nn.Identity()
    reads = Receiver(last, last, pool=lambda stream: stream[:, 0])
    plain = hooked(module, "encoder.layers", ("layer_norm1", "layer_norm2"), "self_attn", "out_proj", reads)
    senders, receivers = dict(plain.senders), dict(plain.receivers)

    def written(number: int) -> Callable[..., Tensor]:
        probe, alone = head.probe, one_head(head.attention, number)
        return lambda norm, stream, normed: alone(probe.expand(len(normed), -1, -1), normed, normed)[0]

    for number in range(HEADS):
        senders[f"pool.h{number}"] = Sender(norm, written(number))
        for port, name in ((1, "k"), (2, "v")):
            exchanged = exchanged_in_multihead(number, port)
            receivers[f"pool.h{number}<{name}>"] = Receiver(norm, head.attention, exchanged=exchanged)
    senders["pool.mlp"] = Sender(head.mlp, gives)
    receivers["pool.mlp"] = Receiver(head.layernorm, head.layernorm)
    return HookedModule(lambda images: last(own_output(module, images)), senders, receivers)


def _scaled(gamma: Tensor) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    return lambda module, inputs, output: output * gamma

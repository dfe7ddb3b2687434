"""Micro-models of other libraries than timm, from configurations: what `models_tried` tries besides timm's.

`MICRO` maps "library: class" to a function that imports the library and builds the module, with few layers
and little width. Weights are redrawn by `models_tried`; a library that is not installed is left out.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from circuitvit.models.timm_import import import_timm

SMALL: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 16,
    "num_labels": 5,
}
TEXT = {
    "vocab_size": 9,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 12,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
CLIPS = {**SMALL, "image_size": 16, "patch_size": 8, "num_frames": 4}
TUBELETS = {"tubelet_size": [2, 8, 8], **{name: CLIPS[name] for name in CLIPS if name != "patch_size"}}
CROPS = {
    "crop_size": 16,
    "patch_size": 8,
    "frames_per_clip": 4,
    "tubelet_size": 2,
    "hidden_size": 24,
    "mlp_ratio": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_labels": 5,
    "num_pooler_layers": 1,
    "pred_hidden_size": 24,
    "pred_num_hidden_layers": 1,
    "pred_num_attention_heads": 2,
}
TWO_TOWERS = {"text_config": TEXT, "vision_config": SMALL}
WINDOWS = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [1, 1],
    "window_size": 4,
}


def _transformers(kind: str, config: str, options: dict[str, Any]) -> nn.Module:
    import_timm()  # after which torchvision can be imported, which transformers would trip over
    library: Any = importlib.import_module("transformers")
    return getattr(library, kind)(getattr(library, config)(**options))  # type: ignore[no-any-return]


def _torchvision(kind: str, **options: Any) -> nn.Module:
    import_timm()
    return getattr(importlib.import_module("torchvision.models"), kind)(**options)  # type: ignore[no-any-return]


def _open_clip(name: str, vision: dict[str, Any], **others: Any) -> nn.Module:
    import_timm()
    model: Any = importlib.import_module(f"open_clip.{'coca_model' if name == 'CoCa' else 'model'}")
    text = {"context_length": 5, "vocab_size": 9, "width": 12, "heads": 2, "layers": 1}
    own = {"image_size": 32, "patch_size": 16, "width": 24, "layers": 2, "head_width": 12, **vision}
    return getattr(model, name)(embed_dim=6, vision_cfg=own, text_cfg=text, **others)  # type: ignore[no-any-return]


def _openai_clip() -> nn.Module:
    import_timm()
    kind: Any = importlib.import_module("clip.model").CLIP
    return kind(6, 32, 2, 64, 16, 5, 9, 12, 2, 1)  # type: ignore[no-any-return]


def _llava_tower() -> nn.Module:
    import_timm()
    library: Any = importlib.import_module("transformers")
    vision = library.CLIPVisionConfig(**SMALL)
    text = library.LlamaConfig(**TEXT, num_key_value_heads=2, max_position_embeddings=9)
    whole = library.LlavaForConditionalGeneration(
        library.LlavaConfig(vision_config=vision, text_config=text, image_token_index=8)
    )
    return whole.model.vision_tower  # type: ignore[no-any-return]


OF_TRANSFORMERS: dict[str, tuple[dict[str, Any], str]] = {
    "ViT": (SMALL, "Model ForImageClassification"),
    "DeiT": (SMALL, "Model ForImageClassification ForImageClassificationWithTeacher"),
    "ViTMSN": (SMALL, "Model ForImageClassification"),
    "ViTMAE": ({**SMALL, "mask_ratio": 0.0}, "Model"),
    "IJepa": (SMALL, "Model ForImageClassification"),
    "Dinov2": (SMALL, "Model ForImageClassification"),
    "Dinov2WithRegisters": ({**SMALL, "num_register_tokens": 2}, "Model ForImageClassification"),
    "DINOv3ViT": ({**SMALL, "num_register_tokens": 2}, "Model"),
    "Beit": ({**SMALL, "use_relative_position_bias": True}, "Model ForImageClassification"),
    "CLIP": ({**TWO_TOWERS, "projection_dim": 6}, "Model ForImageClassification"),
    "CLIPVision": (SMALL, "Model ModelWithProjection"),
    "Siglip": (TWO_TOWERS, "Model ForImageClassification"),
    "SiglipVision": (SMALL, "Model"),
    "Siglip2": (TWO_TOWERS, "Model ForImageClassification"),
    "Vivit": (TUBELETS, "Model ForVideoClassification"),
    "VideoMAE": ({**CLIPS, "tubelet_size": 2}, "Model ForVideoClassification"),
    "Timesformer": (CLIPS, "Model ForVideoClassification"),
    "VJEPA2": (CROPS, "Model ForVideoClassification"),
    "Swin": (WINDOWS, "Model ForImageClassification"),
}
"""Architectures, options of their configurations, and the classes that are built with these."""

MICRO: dict[str, Callable[[], nn.Module]] = {
    **{
        f"transformers: {name}{kind}": partial(_transformers, f"{name}{kind}", f"{name}Config", options)
        for name, (options, kinds) in OF_TRANSFORMERS.items()
        for kind in kinds.split()
    },
    "transformers: CLIPVisionModel of Llava": _llava_tower,
    "open_clip: CLIP": partial(_open_clip, "CLIP", {}),
    "open_clip: CustomTextCLIP, attention pooling": partial(
        _open_clip, "CustomTextCLIP", {"attentional_pool": True, "attn_pooler_heads": 2}
    ),
    "open_clip: CustomTextCLIP, timm trunk": partial(
        _open_clip,
        "CustomTextCLIP",
        {"timm_model_name": "test_vit", "timm_proj": "linear", "image_size": 160},
    ),
    "open_clip: CoCa": partial(
        _open_clip,
        "CoCa",
        {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        multimodal_cfg={"context_length": 5, "vocab_size": 9, "width": 12, "heads": 2, "layers": 1},
    ),
    "clip: CLIP": _openai_clip,
    "torchvision: VisionTransformer": partial(
        _torchvision,
        "VisionTransformer",
        image_size=32,
        patch_size=16,
        num_layers=2,
        num_heads=2,
        hidden_dim=24,
        mlp_dim=48,
    ),
    "torchvision: SwinTransformer": partial(
        _torchvision,
        "SwinTransformer",
        patch_size=[4, 4],
        embed_dim=8,
        depths=[1, 1],
        num_heads=[1, 1],
        window_size=[2, 2],
    ),
}

"""EAP on every family at the shape of ViT-Ti/16, over its own floor and against timm's plain model.

python -m bench families

What a family's parts cost beyond those of timm's plain model is its own matter and in its floor; what this
library adds should not depend on whose module it is. A row's ratio is its own over that of the plain model,
which is measured in turns with it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import circuitvit as cv
from bench._models import DEVICE
from bench._timing import Row, keep, peak_mib, seconds
from circuitvit.models.timm_import import import_timm
from circuitvit.models.zoo import InputSpec
from circuitvit.tasks import PreparedTask

PAIRS, TURNS = 6, 9
BAR, STRETCH = 1.15, 1.0
SPEC = InputSpec((3, 224, 224), mean=(0.5,) * 3, std=(0.5,) * 3)
SHAPE = {"img_size": 224, "patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}


def timms() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """timm's families, by name."""
    models = import_timm().models
    plain, blocks = models.vision_transformer.VisionTransformer, models.vision_transformer
    yield "timm, average pooling", lambda: plain(**SHAPE, global_pool="avg")
    yield "timm, attention pooling", lambda: plain(**SHAPE, global_pool="map", class_token=False)
    yield "timm, parallel blocks", lambda: plain(**SHAPE, block_fn=blocks.ParallelScalingBlock)
    yield "timm Eva, rotary", lambda: models.eva.Eva(**SHAPE, use_rot_pos_emb=True, global_pool="token")
    yield "timm Beit, relative bias", lambda: models.beit.Beit(**SHAPE, use_rel_pos_bias=True)
    yield "timm NaFlexVit", lambda: models.naflexvit.NaFlexVit(**SHAPE, class_token=True)


def others() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Those of other libraries, as far as they are installed."""
    import_timm()  # after which torchvision can be imported beside any torch
    import open_clip.transformer
    import torchvision.models.vision_transformer as torchvision_vit
    import transformers

    common: Any = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "patch_size": 16}
    common |= {"image_size": 224, "intermediate_size": 768}
    yield "transformers ViT", lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**common))
    yield (
        "transformers DINOv2",
        lambda: transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**common)),
    )
    yield (
        "transformers CLIP",
        lambda: transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**common)),
    )
    yield (
        "open_clip",
        lambda: open_clip.transformer.VisionTransformer(224, 16, 192, 12, 3, mlp_ratio=4.0, output_dim=512),
    )
    yield "torchvision", lambda: torchvision_vit.VisionTransformer(224, 16, 12, 3, 192, 768)


def prepared(build: Callable[[], nn.Module]) -> PreparedTask:
    """A task of random images on a module with random, frozen weights."""
    torch.manual_seed(0)
    module = build().eval().to(DEVICE).requires_grad_(False)
    for parameter in module.parameters():  # some begin as zeros, and nothing would pass their gradients on
        if not parameter.abs().max():
            nn.init.normal_(parameter, std=0.02)
    clean, corrupt = torch.randn(2, PAIRS, 3, 224, 224).unbind()
    model = cv.wrap(module, preprocessing=SPEC)
    metric = cv.logit_diff(0, 1) if model.has_classes else cv.projection(torch.eye(model.n_logits)[0])
    return cv.Task(clean, corrupt, metric=metric).prepare(model)


def turn(task: PreparedTask) -> tuple[float, float]:
    """Seconds of the floor and of EAP, once."""
    model = task.model
    clean, corrupt = (images.take(0, PAIRS).to(DEVICE) for images in (task.clean, task.corrupt))

    def floor() -> None:
        with torch.no_grad():
            model.family.run(model.module, corrupt)
        logits = model.family.run(model.module, clean.clone().requires_grad_())
        (logits[:, 0] - logits[:, 1]).sum().backward()

    least = seconds(floor)
    return least, seconds(lambda: cv.attribute(model, task, "eap", batch_size=PAIRS, progress=False))


def rows() -> list[Row]:
    """One for each family."""
    plain = prepared(lambda: import_timm().models.vision_transformer.VisionTransformer(**SHAPE))
    found = []
    for name, build in (*timms(), *others()):
        task = prepared(build)
        turns = [(*turn(plain), *turn(task)) for _ in range(TURNS + 1)][1:]
        bare, usual, least, spent = (statistics.median(times) for times in zip(*turns, strict=True))
        relative = statistics.median((work / own) / (eap / forward) for forward, eap, own, work in turns)
        title = f"EAP, {name}, {PAIRS} pairs: {spent / least:.2f} times its floor"
        floor = f"timm's plain ViT: {usual / bare:.2f} times"
        found.append(Row(title, floor, relative, BAR, STRETCH, spent, least, peak_mib()))
    return found


def main() -> None:
    keep(rows())


if __name__ == "__main__":
    main()

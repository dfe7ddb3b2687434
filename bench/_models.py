"""The models and tasks that speed is measured on.

Speed does not depend on the weights, so most models have random ones. The trained ViT-Ti and the photographs
are looked for in the folder `CIRCUITVIT_DATA` (or `../shared/data`), under
`weights/vit_tiny_patch16_224.safetensors` and `images/catdog`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

import circuitvit as cv
from circuitvit.models.timm_import import import_timm
from circuitvit.tasks import PreparedTask

DATA = Path(os.environ.get("CIRCUITVIT_DATA", "../shared/data"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

SIZES = {
    "ViT-Ti/16": ("vit_tiny_patch16_224", 8),
    "ViT-B/32": ("vit_base_patch32_224", 4),
    "ViT-B/16": ("vit_base_patch16_224", 2),
    "ViT-L/16": ("vit_large_patch16_224", 2),
}
"""For each model timm's name and the number of pairs it is measured with."""


def random_vit(name: str, pairs: int) -> tuple[Any, PreparedTask]:
    """An untrained module with frozen weights, and a task of random images on it.

    The position embedding keeps its gradient, so that the module's own backward has somewhere to go.
    """
    torch.manual_seed(0)
    vit = import_timm().create_model(SIZES[name][0]).eval().to(DEVICE).requires_grad_(False)
    vit.pos_embed.requires_grad_(True)
    clean, corrupt = torch.randn(2, pairs, 3, 224, 224).unbind()
    task = cv.Task(clean, corrupt, metric=cv.logit_diff(0, 1))
    return vit, task.prepare(cv.wrap(vit))


def cat_and_dog() -> PreparedTask | None:
    """The trained ViT-Ti, a tabby and what a Border collie makes of it; None where they are not to be had."""
    weights = DATA / "weights" / "vit_tiny_patch16_224.safetensors"
    folder = DATA / "images" / "catdog"
    if not weights.exists():
        print(f"no trained ViT-Ti: {weights} is missing (set CIRCUITVIT_DATA)")
        return None
    model = cv.load("vit_tiny_patch16_224", checkpoint=weights)
    task = cv.Task(
        folder / "prisma_crop_dog.jpeg",
        folder / "prisma_crop_cat.png",
        metric=cv.logit_diff("tabby", "Border collie"),
    )
    return task.prepare(model)

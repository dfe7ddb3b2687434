"""The models and tasks that speed is measured on.

Speed does not depend on the weights, so most models have random ones. The trained ViT-Ti and the photographs
are where `_photographs.shared_folder` says; without them their rows are left out.
"""

from __future__ import annotations

from typing import Any

import torch

import circuitvit as cv
from bench._photographs import load_model, shared_folder
from circuitvit.models.timm_import import import_timm
from circuitvit.tasks import PreparedTask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

SIZES = {
    "ViT-Ti/16": ("vit_tiny_patch16_224", 8),
    "ViT-B/32": ("vit_base_patch32_224", 4),
    "ViT-B/16": ("vit_base_patch16_224", 2),
    "ViT-L/16": ("vit_large_patch16_224", 2),
    "EVA-02-Ti/14": ("eva02_tiny_patch14_224", 6),
}
"""For each model timm's name and the number of pairs it is measured with."""


def random_vit(name: str, pairs: int) -> tuple[Any, PreparedTask]:
    """An untrained module with frozen weights, and a task of random images on it.

    The class token keeps its gradient, so that the module's own backward has somewhere to go.
    """
    torch.manual_seed(0)
    vit = import_timm().create_model(SIZES[name][0], num_classes=1000).eval().to(DEVICE).requires_grad_(False)
    vit.cls_token.requires_grad_(True)
    clean, corrupt = torch.randn(2, pairs, 3, 224, 224).unbind()
    task = cv.Task(clean, corrupt, metric=cv.logit_diff(0, 1))
    return vit, task.prepare(cv.wrap(vit))


def cat_and_dog() -> PreparedTask | None:
    """The trained ViT-Ti, a tabby and what a Border collie makes of it; None where they are not to be had."""
    if not shared_folder().is_dir():
        print(f"no trained ViT-Ti: there is no folder {shared_folder()} (set CIRCUITVIT_SHARED)")
        return None
    model, folder = load_model(), shared_folder() / "images" / "catdog"
    task = cv.Task(
        folder / "prisma_crop_dog.jpeg",
        folder / "prisma_crop_cat.png",
        metric=cv.logit_diff("tabby", "Border collie"),
    )
    return task.prepare(model)

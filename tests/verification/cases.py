"""A tiny Vision Transformer and pairs of random images for the tests of verification."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch

import circuitvit as cv
from circuitvit.models.timm_import import import_timm


@cache
def tiny_model() -> cv.Model:
    """Two blocks of two heads in float64, with weights large enough that no part is nearly linear."""
    family = import_timm().models.vision_transformer.VisionTransformer
    module = family(img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in module.named_parameters():
        scale = 1.0 if name.endswith("bias") else 2.0 / tensor.shape[-1] ** 0.5
        tensor.data = torch.randn(tensor.shape, generator=generator) * scale
    return cv.wrap(module.double().eval(), name="tiny", classes=("cat", "dog | wolf", "fox"))


def images(n: int, seed: int) -> torch.Tensor:
    """`n` random images that the tiny model takes, `(n, 3, 8, 8)`."""
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def tiny_task(n: int = 6, seed: int = 1, **options: Any) -> cv.Task:
    """Pairs whose metric, the first logit minus the second, is made to fall from clean to corrupt."""
    first, second = images(n, seed), images(n, seed + 1000)
    model = tiny_model()
    gap = [logits[:, 0] - logits[:, 1] for logits in (model(first.double()), model(second.double()))]
    swap = (gap[0] < gap[1])[:, None, None, None]
    clean, corrupt = torch.where(swap, second, first), torch.where(swap, first, second)
    return cv.Task(clean, corrupt, **{"metric": cv.logit_diff(0, 1), **options})


def some_circuit(seed: int = 0, share: float = 0.6) -> cv.Circuit:
    """A pruned circuit of random edges."""
    graph = tiny_model().graph
    kept = np.random.default_rng(seed).random(graph.shape) < share
    return cv.Circuit(graph, kept).pruned()

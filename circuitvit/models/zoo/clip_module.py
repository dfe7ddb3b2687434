"""`clip-tiny` as a module: an image tower, a text tower, and the scale between them."""

from __future__ import annotations

import math

import torch
from torch import nn

from circuitvit.models.zoo.text_tower import TextTower


class ClipModule(nn.Module):
    """Two towers that give features of one width; similarity is the scaled cosine.

    Attributes:
        visual: pictures to features: a timm `VisionTransformer` whose `head` is the projection.
        text: token numbers to features.
        logit_scale: logarithm of what cosines are multiplied by.
    """

    def __init__(self, visual: nn.Module, text: TextTower) -> None:
        super().__init__()
        self.visual, self.text = visual, text
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))

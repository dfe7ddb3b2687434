"""A Vision Transformer written by hand, and the thirty lines that make it known to the library.

    python examples/own_model.py

`HandFamily` is a table of where things are. That it is right is found out when a model is wrapped: every
block is compared with its stages in float64, so that a mistake in the table is refused and never a wrong
number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import circuitvit as cv
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.models import Stage
from circuitvit.models.attention import AttentionStage
from circuitvit.models.families import Family
from circuitvit.models.layers import MLPStage
from circuitvit.models.parts import MLP, Attention, Linear, Readout, norm_of
from circuitvit.models.zoo import InputSpec

# -- the model: nothing in it knows of this library ---------------------------------------------------


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        pattern = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(dim=-1)
        return self.proj((pattern @ value).transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    """Attention, and an MLP unless it has no hidden units."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width) if hidden else None
        self.mlp = (
            nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width)) if hidden else None
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x if self.mlp is None else x + self.mlp(self.norm2(x))


class HandViT(nn.Module):
    def __init__(
        self,
        size: int,
        patch: int,
        channels: int,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        classes: int,
    ) -> None:
        super().__init__()
        self.size, self.channels = size, channels
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + (size // patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def embed(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1) + self.pos_embed

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


# -- the family: where things are ---------------------------------------------------------------------


class HandFamily(Family):
    def embed(self, module: Any, images: Tensor) -> Tensor:
        return module.embed(images)

    def blocks(self, module: Any) -> Sequence[nn.Module]:
        return tuple(module.blocks)

    def block(self, module: Any, block: Any, layer: int, where: str) -> tuple[Stage, ...]:
        packed, out = Linear.of(block.attn.qkv), Linear.of(block.attn.proj)
        scale = (out.weight.shape[1] / block.attn.heads) ** -0.5
        attention = Attention.of_packed(block.attn.heads, packed, out, scale)
        first = AttentionStage(layer, norm_of(block.norm1, f"{where}.norm1"), attention)
        if block.mlp is None:
            return (first,)
        # The names of the MLP's parts are not needed to run it: backward rules and speed ask for them.
        mlp = MLP(block.mlp, known=True, act="1", out="2")
        return first, MLPStage(layer, norm_of(block.norm2, f"{where}.norm2"), mlp)

    def readout(self, module: Any, stream: Tensor) -> Tensor:
        return module.head(module.norm(stream)[:, 0])

    def readout_parts(self, module: Any) -> Readout:
        none = norm_of(nn.Identity(), "none")
        return Readout(norm_of(module.norm, "norm"), class_token, none, (module.head,))

    def preprocessing(self, module: Any) -> InputSpec:
        middle = (0.5,) * module.channels
        return InputSpec((module.channels, module.size, module.size), mean=middle, std=middle)


def class_token(normed: Tensor) -> Tensor:
    return normed[:, :1]


# -- use ----------------------------------------------------------------------------------------------


def trained(steps: int) -> HandViT:
    """A small model that tells drawn cats from drawn dogs."""
    torch.manual_seed(0)
    module = HandViT(size=48, patch=8, channels=3, width=32, depth=2, heads=4, hidden=64, classes=2)
    clean, corrupt = catdog_pairs(128, seed=1)
    images, labels = torch.cat([clean, corrupt]), torch.arange(2).repeat_interleave(128)
    optimiser = torch.optim.AdamW(module.parameters(), lr=3e-3)
    for _ in range(steps):
        chosen = torch.randint(len(images), (32,))
        loss = nn.functional.cross_entropy(module(images[chosen]), labels[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return module.eval()


def main(steps: int = 80) -> cv.Circuit:
    """Train, wrap, score; give the circuit."""
    cv.register(HandViT, HandFamily())
    model = cv.wrap(trained(steps), classes=["cat", "dog"])
    print(model)
    task = cv.Task(*catdog_pairs(16, seed=2), metric=cv.logit_diff("cat", "dog"))
    scores = cv.attribute(model, task, method="exact", progress=False)
    for name, effect in scores.strongest(5):
        print(f"  {name:16} {effect:+.3f}")
    return scores.connected(30)


if __name__ == "__main__":
    main()

"""A model that sees clips, its family, and the circuit by which it knows that a clip runs backwards.

    python examples/video_circuit.py

`TubeletViT` cuts a clip into tubelets, small boxes in space and time, and lets all of them attend to each
other (Arnab et al. 2021, "ViViT", arXiv:2103.15691, model 1). It is trained for some seconds on squares that
move to the right or to the left, so that a clip played backwards is of the other class.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import circuitvit as cv
from circuitvit.models import Stage
from circuitvit.models.attention import AttentionStage
from circuitvit.models.families import Family
from circuitvit.models.layers import MLPStage
from circuitvit.models.parts import MLP, Attention, Linear, Readout, norm_of
from circuitvit.models.zoo import ClipSpec
from circuitvit.tasks.corruptions import reverse

# -- the model: nothing in it knows of this library ---------------------------------------------------


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        joined = nn.functional.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(joined.transpose(1, 2).reshape(batch, tokens, width))


class Perceptron(nn.Module):
    def __init__(self, width: int, hidden: int, act_after: bool) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)
        self.after = nn.GELU() if act_after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.fc2(self.act(self.fc1(x))))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, act_after: bool) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), SelfAttention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), Perceptron(width, hidden, act_after)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TubeletViT(nn.Module):
    """Takes clips `(clip, channel, time, height, width)`; all tubelets are averaged after the last norm."""

    def __init__(
        self,
        frames: int,
        size: int,
        tubelet: tuple[int, int, int],
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        classes: int,
        act_after: bool = False,
    ) -> None:
        super().__init__()
        self.frames, self.size = frames, size
        self.grid = frames // tubelet[0], size // tubelet[1], size // tubelet[2]
        tokens = self.grid[0] * self.grid[1] * self.grid[2]
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(3, width, tubelet, tubelet)})
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.blocks = nn.ModuleList(Block(width, heads, hidden, act_after) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, classes)

    def embed(self, clips: Tensor) -> Tensor:
        return self.patch_embed["proj"](clips).flatten(2).transpose(1, 2) + self.pos_embed

    def forward(self, clips: Tensor) -> Tensor:
        x = self.embed(clips)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))


# -- the family: where things are ---------------------------------------------------------------------


class TubeletFamily(Family):
    """The library's clips have time first, `(clip, time, channel, height, width)`; the module's have not."""

    def embed(self, module: Any, images: Tensor) -> Tensor:
        return module.embed(images.transpose(1, 2))

    def run(self, module: Any, images: Tensor) -> Tensor:
        return module(images.transpose(1, 2))

    def blocks(self, module: Any) -> Sequence[nn.Module]:
        return tuple(module.blocks)

    def block(self, module: Any, block: Any, layer: int, where: str) -> tuple[Stage, ...]:
        packed, out = Linear.of(block.attn.qkv), Linear.of(block.attn.proj)
        scale = (out.weight.shape[1] / block.attn.heads) ** -0.5
        attention = Attention.of_packed(block.attn.heads, packed, out, scale)
        first = AttentionStage(layer, norm_of(block.norm1, f"{where}.norm1"), attention)
        return first, MLPStage(layer, norm_of(block.norm2, f"{where}.norm2"), MLP(block.mlp))

    def readout(self, module: Any, stream: Tensor) -> Tensor:
        return module.head(module.norm(stream).mean(dim=1))

    def readout_parts(self, module: Any) -> Readout:
        none = norm_of(nn.Identity(), "none")
        return Readout(norm_of(module.norm, "norm"), mean, none, (module.head,))

    def prefix(self, module: Any) -> tuple[str, ...]:
        return ()

    def grid(self, module: Any, height: int, width: int) -> tuple[int, ...]:
        return module.grid

    def preprocessing(self, module: Any) -> ClipSpec:
        return ClipSpec((3, module.size, module.size), (0.0,) * 3, (1.0,) * 3, frames=module.frames)


def mean(normed: Tensor) -> Tensor:
    return normed.mean(dim=1, keepdim=True)


# -- use ----------------------------------------------------------------------------------------------


def moving_squares(count: int, seed: int) -> Tensor:
    """Clips `(clip, 8, 3, 16, 16)` of a bright square that moves to the right, at a height of its own."""
    generator = torch.Generator().manual_seed(seed)
    clips = 0.05 * torch.rand(count, 8, 3, 16, 16, generator=generator)
    tops = torch.randint(0, 13, (count,), generator=generator)
    for clip, top in zip(clips, tops.tolist(), strict=True):
        for time in range(8):
            start = round(1.5 * time)
            clip[time, :, top : top + 4, start : start + 4] += 0.9
    return clips


def trained(steps: int) -> TubeletViT:
    """A small model that tells squares that move to the right (class 0) from those that move to the left."""
    torch.manual_seed(0)
    module = TubeletViT(8, 16, (2, 4, 4), width=32, depth=2, heads=2, hidden=64, classes=2)
    clips = moving_squares(128, seed=1)
    clips, labels = torch.cat([clips, reverse(clips)]), torch.arange(2).repeat_interleave(128)
    optimiser = torch.optim.AdamW(module.parameters(), lr=3e-3)
    for _ in range(steps):
        chosen = torch.randint(len(clips), (32,))
        loss = nn.functional.cross_entropy(module(clips[chosen].transpose(1, 2)), labels[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return module.eval()


def main(folder: str | Path = "out/video", steps: int = 120) -> cv.Circuit:
    """Train, wrap, score; draw the circuit, and what each tubelet says of the class."""
    cv.register(TubeletViT, TubeletFamily())
    model = cv.wrap(trained(steps), classes=["to the right", "to the left"])
    print(model)
    clips = moving_squares(16, seed=2)
    task = cv.Task(clips, reverse, metric=cv.logit_diff(0, 1), groups="frame")
    scores = cv.attribute(model, task, method="exact", progress=False)
    for name, effect in scores.strongest(5):
        print(f"  {name:26} {effect:+.3f}")
    circuit = scores.connected(40)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    circuit.draw(folder / "circuit.svg", model=model, task=task, thumbnails=True)
    cv.views.logit_lens(model, clips[:1]).figure().save(folder / "lens.png")
    return circuit


if __name__ == "__main__":
    main()

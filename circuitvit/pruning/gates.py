"""Gates: random numbers in [0, 1], one for each thing that may be kept, whose odds are learned.

Both kinds have one parameter for each gate, its log-odds `phi` (log alpha for the hard concrete): a gate with
`phi > 0` is more open than not. They differ in how a training step samples them.

Hard concrete: a stretched and clipped logistic sample, differentiable in `phi`; often exactly 0 or 1.
Louizos, Welling and Kingma 2018, arXiv:1712.01312.

Uniform gradient sampling (UGS): with probability `w = theta (1 - theta)` a gate is uniform in [0, 1],
otherwise it is open or shut by chance, such that its mean is `theta`. Only uniform gates get a gradient,
that of the loss with respect to the gate; in `phi` it needs no weight, as `d theta / d phi = w`.
Li and Janson 2024, "Optimal ablation for interpretability", arXiv:2409.09951.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

SamplerName = Literal["hard-concrete", "ugs"]

STRETCH = (-0.1, 1.1)
"""The interval that a hard-concrete gate's sigmoid is stretched to before it is clipped to [0, 1]."""

TEMPERATURE = 2 / 3


@dataclass(frozen=True)
class Sampler:
    """How gates are sampled, and how likely they are to be open.

    Attributes:
        sample: from `phi` and a generator to gates in [0, 1], differentiable.
        open_probability: from `phi` to the probability that a gate is not shut, differentiable.
    """

    sample: Callable[[Float[Tensor, " gate"], torch.Generator], Float[Tensor, " gate"]]
    open_probability: Callable[[Float[Tensor, " gate"]], Float[Tensor, " gate"]]


def _uniform(phi: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform noise like `phi`, drawn on the CPU so that every device sees the same."""
    return torch.rand(phi.shape, generator=generator).to(phi)


def _hard_concrete(phi: Tensor, generator: torch.Generator) -> Tensor:
    noise = _uniform(phi, generator).clamp(1e-6, 1 - 1e-6)
    logits = (noise.log() - (1 - noise).log() + phi) / TEMPERATURE
    low, high = STRETCH
    return (torch.sigmoid(logits) * (high - low) + low).clamp(0, 1)


def _hard_concrete_open(phi: Tensor) -> Tensor:
    low, high = STRETCH
    return torch.sigmoid(phi - TEMPERATURE * math.log(-low / high))


def _ugs(phi: Tensor, generator: torch.Generator) -> Tensor:
    theta = torch.sigmoid(phi.detach())
    weight = theta * (1 - theta)
    choice, level = _uniform(phi, generator), _uniform(phi, generator)
    is_uniform = choice < weight
    # of the rest, `theta - weight / 2` is open, so that the gate's mean is theta
    is_open = (choice >= weight) & (choice < weight + theta - weight / 2)
    gates = torch.where(is_uniform, level, is_open.to(phi))
    return gates + (phi - phi.detach()) * is_uniform


SAMPLERS: dict[SamplerName, Sampler] = {
    "hard-concrete": Sampler(_hard_concrete, _hard_concrete_open),
    "ugs": Sampler(_ugs, torch.sigmoid),
}

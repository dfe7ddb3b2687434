"""Backward rules: the same model with another derivative.

Some methods leave every activation as it is and change how gradients flow through norms, softmax, activations
and products. Here such a method is a *model*: `Model.with_rules` gives one whose stages compute the same
numbers and differentiate by the rules, so that everything which runs on gradients runs on it unchanged.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class BackwardRules:
    """How gradients flow where they should not flow as they are.

    Attributes:
        frozen_norms: the scale of a norm is a constant (the LN-rule).
        identity_activation: an activation is the factor `act(x) / x`, held constant (the identity rule).
        softmax_temperature: the Jacobian of the softmax is taken where its scores are divided by this.
        query_key_share: share of the gradient that queries and keys get.
        value_share: share of the gradient that values get.
        gate_share: share of the gradient that each factor of a gated MLP gets.
        output_share: share of the gradient at what heads and MLPs write that they pass on.
    """

    frozen_norms: bool = False
    identity_activation: bool = False
    softmax_temperature: float = 1.0
    query_key_share: float = 1.0
    value_share: float = 1.0
    gate_share: float = 1.0
    output_share: float = 1.0


def damped(value: Tensor, share: float) -> Tensor:
    """The same value, through which only a share of the gradient flows."""
    return value if share == 1.0 else share * value + (1.0 - share) * value.detach()


def with_children(module: nn.Module, **children: nn.Module) -> Any:
    """A shallow copy of a module with some of its parts replaced."""
    twin = copy.copy(module)
    twin._modules = {**module._modules, **children}
    return twin


# -- attention -----------------------------------------------------------------------------------


def ruled_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, rules: BackwardRules) -> Tensor:
    """Attention on normed queries and keys `(batch, head, token, d_head)`, differentiated by the rules."""
    query, key = damped(query, rules.query_key_share), damped(key, rules.query_key_share)
    value = damped(value, rules.value_share)
    if rules.softmax_temperature == 1.0:
        written = F.scaled_dot_product_attention(query, key, value, scale=scale)
        return damped(written, rules.output_share)
    scores: Tensor = query @ key.transpose(-1, -2) * scale
    soft = F.softmax(scores / rules.softmax_temperature, dim=-1)
    # Worth nothing itself, it brings the gradient that is wanted.
    heat: Tensor = rules.softmax_temperature * (soft - soft.detach())
    pattern = F.softmax(scores.detach(), dim=-1) + heat
    return damped(torch.matmul(pattern, value), rules.output_share)


# -- MLPs ----------------------------------------------------------------------------------------


class IdentityRule(nn.Module):
    """An activation whose gradient is that of a multiplication with the constant `act(x) / x`."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        value: Tensor = self.activation(x)
        safe = torch.where(x == 0, torch.ones_like(x), x)
        return value.detach() + (x - x.detach()) * (value / safe).detach()


class Damped(nn.Module):
    """A part through which only a share of the gradient flows."""

    def __init__(self, part: nn.Module, share: float) -> None:
        super().__init__()
        self.part, self.share = part, share

    def forward(self, x: Tensor) -> Tensor:
        return damped(self.part(x), self.share)


def ruled_mlp(mlp: nn.Module, rules: BackwardRules) -> Any:
    """An MLP of timm's whose activation and, where it is gated, product are differentiated by the rules."""
    changed: dict[str, nn.Module] = {}
    parts = dict(mlp.named_children())
    if rules.identity_activation and "act" in parts:
        changed["act"] = IdentityRule(parts["act"])
    if rules.gate_share != 1.0:
        gated = ("fc1_g", "fc1_x") if "fc1_g" in parts else ("fc1",) if hasattr(mlp, "gate_last") else ()
        changed |= {name: Damped(parts[name], rules.gate_share) for name in gated}
    return with_children(mlp, **changed) if changed else mlp

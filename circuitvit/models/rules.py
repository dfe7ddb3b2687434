"""Backward rules: the same model with another derivative.

Some methods leave every activation as it is and change how gradients flow through norms, softmax, activations
and products. Here such a method is a *model*: `Model.with_rules` gives one whose stages compute the same
numbers and differentiate by the rules, so that everything which runs on gradients runs on it unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        gate_share: share of the gradient that each factor of a gated MLP, or of a gated head, gets.
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


# -- attention -----------------------------------------------------------------------------------


def ruled_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, added: Tensor | None, rules: BackwardRules
) -> Tensor:
    """Attention on turned queries and keys `(batch, head, token, d_head)`, differentiated by the rules.

    Args:
        query: of each token.
        key: of each token.
        value: of each token.
        scale: of the scores.
        added: to the scores, `(1, head, query, key)`, or None.
        rules: of the gradient.
    """
    query, key = damped(query, rules.query_key_share), damped(key, rules.query_key_share)
    value = damped(value, rules.value_share)
    if rules.softmax_temperature == 1.0:
        return F.scaled_dot_product_attention(query, key, value, added, scale=scale)
    scores: Tensor = query @ key.transpose(-1, -2) * scale
    scores = scores if added is None else scores + added
    soft = F.softmax(scores / rules.softmax_temperature, dim=-1)
    # Worth nothing itself, it brings the gradient that is wanted.
    heat: Tensor = rules.softmax_temperature * (soft - soft.detach())
    pattern = F.softmax(scores.detach(), dim=-1) + heat
    return torch.matmul(pattern, value)


# -- MLPs ----------------------------------------------------------------------------------------


class IdentityRule(nn.Module):
    """An activation whose gradient is that of a multiplication with the constant `act(x) / x`."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        value: Tensor = self.activation(x.clone())  # some overwrite what they are given
        safe = torch.where(x == 0, torch.ones_like(x), x)
        return value.detach() + (x - x.detach()) * (value / safe).detach()


class Damped(nn.Module):
    """A part through which only a share of the gradient flows."""

    def __init__(self, part: nn.Module, share: float) -> None:
        super().__init__()
        self.part, self.share = part, share

    def forward(self, x: Tensor) -> Tensor:
        return damped(self.part(x), self.share)

"""The norms that a stage may begin with: LayerNorm, RMSNorm or none, and their gradients in closed form.

A norm is `x_hat * weight + bias`, where `x_hat` is `x` (centred for LayerNorm) times an inverse scale that
depends on the token. For a receiver `y = W norm(x) + b` the gradient at `x` is

    scale * ( C W'^T dy  -  x_hat <x_hat, W'^T dy> / d_model ),      W' = W diag(weight)

with `C` the centring (LayerNorm only), and `<x_hat, W'^T dy> = dy . (y - W bias - b)` is had from `y` itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitvit.errors import UnsupportedModelError
from circuitvit.models.rules import BackwardRules


@dataclass(frozen=True)
class Norm:
    """A norm over `d_model`, with what its gradient needs.

    Attributes:
        module: the model's own norm, used for every forward.
        centred: whether the mean is taken out (LayerNorm).
        scaled: whether the result is divided by its root mean square; False for no norm at all.
        eps: added to the mean square.
        weight: `(d_model,)` or None.
        bias: `(d_model,)` or None.
        frozen: whether gradients take the scale for a constant.
    """

    module: nn.Module
    centred: bool
    scaled: bool
    eps: float = 0.0
    weight: Tensor | None = None
    bias: Tensor | None = None
    frozen: bool = False

    def __call__(self, stream: Tensor) -> Tensor:
        if self.frozen and self.scaled:
            return self._with_constant_scale(stream)
        return self.module(stream)  # type: ignore[no-any-return]

    def _with_constant_scale(self, stream: Tensor) -> Tensor:
        inverse = self.standardise(stream.detach())[1]
        centred = stream - stream.mean(dim=-1, keepdim=True) if self.centred else stream
        normed = centred * inverse
        normed = normed if self.weight is None else normed * self.weight
        return normed if self.bias is None else normed + self.bias

    @property
    def bends(self) -> bool:
        """Whether its gradient has a term along `x_hat`, from the scale."""
        return self.scaled and not self.frozen

    def standardise(self, stream: Tensor) -> tuple[Tensor, Tensor]:
        """`x_hat` of the stream's shape, and the inverse scale `(..., 1)`."""
        if not self.scaled:
            return stream, torch.ones_like(stream[..., :1])
        if self.centred:
            stream = stream - stream.mean(dim=-1, keepdim=True)
        inverse = torch.rsqrt(stream.square().mean(dim=-1, keepdim=True) + self.eps)
        return stream * inverse, inverse

    def inverse(self, stream: Tensor) -> Tensor:
        """The inverse scale `(..., 1)` alone, without writing anything of the stream's size."""
        if not self.scaled:
            return torch.ones_like(stream[..., :1])
        square = torch.linalg.vector_norm(stream, dim=-1, keepdim=True).square() / stream.shape[-1]
        if self.centred:
            square = (square - stream.mean(dim=-1, keepdim=True).square()).clamp_min(0.0)
        return torch.rsqrt(square + self.eps)

    def fold(self, weight: Float[Tensor, "out d_model"]) -> Float[Tensor, "out d_model"]:
        """`C W diag(weight)`: the projection with the norm's affine part and centring folded in."""
        folded = weight if self.weight is None else weight * self.weight
        return folded - folded.mean(dim=-1, keepdim=True) if self.centred else folded

    def offset(self, weight: Float[Tensor, "out d_model"], bias: Tensor | None) -> Float[Tensor, " out"]:
        """`W bias + b`: the part of the projection's output that does not depend on the stream."""
        offset = weight.new_zeros(weight.shape[0]) if bias is None else bias
        return offset if self.bias is None else offset + weight @ self.bias

    def pull_back(self, stream: Tensor, d_normed: Tensor) -> Tensor:
        """The gradient at the stream from that at the norm's output, both `(batch, token, d_model)`."""
        gradient = d_normed if self.weight is None else d_normed * self.weight
        if not self.scaled:
            return gradient
        x_hat, inverse = self.standardise(stream)
        along = (gradient * x_hat).mean(dim=-1, keepdim=True)
        if self.centred:
            gradient = gradient - gradient.mean(dim=-1, keepdim=True)
        if not self.bends:
            return gradient * inverse
        return (gradient - x_hat * along) * inverse


def norm_of(module: nn.Module, where: str) -> Norm:
    """The norm that a module is.

    Args:
        module: the model's norm.
        where: its name in the model, for the error.

    Raises:
        UnsupportedModelError: if it is none of LayerNorm, RMSNorm and Identity, or computes something else
            than its class says; gradients come from the formula, so they would be wrong without a sign.
    """
    kind = type(module)
    if isinstance(module, nn.Identity):
        return Norm(module, centred=False, scaled=False)
    names = {base.__name__ for base in kind.__mro__}
    parts: Any = module
    if "LayerNorm" in names and "2d" not in kind.__name__:
        norm = Norm(module, True, True, float(parts.eps), parts.weight, parts.bias)
    elif names & {"RmsNorm", "RmsNormFp32", "RMSNorm"} and hasattr(module, "eps"):
        norm = Norm(module, False, True, _rms_eps(parts), parts.weight)
    else:
        raise UnsupportedModelError(
            f"{where} is a {kind.__name__}, a norm this library cannot differentiate: "
            "LayerNorm, RMSNorm and Identity are known"
        )
    if not _keeps_to_formula(norm):
        raise UnsupportedModelError(
            f"{where} is a {kind.__name__} that computes something else than LayerNorm and RMSNorm do"
        )
    return norm


def _rms_eps(module: Any) -> float:
    """The eps of an RMSNorm; unset, torch takes the smallest step of the dtype it computes in."""
    if module.eps is not None:
        return float(module.eps)
    double = module.weight is not None and module.weight.dtype == torch.float64
    return torch.finfo(torch.float64 if double else torch.float32).eps


def ruled_norm(norm: Norm, rules: BackwardRules) -> Norm:
    """The norm with the same values, differentiated by the rules."""
    return replace(norm, frozen=rules.frozen_norms)


def ruled_part(module: nn.Module, rules: BackwardRules) -> nn.Module:
    """The same for a norm that is a module of its own, such as the final one."""
    return module if not rules.frozen_norms else _NormModule(replace(norm_of(module, "a norm"), frozen=True))


class _NormModule(nn.Module):
    """A norm of ours where a module is called for."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, stream: Tensor) -> Tensor:
        return self.norm(stream)


@torch.no_grad()
def _keeps_to_formula(norm: Norm) -> bool:
    """Whether the module gives `x_hat * weight + bias` on noise."""
    parts: Any = norm.module
    like = torch.empty(0) if norm.weight is None else norm.weight
    width = parts.normalized_shape[-1] if norm.weight is None else len(norm.weight)
    noise = torch.randn(4, width, generator=torch.Generator().manual_seed(0))
    stream = (1 + noise).to(like)
    expected, _ = norm.standardise(stream)
    expected = expected if norm.weight is None else expected * norm.weight
    expected = expected if norm.bias is None else expected + norm.bias
    tolerance = 1e-4 if like.dtype in (torch.float32, torch.float64) else 5e-2
    return bool((norm(stream) - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(1.0))

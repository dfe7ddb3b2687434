"""The readout as a linear map: final norm, pooling and classifier at the scale that one run gave them.

With the norm's scale held, every step from the last residual stream to a difference of logits is affine:
LayerNorm's centring is linear, average pooling is, and maximum pooling picks the same tokens. So

    logit difference  =  sum over tokens  weights[token] . stream[token]  +  named constants

holds to rounding, and each part of the stream has its share. Holding the scale is the usual convention of
direct logit attribution (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitvit.errors import UnsupportedModelError
from circuitvit.models import Model
from circuitvit.models.norms import norm_of


@dataclass(frozen=True, eq=False)
class LinearReadout:
    """A weighted sum of logits as an affine function of the last residual stream.

    Attributes:
        weights: `(image, token, d_model)`, in logits per unit of the stream.
        constants: what the stream has no part in, by name, `(image,)` each, in logits.
    """

    weights: Float[Tensor, "image token d_model"]
    constants: dict[str, Float[Tensor, " image"]]


def linear_readout(
    model: Model,
    stream: Float[Tensor, "image token d_model"],
    of: Float[Tensor, "image class"],
) -> LinearReadout:
    """The readout of a run, made linear.

    Args:
        model: whose readout.
        stream: what the readout read in that run.
        of: which logits to sum, such as +1 at the target and -1 at the foil.

    Raises:
        UnsupportedModelError: if the readout is not norm, pooling, norm and linear classifier.
    """
    vit: Any = getattr(model.stages[-1], "vit", None)
    if vit is None or not hasattr(vit, "norm") or not hasattr(vit, "head"):
        kind = type(model.stages[-1]).__name__
        raise UnsupportedModelError(f"the readout {kind} of {model.name} is none that can be made linear")
    norm = norm_of(vit.norm, "norm")
    constants: dict[str, Tensor] = {}
    at_tokens = (_of_two_heads if hasattr(vit, "head_dist") else _of_pool)(vit, stream, of, constants)
    if norm.bias is not None:
        constants["norm.bias"] = (at_tokens * norm.bias).sum(dim=(1, 2))
    _, inverse = norm.standardise(stream)
    return LinearReadout(norm.fold(at_tokens) * inverse, constants)


def _of_pool(vit: Any, stream: Tensor, of: Tensor, constants: dict[str, Tensor]) -> Tensor:
    """The weights at the final norm's output, `(image, token, d_model)`, through pooling and classifier."""
    normed = vit.norm(stream).detach().requires_grad_()
    with torch.enable_grad():
        pooled = vit.pool(normed)
    direction = _through(vit.head, "head", of, constants)
    after = norm_of(vit.fc_norm, "fc_norm")
    if after.bias is not None:
        constants["fc_norm.bias"] = direction @ after.bias
    _, inverse = after.standardise(pooled.detach())
    # Token, average and maximum pooling are homogeneous: their gradient times the input is their output.
    gradients: tuple[Tensor, ...] = torch.autograd.grad(pooled, normed, after.fold(direction) * inverse)
    return gradients[0]


def _of_two_heads(vit: Any, stream: Tensor, of: Tensor, constants: dict[str, Tensor]) -> Tensor:
    """The same for DeiT's distilled models, whose logits are the mean of two classifiers on two tokens."""
    at_tokens = torch.zeros_like(stream)
    for token, name in enumerate(("head", "head_dist")):
        at_tokens[:, token] = _through(getattr(vit, name), name, of / 2, constants)
    return at_tokens


def _through(head: nn.Module, name: str, of: Tensor, constants: dict[str, Tensor]) -> Tensor:
    """The weights `(image, d_model)` at a classifier's input."""
    if isinstance(head, nn.Identity):
        return of
    if not isinstance(head, nn.Linear):
        raise UnsupportedModelError(f"{name} is a {type(head).__name__}: only a linear classifier has shares")
    if head.bias is not None:
        constants[f"{name}.bias"] = of @ head.bias
    direction: Tensor = of @ head.weight
    return direction

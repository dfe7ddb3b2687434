"""Gradients at the streams of a stage's receivers, kept as narrow as backpropagation gives them.

A receiver `y = W norm(x) + b` has the gradient `W'^T dy / scale - x_hat along` at its stream (`norms.py`):
a product that is `d_head` wide before it is expanded, and a rank-one term. Both are linear in `dy`, so
gradients at several points of a path are added narrow and expanded once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["CompactGradient"]

CACHE_BYTES = 2**22
"""What processors keep close, about; a few receivers at once, so that all cores have work."""


@dataclass(frozen=True, eq=False)
class CompactGradient:
    """The gradient `narrow W - sum of along x_hat` at the stream of each receiver of a stage.

    Attributes:
        narrow: `(receiver, batch, token, d_head)`, or the gradient itself where there is no `weight`.
        weight: `(receiver, d_head, d_model)`, or None.
        along: `(receiver, batch, token, 1)` for each point whose norm has a rank-one term.
        x_hat: `(batch, token, d_model)`, the standardised stream of each of these points.

    Example:
        >>> import torch
        >>> one = CompactGradient(torch.ones(1, 1, 1, 2))
        >>> (one.times(0.25) + one).expand().flatten().tolist()
        [1.25, 1.25]
    """

    narrow: Float[Tensor, "receiver batch token d_head"]
    weight: Float[Tensor, "receiver d_head d_model"] | None = None
    along: tuple[Float[Tensor, "receiver batch token 1"], ...] = ()
    x_hat: tuple[Float[Tensor, "batch token d_model"], ...] = ()

    def __add__(self, other: CompactGradient) -> CompactGradient:
        """The sum of the gradients of one stage at two points."""
        narrow = self.narrow + other.narrow
        return CompactGradient(narrow, self.weight, self.along + other.along, self.x_hat + other.x_hat)

    def times(self, factor: float) -> CompactGradient:
        return replace(self, narrow=self.narrow * factor, along=tuple(along * factor for along in self.along))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`(receiver, batch, token, d_model)`, the shape of the expanded gradient."""
        receivers, batch, tokens, width = self.narrow.shape
        return receivers, batch, tokens, width if self.weight is None else self.weight.shape[-1]

    def expand(self, out: Tensor | None = None) -> Float[Tensor, "receiver batch token d_model"]:
        """The gradient at each receiver's own stream, written into `out` if given."""
        if self.weight is None:
            return self.narrow if out is None else out.copy_(self.narrow)
        gradient = self.narrow.new_empty(self.shape) if out is None else out
        for start, end in self._in_cache():  # so that the second term meets a warm first one
            part = gradient[start:end]
            torch.bmm(self.narrow[start:end].flatten(1, 2), self.weight[start:end], out=part.flatten(1, 2))
            for along, x_hat in zip(self.along, self.x_hat, strict=True):
                part.addcmul_(x_hat, along[start:end], value=-1.0)
        return gradient

    def _in_cache(self) -> list[tuple[int, int]]:
        """Ranges of receivers whose gradients stay in a processor's cache; a GPU takes all at once."""
        receivers, *stream = self.shape
        each = self.narrow.element_size() * stream[0] * stream[1] * stream[2]
        size = receivers if self.narrow.is_cuda else max(1, CACHE_BYTES // each)
        return [(start, min(start + size, receivers)) for start in range(0, receivers, size)]

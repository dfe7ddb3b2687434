"""Stream-wide tensors kept as the narrow factors that they come from.

What a head writes is `z W_O`, and the gradient at the stream of a receiver `y = W norm(x) + b` is
`W'^T dy / scale - x_hat along` (`norms.py`): products that are `d_head` wide before they are expanded, and a
rank-one term. Both are linear in what is narrow, so differences and sums are taken there, and only the tokens
that are needed next are ever expanded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Factored:
    """The tensor `narrow W - sum of along x_hat`, one row for each sender or receiver of a stage.

    Its places are `(batch, token)`, or one dimension after `at`.

    Attributes:
        narrow: `(row, *place, d_head)`, or the tensor itself where there is no `weight`.
        weight: `(row, d_head, d_model)`, or None.
        along: `(row, *place, 1)` for each point whose norm has a rank-one term.
        x_hat: `(*place, d_model)`, the standardised stream of each of these points.

    Example:
        >>> import torch
        >>> one = Factored(torch.ones(1, 1, 1, 2))
        >>> (one.times(0.25) + one).expand().flatten().tolist()
        [1.25, 1.25]
    """

    narrow: Float[Tensor, "row *place d_head"]
    weight: Float[Tensor, "row d_head d_model"] | None = None
    along: tuple[Float[Tensor, "row *place 1"], ...] = ()
    x_hat: tuple[Float[Tensor, "*place d_model"], ...] = ()

    def __add__(self, other: Factored) -> Factored:
        """The sum of two tensors of one stage."""
        narrow = self.narrow + other.narrow
        return Factored(narrow, self.weight, self.along + other.along, self.x_hat + other.x_hat)

    def times(self, factor: float) -> Factored:
        return replace(self, narrow=self.narrow * factor, along=tuple(along * factor for along in self.along))

    @property
    def vanishes(self) -> bool:
        """Whether it is 0 everywhere, so far as its narrow factors show."""
        return not bool(self.narrow.any())

    @property
    def shape(self) -> tuple[int, ...]:
        """`(row, *place, d_model)`, the shape of the expanded tensor."""
        widest = self.narrow if self.weight is None else self.weight
        return (*self.narrow.shape[:-1], widest.shape[-1])

    def at(self, tokens: int, places: Tensor | None = None) -> Factored:
        """The first tokens of every image as one list of places, image after image.

        Args:
            tokens: how many of each image.
            places: numbers in that list, to take only these.
        """

        def listed(part: Tensor) -> Tensor:
            flat = part[..., :tokens, :].flatten(-3, -2)
            return flat if places is None else flat.index_select(-2, places)

        return Factored(
            listed(self.narrow),
            self.weight,
            tuple(listed(along) for along in self.along),
            tuple(listed(x_hat) for x_hat in self.x_hat),
        )

    def between(self, start: int, end: int) -> Factored:
        """Some of the places of a list."""
        return Factored(
            self.narrow[:, start:end],
            self.weight,
            tuple(along[:, start:end] for along in self.along),
            tuple(x_hat[start:end] for x_hat in self.x_hat),
        )

    def times_stream(self, stream: Float[Tensor, "*place d_model"]) -> Float[Tensor, " row"]:
        """Each row times another tensor, summed over places and width; nothing is expanded."""
        if self.weight is None:
            found = torch.einsum("r...d,...d->r", self.narrow, stream)
        else:
            narrow = stream @ self.weight.flatten(0, 1).mT  # (*place, row * d_head)
            found = torch.einsum(
                "r...d,...rd->r", self.narrow, narrow.view(*narrow.shape[:-1], *self.weight.shape[:2])
            )
        for along, x_hat in zip(self.along, self.x_hat, strict=True):
            found = found - torch.einsum("r...d,...d->r", along, (x_hat * stream).sum(-1, keepdim=True))
        return found

    def expand(self, out: Tensor | None = None) -> Float[Tensor, "row *place d_model"]:
        """The tensor itself; differentiable unless it is written into `out`."""
        terms = list(zip(self.along, self.x_hat, strict=True))
        if out is not None and out.is_contiguous():
            if self.weight is None:
                out.copy_(self.narrow)
            else:
                products(self.narrow.flatten(1, -2), self.weight, out.view(len(out), -1, out.shape[-1]))
            for along, x_hat in terms:
                out.addcmul_(x_hat, along, value=-1.0)
            return out
        made = self.narrow
        if self.weight is not None:
            made = products(self.narrow.flatten(1, -2), self.weight).view(self.shape)
        for along, x_hat in terms:
            made = torch.addcmul(made, x_hat, along, value=-1.0)
        return made if out is None else out.copy_(made)


class Stacked(Factored):
    """Rows of several such tensors, one below the other: of stages that are side by side."""

    parts: tuple[Factored, ...]

    def __init__(self, *parts: Factored) -> None:
        super().__init__(parts[0].narrow)
        object.__setattr__(self, "parts", parts)

    def __add__(self, other: Factored) -> Factored:
        assert isinstance(other, Stacked), "both are of one stage"
        return Stacked(*(one + more for one, more in zip(self.parts, other.parts, strict=True)))

    def times(self, factor: float) -> Factored:
        return Stacked(*(part.times(factor) for part in self.parts))

    @property
    def vanishes(self) -> bool:
        return all(part.vanishes for part in self.parts)

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.parts[0].shape
        return (sum(part.shape[0] for part in self.parts), *first[1:])

    def at(self, tokens: int, places: Tensor | None = None) -> Factored:
        return Stacked(*(part.at(tokens, places) for part in self.parts))

    def between(self, start: int, end: int) -> Factored:
        return Stacked(*(part.between(start, end) for part in self.parts))

    def times_stream(self, stream: Float[Tensor, "*place d_model"]) -> Float[Tensor, " row"]:
        return torch.cat([part.times_stream(stream) for part in self.parts])

    def expand(self, out: Tensor | None = None) -> Float[Tensor, "row *place d_model"]:
        if out is None:
            return torch.cat([part.expand() for part in self.parts])
        first = 0
        for part in self.parts:
            part.expand(out[first : first + part.shape[0]])
            first += part.shape[0]
        return out


def products(
    left: Float[Tensor, "row place inner"], right: Float[Tensor, "row inner width"], out: Tensor | None = None
) -> Float[Tensor, "row place width"]:
    """The matrix product of each row, written into `out` if given; differentiable otherwise.

    On the CPU a batched product gives each core whole matrices. Where that leaves most of them idle for half
    of the time, as with three matrices for two cores, all work on one matrix after the other.
    """
    cores = torch.get_num_threads()
    if left.is_cuda or not cores < len(left) < 2 * cores:
        return torch.bmm(left, right) if out is None else torch.bmm(left, right, out=out)
    if out is None:
        return torch.stack([torch.mm(one, other) for one, other in zip(left, right, strict=True)])
    for one, other, room in zip(left, right, out, strict=True):
        torch.mm(one, other, out=room)
    return out

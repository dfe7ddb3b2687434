"""How units are read: neurons of an MLP, features of a dictionary, each a number at every token.

A unit is a function of one vector, the point at which it reads: the normed input of an MLP, what a node
writes, the stream itself. What a masked run and a gradient need of it is cut in two, so that most units stay
one number wide:

    read(point)       one row times the point, or the unit itself where nothing more is known of it
    activate(reads)   what the unit is, from that
    back(...)         the gradient at the point, unit by unit, from that at the reads
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitvit.models.dictionaries import Dictionary
from circuitvit.models.factored import Factored
from circuitvit.models.parts import MLP, Linear

Point = Float[Tensor, "batch token width"]


class Encoder(ABC):
    """Some units of a node, in order.

    Attributes:
        chosen: their numbers.
        ports: how many numbers each reads at a token.
    """

    chosen: tuple[int, ...]
    ports: int = 1

    @abstractmethod
    def read(self, point: Point) -> Float[Tensor, "batch token unit port"]:
        """What all units read at one point."""

    @abstractmethod
    def activate(self, reads: Float[Tensor, "batch token unit port"]) -> Float[Tensor, "batch token unit"]:
        """The units."""

    @abstractmethod
    def back(
        self, point: Point, d_reads: Float[Tensor, "batch token unit port"]
    ) -> Float[Tensor, "unit batch token width"] | Factored:
        """The gradient at each unit's own point; narrow where a row is all that a unit reads by."""

    @abstractmethod
    def taking(self, places: Sequence[int]) -> Encoder:
        """Some of these units, by their places among them."""


@dataclass(frozen=True, eq=False)
class Rows(Encoder):
    """Units `act(row . point + offset)`, each by itself.

    Attributes:
        chosen: numbers of the units.
        linear: gives what all units read, those that are not chosen too.
        act: from what units read to what they are.
        threshold: `(unit,)` that a unit has to be above, else it is 0, and itself then; None where `act` is
            all there is.
        top: how many of all pre-activations at a token count; then a unit also reads whether it is among
            them. None where each unit is by itself.
    """

    chosen: tuple[int, ...]
    linear: Linear
    act: Callable[[Tensor], Tensor]
    threshold: Float[Tensor, " unit"] | None = None
    top: int | None = None

    @property
    def ports(self) -> int:  # type: ignore[override]
        return 1 if self.top is None else 2

    def rows(self) -> tuple[Float[Tensor, "unit width"], Float[Tensor, " unit"] | None]:
        """Those of the chosen units, and what is added to what they read."""
        chosen, offset = list(self.chosen), self.linear.bias
        return self.linear.weight[chosen], None if offset is None else offset[chosen]

    def read(self, point: Point) -> Float[Tensor, "batch token unit port"]:
        if self.top is None:
            weight, offset = self.rows()
            return torch.nn.functional.linear(point, weight, offset)[..., None]
        every, chosen = self.linear(point), list(self.chosen)
        among = torch.zeros_like(every).scatter(-1, every.topk(self.top, dim=-1).indices, 1.0)
        return torch.stack([every[..., chosen], among[..., chosen]], dim=-1)

    def activate(self, reads: Float[Tensor, "batch token unit port"]) -> Float[Tensor, "batch token unit"]:
        own = reads[..., 0]
        if self.threshold is not None:
            return own * (own > self.threshold[list(self.chosen)])
        own = self.act(own.clone())  # some overwrite what they are given
        return own if self.top is None else own * reads[..., 1].detach()

    def back(self, point: Point, d_reads: Tensor) -> Factored:
        weight, _ = self.rows()
        return Factored(d_reads[..., :1].permute(2, 0, 1, 3), weight[:, None])

    def taking(self, places: Sequence[int]) -> Rows:
        return replace(self, chosen=tuple(self.chosen[place] for place in places))


@dataclass(frozen=True, eq=False)
class Whole(Encoder):
    """Units of which nothing is known but how to compute all of them: they read themselves.

    Attributes:
        chosen: numbers of the units.
        encode: from points to all units `(batch, token, unit)`, token by token.
    """

    chosen: tuple[int, ...]
    encode: Callable[[Tensor], Tensor]

    def read(self, point: Point) -> Float[Tensor, "batch token unit port"]:
        return self.encode(point)[..., list(self.chosen), None]

    def activate(self, reads: Float[Tensor, "batch token unit port"]) -> Float[Tensor, "batch token unit"]:
        return reads[..., 0]

    def back(self, point: Point, d_reads: Tensor) -> Float[Tensor, "unit batch token width"]:
        leaf = point.detach().requires_grad_()
        if not self.chosen:
            return point.new_zeros(0, *point.shape)
        with torch.enable_grad():
            each = self.read(leaf)[..., 0].unbind(-1)
        found = [
            torch.autograd.grad(own, leaf, d_own, retain_graph=True)[0]
            for own, d_own in zip(each, d_reads[..., 0].unbind(-1), strict=True)
        ]
        return torch.stack(found)

    def taking(self, places: Sequence[int]) -> Whole:
        return replace(self, chosen=tuple(self.chosen[place] for place in places))


# -- neurons -------------------------------------------------------------------------------------


def neurons_of(mlp: MLP, chosen: Sequence[int], hidden: Callable[[Tensor], Tensor]) -> Encoder:
    """The neurons of an MLP as functions of its normed input: by rows where it is linear layer, activation,
    linear layer, which is tried and not believed.

    Args:
        mlp: the part.
        chosen: numbers of neurons.
        hidden: from the normed input to all neurons, as the stage computes them.
    """
    first = _first(mlp)
    if first is not None and _is_first(*first, hidden):
        return Rows(tuple(chosen), *first)
    return Whole(tuple(chosen), hidden)


def _first(mlp: MLP) -> tuple[Linear, nn.Module] | None:
    """The layer before the activation, and that, of an MLP with one linear layer beside its last."""
    if not mlp.known or mlp.act is None or mlp.out is None:
        return None
    others = [
        part
        for name, part in mlp.module.named_modules()
        if type(part) is nn.Linear and not (name == mlp.out or name.startswith(f"{mlp.out}."))
    ]
    return (Linear.of(others[0]), mlp.module.get_submodule(mlp.act)) if len(others) == 1 else None


@torch.no_grad()
def _is_first(linear: Linear, act: nn.Module, hidden: Callable[[Tensor], Tensor]) -> bool:
    """Whether neurons are that on noise, to rounding."""
    weight = linear.weight
    noise = torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)[None]
    expected, found = hidden(noise), act(linear(noise))
    if expected.shape != found.shape:
        return False
    tolerance = 100 * torch.finfo(weight.dtype).eps
    return bool((expected - found).abs().max() <= tolerance * (1 + expected.abs().max()))


# -- features ------------------------------------------------------------------------------------


def features_of(dictionary: Any, chosen: Sequence[int]) -> Encoder:
    """Features of a dictionary as functions of what it reads; by rows where its form is known."""
    if not isinstance(dictionary, Dictionary):
        return Whole(tuple(chosen), dictionary.encode)
    linear = Linear(dictionary.encoder, dictionary.offset)
    return Rows(tuple(chosen), linear, torch.relu, dictionary.threshold, dictionary.k)

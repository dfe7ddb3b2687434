"""The literal split model with some of its nodes cut into neurons, features or source groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.reference.literal_vit import LiteralViT


@dataclass(frozen=True)
class Neurons:
    """An MLP's neurons that are nodes of their own."""

    chosen: list[int]


@dataclass(frozen=True)
class Features:
    """Features that are nodes of their own: of what an MLP writes, of its normed input, of a head's z.

    Attributes:
        encode: token by token.
        decoder: `(feature, width)`.
        bias: `(width,)`.
        chosen: numbers.
        of_input: whether the normed input of the MLP is read.
    """

    encode: Callable[[Tensor], Tensor]
    decoder: Tensor
    bias: Tensor
    chosen: list[int]
    of_input: bool = False

    def unit(self, number: int, point: Tensor) -> Tensor:
        return self.encode(point)[..., number, None] * self.decoder[number]

    def rest(self, point: Tensor) -> Tensor:
        others = [number for number in range(len(self.decoder)) if number not in self.chosen]
        return self.encode(point)[..., others] @ self.decoder[others] + self.bias

    def said(self, point: Tensor) -> Tensor:
        return self.encode(point) @ self.decoder + self.bias


@dataclass(frozen=True)
class Sources:
    """A head by the tokens that it takes values from: `(token,)` or `(image, token)` by the group's name."""

    groups: Mapping[str, Tensor]


How = Neurons | Features | Sources


class RefinedViT(LiteralViT):
    """The split model with nodes cut.

    Args:
        vit: as `LiteralViT` takes it.
        cuts: by the names of nodes.
    """

    def __init__(self, vit: nn.Module, cuts: Mapping[str, How]) -> None:
        super().__init__(vit)
        self.cuts = cuts

    def pieces(self, node: str) -> list[str]:
        """The names of a node's senders."""
        match self.cuts.get(node):
            case Neurons(chosen):
                return [*(f"{node}.n{number}" for number in chosen), f"{node}.rest"]
            case Features(chosen=chosen):
                return [*(f"{node}.f{number}" for number in chosen), f"{node}.rest", f"{node}.error"]
            case Sources(groups):
                return [f"{node}[{group}]" for group in groups]
        return [node]

    def stages(self) -> list[tuple[list[str], list[str]]]:
        found = []
        for senders, receivers in super().stages():
            own = [piece for sender in senders for piece in self.pieces(sender)]
            found.append((own, own if receivers == senders else receivers))
        return found

    def fed(self, receiver: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        node = receiver.partition("<")[0]
        if node.startswith("m"):
            name, _, piece = node.partition(".")
            return {node: self.piece(name, piece, inputs[node])}
        return self.by_head(node, *(inputs[f"{node}<{port}>"] for port in "qkv"))

    def by_head(self, name: str, query: Tensor, key: Tensor, value: Tensor) -> dict[str, Tensor]:
        block, head = self.place(name)
        read = [self.read(block, head, port, stream) for port, stream in enumerate((query, key, value))]
        match self.cuts.get(name):
            case Sources(groups):
                each = [torch.where(own[..., None], read[2], 0.0) for own in groups.values()]
                mixed = [self.mixed(block, *read[:2], values) for values in each]
            case Features() as how:
                z = self.mixed(block, *read)
                mixed = [*(how.unit(number, z) for number in how.chosen), how.rest(z), z - how.said(z)]
            case _:
                mixed = [self.mixed(block, *read)]
        return {
            piece: self.sent(block, head, own) for piece, own in zip(self.pieces(name), mixed, strict=True)
        }

    def by_mlp(self, name: str, hear: Callable[[str], Tensor]) -> dict[str, Tensor]:
        return {
            piece: self.piece(name, piece.removeprefix(f"{name}."), hear(piece))
            for piece in self.pieces(name)
        }

    def piece(self, name: str, piece: str, stream: Tensor) -> Tensor:
        """What one piece of an MLP makes of the stream that it reads."""
        block, how = self.vit.blocks[int(name[1:])], self.cuts.get(name)
        if isinstance(how, Neurons):
            hidden, kept = (
                self.hidden(block, stream),
                torch.zeros(block.mlp.fc2.in_features, dtype=torch.bool),
            )
            kept[how.chosen if piece == "rest" else int(piece[1:])] = True
            if piece == "rest":
                return self.linear(block.mlp.fc2, torch.where(kept, 0.0, hidden)) * self.gamma(block.ls2)
            column = self.tensor(block.mlp.fc2.weight[:, int(piece[1:])])
            return hidden[..., int(piece[1:]), None] * column * self.gamma(block.ls2)
        if not isinstance(how, Features):
            return self.mlp(block, stream)
        point = self.norm(block.norm2, stream) if how.of_input else self.mlp(block, stream)
        if piece == "rest":
            return how.rest(point)
        return (
            self.mlp(block, stream) - how.said(point) if piece == "error" else how.unit(int(piece[1:]), point)
        )

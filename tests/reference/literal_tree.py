"""A circuit run as a tree, by plain recursion from the logits: one image at a time, in float64.

value(node, image x)  =  the node's function of what its receivers hear
a receiver hears      =  constant + sum over senders u of
                         value(u, an image chosen for this place)   where the edge is of the circuit
                         u in a plain run of one more image         where it is not: one for all of these
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.reference.literal_vit import Groups, LiteralViT, Run, edge

Path = tuple[str, ...]
"""Names of edges from the logits down."""

Chosen = Callable[[Path, int], int]
"""The image for a place of the tree, given the image that its reader is about; a place is the path to it, and
the path of the reader with "" behind it for all that is not of the circuit."""


class LiteralTree:
    """Args: the model, its images `(image, channel, height, width)`, the names of the circuit's edges, which
    image each place is about, and the token groups."""

    def __init__(
        self, vit: LiteralViT, images: Tensor, circuit: set[str], chosen: Chosen, groups: Groups | None = None
    ) -> None:
        self.vit, self.circuit, self.chosen, self.groups = vit, circuit, chosen, groups
        self.plain: list[Run] = [vit.run(image[None]) for image in images]

    def logits(self, image: int) -> Tensor:
        """The logits `(class,)` of the tree about an image."""
        return self.vit.readout(self.stream("logits", image, (), self.chosen(("",), image)))[0]

    def value(self, node: str, image: int, path: Path) -> Tensor:
        if node == "input":
            return self.plain[image].outputs["input"]
        other = self.chosen((*path, ""), image)
        receivers = [node] if node.startswith("m") else [f"{node}<{port}>" for port in "qkv"]
        return self.vit.node(node, {name: self.stream(name, image, path, other) for name in receivers})

    def stream(self, receiver: str, image: int, path: Path, other: int) -> Tensor:
        total = self.constant(receiver)
        for sender in self.vit.senders_before(receiver):
            for group in range(1 if self.groups is None else len(self.groups.names)):
                name = edge(sender, receiver, group, self.groups)
                heard = self.plain[other].outputs[sender]
                if name in self.circuit:
                    place = (*path, name)
                    heard = self.value(sender, self.chosen(place, image), place)
                total = total + (heard if self.groups is None else heard * self.groups.inside(group, 1))
        return total

    def constant(self, receiver: str) -> Tensor:
        """The biases of the attention stages before a receiver."""
        total = torch.zeros_like(self.plain[0].outputs["input"])
        for layer, block in enumerate(self.vit.vit.blocks):
            if f"a{layer}.h0" in self.vit.senders_before(receiver):
                total = total + self.vit.constant(block)
        return total

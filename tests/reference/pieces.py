"""Nodes cut into pieces, by torch's own hooks on the original module.

What a piece writes is what its node writes when something inside of it is changed: all neurons but one at 0,
the values of all tokens but some at 0. An edge into a unit of an MLP is ablated when the MLP writes what that
unit makes of the other stream; nothing here knows stages, encoders or cuts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.reference.hooked import HookedModule, Sender, gives
from tests.reference.sites import Original

Encode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Piece:
    """What of a node's output is meant.

    Attributes:
        node: its name.
        site: what is changed inside of it, or "input" for the normed input of an MLP.
        change: the value at the site to that which leaves the piece alone; of an MLP's input, from that and
            what the MLP writes to what the piece writes.
        less: whether what the node writes of nothing at the site belongs to another piece.
    """

    node: str
    site: str
    change: Callable[..., Tensor]
    less: bool = False


@dataclass(frozen=True)
class PiecesOf:
    """A module some of whose nodes are cut.

    Attributes:
        original: the module, and where things are in it.
        pieces: by their names.
    """

    original: Original
    pieces: Mapping[str, Piece]
    known: dict[tuple[int, str], Tensor] = field(default_factory=dict, init=False)

    @torch.no_grad()
    def ablated(self, clean: Tensor, corrupt: Tensor, edge: str, share: float = 1.0) -> Tensor:
        """The logits of the clean images when one edge carries what it carries in the corrupt run."""
        sender, _, receiver = edge.partition("->")
        moved = share * (self.written(corrupt, sender) - self.written(clean, sender))
        nodes = self.original.nodes
        if receiver not in self.pieces:
            with torch.no_grad(), nodes.reading(receiver, moved):
                return nodes.run(clean)
        change = self.answer(clean, receiver, moved) - self.written(clean, receiver)
        with torch.no_grad():
            return self.original.edited({self.pieces[receiver].node: lambda own: own + change}).run(clean)

    def written(self, images: Tensor, name: str) -> Tensor:
        """What a piece or node writes; computed once."""
        place = id(images), name
        if place not in self.known:
            self.known[place] = self.answer(images, name)
        return self.known[place]

    def answer(self, images: Tensor, name: str, moved: Tensor | None = None) -> Tensor:
        """What a piece or node writes, if it reads a stream to which something is added."""
        piece, nodes = self.pieces.get(name), self.original.nodes
        if piece is None:
            return nodes.written(images, name)
        with nullcontext() if moved is None else nodes.reading(piece.node, moved):
            if piece.site == "input":
                return piece.change(self._normed(images, piece.node), nodes.written(images, piece.node))
            own = self._changed(images, piece, piece.change)
            return own - self._changed(images, piece, torch.zeros_like) if piece.less else own

    def _changed(self, images: Tensor, piece: Piece, change: Callable[[Tensor], Tensor]) -> Tensor:
        """What a node writes with a change inside of it; where all heads are one function, what they do."""
        nodes = self.original.edited({piece.site: change})
        if not (piece.less and self._is_fused(piece.node)):
            return nodes.written(images, piece.node)
        joined = Sender(nodes.senders[piece.node].module, gives)
        return HookedModule(nodes.run, {piece.node: joined}, {}).written(images, piece.node)

    def _is_fused(self, node: str) -> bool:
        return f"{node}<v>" in self.original.nodes.receivers and self.original.is_fused(node)

    def _normed(self, images: Tensor, node: str) -> Tensor:
        """The normed input of an MLP."""
        seen: list[Tensor] = []
        handle = self.original.nodes.receivers[node].norm.register_forward_hook(
            lambda module, inputs, output: seen.append(output)
        )
        try:
            with torch.no_grad():
                self.original.nodes.run(images)
        finally:
            handle.remove()
        return seen[-1]


# -- kinds of pieces -----------------------------------------------------------------------------


def neurons(mlp: str, chosen: list[int]) -> dict[str, Piece]:
    """Some neurons of an MLP, and the others with its bias."""
    site = f"{mlp}.hidden"
    found = {f"{mlp}.n{number}": Piece(mlp, site, only([number]), less=True) for number in chosen}
    return {**found, f"{mlp}.rest": Piece(mlp, site, without(chosen))}


def features(
    node: str, site: str, encode: Encode, decoder: Tensor, bias: Tensor, chosen: list[int]
) -> dict[str, Piece]:
    """Some features of what is at a site, the other ones with the decoder's bias, and what is missed."""

    def unit(number: int) -> Callable[..., Tensor]:
        return lambda x, *_: encode(x)[..., number : number + 1] * decoder[number]

    def rest(x: Tensor, *_: Tensor) -> Tensor:
        return without(chosen)(encode(x)) @ decoder + bias

    def error(x: Tensor, *written: Tensor) -> Tensor:
        return (written[0] if written else x) - (encode(x) @ decoder + bias)

    units = {f"{node}.f{number}": Piece(node, site, unit(number)) for number in chosen}
    return {**units, f"{node}.rest": Piece(node, site, rest), f"{node}.error": Piece(node, site, error)}


def sources(head: str, groups: Mapping[str, Tensor]) -> dict[str, Piece]:
    """A head by the tokens `(token, 1)`, or `(image, token, 1)`, that it takes values from."""
    return {
        f"{head}[{name}]": Piece(head, f"{head}<v>", lambda value, own=own: torch.where(own, value, 0.0))
        for name, own in groups.items()
    }


def only(chosen: list[int]) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        kept = torch.zeros_like(x)
        kept[..., chosen] = x[..., chosen]
        return kept

    return change


def without(chosen: list[int]) -> Callable[[Tensor], Tensor]:
    return lambda x: x - only(chosen)(x)

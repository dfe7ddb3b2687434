"""Single edges ablated by torch's own hooks on the original module, which knows neither stages nor parts.

A test says where the module keeps each node (`Sender`, `Receiver`); everything else is the module's own
forward. The edge `u -> v` is ablated when `v` alone reads the residual stream with `u`'s output of the
corrupt run in place of that of the clean run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Sender:
    """A node that writes to the stream.

    Attributes:
        module: what is hooked: a block for what enters it, an output projection for a head, an MLP.
        of: what the node writes, from the module, its first input and its output.
    """

    module: nn.Module
    of: Callable[[Any, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Receiver:
    """An input of a node.

    Attributes:
        norm: whose input is the residual stream that the node reads.
        projection: reads what the norm gives; the norm itself for a node that reads all of it alone.
        columns: of the projection's output that belong to the node; None for all.
        exchanged: in place of `columns`, what the projection gives when the node alone reads something else:
            from the projection, its inputs, its output, and what the node reads.
        pool: what is done to the stream before the norm is given it, such as a mean over tokens; linear.
        between: what is done between norm and projection.
    """

    norm: nn.Module
    projection: nn.Module
    columns: slice | None = None
    exchanged: Callable[[Any, Any, Any, Tensor], Any] | None = None
    pool: Callable[[Tensor], Tensor] = torch.Tensor.clone
    between: Callable[[Tensor], Tensor] = torch.Tensor.clone


def written_by_head(head: int, width: int, gamma: Tensor | None = None) -> Callable[..., Tensor]:
    """What a head writes through an output projection that is an `nn.Linear`."""
    columns = slice(head * width, (head + 1) * width)

    def of(projection: Any, joined: Tensor, _: Tensor) -> Tensor:
        written = joined[..., columns] @ projection.weight[:, columns].T
        return written if gamma is None else written * gamma

    return of


def one_head(attention: nn.MultiheadAttention, head: int) -> nn.MultiheadAttention:
    """A copy of torch's attention of which only one head reaches the output, and no bias."""
    alone, width = copy.deepcopy(attention), attention.head_dim
    with torch.no_grad():
        own = alone.out_proj.weight[:, head * width : (head + 1) * width].clone()
        alone.out_proj.weight.zero_()[:, head * width : (head + 1) * width] = own
        alone.out_proj.bias.zero_()
    return alone


def written_by_multihead(
    head: int, gamma: Tensor | None = None, mask: Tensor | None = None
) -> Callable[..., Tensor]:
    """What a head of torch's `nn.MultiheadAttention`, which no hook sees inside, writes under a mask."""

    def of(attention: Any, normed: Tensor, _: Tensor) -> Tensor:
        with _without_hooks(attention):
            written = one_head(attention, head)(normed, normed, normed, attn_mask=mask)[0]
        return written if gamma is None else written * gamma

    return of


def exchanged_in_multihead(head: int, port: int, mask: Tensor | None = None) -> Callable[..., Any]:
    """What torch's `nn.MultiheadAttention` gives under a mask when one head alone has another query (0), key
    (1) or value (2) input.
    """

    def exchanged(attention: Any, inputs: Any, output: Any, other: Tensor) -> Any:
        same = list(inputs[:3])
        changed = [other if place == port else each for place, each in enumerate(same)]
        alone = one_head(attention, head)
        moved = alone(*changed, attn_mask=mask)[0] - alone(*same, attn_mask=mask)[0]
        return output[0] + moved, *output[1:]

    return exchanged


def given(_: nn.Module, inputs: Tensor, output: Tensor) -> Tensor:
    """What the module is given."""
    return inputs


def gives(_: nn.Module, inputs: Tensor, output: Tensor) -> Tensor:
    """What the module gives."""
    return output


def packed_blocks(
    blocks: Sequence[Any],
    heads: int,
    width: int,
    mlp: Callable[[Any], nn.Module] = lambda block: block.mlp,
    gamma: Callable[[Any], Tensor | None] = lambda block: None,
) -> tuple[dict[str, Sender], dict[str, Receiver]]:
    """The nodes of blocks with `norm1`, `attn.qkv`, `attn.proj` and `norm2`, and what enters the first.

    Args:
        blocks: in running order.
        heads: of each.
        width: of a head.
        mlp: whose output is the MLP's.
        gamma: LayerScale's factor of the attention, where there is one.
    """
    senders, receivers = {"input": Sender(blocks[0], given)}, {}
    for layer, block in enumerate(blocks):
        senders[f"m{layer}"] = Sender(mlp(block), gives)
        receivers[f"m{layer}"] = Receiver(block.norm2, block.norm2)
        for head in range(heads):
            written = written_by_head(head, width, gamma(block))
            senders[f"a{layer}.h{head}"] = Sender(block.attn.proj, written)
            for port, name in enumerate("qkv"):
                first = (port * heads + head) * width
                columns = slice(first, first + width)
                receivers[f"a{layer}.h{head}<{name}>"] = Receiver(block.norm1, block.attn.qkv, columns)
    return senders, receivers


@dataclass(frozen=True)
class HookedModule:
    """A module, and where its nodes are.

    Attributes:
        run: from images to logits, by the module's own forward.
        senders: by name.
        receivers: by name.
    """

    run: Callable[[Tensor], Tensor]
    senders: Mapping[str, Sender]
    receivers: Mapping[str, Receiver]

    @torch.no_grad()
    def written(self, images: Tensor, sender: str) -> Tensor:
        """What a node writes to the stream in a plain run."""
        place, seen = self.senders[sender], list[Tensor]()

        def note(module: nn.Module, inputs: Any, options: Any, output: Any) -> None:
            first = next(value for value in (*inputs, *options.values()) if isinstance(value, Tensor))
            seen.append(place.of(module, first, output[0] if isinstance(output, tuple) else output))

        with _hooked(place.module.register_forward_hook(note, with_kwargs=True)):
            self.run(images)
        (found,) = seen
        return found

    @torch.no_grad()
    def ablated(self, clean: Tensor, corrupt: Tensor, edge: str, share: float = 1.0) -> Tensor:
        """The logits of the clean images when one edge carries what it carries in the corrupt run.

        Args:
            clean: images.
            corrupt: their counterparts.
            edge: its name.
            share: how much of the way to the corrupt run's output it goes.
        """
        sender, receiver = edge.split("->")
        moved = share * (self.written(corrupt, sender) - self.written(clean, sender))
        with self.reading(receiver, moved):
            return self.run(clean)

    @contextmanager
    def reading(self, receiver: str, moved: Tensor) -> Iterator[None]:
        """Runs in which one receiver alone reads a stream to which something is added."""
        place, streams = self.receivers[receiver], list[Tensor]()

        def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            streams.append(inputs[0])

        def replace(module: nn.Module, inputs: Any, output: Any) -> Any:
            with _without_hooks(place.norm), _without_hooks(place.projection):
                other = place.norm(streams[-1] + place.pool(moved))
                if place.exchanged is not None:
                    return place.exchanged(module, inputs, output, other)
                other = other if place.projection is place.norm else place.projection(place.between(other))
            mixed, columns = output.clone(), place.columns or slice(None)
            mixed[..., columns] = other[..., columns]
            return mixed

        handles = (
            place.norm.register_forward_pre_hook(note),
            place.projection.register_forward_hook(replace),
        )
        with _hooked(*handles):
            yield


@contextmanager
def _hooked(*handles: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


@contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """Its forward as the class says, while its hooks are at work."""
    before, after = module._forward_pre_hooks.copy(), module._forward_hooks.copy()
    module._forward_pre_hooks.clear()
    module._forward_hooks.clear()
    try:
        yield
    finally:
        module._forward_pre_hooks.update(before)
        module._forward_hooks.update(after)

"""Every site of a model, read and changed by torch's own hooks on the original module.

What is known of the module is where it keeps its nodes (`HookedModule`), its blocks, and in which order it
calls attention, which torch computes in one function: that is exchanged for a literal one. Nothing here knows
stages or parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference.hooked import HookedModule, Receiver, Sender, gives

Changes = Mapping[str, Callable[[Tensor], Tensor]]
"""By site what becomes of its whole value."""

PORTS = "qkv"

TORCH = F.scaled_dot_product_attention


@dataclass(frozen=True)
class Original:
    """A module, and where things are in it.

    Attributes:
        nodes: where it keeps its nodes.
        blocks: in running order; what a block is given and gives are streams.
        neurons: by the name of an MLP the linear layer that reads its neurons, and where, if it reads more.
        attentions: heads of each call of attention, in order.
        looks: whether scores and patterns are those of torch's function; not where two are subtracted.
        skipped: how many of the first tokens a pool does not look at.
        pool: what gives the pooled stream of a single latent, if there is such a pool.
        arranged: by the first letter of heads, what is made of their parts, where tokens are grouped.
        second: what the stream that MLPs read is called.
    """

    nodes: HookedModule
    blocks: Sequence[nn.Module]
    neurons: Mapping[str, tuple[nn.Module, slice | None]]
    attentions: Sequence[Sequence[str]]
    looks: bool = True
    skipped: int = 0
    pool: nn.Module | None = None
    arranged: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    second: str = "mid{}"

    # -- reading -------------------------------------------------------------------------------------

    def values(self, images: Tensor) -> dict[str, Tensor]:
        """Every site that is known of, in a plain run; NaN at tokens that the module has nothing for."""
        found: dict[str, Tensor] = {}
        with ExitStack() as stack:

            def note(name: str, value: Tensor) -> Tensor:
                found[name] = value.detach().clone()
                return value

            for site in self.sites:
                self._hook(stack, site, lambda value, name=site: note(name, value))
            with self._attending(note):
                found["logits"] = self.nodes.run(images).detach()
        found = {name: self._whole(name, value) for name, value in found.items()}
        for name in self.nodes.senders:
            found[name] = self.nodes.written(images, name)
        return found

    @property
    def sites(self) -> list[str]:
        """What is read and changed by hooks."""
        found = [f"resid{layer}" for layer in range(len(self.blocks) + 1)]
        found += [self.second.format(layer) for layer in range(len(self.blocks)) if self._between(layer)]
        found += [f"{name}.hidden" for name in self.neurons]
        found += ["pool.resid"] * (self.pool is not None)
        heads_of = (*self.attentions, *([name] for name in self.nodes.senders if name.startswith("t")))
        for heads in heads_of:
            if not self.is_fused(heads[0]):
                found += [f"{head}{part}" for head in heads for part in ("<q>", "<k>", "<v>", "<g>", ".z")]
        return [site for site in found if "<" not in site or site in self.nodes.receivers]

    def is_fused(self, head: str) -> bool:
        """Whether queries, keys, values and z are seen in torch's function alone."""
        return self.nodes.receivers[f"{head}<v>"].columns is None

    def _between(self, layer: int) -> list[nn.Module]:
        """The norms of MLPs that read what a block's attention has written."""
        before = [place.norm for name, place in self.nodes.receivers.items() if name.startswith(f"a{layer}.")]
        after = [
            place.norm
            for name, place in self.nodes.receivers.items()
            if name == f"m{layer}" or name.startswith(f"m{layer}.")
        ]
        return [norm for norm in after if all(norm is not other for other in before)]

    def _whole(self, site: str, value: Tensor) -> Tensor:
        """A value of all tokens, in their order."""
        if site.startswith("pool") and "<" in site:
            return F.pad(value[:, self.skipped :], (0, 0, self.skipped, 0), value=math.nan)
        is_part = "<" in site or site.endswith(".z")
        return self.arranged[site[0]](value) if is_part and site[0] in self.arranged else value

    # -- changing ------------------------------------------------------------------------------------

    def edited(self, changes: Changes) -> HookedModule:
        """The module with some of its sites changed, and where its nodes are then."""
        nodes = self.nodes

        def run(images: Tensor) -> Tensor:
            def of(name: str, value: Tensor) -> Tensor:
                return changes[name](value) if name in changes else value

            with ExitStack() as stack:
                for site, change in changes.items():
                    self._hook(stack, site, change)
                with self._attending(of):
                    return of("logits", nodes.run(images))

        senders = dict(nodes.senders)
        for name, change in changes.items():
            if name in senders and name != "input":
                senders[name] = replace(senders[name], of=_then(senders[name].of, change))
        return HookedModule(run, senders, nodes.receivers)

    def _hook(self, stack: ExitStack, site: str, change: Callable[[Tensor], Tensor]) -> None:
        """Put a hook where a site is; of scores and patterns there is none."""
        change = self._skipping(site, change)
        if site.startswith("resid") or site == "input":
            layer = 0 if site == "input" else int(site.removeprefix("resid"))
            if layer == len(self.blocks):
                handle = self.blocks[-1].register_forward_hook(
                    lambda module, inputs, output: _with_first(output, change)
                )
            else:
                handle = self.blocks[layer].register_forward_pre_hook(
                    lambda module, inputs: (change(inputs[0]), *inputs[1:])
                )
        elif site.startswith("mid"):
            self._hook_between(stack, int(site.removeprefix("mid").partition(".")[0]), change)
            return
        elif site == "pool.resid":
            assert self.pool is not None
            handle = self.pool.register_forward_hook(
                lambda module, inputs, output: change(output.view(len(output), 1, -1)).view_as(output)
            )
        elif site.endswith(".hidden"):
            reader, columns = self.neurons[site.removesuffix(".hidden")]
            handle = reader.register_forward_pre_hook(
                lambda module, inputs: (_columns(inputs[0], columns, change),)
            )
        elif "<" in site and not self.is_fused(site.partition("<")[0]):
            place = self.nodes.receivers[site]
            handle = place.projection.register_forward_hook(
                lambda module, inputs, output: _columns(output, place.columns, change)
            )
        elif site.endswith(".z") and not self.is_fused(site.removesuffix(".z")):
            columns = self._z_columns(site.removesuffix(".z"))
            handle = self.nodes.senders[site.removesuffix(".z")].module.register_forward_pre_hook(
                lambda module, inputs: (_columns(inputs[0], columns, change),)
            )
        elif site in self.nodes.senders:
            sender = self.nodes.senders[site]
            handle = sender.module.register_forward_hook(
                lambda module, inputs, output: _moved(sender, module, inputs, output, change)
            )
        else:
            return
        stack.callback(handle.remove)

    def _skipping(self, site: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The change of what a pool is given, which lacks the tokens that it skips."""
        if not (self.skipped and site.startswith("pool") and "<" in site):
            return change
        return lambda value: change(F.pad(value, (0, 0, self.skipped, 0)))[:, self.skipped :]

    def _hook_between(self, stack: ExitStack, layer: int, change: Callable[[Tensor], Tensor]) -> None:
        """Change the stream between attention and MLP: for the MLPs, and for what comes after the block."""
        moved: list[Tensor] = []

        def enter(module: nn.Module, inputs: Any) -> Any:
            changed = change(inputs[0])
            moved[:] = [changed - inputs[0]]
            return (changed, *inputs[1:])

        for norm in self._between(layer):
            stack.callback(norm.register_forward_pre_hook(enter, prepend=True).remove)
        leave = self.blocks[layer].register_forward_hook(
            lambda module, inputs, output: _with_first(output, lambda stream: stream + moved[0])
        )
        stack.callback(leave.remove)

    def _z_columns(self, head: str) -> slice:
        """Of the output projection's input."""
        width = self._width(head)
        heads = next((heads for heads in self.attentions if head in heads), ())
        place = heads.index(head) if heads else int(head.partition(".h")[2])
        return slice(place * width, (place + 1) * width)

    def _width(self, head: str) -> int:
        columns = self.nodes.receivers[f"{head}<v>"].columns
        assert columns is not None
        return int(columns.stop - columns.start)

    @contextmanager
    def _attending(self, of: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
        """Torch's attention written out, with what becomes of its parts by the names of their sites."""
        number = 0

        def each(x: Tensor, heads: Sequence[str], part: str) -> Tensor:
            found = [of(f"{head}{part}", x[:, place]) for place, head in enumerate(heads)]
            return torch.stack(found, dim=1)

        def attention(
            query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0,
            is_causal: bool = False, scale: float | None = None, **others: Any,
        ) -> Tensor:  # fmt: skip
            nonlocal number
            heads = self.attentions[number % len(self.attentions)]
            number += 1
            fused = self.is_fused(heads[0])
            if fused:
                query, key, value = (
                    each(x, heads, f"<{port}>") for x, port in zip((query, key, value), PORTS, strict=True)
                )
            size = query.shape[-1] ** -0.5 if scale is None else scale
            scores = query @ key.transpose(-2, -1) * size + (0 if attn_mask is None else attn_mask)
            if self.looks:
                scores = self._padded(each, scores, heads, ".scores", -math.inf)
            pattern = torch.softmax(scores, dim=-1)
            if self.looks:
                pattern = self._padded(each, pattern, heads, ".pattern", 0.0)
            mixed = pattern @ value
            return each(mixed, heads, ".z") if fused else mixed

        with mock.patch.object(F, "scaled_dot_product_attention", attention), torch.enable_grad():
            yield

    def _padded(
        self, each: Callable[..., Tensor], x: Tensor, heads: Sequence[str], part: str, rest: float
    ) -> Tensor:
        """A look with the keys that a pool leaves out."""
        skipped = self.skipped if heads[0].startswith("pool") else 0
        return each(F.pad(x, (skipped, 0), value=rest), heads, part)[..., skipped:]


def with_stream_nodes(original: Original, changes: Changes) -> HookedModule:
    """The module with some of its sites changed, and changes of streams as nodes of the graph."""
    shifts = {name: Shift(change) for name, change in changes.items() if name.startswith(("resid", "mid"))}
    nodes = original.edited({name: shifts.get(name, change) for name, change in changes.items()})
    senders = {f"{name}.edit": Sender(shift.change, gives) for name, shift in shifts.items()}
    receivers = {f"{name}.edit": Receiver(shift.seen, shift.change) for name, shift in shifts.items()}
    return HookedModule(nodes.run, {**nodes.senders, **senders}, {**nodes.receivers, **receivers})


class Shift(nn.Module):
    """A stream, and what is added to it."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.seen, self.change = nn.Identity(), Change(change)

    def forward(self, stream: Tensor) -> Tensor:
        moved: Tensor = stream + self.change(self.seen(stream))
        return moved


class Change(nn.Module):
    """From a stream to what is added to it."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.made = change

    def forward(self, stream: Tensor) -> Tensor:
        return self.made(stream) - stream


def _then(of: Callable[..., Tensor], change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda *arguments: change(of(*arguments))


def _with_first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


def _columns(x: Tensor, columns: slice | None, change: Callable[[Tensor], Tensor]) -> Tensor:
    found, own = x.clone(), columns or slice(None)
    found[..., own] = change(x[..., own])
    return found


def _moved(
    sender: Sender, module: nn.Module, inputs: Any, output: Any, change: Callable[[Tensor], Tensor]
) -> Any:
    """What a module gives when a node behind it writes something else, which LayerScale may follow."""
    first = output[0] if isinstance(output, tuple) else output
    with mock.patch.object(F, "scaled_dot_product_attention", TORCH):
        written = sender.of(module, inputs[0], first)
    factor = _factor(sender)
    moved = first + (change(written) - written) / factor
    return (moved, *output[1:]) if isinstance(output, tuple) else moved


def _factor(sender: Sender) -> Tensor | float:
    """LayerScale's, told from what the node is said to write."""
    held = [cell.cell_contents for cell in getattr(sender.of, "__closure__", None) or ()]
    held += getattr(sender.of, "args", ())
    held += [block.ls.gamma for block in held if hasattr(getattr(block, "ls", None), "gamma")]
    return next((each for each in held if isinstance(each, Tensor) and each.ndim == 1), 1.0)

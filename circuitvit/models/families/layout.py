"""A family made from a table of places: a hand-written Vision Transformer in one line.

Only the blocks have to be described. The embedding is whatever enters the first block, and the readout is
whatever follows the last: the module's own forward, with its blocks left out. That the table is right is
found out when the module is wrapped.
"""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from circuitvit.errors import OptionError, UnsupportedModelError
from circuitvit.models.attention import AttentionStage
from circuitvit.models.families.family import Family
from circuitvit.models.families.torch_layers import multihead
from circuitvit.models.layers import MLPStage
from circuitvit.models.parts import MLP, Attention, Linear, Readout, StandIn, norm_of
from circuitvit.models.stages import Stage

HEADS = ("num_heads", "n_heads", "heads", "n_head", "nhead", "num_attention_heads", "h")
"""What attention modules call their number of heads."""

POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "cls": lambda normed: normed[:, :1],
    "mean": lambda normed: normed.mean(dim=1, keepdim=True),
    "patches": lambda normed: normed[:, 1:].mean(dim=1, keepdim=True),
}
"""The class token, the mean of all tokens, the mean of all but the class token."""


def _is_place(given: object) -> bool:
    return given is None or (isinstance(given, str) and given != "")


def _are_places(given: object) -> bool:
    return isinstance(given, (tuple, list)) and all(map(_is_place, given))


def _is_number_or_place(given: object) -> bool:
    is_number = isinstance(given, (int, float)) and not isinstance(given, bool)
    return math.isfinite(given) if is_number else _is_place(given)  # type: ignore[arg-type]


PLACES = ("q", "k", "v", "qkv", "out", "attention", "q_norm", "k_norm", "norm", "after", "readout")
KINDS: dict[str, Callable[[Any], bool]] = {
    "blocks": lambda given: given is not None and _is_place(given),
    **dict.fromkeys(PLACES, _is_place),
    "norms": _are_places,
    "gammas": lambda given: _are_places(given) and len(given) == 2,
    "mlp": lambda given: _is_place(given) or (_are_places(given) and len(given) > 0 and None not in given),
    "heads": lambda given: _is_number_or_place(given) and not isinstance(given, float),
    "scale": _is_number_or_place,
    "tokens": lambda given: given is None or (_are_places(given) and None not in given),
}
"""What each entry of a layout may be."""

WORDS = {
    "norms": "pair of places or None, such as ('norm1', 'norm2')",
    "gammas": "pair of places or None, such as ('ls1.gamma', None)",
    "mlp": "place, nor places of layers one after the other",
    "heads": "whole number, nor the place of one",
    "scale": "number, nor the place of one",
    "tokens": "tuple of words, such as ('cls',)",
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the parts of a hand-written Vision Transformer are, for `circuitvit.wrap(module, layout=...)`.

    A block is pre-norm: `x = x + out(attention(q, k, v of norm(x)))`, then `x = x + mlp(norm(x))`. Places
    are names with dots, those of a block's parts from the block on. What is not said is found out; what is
    wrong is refused, with the first stage that differs from the module's own forward.

    Attributes:
        blocks: the list of blocks.
        norms: before attention, and before the MLP; None where there is none.
        q: the linear layer of queries.
        k: that of keys.
        v: that of values.
        qkv: one layer that gives all three, queries first; in place of `q`, `k` and `v`.
        out: the linear layer after the heads.
        attention: a `torch.nn.MultiheadAttention`, in place of all of these.
        heads: how many, or where the block keeps the number.
        scale: of products of queries and keys, or where it is kept.
        q_norm: a norm of each query over its head's width, or None.
        k_norm: likewise of keys.
        mlp: the MLP; or its layers one after the other, such as `("linear1", "activation", "linear2")`; None
            for a block without.
        gammas: LayerScale's factors of attention and MLP, where there are any: tensors.
        norm: the last norm, before pooling. With `pool` or `readout` given, the three say all of the readout.
        pool: "cls", "mean" of all tokens, or mean of the "patches" behind a class token.
        after: a norm behind pooling.
        readout: the classifier, a linear layer.
        tokens: the kinds of the tokens before the patches; found out where these form a square.

    Example:
        >>> import circuitvit as cv
        >>> layout = cv.Layout(
        ...     blocks="encoder.layers", attention="self_attn", mlp=("linear1", "activation", "linear2")
        ... )
        >>> model = cv.wrap(module, layout=layout, preprocessing=spec)  # doctest: +SKIP
    """

    blocks: str
    norms: tuple[str | None, ...] = ("norm1", "norm2")
    q: str | None = None
    k: str | None = None
    v: str | None = None
    qkv: str | None = None
    out: str | None = None
    attention: str | None = None
    heads: int | str | None = None
    scale: float | str | None = None
    q_norm: str | None = None
    k_norm: str | None = None
    mlp: str | Sequence[str] | None = None
    gammas: tuple[str | None, str | None] = (None, None)
    norm: str | None = None
    pool: str | None = None
    after: str | None = None
    readout: str | None = None
    tokens: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name, fits in KINDS.items():
            if not fits(given := getattr(self, name)):
                raise OptionError(f"{name}={given!r} of a layout is no {WORDS.get(name, 'place')}")
        kept = {
            "attention": [self.attention],
            "qkv": [self.qkv, self.out],
            "q": [self.q, self.k, self.v, self.out],
        }
        given = [name for name in kept if getattr(self, name) is not None]
        if len(given) != 1 or None in kept[given[0]]:
            raise OptionError(
                "a layout says where attention is in one of three ways: q=, k=, v= and out=; qkv= "
                "and out=; or "
                "attention=, for torch's nn.MultiheadAttention"
            )
        if len(self.norms) != 2 and (self.mlp is not None or len(self.norms) != 1):
            raise OptionError(
                "norms= of a layout are two: before attention and before the MLP, or None in a place"
            )
        if self.pool is not None and self.pool not in POOLS:
            raise OptionError(f"pool={self.pool!r} is none of {', '.join(map(repr, POOLS))}")

    @property
    def says_readout(self) -> bool:
        """Whether it says what follows the last block."""
        return any(place is not None for place in (self.norm, self.pool, self.after, self.readout))


# -- leaving out the blocks ------------------------------------------------------------------------


class _Entered(Exception):
    """Ends a forward at the first block."""

    def __init__(self, stream: Tensor) -> None:
        super().__init__()
        self.stream = stream


_LEAVING: ContextVar[Tensor | None] = ContextVar("what leaves the last block", default=None)


class _Left(StandIn):
    """In a block's place, where the blocks are left out."""

    def __init__(self, block: nn.Module, is_last: bool) -> None:
        super().__init__(block)
        self.is_last = is_last

    def forward(self, stream: Tensor, *others: Any, **options: Any) -> Tensor:
        leaving = _LEAVING.get()
        if leaving is None:
            raise _Entered(stream)
        return leaving if self.is_last else stream


def _without(module: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
    """A copy of a module's structure without its blocks; all other tensors are the module's own."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    left = {id(block): _Left(block, block is blocks[-1]) for block in blocks}
    return copy.deepcopy(module, shared | left)


# -- the family ------------------------------------------------------------------------------------


class LayoutFamily(Family):
    """The family that a layout describes.

    Args:
        layout: the table.
        size: of an image, `(channels, height, width)`, or of a clip.
    """

    def __init__(self, layout: Layout, size: tuple[int, ...]) -> None:
        self.layout, self.size = layout, size
        self._frames: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return LayoutFamily, (self.layout, self.size)  # frames are made anew

    def _frame(self, module: Any) -> nn.Module:
        """The module without its blocks, made once."""
        if module not in self._frames:
            self._frames[module] = _without(module, self.blocks(module))
        return self._frames[module]

    def embed(self, module: Any, images: Tensor) -> Tensor:
        try:
            self._frame(module)(images)
        except _Entered as entered:
            return entered.stream
        raise UnsupportedModelError(
            f"the forward of {type(module).__name__} runs none of {self.layout.blocks}"
        )

    def blocks(self, module: Any) -> Sequence[nn.Module]:
        found = _at(module, self.layout.blocks, type(module).__name__, "blocks")
        if isinstance(found, (nn.ModuleList, nn.Sequential, list, tuple)) and len(found):
            return tuple(found)
        raise UnsupportedModelError(
            f"{self.layout.blocks} of {type(module).__name__} is a {type(found).__name__}: blocks= is "
            f"the place "
            "of a list of blocks, with at least one"
        )

    def block(self, module: Any, block: Any, layer: int, where: str) -> tuple[Stage, ...]:
        layout, part = self.layout, partial(_at, block, where=where)
        norms = [
            norm_of(nn.Identity() if place is None else part(place, said="norms"), f"{where}.{place}")
            for place in layout.norms[: 1 if layout.mlp is None else 2]
        ]
        gammas = [None if place is None else part(place, said="gammas") for place in layout.gammas]
        attention = AttentionStage(layer, norms[0], _attention(layout, block, where), gammas[0])
        if layout.mlp is None:
            return (attention,)
        if isinstance(layout.mlp, str):
            mlp = _mlp(part(layout.mlp, said="mlp"))
        else:
            mlp = _mlp(nn.Sequential(*(_as_module(part(place, said="mlp")) for place in layout.mlp)))
        return attention, MLPStage(layer, norms[1], mlp, gammas[1])

    def readout(self, module: Any, stream: Tensor) -> Tensor:
        if self.layout.says_readout:
            return self._said_readout(module)(stream)
        blank = stream.new_zeros(len(stream), *self.size)
        token = _LEAVING.set(stream)
        try:
            return self._frame(module)(blank)  # type: ignore[no-any-return]
        except Exception as error:  # the forward is somebody else's code, and may want more of its blocks
            raise UnsupportedModelError(
                f"{type(module).__name__} cannot be run without its blocks ({type(error).__name__}: "
                f"{error}): say "
                "what follows them in the layout, by norm=, pool= and readout="
            ) from error
        finally:
            _LEAVING.reset(token)

    def readout_parts(self, module: Any) -> Readout | None:
        return self._said_readout(module) if self.layout.says_readout else None

    def _said_readout(self, module: Any) -> Readout:
        layout, where = self.layout, type(module).__name__
        norm, after, head = (
            nn.Identity() if place is None else _at(module, place, where, said)
            for place, said in ((layout.norm, "norm"), (layout.after, "after"), (layout.readout, "readout"))
        )
        norms = norm_of(norm, layout.norm or "none"), norm_of(after, layout.after or "none")
        return Readout(
            norms[0], POOLS[layout.pool or "cls"], norms[1], (head,), (layout.readout or "readout",)
        )

    def prefix(self, module: Any) -> tuple[str, ...]:
        if self.layout.tokens is not None:
            return self.layout.tokens
        like = next(module.parameters())
        with torch.no_grad():
            tokens = self.embed(module, like.new_zeros(1, *self.size)).shape[1]
        is_square = [math.isqrt(count) ** 2 == count for count in (tokens, tokens - 1)]
        return ("cls",) if is_square == [False, True] else ()


def families(layout: Layout, module: Any, size: tuple[int, ...]) -> tuple[LayoutFamily, ...]:
    """What a layout may mean: the number of heads and the scale, where it does not say them, are to be found
    out.

    Raises:
        UnsupportedModelError: if a place of the layout is not there.
    """
    whole = LayoutFamily(layout, size)
    if layout.attention is not None:
        return (whole,)
    block = whole.blocks(module)[0]
    out = _linear(block, layout.out, "blocks.0", "out")
    heads = [layout.heads] if layout.heads is not None else _likely_heads(layout, block, out.in_features)
    return tuple(
        LayoutFamily(replace(layout, heads=each, scale=scale), size)
        for each in heads
        for scale in ([layout.scale] if layout.scale is not None else [None, out.out_features**-0.5, 1.0])
    )


def _likely_heads(layout: Layout, block: Any, width: int) -> Sequence[int | str]:
    """What the block or its attention calls its number of heads; else every number that it could be."""
    place = (layout.qkv or layout.q or "").rpartition(".")[0]
    holders = [_at(block, place, "blocks.0", "q"), block] if place else [block]
    said = [getattr(holder, name, None) for holder in holders for name in HEADS]
    found = [number for number in dict.fromkeys(said) if isinstance(number, int) and number > 0]
    return found or [number for number in range(1, width + 1) if width % number == 0]


# -- parts -----------------------------------------------------------------------------------------


def _at(holder: Any, place: str, where: str, said: str) -> Any:
    """What is at a place.

    Raises:
        UnsupportedModelError: if nothing is; with what comes nearest.
    """
    found = holder
    for name in place.split("."):
        if not hasattr(found, name):
            there = [*dict(found.named_children())] if isinstance(found, nn.Module) else []
            near = difflib.get_close_matches(name, there, n=1, cutoff=0.5) or there
            raise UnsupportedModelError(
                f"{where} has no {place} ({said}= of the layout): there is no {name} in "
                f"{'it' if found is holder else f'its {type(found).__name__}'}"
                + (f", but {', '.join(near)}" if near else "")
            )
        found = getattr(found, name)
    return found


def _linear(block: Any, place: str | None, where: str, said: str) -> nn.Linear:
    found = _at(block, place or "", where, said)
    if isinstance(found, nn.Linear):
        return found
    raise UnsupportedModelError(
        f"{where}.{place} is a {type(found).__name__}: {said}= of a layout is the place of an nn.Linear"
    )


def _number(block: Any, value: float | str, where: str, said: str) -> float:
    """A setting, said or kept by the block."""
    found = _at(block, value, where, said) if isinstance(value, str) else value
    if isinstance(found, (int, float)):
        return found
    raise UnsupportedModelError(
        f"{where}.{value} is a {type(found).__name__}: {said}= of a layout is a number"
    )


def _attention(layout: Layout, block: Any, where: str) -> Attention:
    if layout.attention is not None:
        return multihead(_at(block, layout.attention, where, "attention"), f"{where}.{layout.attention}")
    linear = partial(_linear, block, where=where)
    out = Linear.of(linear(layout.out, said="out"))
    heads, width = int(_number(block, layout.heads or 0, where, "heads")), out.weight.shape[1]
    if layout.qkv is not None:
        packed = Linear.of(linear(layout.qkv, said="qkv"))
        ports, widths = [packed.part(number, 3) for number in range(3)], {3 * width, len(packed.weight)}
    else:
        packed = None
        places = (("q", layout.q), ("k", layout.k), ("v", layout.v))
        ports = [Linear.of(linear(place, said=said)) for said, place in places]
        widths = {width, *(len(port.weight) for port in ports)}
    if len(widths) > 1 or heads < 1 or width % heads:
        read = ", ".join(str(len(port.weight)) for port in ports)
        raise UnsupportedModelError(
            f"{where}: queries, keys and values of {read} numbers, and "
            f"an output projection of {width}, are not those of {heads} heads of one width"
        )
    scale = (width // heads) ** -0.5 if layout.scale is None else _number(block, layout.scale, where, "scale")
    norms = [
        None if place is None else norm_of(_at(block, place, where, said), f"{where}.{place}")
        for said, place in (("q_norm", layout.q_norm), ("k_norm", layout.k_norm))
    ]
    query, key, value = ports
    return Attention(heads, query, key, value, out, scale, packed, query_norm=norms[0], key_norm=norms[1])


class _Function(nn.Module):
    """A function as a layer, such as the activation that a block keeps."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _as_module(layer: Any) -> nn.Module:
    return layer if isinstance(layer, nn.Module) else _Function(layer)


def _mlp(module: nn.Module) -> MLP:
    """An MLP; with the names of its parts where it is layers one after the other."""
    if type(module) is nn.Sequential:
        layers = {name: layer for name, layer in module.named_children() if not isinstance(layer, nn.Dropout)}
        if [type(layer) is nn.Linear for layer in layers.values()] == [True, False, True]:
            _, act, out = layers
            return MLP(module, True, act=act, out=out)
    return MLP(module)

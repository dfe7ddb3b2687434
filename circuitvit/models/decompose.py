"""From a module to stages that have been checked against it.

Nothing that a family says is believed. The module's own forward is run once, and what enters and leaves
every block is noted; then each block alone is compared with its stages in float64, relative to what it adds,
so that half precision hides no difference; and once more with all weights redrawn, so that a LayerScale of
1e-6 or a head of zeros hides none either. Which tokens the readout reads, and whether an MLP keeps tokens
apart, is found out by perturbing tokens.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from circuitvit.errors import CircuitViTError, ModelError, UnsupportedModelError
from circuitvit.graph import RESIDUAL
from circuitvit.models.families import Family
from circuitvit.models.layers import MLPStage, ReadoutStage
from circuitvit.models.parts import Norm, StandIn
from circuitvit.models.stages import Stage, through

CLOSE = 1e-6
"""How far a stage may be from the block's own forward in float64, relative to what the block adds."""

ROUNDING = 1e-12
"""The same relative to the stream, and what counts as no change at all when tokens are perturbed."""

FEW = 16
"""Tokens that redrawn blocks are compared on."""

DRAWS = 8
"""How often, four at a time, tokens are perturbed before they are taken for unread."""

HOOKS = ("_hooks", "_hooks_with_kwargs", "_always_called")
"""How the attributes end in which a module keeps its hooks."""

GROWTH = 1e8
"""How many times over a stream is given to a block to see whether it goes through."""

NO_STREAM = (
    "has no residual stream: what enters it does not come out again when it is made large, since it "
    "is normed after "
    "something was added to it (post-norm), or nothing is. What a part writes is then rescaled by "
    "every later norm, so "
    "that later parts read no sum of what earlier ones wrote, and there are no edges to find"
)

STEPS = 64
"""How many rounding steps of its dtype the module's own run may be from ours where the same parts run."""


def frozen_twin(module: nn.Module) -> nn.Module:
    """A copy of a module's structure in evaluation mode and without hooks, whose tensors are the original's.

    The original keeps its mode, its gradients, its hooks and its `requires_grad` flags; the twin has none of
    them, so no gradient of a weight is ever computed.

    Raises:
        UnsupportedModelError: if a part cannot be copied.
    """
    shared: dict[int, Any] = {}
    for parameter in module.parameters():
        shared[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    for buffer in module.buffers():
        shared[id(buffer)] = buffer.detach()
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, Tensor) and id(value) not in shared:  # what it saw last, or fixed positions
                shared[id(value)] = value.detach()
    try:
        return _copied(module, shared).eval()
    except Exception as error:  # parts may refuse to be copied in any way they like
        raise UnsupportedModelError(
            f"{type(module).__name__} cannot be copied: {error}. Weights that every forward computes anew, "
            "as torch.nn.utils.weight_norm does, have to be made plain first (remove_weight_norm)"
        ) from error


def _copied(module: nn.Module, instead: Mapping[int, Any]) -> nn.Module:
    """A deep copy without hooks, which may hold anything and must not run for us, and with other objects in
    the places of some, by their ids.
    """
    empty = {
        id(value): OrderedDict[Any, Any]()
        for part in module.modules()
        for name, value in vars(part).items()
        if name.endswith(HOOKS) and isinstance(value, dict)
    }
    return copy.deepcopy(module, {**empty, **instead})


def decomposed(family: Family, twin: nn.Module, images: Tensor) -> tuple[tuple[Stage, ...], Tensor]:
    """The stages of a frozen twin, checked, and its logits for some images.

    Args:
        family: of the module.
        twin: from `frozen_twin`.
        images: to run it on, at least two.

    Raises:
        UnsupportedModelError: if the stages do not add up to what the module does; the message says where.
        ModelError: if the module cannot be run, or its logits are NaN or infinite.
    """
    family.refuse(twin)
    stages = family.stages(twin)
    _check_parts(stages)
    run = _observed(family, twin, images)
    _check_chain(family, twin, stages, images, run)
    ends = _ends(family, twin, redrawn=True)
    _check_ends(family, twin, ends, images, run)
    name, place = type(twin).__name__, 1
    for layer, call in enumerate(run.calls):
        where = f"blocks.{layer}"
        as_it_is, redrawn = _wide(call.block), _wide(call.block, redrawn=True)
        _check_block(name, where, as_it_is, family.block(twin, as_it_is, layer, where), call)
        parts = family.block(twin, redrawn, layer, where)
        try:
            _check_block(name, where, redrawn, parts, call, tokens=FEW)
        except UnsupportedModelError:  # it is made for one number of tokens, or not what it seems
            _check_block(name, where, redrawn, parts, call)
        for part, own in zip(parts, stages[place : place + len(parts)], strict=True):
            for piece, same in zip(part.branches, own.branches, strict=True):
                if isinstance(piece, MLPStage) and isinstance(same, MLPStage):
                    _check_mlp(where, piece, same, *call.stream.shape[1:])
        place += len(parts)
    _check_readout(family, twin, ends, stages, run)
    return stages, run.logits


def _check_parts(stages: Sequence[Stage]) -> None:
    """The parts of the stream must follow one another."""
    part = RESIDUAL
    for stage in stages[1:]:
        if stage.nodes.reads_from != part:
            raise UnsupportedModelError(
                f"{stage.nodes.name} reads {stage.nodes.reads_from!r}, where the stream is {part!r} by now"
            )
        part = stage.nodes.writes_to


# -- the module's own run ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Call:
    """One block's part in the module's own run; with `token_first` it takes `(token, batch, d_model)`."""

    block: nn.Module
    inputs: tuple[Any, ...]
    options: dict[str, Any]
    given: Any
    token_first: bool

    @property
    def taken(self) -> Tensor:
        """The stream in the block's own order."""
        return next(value for value in (*self.inputs, *self.options.values()) if isinstance(value, Tensor))

    @property
    def stream(self) -> Tensor:
        return _ordered(self.taken, self.token_first)

    @property
    def output(self) -> Tensor:
        return _ordered(_first(self.given), self.token_first)


@dataclass(frozen=True, eq=False)
class _Run:
    logits: Tensor
    calls: list[_Call] = field(default_factory=list)


@torch.no_grad()
def _observed(family: Family, twin: nn.Module, images: Tensor) -> _Run:
    """The module's own forward, with what went into and out of every block."""
    blocks = list(family.blocks(twin))
    calls: list[_Call] = []

    def note(block: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        calls.append(_Call(block, inputs, options, output, family.token_first(twin)))

    with _noted(blocks, note):
        try:
            logits = family.run(twin, images)
        except Exception as error:  # the forward is somebody else's code and may raise anything
            raise ModelError(
                f"the model fails on an input of shape {tuple(images.shape)}: {type(error).__name__}: {error}"
            ) from error
    if getattr(logits, "ndim", None) != 2:
        raise UnsupportedModelError("the model must give logits of shape (batch, class)")
    if not logits.isfinite().all():
        raise ModelError(
            "the model's logits are NaN or infinite on an ordinary input: its weights are unusable"
        )
    if [call.block for call in calls] != blocks:
        raise UnsupportedModelError(
            f"{type(twin).__name__} runs {len(calls)} blocks where it has {len(blocks)}: "
            "every block must run once, in order"
        )
    return _Run(logits, calls)


def _first(output: Any) -> Any:
    """The stream, of a block that gives other things along with it."""
    return output[0] if isinstance(output, (tuple, list)) else output


@contextmanager
def _runnable(where: str) -> Iterator[None]:
    """Parts that do not fit together are told so."""
    try:
        yield
    except CircuitViTError:
        raise
    except Exception as error:  # products and sums of tensors of other shapes, and whatever modules raise
        raise UnsupportedModelError(
            f"{where}, as its family says it, cannot be run: {type(error).__name__}: {error}"
        ) from error


def _ordered(stream: Tensor, token_first: bool) -> Tensor:
    """Between a stream `(batch, token, d_model)` and what the blocks of a module take; either way."""
    return stream.transpose(0, 1) if token_first else stream


@contextmanager
def _noted(blocks: Sequence[nn.Module], note: Any) -> Iterator[None]:
    handles = [block.register_forward_hook(note, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_chain(family: Family, twin: nn.Module, stages: Sequence[Stage], images: Tensor, run: _Run) -> None:
    """The embedding is what enters the first block, nothing happens between blocks, and the readout is the
    rest.
    """
    with torch.no_grad(), _runnable(type(twin).__name__):
        embedded = stages[0].total(stages[0].write(stages[0].read(images)))
        pool = stages[len(stages) - 1 - len(family.pool(twin)) : -1]
        logits = through((*pool, stages[-1]), run.calls[-1].output)
    pairs = [("before blocks.0", embedded, run.calls[0].stream)]
    pairs += [
        (f"between blocks.{layer} and blocks.{layer + 1}", before.output, after.stream)
        for layer, (before, after) in enumerate(zip(run.calls, run.calls[1:], strict=False))
    ]
    pairs += [("after the last block", logits, run.logits)]
    for where, ours, own in pairs:
        same_shape = ours.shape == own.shape
        scale = float(own.abs().max().clamp_min(torch.finfo(own.dtype).tiny))
        off = float((ours - own).abs().max()) / scale if same_shape else float("inf")
        if not off <= STEPS * torch.finfo(own.dtype).eps:
            raise UnsupportedModelError(
                f"{type(twin).__name__}: {where} the sum of its parts differs from its own forward by "
                f"{off:.1e} (relative): it does something there that this library does not know of"
            )


class _Through(StandIn):
    """In a block's place: notes what it is given, and adds noise, as a norm would hide a mere factor.

    Attributes:
        given: what the block gave in the module's own run, for what comes along with the stream.
        seen: the stream that came last.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        self.given: Any = None
        self.seen: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        """As the block has it, with parts in float64: some modules ask one for the dtype of the stream."""
        found = super().__getattr__(name)
        if isinstance(found, MethodType):
            return MethodType(found.__func__, self)
        return _wide(found) if isinstance(found, nn.Module) else found

    def forward(self, stream: Tensor, *others: Any, **options: Any) -> Any:
        self.seen = stream
        noised = self.noised(stream)
        return (noised, *self.given[1:]) if isinstance(self.given, (tuple, list)) else noised

    def noised(self, stream: Tensor) -> Tensor:
        noise = torch.randn(stream.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
        return stream + noise.to(stream)


@torch.no_grad()
def _check_ends(family: Family, twin: nn.Module, copied: nn.Module, images: Tensor, run: _Run) -> None:
    """Without its blocks, in float64 and with weights redrawn, the module is embedding and readout alone."""
    wide = images.to(next(copied.parameters()))
    blocks = [block for block in copied.modules() if isinstance(block, _Through)]
    order = partial(_ordered, token_first=family.token_first(copied))
    for block, call in zip(blocks, run.calls, strict=True):
        block.given = call.given
    try:
        expected = [
            family.run(copied, wide),
            *(order(each) for each in (block.seen for block in blocks) if each is not None),
        ]
        streams = [family.embed(copied, wide)]
        for block in blocks:
            streams.append(order(block.noised(order(streams[-1]))))
        pooled = through(family.pool(copied), streams[-1])
        found = [family.readout(copied, pooled), *streams[:-1]]
    except Exception as error:  # parts that know one dtype only
        raise UnsupportedModelError(
            f"{type(twin).__name__} cannot be checked in float64: {type(error).__name__}: {error}"
        ) from error
    alike = [_alike(ours, own) for ours, own in zip(found, expected, strict=False)]
    if len(found) != len(expected) or not all(alike):
        raise UnsupportedModelError(
            f"{type(twin).__name__}: before, between or after the blocks of its family the sum of its parts "
            "differs from its own forward: it does something there that this library does not know of"
        )


# -- one block, in float64 -----------------------------------------------------------------------


def _ends(family: Family, twin: nn.Module, redrawn: bool) -> nn.Module:
    """A copy in float64 without its blocks, and without parts that no image should pass: these would fail."""
    blocks = {id(block): _Through(block) for block in family.blocks(twin)}
    return _wide(twin, blocks | {id(part): nn.Module() for part in family.unused(twin)}, redrawn)


def _wide(
    module: nn.Module, instead: Mapping[int, nn.Module] | None = None, redrawn: bool = False
) -> nn.Module:
    """A copy in float64.

    Args:
        module: to copy.
        instead: what takes the places of some parts, by their ids.
        redrawn: whether all weights are drawn anew, so that none is too small to tell anything.
    """
    made = _copied(module, instead or {})
    device = next((tensor.device for tensor in made.parameters()), torch.device("cpu"))
    made = made.to("cpu" if device.type == "mps" else device, torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters() if redrawn else ():
            if parameter.is_floating_point():
                noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float32).mul_(4).sub_(2)
                spread = noise / math.sqrt(parameter[0].numel()) if parameter.ndim > 1 else 0.7 + 0.5 * noise
                parameter.copy_(spread)
    return _without_narrow_norms(made)


def _without_narrow_norms(made: nn.Module) -> nn.Module:
    """A module in float64 whose LayerNorms that compute in float32, whatever they are given, are wider."""
    for place, part in list(made.named_modules()):
        if isinstance(part, nn.LayerNorm) and type(part).forward is not nn.LayerNorm.forward:
            wider = _WiderNorm(part)
            if not wider.is_needed():
                continue
            if not place:
                return wider
            parent, _, name = place.rpartition(".")
            setattr(made.get_submodule(parent), name, wider)
    return made


class _WiderNorm(nn.LayerNorm):
    """In the place of a LayerNorm that computes in float32 (CLIP's): the same without that rounding.

    It is the formula wherever the norm itself keeps to that as far as float32 goes, on everything that it is
    ever given; elsewhere it is the norm.
    """

    def __init__(self, own: nn.LayerNorm) -> None:
        super().__init__(own.normalized_shape, own.eps, elementwise_affine=False)
        self._parameters, self._buffers = own._parameters, own._buffers
        self._own = (own,)  # no part of this one: its tensors are the same

    def is_needed(self) -> bool:
        """Whether the norm itself cannot be run in float64, or gives numbers that fit into float32."""
        (own,) = self._own
        noise = torch.randn(3, *own.normalized_shape, generator=torch.Generator().manual_seed(7)).double()
        noise = noise.to(next(own.parameters(), noise).device)
        try:
            found = own(noise)
        except RuntimeError:
            return self._is_narrow(noise)
        return torch.equal(found, found.float().double())

    def _is_narrow(self, noise: Tensor) -> bool:
        """Whether what fails in float64 runs in float32; a norm of channels of an image takes no noise at
        all.
        """
        try:
            self._in_float32(noise)
        except RuntimeError:
            return False
        return True

    def _in_float32(self, stream: Tensor) -> Tensor:
        named = (*self.named_parameters(), *self.named_buffers())
        narrow = {name: tensor.float() for name, tensor in named}
        found: Tensor = functional_call(self._own[0], narrow, (stream.float(),))
        return found.to(stream)

    def forward(self, stream: Tensor) -> Tensor:
        exact = super().forward(stream)
        own = self._in_float32(stream)
        close = torch.allclose(own, exact, 1e-5, 1e-5 * float(exact.abs().max()))
        return exact if close else own


def _widened(value: Any, like: Tensor, tokens: int | None, call: _Call) -> Any:
    """In float64; of the stream itself the first image alone, and as many tokens as are asked for; of a mask
    for each image the first.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    if value is call.taken:
        value = value[:tokens, :1] if call.token_first else value[:1, :tokens]
    elif value.ndim == 4:  # (image, head, query, key)
        value = value[:1]
    return value.to(like)


@torch.no_grad()
def _check_block(
    name: str,
    where: str,
    block: nn.Module,
    parts: Sequence[Stage],
    call: _Call,
    tokens: int | None = None,
) -> None:
    """Compare a block with its stages.

    Args:
        name: of the module's class.
        where: the block's place, for messages.
        block: a copy in float64.
        parts: its stages.
        call: the block's part in the module's own run.
        tokens: how many of the first tokens to run on; all by default.
    """
    like = next(block.parameters())
    widened = partial(_widened, like=like, tokens=tokens, call=call)
    inputs, options = tree_map(widened, (call.inputs, call.options))
    start = _ordered(widened(call.taken), call.token_first)
    try:
        output = block(*inputs, **options)
    except Exception as error:  # quantized layers and other parts that know one dtype only
        raise UnsupportedModelError(
            f"{where} of {name} cannot be checked in float64: {type(error).__name__}: {error}"
        ) from error
    output, stream = _ordered(_first(output), call.token_first), start
    for part in parts:
        with _runnable(f"{where}: {part.nodes.name}"):
            for piece in part.branches:
                _check_reading(where, block, piece, stream)
            stream = through((part,), stream)
    added, expected = stream - start, output - start
    off, size = float((added - expected).abs().max()), float(expected.abs().max())
    if not off <= CLOSE * size + ROUNDING * float(start.abs().max()):
        place = f"{where} of {name} ({type(call.block).__name__})"

        def rerun(times: float) -> Tensor:
            grown = tree_map(lambda value: value * times if value is inputs[0] else value, inputs)
            return _ordered(_first(block(*grown, **options)), call.token_first)

        if inputs and float(rerun(GROWTH).abs().max()) < GROWTH**0.5 * float(start.abs().max()):
            raise UnsupportedModelError(f"{place} {NO_STREAM}")
        first = _first_that_differs(block, parts, start, lambda: rerun(1.0), call.token_first)
        share = off / max(size, 1e-300)
        raise UnsupportedModelError(
            f"{place}: {first}the sum of its parts differs from its own forward by {share:.1e} "
            "of what it adds: it does something that its family or layout does not say"
        )


def _first_that_differs(
    block: nn.Module, parts: Sequence[Stage], start: Tensor, run: Callable[[], Tensor], token_first: bool
) -> str:
    """Which stage is the first that leaves another stream than the block has there, as the next norm
    shows.
    """
    seen: dict[nn.Module, Tensor] = {}
    norms = [norm.module for part in parts if isinstance(norm := getattr(part, "norm", None), Norm)]
    with _noted(norms, lambda norm, given, *_: seen.update({norm: given[0]})):
        run()
    if len(norms) != len(parts):
        return ""
    for part, following in zip(parts, norms[1:], strict=False):
        start = through((part,), start)
        own = seen.get(following)
        if own is not None and not _alike(start, _ordered(own, token_first)):
            return f"{part.nodes.name} is the first stage that differs, and "
    return f"{parts[-1].nodes.name} is the first stage that differs, and " if norms[-1] in seen else ""


def _check_reading(where: str, block: nn.Module, part: Stage, stream: Tensor) -> None:
    """Norms must follow their formulas, and receivers read of a stream of their own what they read of a
    shared one.
    """
    norm = getattr(part, "norm", None)
    if isinstance(norm, Norm) and not _alike(norm.affine(norm.standardise(stream)[0]), norm(stream)):
        place = next((name for name, each in block.named_modules() if each is norm.module), part.nodes.name)
        raise UnsupportedModelError(
            f"{where}.{place} is a {type(norm.module).__name__} that computes something else than LayerNorm "
            "and RMSNorm do, of each token alone"
        )
    few = stream[:, :4]
    noise = torch.randn(few.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(few)
    streams = torch.stack([few, few + noise])
    receivers = len(part.nodes.receivers)
    found = part.read_each(streams, [place % 2 for place in range(receivers)])
    whole = [part.read(each) for each in streams]
    if len(found) == 1:
        same = [torch.allclose(found[0], whole[0][0], CLOSE, CLOSE)]
    else:
        heads = receivers // len(found)
        same = [
            torch.allclose(read[:, head], whole[(port * heads + head) % 2][port][:, head], CLOSE, CLOSE)
            for port, read in enumerate(found)
            for head in range(heads)
        ]
    if not all(same):
        raise UnsupportedModelError(
            f"{part.nodes.name} in {where}: its norm and projections do not follow their formulas"
        )


def _alike(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, CLOSE, CLOSE * float(expected.abs().max()))


def _check_mlp(where: str, part: MLPStage, own: MLPStage, tokens: int, width: int) -> None:
    """Find out whether an MLP keeps images and tokens apart, and whether the names of its parts are right."""
    noise = torch.randn(2, tokens, width, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    two = noise.to(next(part.mlp.module.parameters(), noise))
    one = two[:1]
    written = part.mlp(one)
    if not _alike(part.mlp(two)[:1], written):
        raise UnsupportedModelError(
            f"{where}.mlp is a {type(part.mlp.module).__name__} whose output for one image depends on "
            "the others in the batch"
        )
    own.set_mixing(not all(_is_alike_alone(part, one, written, chosen) for chosen in _some_tokens(tokens)))
    hidden = part.mlp.hidden()
    if hidden is not None:
        before, last = hidden
        if not _alike(last(before(one)), written):
            own.mlp = type(own.mlp)(own.mlp.module)


def _some_tokens(tokens: int) -> Iterator[Int64[Tensor, " place"]]:
    """Some of the tokens, in another order."""
    places = torch.arange(tokens).flip(0)
    if tokens > 1:
        half = tokens // 2
        yield from (places[:half], places[half:], places[::2], places[1::2], places[-1:], places[:-1])


def _is_alike_alone(part: MLPStage, normed: Tensor, written: Tensor, chosen: Tensor) -> bool:
    """Whether some tokens without the others come out as they do among them, wherever they stand."""
    chosen = chosen.to(normed.device)
    try:
        alone = part.mlp(normed[:, chosen])
    except Exception:  # it is made for one number of tokens
        return False
    return bool((alone - written[:, chosen]).abs().max() <= 1e-10 * written.abs().max())


# -- the readout ---------------------------------------------------------------------------------


@torch.no_grad()
def _check_readout(
    family: Family, twin: nn.Module, redrawn: nn.Module, stages: Sequence[Stage], run: _Run
) -> None:
    """Find out which tokens the readout reads, whether its parts are all there is to it, and likewise for a
    pool.
    """
    readout = stages[-1]
    if not isinstance(readout, ReadoutStage):
        return
    for copied in (_ends(family, twin, redrawn=False), redrawn):
        stream = run.calls[-1].output[:1].to(next(copied.parameters()))
        pool = family.pool(copied)
        for part, own in zip(pool, stages[-1 - len(pool) : -1], strict=True):
            _check_reading("the pool", copied, part, stream)
            if isinstance(part, MLPStage) and isinstance(own, MLPStage):
                _check_mlp("the pool", part, own, *stream.shape[1:])
            stream = through((part,), stream)
        parts, logits = family.readout_parts(copied), family.readout(copied, stream)
        if parts is None or not _alike(parts(stream), logits):
            readout.parts = None

    def reads_from(token: int) -> bool:
        """Whether anything from this token on is read."""
        generator, spread = torch.Generator().manual_seed(5), 10 * float(stream.std())
        for _ in range(DRAWS):  # a maximum notices few of them
            moved = stream.repeat(4, 1, 1)
            later = moved[:, token:]
            later += spread * torch.randn(later.shape, generator=generator, dtype=torch.float64).to(stream)
            if (family.readout(copied, moved) - logits).abs().max() > ROUNDING * logits.abs().max():
                return True
        return False

    low, high = 0, stream.shape[1]  # the smallest number of tokens after which nothing is read
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if reads_from(middle) else (low, middle)
    readout.tokens = low if 0 < low < stream.shape[1] else None

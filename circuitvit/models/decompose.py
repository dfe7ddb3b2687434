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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from circuitvit.errors import ModelError, UnsupportedModelError
from circuitvit.graph import RESIDUAL
from circuitvit.models.families import Family
from circuitvit.models.layers import MLPStage, ReadoutStage
from circuitvit.models.parts import Norm
from circuitvit.models.stages import Stage

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
    for part in module.modules():  # a hook may hold anything, and must not run for us
        for name, value in vars(part).items():
            if isinstance(value, Tensor) and not value.is_leaf:  # a part may keep what it saw last
                shared[id(value)] = value.detach()
            if isinstance(value, dict) and name.endswith(HOOKS):
                shared[id(value)] = OrderedDict()
    try:
        return copy.deepcopy(module, shared).eval()
    except Exception as error:  # parts may refuse to be copied in any way they like
        raise UnsupportedModelError(
            f"{type(module).__name__} cannot be copied: {error}. Weights that every forward computes anew, "
            "as torch.nn.utils.weight_norm does, have to be made plain first (remove_weight_norm)"
        ) from error


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
    _check_ends(family, twin, images)
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
            if isinstance(part, MLPStage) and isinstance(own, MLPStage):
                _check_mlp(where, part, own, *call.stream.shape[1:])
        place += len(parts)
    _check_readout(family, twin, stages, run)
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
    """One block's part in the module's own run."""

    block: nn.Module
    inputs: tuple[Any, ...]
    options: dict[str, Any]
    output: Tensor

    @property
    def stream(self) -> Tensor:
        return next(value for value in (*self.inputs, *self.options.values()) if isinstance(value, Tensor))


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
        calls.append(_Call(block, inputs, options, _first(output)))

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
    with torch.no_grad():
        embedded = stages[0].total(stages[0].write(stages[0].read(images)))
        pool = stages[len(stages) - 1 - len(family.pool(twin)) : -1]
        pooled = _through(pool, run.calls[-1].output)
        logits = stages[-1].write(stages[-1].read(pooled))
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


def _through(parts: Sequence[Stage], stream: Tensor) -> Tensor:
    """The stream after these stages."""
    for part in parts:
        stream = part.add(stream, part.write(part.read(stream)))
    return stream


class _Through(nn.Module):
    """In a block's place: notes what it is given, and adds noise, as a norm would hide a mere factor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Tensor | None = None

    def forward(self, stream: Tensor, *others: Any, **options: Any) -> Tensor:
        self.seen = stream
        noise = torch.randn(stream.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
        return stream + noise.to(stream)


@torch.no_grad()
def _check_ends(family: Family, twin: nn.Module, images: Tensor) -> None:
    """Without its blocks, in float64 and with weights redrawn, the module is embedding and readout alone."""
    copied = _wide(twin, without=family.blocks(twin), redrawn=True)
    wide = images.to(next(copied.parameters()))
    blocks = [block for block in copied.modules() if isinstance(block, _Through)]
    try:
        expected = [family.run(copied, wide), *(block.seen for block in blocks)]
        streams = [family.embed(copied, wide)]
        for block in blocks:
            streams.append(block(streams[-1]))
        pooled = _through(family.pool(copied), streams[-1])
        found = [family.readout(copied, pooled), *streams[:-1]]
    except Exception as error:  # parts that know one dtype only
        raise UnsupportedModelError(
            f"{type(twin).__name__} cannot be checked in float64: {type(error).__name__}: {error}"
        ) from error
    if not all(own is not None and _alike(ours, own) for ours, own in zip(found, expected, strict=True)):
        raise UnsupportedModelError(
            f"{type(twin).__name__}: before, between or after the blocks of its family the sum of its parts "
            "differs from its own forward: it does something there that this library does not know of"
        )


# -- one block, in float64 -----------------------------------------------------------------------


def _wide(module: nn.Module, without: Sequence[nn.Module] = (), redrawn: bool = False) -> nn.Module:
    """A copy in float64; some parts do nothing in it.

    Args:
        module: to copy.
        without: the parts that do nothing.
        redrawn: whether all weights are drawn anew, so that none is too small to tell anything.
    """
    made = copy.deepcopy(module, {id(part): _Through() for part in without})
    device = next((tensor.device for tensor in made.parameters()), torch.device("cpu"))
    made = made.to("cpu" if device.type == "mps" else device, torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters() if redrawn else ():
            if parameter.is_floating_point():
                noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float32).mul_(4).sub_(2)
                spread = noise / math.sqrt(parameter[0].numel()) if parameter.ndim > 1 else 0.7 + 0.5 * noise
                parameter.copy_(spread)
    return made


def _widened(value: Any, like: Tensor, tokens: int | None) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value[:1, :tokens].to(like) if value.ndim == 3 else value.to(like)
    return value


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
    inputs, options = tree_map(lambda value: _widened(value, like, tokens), (call.inputs, call.options))
    start = _widened(call.stream, like, tokens)
    try:
        output = block(*inputs, **options)
    except Exception as error:  # quantized layers and other parts that know one dtype only
        raise UnsupportedModelError(
            f"{where} of {name} cannot be checked in float64: {type(error).__name__}: {error}"
        ) from error
    output, stream = _first(output), start
    for part in parts:
        _check_reading(where, block, part, stream)
        stream = _through((part,), stream)
    added, expected = stream - start, output - start
    off, size = float((added - expected).abs().max()), float(expected.abs().max())
    if not off <= CLOSE * size + ROUNDING * float(start.abs().max()):
        raise UnsupportedModelError(
            f"{where} of {name} ({type(call.block).__name__}): the sum of its parts differs from its own "
            f"forward by {off / max(size, 1e-300):.1e} of what it adds: it does something that this library "
            "does not know of"
        )


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
def _check_readout(family: Family, twin: nn.Module, stages: Sequence[Stage], run: _Run) -> None:
    """Find out which tokens the readout reads, whether its parts are all there is to it, and likewise for a
    pool.
    """
    readout = stages[-1]
    if not isinstance(readout, ReadoutStage):
        return
    for redrawn in (False, True):
        copied = _wide(twin, without=family.blocks(twin), redrawn=redrawn)
        stream = run.calls[-1].output[:1].to(next(copied.parameters()))
        pool = family.pool(copied)
        for part, own in zip(pool, stages[-1 - len(pool) : -1], strict=True):
            _check_reading("the pool", copied, part, stream)
            if isinstance(part, MLPStage) and isinstance(own, MLPStage):
                _check_mlp("the pool", part, own, *stream.shape[1:])
            stream = _through((part,), stream)
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

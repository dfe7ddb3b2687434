"""An edited model taken home: a plain module whose weights hold the edits.

A head writes `z W_O` and an MLP `hidden W + b`, so what is held at a constant needs no run of its own: its
columns of the last projection become 0, and what it would always write goes into the bias. The module that
comes out is a copy of the user's own, of the same class and with the same names of weights; it is run once
beside the edited model before it is given away.

With `shrink=True` what is left with columns of 0 alone, a head or a neuron, is taken out of the weights that
lead to it as well. What is taken out is what Michel et al. 2019, "Are Sixteen Heads Really Better than One?",
arXiv:1905.10650, call pruned, here with its mean in its place.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from circuitvit.errors import ModelError, UnsupportedModelError
from circuitvit.models.attention import AttentionStage
from circuitvit.models.changes import Change
from circuitvit.models.families import Family
from circuitvit.models.layers import MLPStage
from circuitvit.models.parts import Linear
from circuitvit.models.sites import heads_of
from circuitvit.models.stages import Stage

if TYPE_CHECKING:
    from circuitvit.models.model import Model

FOLDABLE = ("z", "hidden", "output")
"""Kinds of sites that a projection reads or writes."""

STEPS = 1e3
"""How many rounding steps of its dtype the module may be from the edited model: sums are taken in another
order.
"""

COARSE = 0.05
"""The same in dtypes of few bits, relative to the largest output."""


def to_module(model: Model, *, shrink: bool = False) -> nn.Module:
    """A plain module that computes what an edited model does, without this library.

    It is a copy of the module that was wrapped (of CLIP the image tower), in evaluation mode, with the same
    class and the same names of weights, so that its `state_dict()` can be loaded into another one of timm,
    transformers, open_clip or torchvision; a projection without a bias may have got one. Edits have to be
    constants that depend neither on the token nor on the image: of heads (`a1.h2.z`, `a1.h2`), neurons
    (`m3.hidden[17]`) and MLPs (`m3`). Of a model with a head or prompts on its features
    the module has two parts, `body` and `head`. The user's module stays as it is.

    Args:
        model: from `edit`; of one without edits a plain copy is made.
        shrink: take out heads and neurons that write nothing any more, so that the module is smaller and its
            weights fit no module that was built as the original.

    Raises:
        UnsupportedModelError: naming the edit that is no such constant, before anything is copied; or what
            cannot be made smaller.
        ModelError: if the model gives NaN.

    Example:
        >>> import circuitvit as cv
        >>> model = cv.load("catdog-tiny")
        >>> edited = model.edit({"a1.h2.z": 0, "m0.hidden[17]": 0.5})
        >>> module = edited.to_module()
        >>> module.load_state_dict(edited.to_module().state_dict())
        <All keys matched successfully>
    """
    bare = model.bare or model
    bare.refresh()
    held = _all_held(model, bare)
    body = bare if bare.under is None else bare.under
    with torch.inference_mode(False), torch.no_grad():
        made = copy.deepcopy(body.module)
        stages = bare.family.stages(made)
        for each in held:
            each.fold(stages, made)
        if shrink:
            for stage in stages:
                for part in stage.branches:
                    _shrink(part, made)
        head = None if bare.head is None else copy.deepcopy(bare.head.like(bare).module())
        finished = made if head is None else Headed(made, bare.family, head)
        _check(model, finished, shrink)
    for tensor in finished.parameters():
        if tensor.is_floating_point():
            tensor.requires_grad_(True)
    return finished.eval()


class Headed(nn.Module):
    """A module and the head that was put on its features.

    Args:
        body: gives the features.
        family: of the body, which knows how it is run.
        head: from features to logits.
    """

    def __init__(self, body: nn.Module, family: Family, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head, self._family = body, head, family

    def forward(self, images: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch classes"]:
        logits: Tensor = self.head(self._family.run(self.body, images))
        return logits


# -- what is held --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Held:
    """A head or an MLP, and what of it is held at constants.

    Attributes:
        node: its name.
        stage: its place among the model's stages.
        inner: which of the numbers that its projection reads are held.
        at: at what.
        outer: which coordinates of what it writes to the stream are held.
        written: at what.
    """

    node: str
    stage: int
    inner: Bool[Tensor, " width"]
    at: Float[Tensor, " width"]
    outer: Bool[Tensor, " d_model"]
    written: Float[Tensor, " d_model"]

    @classmethod
    def nothing(cls, change: Change, width: int, d_model: int) -> Held:
        """The node of a change, nothing of which is held yet."""
        inner, outer = (torch.zeros(size, dtype=torch.bool) for size in (width, d_model))
        at, written = (torch.zeros(size, dtype=torch.float64) for size in (width, d_model))
        return cls(change.site.node, change.site.stage, inner, at, outer, written)

    def hold(self, change: Change, value: Tensor) -> None:
        """Take in a change; of what is held already the last one holds, but for outputs, which come after."""
        which, constants = (
            (self.outer, self.written) if change.site.kind == "output" else (self.inner, self.at)
        )
        places = slice(None) if change.number is None else slice(change.number, change.number + 1)
        which[places], constants[places] = True, value

    def fold(self, stages: Sequence[Stage], made: nn.Module) -> None:
        """Write it into the weights of a copied module with these stages."""
        part = _part(stages[self.stage], self.node)
        linear, columns = _projection(part, self.node)
        owner = _owner(made, linear, self.node)
        own = _whole(linear)[:, columns]
        inner, outer = self.inner.to(own.device), self.outer.to(own.device)
        shift = own[:, inner].cpu().double() @ self.at[self.inner]
        own[:, inner] = 0
        before = torch.zeros_like(shift)
        if isinstance(part, MLPStage) and linear.bias is not None:
            before = linear.bias.cpu().double()
        shift += before
        if self.outer.any():
            own[outer] = 0
            shift[self.outer] = _before_scale(part, self)[self.outer]
        if bool((change := shift - before).any()):
            if owner.bias is None:
                owner.bias = nn.Parameter(own.new_zeros(len(own)), requires_grad=False)
            owner.bias.add_(change.to(owner.bias))


def _all_held(model: Model, bare: Model) -> list[Held]:
    """What the edits of a model hold, node by node.

    Raises:
        UnsupportedModelError: naming an edit that holds nothing at a constant, or a model that has no module
            of its own.
    """
    if bare.coarse is not None:
        cut = ", ".join(bare.refinements)
        raise UnsupportedModelError(
            f"{model.name} is refined: nodes of it ({cut}) are cut into pieces, which no module has. Edit "
            "the model that it was refined from"
        )
    under = bare.under
    if bare.head is not None and under is not None and (bare.head.tokens != "pooled" or under.has_classes):
        raise UnsupportedModelError(
            f"{bare.name} has a head on what {under.name} does not give itself: fold the edits of the model "
            "under it, or put the head on features (timm: num_classes=0)"
        )
    found: dict[str, Held] = {}
    for change in model.edits:
        value = _constant(change)
        part = _part(bare.stages[change.site.stage], change.site.node)
        linear, columns = _projection(part, change.site.node)
        width, d_model = len(range(_whole(linear).shape[1])[columns]), len(_whole(linear))
        held = found.setdefault(change.site.node, Held.nothing(change, width, d_model))
        held.hold(change, value)
        _owner(bare.module, linear, change.site.node)
        if change.site.kind == "output":
            _before_scale(part, held)
    return list(found.values())


def _constant(change: Change) -> Float[Tensor, " width"]:
    """What a change holds its site at.

    Raises:
        UnsupportedModelError: if it is no constant, or not one for all tokens and images.
    """
    site, value, why = change.site, change.value, ""
    mask = change.rows.of(change.kinds[0]) if change.kinds[0] else None
    if site.kind not in FOLDABLE:
        why = "of a head its z, of an MLP its neurons, and what either writes are what weights can hold"
    elif mask is not None and not bool(mask.all()):
        why = "it holds at some tokens, and weights are the same for all"
    elif isinstance(value, Tensor) and value.ndim > 1 and value.numel() != value.shape[-1]:
        why = "it has values for each token or image, and weights are the same for all"
    elif not isinstance(value, (int, float, Tensor)):
        called = getattr(value, "__name__", type(value).__name__)
        why = f"{called} is no constant, but a function of what is there"
    if why:
        way = "Numbers and vectors for all tokens can, such as {'a1.h2.z': 0, 'm3.hidden[17]': 0.2}"
        raise _unfoldable(change.name, f"{why}. {way}")
    return torch.as_tensor(value, dtype=torch.float64).detach().cpu().flatten()


def _unfoldable(name: str, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"the edit of {name} cannot be folded into weights: {why}")


# -- where weights are ---------------------------------------------------------------------------


def _part(stage: Stage, node: str) -> AttentionStage | MLPStage:
    """The attention or the MLP that a node is of.

    Raises:
        UnsupportedModelError: if it is of neither.
    """
    for part in stage.branches:
        if isinstance(part, (AttentionStage, MLPStage)) and node in part.nodes.senders:
            return part
    raise _unfoldable(node, "it is no head and no MLP, so no projection of the module writes it alone")


def _projection(part: AttentionStage | MLPStage, node: str) -> tuple[Linear, slice]:
    """The last projection of a head or an MLP, and which of its columns are the node's.

    Raises:
        UnsupportedModelError: if the MLP is one whose last layer is not known.
    """
    if isinstance(part, MLPStage):
        return part.last, slice(None)
    first = heads_of(part).index(node) * part.d_head
    return part.attention.out, slice(first, first + part.d_head)


def _whole(linear: Linear) -> Float[Tensor, "out in"]:
    """The weight of a projection, as a view that can be written to."""
    return linear.full_weight.T if linear.transposed else linear.full_weight


def _owner(module: nn.Module, linear: Linear, node: str) -> nn.Linear:
    """The layer of a module that holds the weight of a projection.

    Raises:
        UnsupportedModelError: if no linear layer does.
    """
    first = linear.full_weight.data_ptr()
    for part in module.modules():
        if isinstance(part, nn.Linear) and 0 <= first - part.weight.data_ptr() < part.weight.nbytes:
            return part
    kind = type(module).__name__
    raise _unfoldable(node, f"what it writes comes from no linear layer of {kind}, which could hold it")


def _before_scale(part: AttentionStage | MLPStage, held: Held) -> Float[Tensor, " d_model"]:
    """What the projection has to write so that behind LayerScale the held output is there.

    Raises:
        UnsupportedModelError: if LayerScale is 0 where something else is to be written, or another projection
            follows.
    """
    if isinstance(part, AttentionStage) and type(part.attention.out) is not Linear:
        raise _unfoldable(held.node, f"its output passes another projection. Hold {held.node}.z")
    if part.gamma is None:
        return held.written
    gamma = part.gamma.cpu().double()
    if bool((held.outer & (gamma == 0) & (held.written != 0)).any()):
        raise _unfoldable(held.node, "its LayerScale is 0 where it would have to write something")
    return held.written / torch.where(gamma == 0, 1.0, gamma)


# -- smaller -------------------------------------------------------------------------------------


def _shrink(part: Stage, made: nn.Module) -> None:
    """Take out of a module what a stage of it has that writes nothing; one of a kind is left.

    Raises:
        UnsupportedModelError: if the part cannot be smaller.
    """
    if isinstance(part, AttentionStage):
        weight, heads = _whole(part.attention.out), part.attention.heads
        kept = _kept(weight.reshape(len(weight), heads, -1).any(dim=2).any(dim=0))
        if len(kept) < heads:
            _leave_heads(part, kept, made)
    elif isinstance(part, MLPStage) and part.mlp.hidden() is not None:
        weight = _whole(part.last)
        kept = _kept(weight.any(dim=0))
        if len(kept) < weight.shape[1]:
            _leave_neurons(part, kept, made)


def _kept(writes: Bool[Tensor, " each"]) -> Tensor:
    """The numbers of those that write something, and the first where none does."""
    found = writes.nonzero().flatten()
    return found if len(found) else found.new_zeros(1)


def _leave_heads(part: AttentionStage, kept: Tensor, made: nn.Module) -> None:
    own, name = part.attention, part.name
    why = "" if own.resize else "its class has one number of heads for all that it is given"
    why = "what is added to its scores is in one table for all heads" if own.added is not None else why
    why = "its heads are normed together" if own.across is not None else why
    if own.resize is None or why:
        missing = ", ".join(head for place, head in enumerate(heads_of(part)) if place not in kept.tolist())
        raise UnsupportedModelError(
            f"{missing} cannot be taken out of {part.nodes.name}, though nothing is left of it: {why}. Leave "
            "out shrink=True"
        )
    for linear in {id(port.full_weight): port for port in own.ports.values()}.values():
        layer = _owner(made, linear, name)
        _cut(layer, _rows(kept, own.heads, layer.out_features, len(linear.weight) // own.heads), 0)
    _cut(_owner(made, own.out, name), _rows(kept, own.heads, own.heads * part.d_head, part.d_head), 1)
    own.resize(len(kept))


def _leave_neurons(part: MLPStage, kept: Tensor, made: nn.Module) -> None:
    name, module = part.nodes.senders[0], part.mlp.module
    last, width = _owner(made, part.last, name), part.last.weight.shape[1]
    first = [each for each in module.modules() if isinstance(each, nn.Linear) and each is not last]
    fits = last.in_features == width and all(each.out_features in (width, 2 * width) for each in first)
    normed = part.mlp.norm is not None and any(True for _ in module.get_submodule(part.mlp.norm).parameters())
    if normed or not first or not fits:
        why = "a norm reads all of them together" if normed else "its layers hold more than neurons"
        raise UnsupportedModelError(
            f"neurons cannot be taken out of {name}, though nothing is left of them: {why}. Leave out "
            "shrink=True"
        )
    for each in first:
        _cut(each, _rows(kept, width, each.out_features, 1), 0)
    _cut(last, kept, 1)


def _rows(kept: Tensor, count: int, rows: int, size: int) -> Tensor:
    """Of rows that are `count` things of a size, several times over, those of the things that are kept."""
    all_rows = torch.arange(rows, device=kept.device).view(-1, count, size)
    return all_rows[:, kept].flatten()


def _cut(layer: nn.Linear, kept: Tensor, axis: int) -> None:
    """Leave some rows (axis 0) or columns (axis 1) of a layer."""
    layer.weight = nn.Parameter(layer.weight.index_select(axis, kept), requires_grad=False)
    if axis == 0 and layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias[kept], requires_grad=False)
    layer.out_features, layer.in_features = layer.weight.shape


# -- proof ---------------------------------------------------------------------------------------


def _check(model: Model, made: nn.Module, shrink: bool) -> None:
    """Run both on a sample: a weight that is used twice, or a layer that ignores its bias, shows here.

    Raises:
        UnsupportedModelError: if outputs differ, or the module asks for other shapes.
        ModelError: if the model gives NaN.
    """
    kind, images = type(model.module).__name__, model.family.sample(model.module, model.preprocessing)
    expected = model(images)
    if not expected.isfinite().all():
        raise ModelError(f"{model.name} gives NaN or infinite logits: check its weights")
    try:
        found = made(images) if isinstance(made, Headed) else model.family.run(made, images)
    except Exception as error:  # a forward that asks for other shapes raises whatever it likes
        way = ". Leave out shrink=True" if shrink else ""
        raise UnsupportedModelError(
            f"{kind} does not run with the weights that {model.name} comes to: {error}{way}"
        ) from error
    off, most = (float(each.abs().max()) for each in (found - expected, expected))
    if not off <= min(STEPS * torch.finfo(expected.dtype).eps, COARSE) * max(most, 1.0):
        raise UnsupportedModelError(
            f"{model.name} cannot be folded into the weights of {kind}: its outputs are then off by "
            f"{off:.1e}, as if a weight were used in more than one place"
        )

"""What stages are built of: projections, norms, attention, MLPs and readouts that belong to no library.

A family (`circuitvit.models.families`) says where a module keeps these parts; the stages say what is
computed with them. Parts hold the module's own tensors and submodules, never converted copies, so that an
edit of a weight is seen at once. What is derived from weights (a projection with the norm folded in) is kept
in `Derived`, which notices edits.

A norm is `x_hat * weight + bias`, where `x_hat` is `x` (centred for LayerNorm) times an inverse scale that
depends on the token. For a receiver `y = W norm(x) + b` the gradient at `x` is

    scale * ( C W'^T dy  -  x_hat <x_hat, W'^T dy> / d_model ),      W' = W diag(weight)

with `C` the centring (LayerNorm only), and `<x_hat, W'^T dy> = dy . (y - W bias - b)` is had from `y` itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from circuitvit.errors import UnsupportedModelError
from circuitvit.models.rules import BackwardRules, Damped, IdentityRule

T = TypeVar("T")

MEAN_DOMINATES = 1e2
"""Past this ratio of squared mean to variance, a variance by subtraction loses digits that matter."""


def with_children(module: nn.Module, **children: nn.Module) -> Any:
    """A shallow copy of a module with some of its parts replaced."""
    twin = copy.copy(module)
    twin._modules = {**module._modules, **children}
    return twin


class StandIn(nn.Module):
    """A module in another's place, with the other's settings: a forward may ask for those of parts it runs.

    Args:
        other: in whose place; it is no part of this one.
    """

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self._other = (other,)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_other":
                raise
            return getattr(self._other[0], name)


class Derived:
    """What is computed from weights, kept until one of them is edited in place.

    Tensors count their edits (`_version`), and views of a parameter count with it. Edits by way of `.data`
    are not
    counted: `Model.refresh` finds those, and calls `forget`.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[tuple[int, int], ...], Any]] = {}

    def get(self, name: str, sources: Sequence[Tensor | None], make: Callable[[], T]) -> T:
        """The value of this name, made anew if one of its sources has changed."""
        version = tuple((each.data_ptr(), each._version) for each in sources if each is not None)
        known = self._known.get(name)
        if known is None or known[0] != version:
            with torch.inference_mode(False), torch.no_grad():  # it outlives the caller's mode
                known = self._known[name] = version, make()
        value: T = known[1]
        return value

    def forget(self) -> None:
        self._known.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Derived:
        return Derived()


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear map, or some rows of one that a module keeps together with others.

    Attributes:
        full_weight: `(out, in)`, the module's own tensor.
        full_bias: `(out,)`; or its parts in order, where the module keeps them apart; or None.
        rows: the first and the last but one of the rows that are meant; None for all.
        shared: into how many groups these fall, and how many heads share each, where they do: every head is
            then taken to have a copy of its own.
        bias_rows: the rows of the bias, where they are others than those of the weight.
        transposed: whether the module keeps the weight as `(in, out)`. That is said and not done, as a view
            of a tensor would be a tensor of its own in a copied model.
    """

    full_weight: Float[Tensor, "out in"]
    full_bias: Float[Tensor, " out"] | tuple[Tensor, ...] | None = None
    rows: tuple[int, int] | None = None
    shared: tuple[int, int] | None = None
    bias_rows: tuple[int, int] | None = None
    transposed: bool = False

    @classmethod
    def of(cls, module: Any, shared: tuple[int, int] | None = None) -> Linear:
        """That of an `nn.Linear`."""
        return cls(module.weight, module.bias, shared=shared)

    def part(self, number: int, count: int) -> Linear:
        """One of `count` equal parts of the rows."""
        size = len(self.full_weight) // count
        return replace(self, rows=(number * size, (number + 1) * size))

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        return self._meant(self.full_weight.T if self.transposed else self.full_weight, self.rows)

    @property
    def bias(self) -> Float[Tensor, " out"] | None:
        bias = torch.cat(self.full_bias) if isinstance(self.full_bias, tuple) else self.full_bias
        return None if bias is None else self._meant(bias, self.bias_rows or self.rows)

    def _meant(self, of_all: Tensor, which: tuple[int, int] | None) -> Tensor:
        """Of a weight or a bias, the rows that are meant, once for each head."""
        rows = of_all if which is None else of_all[slice(*which)]
        if self.shared is None:
            return rows
        groups, heads = self.shared
        by_group = rows.view(groups, -1, *rows.shape[1:])
        return by_group.repeat_interleave(heads, dim=0).flatten(0, 1)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The module's own, for what is derived from them."""
        biases = self.full_bias if isinstance(self.full_bias, tuple) else (self.full_bias,)
        return self.full_weight, *biases

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, eq=False)
class Chain:
    """Maps that follow each other, such as a projection and a classifier that was put on it."""

    maps: tuple[nn.Module | Linear, ...]

    def __call__(self, x: Tensor) -> Tensor:
        for each in self.maps:
            x = each(x)
        return x

    def __iter__(self) -> Iterator[nn.Module | Linear]:
        return iter(self.maps)


class Cosine(nn.Module):
    """Scaled cosines between what it is given and some directions, as CLIP compares images and sentences.

    Radford et al. 2021, "Learning transferable visual models from natural language supervision",
    arXiv:2103.00020; with a bias Zhai et al. 2023, "Sigmoid loss for language image pre-training",
    arXiv:2303.15343.

    Args:
        weight: directions `(class, width)` of length 1.
        scale: of the cosines, `()`.
        bias: `(class,)` or None.
    """

    def __init__(self, weight: nn.Parameter, scale: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.scale, self.bias = weight, scale, bias
        self.frozen = False

    def forward(self, x: Float[Tensor, "batch width"]) -> Float[Tensor, "batch classes"]:
        return F.linear(x / self.length(x), self.weight * self.scale, self.bias)

    def length(self, x: Float[Tensor, "batch width"]) -> Float[Tensor, "batch 1"]:
        """Of each vector; under rules that freeze norms a constant."""
        x = x.detach() if self.frozen else x
        length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return length.clamp_min(torch.finfo(x.dtype).tiny)

    def with_rules(self, rules: BackwardRules) -> Cosine:
        """The same values, differentiated by the rules."""
        ruled = Cosine(self.weight, self.scale, self.bias)
        ruled.frozen = rules.frozen_norms
        return ruled


# -- norms ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Norm:
    """LayerNorm, RMSNorm or none, over the last dimension, with what its gradient needs.

    Attributes:
        module: the model's own norm, used for every forward.
        centred: whether the mean is taken out (LayerNorm).
        scaled: whether the result is divided by its root mean square; False for no norm at all.
        eps: added to the mean square.
        weight: `(d_model,)` or None.
        bias: `(d_model,)` or None.
        frozen: whether gradients take the scale for a constant.
    """

    module: nn.Module
    centred: bool
    scaled: bool
    eps: float = 0.0
    weight: Tensor | None = None
    bias: Tensor | None = None
    frozen: bool = False

    def __call__(self, stream: Tensor) -> Tensor:
        if self.frozen and self.scaled:
            return self._with_constant_scale(stream)
        return self.module(stream)  # type: ignore[no-any-return]

    def _with_constant_scale(self, stream: Tensor) -> Tensor:
        inverse = self.standardise(stream.detach())[1]
        centred = stream - stream.mean(dim=-1, keepdim=True) if self.centred else stream
        return self.affine(centred * inverse)

    def affine(self, x_hat: Tensor) -> Tensor:
        """`x_hat * weight + bias`."""
        scaled = x_hat if self.weight is None else x_hat * self.weight
        return scaled if self.bias is None else scaled + self.bias

    @property
    def bends(self) -> bool:
        """Whether its gradient has a term along `x_hat`, from the scale."""
        return self.scaled and not self.frozen

    def standardise(self, stream: Tensor) -> tuple[Tensor, Tensor]:
        """`x_hat` of the stream's shape, and the inverse scale `(..., 1)`; statistics at least in float32."""
        if not self.scaled:
            return stream, torch.ones_like(stream[..., :1])
        wide = stream if stream.dtype == torch.float64 else stream.float()  # fp16 overflows past 256 squared
        if self.centred:
            wide = wide - wide.mean(dim=-1, keepdim=True)
        inverse = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (wide * inverse).to(stream.dtype), inverse.to(stream.dtype)

    def inverse(self, stream: Tensor) -> Tensor | None:
        """The inverse scale `(..., 1)` alone, without writing anything of the stream's size.

        None where that would lose digits: in half precision, and where the mean is much larger than the
        deviation.
        """
        if not self.scaled:
            return torch.ones_like(stream[..., :1])
        if stream.dtype not in (torch.float32, torch.float64):
            return None
        if stream.is_cuda and self.centred:  # one kernel there, and a look at the values would stop the queue
            return torch.rsqrt(torch.var(stream, dim=-1, correction=0, keepdim=True) + self.eps)
        square = torch.linalg.vector_norm(stream, dim=-1, keepdim=True).square() / stream.shape[-1]
        if self.centred:
            mean_square = stream.mean(dim=-1, keepdim=True).square()
            square = square - mean_square
            if bool((mean_square > MEAN_DOMINATES * square).any()):
                return None
        return torch.rsqrt(square + self.eps)

    def fold(self, weight: Float[Tensor, "out d_model"]) -> Float[Tensor, "out d_model"]:
        """`C W diag(weight)`: the projection with the norm's affine part and centring folded in."""
        folded = weight if self.weight is None else weight * self.weight
        return folded - folded.mean(dim=-1, keepdim=True) if self.centred else folded

    def offset(self, weight: Float[Tensor, "out d_model"], bias: Tensor | None) -> Float[Tensor, " out"]:
        """`W bias + b`: the part of the projection's output that does not depend on the stream."""
        offset = weight.new_zeros(weight.shape[0]) if bias is None else bias
        return offset if self.bias is None else offset + weight @ self.bias

    def pull_back(self, stream: Tensor, d_normed: Tensor) -> Tensor:
        """The gradient at the stream from that at the norm's output, both `(batch, token, d_model)`."""
        gradient = d_normed if self.weight is None else d_normed * self.weight
        if not self.scaled:
            return gradient
        x_hat, inverse = self.standardise(stream)
        along = (gradient * x_hat).mean(dim=-1, keepdim=True)
        if self.centred:
            gradient = gradient - gradient.mean(dim=-1, keepdim=True)
        if not self.bends:
            return gradient * inverse
        return (gradient - x_hat * along) * inverse

    def with_rules(self, rules: BackwardRules) -> Norm:
        """The norm with the same values, differentiated by the rules."""
        return replace(self, frozen=rules.frozen_norms)


class NormModule(nn.Module):
    """A norm of ours where a module is called for."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, stream: Tensor) -> Tensor:
        return self.norm(stream)


def norm_of(module: nn.Module, where: str) -> Norm:
    """The norm that a module is.

    Args:
        module: the model's norm.
        where: its name in the model, for the error.

    Raises:
        UnsupportedModelError: if it is none of LayerNorm, RMSNorm and Identity, or computes something else
            than its class says; gradients come from the formula, so they would be wrong without a sign.
    """
    kind = type(module)
    if isinstance(module, nn.Identity):
        return Norm(module, centred=False, scaled=False)
    names = {base.__name__ for base in kind.__mro__}
    parts: Any = module
    if "LayerNorm" in names and "2d" not in kind.__name__:
        norm = Norm(module, True, True, float(parts.eps), parts.weight, parts.bias)
    elif names & {"RmsNorm", "RmsNormFp32", "RMSNorm"} and hasattr(module, "eps"):
        norm = Norm(module, False, True, _rms_eps(parts), parts.weight)
    else:
        raise UnsupportedModelError(
            f"{where} is a {kind.__name__}, a norm this library cannot differentiate: "
            "LayerNorm, RMSNorm and Identity are known"
        )
    try:
        keeps = _keeps_to_formula(norm)
    except RuntimeError as error:  # such as OpenAI's, which make float32 of any input, with other weights
        raise UnsupportedModelError(
            f"{where} is a {kind.__name__} that cannot be run in the dtype of its weights: {error}"
        ) from error
    if not keeps:
        raise UnsupportedModelError(
            f"{where} is a {kind.__name__} that computes something else than LayerNorm and RMSNorm do"
        )
    return norm


def _rms_eps(module: Any) -> float:
    """The eps of an RMSNorm; unset, torch takes the smallest step of the dtype it computes in."""
    if module.eps is not None:
        return float(module.eps)
    double = module.weight is not None and module.weight.dtype == torch.float64
    return torch.finfo(torch.float64 if double else torch.float32).eps


@torch.no_grad()
def _keeps_to_formula(norm: Norm) -> bool:
    """Whether the module gives `x_hat * weight + bias` on noise; held anew in float64 when a model is
    wrapped.
    """
    parts: Any = norm.module
    like = torch.empty(0) if norm.weight is None else norm.weight
    width = parts.normalized_shape[-1] if norm.weight is None else len(norm.weight)
    noise = torch.randn(4, width, generator=torch.Generator().manual_seed(0))
    stream = (1 + noise).to(like)
    expected = norm.affine(norm.standardise(stream)[0])
    tolerance = 1e-4 if like.dtype in (torch.float32, torch.float64) else 5e-2
    return bool((norm(stream) - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(1.0))


# -- attention, MLP, readout ---------------------------------------------------------------------

Turn = Callable[[Float[Tensor, "batch head token d_head"], Sequence[int]], Tensor]
"""What turns queries and keys by their place: `(x, heads) -> x`; `x` holds the first tokens, of these
heads.
"""

Added = Callable[[Sequence[int]], Float[Tensor, "head query key"]]
"""What is added to the scores of these heads before the softmax: a relative bias, a mask."""


@dataclass(frozen=True, eq=False)
class Difference:
    """What makes attention differential: each head subtracts a second pattern and norms what is left.

    Queries and keys are two halves of what the head reads; it writes `factor * norm((A1 - share A2) V)`.
    Ye et al. 2024, "Differential Transformer", arXiv:2410.05258.

    Attributes:
        share: gives how much of the second pattern is taken off, a number, from the weights as they are.
        norm: of each head's output, over its width.
        factor: of that.
    """

    share: Callable[[], Tensor]
    norm: Norm
    factor: float

    def of(self, first: Tensor, second: Tensor) -> Tensor:
        """What is left of one thing when the share of another is taken off."""
        return first - self.share().to(first) * second


@dataclass(frozen=True, eq=False)
class Latents:
    """Learned tokens whose queries gather the stream.

    Attributes:
        tokens: `(latent, width)`, or one image of them, `(1, latent, width)`: the module's own tensor, as a
            view of it would be a tensor of its own in a copy.
        query: from them, normed, to all heads' queries; None where they are these queries.
        norm: of them, or None.
    """

    tokens: Float[Tensor, "*image latent width"]
    query: Linear | None = None
    norm: Norm | None = None

    def __call__(self) -> Float[Tensor, "latent head*d_head"]:
        tokens = self.tokens.flatten(0, -2)
        tokens = tokens if self.norm is None else self.norm(tokens)
        return tokens if self.query is None else self.query(tokens)


@dataclass(frozen=True, eq=False)
class Attention:
    """What multi-head self-attention is made of.

    Attributes:
        heads: how many.
        query: from the normed stream to all heads' queries, `(head * d_head, d_model)`; None where queries
            are `latents`.
        key: likewise to keys.
        value: likewise to values.
        out: from all heads' outputs to the stream, `(d_model, head * d_head)`.
        scale: of the products of queries and keys.
        packed: all projections one below the other, where one tensor holds them: one product, not three.
        query_norm: of each query over `d_head`, or None.
        key_norm: of each key, or None.
        turn: what turns queries and keys after that (rotary positions), or None.
        added: what is added to the scores (relative positions), or None.
        gate: from the normed stream to what, through a sigmoid, multiplies all heads' outputs, or None.
        difference: what makes it differential, or None.
        across: the norm of all heads' outputs joined, before `out`, or None; with it every head writes by the
            scale of all.
        derived: what has been computed from weights, by `turn` and `added` too; forgotten with the stage.
        latents: learned queries, the same for all images, or None.
        resize: tells the module how many heads it has, once its projections are of so many; None where it
            can have no other number than it was built for.
    """

    heads: int
    query: Linear | None
    key: Linear
    value: Linear
    out: Linear
    scale: float
    packed: Linear | None = None
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    turn: Turn | None = None
    added: Added | None = None
    gate: Linear | None = None
    difference: Difference | None = None
    across: Norm | None = None
    derived: Derived = field(default_factory=Derived)
    latents: Latents | None = None
    resize: Callable[[int], None] | None = None

    @classmethod
    def of_packed(cls, heads: int, packed: Linear, out: Linear, scale: float, **others: Any) -> Attention:
        """That whose projections are one tensor, `(3 * head * d_head, d_model)`: queries, keys, values."""
        query, key, value = (packed.part(number, 3) for number in range(3))
        return cls(heads, query, key, value, out, scale, packed, **others)

    @property
    def ports(self) -> dict[str, Linear]:
        """The projections of what heads read of the stream, by the names of these inputs, in the order of the
        reads.
        """
        named = {"q": self.query, "k": self.key, "v": self.value, "g": self.gate}
        return {name: linear for name, linear in named.items() if linear is not None}

    @property
    def weights(self) -> tuple[Tensor | None, ...]:
        """The tensors that its projections are made of."""
        return tuple(tensor for port in self.ports.values() for tensor in port.tensors)

    def with_rules(self, rules: BackwardRules) -> Attention:
        """The same with norms that are differentiated by the rules."""
        norms = self.query_norm, self.key_norm, self.across
        query, key, across = (norm and norm.with_rules(rules) for norm in norms)
        less = self.difference
        less = less and replace(less, norm=less.norm.with_rules(rules))
        return replace(self, query_norm=query, key_norm=key, across=across, difference=less)


@dataclass(frozen=True, eq=False)
class MLP:
    """A module that is applied to each token, and the names of its own parts, where these are known.

    Attributes:
        module: gives the output; its biases belong to it.
        known: whether the names below are all there is to say of it: without it, no rules.
        act: the name of the activation.
        gates: names of the projections whose outputs are multiplied, if it is gated.
        norm: the name of a norm between, if there is one.
        out: the name of the linear layer that comes last; or of what has a part of one as `linear`.
    """

    module: nn.Module
    known: bool = False
    act: str | None = None
    gates: tuple[str, ...] = ()
    norm: str | None = None
    out: str | None = None

    def __call__(self, normed: Tensor) -> Tensor:
        return self.module(normed)  # type: ignore[no-any-return]

    def hidden(self) -> tuple[Callable[[Tensor], Tensor], Linear] | None:
        """What comes before the last linear layer, as a function, and that layer; None where it is not
        known.
        """
        if self.out is None:
            return None
        last = self.module.get_submodule(self.out)
        linear = Linear.of(last) if type(last) is nn.Linear else getattr(last, "linear", None)
        if not isinstance(linear, Linear):
            return None
        return with_children(self.module, **{self.out: nn.Identity()}), linear

    def with_rules(self, rules: BackwardRules) -> MLP:
        """The same, with activation, product and norm differentiated by the rules.

        Raises:
            UnsupportedModelError: if its parts are not known, so that the rules would pass over them.
        """
        changes_parts = rules.identity_activation or rules.gate_share != 1.0 or rules.frozen_norms
        if changes_parts and not self.known:
            kind = type(self.module)
            raise UnsupportedModelError(
                f"{kind.__module__}.{kind.__name__} is an MLP whose activation and gates are not known, so "
                "that backward rules cannot be applied to it: use a method without, such as 'eap' or 'local'"
            )
        changed: dict[str, nn.Module] = {}
        if rules.identity_activation and self.act is not None:
            changed[self.act] = IdentityRule(self.module.get_submodule(self.act))
        if rules.gate_share != 1.0:
            changed |= {
                name: Damped(self.module.get_submodule(name), rules.gate_share) for name in self.gates
            }
        if rules.frozen_norms and self.norm is not None:
            inner = norm_of(self.module.get_submodule(self.norm), self.norm).with_rules(rules)
            changed[self.norm] = NormModule(inner)
        return replace(self, module=with_children(self.module, **changed)) if changed else self


@dataclass(frozen=True, eq=False)
class Readout:
    """Final norm, pooling, a second norm, and classifiers whose logits are averaged.

    Attributes:
        norm: of the stream.
        pool: `(batch, token, d_model)` to one vector for each classifier, `(batch, classifier, width)`.
        after: the norm of the pooled vectors.
        heads: the classifiers; a `Linear` where the module keeps a weight alone, an `nn.Identity` where the
            pooled vector is the output, several maps that follow each other.
        names: of the classifiers, for messages and shares.
    """

    norm: Norm
    pool: Callable[[Tensor], Tensor]
    after: Norm
    heads: tuple[nn.Module | Linear | Chain, ...]
    names: tuple[str, ...] = ("head",)

    def __call__(self, stream: Tensor) -> Float[Tensor, "batch classes"]:
        pooled = self.after(self.pool(self.norm(stream)))
        return torch.stack([head(pooled[:, place]) for place, head in enumerate(self.heads)]).mean(dim=0)

    @property
    def maps(self) -> tuple[nn.Module | Linear, ...]:
        """All that the classifiers are made of, one after the other."""
        return tuple(each for head in self.heads for each in (head if isinstance(head, Chain) else (head,)))

    def with_rules(self, rules: BackwardRules) -> Readout:
        """The same with norms that are differentiated by the rules, those of cosines among them."""
        heads = tuple(_ruled(head, rules) for head in self.heads)
        norms = self.norm.with_rules(rules), self.after.with_rules(rules)
        return replace(self, norm=norms[0], after=norms[1], heads=heads)

    def affine(
        self, stream: Float[Tensor, "image token d_model"], of: Float[Tensor, "image class"]
    ) -> tuple[Float[Tensor, "image token d_model"], dict[str, Float[Tensor, " image"]]]:
        """A weighted sum of logits as an affine function of the stream, at the scale that this run gave the
        norms.

        With the scale held, every step from the stream to the logits is affine: LayerNorm's centring is
        linear, average pooling is, and maximum pooling picks the same tokens. This is the usual convention
        of direct logit attribution (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits").

        Args:
            stream: what the readout read in that run.
            of: which logits to sum, such as +1 at the target and -1 at the foil.

        Returns:
            Weights in logits per unit of the stream; and what the stream has no part in, by name, in logits.

        Raises:
            UnsupportedModelError: if a classifier is not linear.
        """
        constants: dict[str, Tensor] = {}
        share = of / len(self.heads)
        normed = self.norm(stream).detach().requires_grad_()
        with torch.enable_grad():
            pooled = self.pool(normed)
        read = self.after(pooled.detach())
        direction = torch.stack(
            [
                self._through(head, name, share, constants, read[:, place])
                for place, (head, name) in enumerate(zip(self.heads, self.names, strict=True))
            ],
            dim=1,
        )
        if self.after.bias is not None:
            constants["fc_norm.bias"] = (direction @ self.after.bias).sum(dim=1)
        _, inverse = self.after.standardise(pooled.detach())
        # Token, average and maximum pooling are homogeneous: their gradient times the input is their output.
        (at_tokens,) = torch.autograd.grad(pooled, normed, self.after.fold(direction) * inverse)
        if self.norm.bias is not None:
            constants["norm.bias"] = (at_tokens * self.norm.bias).sum(dim=(1, 2))
        _, inverse = self.norm.standardise(stream)
        return self.norm.fold(at_tokens) * inverse, constants

    @staticmethod
    def _through(
        head: nn.Module | Linear | Chain, name: str, of: Tensor, constants: dict[str, Tensor], read: Tensor
    ) -> Tensor:
        """The weights `(image, width)` at a classifier's input, where it has read this."""
        if isinstance(head, nn.Identity):
            return of
        if isinstance(head, (nn.Sequential, Chain)):
            given = [read]
            for each in list(head)[:-1]:
                given.append(each(given[-1]))
            for place, each in reversed(list(enumerate(head))):
                of = Readout._through(each, f"{name}.{place}", of, constants, given[place])
            return of
        if not isinstance(head, (nn.Linear, Linear, Cosine)):
            raise UnsupportedModelError(
                f"{name} is a {type(head).__name__}: only a linear classifier has shares"
            )
        if head.bias is not None:
            constants[f"{name}.bias"] = of @ head.bias
        direction: Tensor = of @ head.weight
        return direction * head.scale / head.length(read) if isinstance(head, Cosine) else direction


def _ruled(head: nn.Module | Linear | Chain, rules: BackwardRules) -> nn.Module | Linear | Chain:
    """A classifier, differentiated by the rules: only cosines have something that they change."""
    if isinstance(head, Chain):
        return Chain(tuple(each.with_rules(rules) if isinstance(each, Cosine) else each for each in head))
    return head.with_rules(rules) if isinstance(head, Cosine) else head

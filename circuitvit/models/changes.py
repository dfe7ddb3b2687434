"""What a site of a model becomes: a number, a tensor, a function, or one of the ways of changing that are
here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitvit.errors import OptionError, check_number
from circuitvit.models.functions import check_answers, check_call, takes_two
from circuitvit.models.sites import LOOKS, Site
from circuitvit.models.tokens import Chosen, TokenSpec


@dataclass(frozen=True)
class At:
    """Where an edit's function is called.

    Attributes:
        site: the name of what is changed, such as `m2.hidden`.
        kinds: of the tokens (queries), which may be the first of an image's alone: "cls", "reg", "patch", ...
        keys: of the keys, where it is a pattern or scores.
        mask: what is changed of it, True where it is, broadcast to its shape; the rest stays in any case.
    """

    site: str
    kinds: tuple[str, ...]
    keys: tuple[str, ...]
    mask: Bool[Tensor, "..."]


Function = Callable[..., Tensor]
Value = float | int | Tensor | Function
"""What a site becomes: a number; a tensor, `(width,)`, `(token, width)` or `(image, token, width)`; or a
function of what is there, a batch `(image, token, width)`, and of `At`."""


# -- ways of changing ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Add:
    """Adds a direction, see `add`."""

    direction: Tensor
    scale: float = 1.0
    tokens: TokenSpec = None

    def __call__(self, x: Tensor, at: At) -> Tensor:
        added: Tensor = self.scale * _fitted(self.direction.to(x), x, at)
        return x + added


@dataclass(frozen=True, eq=False)
class Clamp:
    """Holds the coordinate along a direction within bounds, see `clamp`."""

    direction: Tensor
    low: float | None = None
    high: float | None = None
    tokens: TokenSpec = None

    def __call__(self, x: Tensor, at: At) -> Tensor:
        unit = _fitted(self.direction.to(x), x, at)
        unit = unit / unit.norm(dim=-1, keepdim=True)
        along = (x * unit).sum(dim=-1, keepdim=True)
        moved: Tensor = (along.clamp(self.low, self.high) - along) * unit
        return x + moved


@dataclass(frozen=True)
class Causal:
    """Lets tokens attend to those before them alone, see `causal`."""

    prefix: str = "last"
    tokens: TokenSpec = None

    def __call__(self, x: Tensor, at: At) -> Tensor:
        rank = torch.arange(len(at.keys), device=x.device)
        if self.prefix == "last":
            before = torch.tensor([kind != "patch" for kind in at.keys], device=x.device)
            rank = rank + len(at.keys) * before
        return renormalised(x, rank[None, :] <= rank[: x.shape[-2], None])


@dataclass(frozen=True)
class KnockOut:
    """Takes attention away and shares it out among the rest, see `knock_out`."""

    tokens: TokenSpec = None

    def __call__(self, x: Tensor, at: At) -> Tensor:
        return renormalised(x, ~at.mask.to(x.device))


OURS = (Add, Clamp, Causal, KnockOut)
"""What looks at one query at a time, so that the others may be left out of a run."""


def add(direction: Tensor, scale: float = 1.0, tokens: TokenSpec = None) -> Add:
    """Add a direction to what is there: steering.

    Args:
        direction: `(width,)`; or `(token, width)` or `(image, token, width)`.
        scale: its factor.
        tokens: where; everywhere by default.

    Raises:
        OptionError: if it is no direction.

    Example:
        >>> import torch
        >>> import circuitvit as cv
        >>> cv.load("catdog-tiny").edit({"resid1": cv.add(torch.ones(64), scale=4, tokens="cls")})
        Model(catdog-tiny, edited (resid1): 8 stages, 479 edges, input 3x48x48, 4 classes)
    """
    check_number("scale", scale, -float("inf"))
    return Add(_direction(direction), float(scale), tokens)


def clamp(
    direction: Tensor, low: float | None = None, high: float | None = None, tokens: TokenSpec = None
) -> Clamp:
    """Hold the coordinate along a direction within bounds; with both 0, take the direction out.

    Args:
        direction: `(width,)`, of any length; the coordinate is along the unit vector.
        low: the least; None for no bound.
        high: the greatest; None for no bound.
        tokens: where; everywhere by default.

    Raises:
        OptionError: if it is no direction, or there is no bound, or no number between them.
    """
    if low is None and high is None:
        raise OptionError("a clamp without bounds changes nothing: give low=, high= or both")
    for name, bound in (("low", low), ("high", high)):
        if bound is not None:
            check_number(f"{name} of a clamp", bound, -math.inf)
    if low is not None and high is not None and low > high:
        raise OptionError(f"the lower bound {low:g} is above the upper one {high:g}")
    found = _direction(direction)
    if not bool(found.norm(dim=-1).all()):
        raise OptionError("the direction is 0, along which there is no coordinate")
    return Clamp(found, low, high, tokens)


def causal(prefix: str = "last") -> Causal:
    """For patterns: tokens attend to themselves and to those before them, among which attention is shared
    out.

    Args:
        prefix: where class token and registers stand in the order: "last", so that patches see earlier
            patches alone and the class token sees all; or "first", as they lie, so that it sees itself alone.

    Raises:
        OptionError: for another order.
    """
    if prefix not in ("first", "last"):
        raise OptionError(f"prefix is 'first' or 'last', not {prefix!r}")
    return Causal(prefix)


def knock_out() -> KnockOut:
    """For patterns: none of the attention named after @ is paid, and it is shared out among what is left.

    Where nothing is left the head writes nothing there. A plain 0 instead does not share it out.

    Example:
        >>> import circuitvit as cv
        >>> model = cv.load("catdog-tiny")
        >>> edited = model.edit({"a1.*.pattern@patch->cls": cv.knock_out()})
    """
    return KnockOut()


def renormalised(pattern: Float[Tensor, "*head query key"], keep: Bool[Tensor, "..."]) -> Tensor:
    """A pattern with some of its attention taken away and the rest scaled to what all of it was."""
    kept = pattern * keep.to(pattern.dtype)
    left = kept.sum(dim=-1, keepdim=True)
    whole = pattern.sum(dim=-1, keepdim=True)
    return kept * torch.where(left == 0, torch.zeros_like(left), whole / torch.where(left == 0, 1.0, left))


def _direction(direction: Any) -> Tensor:
    found = torch.as_tensor(direction) if isinstance(direction, np.ndarray) else direction
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.ndim not in (1, 2, 3):
        raise OptionError(
            "a direction is a tensor of floating-point numbers, (width,), (token, width) or "
            "(image, token, width)"
        )
    if not bool(found.detach().isfinite().all()):
        raise OptionError("the direction holds NaN or infinite values")
    return found if found.requires_grad else found.clone()


def _fitted(value: Tensor, x: Tensor, at: At) -> Tensor:
    """A tensor of an edit, for a batch `(image, token, width)` that may have the first tokens alone.

    Raises:
        OptionError: if it has other tokens or images, or is of another width.
    """
    if value.ndim == 3:
        value = _for_images(value, len(x), at.site)
    if value.ndim >= 2 and value.shape[-2] not in (1, x.shape[-2]):
        value = value[..., : x.shape[-2], :]
    try:
        np.broadcast_shapes(tuple(value.shape), tuple(x.shape))
    except ValueError:
        raise OptionError(
            f"{at.site} is {tuple(x.shape[1:])} for each image, and its edit {tuple(value.shape)}"
        ) from None
    return value


def _for_images(value: Tensor, count: int, site: str) -> Tensor:
    """Of values for each image those of a batch, which may have several candidates for the same images.

    Raises:
        OptionError: if they are for another number of images.
    """
    if len(value) in (1, count):
        return value
    if count % len(value):
        raise OptionError(
            f"the edit of {site} is for {len(value)} images, and {count} are run at once: give a value for "
            "all images, or run these images together"
        )
    return value.repeat(count // len(value), *(1,) * (value.ndim - 1))


# -- one change ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Change:
    """One site, and what becomes of it.

    Attributes:
        site: of the model without edits.
        value: a number, a tensor or a function.
        rows: the tokens (queries) that are changed.
        columns: the keys that are changed, of scores and patterns.
        kinds: of all tokens, and of all keys.
        number: of the neuron (coordinate, class) that is changed alone; None for all.
        base: of values that are known to be those of certain base images, the fingerprint of these.
    """

    site: Site
    value: Value
    rows: Chosen = field(default_factory=Chosen)
    columns: Chosen = field(default_factory=Chosen)
    kinds: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    number: int | None = None
    base: str = ""

    @property
    def name(self) -> str:
        """The site, and the neuron in brackets where one is changed alone."""
        return self.site.called(self.number)

    def __deepcopy__(self, memo: dict[int, Any]) -> Change:
        return self  # nothing of it is ever changed

    def __getstate__(self) -> dict[str, Any]:
        name = getattr(self.value, "__qualname__", "")
        if "<lambda>" in name or "<locals>" in name:
            raise OptionError(
                f"the function for {self.name} cannot be pickled, nor can the model: write it with "
                "def in a module of its own"
            )
        return vars(self)

    @property
    def tensor(self) -> Tensor | None:
        """The value or the direction, where it is a tensor."""
        value = self.value.direction if isinstance(self.value, (Add, Clamp)) else self.value
        return value if isinstance(value, Tensor) else None

    @property
    def images(self) -> int | None:
        """The number of images that it is for; None for any."""
        own, value = [self.rows.images, self.columns.images], self.tensor
        if value is not None and value.ndim == len(self.site.shape) + 1 and len(value) > 1:
            own.append(len(value))
        return next((count for count in own if count is not None), None)

    @property
    def is_bound(self) -> bool:
        """Whether it holds for images of the model's own size alone."""
        value = self.tensor
        placed = value is not None and value.ndim >= 2 and self.site.kind != "logits"
        added = self.rows.mask is not None and self.constant is not None  # to each token its own
        return placed or added or self.rows.is_bound or self.columns.is_bound

    @property
    def sees_all(self) -> bool:
        """Whether it may look at any token, so that none can be left out of a run."""
        return callable(self.value) and not isinstance(self.value, OURS)

    @cached_property
    def _is_told_where(self) -> bool:
        """Whether its function is given `at` too."""
        return callable(self.value) and takes_two(self.value)

    @property
    def constant(self) -> Tensor | None:
        """What it adds to the stream whatever is there, `(d_model,)` or `(token, d_model)`; else None."""
        value = self.value
        fixed = isinstance(value, Add) and self.images is None and self.number is None
        if self.site.kind != "stream" or not isinstance(value, Add) or not fixed:
            return None
        mask = self.rows.of(self.kinds[0])
        added = value.scale * value.direction
        return added if mask is None else added * mask[:, None].to(added)

    def __call__(self, x: Tensor) -> Tensor:
        """What becomes of `(image, token, width)`, `(image, query, key)` or `(image, class)`."""
        if self.number is None:
            return self._checked(x)
        before, own, after = x.tensor_split((self.number, self.number + 1), dim=-1)
        return torch.cat([before, self._checked(own), after], dim=-1)

    def _checked(self, x: Tensor) -> Tensor:
        changed = self._changed(x)
        if self.sees_all and self._is_bad(changed) and not self._is_bad(x):
            raise OptionError(f"the function for {self.name} gave NaN or infinite numbers")
        return changed

    def _changed(self, x: Tensor) -> Tensor:
        at = self._at(x)
        made = self._made(x, at)
        if self.site.kind == "logits" or isinstance(self.value, KnockOut):
            return made
        return torch.where(at.mask.to(x.device), made, x)

    def _at(self, x: Tensor) -> At:
        if self.site.kind == "logits":
            return At(self.name, (), (), torch.ones(1, dtype=torch.bool))
        kinds, keys = (self._present(*pair) for pair in zip(self.kinds, x.shape[1:], strict=True))
        keys = keys if self.site.kind in LOOKS else ()
        return At(self.name, kinds, keys, self._mask(kinds, keys, len(x)))

    def check_function(self, like: Tensor) -> None:
        """Try its function on random numbers, see `circuitvit.models.functions.check_answers`.

        Args:
            like: of the model's kind of numbers.

        Raises:
            OptionError: if it gives something else each time, mixes images, or stops gradients.
        """
        *before, width = self.site.shape
        shape = (2, *before, width if self.number is None else 1)
        draws = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(like)
        check_answers(lambda x: self._made(x, self._at(x)), self.name, draws)

    def _is_bad(self, x: Tensor) -> bool:
        """Whether there is NaN in it, or infinity; scores are minus infinity where nothing may be seen."""
        return bool((x.isnan() if self.site.kind == "scores" else ~x.isfinite()).any())

    def _present(self, kinds: tuple[str, ...], count: int) -> tuple[str, ...]:
        """The kinds of the tokens that are there: the first ones, or of a larger image more patches."""
        more = kinds[-1:] * (count - len(kinds))
        return (*kinds, *more)[:count]

    def _mask(self, kinds: Sequence[str], keys: Sequence[str], images: int) -> Tensor:
        """What is changed, `(image or 1, token, key or 1)`."""
        mask = torch.ones(1, len(kinds), 1, dtype=torch.bool)
        for own, present, axis in ((self.rows, kinds, -1), (self.columns, keys, -2)):
            if present and (part := own.of(present)) is not None:
                part = _for_images(part, images, self.name) if part.ndim == 2 else part[None]
                mask = mask & part.unsqueeze(axis)
        return mask

    def _made(self, x: Tensor, at: At) -> Tensor:
        value = self.value
        if isinstance(value, Tensor):
            return self._placed(value.to(x), x, at)
        if not callable(value):
            return torch.full_like(x, float(value))
        with torch.set_grad_enabled(torch.is_grad_enabled()):  # whatever the function does to the mode
            made: Any = value(x.clone(), at) if self._is_told_where else value(x.clone())
        if not isinstance(made, Tensor) or made.shape != x.shape:
            gave = f"a tensor of {tuple(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
            raise OptionError(
                f"the function for {self.name} gave {gave} for {tuple(x.shape)}: it returns what the "
                "activation becomes, in the same shape"
            )
        return made.to(x)

    def _placed(self, value: Tensor, x: Tensor, at: At) -> Tensor:
        """A tensor in the shape of `x`, where it may be of the changed tokens and keys alone."""
        if self.site.kind == "logits":
            return value.expand_as(x) if value.ndim == 1 else _for_images(value, len(x), at.site).expand_as(x)
        for own, kinds, axis in ((self.rows, self.kinds[0], -2), (self.columns, self.kinds[1], -1)):
            mask = own.of(kinds) if axis == -2 or self.site.kind in LOOKS else None
            if mask is None or mask.ndim == 2 or value.ndim < -axis:
                continue
            places = mask.nonzero().flatten().to(value.device)
            if value.shape[axis] == len(places) != len(kinds) and len(places) > 1:
                spread = value.new_zeros(
                    *value.shape[:axis], len(kinds), *value.shape[value.ndim + axis + 1 :]
                )
                value = spread.index_copy(value.ndim + axis, places, value)
        if self.site.kind in LOOKS and value.ndim and value.shape[-1] > x.shape[-1]:
            value = value[..., : x.shape[-1]]
        return _fitted(value, x, at).expand_as(x)


def check_value(site: Site, value: Any) -> Value:
    """A value of an edit, copied.

    Raises:
        OptionError: if it is none, or of a shape that the site has not.
    """
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        value = torch.as_tensor(value)
    if isinstance(value, Tensor):
        known = value.detach().isfinite()
        known = known | (value.detach() == -math.inf) if site.kind == "scores" else known
        if value.is_complex() or not value.numel():
            raise OptionError(
                f"the value for {site.name} holds no real numbers: {value.dtype}, {tuple(value.shape)}"
            )
        if not bool(known.all()):
            raise OptionError(f"the value for {site.name} holds NaN or infinite numbers")
        wide = len(site.shape) + 1
        last = value.shape[-1] if value.ndim else 1
        if value.ndim > wide or (last not in (1, site.shape[-1]) and site.kind not in LOOKS):
            raise OptionError(
                f"{site.name} is {site.shape} ({', '.join(site.axes)}) for each image, and the value is "
                f"{tuple(value.shape)}"
            )
        return value if value.requires_grad else value.clone()
    if isinstance(value, Real) and not isinstance(value, bool):
        number = float(value)
        if not math.isfinite(number) and (site.kind != "scores" or number != -math.inf):
            raise OptionError(f"the value for {site.name} is {number}")
        return number
    if isinstance(value, bool) or not callable(value):
        raise OptionError(f"{site.name} becomes a number, a tensor or a function, not {type(value).__name__}")
    if value in (add, clamp, causal, knock_out):
        raise OptionError(f"call it: {site.name} becomes cv.{value.__name__}(...)")
    if isinstance(value, (Add, Clamp)) and (
        site.kind in LOOKS or value.direction.shape[-1] != site.shape[-1]
    ):
        raise OptionError(
            f"{site.name} is {site.shape} ({', '.join(site.axes)}) for each image, and the direction has "
            f"{value.direction.shape[-1]} numbers"
        )
    if isinstance(value, (Causal, KnockOut)) and site.kind != "pattern":
        raise OptionError(f"{site.name} is no pattern: write, for example, a*.pattern")
    kept: Value = value
    if not isinstance(value, OURS):
        check_call(site.name, value)
    return kept

"""Units: anything in a model that has one number for each token, or for each image.

| unit | its number at a token |
| --- | --- |
| `a5.h2`, `m3`, `resid5`, `a5.h2.z`, `m3.hidden` | length of the vector there |
| `m3.hidden[17]`, `resid5[3]`, `a5.h2[3]` | one neuron, one coordinate |
| `m3.n17`, `m8.f12`, `a9.h2.f3` of a refined model | activation of the neuron, of the feature |
| `("resid5", direction)`, `("a5.h2", direction)` | product with a direction |
| `a5.h2.pattern`, `a5.h2.scores` | attention *to* the token: the class token's, or the mean after @ |
| `logits[281]`, `logits[tabby]` | a logit, one for each image |

After `@` come tokens, as in every name of a site: `m3.hidden[17]@cls`, `a5.h2.pattern@patch(2,3)->cls`. With
`*` a name stands for several units.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitvit.errors import OptionError
from circuitvit.export.maps import per_unit
from circuitvit.models import Model, Site
from circuitvit.models.sites import LOOKS, kinds_at, matching, numbered, parsed
from circuitvit.models.tokens import PATCH, chosen
from circuitvit.tasks.classes import class_index

UnitSpec = str | tuple[str, Tensor]
"""The name of a site, or one with a direction `(width,)`."""

UnitSpecs = UnitSpec | Sequence[UnitSpec] | Mapping[str, UnitSpec]
"""One unit, several, or several by names of one's own."""


_ALONG = "product with the direction"


@dataclass(frozen=True, eq=False)
class Unit:
    """One number for each token.

    Attributes:
        name: of the unit.
        site: what it is read from.
        asked: the name that its activations are asked for under.
        measure: what the number is, in words.
        kinds: of the tokens that have one; () for the logits.
        counted: which of them speak for an image.
        is_told: whether these were named after an @.
        number: of a neuron, coordinate or class.
        direction: that vectors are multiplied with, `(width,)`; None for a neuron, a length or attention.
            What a node of a refined model writes is its activation again, multiplied with its own.
    """

    name: str
    site: Site
    asked: str
    measure: str
    kinds: tuple[str, ...]
    counted: Bool[Tensor, " token"]
    is_told: bool
    number: int | None = None
    direction: Float[Tensor, " width"] | None = None

    @property
    def has_patches(self) -> bool:
        return PATCH in self.kinds

    def by_token(self, values: Tensor) -> Float[Tensor, "image token"]:
        """The numbers, of the activations that were asked for."""
        values = values.float()
        if self.site.kind == "logits":
            return values
        if self.site.kind in LOOKS:
            return values.mean(dim=1)
        if self.direction is not None:
            return values @ self.direction
        return values.norm(dim=-1) if self.number is None else values[..., 0]


def units_of(model: Model, specs: UnitSpecs, count: int, reduce: str) -> tuple[Unit, ...]:
    """The units that are meant, in order and once each.

    Args:
        model: whose.
        specs: names, directions.
        count: of tokens of the images at hand.
        reduce: "cls" takes the class token to speak for an image, all else the patches, where no token is
            named.

    Raises:
        NameNotFoundError: if there is no such site, with the nearest.
        OptionError: for tokens, neurons or directions that do not fit, and two units of one name.
    """
    named: list[tuple[str, UnitSpec]]
    if isinstance(specs, Mapping):
        named = list(specs.items())
    elif isinstance(specs, str) or _is_direction(specs):
        named = [("", specs)]
    else:
        named = [("", spec) for spec in cast(Sequence[UnitSpec], specs)]
    found: dict[str, Unit] = {}
    for name, spec in named:
        for unit in _units(model, spec, count, reduce):
            own = replace(unit, name=name) if name else unit
            if name and name in found:
                raise OptionError(f"{name!r} stands for several units: give each its own name")
            if own.name in found and _ALONG in (own.measure, found[own.name].measure):
                raise OptionError(
                    f"two units are called {own.name!r}: give names, {{'NAME': (site, direction)}}"
                )
            found.setdefault(own.name, own)
    if not found:
        raise OptionError("no units are named: model.sites() lists what there is")
    return tuple(found.values())


def _is_direction(specs: UnitSpecs) -> TypeGuard[tuple[str, Tensor]]:
    return isinstance(specs, tuple) and len(specs) == 2 and isinstance(specs[1], Tensor)


def with_class_number(model: Model, key: str) -> str:
    """The key with the class's number where it names one: "logits[tabby]"."""
    match = re.fullmatch(r"\s*logits\[(.*[^\d*].*)\]\s*", key)
    return key if match is None else f"logits[{class_index(model, match[1])}]"


def _units(model: Model, spec: UnitSpec, count: int, reduce: str) -> Iterator[Unit]:
    key, direction = (spec, None) if isinstance(spec, str) else spec
    key = with_class_number(model, key)
    name, target, source = parsed(key)
    name, number = numbered(name)
    for site in matching(model.all_sites, name):
        if direction is not None:
            direction = _checked(direction, site, number)
        if source is not None and site.kind not in LOOKS:
            raise OptionError(f"{site.name} has no keys: write {site.name}@{target}")
        one = site.called(number)
        if site.kind == "logits":
            if number is None or target is not None:
                raise OptionError("logits have no tokens, and one for each class: write logits[281]")
            yield Unit(one, site, one, "logit", (), torch.ones(1, dtype=torch.bool), False, number)
            continue
        kinds, keys = kinds_at(model, site, count)
        asked, told = one, target
        if site.kind in LOOKS:
            queries = target or ("cls" if "cls" in kinds else None)
            asked, told, kinds = one if queries is None else f"{one}@{queries}", source, keys
        counted = chosen(told or _speaking(kinds, reduce), kinds, lambda: model.grid).of(kinds)
        counted = torch.ones(len(kinds), dtype=torch.bool) if counted is None else counted
        label = one if "@" not in key else f"{one}@{key.partition('@')[2].strip()}"
        own = _own_direction(model, site) if direction is None and number is None else None
        yield Unit(
            label if direction is None else f"{label} along a direction",
            site,
            asked,
            "activation" if own is not None else _measure(site, number, direction),
            tuple(kinds),
            counted,
            told is not None,
            number,
            direction if own is None else own,
        )


def _own_direction(model: Model, site: Site) -> Float[Tensor, " width"] | None:
    """What turns what a neuron or feature writes into its activation; None where a node is none of these."""
    stage = (model.bare or model).stages[site.stage]
    if site.kind != "output":
        return None
    part = next(part for part in stage.branches if site.node in part.nodes.senders)
    direction = part.direction(site.node)
    return None if direction is None else per_unit(direction.detach()).to("cpu", torch.float32)


def _checked(direction: Tensor, site: Site, number: int | None) -> Float[Tensor, " width"]:
    if number is not None or site.kind in LOOKS or site.kind == "logits":
        raise OptionError(f"a direction is for what has a width of its own, not for {site.name}")
    width = site.shape[-1]
    if not direction.is_floating_point() or direction.shape != (width,) or not direction.isfinite().all():
        raise OptionError(
            f"a direction in {site.name} is {width} finite numbers, not a tensor of {tuple(direction.shape)}"
        )
    return direction.detach().to("cpu", torch.float32)


def _speaking(kinds: Sequence[str], reduce: str) -> str:
    """The tokens that speak for an image where none are named."""
    if reduce == "cls":
        return "cls"
    return PATCH if PATCH in kinds else kinds[0]


def _measure(site: Site, number: int | None, direction: Tensor | None) -> str:
    if site.kind in LOOKS:
        return site.unit
    if direction is not None:
        return _ALONG
    if number is not None:
        return "activation" if site.kind == "hidden" else f"coordinate, {site.unit}"
    return f"length, {site.unit}"

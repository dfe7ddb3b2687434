"""What can be taken out of a model, by which constant, and what that does to first order.

A head's z, neurons of an MLP, an MLP as a whole, or a feature of a refined model is replaced by a constant
that is the same for every token and image: its mean, or 0. So what is removed folds into weights and biases.
The mean is over the tokens that the logits depend on: in the last layer of most models the class token alone.

    s(u) = sum over tokens of (c_u - x_u) . d metric / d x_u     one backward pass for all of them

Heimersheim and Nanda 2024, "How to use and interpret activation patching", arXiv:2404.15255.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from circuitvit.engine import UnitPlace, capture, slopes_of_streams
from circuitvit.errors import OptionError, UnsupportedModelError, unknown_name
from circuitvit.models import Model, Site
from circuitvit.tasks.images import Images
from circuitvit.tasks.inputs import few
from circuitvit.views.subjects import watched_batches

Kind = Literal["heads", "neurons", "features", "MLPs"]
"""Of what may be removed."""

Constant = Literal["mean", "zero"]

Removal = Mapping[str, float | Tensor]
"""By the names of sites what they become: `model.edit(removal)`."""


class Objective(Protocol):
    """Logits of some images, and which they are, to one number for each."""

    def __call__(
        self, logits: Float[Tensor, "batch class"], rows: Int64[Tensor, " batch"]
    ) -> Float[Tensor, " batch"]: ...


_UNIT = re.compile(r".+\.[nf]\d+", re.ASCII)
"""Nodes of refined models that are neurons or features."""

AT_ONCE = 32
"""Images that are run together, unless told otherwise."""


@dataclass(frozen=True, eq=False)
class Removable:
    """The nodes of a model that may be removed, with their constants.

    Attributes:
        model: whose.
        sites: heads' z, MLPs' neurons, or outputs.
        constants: of each site, `(width,)`.
        left_out: nodes of these kinds whose output is edited already, and so stays what it is.
    """

    model: Model
    sites: tuple[Site, ...]
    constants: tuple[Float[Tensor, " width"], ...]
    left_out: tuple[str, ...] = ()

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of everything that may be removed, in the order in which the model runs it."""
        return tuple(name for site in self.sites for name in _named(site))

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The place of each name."""
        return {name: place for place, name in enumerate(self.names)}

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """What each is: a head, a neuron, a feature or an MLP."""
        return tuple(kind_of(site) for site in self.sites for _ in _named(site))

    @cached_property
    def _values(self) -> tuple[float | Tensor, ...]:
        return tuple(
            value
            for site, constant in zip(self.sites, self.constants, strict=True)
            for value in (constant.tolist() if site.kind == "hidden" else [constant])
        )

    def removal(self, names: Sequence[str]) -> Removal:
        """What some of them become."""
        return {name: self._values[self.numbers[name]] for name in names}

    def without(self, names: Sequence[str]) -> Model:
        """The model without some of them."""
        return self.model.edit(self.removal(names)) if names else self.model

    def to_first_order(
        self, model: Model, images: Images, objective: Objective, batch_size: int | None
    ) -> Float[np.ndarray, " name"]:
        """How much removing each alone changes the sum of an objective over images, to first order.

        Args:
            model: this one, or this one without some: what is removed already changes nothing.
            images: to run.
            objective: differentiable; it is given the numbers of the images too.
            batch_size: images at once.
        """
        places = [_place(model, site) for site in self.sites]
        read = {place.after for place in places if place is not None}
        total, first = np.zeros(len(self.names)), 0
        for batch in watched_batches(model, images, batch_size or AT_ONCE, "effects", False):
            rows = torch.arange(first, first + len(batch))
            total += self._of_batch(model, places, batch, partial(objective, rows=rows), read)
            first += len(batch)
        return total

    def _of_batch(
        self,
        model: Model,
        places: Sequence[UnitPlace | None],
        batch: Tensor,
        objective: Callable[[Tensor], Tensor],
        read: set[int],
    ) -> Float[np.ndarray, " name"]:
        with torch.no_grad():
            embedded = model.stages[0].write(model.stages[0].read(batch))
        run, slopes = slopes_of_streams(model, embedded, objective, read)
        found = []
        with torch.no_grad():
            for site, constant, place in zip(self.sites, self.constants, places, strict=True):
                if place is None:
                    found.append(torch.zeros(len(_named(site)), dtype=torch.float64))
                    continue
                units = place.units(model.essential, run)
                moved = constant - units
                if (
                    site.kind == "z"
                ):  # which is nowhere 0, but where a token takes no part: along time the class
                    moved = moved * (units != 0).any(dim=-1, keepdim=True)
                change = (moved * (slopes[place.after] @ place.ways[0].T)).sum(dim=(0, 1)).double().cpu()
                found.append(change if site.kind == "hidden" else change.sum(dim=0, keepdim=True))
        return torch.cat(found).numpy()


def removable(
    model: Model,
    kinds: Sequence[str],
    images: Sequence[Images],
    constant: Constant,
    batch_size: int | None,
    progress: bool,
) -> Removable:
    """Everything of some kinds that a model has, with its constants.

    Args:
        model: from `load`, `wrap` or `refine_nodes`.
        kinds: of what may be removed.
        images: to average over; all count the same.
        constant: "mean" or "zero".
        batch_size: images at once.
        progress: whether to show a bar.

    Raises:
        NameNotFoundError: for another kind or constant.
        UnsupportedModelError: if the model has nothing of these kinds, or all of it is edited already.
    """
    if constant not in get_args(Constant):
        raise unknown_name("constant", constant, get_args(Constant))
    asked = tuple(_sites(model, kinds))
    sites = tuple(site for site in asked if not _is_edited(model, site))
    left_out = tuple(dict.fromkeys(site.node for site in asked if site not in sites))
    if not sites:
        raise UnsupportedModelError(
            f"all of {model.name} that may be removed ({few(left_out)}) is edited in what it writes: give "
            "the model without these edits, or say what else may be removed with units="
        )
    if constant == "zero":
        width = [torch.zeros(site.shape[-1], device=model.device, dtype=model.dtype) for site in sites]
        return Removable(model, sites, tuple(width), left_out)
    means = _means(model, sites, images, batch_size, progress)
    return Removable(model, sites, tuple(means), left_out)


def kind_of(site: Site) -> str:
    """What a site is, for people."""
    if site.kind in ("z", "hidden"):
        return {"z": "head", "hidden": "neuron"}[site.kind]
    return "MLP" if _UNIT.fullmatch(site.node) is None else "feature"


# -- inside --------------------------------------------------------------------------------------


def _sites(model: Model, kinds: object) -> Iterator[Site]:
    asked = [kinds] if isinstance(kinds, str) else list(kinds) if isinstance(kinds, Sequence) else []
    for kind in asked:
        if kind not in get_args(Kind):
            raise unknown_name("kind of nodes", kind, get_args(Kind))
    if not asked:
        raise OptionError(f"say what may be removed: units= takes some of {', '.join(get_args(Kind))}")
    whole = {site.node for site in model.all_sites if site.kind == "hidden"}
    found = [
        site
        for site in model.all_sites
        if (site.kind == "z" and "heads" in asked)
        or (site.kind == "hidden" and "neurons" in asked)
        or (site.kind == "output" and _UNIT.fullmatch(site.node) and "features" in asked)
        or (site.kind == "output" and site.node in whole and "MLPs" in asked)
    ]
    if not found:
        raise UnsupportedModelError(
            f"{model.name} has no {' or '.join(asked)} that could be removed: model.sites() lists what it has"
        )
    yield from found


def _named(site: Site) -> list[str]:
    if site.kind != "hidden":
        return [site.name]
    return [site.called(number) for number in range(site.shape[-1])]


def _place(model: Model, site: Site) -> UnitPlace | None:
    """Where a site is in a model; None where the whole node has been removed."""
    return None if _is_edited(model, site) else UnitPlace(model, site)


def _is_edited(model: Model, site: Site) -> bool:
    """Whether what a site's node writes is something else than what it computes."""
    return any(change.site.kind == "output" and change.site.node == site.node for change in model.edits)


@torch.no_grad()
def _means(
    model: Model, sites: Sequence[Site], images: Sequence[Images], batch_size: int | None, progress: bool
) -> list[Tensor]:
    places = [UnitPlace(model, site) for site in sites]
    totals = [torch.zeros(site.shape[-1], dtype=torch.float64) for site in sites]
    counts = [0] * len(sites)
    for each in images:
        for batch in watched_batches(model, each, batch_size or AT_ONCE, "means", progress):
            run = capture(model, batch, essential=True)
            for at, place in enumerate(places):
                values = place.units(model.essential, run).double().cpu()
                totals[at] += values.sum(dim=(0, 1))
                counts[at] += values.shape[0] * values.shape[1]
    pairs = zip(totals, counts, strict=True)
    return [(total / count).to(model.device, model.dtype) for total, count in pairs]

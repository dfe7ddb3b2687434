"""How heads and neurons answer when the image is mirrored, rotated, shifted or recoloured.

Let `f_i(x)` be the map of unit `i` over the patches of image `x`, and `T` a transformation of images, which
moves patches. With `corr` the correlation over all images and patches,

| | |
| --- | --- |
| `equivariant` | `corr(f_i(T x), T f_i(x))`: the response moves along with the image |
| `invariant` | `corr(f_i(T x), f_i(x))`: it stays where it was |
| `pooled` | the correlation over images of the mean over patches, before and after |
| `matches` | `corr(f_i(T x), T f_j(x))` of two units: does `i` do here what `j` does there? |
| `control` | the same of unit `i` itself, with `f_i` taken on another image |

Two units are a *pair* when each is the other's best match, clearly better than it is its own, and better than
any match between different images: Olah et al. 2020, "Naturally Occurring Equivariance in Neural Networks",
https://distill.pub/2020/circuits/equivariance.

What a map has at a patch in every image alike says where the unit looks, and nothing of the image. It is
taken away first, unless `content=False`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from circuitvit._keywords import running
from circuitvit.engine import progress_bar
from circuitvit.errors import DataError, OptionError, unknown_name
from circuitvit.export.style import INK, MUTED
from circuitvit.graph.results import Record, Result, cells
from circuitvit.models import Model
from circuitvit.models.families.family import Grid
from circuitvit.models.sites import LOOKS, Site, kinds_at, matching
from circuitvit.models.tokens import PATCH
from circuitvit.tasks.images import Images
from circuitvit.tasks.sentences import refuse_sentences
from circuitvit.tasks.task import batches_of
from circuitvit.views.subjects import ImageSpec, images_of

if TYPE_CHECKING:
    from circuitvit.views.canvas import Picture

Move = Callable[[Tensor, tuple[int, int]], Tensor]
"""What a transformation does to the last two axes, given how high and wide a patch is."""

MOVES: Mapping[str, Move] = MappingProxyType(
    {
        "mirror": lambda each, patch: each.flip(-1),
        "flip": lambda each, patch: each.flip(-2),
        "rotate 90": lambda each, patch: torch.rot90(each, 1, (-2, -1)),
        "rotate 180": lambda each, patch: torch.rot90(each, 2, (-2, -1)),
        "shift": lambda each, patch: each.roll(patch[1], -1),
        "recolour": lambda each, patch: each,
    }
)
"""Left for right; top for bottom; a quarter turn to the left; half a turn; one patch to the right, and round
the end; and nothing, where channels go one on: what is red becomes green, green blue, blue red.
"""

FEWEST = 8
"""Images without which correlations say little."""

MARGIN = 0.1
"""By how much a unit must match its partner better than itself."""

LARGEST = 2**30
"""Bytes that the matches of all units may take."""


class Pair(NamedTuple):
    """Two units, one of which does in the transformed image what the other does in the image.

    Attributes:
        one, other: their names.
        match: `corr(f_one(T x), T f_other(x))`.
        back: the same with the two exchanged: about the same where doing `T` twice does nothing.
        own: the better of the two matches of a unit with itself.
        control: the best match of any two units of their group between different images.
    """

    one: str
    other: str
    match: float
    back: float
    own: float
    control: float


@dataclass(frozen=True, eq=False, repr=False)
class Equivariance(Result):
    """How units answer to transformations. Arrays are `(transform, unit)`, correlations, -1 to 1, float64.

    Units that do the same on all images have no correlation: NaN.

    Attributes:
        transforms: names.
        units: such as "a5.h2", "a5.h2.pattern" or "m3.hidden[17]".
        groups: which units are matched with one another: places in `units`, by the name of the group.
        equivariant, invariant, pooled, control: see the top of this module.
        matches: by group, `(transform, unit, unit)`; the first unit sees the transformed image.
        others: the same between different images.
        n_images: how many were looked at.
        content: whether what is the same in every image was taken away.
    """

    transforms: tuple[str, ...]
    units: tuple[str, ...]
    groups: Mapping[str, range]
    equivariant: Float[NDArray[np.float64], "transform unit"]
    invariant: Float[NDArray[np.float64], "transform unit"]
    pooled: Float[NDArray[np.float64], "transform unit"]
    control: Float[NDArray[np.float64], "transform unit"]
    matches: Mapping[str, Float[NDArray[np.float64], "transform _unit _unit"]]
    others: Mapping[str, Float[NDArray[np.float64], "transform _unit _unit"]]
    n_images: int
    content: bool

    along = "transforms:transform units:unit"
    may_be_nan = "equivariant invariant pooled control matches others"

    def records(self) -> Iterator[Record]:
        """One row for each `transform` and `unit`: the correlations `equivariant`, `invariant`, `pooled` and
        `control`, and that of the `best_other` unit; NaN where there is none."""
        names = ("equivariant", "invariant", "pooled", "control")
        figures = {name: getattr(self, name) for name in names}
        best = np.stack([self.best_others(name) for name in self.transforms])
        return cells({"transform": self.transforms, "unit": self.units}, **figures, best_other=best)

    def _check(self) -> None:
        for name, units in self.groups.items():
            size = (len(self.transforms), len(units), len(units))
            inside = all(0 <= end < len(self.units) for end in (*units[:1], *units[-1:]))  # it may be vast
            tables = [each.get(name) for each in (self.matches, self.others)]
            if not inside or any(each is None or each.shape != size for each in tables):
                raise OptionError(f"the matches of {name!r} are not those of its units")

    def pairs(self, transform: str, at_least: float = 0.5) -> list[Pair]:
        """Families of two, the best first; in `rotate 90` and `shift` the first is the turned, moved one.

        Args:
            transform: name.
            at_least: correlation.

        Raises:
            NameNotFoundError: if there is no such transformation.
        """
        place, found = self._place(transform), []
        for group, units in self.groups.items():
            table = np.nan_to_num(self.matches[group][place], nan=-1.0)
            null = float(np.nanmax(self.others[group][place], initial=0.0)) if self.content else 0.0
            row, column, own = table.argmax(axis=1), table.argmax(axis=0), np.diag(table)
            for one, other in enumerate(row):
                mutual = other != one and column[other] == one
                if mutual and row[other] == one and other < one:
                    continue  # said already
                least = max(at_least, null, own[one] + MARGIN, own[other] + MARGIN)
                if mutual and table[one, other] >= least:
                    numbers = (table[one, other], table[other, one], max(own[one], own[other]), null)
                    found.append(Pair(self.units[units[one]], self.units[units[other]], *map(float, numbers)))
        return sorted(found, key=lambda pair: -pair.match)

    def of(self, unit: str, transform: str) -> dict[str, float]:
        """The four correlations of one unit.

        Raises:
            NameNotFoundError: if there is no such unit or transformation.
        """
        if unit not in self.units:
            raise unknown_name("unit", unit, self.units)
        at = self._place(transform), self.units.index(unit)
        names = ("equivariant", "invariant", "pooled", "control")
        return {name: float(getattr(self, name)[at]) for name in names}

    def _place(self, transform: str) -> int:
        if transform not in self.transforms:
            raise unknown_name("transformation", transform, self.transforms)
        return self.transforms.index(transform)

    def best_others(self, transform: str) -> NDArray[np.float64]:
        """The best match of each unit with another of its group, `(unit,)`; NaN where there is none."""
        place, found = self._place(transform), np.full(len(self.units), np.nan)
        for group, units in self.groups.items():
            table = np.where(np.eye(len(units), dtype=bool), np.nan, self.matches[group][place])
            known = np.isfinite(table).any(axis=1)
            found[list(units)] = np.where(known, np.nan_to_num(table, nan=-2.0).max(axis=1), np.nan)
        return found

    def figure(self, *, at_least: float = 0.5, named: int = 4) -> Picture:
        """For each transformation a dot for each unit: how it matches itself, and how its best partner.

        Far right: the response moves along with the image. Top left: it does not, but another unit's does:
        pairs, in colour.

        Args:
            at_least: correlation of a pair.
            named: how many pairs are named.
        """
        from circuitvit.views import canvas

        across = min(3, len(self.transforms))
        with canvas.styled():
            lines = -(-len(self.transforms) // across)
            figure = canvas.blank(2.5 * across, 2.5 * lines + 0.3, f"Equivariance ({self.n_images} images)")
            for axis, transform in zip(
                canvas.panels(figure, len(self.transforms), across), self.transforms, strict=True
            ):
                own, best = self.equivariant[self._place(transform)], self.best_others(transform)
                pairs = self.pairs(transform, at_least)
                axis.scatter(own, best, s=5, color=MUTED, alpha=0.5, linewidths=0)
                for number, pair in enumerate(pairs):
                    colour = canvas.PALETTE[number % len(canvas.PALETTE)] if number < named else INK
                    ends = [self.units.index(pair.one), self.units.index(pair.other)]
                    label = f"{pair.one}, {pair.other}" if number < named else None
                    look: dict[str, Any] = {"s": 12, "zorder": 3} if label else {"s": 4, "alpha": 0.5}
                    axis.scatter(own[ends], best[ends], color=colour, linewidths=0, label=label, **look)
                axis.axline((0, 0), slope=1, color=MUTED, linewidth=0.5, linestyle=(0, (4, 3)))
                axis.set(xlim=(-1.05, 1.05), ylim=(-1.05, 1.05))
                axis.set_title(f"{transform}: {len(pairs)} pair{'s' * (len(pairs) != 1)}")
                axis.set_xlabel("match with itself", fontsize=7)
                axis.set_ylabel("best match with another", fontsize=7)
                if pairs and named:
                    axis.legend(fontsize=5.5, frameon=False, loc="lower right", handletextpad=0.1)
        return figure

    def __repr__(self) -> str:
        said = ", ".join(f"{name} {len(self.pairs(name))} pairs" for name in self.transforms)
        return f"Equivariance({len(self.units)} units, {self.n_images} images: {said})"


@running
def equivariance(
    model: Model,
    images: ImageSpec,
    transforms: str | Sequence[str] = ("mirror", "rotate 90", "rotate 180", "shift", "recolour"),
    sites: str | Sequence[str] = "*.h*",
    *,
    content: bool = True,
    batch_size: int | None = None,
    progress: bool = True,
) -> Equivariance:
    """How the responses of heads and neurons move when the image is mirrored, rotated, shifted, recoloured.

    A unit is a neuron (`"m3.hidden"`), or a head: how long what it writes is at each patch (`"a3.*"`), or
    what its patches attend to (`"a3.*.pattern"`). Units of one layer and kind are matched with one another.
    Memory holds sums: folders may be of any size.

    Args:
        model: from `load`, `wrap` or `edit`.
        images: at least 8, preprocessed, or paths.
        transforms: of "mirror", "flip" (top for bottom), "rotate 90", "rotate 180", "shift" (by a patch to
            the right, and round the end) and "recolour" (red becomes green, green blue, blue red).
        sites: names of sites, see `model.sites`; all heads by default.
        content: take away what a unit does at a patch in every image alike. Without it heads that look by
            place alone, "previous" and "next", are found as pairs, and no match between images is asked for.
        batch_size: images at once; 32 by default.
        progress: whether to show a bar.

    Raises:
        NameNotFoundError: if there is no such transformation or site.
        DataError: if there are too few images, or patches are not square where they are rotated.
        OptionError: if a site has no map over patches, or there are too many units to match.

    Example:
        >>> import circuitvit as cv
        >>> mirror = cv.compiled("mirror")
        >>> found = equivariance(mirror.model, mirror.factors(32)[0], "mirror", progress=False)
        >>> [(pair.one, pair.other) for pair in found.pairs("mirror")]
        [('a0.h0', 'a0.h1'), ('a1.h0', 'a1.h1')]
    """
    names = (transforms,) if isinstance(transforms, str) else tuple(transforms)
    for name in names:
        if name not in MOVES:
            raise unknown_name("transformation", name, MOVES)
    if not names:
        raise OptionError(f"no transformation is named: there are {', '.join(MOVES)}")
    refuse_sentences(model.preprocessing, "equivariance is under moves of pictures")
    found = images_of(model, images)
    if len(found) < FEWEST:
        raise DataError(f"correlations over {len(found)} images say little: give at least {FEWEST}")
    grid = model.grid_at(*found.shape[-2:])
    _check_moves(names, found, grid)
    groups = _groups(model, [sites] if isinstance(sites, str) else list(sites))
    runs = _Runs(model, groups, grid, model.tokens_at(*found.shape[-2:]))
    sums = {(group, name): _Three() for group in groups for name in names}
    before: dict[str, Tensor] = {}
    with progress_bar(len(found), "equivariance", progress, unit=model.preprocessing.what) as bar:
        for batch in batches_of(model, found, batch_size):
            ahead = {group: maps[-1:] for group, maps in before.items()}
            before = runs.maps(batch)
            for name in names:
                after = runs.maps(runs.transformed(batch, name))
                for group, maps in before.items():
                    stayed = torch.cat([ahead[group], maps]) if ahead else maps
                    sums[group, name].add(stayed, runs.moved(stayed, group, name), after[group])
            bar.update(len(batch))
    return _result(names, runs, sums, len(found), content)


def _check_moves(names: Sequence[str], images: Images, grid: Grid) -> None:
    """Refuse what the shape of the images does not allow.

    Raises:
        DataError: if patches cannot be turned onto patches, or there is one channel to be recoloured.
    """
    *_, height, width = images.shape
    if height % grid[-2] or width % grid[-1]:
        raise DataError(f"{grid[-2]} x {grid[-1]} patches do not tile an image of {height} x {width} pixels")
    if "rotate 90" in names and (grid[-2] != grid[-1] or height != width):
        raise DataError(f"an image of {height} x {width} is not square: leave 'rotate 90' out")
    if "recolour" in names and images.shape[-3] < 2:
        raise DataError("images of one channel have no colours to exchange: leave 'recolour' out")


# -- the maps of units ---------------------------------------------------------------------------


def _groups(model: Model, wanted: Sequence[str]) -> dict[str, list[Site]]:
    """The sites whose units are matched with one another: neurons of an MLP; heads of a layer, by kind.

    Raises:
        OptionError: if no site has a map over patches, or there are too many units.
    """
    found: dict[str, list[Site]] = {}
    for site in dict.fromkeys(site for name in wanted for site in matching(model.all_sites, name)):
        kinds = kinds_at(model, site, model.n_tokens)
        if site.kind != "logits" and PATCH in kinds[0] and (site.kind not in LOOKS or PATCH in kinds[1]):
            layer = model.stages[site.stage].nodes.block
            group = site.name if site.kind in ("hidden", "stream") else f"{layer} {site.kind}"
            found.setdefault(group, []).append(site)
    if not found:
        raise OptionError(f"{', '.join(wanted)}: none of it has a map over patches; try 'm1.hidden'")
    units = [sum(_n_units(site) for site in sites) for sites in found.values()]
    needed = 2 * 8 * len(MOVES) * sum(count**2 for count in units)
    if needed > LARGEST:
        raise OptionError(
            f"to match {sum(units):,} units takes {needed / 2**30:.0f} GB: name fewer sites, or one layer"
        )
    return found


def _n_units(site: Site) -> int:
    return site.shape[-1] if site.kind == "hidden" else 1


class _Runs:
    """Maps of all units `(image, unit, place)`, by group; a place is a patch, or a pair of query and key."""

    def __init__(self, model: Model, groups: Mapping[str, Sequence[Site]], grid: Grid, count: int) -> None:
        self.model, self.groups, self.grid, self.count = model, groups, grid, count

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """On preprocessed images."""
        names = [site.name for sites in self.groups.values() for site in sites]
        seen = self.model.activations(images, names, batch_size=len(images), progress=False)
        return {
            group: torch.cat([self._of_site(site, seen[site.name].double()) for site in sites], dim=1)
            for group, sites in self.groups.items()
        }

    def _of_site(self, site: Site, values: Tensor) -> Float[Tensor, "image unit place"]:
        rows, columns = (
            torch.tensor([kind == PATCH for kind in kinds])
            for kinds in kinds_at(self.model, site, self.count)
        )
        patches = values[:, rows]
        if site.kind in LOOKS:
            return patches[:, :, columns].nan_to_num(neginf=0.0).flatten(1)[:, None]
        return patches.mT if site.kind == "hidden" else patches.norm(dim=-1)[:, None]

    def transformed(self, images: Tensor, name: str) -> Tensor:
        """The images themselves."""
        patch = images.shape[-2] // self.grid[-2], images.shape[-1] // self.grid[-1]
        if name != "recolour":
            return MOVES[name](images, patch)
        spec = self.model.preprocessing
        mean, std = images.new_tensor((spec.mean, spec.std))[:, :, None, None]
        pixels: Tensor = (images * std + mean).roll(1, dims=-3)
        return torch.sub(pixels, mean).div(std)

    def moved(self, maps: Tensor, group: str, name: str) -> Tensor:
        """Maps, moved as the patches are."""
        patches = torch.arange(prod(self.grid))
        order = MOVES[name](patches.view(self.grid), (1, 1)).flatten()
        if self.groups[group][0].kind in LOOKS:
            order = (order[:, None] * len(patches) + order).flatten()
        return maps.index_select(-1, order)


# -- correlations --------------------------------------------------------------------------------


class _Sums:
    """Sums from which the correlation of all units of one map with all, or with themselves, of another comes.

    Args:
        crossed: whether all are matched with all.
    """

    def __init__(self, crossed: bool) -> None:
        self.terms = "nip,njp->ij" if crossed else "nip,nip->i"
        self.n, self.totals = 0, [torch.zeros(())] * 5

    def add(self, one: Tensor, other: Tensor) -> None:
        """Maps `(image, unit, place)` of as many images."""
        self.n += len(one)
        more = (
            one.sum(0), other.sum(0), one.square().sum((0, 2)), other.square().sum((0, 2)),
            torch.einsum(self.terms, one, other),
        )  # fmt: skip
        self.totals = [total + each for total, each in zip(self.totals, more, strict=True)]

    def correlation(self, content: bool) -> NDArray[np.float64]:
        """`(unit, unit)` or `(unit,)`; NaN for units that do not vary."""
        one, other, one_square, other_square, product = self.totals
        if not content:  # the mean of each unit, in place of the mean at each place
            one, other = (each.mean(1, keepdim=True).expand_as(each) for each in (one, other))
        spreads = [
            _spread(square, square - each.square().sum(1) / self.n)
            for each, square in ((one, one_square), (other, other_square))
        ]
        both = torch.einsum(self.terms, one[None], other[None]) / self.n
        scale = spreads[0][:, None] * spreads[1] if product.ndim == 2 else spreads[0] * spreads[1]
        return ((product - both) / scale).numpy()


def _spread(square: Tensor, varied: Tensor) -> Tensor:
    """The root of what varies of each unit; NaN where that is rounding."""
    return varied.where(varied > 1e-10 * square.max(), torch.nan).sqrt()


class _Three:
    """The sums of one group and one transformation."""

    def __init__(self) -> None:
        self.with_moved, self.with_other, self.with_stayed, self.pooled = map(
            _Sums, (True, True, False, False)
        )

    def add(self, stayed: Tensor, moved: Tensor, after: Tensor) -> None:
        """Maps before; the same moved; and after. The first may begin with that of the image before."""
        own = len(after)
        self.with_moved.add(after, moved[-own:])
        self.with_stayed.add(after, stayed[-own:])
        self.pooled.add(*(each.mean(2, keepdim=True) for each in (after, stayed[-own:])))
        others = moved[:-1]
        if len(others):
            self.with_other.add(after[-len(others) :], others)


def _result(
    names: Sequence[str], runs: _Runs, sums: Mapping[tuple[str, str], _Three], n_images: int, content: bool
) -> Equivariance:
    units: list[str] = []
    places: dict[str, range] = {}
    for group, sites in runs.groups.items():
        named = [_unit_names(site) for site in sites]
        places[group] = range(len(units), len(units) + sum(map(len, named)))
        units += [name for each in named for name in each]
    tables = {
        what: {
            group: np.stack([getattr(sums[group, name], what).correlation(content) for name in names])
            for group in places
        }
        for what in ("with_moved", "with_other", "with_stayed", "pooled")
    }
    joined = {
        what: np.concatenate([_own(each) for each in of.values()], axis=1) for what, of in tables.items()
    }
    return Equivariance(
        transforms=tuple(names),
        units=tuple(units),
        groups=places,
        equivariant=joined["with_moved"],
        invariant=joined["with_stayed"],
        pooled=joined["pooled"],
        control=joined["with_other"],
        matches=tables["with_moved"],
        others=tables["with_other"],
        n_images=n_images,
        content=content,
    )


def _own(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each unit with itself, `(transform, unit)`."""
    return np.diagonal(table, axis1=1, axis2=2) if table.ndim == 3 else table


def _unit_names(site: Site) -> list[str]:
    return (
        [f"{site.name}[{unit}]" for unit in range(_n_units(site))] if site.kind == "hidden" else [site.name]
    )

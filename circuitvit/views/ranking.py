"""Rankings: how images, or the patches of all images, rank by one unit, and what is kept while they pass.

Of images one number each is kept; of patches the extreme ones and a sample, so that there may be any number
of them. Nothing depends on how they are cut into batches, and equal values stay in the order of the images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64
from numpy.typing import NDArray

from circuitvit.errors import DataError, OptionError, counted
from circuitvit.graph.results import Record, Result
from circuitvit.tasks import TokenGroups
from circuitvit.verification.statistics import Estimate, ratio_interval
from circuitvit.views.units import Unit

Row = str | float
"""Which images are picked: "top", "bottom", "random", or a quantile from 0 to 1."""

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
BINS = 48
SAMPLE = 100_000
"""Patches that quantiles and histograms are made of, where there are more."""
FEW = 10
"""Images that the top patches come from, below which it is said."""


@dataclass(frozen=True, eq=False, repr=False)
class Picks:
    """Images, or patches, that were picked, in order.

    Attributes:
        images: their places among all images, `(pick,)`.
        tokens: the token that the value is of, `(pick,)`; -1 where it is of several, or of
            none of the image's own.
        values: `(pick,)`.
        maps: what lies over each image, `(pick, row, column)`, of clips with time first; None where nothing
            does.
    """

    images: Int64[NDArray[np.int64], " pick"]
    tokens: Int64[NDArray[np.int64], " pick"]
    values: Float[NDArray[np.float32], " pick"]
    maps: Float[NDArray[np.float32], "pick *grid"] | None = None

    def __repr__(self) -> str:
        return f"Picks({counted(len(self), 'image')})"

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Lift:
    """What is under the top patches.

    Attributes:
        object: the name of its mask; "patch" is whatever no mask covers.
        top: share of the top patches that lie on it.
        all: share of all patches that do.
        lift: the one over the other, with an interval by resampling images.
    """

    object: str
    top: float
    all: float
    lift: Estimate


@dataclass(frozen=True, eq=False, repr=False)
class Ranking(Result):
    """How images, or patches, rank by one unit.

    Attributes:
        unit: its name.
        measure: what its values are, in words.
        values: of every image, `(image,)`.
        rows: what was picked, by "top", "bottom", "random" or quantile; each from large to small, but the
            bottom and what is random.
        quantiles: of what was ranked; of more than 100,000 patches those of a sample, but for the ends.
        counts: of the same values in even bins, `(bin,)`.
        edges: of the bins, `(bin + 1,)`.
        lifts: what is under the top patches, where masks were given.
        overlay: what the maps of the picks are: "activation", or the name of a pattern.
        caveats: what to keep in mind.
    """

    unit: str
    measure: str
    values: Float[NDArray[np.float32], " image"]
    rows: Mapping[Row, Picks]
    quantiles: Mapping[float, float]
    counts: Int64[NDArray[np.int64], " bin"]
    edges: Float[NDArray[np.float64], " bin+1"]
    lifts: tuple[Lift, ...]
    overlay: str
    caveats: tuple[str, ...]

    def records(self) -> Iterator[Record]:
        """One row for each image (its number): the `unit`, `image`, and its `value`."""
        for image, value in enumerate(self.values.tolist()):
            yield {"unit": self.unit, "image": image, "value": value}

    def _check(self) -> None:
        if not {0.0, 0.5, 1.0} <= set(self.quantiles):
            raise OptionError(f"the quantiles of {self.unit!r} lack the ends or the middle")

    def __repr__(self) -> str:
        low, middle, high = (self.quantiles[share] for share in (0.0, 0.5, 1.0))
        of = counted(len(self.values), "image")
        return f"Ranking({self.unit}: {low:.3g} to {high:.3g}, median {middle:.3g}; {of})"


class Extremes:
    """The largest, or the smallest, of a stream of values; of equal ones the first.

    Example:
        >>> best = Extremes(2)
        >>> best.add(np.array([1.0, 3.0]), 0), best.add(np.array([3.0, 2.0]), 2)
        (None, None)
        >>> best.places.tolist()
        [1, 2]
    """

    def __init__(self, count: int, largest: bool = True) -> None:
        self._count, self._sign = count, -1 if largest else 1
        self.values: NDArray[np.float32] = np.empty(0, dtype=np.float32)
        self.places: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def add(self, values: NDArray[np.float32], first: int) -> None:
        """Values, of which the first has this place among all; places only rise."""
        together = np.concatenate([self.values, values])
        places = np.concatenate([self.places, np.arange(first, first + len(values))])
        order = np.argsort(self._sign * together, kind="stable")[: self._count]
        self.values, self.places = together[order], places[order]


class Tally:
    """What is kept of one unit while images pass.

    Args:
        unit: whose.
        size: the numbers of images, and of patches in each.
        by_patch: whether patches are ranked, and not images.
        mean: whether the value of an image is the mean over its tokens, and not the largest.
        count: of picks in a row.
        best: of the patches that masks are held against.
        seed: of what is random.
    """

    def __init__(
        self, unit: Unit, size: tuple[int, int], by_patch: bool, mean: bool, count: int, best: int, seed: int
    ) -> None:
        self.unit, self.by_patch, self.mean, self.count = unit, by_patch, mean, count
        images, self.patches = size
        self.values = np.zeros(images, dtype=np.float32)
        self.tokens = np.full(images, -1, dtype=np.int64)
        self.top, self.bottom, self.best = Extremes(count), Extremes(count, largest=False), Extremes(best)
        self.random = np.random.default_rng(seed)
        self.sample, self.sampled = np.arange(images), self.values
        if by_patch:
            total = images * self.patches
            drawn = self.random.choice(total, SAMPLE, replace=False) if total > SAMPLE else np.arange(total)
            self.sample, self.sampled = np.sort(drawn), np.zeros(len(drawn), dtype=np.float32)

    def add(self, by_token: NDArray[np.float32], first: int) -> None:
        """The values of some images `(image, token)`, of which the first has this place.

        Raises:
            OptionError: for scores that are minus infinity.
        """
        if not np.isfinite(by_token).all():
            raise OptionError(
                f"{self.unit.name} is minus infinity where nothing may be looked at: rank the pattern"
            )
        counted = self.unit.counted.nonzero().flatten().numpy()
        own, here = by_token[:, counted], slice(first, first + len(by_token))
        if self.mean and len(counted) > 1:
            self.values[here] = own.mean(axis=1)
        else:
            at = own.argmax(axis=1)
            self.values[here] = own[np.arange(len(own)), at]
            self.tokens[here] = counted[at] if self.unit.kinds else -1
        ranked, start = self.values[here], first
        if self.unit.has_patches:
            flat, place = by_token[:, -self.patches :].ravel(), first * self.patches
            self.best.add(flat, place)
            if self.by_patch:
                ranked, start = flat, place
                low, high = np.searchsorted(self.sample, [place, place + len(flat)])
                self.sampled[low:high] = flat[self.sample[low:high] - place]
        self.top.add(ranked, start)
        self.bottom.add(ranked, start)

    def picked(self, rows: Sequence[Row]) -> dict[Row, Picks]:
        """What is picked in each row, without maps."""
        return {row: self._picks(*self._row(row)) for row in rows}

    def _row(self, row: Row) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        if row in ("top", "bottom"):
            found = self.top if row == "top" else self.bottom
            return found.places, found.values
        count = min(self.count, len(self.sample))
        if isinstance(row, str):
            chosen = self.random.choice(len(self.sample), count, replace=False)
        else:
            order = np.argsort(self.sampled, kind="stable")
            middle = round(row * (len(order) - 1))
            start = min(max(middle - count // 2, 0), len(order) - count)
            chosen = order[start : start + count][::-1]
        return self.sample[chosen], self.sampled[chosen]

    def _picks(self, places: NDArray[np.int64], values: NDArray[np.float32]) -> Picks:
        if not self.by_patch:
            return Picks(places, self.tokens[places], values)
        before = len(self.unit.kinds) - self.patches
        return Picks(places // self.patches, before + places % self.patches, values)

    def ranking(self, rows: Mapping[Row, Picks], groups: TokenGroups | None, overlay: str) -> Ranking:
        """What came out, once all images have passed."""
        quantiles = {share: float(np.quantile(self.sampled, share)) for share in QUANTILES}
        quantiles |= {0.0: float(self.bottom.values[0]), 1.0: float(self.top.values[0])}
        counts, edges = np.histogram(self.sampled, BINS)
        lifts = () if groups is None else tuple(self._lifts(groups))
        unit, caveats = self.unit, tuple(self._caveats(lifts))
        return Ranking(
            unit.name, unit.measure, self.values, rows, quantiles, counts, edges, lifts, overlay, caveats
        )

    def _lifts(self, groups: TokenGroups) -> Iterator[Lift]:
        images = len(self.values)
        members = np.broadcast_to(groups.members[..., -self.patches :].numpy(), (images, self.patches))
        image, patch = np.divmod(self.best.places, self.patches)
        for number, name in enumerate(groups.names):
            own = members == number
            if not own.any():
                continue  # a kind of token before the patches
            top = np.bincount(image[own[image, patch]], minlength=images)
            share, base = float(top.sum() / len(image)), float(own.mean())
            yield Lift(name, share, base, _ratio(top, own.sum(axis=1) * (len(image) / own.size)))

    def _caveats(self, lifts: Sequence[Lift]) -> Iterator[str]:
        if self.top.values[0] == self.bottom.values[0]:
            yield "all values are equal, so that the order is that of the images"
        elif more := int(
            (self.sampled == self.top.values[-1]).sum() - (self.top.values == self.top.values[-1]).sum()
        ):
            yield f"{more} more have the value of the last of the top"
        several = len(np.unique(self.best.places // self.patches)) if lifts else FEW
        if several < FEW:
            yield f"the top patches come from {several} of {len(self.values)} images"


def _ratio(top: NDArray[np.int64], every: NDArray[np.float64]) -> Estimate:
    """A lift with its interval; without one where too few images have the object, or none of the top is on
    it, which resampling could not change.
    """
    alone = Estimate(float(top.sum() / every.sum()))
    if not top.any():
        return alone
    try:
        return ratio_interval(top, every)
    except DataError:
        return alone

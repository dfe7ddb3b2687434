"""The search "which single head, at which tokens, flips the decision?"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from circuitvit.engine import Site
from circuitvit.errors import OptionError
from circuitvit.models import Model
from circuitvit.tasks import PreparedTask, Task
from circuitvit.tasks.classes import class_label
from circuitvit.verification.patching import PatchingMap, TokenSets, patching_map

SHOWN = 5


@dataclass(frozen=True)
class Flip:
    """One component whose patching changes the top class.

    Attributes:
        node: such as `a11.h1`.
        tokens: name of the token set that was patched.
        share: of pairs whose top class changes.
        becomes: the classes that they change to, most frequent first.
        value: mean metric with the patch.
        switched: share of pairs that become what the other image is seen as: the decision itself has moved.
        fewest: on a single pair, a small set of tokens that is enough, else empty.
    """

    node: str
    tokens: str
    share: float
    becomes: tuple[str, ...]
    value: float
    switched: float = 0.0
    fewest: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class FlipSearch:
    """What the search found: every flip, or that there is none, and the map that it was read from.

    Attributes:
        flips: strongest first (most pairs flipped, then the largest change of the metric).
        map: all components at all token sets.
        n: how many pairs.
        start: the classes that the model sees without a patch, most frequent first.

    Example:
        >>> search = flip_search(model, task)  # doctest: +SKIP
        >>> print(search)  # doctest: +SKIP
        No single one of 36 heads flips the decision ...
    """

    flips: tuple[Flip, ...]
    map: PatchingMap
    n: int
    start: tuple[str, ...]

    def heat_map(self, path: str | Path) -> Path:
        """Draw the map. See `PatchingMap.heat_map`."""
        return self.map.heat_map(path)

    def __str__(self) -> str:
        site, effect = self.map.site, self.map.effect
        on = "the pair" if self.n == 1 else f"any of {self.n} pairs"
        if not self.flips:
            row, column = np.unravel_index(int(np.abs(effect).argmax()), effect.shape)
            base, other = float(self.map.base.mean()), float(self.map.other.mean())
            return (
                f"None of {len(self.map.rows)} {site}, patched alone, flips the decision ({self.start[0]}) "
                f"on {on}. The strongest is {self.map.rows[row]} at {self.map.columns[column]}: "
                f"{self.map.label} goes from {base:.3g} to {base + effect[row, column]:.3g} "
                f"(the other image: {other:.3g})."
            )
        said = [
            f"{each.node} at {each.tokens} ({each.share:.0%} of pairs, to {', '.join(each.becomes[:2])}"
            + (f"; {len(each.fewest)} tokens are enough" if each.fewest else "")
            + ")"
            for each in self.flips[:SHOWN]
        ]
        more = f", and {len(self.flips) - SHOWN} more" if len(self.flips) > SHOWN else ""
        switching = [f"{each.node} at {each.tokens}" for each in self.flips if each.switched > 0]
        all_the_way = (
            f"To what the other image is seen as: {', '.join(switching)}."
            if switching
            else "None makes the model see what it sees in the other image."
        )
        return (
            f"{len(self.flips)} patches of {site} change the top class ({self.start[0]}) on {on}: "
            f"{'; '.join(said)}{more}. {all_the_way}"
        )


def flip_search(
    model: Model,
    task: Task | PreparedTask,
    *,
    site: Site = "heads",
    tokens: TokenSets = "kind",
    least: float = 0.0,
    narrow: bool = True,
    batch_size: int | None = None,
    progress: bool = True,
) -> FlipSearch:
    """Patch every head at every set of tokens and list those that change the top class.

    On a single pair each flip is then narrowed down: of the tokens in the order of their own effect the first
    1, 2, 4, ... are patched until that flips the decision: a small set that is enough, not the smallest.

    Args:
        model: from `load` or `wrap`.
        task: with corrupt images.
        site: "heads", or another of `patching_map`.
        tokens: as for `patching_map`; by default all, and each kind of token.
        least: share of pairs above which a flip is listed.
        narrow: whether to look for few tokens on a single pair: one more run for every token of each flip.
        batch_size: pairs at once.
        progress: whether to show a bar.

    Raises:
        DataError, OptionError: as `patching_map`.
    """
    if not 0 <= least < 1:
        raise OptionError(f"the share of pairs to be exceeded lies between 0 and 1, not {least!r}")
    prepared = task if isinstance(task, PreparedTask) else task.prepare(model)
    found = patching_map(model, prepared, site, tokens, batch_size=batch_size, progress=progress)
    flips = [_flip(model, found, int(row), int(column)) for row, column in np.argwhere(found.flipped > least)]
    flips.sort(key=lambda flip: (-flip.share, -abs(flip.value - float(found.base.mean()))))
    if len(prepared) == 1 and narrow:
        flips = _all_narrowed(model, prepared, flips, found, progress)
    return FlipSearch(tuple(flips), found, len(prepared), _labels(model, found.base_tops))


def _flip(model: Model, found: PatchingMap, row: int, column: int) -> Flip:
    changed = found.tops[row, column] != found.base_tops
    return Flip(
        node=found.rows[row],
        tokens=found.columns[column],
        share=float(changed.mean()),
        becomes=_labels(model, found.tops[row, column][changed]),
        value=float(found.values[row, column].mean()),
        switched=float((changed & (found.tops[row, column] == found.other_tops)).mean()),
    )


def _all_narrowed(
    model: Model, prepared: PreparedTask, flips: list[Flip], found: PatchingMap, progress: bool
) -> list[Flip]:
    """The strongest flips narrowed down; of a component's token sets only the smallest, to save runs."""
    size = {name: len(tokens) for name, tokens in zip(found.columns, found.tokens, strict=True)}
    smallest = {flip.node: flip for flip in sorted(flips, key=lambda flip: -size[flip.tokens])}
    chosen = [flip for flip in flips if smallest[flip.node] is flip][:SHOWN]
    return [_narrowed(model, prepared, flip, found, progress) if flip in chosen else flip for flip in flips]


def _narrowed(model: Model, prepared: PreparedTask, flip: Flip, found: PatchingMap, progress: bool) -> Flip:
    """The flip with a small set of tokens that is enough for it."""
    members = found.tokens[found.columns.index(flip.tokens)]
    if len(members) == 1:
        return replace(flip, fewest=(flip.tokens,))
    site = found.site
    row = [flip.node]
    single = patching_map(model, prepared, site, "each", rows=row, progress=progress)
    toward = np.sign(flip.value - float(found.base.mean())) * single.effect[0]
    order = [token for token in np.argsort(-toward, kind="stable").tolist() if token in members]
    counts = sorted({*(2**power for power in range(len(order).bit_length())), len(order)})
    grown = {str(count): order[:count] for count in counts}
    steps = patching_map(model, prepared, site, grown, rows=row, progress=progress)
    first = np.flatnonzero(steps.flipped[0] > 0)
    if not len(first):
        return flip
    return replace(flip, fewest=tuple(single.columns[token] for token in order[: counts[int(first[0])]]))


def _labels(model: Model, tops: np.ndarray) -> tuple[str, ...]:
    classes, counts = np.unique(tops, return_counts=True)
    order: Sequence[int] = np.argsort(-counts, kind="stable").tolist()
    return tuple(class_label(model, int(classes[place])) for place in order)

"""Discovery and held-out pairs: a task divided by image, so that no image is on both sides.

Pairs that share an image, clean or corrupt, hang together, also by way of other pairs, and go to one side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import networkx as nx
import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from circuitvit._keywords import running
from circuitvit.errors import DataError, check_number
from circuitvit.models import Model
from circuitvit.tasks.classes import ClassSpec
from circuitvit.tasks.groups import TokenGroups
from circuitvit.tasks.images import FileImages, Images, TensorImages
from circuitvit.tasks.inputs import fingerprint
from circuitvit.tasks.metrics import PerPair
from circuitvit.tasks.task import PreparedTask, Task, prepare


class Split(NamedTuple):
    """The two sides of a task.

    Attributes:
        discovery: pairs to find a circuit on.
        held_out: pairs to judge it on.
    """

    discovery: PreparedTask
    held_out: PreparedTask


@running
def split(model: Model, task: Task | PreparedTask, held_out: float = 0.25, *, seed: int = 0) -> Split:
    """Divide the pairs of a task at random, so that no image is on both sides.

    Images are the same when they are equal pixel by pixel after preprocessing. Both sides keep the order,
    names and classes of the pairs.

    Args:
        model: from `load` or `wrap`.
        task: of at least two pairs.
        held_out: share of the pairs to hold out, above 0 and below 1; somewhat fewer where pairs hang
            together by shared images.
        seed: of the draw.

    Raises:
        OptionError: if the share is not between 0 and 1, or the seed is negative.
        DataError: if the pairs cannot be divided, or images cannot be used.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> task = cv.Task(*catdog_pairs(8), metric=cv.logit_diff("cat", "dog"))
        >>> discovery, held_out = split(cv.load("catdog-tiny"), task, 0.25)
        >>> len(discovery), len(held_out)
        (6, 2)
    """
    prepared = prepare(model, task)
    sides = split_together(model, {"": prepared}, held_out, seed=seed)[""]
    if not prepared.code:
        return sides
    code = f"cv.split(model, {prepared.code}, {held_out!r}, seed={seed})"
    return Split(*(replace(side, code=f"{code}.{name}") for name, side in sides._asdict().items()))


@running
def split_together(
    model: Model, tasks: Mapping[str, Task | PreparedTask], held_out: float = 0.25, *, seed: int = 0
) -> dict[str, Split]:
    """Divide the pairs of several tasks at random, so that no image is on both sides, whatever the task.

    Args:
        model: from `load` or `wrap`.
        tasks: by name, of at least two pairs each.
        held_out: share of the pairs of each to hold out, as for `split`.
        seed: of the draw.

    Raises:
        OptionError, DataError: as `split`, naming the task where there are several.
    """
    prepared = {name: prepare(model, task) for name, task in tasks.items()}
    chosen = rows_held_out(prepared, held_out, seed)
    return {name: _sides(prepared[name], rows) for name, rows in chosen.items()}


def rows_held_out(tasks: Mapping[str, PreparedTask], held_out: float, seed: int) -> dict[str, list[int]]:
    """The numbers of the pairs of each task that `split_together` holds out."""
    check_number("the share of pairs to hold out", held_out, 0, 1)
    wanted = {name: _wanted(name, len(each), held_out) for name, each in tasks.items()}
    members = _members(image_clusters(*tasks.values()))
    chosen: dict[str, list[int]] = {name: [] for name in tasks}
    for index in np.random.default_rng(seed).permutation(len(members)):
        own = dict(zip(tasks, members[index], strict=True))
        if all(len(chosen[name]) + len(rows) <= wanted[name] for name, rows in own.items()):
            for name, rows in own.items():
                chosen[name] += rows
    for place, (name, rows) in enumerate(chosen.items()):
        if not rows:
            largest = max(len(each[place]) for each in members)
            raise DataError(
                f"{len(tasks[name])} pairs{_of(name)} cannot be divided with {wanted[name]} or fewer held "
                f"out: {largest} hang together because they share images. Give pairs of images of their own"
            )
    return {name: sorted(rows) for name, rows in chosen.items()}


def image_clusters(*tasks: PreparedTask) -> list[Int64[np.ndarray, " pair"]]:
    """Which pairs of some tasks hang together, in or across tasks, because they share images.

    Returns:
        For each task the number of each pair's cluster, counted from 0 in the order of the first pairs.
    """
    pairs_and_images: nx.Graph[tuple[int, int] | bytes] = nx.Graph()
    for place, prepared in enumerate(tasks):
        for side in filter(None, (prepared.clean, prepared.corrupt)):
            pairs_and_images.add_edges_from(
                ((place, row), fingerprint(side.take(row, row + 1))) for row in range(len(side))
            )
    found = (
        sorted(node for node in each if isinstance(node, tuple))
        for each in nx.connected_components(pairs_and_images)
    )
    clusters = [np.zeros(len(prepared), dtype=np.int64) for prepared in tasks]
    for number, together in enumerate(sorted(found)):
        for place, row in together:
            clusters[place][row] = number
    return clusters


def select_pairs(
    prepared: PreparedTask,
    rows: Sequence[int] | None = None,
    change: Callable[[Tensor], Tensor] | None = None,
) -> PreparedTask:
    """The task on some of its pairs, which keep their names and classes; files stay files.

    Target and foil stay those of the original pairs, also where the model chose them, so that the same
    behaviour is measured.

    Args:
        prepared: the task.
        rows: which pairs (they may repeat), in which order; all by default.
        change: done to all images at once, held in memory: to as many of the same shape. By batches, what is
            drawn at random would depend on the batch size.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> prepared = cv.Task(*catdog_pairs(3)).prepare(cv.load("catdog-tiny"))
        >>> len(select_pairs(prepared, [0, 0, 2, 1]))
        4
    """
    chosen = tuple(range(len(prepared)) if rows is None else rows)
    metric, groups = prepared.metric, prepared.groups
    target, foil = (None if mask is None else mask[list(chosen)] for mask in (metric.target, metric.foil))
    if groups is not None and groups.members.ndim == 2:
        groups = TokenGroups(groups.names, groups.members[list(chosen)])
    said = replace(
        metric.metric,
        target=_rows_of(metric.metric.target, chosen),
        foil=_rows_of(metric.metric.foil, chosen),
    )
    return replace(
        prepared,
        clean=_chosen(prepared.clean, chosen, change),
        corrupt=None if prepared.corrupt is None else _chosen(prepared.corrupt, chosen, change),
        metric=replace(metric, metric=said, target=target, foil=foil),
        groups=groups,
        code="",
    )


def as_task(prepared: PreparedTask) -> Task:
    """The task again, whose options can be changed; each pair's target and foil are pinned to what they are.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> prepared = cv.Task(*catdog_pairs(3)).prepare(cv.load("catdog-tiny"))
        >>> as_task(prepared).with_options(ablation="mean").prepare(prepared.model).ablation.name
        'mean'
    """
    bound = prepared.metric
    target, foil = (
        said if mask is None or said is not None else _per_pair(mask)
        for said, mask in ((bound.metric.target, bound.target), (bound.metric.foil, bound.foil))
    )
    return Task(
        clean=prepared.clean,
        corrupt=prepared.corrupt,
        metric=replace(bound.metric, target=target, foil=foil),
        ablation=prepared.ablation,
        direction=prepared.direction,
        groups=prepared.groups,
        preprocessing=prepared.spec,
        pairing=prepared.pairing,
    )


@dataclass(frozen=True, eq=False)
class SomeImages(Images):
    """Some of other images, taken from them when they are needed.

    Attributes:
        whole: the images.
        rows: which of them, in order.
    """

    whole: Images
    rows: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, start: int, stop: int) -> Float[Tensor, "image *shape"]:
        taken = [self.whole.take(row, row + 1) for row in self.rows[start:stop]]
        return torch.cat(taken) if taken else torch.empty(0, *self.shape)

    @property
    def names(self) -> tuple[str, ...]:
        names = self.whole.names
        return tuple(names[row] for row in self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.whole.shape

    def check(self, progress: bool = True) -> None:
        self.whole.check(progress)


def _chosen(images: Images, rows: tuple[int, ...], change: Callable[[Tensor], Tensor] | None) -> Images:
    some = (
        replace(images, paths=tuple(images.paths[row] for row in rows))
        if isinstance(images, FileImages)
        else SomeImages(images, rows)
    )
    return some if change is None else TensorImages(change(some.take(0, len(some))))


def _rows_of(said: ClassSpec | PerPair | None, rows: Sequence[int]) -> ClassSpec | PerPair | None:
    return PerPair(tuple(said.classes[row] for row in rows)) if isinstance(said, PerPair) else said


def _per_pair(mask: Tensor) -> PerPair:
    return PerPair(tuple(tuple(row.nonzero().flatten().tolist()) for row in mask))


def _members(clusters: Sequence[Int64[np.ndarray, " pair"]]) -> list[list[list[int]]]:
    """The pairs of each task in each cluster."""
    count = 1 + max(int(each.max()) for each in clusters)
    return [[np.flatnonzero(each == number).tolist() for each in clusters] for number in range(count)]


def _wanted(name: str, pairs: int, held_out: float) -> int:
    """How many pairs of a task to hold out, at most."""
    if pairs < 2:
        raise DataError(f"one pair{_of(name)} cannot be divided: give at least two, with images of their own")
    return min(max(1, round(held_out * pairs)), pairs - 1)


def _of(name: str) -> str:
    return f" of {name}" if name else ""


def _sides(prepared: PreparedTask, chosen: Sequence[int]) -> Split:
    others = sorted(set(range(len(prepared))) - set(chosen))
    return Split(select_pairs(prepared, others), select_pairs(prepared, sorted(chosen)))

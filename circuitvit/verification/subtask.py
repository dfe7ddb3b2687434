"""Tasks made from a prepared task: other rows of it, or its images changed; classes stay what they were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from circuitvit.tasks import PerPair, PreparedTask, Task, TokenGroups
from circuitvit.tasks.images import Images


def subtask(
    prepared: PreparedTask,
    rows: Sequence[int] | None = None,
    change: Callable[[Tensor], Tensor] | None = None,
) -> Task:
    """The task on some of its pairs (which may repeat), with every image changed the same way.

    Target and foil are pinned to those of the original pairs, also where the model chose them, so that the
    same behaviour is measured.

    Args:
        prepared: the task.
        rows: which pairs, in which order; all by default.
        change: from images `(image, channel, height, width)` to as many of the same shape.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> prepared = cv.Task(*catdog_pairs(3)).prepare(cv.load("catdog-tiny"))
        >>> len(subtask(prepared, [0, 0, 2, 1]).prepare(prepared.model))
        4
    """
    chosen = list(range(len(prepared))) if rows is None else list(rows)
    bound = prepared.metric
    target, foil = (None if mask is None else _per_pair(mask, chosen) for mask in (bound.target, bound.foil))
    groups = prepared.groups
    if groups is not None and groups.members.ndim == 2:
        groups = TokenGroups(groups.names, groups.members[chosen])
    return Task(
        clean=_taken(prepared.clean, chosen, change),
        corrupt=None if prepared.corrupt is None else _taken(prepared.corrupt, chosen, change),
        metric=replace(bound.metric, target=target, foil=foil),
        ablation=prepared.ablation,
        direction=prepared.direction,
        groups=groups,
        preprocessing=prepared.spec,
    )


def _taken(images: Images, rows: Sequence[int], change: Callable[[Tensor], Tensor] | None) -> Tensor:
    taken = torch.cat([images.take(row, row + 1) for row in rows])
    return taken if change is None else change(taken)


def _per_pair(mask: Tensor, rows: Sequence[int]) -> PerPair:
    return PerPair(tuple(tuple(mask[row].nonzero().flatten().tolist()) for row in rows))

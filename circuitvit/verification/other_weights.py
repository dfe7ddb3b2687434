"""One task for two models that differ in their weights alone, or a refusal that says in what else."""

from __future__ import annotations

from torch import Tensor

from circuitvit.errors import OptionError
from circuitvit.models import Model
from circuitvit.tasks import PreparedTask, Task, prepare
from circuitvit.tasks.classes import class_label
from circuitvit.tasks.split import as_task


def check_same_kind(prepared: PreparedTask, new: Model, task: Task | PreparedTask) -> None:
    """Refuse models whose figures could not be held against each other.

    Args:
        prepared: the task for the old model.
        new: the other one.
        task: as it was given.

    Raises:
        OptionError: if they have different graphs or prepare images differently, with what differs.
    """
    old = prepared.model
    if not isinstance(new, Model):
        raise OptionError(f"{type(new).__name__} is no model of circuitvit: wrap it with cv.wrap first")
    new.refresh()
    old.graph.check_same(new.graph, f"the new model {new.name}")
    pinned = isinstance(task, Task) and task.preprocessing is not None
    if old.preprocessing != new.preprocessing and not pinned:
        raise OptionError(
            f"the models prepare images differently: {old.name} by {old.preprocessing}, {new.name} by "
            f"{new.preprocessing}. Say which counts: task.with_options(preprocessing=model.preprocessing)"
        )


def same_task(new: Model, judged: PreparedTask) -> PreparedTask:
    """The same pairs and classes for the new model.

    Raises:
        OptionError: if the models call the classes differently.
    """
    other = prepare(new, as_task(judged))
    for side in ("target", "foil"):
        here, there = (_names(each, getattr(each.metric, side)) for each in (judged, other))
        if here != there:
            pair, before, after = next(
                each for each in zip(judged.clean.names, here, there, strict=True) if each[1] != each[2]
            )
            raise OptionError(
                f"the models call the task's classes differently: the {side} of {pair} is "
                f"{', '.join(before)} in {judged.model.name} and {', '.join(after)} in {new.name}. Name "
                "target and foil as both models call them"
            )
    return other


def _names(prepared: PreparedTask, classes: Tensor | None) -> list[tuple[str, ...]]:
    """What each pair's classes are called."""
    if classes is None or not prepared.model.chooses:
        return []
    told: dict[tuple[int, ...], tuple[str, ...]] = {}
    rows = [tuple(row.nonzero().flatten().tolist()) for row in classes]
    for row in rows:
        if row not in told:
            told[row] = tuple(class_label(prepared.model, index) for index in row)
    return [told[row] for row in rows]

"""A task as the line of Python that makes it, for whoever wants to repeat what was done with it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuitvit.tasks.ablations import Mean, Noise, Patch, Resample, Zero
from circuitvit.tasks.classes import ClassGroup
from circuitvit.tasks.corruptions import CORRUPTIONS
from circuitvit.tasks.metrics import Metric, PerPair, as_metric, metric_names

if TYPE_CHECKING:
    from circuitvit.tasks.task import Task

MOST_FILES = 4
"""Files that are named one by one; more are a list that is too long for a line."""


class _Unknown(Exception):
    """Something was given that only its owner can write down, such as a tensor."""


def as_python(task: Task) -> str:
    """The task as a call of Python; "" where it was made of something that has no name, such as tensors.

    Example:
        >>> import circuitvit as cv
        >>> as_python(cv.Task("cats/", "dogs/", cv.logit_diff("cat", "dog"), pair="order"))
        "cv.Task('cats/', 'dogs/', cv.logit_diff('cat', 'dog'), pair='order')"
    """
    try:
        return _call(task)
    except _Unknown:
        return ""


def _call(task: Task) -> str:
    assert isinstance(task.metric, Metric)
    if task.preprocessing is not None or not isinstance(task.groups, str | None):
        raise _Unknown
    options = [_ablation(task.ablation)]
    if task.direction != "noising":
        options.append(f"direction={task.direction!r}")
    if task.groups is not None:
        options.append(f"groups={task.groups!r}")
    if task.table is not None:
        pair = "" if task.table.pair is None else f"pair={task.table.pair!r}"
        parts = [repr(str(task.table.path)), _metric(task.metric, per_pair=True), pair, *options]
        return f"cv.Task.from_csv({', '.join(filter(None, parts))})"
    corrupt = "None" if task.corrupt is None else _images(task.corrupt)
    pair = "" if task.pair is None else f"pair={task.pair!r}"
    parts = [_images(task.clean), corrupt, _metric(task.metric), *options, pair]
    return f"cv.Task({', '.join(filter(None, parts))})"


def _images(source: Any) -> str:
    if isinstance(source, (str, Path)):
        return repr(str(source))
    few = isinstance(source, (list, tuple)) and len(source) <= MOST_FILES
    if few and all(isinstance(each, (str, Path)) for each in source):
        return repr([str(each) for each in source])
    for name, made in CORRUPTIONS.items():
        if source is made:
            return f"cv.tasks.corruptions.CORRUPTIONS[{name!r}]"
        if isinstance(source, partial) and (source.func, source.args) == (made, ()):
            settings = "".join(f", {key}={value!r}" for key, value in source.keywords.items())
            return f"lambda images: cv.tasks.corruptions.CORRUPTIONS[{name!r}](images{settings})"
    raise _Unknown


def _metric(metric: Metric, *, per_pair: bool = False) -> str:
    if metric.name not in metric_names() or metric.formula is not as_metric(metric.name).formula:
        raise _Unknown
    if metric.to is not None:
        return f"cv.{metric.name}({_images(metric.to)})"
    given = {}
    for side in ("target", "foil"):
        classes = getattr(metric, side)
        if classes is not None and not (per_pair and isinstance(classes, PerPair)):
            given[side] = _classes(classes)
    named = [classes if "target" in given else f"{side}={classes}" for side, classes in given.items()]
    return f"cv.{metric.name}({', '.join(named)})"


def _classes(spec: Any) -> str:
    if isinstance(spec, (list, tuple)):
        return f"[{', '.join(map(_classes, spec))}]"
    if isinstance(spec, ClassGroup):
        members = "" if spec.classes is None else f", {_classes(spec.classes)}"
        return f"cv.group({spec.name!r}{members})"
    if not isinstance(spec, (str, int)):
        raise _Unknown
    return repr(spec)


def _ablation(ablation: Any) -> str:
    match ablation:
        case Patch():
            return ""
        case Mean(images=None) | Zero():
            return f"ablation={ablation.name!r}"
        case Noise(scale=scale, seed=seed):
            return f"ablation=cv.Noise({scale!r}, {seed})"
        case Resample(seed=seed):
            return f"ablation=cv.Resample({seed})"
        case _:
            raise _Unknown

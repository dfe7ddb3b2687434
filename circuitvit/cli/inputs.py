"""From options to what the library works on: a model, a task, and the checks that come before long work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuitvit.cli.options import (
    BehaviourOptions,
    HeldOutOptions,
    ImageOptions,
    ModelOptions,
    RunOptions,
)
from circuitvit.cli.values import parse_architecture
from circuitvit.errors import FileError, OptionError, unknown_name

if TYPE_CHECKING:
    from circuitvit.models import Model
    from circuitvit.tasks import Ablation, Metric, PreparedTask, Task

DTYPES = ("float32", "float64", "bfloat16", "float16")


def check_choice(kind: str, name: str, known: Sequence[str] | Mapping[str, object]) -> None:
    """Refuse a name that is none of the known ones, with the nearest.

    Raises:
        NameNotFoundError: if it is not known.
    """
    if name not in known:
        raise unknown_name(kind, name, known)


# -- the model -----------------------------------------------------------------------------------


def load_model(options: ModelOptions) -> Model:
    """The model that the options name.

    Raises:
        CircuitViTError: as `circuitvit.load`, and if the device cannot be used.
    """
    architecture = parse_architecture(options.arch or ())
    if options.dtype is not None:
        check_choice("dtype", options.dtype, DTYPES)
    classes = None if options.classes is None else _lines(options.classes)
    import torch

    from circuitvit.models import load

    return load(
        options.model,
        checkpoint=options.checkpoint,
        pretrained=options.pretrained,
        device=options.device,
        dtype=None if options.dtype is None else getattr(torch, options.dtype),
        classes=classes,
        **architecture,
    )


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise FileError(f"cannot read the class names {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise FileError(f"cannot read the class names {path}: it is not text in UTF-8") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


# -- the task ------------------------------------------------------------------------------------


def make_task(images: ImageOptions, behaviour: BehaviourOptions, seed: int) -> Task:
    """The task that the options describe; nothing is read yet but a table of pairs.

    Raises:
        CircuitViTError: as `circuitvit.Task`, and for options that contradict each other.
    """
    return _task(images, behaviour, seed, prefix="--")


def make_held_out(options: HeldOutOptions, behaviour: BehaviourOptions, seed: int) -> Task | float | None:
    """The same behaviour on the held-out images, the share of pairs to hold out, or None for neither.

    Raises:
        CircuitViTError: as `make_task`.
    """
    images = ImageOptions(options.held_out_clean, options.held_out_corrupt, options.held_out_pairs)
    if options.held_out is None:
        return None if images == ImageOptions() else _task(images, behaviour, seed, prefix="--held-out-")
    if images != ImageOptions():
        raise OptionError("--held-out divides the pairs given: leave out the other --held-out options")
    if not 0 < options.held_out < 1:
        raise OptionError(f"--held-out is a share of the pairs, between 0 and 1, not {options.held_out:g}")
    return options.held_out


def _task(images: ImageOptions, behaviour: BehaviourOptions, seed: int, prefix: str) -> Task:
    """A task; `prefix` is what the options for its images begin with, for messages."""
    if images.pairs is not None and (images.clean is not None or images.corrupt is not None):
        raise OptionError(f"give either {prefix}pairs or {prefix}clean and {prefix}corrupt, not both")
    if images.pairs is None and images.clean is None:
        raise OptionError(f"no images: give {prefix}clean and {prefix}corrupt, or {prefix}pairs with a table")
    from circuitvit.tasks import Task

    metric = _metric(behaviour)
    parts: dict[str, Any] = {
        "ablation": _ablation(behaviour.ablation, seed),
        "direction": behaviour.direction,
        "groups": behaviour.groups,
    }
    if images.pairs is not None:
        _refuse_named_twice(images.pairs, behaviour)
        return Task.from_csv(images.pairs, metric, **parts)
    assert images.clean is not None
    if images.corrupt is None and (behaviour.ablation == "patch" or behaviour.direction == "denoising"):
        raise OptionError(
            f"no counterfactuals: give {prefix}corrupt, or another --ablation such as mean (noising only)"
        )
    return Task(images.clean, images.corrupt, metric, **parts)


def _metric(behaviour: BehaviourOptions) -> Metric:
    from circuitvit.tasks.metrics import as_metric

    target, foil = behaviour.target or None, behaviour.foil or None
    shared = {name.casefold() for name in target or ()} & {name.casefold() for name in foil or ()}
    if shared:
        raise OptionError(f"--target and --foil are both {min(shared)!r}: they must be different classes")
    metric = as_metric(behaviour.metric, target, foil)
    for option, given, used in (("target", target, metric.uses_target), ("foil", foil, metric.uses_foil)):
        if given and not used:
            raise OptionError(f"the metric {metric.name} has no {option}: leave out --{option}")
    return metric


def _ablation(name: str, seed: int) -> Ablation:
    from circuitvit.tasks import Noise, Resample
    from circuitvit.tasks.ablations import as_ablation

    ablation = as_ablation(name)
    return replace(ablation, seed=seed) if isinstance(ablation, (Noise, Resample)) else ablation


def _refuse_named_twice(table: Path, behaviour: BehaviourOptions) -> None:
    from circuitvit.tasks.pairs import read_pairs

    first = read_pairs(table)[0]
    for option, given, column in (
        ("target", behaviour.target, first.target),
        ("foil", behaviour.foil, first.foil),
    ):
        if given and column is not None:
            raise OptionError(f"{table} names a {option} for each pair: leave out --{option}")


# -- checks --------------------------------------------------------------------------------------


def prepare(model: Model, task: Task | PreparedTask, run: RunOptions, *, verifiable: bool) -> PreparedTask:
    """Load and check images, classes and token groups, and see that the metric differs at all.

    Args:
        model: from `load_model`.
        task: to prepare.
        run: batch size and memory.
        verifiable: whether a circuit is to be verified on the pairs: then also refuse those whose mean
            difference in the metric may be 0, now and not after the search.

    Raises:
        CircuitViTError: as `Task.prepare`; or if the metric is the same with and without the behaviour.
    """
    from circuitvit.engine import Evaluator, check_effect
    from circuitvit.tasks import prepare as prepare_for

    prepared = prepare_for(model, task)
    ends = Evaluator(prepared, batch_size=batch_size(prepared, run))
    names, level = prepared.clean.names, 0.95 if verifiable else 0.0
    check_effect(ends.whole, ends.nothing, label=prepared.metric.label, names=names, level=level)
    return prepared


def prepare_both(
    model: Model, task: Task, held_out: Task | float | None, run: RunOptions
) -> tuple[PreparedTask, PreparedTask | None]:
    """The pairs to discover on and those to judge on, each prepared and checked as by `prepare`.

    Raises:
        CircuitViTError: as `prepare`, and if the pairs cannot be divided.
    """
    from circuitvit.tasks import split

    if held_out is None:
        return prepare(model, task, run, verifiable=True), None
    sides = split(model, task, held_out, seed=run.seed) if isinstance(held_out, float) else (task, held_out)
    first, second = (prepare(model, side, run, verifiable=True) for side in sides)
    return first, second


def batch_size(prepared: PreparedTask, run: RunOptions) -> int:
    """How many pairs to run at once."""
    from circuitvit.engine import choose_batch_size

    return run.batch_size or choose_batch_size(prepared, run.budget)

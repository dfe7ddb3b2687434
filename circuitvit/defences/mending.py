"""Mend: take an unwanted behaviour out of a model by removing nodes, and keep the rest.

What is removed becomes a constant that folds into weights. Nodes are chosen on one part of the pairs, with a
limit on what may be lost, and all that is reported is measured on the others. Several ways of saying which
nodes to try, and in which order, stand on one table (`ways`), judged by the same rules (`choosing`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import get_args

import numpy as np

from circuitvit._keywords import running
from circuitvit.defences.choosing import Choice, Search, Watched
from circuitvit.defences.mended import BEFORE, Behaviour, Mended, Row
from circuitvit.defences.removable import Constant, Kind, removable
from circuitvit.defences.ways import Method, drawn_rows, way_of
from circuitvit.errors import (
    CircuitViTError,
    DataError,
    OptionError,
    check_number,
    check_whole,
    counted,
    unknown_name,
)
from circuitvit.models import Model
from circuitvit.tasks import PreparedTask, Task, prepare, select_pairs
from circuitvit.tasks.inputs import few
from circuitvit.tasks.split import rows_held_out
from circuitvit.verification.statistics import mean_interval

AnyTask = Task | PreparedTask


@running
def mend(
    model: Model,
    remove: AnyTask,
    keep: AnyTask | Mapping[str, AnyTask],
    *,
    groups: Mapping[str, Sequence[str]] | None = None,
    max_loss: float = 0.01,
    units: Sequence[Kind] = ("heads", "neurons", "features"),
    constant: Constant = "mean",
    most: int | None = None,
    methods: Sequence[Method] = get_args(Method),
    region: str | None = None,
    held_out: float = 0.5,
    draws: int = 5,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> Mended:
    """Remove nodes from a model so that an unwanted behaviour goes and others stay.

    The unwanted behaviour is a task whose pairs differ in the cue alone: what is to go is the difference of
    the metric. Of wanted ones right answers are counted, of clean images; that is all that is known of images
    without counterfactuals. Where a wanted task has corrupt images, or groups, the size of its effect is
    watched as well.

    Cost: a run over the pairs that are chosen on for every node or block of nodes that is tried, and a
    backward pass after each choice.

    Args:
        model: from `load`, `wrap`, `refine_nodes`, `with_head` or `with_prompts`; it may be edited, and
            what its edits make of a node's output stays.
        remove: the unwanted behaviour, with clean and corrupt images.
        keep: the behaviours to be kept, by name. A target that is named is the right answer, otherwise what
            the model answers as it is.
        groups: by the names of wanted behaviours a group for each pair, such as "cat on grass": the worst
            group is reported, and all groups count the same in the size of the effect.
        max_loss: by how much the share of right answers of a wanted behaviour may fall, where it is chosen.
        units: what may be removed: "heads", "neurons", "features" (and neurons) of a refined model, "MLPs".
        constant: what is removed becomes its "mean" over images and tokens, or "zero".
        most: the largest number of nodes to remove; by default any.
        methods: rows of the table; the first is the one whose choice is returned.
        region: the token group of `remove` that the cue is in, for "dyslexify".
        held_out: the share of pairs of each task that nothing is chosen on. No image of any task is on both
            sides.
        draws: rows of nodes drawn at random.
        seed: of which pairs are held out, and of random rows.
        batch_size: images at once; 32 by default.
        progress: whether to show a bar.

    Raises:
        OptionError: for settings that make no sense, and metrics without a gradient.
        NameNotFoundError: for an unknown method, kind or behaviour.
        DataError: if the cue has no counterfactuals, or there are too few pairs.
        UnsupportedModelError: if the model has nothing of what may be removed.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets import signs
        >>> model = cv.load("clip-tiny").with_prompts(["a cat", "a dog"])
        >>> metric = cv.logit_diff("a cat", "a dog")
        >>> reads, looks = (
        ...     cv.Task(*pairs, metric) for pairs in (signs.word_pairs(16), signs.animal_pairs(16))
        ... )
        >>> found = mend(
        ...     model, reads, {"animal": looks}, units=["heads"], methods=["circuit"], progress=False
        ... )
        >>> found.chosen
        ('a3.h3.z', 'a1.h3.z')
    """
    _check(max_loss, most, methods, held_out, draws)
    wanted = dict(keep) if isinstance(keep, Mapping) else {"keep": keep}
    prepared = [prepare(model, task, progress) for task in (remove, *wanted.values())]
    _check_tasks(prepared, tuple(wanted), groups or {}, region)
    names = ["the cue", *wanted]
    held = rows_held_out(dict(zip(names, prepared, strict=True)), held_out, seed)
    halves = [
        (sorted(set(range(len(task))) - set(held[name])), held[name])
        for name, task in zip(names, prepared, strict=True)
    ]
    said = [tuple((groups or {}).get(name, ())) for name in names]
    chosen_on, measured_on = (
        [
            Watched(
                name,
                select_pairs(task, half[side]),
                tuple(own[row] for row in half[side]) if own else (),
                not at,
            )
            for at, (name, task, half, own) in enumerate(zip(names, prepared, halves, said, strict=True))
        ]
        for side in (0, 1)
    )
    averaged = [images for each in chosen_on for images in (each.task.clean, each.task.corrupt) if images]
    nodes = removable(model, units, averaged, constant, batch_size, progress)
    search = Search(chosen_on[0], tuple(chosen_on[1:]), max_loss, most, progress)
    heeded, caveats = _is_heeded(search.unwanted), []
    if not heeded:
        caveats.append("on the pairs to choose on the cue moves the metric no more than chance would")
    if nodes.left_out:
        caveats.append(f"edited in what they write, and left so: {few(nodes.left_out)}")
    rows, edited = [Row(BEFORE, (), (), {}, True, 0)], [model]
    for method in methods:
        if method == "random":
            continue
        try:
            way = way_of(method, search, nodes, region, batch_size, progress)
        except CircuitViTError as error:
            if method == methods[0]:
                raise
            caveats.append(f"{method} is left out: {error}")
            continue
        choice = search.chosen(way.without, way.ranked, method) if heeded else Choice((), 1.0, 0.0, ())
        rows.append(way.row(method, choice))
        edited.append(way.without(choice.names))
    drawn = list(drawn_rows(nodes, rows[1], draws if "random" in methods else 0, seed))
    found = Mended(
        name=model.name,
        weights=model.weights_hash,
        method=methods[0],
        rows=(*rows, *drawn),
        behaviours=tuple(
            _measured(each, [*edited, *(nodes.without(row.removed) for row in drawn)], len(before.task))
            for each, before in zip(measured_on, chosen_on, strict=True)
        ),
        max_loss=max_loss,
        constant=constant,
        caveats=(*caveats, *_caveats(search, measured_on, rows[1], max_loss)),
    )
    object.__setattr__(found, "_given", model)  # no field: a file holds no model
    return found


# -- what is checked, measured and said ----------------------------------------------------------


def _check(max_loss: object, most: int | None, methods: object, held_out: float, draws: int) -> None:
    if isinstance(max_loss, bool) or not isinstance(max_loss, Real) or not 0 <= float(max_loss) < 1:
        raise OptionError(f"max_loss is a share of answers, from 0 to below 1, not {max_loss!r}")
    check_number("the share of pairs to hold out (held_out)", held_out, 0, 1)
    check_whole("draws", draws, 0)
    if most is not None:
        check_whole("the largest number of nodes (most)", most)
    asked = list(methods) if isinstance(methods, Sequence) and not isinstance(methods, str) else []
    for method in asked:
        if method not in get_args(Method):
            raise unknown_name("method", method, get_args(Method))
    if not asked or asked[0] in ("projection", "random") or len(set(asked)) < len(asked):
        raise OptionError(
            f"methods= takes some of {', '.join(get_args(Method))}, each once; the first is the one whose "
            "choice is returned, which 'projection' and 'random' are to be compared with"
        )


def _check_tasks(
    prepared: Sequence[PreparedTask],
    names: tuple[str, ...],
    groups: object,
    region: str | None,
) -> None:
    unwanted, wanted = prepared[0], dict(zip(names, prepared[1:], strict=True))
    if unwanted.corrupt is None:
        raise DataError(
            "what is to be removed is the difference that the cue makes: the task needs corrupt images, "
            "which are the clean ones with another cue or none"
        )
    if not names or "the cue" in names:
        raise OptionError("say what is to be kept: keep= takes tasks by name, none of them called 'the cue'")
    if not isinstance(groups, Mapping):
        raise OptionError(
            f"groups are given by the name of a wanted behaviour, such as {{{names[0]!r}: [...]}}, not as "
            f"{type(groups).__name__}"
        )
    for name, own in groups.items():
        if name not in wanted:
            raise unknown_name("behaviour to have groups", name, names)
        if len(own) != len(wanted[name]):
            raise DataError(
                f"{len(own)} groups of {name} for {counted(len(wanted[name]), 'pair')}: give one for each"
            )
    for name, task in {"what is to be removed": unwanted, **wanted}.items():
        sized = task.corrupt is not None or name in groups
        if sized and not task.metric.metric.differentiable:
            raise OptionError(
                f"the metric of {name}, {task.metric.label}, has no gradient, by which nodes are ranked: use "
                "logit_diff or log_probability"
            )
    known = () if unwanted.groups is None else unwanted.groups.names
    if region is not None and region not in known:
        raise (
            unknown_name("token group of the cue's task", region, known)
            if known
            else OptionError(
                f"the cue's task has no token groups, so there is no region {region!r}: give it groups="
            )
        )


def _is_heeded(unwanted: Watched) -> bool:
    """Whether the cue moves the metric, as far as can be told from these pairs."""
    found = mean_interval(unwanted.at_first.effect)
    if found.low is None or found.high is None:
        return found.value != 0
    return not found.low <= 0 <= found.high


def _measured(watched: Watched, models: Sequence[Model], chosen_on: int) -> Behaviour:
    found = [watched.seen(model) for model in models]
    answers = [each.right for each in found if each.right is not None]
    counts = "same" if watched.is_unwanted else "right" if watched.has_labels else "as before"
    return Behaviour(
        name=watched.name,
        label=watched.task.label,
        counts=counts if answers else "",
        pairs=tuple(watched.task.clean.names),
        groups=watched.groups,
        chosen_on=chosen_on,
        effect=np.stack([each.effect for each in found]),
        answers=np.stack(answers) if answers else None,
    )


def _caveats(search: Search, measured: Sequence[Watched], row: Row, max_loss: float) -> Iterator[str]:
    if not row.removed:
        yield f"{row.method} found nothing to remove within the limits: the model stays as it is"
    for each in search.wanted:
        if each.weights is None:
            yield (
                f"of {each.name} right answers alone were watched: there are no counterfactuals, and no "
                "groups, to tell its effect from the cue's"
            )
        elif each.size <= 0:
            yield f"the metric of {each.name} is no higher where it should be: its effect was not watched"
        if max_loss * len(each.task) < 1:
            yield (
                f"a loss of {100 * max_loss:.1f} % is less than one of {counted(len(each.task), 'pair')} of "
                f"{each.name}: no answer could be lost at all"
            )
    few = [each.name for each in measured if len(each.task) < 20]
    if few:
        yield f"fewer than 20 pairs are held out of {', '.join(few)}: intervals are wide"

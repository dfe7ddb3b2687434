"""`compare_models`: measure several models alike, each after the other, on the sheet as soon as it is done.

Everything that can be refused is refused before the first search: every model is prepared for the task first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np

from circuitvit._keywords import running
from circuitvit.attribution import provenance_of
from circuitvit.attribution.budget import seconds
from circuitvit.attribution.methods import find_method
from circuitvit.attribution.scoring import Running
from circuitvit.engine import Evaluator, announce, choose_batch_size
from circuitvit.engine.state import task_digest
from circuitvit.errors import CircuitViTError, DataError, OptionError, check_whole, counted
from circuitvit.models import Model
from circuitvit.pruning.find import find
from circuitvit.tasks import PreparedTask, Task, prepare, split
from circuitvit.tasks.images import TensorImages
from circuitvit.tasks.split import SomeImages, select_pairs
from circuitvit.verification.statistics import Bootstrap
from circuitvit.verification.verify import verify
from circuitvit.views.compared_model import LETTERS, ComparedModel, Cost, caveats_of
from circuitvit.views.model_figures import (
    ability_of,
    curve_of,
    depth_values,
    draw_edges,
    exact_effects,
    labels_of,
    rightness_of,
    uses_of,
)
from circuitvit.views.model_sheet import ModelSheet

USUAL = ("eap", "eap-ig", "local")
"""Estimators that are held against exact effects unless others are named."""

LEAST_EDGES = 10
"""Edges without which no correlation says anything."""

AnyTask: TypeAlias = Task | PreparedTask
Tasks: TypeAlias = Task | PreparedTask | Sequence[AnyTask] | Mapping[str, AnyTask]
"""One for all models; or one for each, in their order or by their names."""


@running
def compare_models(
    models: Sequence[Model] | Mapping[str, Model],
    task: Tasks,
    *,
    held_out: Tasks | float | None = None,
    methods: Sequence[str] = USUAL,
    edges: int = 200,
    within: str | float = "30s",
    n_random: int = 20,
    labels: bool = True,
    known: ModelSheet | None = None,
    after_each: Callable[[ModelSheet], object] = lambda sheet: None,
    seed: int = 0,
    batch_size: int | None = None,
    memory: int | str | None = None,
    progress: bool = True,
) -> ModelSheet:
    """Two or more models on one sheet, for one behaviour and the same images.

    Of each model: how well it tells the pairs apart, also along its depth (the logit lens); its circuit,
    found by `find` and judged on held-out pairs; what that is made of; how right estimates of its edges are;
    and what all this costs. The same model twice is allowed, as a control.

    Args:
        models: at least two, by names of your own or as a list, which is called by the models' names.
        task: images, metric and ablation, in the noising direction; one for all models, or one for each, as a
            list or by name: of the same images, with the same metric, and classes that the model has.
        held_out: other pairs, likewise, to judge circuits on; or the share of the pairs to hold out, drawn so
            that no image is on both sides. Without it circuits are judged where they were found.
        methods: names of scoring methods (`METHODS`) to hold against exact effects; none for no such test.
        edges: how many edges, drawn at random, to measure exactly for that.
        within: the time to aim for in the search for each circuit, such as "90s" or "3m".
        n_random: how many random circuits to compare each circuit with; 0 for none.
        labels: whether to say what heads say, see `text_span`, on the images of discovery.
        known: an earlier sheet, whose models are taken over where model, task and settings are the same.
        after_each: called with what there is after each model.
        seed: of the split, the search, the random circuits, the drawn edges and the resampling.
        batch_size: pairs at once; by default what `memory` allows.
        memory: bytes that a batch, and what is kept between runs, may take.
        progress: whether to show a bar.

    Raises:
        OptionError: for fewer than two models or more than eight, names that do not fit each other, models
            that see other kinds of inputs, tasks of other metrics, ablations or directions.
        NameNotFoundError: for an unknown method, or a class that a model does not have.
        DataError: if images are not the same or cannot be used, or the metric does not differ with and
            without the behaviour. All name the model.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> model = cv.load("catdog-tiny")
        >>> models = {"whole": model, "without m3": model.edit({"m3": 0})}
        >>> task = cv.Task(*catdog_pairs(6), metric=cv.logit_diff("cat", "dog"))
        >>> sheet = cv.compare_models(models, task, methods=["eap"], edges=30, n_random=0, progress=False)
        >>> [model.name for model in sheet.models], sheet.save("sheet.html")  # doctest: +SKIP
    """
    named = _named(models)
    if isinstance(methods, str):
        raise OptionError(f"the methods are a list of names, such as [{methods!r}]")
    for method in methods:
        find_method(method)
    check_whole("the number of edges to measure", edges, LEAST_EDGES)
    check_whole("the number of random circuits", n_random, 0)
    seconds(within)
    asked = _Asked(tuple(methods), edges, within, n_random, labels, seed, batch_size, memory, progress)
    sides = _sides(named, task, held_out, asked)
    first, judged = next(iter(sides.values()))
    done = {} if known is None else {model.name: model for model in known.models}
    sheet = ModelSheet((), _pairs(first), counted(len(judged or first), "pair"), judged is not None)
    for name, side in sides.items():
        old = done.get(name)
        if old is None or old.provenance != asked.origin(*side):
            at = len(sheet.models)
            announce(f"{LETTERS[at]} {name}: model {at + 1} of {len(sides)}", progress)
            with _naming(name):
                old = _measured(name, *side, asked)
        kept = (*sheet.models, old)
        sheet = replace(sheet, models=kept, caveats=caveats_of(kept, judged is not None))
        after_each(sheet)
    return sheet


# -- one model --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    """The settings, the same for every model."""

    methods: tuple[str, ...]
    edges: int
    within: str | float
    n_random: int
    labels: bool
    seed: int
    batch_size: int | None
    memory: int | str | None
    progress: bool

    def origin(self, discovery: PreparedTask, judged: PreparedTask | None) -> Any:
        """What a model's entry must have come from to be taken over."""
        tasks = [task_digest(side) for side in (discovery, judged) if side is not None]
        return provenance_of(discovery, "compare_models", self.seed).with_parameters(
            methods=list(self.methods), edges=self.edges, within=str(self.within), n_random=self.n_random,
            labels=self.labels,
            tasks=tasks,
        )  # fmt: skip


@dataclass
class _Clock:
    """Seconds by phase."""

    phases: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.phases[name] = time.perf_counter() - begin


def _measured(
    name: str, discovery: PreparedTask, judged: PreparedTask | None, asked: _Asked
) -> ComparedModel:
    """Everything about one model."""
    model, settings, clock = discovery.model, Bootstrap(seed=asked.seed), _Clock()
    how = Running(asked.batch_size or choose_batch_size(discovery, asked.memory), asked.progress)
    common: dict[str, Any] = {"memory": asked.memory, "progress": asked.progress, "seed": asked.seed}
    forward = _forward(discovery, how.batch_size)
    with clock.phase("lens"):
        sides = [each for each in (discovery, judged) if each is not None]
        values = [depth_values(side, how.batch_size, asked.progress) for side in sides]
        clean, corrupt = (np.concatenate(side, axis=1) for side in zip(*values, strict=True))
    with clock.phase("search"):
        sized = common if asked.batch_size is None else {**common, "batch_size": asked.batch_size}
        finding = find(model, discovery, within=asked.within, **sized)
    with clock.phase("verification"):
        report = verify(
            model, discovery, finding, held_out=judged, n_random=asked.n_random,
            batch_size=asked.batch_size, **common,
        )  # fmt: skip
    rightness = []
    if asked.methods:
        wanted = draw_edges(discovery.graph, asked.edges, asked.seed)
        with clock.phase("exact effects"):
            effects = exact_effects(discovery, wanted, how)
        for method in asked.methods:
            found = rightness_of(discovery, method, wanted, effects, how, settings, time.perf_counter)
            rightness.append(found)
            clock.phases |= {} if found.why_not else {method: found.seconds}
    said, why_not = None, ""
    if asked.labels:
        with clock.phase("labels"):
            said, why_not = labels_of(discovery, asked.seed, asked.progress)
    stages = discovery.graph.stages
    attention = [
        name for name, stage in discovery.graph.stage_of_node.items() if stage.kind_of(name) == "attention"
    ]
    return ComparedModel(
        name=name,
        behaviour=discovery.metric.label,
        layers=len({stage.block for stage in stages if stage.senders and stage.receivers}),
        heads=len(attention),
        width=model.d_model,
        ability=ability_of(discovery, clean, corrupt, settings),
        lens=curve_of(discovery, clean, corrupt, settings),
        circuit=finding.circuit,
        found=finding.summary,
        minimal=finding.minimal,
        report=report,
        uses=uses_of(finding.circuit),
        rightness=tuple(rightness),
        costs=tuple(Cost(phase, took, took / forward) for phase, took in clock.phases.items()),
        provenance=asked.origin(discovery, judged),
        labels=said,
        unlabelled=why_not,
    )


def _forward(prepared: PreparedTask, batch_size: int) -> float:
    """Seconds of a plain forward, for one image; the first one is not counted."""
    model = prepared.model
    batch = prepared.batch(prepared.row_ranges(model.batch_of(len(prepared), batch_size))[0]).base
    took = []
    for _ in range(3):
        begin = time.perf_counter()
        model(batch)
        took.append(time.perf_counter() - begin)
    return min(took[1:]) / len(batch)


# -- what is compared must be comparable ------------------------------------------------------------


def _named(given: object) -> dict[str, Model]:
    """The models by name; several of one name are numbered."""
    if isinstance(given, Model):
        raise OptionError(f"one model, {given.name}, cannot be compared: give a list of two or more")
    if not isinstance(given, (Mapping, list, tuple)):
        raise OptionError(f"the models are a list of two or more, or a mapping by name, not {given!r:.60}")
    pairs = (
        given.items() if isinstance(given, Mapping) else [(getattr(each, "name", ""), each) for each in given]
    )
    named: dict[str, Model] = {}
    for name, model in pairs:
        if not isinstance(model, Model):
            raise OptionError(f"{model!r:.60} is no model of circuitvit: give what cv.load or cv.wrap gave")
        if not str(name).strip():
            raise OptionError(
                "a model without a name cannot be told from others: give each one that is not empty"
            )
        alike = sum(each.name == model.name for each in named.values())
        named[f"{name} ({alike + 1})" if name in named else str(name)] = model
    if len(named) < 2:
        raise OptionError(f"one model cannot be compared: give two or more, not {len(named)}")
    if len(named) > len(LETTERS):
        raise OptionError(f"a sheet has room for {len(LETTERS)} models, not for {len(named)}")
    seen = {model.preprocessing.what: name for name, model in reversed(named.items())}
    if len(seen) > 1:
        said = " and ".join(f"{name} sees {what}s" for what, name in seen.items())
        raise OptionError(f"{said}: no inputs are for both")
    return named


def _sides(
    named: Mapping[str, Model],
    task: Tasks,
    held_out: Tasks | float | None,
    asked: _Asked,
) -> dict[str, tuple[PreparedTask, PreparedTask | None]]:
    """For each model its pairs to find a circuit on, and those to judge it on; checked to be the same."""
    discovery = _prepared(named, task, "task", asked.progress)
    judged: dict[str, PreparedTask | None] = dict.fromkeys(named)
    if isinstance(held_out, (int, float)):
        first = next(iter(named))
        sides = split(named[first], discovery[first], held_out, seed=asked.seed)
        rows = [side.clean.rows for side in sides if isinstance(side.clean, SomeImages)]
        for name, each in discovery.items():
            discovery[name], judged[name] = (select_pairs(each, chosen) for chosen in rows)
    elif held_out is not None:
        judged |= _prepared(named, held_out, "held_out", asked.progress)
    for name in named:
        for side in (discovery[name], judged[name]):
            with _naming(name):
                if side is not None:
                    Evaluator(side, batch_size=asked.batch_size, memory=asked.memory).check_effect()
    return {name: (discovery[name], judged[name]) for name in named}


def _prepared(named: Mapping[str, Model], given: Tasks, what: str, progress: bool) -> dict[str, PreparedTask]:
    found: dict[str, PreparedTask] = {}
    for name, each in _for_each(named, given, what).items():
        with _naming(name):
            found[name] = prepare(named[name], each, progress and not found)  # how files pair is said once
            if found[name].denoising:
                raise OptionError("circuits are searched in the clean run: give a task of noising")
    _check_alike(found, one=isinstance(given, Task))
    return found


def _for_each(named: Mapping[str, Model], given: Tasks, what: str) -> dict[str, AnyTask]:
    """A task for each model."""
    if isinstance(given, (Task, PreparedTask)):
        return dict.fromkeys(named, given)
    if isinstance(given, Mapping):
        if set(given) != set(named):
            raise OptionError(f"{what} names {', '.join(map(str, given))}; the models are {', '.join(named)}")
        return {name: given[name] for name in named}
    if isinstance(given, (list, tuple)) and len(given) == len(named):
        return dict(zip(named, given, strict=True))
    raise OptionError(
        f"{what} is a cv.Task for all models, or one for each of {', '.join(named)}: {given!r:.60}"
    )


def _check_alike(prepared: Mapping[str, PreparedTask], one: bool) -> None:
    """Refuse tasks that are not one behaviour on the same images."""
    (first, own), *others = prepared.items()
    for name, each in others:
        if _named_images(own) != _named_images(each):
            raise DataError(
                f"{first} and {name} are given other images ({len(own)} and {len(each)} pairs): compare "
                "models on the same ones, in the same order"
            )
        for what, of in _ALIKE.items():
            if of(own) != of(each):
                raise OptionError(f"{first} has the {what} {of(own)}, {name} has {of(each)}: give both one")
        tensors = one and isinstance(each.clean, TensorImages)
        if tensors and any(getattr(own.spec, key) != getattr(each.spec, key) for key in ("mean", "std")):
            raise DataError(
                f"{first} and {name} prepare images differently, and tensors are taken as prepared already: "
                "give files or pictures, or a task for each model"
            )


_ALIKE: Mapping[str, Callable[[PreparedTask], str]] = {
    "metric": lambda task: task.metric.metric.name,
    "ablation": lambda task: task.ablation.name,
}


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors of the library with the name of the model that they are about."""
    try:
        yield
    except CircuitViTError as error:
        said = str(error)
        raise type(error)(said if said.startswith(name) else f"{name}: {said}") from error


def _named_images(prepared: PreparedTask) -> list[object]:
    """What must be the same for all models: the names of the images, or how many there are of tensors."""
    sides = [side for side in (prepared.clean, prepared.corrupt) if side is not None]
    return [len(side) if isinstance(side, TensorImages) else side.names for side in sides]


def _pairs(prepared: PreparedTask) -> str:
    """The pairs in a line that holds for all models, whose classes have other names."""
    return prepared.label.replace(prepared.metric.label, prepared.metric.metric.name)

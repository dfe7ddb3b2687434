"""Refining a model for a task: the units that matter most become nodes of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from circuitvit._keywords import running
from circuitvit.attribution.unit_scores import attribute_units, check_nodes, unit_places
from circuitvit.engine import activations
from circuitvit.errors import OptionError, check_whole
from circuitvit.models import Model, Units, features, refined
from circuitvit.models.edits import edited
from circuitvit.tasks import PreparedTask, Task
from circuitvit.tasks.inputs import fingerprint_in_order

TOP = 64
"""How many units become nodes, unless told otherwise."""


@running
def refine_nodes(
    model: Model,
    table: Mapping[str, Any],
    *,
    top: int | None = None,
    task: Task | PreparedTask | None = None,
    method: str = "eap",
    batch_size: int | None = None,
    memory: int | str | None = None,
    progress: bool = True,
) -> Model:
    """A model some of whose nodes are cut into neurons or features: a model like any other.

    The node of a unit is called `m5.n17` or `m8.f12`; what is not chosen is `m5.rest`, and what a dictionary
    misses `m8.error`, so that the sum is still the model, exactly. Units of an MLP or a stream read
    for themselves, each through its own row; those of a head share the head's receivers.

    Args:
        model: from `load` or `wrap`; it may be edited, or refined elsewhere.
        table: by the names of nodes, with `*` for anything: `cv.neurons()`, `cv.features(dictionary)`, or a
            dictionary. A whole name goes before one with a `*`.
        top: how many units in all become nodes, of those that are not named: the ones with the largest scores
            by `attribute_units`; 64 by default.
        task: that they are scored for; needed where units are not named. Errors that are "frozen" are what
            they were on its base images (clean; where a corrupt run is restored, corrupt): the model then is
            for these images, all run at once.
        method: of the scores: "eap", "eap-ig" or "exact".
        batch_size: pairs at once; by default what `memory` allows.
        memory: bytes that a batch, and what is kept between runs, may take.
        progress: whether to show a bar.

    Raises:
        NameNotFoundError: for a node that there is not.
        OptionError: if units do not fit their node, or are to be chosen without a task.
        UnsupportedModelError: if a node cannot be cut so.
        DataError: if the images cannot be used.

    Example:
        >>> import circuitvit as cv  # doctest: +SKIP
        >>> fine = cv.refine_nodes(model, {"m*": cv.neurons()}, top=64, task=task)  # doctest: +SKIP
        >>> circuit = cv.find(fine, task)  # doctest: +SKIP
    """
    asked = _by_node(model, table)
    frozen = [node for node, units in asked.items() if units.error == "frozen"]
    if frozen and task is None:
        raise OptionError(f"{frozen[0]}.error is frozen on which images? Give the task that has them")
    asked = {node: replace(asked[node], error="node") if node in frozen else asked[node] for node in asked}
    free = {node: units for node, units in asked.items() if units.chosen is None}
    if not free:
        if top is not None or (task is not None and not frozen):
            raise OptionError("every unit is named: leave out top and task, or name none, as cv.neurons()")
        return _frozen(refined(model, asked), frozen, task, progress)
    if task is None:
        node, units = next(iter(free.items()))
        raise OptionError(f"which {units.what}s of {node}? Name them, or give the task that they are for")
    wanted = TOP if top is None else top
    check_whole("top", wanted)
    scores = attribute_units(
        model, task, free, method, batch_size=batch_size, memory=memory, progress=progress
    )
    best = scores.top(wanted)
    chosen = {
        node: replace(units, chosen=best.get(node, ()))
        for node, units in free.items()
        if node in best or units.dictionary is not None  # whose error is a node in any case
    }
    named = {node: units for node, units in asked.items() if node not in free}
    return _frozen(refined(model, {**named, **chosen}), frozen, task, progress)


def _frozen(model: Model, nodes: Sequence[str], task: object, progress: bool) -> Model:
    """The model whose dictionaries miss in every run what they miss on the base images of the task."""
    if task is None or not nodes:
        return model
    if not isinstance(task, (Task, PreparedTask)):
        raise OptionError(f"{type(task).__name__} is no task: give a cv.Task, on whose images to freeze")
    base = (task.prepare(model, progress) if isinstance(task, Task) else task).base
    names = [f"{node}.error" for node in nodes]
    held = activations(model, base, names, batch_size=model.edited_images, progress=progress)
    made, own = model.edit({name: held[name] for name in names}), fingerprint_in_order(base)
    changes = [replace(each, base=own) if each.name in names else each for each in made.edits]
    return edited(made.bare or made, changes, made.rules)


def _by_node(model: Model, table: Mapping[str, Any]) -> dict[str, Units]:
    """What becomes of each node, by full names."""
    given: Any = table
    who: object = model
    if not isinstance(who, Model):
        raise OptionError(
            f"{type(who).__name__} is no model of circuitvit: give what cv.load or cv.wrap gave"
        )
    if not isinstance(given, Mapping) or not given:
        raise OptionError('nodes are refined by name, such as {"m5": cv.neurons()}')
    check_nodes(given)
    found: dict[str, Units] = {}
    for key in sorted(table, key=lambda key: "*" not in key and "?" not in key):  # whole names last
        units = table[key] if isinstance(table[key], Units) else features(table[key])
        found.update({place.site.node: units for place in unit_places(model, {key: units})})
    return found

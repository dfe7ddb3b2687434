"""How a report is made again: the command, the lines of Python, and what tells that it is the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from circuitvit.attribution import METHODS
from circuitvit.graph import Circuit, Provenance
from circuitvit.models import Model
from circuitvit.models.zoo import zoo_names
from circuitvit.tasks import PreparedTask


@dataclass(frozen=True)
class Recipe:
    """What makes a report again.

    The parts are Python; "" where what was given has no name, such as tensors.

    Attributes:
        command: on the command line; "" where the report was made in Python.
        model: loads the model.
        task: makes the task.
        held_out: that of the held-out pairs.
        circuit: finds the circuit, or reads it from its file.
        verify: verifies it.
        edges: SHA-256 over the names of the circuit's edges, one on each line in the order of the graph.
    """

    command: str = ""
    model: str = ""
    task: str = ""
    held_out: str = ""
    circuit: str = ""
    verify: str = ""
    edges: str = ""


def recipe_of(
    model: Model,
    prepared: Sequence[PreparedTask],
    circuit: Circuit,
    settings: Mapping[str, Any],
    others: bool = False,
) -> Recipe:
    """What is known about how a verification was called."""
    named = model.under if model.prompts and model.under is not None else model
    plain = not model.edits and named.head is None
    bundled = named.name in zoo_names() and named.card is not None and plain
    prompts = ", ".join(repr(list(each)) for each in (model.prompts, model.templates) if each)
    said = f".with_prompts({prompts})" if prompts else ""
    given = "".join(f", {name}={value!r}" for name, value in settings.items())
    beside = ", held_out=held_out" * (len(prepared) > 1) + ", others=others" * others
    return Recipe(
        model=f"cv.load({named.name!r}){said}" if bundled else "",
        task=prepared[0].code,
        held_out=prepared[-1].code if len(prepared) > 1 else "",
        circuit="cv.Circuit.load('circuit.json')",
        verify=f"cv.verify(model, task, circuit{beside}{given})",
        edges=edges_hash(circuit),
    )


def edges_hash(circuit: Circuit) -> str:
    """SHA-256 over the names of a circuit's edges, by which two are told to be the same."""
    return hashlib.sha256("\n".join(circuit).encode()).hexdigest()


def searched(found: Provenance) -> str:
    """The Python that finds a circuit of this origin again on `task`; "" for an origin that is not known."""
    said = dict(found.parameters)
    prediction = said.get("keep") == "prediction"  # files made before one could choose say nothing
    target = "agreement" if prediction else "faithfulness"
    if found.method == "find" and {"steps", "trim_runs", "batch_size", target} <= set(said):
        keep = ", keep='prediction'" if prediction else ""
        cut = f", cut={said['cut']}" if "cut" in said else ""
        plan = f"cv.Plan({said['steps']}, {said['trim_runs']}, {said['batch_size']}, {found.seed}{keep}{cut})"
        return f"cv.find(model, task{keep}, {target}={said[target]!r}, plan={plan}).circuit"
    if found.method == "acdc" and {"tau", "divergence"} <= set(said):
        return f"cv.acdc(model, task, tau={said['tau']!r}, divergence={said['divergence']!r})"
    select = said.get("selection")
    if found.method not in METHODS or select not in ("top", "connected", "threshold"):
        return ""
    keywords = {name: said[name] for name in METHODS[found.method].keywords if said.get(name) is not None}
    if "seed" in METHODS[found.method].keywords:
        keywords["seed"] = found.seed
    given = "".join(f", {name}={value!r}" for name, value in keywords.items())
    size = said.get("threshold" if select == "threshold" else "asked")
    return f"cv.attribute(model, task, {found.method!r}{given}).{select}({size!r}, {said.get('by')!r})"

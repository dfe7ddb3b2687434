"""A report says how it is made again: the command that was given, with what makes its search repeatable."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from circuitvit.cli.asked import ASKED
from circuitvit.cli.inputs import ModelOptions, parse_architecture

if TYPE_CHECKING:
    from circuitvit.graph import Provenance
    from circuitvit.verification import Report

TIMED = {"--within": 1, "--start": 1, "--plan": 1, "--resume": 0}
"""Options that a plan stands for, and how many values follow them."""


def with_command(report: Report, model: ModelOptions, circuit: str = "") -> Report:
    """The report with the command that is running, and the Python that is known from its options.

    Args:
        report: to be saved.
        model: as it was named.
        circuit: Python that finds or reads the circuit.
    """
    known = report.recipe
    return replace(
        report,
        recipe=replace(
            known,
            command=_command(report.circuit_provenance),
            model=_model(model) or known.model,
            circuit=circuit or known.circuit,
        ),
    )


def _command(found: Provenance) -> str:
    arguments, numbers = ASKED.get(), ("steps", "trim_runs", "batch_size")
    if arguments[:1] == ("discover",) and found.method == "find" and set(numbers) <= set(found.parameters):
        said = [*numbers, *({"cut"} & set(found.parameters))]
        plan = ",".join(str(found.parameters[name]) for name in said)
        arguments = (*_without(arguments), "--plan", plan)
    return shlex.join(("circuitvit", *arguments)) if arguments else ""


def _without(arguments: Sequence[str]) -> list[str]:
    """The arguments without those that say how long to search, or go on with an earlier search."""
    kept, skip = [], 0
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if skip:
            skip -= 1
        elif name in TIMED:
            skip = 0 if equals else TIMED[name]
        else:
            kept.append(argument)
    return kept


def _model(options: ModelOptions) -> str:
    """The Python that loads the model."""
    given = {
        "checkpoint": None if options.checkpoint is None else str(options.checkpoint),
        "pretrained": options.pretrained or None,
        "device": options.device if options.device != "cpu" else None,
        **parse_architecture(options.arch or ()),
    }
    said = [f", {name}={value!r}" for name, value in given.items() if value is not None]
    dtype = "" if options.dtype is None else f", dtype=torch.{options.dtype}"
    names = f"open({str(options.classes)!r}, encoding='utf-8-sig').read().strip().splitlines()"
    classes = "" if options.classes is None else f", classes={names}"
    loaded = f"cv.load({options.model!r}{''.join(said)}{dtype}{classes})"
    if options.prompt:
        templates = f", {options.template!r}" if options.template else ""
        return f"{loaded}.with_prompts({options.prompt!r}{templates})"
    return loaded if options.head is None else f"cv.with_head({loaded}, {str(options.head)!r})"

"""The sheet that compares models as a page without scripts or other files: where everything is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from circuitvit.export.plain_page import rendered
from circuitvit.graph.files import clean
from circuitvit.verification.statistics import Estimate
from circuitvit.views.compared_model import LETTERS, ComparedModel, table_of

if TYPE_CHECKING:
    from circuitvit.views.model_sheet import ModelSheet

WIDE, HIGH = 320, 150
"""Of a drawing, in its own units: two stand side by side, and one fills a phone."""

LINE = 18
"""The height of a model's line in a drawing of intervals."""


def as_page(sheet: ModelSheet) -> str:
    """The page."""
    models = [
        {"letter": letter, "name": clean(model.name), "behaviour": clean(model.behaviour), "all": model}
        for letter, model in zip(LETTERS, sheet.models, strict=False)
    ]
    return rendered(
        "model_sheet.html",
        title=f"{' against '.join(clean(model.name) for model in sheet.models)}",
        sheet=sheet,
        models=models,
        table=[(name, [clean(cell) for cell in cells]) for name, cells in table_of(sheet.models)],
        strips=list(filter(None, (_strip(sheet.models, *each) for each in _STRIPS))),
        inputs=_parts(sheet.models, "inputs"),
        nodes=_parts(sheet.models, "nodes"),
        layers=list(_layers(sheet.models)),
        curves=list(_curves(sheet.models)),
        labels=[each for each in map(_labels, LETTERS, sheet.models) if each],
        methods=list(_methods(sheet.models)),
        costs=_costs(sheet.models),
        overlaps=[(*map(clean, names), f"{share:.2f}") for names, share in sheet.overlaps.items()],
        wide=WIDE,
        high=HIGH,
        line=LINE,
    )


# -- figures with intervals -------------------------------------------------------------------------


class Mark(NamedTuple):
    """A figure on a line, with its interval where there is one."""

    letter: str
    at: float
    low: float | None
    high: float | None
    text: str


class Strip(NamedTuple):
    """Lines with a figure of each model, on one scale."""

    title: str
    what: str
    marks: list[Mark]
    ticks: list[tuple[float, str]]


@dataclass(frozen=True)
class _Scale:
    """Places across a drawing, with room for the letters at its left."""

    low: float
    high: float

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(24 + (WIDE - 36) * min(1.0, max(0.0, share)), 1)


_STRIPS: Sequence[tuple[str, str, Callable[[ComparedModel], Estimate | None]]] = (
    ("Pairs told apart", "share; chance is 0.5", lambda model: model.ability.told_apart),
    (
        "Faithfulness",
        "of the circuit alone; 1 is the model",
        lambda model: model.report.headline.faithfulness,
    ),
    ("Necessity", "share of the behaviour lost without it", lambda model: model.report.headline.necessity),
    ("Random circuits", "their faithfulness, on average", lambda model: model.random),
)


def _strip(
    models: Sequence[ComparedModel], title: str, what: str, of: Callable[[ComparedModel], Estimate | None]
) -> Strip | None:
    return _lines(title, what, [(LETTERS[at], of(model)) for at, model in enumerate(models)])


def _lines(title: str, what: str, found: Sequence[tuple[str, Estimate | None]]) -> Strip | None:
    told = [(letter, each) for letter, each in found if each is not None]
    if not told:
        return None
    ends = [end for _, each in told for end in (each.value, each.low, each.high) if end is not None]
    scale = _Scale(max(-2.0, min(0.0, *ends)), min(3.0, max(1.0, *ends)))
    marks = [
        Mark(
            letter,
            scale.at(each.value),
            None if each.low is None else scale.at(each.low),
            None if each.high is None else scale.at(each.high),
            str(each),
        )
        for letter, each in told
    ]
    return Strip(title, what, marks, [(scale.at(tick), f"{tick:g}") for tick in (0.0, 0.5, 1.0)])


def _methods(models: Sequence[ComparedModel]) -> Iterator[Strip]:
    """Each method's rank correlation with exact effects."""
    for method in dict.fromkeys(each.method for model in models for each in model.rightness):
        found = [{each.method: each.spearman for each in model.rightness}.get(method) for model in models]
        strip = _lines(method, "Spearman with exact effects", list(zip(LETTERS, found, strict=False)))
        if strip is not None:
            yield strip


# -- what circuits are made of ----------------------------------------------------------------------


def _parts(models: Sequence[ComparedModel], among: str) -> list[dict[str, Any]]:
    """For each part a bar for each model: the share that its circuit uses of all that there are."""
    names = dict.fromkeys(use.part for model in models for use in model.uses_among(among))
    widest = max((use.share for model in models for use in model.uses_among(among)), default=0) or 1
    return [
        {
            "name": name,
            "bars": [
                (
                    letter,
                    f"{100 * use.share / widest:.1f}",
                    f"{use.used:,} of {use.total:,}",
                    f"{use.share:.0%}",
                )
                for letter, model in zip(LETTERS, models, strict=False)
                for use in model.uses_among(among)
                if use.part == name
            ],
        }
        for name in names
    ]


def _layers(models: Sequence[ComparedModel]) -> Iterator[dict[str, Any]]:
    """A strip for each model: the layers from the first to the last, darker where more is used."""
    for letter, model in zip(LETTERS, models, strict=False):
        uses = model.uses_among("layers")
        yield {
            "letter": letter,
            "cells": [(clean(use.part), f"{use.used} of {use.total}", f"{use.share:.2f}") for use in uses],
        }


# -- curves -----------------------------------------------------------------------------------------


def _curves(models: Sequence[ComparedModel]) -> Iterator[dict[str, Any]]:
    """The lens by relative depth: pairs told apart, and the gap as a share of that at the end."""
    for title, name in (("Pairs told apart", "told_apart"), ("Gap, as a share of the final one", "gap")):
        lines = [
            (letter, [(at.depth, getattr(at, name)) for at in model.lens if getattr(at, name) is not None])
            for letter, model in zip(LETTERS, models, strict=False)
        ]
        values = [each.value for _, points in lines for _, each in points]
        if not values:
            continue
        low, high = max(-1.0, min(0.0, *values)), min(2.0, max(1.0, *values))
        yield {
            "title": title,
            "lines": [
                _curve(letter, points, low, high, (at + 1) / (len(lines) + 1))
                for at, (letter, points) in enumerate(lines)
                if points
            ],
            "ticks": [(_up(tick, low, high), f"{tick:g}") for tick in (0.0, 0.5, 1.0)],
        }


def _curve(
    letter: str, points: Sequence[tuple[float, Estimate]], low: float, high: float, along: float
) -> dict[str, Any]:
    """A line with its letter some way along, where those of others are not."""
    places = [(_across(depth), _up(each.value, low, high)) for depth, each in points]
    ends = [
        (_across(depth), _up(each.low, low, high), _up(each.high, low, high))
        for depth, each in points
        if each.low is not None and each.high is not None
    ]
    band = [(x, top) for x, _, top in ends] + [(x, bottom) for x, bottom, _ in reversed(ends)]
    return {
        "letter": letter,
        "path": " ".join(f"{x},{y}" for x, y in places),
        "band": " ".join(f"{x},{y}" for x, y in band),
        "dots": [(x, y, str(each)) for (x, y), (_, each) in zip(places, points, strict=True)],
        "name": places[round(along * (len(places) - 1))],
    }


def _across(depth: float) -> float:
    return round(28 + (WIDE - 40) * depth, 1)


def _up(value: float, low: float, high: float) -> float:
    return round(HIGH - 22 - (HIGH - 42) * min(1.0, max(0.0, (value - low) / (high - low))), 1)


# -- what heads say ---------------------------------------------------------------------------------

MOST_HEADS = 12
"""Heads that are listed of a model, those that move the embedding most."""


def _labels(letter: str, model: ComparedModel) -> dict[str, Any] | None:
    """The heads that have a label, and how many those are of all."""
    said = model.labels
    if said is None:
        return None
    inside, spread = set(model.circuit.nodes), dict(zip(said.heads, said.spread, strict=True))
    named = sorted(said.labels, key=lambda head: -spread[head])
    return {
        "letter": letter,
        "count": f"{len(named)} of {len(said.heads)} heads have a label",
        "from": f"out of {len(said.descriptions):,} descriptions",
        "more": max(0, len(named) - MOST_HEADS),
        "heads": [
            (clean(head), clean(said.labels[head]), f"{said.phrases(head)[0][1]:.0%}", head in inside)
            for head in named[:MOST_HEADS]
        ],
    }


# -- cost -------------------------------------------------------------------------------------------


def _costs(models: Sequence[ComparedModel]) -> list[tuple[str, list[str]]]:
    """Seconds, and forwards of one image, of each phase and model."""
    phases = dict.fromkeys(cost.phase for model in models for cost in model.costs)
    found = []
    for phase in phases:
        of = [{cost.phase: cost for cost in model.costs}.get(phase) for model in models]
        cells = ["-" if cost is None else f"{cost.seconds:,.1f} s, {cost.forwards:,.0f}" for cost in of]
        found.append((phase, cells))
    return found

"""Do searches find with many masks in one batch what they find with one mask at a time? Edge for edge.

`find` from both of its starts, `refine`, `ddmin` and ACDC, on 200 micro-models drawn with every switch of a
Vision Transformer (float64), and `find` on a pair of photographs and the real ViT-Ti/16 (float32). One at a
time means the masked run that the tests hold against literal runs; ACDC then looks no candidate ahead.

    python -m bench same_answers
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings

import circuitvit as cv
from bench._photographs import draw_pairs, load_model
from circuitvit.engine import Sources, masked_run
from circuitvit.errors import CircuitViTError
from circuitvit.graph import EdgeMask
from circuitvit.tasks import PreparedTask
from tests.strategies import Recipe, recipes

MODELS = 200
PLAN = cv.Plan(0, 150, 2)
REAL_PLAN = cv.Plan(0, 600, 1)

Search = Callable[[cv.Model, PreparedTask], EdgeMask]


def singly(sources: Sources, kept: EdgeMask) -> torch.Tensor:
    """Masks run one at a time."""
    return torch.stack([masked_run(sources, mask) for mask in kept])


@contextmanager
def one_at_a_time() -> Iterator[None]:
    with (
        patch("circuitvit.engine.evaluator.masked_runs", singly),
        patch("circuitvit.pruning.acdc.CPU_IMAGES", 1),
        patch("circuitvit.pruning.acdc.GPU_IMAGES", 1),
    ):
        yield


def found(start: str, model: cv.Model, task: PreparedTask, plan: cv.Plan = PLAN) -> EdgeMask:
    return cv.find(model, task, plan=plan, start=start, progress=False).circuit.kept  # type: ignore[arg-type]


def trimmed(way: Callable[..., cv.Refinement], model: cv.Model, task: PreparedTask) -> EdgeMask:
    return way(model, task, cv.Circuit.full(task.graph), progress=False).circuit.kept


def acdc(model: cv.Model, task: PreparedTask) -> EdgeMask:
    return cv.acdc(model, task, 1e-3, progress=False).kept


SEARCHES: dict[str, Search] = {
    "find, thin": partial(found, "thin"),
    "find, whole": partial(found, "whole"),
    "refine": partial(trimmed, cv.refine),
    "ddmin": partial(trimmed, cv.ddmin),
    "acdc": acdc,
}


def compare(told: Counter[tuple[str, str]], recipe: Recipe) -> None:
    """One micro-model: what every search finds in both ways."""
    model = cv.wrap(recipe.build())
    task = cv.Task(recipe.images(2), recipe.images(2, 1), cv.logit_diff(0, 1))
    for name, search in SEARCHES.items():
        try:
            together = search(model, task.prepare(model))
        except CircuitViTError:  # nothing to explain, or nothing that can be searched for
            told[name, "refused"] += 1
            continue
        with one_at_a_time():
            alone = search(model, task.prepare(model))
        told[name, "same" if np.array_equal(together, alone) else "other"] += 1


def micro_models() -> Counter[tuple[str, str]]:
    told: Counter[tuple[str, str]] = Counter()

    @settings(
        max_examples=MODELS, phases=[Phase.generate], derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(recipe=recipes())
    def each(recipe: Recipe) -> None:
        compare(told, recipe)

    each()
    return told


def real_pair(told: Counter[tuple[str, str]]) -> None:
    model = load_model()
    ((cat, dog),) = draw_pairs(model, 1, seed=0)
    task = cv.Task([cat], [dog]).prepare(model)
    together = found("thin", model, task, REAL_PLAN)
    with one_at_a_time():
        alone = found("thin", model, task, REAL_PLAN)
    told["find, ViT-Ti/16", "same" if np.array_equal(together, alone) else "other"] += 1
    print(f"ViT-Ti/16: {together.sum()} and {alone.sum()} edges, {(together & alone).sum()} in both")


def main() -> None:
    torch.set_num_threads(1)
    told = micro_models()
    if "--micro" not in sys.argv:
        real_pair(told)
    for name in dict.fromkeys(name for name, _ in told):
        print(f"{name:16}", *(f"{told[name, what]:4} {what}" for what in ("same", "other", "refused")))
    if any(what == "other" for _, what in told):
        raise SystemExit("a search found something else")


if __name__ == "__main__":
    main()

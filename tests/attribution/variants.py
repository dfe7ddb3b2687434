"""Methods and their rules under one name each, for tests that hold for all of them."""

from __future__ import annotations

from typing import Any

import circuitvit as cv
from circuitvit.attribution.paths import Rule

RULES: dict[str, Rule] = {"eap-ig": "midpoint", "eap-ig-gauss": "gauss-legendre", "eap-ig-left": "left"}


def scored(
    model: cv.Model, task: cv.Task, variant: str, *, steps: int | None = None, **options: Any
) -> cv.EdgeScores:
    """The scores of a method, or of a rule of `eap-ig`; `steps` for those that take steps."""
    method = "eap-ig" if variant in RULES else variant
    if variant in RULES:
        options["rule"] = RULES[variant]
    if steps is not None and "steps" in cv.METHODS[method].keywords:
        options["steps"] = steps
    return cv.attribute(model, task, method, progress=False, **options)

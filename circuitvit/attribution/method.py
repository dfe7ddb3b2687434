"""What every scoring method is given, and the checks that they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from circuitvit.attribution.budget import Budget
from circuitvit.errors import DataError, OptionError
from circuitvit.graph import EdgeMask
from circuitvit.tasks import PreparedTask


@dataclass(frozen=True)
class Settings:
    """How a method runs.

    Attributes:
        batch_size: pairs at once.
        steps: nodes on an integration path.
        progress: whether to show a bar.
        budget: what methods that can spend more or less may spend; None for their own choice.
        seed: of methods that draw.
        state: file to keep what has been done in, for methods that can be resumed; None for no file.
    """

    batch_size: int
    steps: int = 5
    progress: bool = False
    budget: Budget | None = None
    seed: int = 0
    state: Path | None = None


@dataclass(frozen=True, eq=False)
class Scored:
    """What a method found, where that is more than numbers.

    Attributes:
        values: the scores `(sender, receiver, group)` of all edges, summed over pairs.
        measured: where the score is the exact effect itself; None where no score is.
        parameters: what the method chose by itself, JSON values, for the scores' provenance.
        method: the method that it came down to, if not the one asked for.
    """

    values: NDArray[np.float64]
    measured: EdgeMask | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    method: str | None = None


FLAT_AT_CLEAN = ("kl_divergence", "cross_entropy")
"""Metrics whose minimum is the clean run itself."""

Scorer = Callable[[PreparedTask, Settings], NDArray[np.float64] | Scored]
"""Gives the scores `(sender, receiver, group)` of all edges, summed over pairs."""


@dataclass(frozen=True)
class Method:
    """A scoring method, as `circuitvit attribute --help` and the documentation list it.

    Attributes:
        score: the function.
        summary: one line.
        cost: in passes of the plain model over a pair.
        uses_steps: whether `steps` matters.
        uses_budget: whether `budget` matters.
        uses_seed: whether `seed` matters.
        resumes: whether it can go on from a state file.
        by_pair: whether the scores of a task are sums over its pairs, whatever the others are.
    """

    score: Scorer
    summary: str
    cost: str
    uses_steps: bool = False
    uses_budget: bool = False
    uses_seed: bool = False
    resumes: bool = False
    by_pair: bool = True


def require_gradient(prepared: PreparedTask, method: str) -> None:
    """Refuse a metric without a gradient before anything runs.

    Raises:
        OptionError: naming metrics that work.
    """
    if not prepared.metric.metric.differentiable:
        raise OptionError(
            f"{method} needs the metric's gradient, and {prepared.metric.metric.name!r} has none: "
            "use logit_diff or log_probability, or method='exact'"
        )


def refuse_flat(prepared: PreparedTask, method: str) -> None:
    """Refuse a divergence from the clean run where the gradient is taken at that very run.

    There it is at its minimum, so that scores would be the noise of rounding.

    Raises:
        OptionError: naming the way out.
    """
    name = prepared.metric.metric.name
    if name in FLAT_AT_CLEAN and not prepared.denoising:
        raise OptionError(
            f"{name} is flat at the clean run, where {method} takes its gradient: every score would be 0. "
            "Use logit_diff or log_probability, or method='eap-ig' or 'exact'"
        )


def check_gradient(prepared: PreparedTask, total: Tensor) -> None:
    """Refuse scores that are 0 everywhere: the metric is flat where its gradient was taken.

    The share of one process may be 0 everywhere, as where its images are equal: the sum of all is checked.

    Raises:
        DataError: naming the way out.
    """
    if prepared.is_whole and not total.any():
        raise DataError(
            f"the gradient of {prepared.metric.label} is 0 everywhere at the base run, so every score is 0. "
            "A divergence from the clean run is flat there, and equal images have no difference to score: "
            "use method='exact' or 'eap-ig', another metric, or other images"
        )


def check_effects(prepared: PreparedTask, total: NDArray[np.float64]) -> None:
    """Refuse effects that are 0 everywhere; not those of one process's share, whose sum with others counts.

    Raises:
        DataError: naming the way out.
    """
    if prepared.is_whole and not total.any():
        raise DataError(
            f"no edge has any effect on {prepared.metric.label}: ablated runs give the same metric. Equal "
            "clean and corrupt images have no difference to explain: use other images, metric or ablation"
        )

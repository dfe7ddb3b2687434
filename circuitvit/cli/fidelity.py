"""How right scores are, as the commands that score edges measure and say it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from circuitvit.cli.options import RunOptions
from circuitvit.errors import OptionError

if TYPE_CHECKING:
    from circuitvit.graph import EdgeScores
    from circuitvit.models import Model
    from circuitvit.tasks import PreparedTask


def check_calibration(n: int | None) -> None:
    """Refuse too few edges to measure, before anything runs.

    Raises:
        OptionError: saying how few are enough.
    """
    from circuitvit.attribution.calibration import LEAST

    if n is not None and 0 < n < LEAST:
        raise OptionError(f"--calibrate takes at least {LEAST} edges, or 0 for none, not {n}")


def checked(model: Model, task: PreparedTask, scores: EdgeScores, n: int, run: RunOptions) -> EdgeScores:
    """The scores with their fidelity, from the exact effects of `n` edges; as they are where `n` is 0."""
    from circuitvit.attribution import calibrate

    if n == 0:
        return scores
    return calibrate(
        model, task, scores, n, seed=run.seed, batch_size=run.batch_size, memory=run.budget,
        progress=run.progress,
    )  # fmt: skip


def about_choice(scores: EdgeScores) -> list[str]:
    """Which method was taken and why, where that was left open."""
    chosen = scores.provenance.parameters.get("chosen")
    return [] if chosen is None else [f"Scored by {chosen}."]


def about_scores(scores: EdgeScores) -> list[str]:
    """The same, and how right the scores are."""
    if scores.fidelity is None:
        return about_choice(scores)
    return [*about_choice(scores), f"{scores.method}: {scores.fidelity.sentence}"]

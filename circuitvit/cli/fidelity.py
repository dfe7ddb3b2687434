"""How right scores are, as the commands that score edges measure and say it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from circuitvit.cli.options import RunOptions
from circuitvit.errors import OptionError

if TYPE_CHECKING:
    from circuitvit.graph import EdgeScores
    from circuitvit.models import Model
    from circuitvit.tasks import PreparedTask

__all__ = ["about_scores", "check_calibration", "checked"]


def check_calibration(n: int | None) -> None:
    """Refuse too few edges to measure, before anything runs.

    Raises:
        OptionError: saying how few are enough.
    """
    from circuitvit.attribution.sample import LEAST

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


def about_scores(scores: EdgeScores) -> list[str]:
    """What chose the method, where that was left open, and how right the scores are."""
    said = []
    chosen = scores.provenance.parameters.get("chosen")
    if chosen is not None:
        said.append(f"Scored by {chosen}.")
    if scores.fidelity is not None:
        said.append(f"{scores.method}: {scores.fidelity.sentence}")
    return said

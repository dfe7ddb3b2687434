"""For now: the evaluator as searches call it."""

from __future__ import annotations

from circuitvit.engine import Evaluator
from circuitvit.errors import OptionError
from circuitvit.graph import EdgeMask
from circuitvit.tasks import PreparedTask


class FaithfulnessMeter(Evaluator):
    """Calls give the faithfulness of edge masks. To become `Evaluator.faithfulness` where it is used.

    Args:
        prepared: the task, in the noising direction.
        memory: budget, in bytes.

    Raises:
        OptionError: if the task is in the denoising direction.
        DataError: if the metric does not differ between clean and ablated runs.
    """

    def __init__(self, prepared: PreparedTask, memory: int | None = None) -> None:
        if prepared.denoising:
            raise OptionError("faithfulness is measured in the clean run: give the task direction='noising'")
        super().__init__(prepared, memory=memory)
        self.check_effect(level=0)
        self.runs = 0

    def __call__(self, kept: EdgeMask) -> float:
        return self.faithfulness(kept)

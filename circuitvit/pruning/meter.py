"""The faithfulness of many circuits on the same pairs, with everything that does not change kept at hand."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from circuitvit.engine import (
    BatchRun,
    batch_runs,
    bytes_per_pair,
    check_effect,
    choose_batch_size,
    evaluate,
    masked_run,
)
from circuitvit.errors import OptionError
from circuitvit.graph import EdgeMask
from circuitvit.tasks import PreparedTask

__all__ = ["FaithfulnessMeter"]

CACHE_BYTES = 4 * 2**30
"""Captured runs and references stay in memory up to this size, and are computed anew past it."""


class FaithfulnessMeter:
    """Calls give the faithfulness of edge masks: a ratio of means over all pairs of a task.

    Args:
        prepared: the task, in the noising direction.
        memory: budget of a batch, in bytes.

    Raises:
        OptionError: if the task is in the denoising direction.
        DataError: if the metric does not differ between clean and ablated runs.
    """

    def __init__(self, prepared: PreparedTask, memory: int | None = None) -> None:
        if prepared.denoising:
            raise OptionError("faithfulness is measured in the clean run: give the task direction='noising'")
        self.prepared = prepared
        self.runs = 0
        self._batch_size = choose_batch_size(prepared, memory)
        ends = evaluate(prepared, [], batch_size=self._batch_size)
        check_effect(prepared, ends.all_values, ends.none_values)
        self.whole, self.nothing = (
            float(values.double().mean()) for values in (ends.all_values, ends.none_values)
        )
        fits = len(prepared) * bytes_per_pair(prepared) <= CACHE_BYTES
        self._cache = list(self._fresh()) if fits else None
        self._known: dict[bytes, float] = {}

    def __call__(self, kept: EdgeMask) -> float:
        """The faithfulness with the edges of `kept` `(sender, receiver, group)` kept; remembered."""
        key = np.packbits(kept).tobytes()
        if key not in self._known:
            self.runs += 1
            total = 0.0
            for run in self._cache if self._cache is not None else self._fresh():
                total += float(run.metric(masked_run(run.sources, kept)).double().sum())
            self._known[key] = (total / len(self.prepared) - self.nothing) / (self.whole - self.nothing)
        return self._known[key]

    def _fresh(self) -> Iterable[BatchRun]:
        return batch_runs(self.prepared, self._batch_size)

"""The faithfulness of many circuits on the same pairs, with everything that does not change kept at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

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
        self._recalled: dict[bytes, float] = {}
        self.after_run: Callable[[], None] = lambda: None

    def __call__(self, kept: EdgeMask) -> float:
        """The faithfulness with the edges of `kept` `(sender, receiver, group)` kept; remembered."""
        key = np.packbits(kept).tobytes()
        if key not in self._known:
            self.runs += 1
            recalled = self._recalled.get(key)
            self._known[key] = self._measured(kept) if recalled is None else recalled
            self.after_run()
        return self._known[key]

    def _measured(self, kept: EdgeMask) -> float:
        total = 0.0
        for run in self._cache if self._cache is not None else self._fresh():
            total += float(run.metric(masked_run(run.sources, kept)).double().sum())
        return (total / len(self.prepared) - self.nothing) / (self.whole - self.nothing)

    def table(self) -> dict[str, Tensor]:
        """Everything measured so far: `masks` `(run, byte)`, packed, and their `faithfulness` `(run,)`."""
        known = {**self._recalled, **self._known}
        width = len(np.packbits(self.prepared.graph.edge_mask))
        masks = np.frombuffer(b"".join(known), dtype=np.uint8).reshape(len(known), width).copy()
        values = torch.tensor(list(known.values()), dtype=torch.float64)
        return {"masks": torch.from_numpy(masks), "faithfulness": values}

    def recall(self, table: Mapping[str, Tensor]) -> None:
        """Take values from an earlier run's table instead of measuring; they count as runs all the same, so
        that a search repeated on them takes the same way."""
        rows = zip(table["masks"].numpy(), table["faithfulness"].tolist(), strict=True)
        self._recalled = {mask.tobytes(): value for mask, value in rows}

    def _fresh(self) -> Iterable[BatchRun]:
        return batch_runs(self.prepared, self._batch_size)

"""The metric of every pair under many edge masks, with all that does not change kept at hand.

Every test of this room asks for the same few runs again and again (the whole model, the circuit, the circuit
without an edge), so each mask is run once per task and remembered.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from circuitvit.engine import (
    BatchRun,
    batch_runs,
    bytes_per_pair,
    choose_batch_size,
    masked_run,
    progress_bar,
)
from circuitvit.errors import DataError, OptionError
from circuitvit.graph import Circuit, EdgeMask, Graph
from circuitvit.tasks import PreparedTask

CACHE_BYTES = 2 * 2**30
"""Captured runs and references stay in memory up to this size, and are computed anew past it."""


@dataclass(frozen=True, eq=False)
class PairValues:
    """What a masked run gave for each pair.

    Attributes:
        values: the metric, `(pair,)`, in float64.
        tops: the index of the top class, `(pair,)`.
    """

    values: Float[NDArray[np.float64], " pair"]
    tops: Int64[NDArray[np.int64], " pair"]


class PairMeter:
    """Calls give the metric of each pair with only a circuit kept; every circuit is run once.

    "Kept" means kept in the clean run, all else ablated; for a denoising task, restored in the corrupt run.

    Args:
        prepared: the task.
        batch_size: pairs at once; chosen from the memory budget by default.
        progress: whether `measure` shows a bar.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> model = cv.load("catdog-tiny")
        >>> task = cv.Task(*catdog_pairs(2), metric=cv.logit_diff("cat", "dog"))
        >>> meter = PairMeter(task.prepare(model))
        >>> meter(model.graph.edge_mask).shape, bool((meter.whole > meter.nothing).all())
        ((2,), True)
    """

    def __init__(
        self, prepared: PreparedTask, *, batch_size: int | None = None, progress: bool = False
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise OptionError(f"batch_size must be at least 1, not {batch_size}")
        self.prepared = prepared
        self.progress = progress
        self.runs = 0
        self._batch_size = batch_size or choose_batch_size(prepared)
        fits = len(prepared) * bytes_per_pair(prepared) <= CACHE_BYTES
        self._cache = list(self._fresh()) if fits else None
        self._known: dict[bytes, PairValues] = {}

    def __len__(self) -> int:
        return len(self.prepared)

    def __call__(self, kept: EdgeMask) -> Float[NDArray[np.float64], " pair"]:
        """The metric with the edges of `kept` `(sender, receiver, group)` kept, `(pair,)`."""
        return self.measure([kept])[0].values

    @property
    def graph(self) -> Graph:
        return self.prepared.graph

    @property
    def whole(self) -> Float[NDArray[np.float64], " pair"]:
        """With every edge kept."""
        return self(self.graph.edge_mask)

    @property
    def nothing(self) -> Float[NDArray[np.float64], " pair"]:
        """With every edge ablated."""
        return self(np.zeros(self.graph.shape, dtype=bool))

    @property
    def effect(self) -> Float[NDArray[np.float64], " pair"]:
        """What there is to explain: whole minus nothing."""
        return self.whole - self.nothing

    def many(self, masks: Sequence[EdgeMask]) -> Float[NDArray[np.float64], "mask pair"]:
        """The metric of several masks."""
        if not masks:
            return np.zeros((0, len(self)))
        return np.stack([each.values for each in self.measure(masks)])

    def tops(self, kept: EdgeMask) -> Int64[NDArray[np.int64], " pair"]:
        """The top class of each pair with the edges of `kept` kept."""
        return self.measure([kept])[0].tops

    def measure(self, masks: Sequence[EdgeMask]) -> list[PairValues]:
        """Values and top classes of several masks; a batch's references are computed once for all of them.

        Raises:
            DataError: if the metric is NaN or infinite.
        """
        keys = [np.packbits(mask & self.graph.edge_mask).tobytes() for mask in masks]
        new = {key: mask for key, mask in zip(keys, masks, strict=True) if key not in self._known}
        if new:
            found = self._run([self._base_mask(mask) for mask in new.values()])
            self._known.update(zip(new, found, strict=True))
        return [self._known[key] for key in keys]

    def check(self, circuit: Circuit) -> None:
        """Refuse a circuit of another graph.

        Raises:
            OptionError: if it belongs to another.
        """
        if circuit.graph != self.graph:
            raise OptionError(f"the circuit belongs to {circuit.graph}, the task to {self.graph}")

    def _base_mask(self, kept: EdgeMask) -> EdgeMask:
        return self.graph.edge_mask & (~kept if self.prepared.denoising else kept)

    def _run(self, masks: list[EdgeMask]) -> list[PairValues]:
        self.runs += len(masks)
        values: list[list[Tensor]] = [[] for _ in masks]
        tops: list[list[Tensor]] = [[] for _ in masks]
        with progress_bar(len(masks) * len(self), "masked runs", self.progress) as bar:
            for run in self._cache if self._cache is not None else self._fresh():
                for place, mask in enumerate(masks):
                    logits = masked_run(run.sources, mask)
                    values[place].append(run.metric(logits).double().cpu())
                    tops[place].append(logits.argmax(dim=-1).cpu())
                    bar.update(len(run.batch.rows))
        joined = [
            PairValues(torch.cat(metric).numpy(), torch.cat(top).numpy())
            for metric, top in zip(values, tops, strict=True)
        ]
        for each in joined:
            self._refuse_bad_numbers(each.values)
        return joined

    def _refuse_bad_numbers(self, values: NDArray[np.float64]) -> None:
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise DataError(
                f"the metric {self.prepared.metric.label} is NaN or infinite for "
                f"{self.prepared.clean.names[bad[0]]} in a run with ablated edges: "
                "choose one that is finite for all logits"
            )

    def _fresh(self) -> Iterable[BatchRun]:
        return batch_runs(self.prepared, self._batch_size)

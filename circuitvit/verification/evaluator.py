"""Stand-in until engine.Evaluator is there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
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


@dataclass(frozen=True, eq=False)
class Measured:
    values: Float[NDArray[np.float64], " pair"]
    tops: Int64[NDArray[np.int64], " pair"]
    divergence: Float[NDArray[np.float64], " pair"] | None
    change: Float[NDArray[np.float64], " pair"]


class Evaluator:
    def __init__(
        self,
        prepared: PreparedTask,
        *,
        batch_size: int | None = None,
        memory: int | None = None,
        progress: bool = False,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise OptionError(f"batch_size must be at least 1, not {batch_size}")
        self.prepared = prepared
        self.progress = progress
        self.runs = 0
        self._batch_size = batch_size or choose_batch_size(prepared, memory)
        fits = len(prepared) * bytes_per_pair(prepared) <= (memory or CACHE_BYTES)
        self._cache = list(self._fresh()) if fits else None
        self._known: dict[bytes, Measured] = {}
        self._full: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prepared)

    def values(self, kept: EdgeMask) -> Float[NDArray[np.float64], " pair"]:
        return self.measure([kept])[0].values

    @property
    def graph(self) -> Graph:
        return self.prepared.graph

    @property
    def whole(self) -> Float[NDArray[np.float64], " pair"]:
        return self.values(self.graph.edge_mask)

    @property
    def nothing(self) -> Float[NDArray[np.float64], " pair"]:
        return self.values(np.zeros(self.graph.shape, dtype=bool))

    @property
    def effect(self) -> Float[NDArray[np.float64], " pair"]:
        return self.whole - self.nothing

    def many(self, masks: Sequence[EdgeMask]) -> Float[NDArray[np.float64], "mask pair"]:
        if not masks:
            return np.zeros((0, len(self)))
        return np.stack([each.values for each in self.measure(masks)])

    def tops(self, kept: EdgeMask) -> Int64[NDArray[np.int64], " pair"]:
        return self.measure([kept])[0].tops

    def measure(self, masks: Sequence[EdgeMask]) -> list[Measured]:
        keys = [np.packbits(mask & self.graph.edge_mask).tobytes() for mask in masks]
        new = {key: mask for key, mask in zip(keys, masks, strict=True) if key not in self._known}
        if new:
            if self._full is None:
                self._full = self._logits([self._base_mask(self.graph.edge_mask)])[0][0]
            self._known.update(zip(new, self._run([self._base_mask(m) for m in new.values()]), strict=True))
        return [self._known[key] for key in keys]

    def check_effect(self) -> None:
        from circuitvit.verification.faithfulness import require_effect

        names, label = self.prepared.clean.names, self.prepared.metric.label
        require_effect(self.whole, self.nothing, label=label, names=names)
        (none,) = self.measure([np.zeros(self.graph.shape, dtype=bool)])
        assert self._full is not None
        if none.change.max() <= 1e-5 * float(self._full.abs().max()):
            raise DataError(
                f"the logits are the same with and without the behaviour on all {len(self)} pair(s): "
                "are the clean and the corrupt images the same?"
            )

    def check(self, circuit: Circuit) -> None:
        if circuit.graph != self.graph:
            raise OptionError(f"the circuit belongs to {circuit.graph}, the task to {self.graph}")

    def _base_mask(self, kept: EdgeMask) -> EdgeMask:
        return self.graph.edge_mask & (~kept if self.prepared.denoising else kept)

    def _logits(self, masks: list[EdgeMask]) -> list[tuple[Tensor, Tensor]]:
        self.runs += len(masks)
        logits: list[list[Tensor]] = [[] for _ in masks]
        values: list[list[Tensor]] = [[] for _ in masks]
        with progress_bar(len(masks) * len(self), "masked runs", self.progress) as bar:
            for run in self._cache if self._cache is not None else self._fresh():
                for place, mask in enumerate(masks):
                    found = masked_run(run.sources, mask)
                    logits[place].append(found.double().cpu())
                    values[place].append(run.metric(found).double().cpu())
                    bar.update(len(run.batch.rows))
        return [(torch.cat(a), torch.cat(b)) for a, b in zip(logits, values, strict=True)]

    def _run(self, masks: list[EdgeMask]) -> list[Measured]:
        assert self._full is not None
        classes = bool(getattr(self.prepared.model, "has_classes", True))
        found = []
        for logits, metric in self._logits(masks):
            values = metric.numpy()
            bad = np.flatnonzero(~np.isfinite(values))
            if len(bad):
                raise DataError(
                    f"the metric {self.prepared.metric.label} is NaN or infinite for "
                    f"{self.prepared.clean.names[bad[0]]} in a run with ablated edges: "
                    "choose one that is finite for all logits"
                )
            log_full, log_circuit = F.log_softmax(self._full, dim=-1), F.log_softmax(logits, dim=-1)
            kl = (log_full.exp() * (log_full - log_circuit)).sum(dim=-1).clamp_min(0.0)
            change = (logits - self._full).abs().amax(dim=-1)
            found.append(
                Measured(
                    values,
                    logits.argmax(dim=-1).numpy(),
                    kl.numpy() if classes else None,
                    change.numpy(),
                )
            )
        return found

    def _fresh(self) -> Iterable[BatchRun]:
        return batch_runs(self.prepared, self._batch_size)

"""Runs of a prepared task: its baseline, and the model with everything outside a circuit ablated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitvit.engine.batching import bytes_per_pair, choose_batch_size
from circuitvit.engine.capture import Capture, capture, check_logits
from circuitvit.engine.masked import masked_run
from circuitvit.engine.progress import progress_bar
from circuitvit.engine.references import reference_source
from circuitvit.engine.sources import Sources
from circuitvit.errors import DataError, OptionError
from circuitvit.graph import Circuit, EdgeMask
from circuitvit.models import Model
from circuitvit.tasks import Batch, PreparedTask, Task, ready

HELD_BYTES = 8 * 2**30
"""Memory that the batches of a search may take together."""


@dataclass(frozen=True, eq=False)
class BatchRun:
    """A batch of a task with its base run captured and its reference outputs computed.

    Attributes:
        prepared: the task.
        batch: the pairs.
        sources: for masked runs.
        clean_logits: of the clean run, which some metrics compare with, `(batch, class)`.
    """

    prepared: PreparedTask
    batch: Batch
    sources: Sources
    clean_logits: Float[Tensor, "batch class"]

    @property
    def base(self) -> Capture:
        return self.sources.base

    def metric(self, logits: Float[Tensor, "*candidates batch class"]) -> Float[Tensor, "*candidates batch"]:
        """The task's metric of each image."""
        return self.prepared.metric(logits, self.clean_logits, self.batch.rows)


def batch_runs(prepared: PreparedTask, batch_size: int) -> Iterator[BatchRun]:
    """All pairs of a task, batch after batch, ready for masked runs.

    Raises:
        ModelError: if a run gives NaN or infinite logits.
        OptionError: if the batch size is not positive.
    """
    if batch_size < 1:
        raise OptionError(f"the batch size must be at least 1, not {batch_size}")
    model = prepared.model
    references = reference_source(prepared, batch_size)
    for batch in prepared.batches(batch_size):
        base = capture(model, batch.base)
        check_logits(base.logits, batch)
        reference, compacts = references.outputs(batch, base)
        sources = Sources(model, prepared.graph, base, reference, batch.members, compacts)
        yield BatchRun(prepared, batch, sources, clean_logits(prepared, batch, base.logits))


def held_runs(prepared: PreparedTask, batch_size: int) -> list[BatchRun]:
    """All batches of a task at once, for searches that come back to them thousands of times.

    Raises:
        DataError: if they would take more memory than `HELD_BYTES`; the message says how many pairs fit.
    """
    each = bytes_per_pair(prepared)
    if len(prepared) * each > HELD_BYTES:
        raise DataError(
            f"{len(prepared)} pairs would take {len(prepared) * each / 2**30:.0f} GiB of memory during the "
            f"search: give at most {max(1, HELD_BYTES // each)} pairs to search on, and verify on the others"
        )
    return list(batch_runs(prepared, batch_size))


def clean_logits(prepared: PreparedTask, batch: Batch, base_logits: Tensor) -> Float[Tensor, "batch class"]:
    """The logits of the clean run, whichever side of the pair is the base."""
    if not prepared.denoising:
        return base_logits.detach()
    assert batch.reference is not None, "denoising tasks have both sides"
    logits = prepared.model(batch.reference)
    check_logits(logits, batch)
    return logits


def kept_edges(prepared: PreparedTask, circuit: Circuit) -> EdgeMask:
    """The edges that keep the base run's outputs when a circuit is tested.

    Noising keeps the circuit and ablates the rest of the clean run. Denoising restores the circuit in the
    corrupt run: its edges get the reference (clean) outputs, so what is kept is its complement.

    Raises:
        OptionError: if the circuit belongs to another graph.
    """
    if circuit.graph != prepared.graph:
        raise OptionError(f"the circuit belongs to {circuit.graph}, the task to {prepared.graph}")
    return prepared.graph.edge_mask & ~circuit.kept if prepared.denoising else circuit.kept


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Logits and metrics of several edge masks on all pairs, and those of the whole and of the ablated model.

    Attributes:
        logits: `(mask, pair, class)`.
        values: the metric, `(mask, pair)`.
        all_logits: with the behaviour whole: noising, every edge kept; denoising, every edge restored.
        all_values: the metric of that, `(pair,)`.
        none_logits: with every edge ablated (or none restored).
        none_values: the metric of that, `(pair,)`.
    """

    logits: Float[Tensor, "mask pair class"]
    values: Float[Tensor, "mask pair"]
    all_logits: Float[Tensor, "pair class"]
    all_values: Float[Tensor, " pair"]
    none_logits: Float[Tensor, "pair class"]
    none_values: Float[Tensor, " pair"]


def evaluate(
    prepared: PreparedTask,
    masks: Sequence[EdgeMask],
    *,
    batch_size: int | None = None,
    progress: bool = False,
) -> Evaluation:
    """Run every mask on every pair; the references of a batch are computed once for all masks.

    Args:
        prepared: the task.
        masks: each `(sender, receiver, group)`, True for edges that keep the base run's outputs.
        batch_size: pairs at once; chosen from the memory budget by default.
        progress: whether to show a bar.

    Returns:
        Everything on the CPU, in the model's dtype.
    """
    size = choose_batch_size(prepared) if batch_size is None else batch_size
    graph = prepared.graph
    ends = [graph.edge_mask, np.zeros(graph.shape, dtype=bool)]
    if prepared.denoising:
        ends.reverse()
    logits, values = [], []
    with progress_bar((len(masks) + 2) * len(prepared), "masked runs", progress) as bar:
        for run_ in batch_runs(prepared, size):
            per_mask = []
            for mask in [*ends, *masks]:
                per_mask.append(masked_run(run_.sources, mask))
                bar.update(len(run_.batch.rows))
            stacked = torch.stack(per_mask)
            logits.append(stacked.cpu())
            values.append(run_.metric(stacked).cpu())
    joined, metric = torch.cat(logits, dim=1), torch.cat(values, dim=1)
    return Evaluation(joined[2:], metric[2:], joined[0], metric[0], joined[1], metric[1])


def run(
    model: Model,
    task: Task | PreparedTask,
    circuit: Circuit | None = None,
    *,
    ablate: Circuit | None = None,
    batch_size: int | None = None,
) -> Float[Tensor, "pair class"]:
    """The logits with everything outside `circuit` ablated, or with the edges of `ablate` ablated.

    In the denoising direction: with the circuit restored in the corrupt run (or everything but `ablate`).

    Raises:
        OptionError: if not exactly one of `circuit` and `ablate` is given.

    Example:
        >>> import circuitvit as cv  # doctest: +SKIP
        >>> logits = cv.run(
        ...     model, task, cv.Circuit.from_edges(model.graph, ["input->logits"])
        ... )  # doctest: +SKIP
    """
    if (circuit is None) == (ablate is None):
        raise OptionError("give either the circuit to keep, or ablate= with the edges to remove")
    wanted = circuit if circuit is not None else ~ablate if ablate is not None else None
    assert wanted is not None
    prepared = ready(model, task)
    return evaluate(prepared, [kept_edges(prepared, wanted)], batch_size=batch_size).logits[0]


# -- checks --------------------------------------------------------------------------------------


def check_effect(prepared: PreparedTask, all_values: Tensor, none_values: Tensor) -> None:
    """Refuse a task whose metric is the same with and without the behaviour.

    Raises:
        DataError: if the means differ by no more than rounding; the message gives both.
    """
    whole, nothing = float(all_values.double().mean()), float(none_values.double().mean())
    scale = max(float(all_values.abs().max()), float(none_values.abs().max()), 1e-6)
    if abs(whole - nothing) <= 1e-5 * scale:
        raise DataError(
            f"the metric {prepared.metric.label} is {whole:.6g} with the behaviour and "
            f"{nothing:.6g} without: "
            "there is nothing to explain. Choose images that differ in it, or another target and foil"
        )

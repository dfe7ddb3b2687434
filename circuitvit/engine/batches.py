"""The pairs of a task, batch after batch, ready for masked runs; and how many of them fit into memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvit._keywords import as_bytes
from circuitvit.engine.masked import Workspace, masked_run
from circuitvit.engine.processes import agreed
from circuitvit.engine.references import References, Sources, reference_source
from circuitvit.engine.runs import Capture, capture, check_logits
from circuitvit.engine.soft import soft_run
from circuitvit.errors import check_whole
from circuitvit.graph import EdgeMask
from circuitvit.models import Model
from circuitvit.tasks import Batch, PreparedTask

CPU_BUDGET = 2**30
"""Bytes that a batch may take on the CPU, and as many all batches that are held, unless told otherwise."""

CUDA_SHARE = 0.5
"""Share of a GPU's free memory that is the budget there."""

STREAM_COPIES = 24
"""Stream-sized tensors that one layer's forward and backward keep alive, from the widths of a ViT block."""


# -- the memory budget ---------------------------------------------------------------------------


def memory_budget(model: Model, memory: int | str | None = None) -> int:
    """Bytes that may be used: as given, or by default 1 GiB on the CPU and half of what is free on a GPU.

    Raises:
        OptionError: if what is given is not positive.
    """
    if memory is not None:
        return as_bytes(memory)
    if model.device.type == "cuda":
        return int(torch.cuda.mem_get_info(model.device)[0] * CUDA_SHARE)
    return CPU_BUDGET


def choose_batch_size(prepared: PreparedTask, memory: int | str | None = None) -> int:
    """The number of pairs to run at once: as many as a budget in bytes allows, never more than there are.
    Processes that share a task take the first one's.

    Raises:
        OptionError: if the budget is not positive.
    """
    budget = memory_budget(prepared.model, memory)
    chosen = max(1, min(len(prepared), budget // bytes_per_pair(prepared)))
    return agreed(prepared.model.batch_of(len(prepared), chosen), prepared.processes)


def bytes_per_pair(prepared: PreparedTask) -> int:
    """An estimate of the memory that scoring one pair takes: every sender's output, and a training step."""
    graph, model = prepared.graph, prepared.model
    widest = max(len(stage.receivers) for stage in graph.stages)
    streams = 2 * len(graph.senders) + 2 * widest + STREAM_COPIES * len(model.stages) // 2
    with torch.no_grad():
        stream = (model.bare or model).embed(prepared.base.take(0, 1).to(model.device, model.dtype))
    return streams * stream.numel() * stream.element_size()


# -- batches -------------------------------------------------------------------------------------


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

    def logits(self, kept: EdgeMask, room: Workspace | None = None) -> Float[Tensor, "batch class"]:
        """A masked run, whose senders' outputs stay in the room given, for replays; not remembered."""
        return masked_run(self.sources, kept, workspace=room)

    def metric(self, logits: Float[Tensor, "*candidates batch class"]) -> Float[Tensor, "*candidates batch"]:
        """The task's metric of each image."""
        return self.prepared.metric(logits, self.clean_logits, self.batch.rows)


def batch_runs(prepared: PreparedTask, batch_size: int) -> Iterator[BatchRun]:
    """All pairs of a task, batch after batch, ready for masked runs; none is kept.

    Raises:
        ModelError: if a run gives NaN or infinite logits.
        OptionError: if the batch size is not positive.
    """
    check_whole("the batch size (batch_size)", batch_size)
    references = reference_source(prepared, batch_size)
    for batch in prepared.batches(batch_size):
        yield batch_run(prepared, batch, references)


def batch_run(prepared: PreparedTask, batch: Batch, references: References) -> BatchRun:
    """One batch, ready for masked runs."""
    base = capture(prepared.model, batch.base)
    check_logits(base.logits, batch)
    sources = Sources(prepared.model, prepared.graph, base, references.make(batch, base), batch.members)
    return BatchRun(prepared, batch, sources, clean_logits(prepared, batch, base.logits))


def free_logits(
    prepared: PreparedTask, references: References, images: Float[Tensor, "batch *shape"], kept: EdgeMask
) -> Float[Tensor, "batch class"]:
    """The logits of images that are none of the task's, some edges ablated; differentiable by the images.

    Args:
        prepared: whose ablation and token groups are the same for all images.
        references: of its ablation.
        images: on the model's device and in its dtype.
        kept: `(sender, receiver, group)`.
    """
    model, batch = prepared.model, replace(prepared.batch(range(1)), base=images)
    base, source = capture(model, images.detach()), model.stages[0]
    base = replace(base, compacts=(source.write(source.read(images)), *base.compacts[1:]))
    sources = Sources(model, prepared.graph, base, references.make(batch, base), batch.members)
    return soft_run(sources, torch.tensor(kept, dtype=model.dtype, device=model.device))


def clean_logits(prepared: PreparedTask, batch: Batch, base_logits: Tensor) -> Float[Tensor, "batch class"]:
    """The logits of the clean run, whichever side of the pair is the base."""
    if not prepared.denoising:
        return base_logits.detach()
    assert batch.reference is not None, "denoising tasks have both sides"
    logits = prepared.model(batch.reference)
    check_logits(logits, batch)
    return logits

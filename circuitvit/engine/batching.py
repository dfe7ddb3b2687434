"""How many pairs to run at once: as many as a memory budget allows, never more than help."""

from __future__ import annotations

import torch

from circuitvit.errors import OptionError
from circuitvit.tasks import PreparedTask

CPU_BUDGET = 2**30
"""Bytes that a batch may take on the CPU unless told otherwise."""

CUDA_SHARE = 0.5
"""Share of a GPU's free memory that a batch may take unless told otherwise."""

STREAM_COPIES = 24
"""Stream-sized tensors that one layer's forward and backward keep alive, from the widths of a ViT block."""


def bytes_per_pair(prepared: PreparedTask) -> int:
    """An estimate of the memory that scoring one pair takes: every sender's output, and a training step."""
    graph, model = prepared.graph, prepared.model
    widest = max(len(stage.receivers) for stage in graph.stages)
    streams = 2 * len(graph.senders) + 2 * widest + STREAM_COPIES * len(model.stages) // 2
    return streams * _stream_bytes(prepared)


def choose_batch_size(prepared: PreparedTask, memory: int | None = None) -> int:
    """The number of pairs to run at once.

    Args:
        prepared: the task.
        memory: budget in bytes; by default 1 GiB on the CPU and half of what is free on a GPU.

    Raises:
        OptionError: if the budget is not positive.
    """
    if memory is not None and memory <= 0:
        raise OptionError(f"the memory budget must be a positive number of bytes, not {memory!r}")
    if memory is None:
        device = prepared.model.device
        memory = int(torch.cuda.mem_get_info(device)[0] * CUDA_SHARE) if device.type == "cuda" else CPU_BUDGET
    return max(1, min(len(prepared), memory // bytes_per_pair(prepared)))


def _stream_bytes(prepared: PreparedTask) -> int:
    """Bytes of one image's residual stream."""
    model = prepared.model
    image = prepared.base.take(0, 1).to(model.device, model.dtype)
    with torch.no_grad():
        stream = model.embed(image)
    return stream.numel() * stream.element_size()

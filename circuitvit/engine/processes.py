"""Pairs shared among processes, which talk by PyTorch's own `torch.distributed`.

`torchrun --nproc-per-node N` starts N copies of a program. Each takes an equal run of the pairs; what they
find is added up, in float64, so that all have the sum over all pairs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as distributed
from numpy.typing import NDArray

from circuitvit.errors import OptionError
from circuitvit.tasks import PreparedTask


def launched() -> int:
    """How many processes `torchrun` has started; 1 where it has not."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@contextmanager
def joined(device: str | torch.device) -> Iterator[int]:
    """A group of all processes that `torchrun` has started.

    Args:
        device: where the work is done; the group talks through gloo on the CPU, through nccl on GPUs.

    Yields:
        The number of this process, from 0.
    """
    distributed.init_process_group("nccl" if torch.device(device).type == "cuda" else "gloo")
    try:
        yield distributed.get_rank()
    finally:
        distributed.destroy_process_group()


def own_share(prepared: PreparedTask) -> PreparedTask:
    """The task whose batches are those of this process alone.

    Raises:
        OptionError: if no group has been joined, or there are fewer pairs than processes.
    """
    if not distributed.is_initialized():
        raise OptionError(
            "no group of processes has been joined: start the program with torchrun, and call "
            "torch.distributed.init_process_group first"
        )
    rank, count = distributed.get_rank(), distributed.get_world_size()
    if len(prepared) < count:
        raise OptionError(
            f"{len(prepared)} pairs cannot be shared among {count} processes: start at most one for each pair"
        )
    return prepared.share(rank, count)


def summed(values: NDArray[np.float64], device: torch.device) -> NDArray[np.float64]:
    """The sum of all processes' arrays, in every process."""
    total = torch.from_numpy(np.ascontiguousarray(values)).to(device)
    distributed.all_reduce(total)
    return total.cpu().numpy()

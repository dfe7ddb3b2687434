"""Work shared among processes, which talk by PyTorch's own `torch.distributed`.

`torchrun --nproc-per-node N` starts N copies of a program, and all of them go the same way. Where a task is
marked for it (`PreparedTask.processes`), each runs a share of what there is to run, and what was found is
exchanged before anybody looks at it, in the order in which one process would have found it: so all decide
alike, and as one process does. What depends on a clock or a file, the first process decides for all.

A process that dies closes its connections, at which the others end with a `ProcessError`; one that is silent
is waited for an hour.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import TypeVar, cast

import numpy as np
import torch
import torch.distributed as distributed
from numpy.typing import NDArray
from torch import Tensor

from circuitvit.errors import CircuitViTError, ProcessError
from circuitvit.tasks import PreparedTask

PATIENCE = timedelta(hours=1)
"""How long a process waits for the others: shares are not equally hard, nor devices equally fast."""

T = TypeVar("T")


@contextmanager
def joined() -> Iterator[int]:
    """A group of all processes that `torchrun` has started.

    What is exchanged is small, and goes through gloo whatever device the work is done on.

    Yields:
        The number of this process, from 0.

    Raises:
        ProcessError: within, if another process ends before its time.
    """
    distributed.init_process_group("gloo", timeout=PATIENCE)
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _ended_by_torchrun) if main else None
    try:
        yield distributed.get_rank()
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
        distributed.destroy_process_group()


def place_in_group(processes: bool = True) -> tuple[int, int]:
    """The number of this process, and how many share the work; `(0, 1)` where `processes` do not."""
    return (distributed.get_rank(), distributed.get_world_size()) if processes else (0, 1)


def is_first(processes: bool = True) -> bool:
    """Whether this process decides, and writes files, for all."""
    return place_in_group(processes)[0] == 0


def own_share(prepared: PreparedTask) -> PreparedTask:
    """The task whose batches are those of this process alone; of fewer pairs than processes some get none."""
    return prepared.share(*place_in_group(prepared.processes))


def own_part(count: int, processes: bool = True) -> slice:
    """Which of so many things in a row are this process's: as equal as can be, and none of too few."""
    number, among = place_in_group(processes)
    return slice(count * number // among, count * (number + 1) // among)


# -- what is said --------------------------------------------------------------------------------


def summed(values: NDArray[np.float64], processes: bool = True) -> NDArray[np.float64]:
    """The sum of all processes' arrays, in every process.

    Where each has filled in other places and left the rest 0, this puts them together, to the last bit.
    """
    if not processes:
        return values
    total = torch.from_numpy(np.array(values, dtype=np.float64)).to(_wire())
    _exchange(lambda: distributed.all_reduce(total))
    return total.cpu().numpy()


def agreed(value: T, processes: bool = True) -> T:
    """The first process's value, in every process; the value itself where `processes` do not share the work.

    Args:
        value: small, such as a number of steps that a clock gave.
        processes: whether all do this.
    """
    if not processes:
        return value
    held = [value]
    _exchange(lambda: distributed.broadcast_object_list(held, src=0))
    return held[0]


def once(make: Callable[[], T], processes: bool = True) -> T:
    """What the first process makes, in every process; if it refuses, all refuse."""
    if not processes:
        return make()
    found: T | CircuitViTError | None = None
    if is_first():
        try:
            found = make()
        except CircuitViTError as error:
            found = error
    found = agreed(found)
    if isinstance(found, CircuitViTError):
        raise found
    return cast(T, found)


def spread(tensor: Tensor, source: int) -> Tensor:
    """What one of the processes has, in every process.

    Args:
        tensor: it, or in the others any of its shape and kind.
        source: the number of the process.
    """
    sent = tensor.contiguous().view(torch.uint8).to(_wire())  # not every kind of number can be sent
    _exchange(lambda: distributed.broadcast(sent, src=source))
    return sent.to(tensor.device).view(tensor.dtype).view(tensor.shape)


def _wire() -> torch.device:
    """Where tensors must be to be exchanged."""
    alone = distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if alone else torch.device("cpu")


def _exchange(send: Callable[[], object]) -> None:
    try:
        send()
    except RuntimeError as error:
        if signal.getsignal(signal.SIGTERM) is _ended_by_torchrun:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it comes now, and what was done is to be saved
        silent = "timed out" in str(error).lower()
        what = f"has not answered for {PATIENCE}" if silent else "has ended"
        raise ProcessError(
            f"another process of this run {what}, and without it there is no result: what it was killed by, "
            "or refused, is said by torchrun or by itself"
        ) from error


def _ended_by_torchrun(number: int, frame: FrameType | None) -> None:
    """`torchrun` ends all processes when one of them has ended."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise ProcessError(
        "this run was told to end, as torchrun does when another of its processes has ended: what that was "
        "killed by, or refused, is said by torchrun or by itself"
    )

"""Files are read while the model runs: by a thread for each core, and a batch ahead of the one at work.

Decoders leave Python's lock while they work, so threads are enough; and what they take for a file comes from
heaps of their own, so that it leaves no gaps between the tensors of a run. Order, values and errors are those
of reading one file after the other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from torch import Tensor

from circuitvit.models import Model
from circuitvit.tasks.inputs import Images

MOST_THREADS = 8
"""Beyond that, files come faster than any model takes them."""

T = TypeVar("T")
Made = TypeVar("Made")


def in_threads(work: Callable[[T], Made], items: Sequence[T]) -> Iterator[Made]:
    """What is made of each item, in order; the first of them that fails ends it with its own error."""
    count = min(cores(), len(items), MOST_THREADS)
    if count < 2:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(count, "circuitvit-files") as pool:
        yield from pool.map(work, items)


def in_turn(read: Callable[[range], Made], parts: Sequence[range], of: Iterable[Images]) -> Iterator[Made]:
    """What is read of each part of some images, in order; of slow ones the next while one is worked on."""
    if not any(images.slow for images in of):
        yield from map(read, parts)
        return
    with ThreadPoolExecutor(1, "circuitvit-ahead") as pool:
        coming = None
        for rows in parts:
            before, coming = coming, pool.submit(read, rows)
            if before is not None:
                yield before.result()
        if coming is not None:
            yield coming.result()


def ready(images: Images, rows: range, model: Model) -> Tensor:
    """Some images in the model's numbers, on the CPU, where a GPU can fetch them while it is at work."""
    taken = images.take(rows.start, rows.stop).to(model.dtype)
    return taken.pin_memory() if model.device.type == "cuda" else taken


def cores() -> int:
    """Cores for each process: those that this one may use, shared with the others that `torchrun` started."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))

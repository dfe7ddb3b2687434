"""Keywords that mean the same in every function that runs a model: seed, batch_size, memory and progress.

They stand last, in this order, and can only be given by name. What makes no sense is refused before any work,
with the same words everywhere. docs/concepts.md says what each of them means.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from inspect import signature
from numbers import Integral
from typing import Any, ParamSpec, TypeVar

from circuitvit.errors import OptionError, check_whole

P = ParamSpec("P")
R = TypeVar("R")


def running(function: Callable[P, R]) -> Callable[P, R]:
    """A function that runs a model, made to refuse such keywords as make no sense before it begins.

    None is for those whose default it is.

    Example:
        >>> @running
        ... def look(*, batch_size: int | None = None) -> None: ...
        >>> look(batch_size=0)
        Traceback (most recent call last):
        ...
        circuitvit.errors.OptionError: the batch size (batch_size) must be at least 1, not 0
    """
    taken = signature(function).parameters
    checks = {name: check for name, check in CHECKS.items() if name in taken}
    optional = {name for name in checks if taken[name].default is None}

    @wraps(function)
    def checked(*given: P.args, **keywords: P.kwargs) -> R:
        said: dict[str, Any] = keywords
        for name, check in checks.items():
            if name in said and not (said[name] is None and name in optional):
                said[name] = check(said[name])
        return function(*given, **keywords)

    return checked


def check_seed(seed: object) -> object:
    """A seed as given; refuse anything but a whole number of 32 bits: scikit-learn takes no larger one."""
    check_whole("a seed", seed, 0)
    if isinstance(seed, Integral) and int(seed) >= 2**32:
        raise OptionError(f"a seed must be below 2**32 = {2**32:,}, not {seed}")
    return seed


def check_batch_size(size: object) -> object:
    """A batch size as it is given; refuse anything but a whole number from 1 on."""
    check_whole("the batch size (batch_size)", size)
    return size


def as_bytes(memory: object) -> int:
    """A memory budget in bytes; refuse all but a positive whole number and a text that is one with a unit.

    Example:
        >>> as_bytes("512MiB"), as_bytes(1000)
        (536870912, 1000)
    """
    if isinstance(memory, str):
        return in_bytes(memory)
    if isinstance(memory, bool) or not isinstance(memory, Integral) or int(memory) <= 0:
        raise OptionError(f"the memory budget (memory) must be a positive number of bytes, not {memory!r}")
    return int(memory)


def check_progress(progress: object) -> object:
    """Whether there is a bar, as it is given; refuse anything but yes or no."""
    if not isinstance(progress, bool):
        raise OptionError(f"whether to show a bar (progress) is True or False, not {progress!r}")
    return progress


def check_processes(processes: object) -> None:
    """Refuse to share work among processes where there are none."""
    if not isinstance(processes, bool):
        raise OptionError(f"whether processes share the work (processes) is True or False, not {processes!r}")
    if not processes:
        return
    import torch.distributed as distributed  # only now: texts of the command line are made without torch

    if not (distributed.is_available() and distributed.is_initialized()):
        raise OptionError(
            "no group of processes has been joined: start the program with torchrun, and work within "
            "cv.engine.joined()"
        )


CHECKS: dict[str, Callable[[object], object]] = {
    "seed": check_seed,
    "batch_size": check_batch_size,
    "memory": as_bytes,
    "progress": check_progress,
}
"""In the order in which signatures have them: each gives the keyword as the function gets it."""


# -- sizes -------------------------------------------------------------------------------------------

_AMOUNT = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", re.IGNORECASE)
_BYTES = {
    "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


def in_bytes(text: str) -> int:
    """Bytes from "2GB" (10^9), "512MiB" (2^20) or "1000B".

    Raises:
        OptionError: if it is no positive size with a unit.

    Example:
        >>> in_bytes("2GB"), in_bytes("1.5 KiB")
        (2000000000, 1536)
    """
    match = _AMOUNT.fullmatch(text)
    unit = _BYTES.get(match[2].lower()) if match else None
    size = round(float(match[1]) * unit) if match and unit else 0
    if size < 1:
        raise OptionError(f"memory= takes a size such as 500MB, 2GB or 1GiB, not {text!r}")
    return size

"""Commands that `torchrun` has started several times: long ones share the work, all others are refused.

Every process runs the whole command; what it runs of the model is shared by the library. The first one alone
makes folders, writes files and prints.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import circuitvit as cv
from circuitvit.errors import OptionError


def many() -> bool:
    """Whether `torchrun` has started several processes."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_other() -> bool:
    """Whether this is none but the first of several processes, which speaks and writes for all."""
    return many() and os.environ["RANK"] != "0"


def own_device(device: str) -> str:
    """Where the model runs: of several GPUs this process's own."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" and many() else device


@contextmanager
def together(shares: bool) -> Iterator[None]:
    """The work of a command, by as many processes as there are.

    Args:
        shares: whether the command's work can be shared.

    Raises:
        OptionError: if it cannot and there are several.
        ProcessError: if another process ends before its time.
    """
    if not many():
        yield
        return
    if not shares:
        raise OptionError("this command has no work to share among processes: start it without torchrun")
    with cv.engine.joined():
        yield

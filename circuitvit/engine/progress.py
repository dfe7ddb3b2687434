"""One way to show progress: a bar for work of more than a second, nothing when asked to be silent."""

from __future__ import annotations

import sys
from typing import NoReturn

from tqdm.auto import tqdm

DELAY = 1.0
"""Seconds that work may take before a bar appears."""


def progress_bar(total: int, description: str, show: bool, unit: str = "it") -> "tqdm[NoReturn]":
    """A bar to be advanced by `update`; used as a context manager.

    Args:
        total: number of steps.
        description: what is being done.
        show: False for silence.
        unit: of the steps.
    """
    hidden = not (show and _is_watched())
    return tqdm(total=total, desc=description, disable=hidden, delay=DELAY, leave=False, unit=unit)


def _is_watched() -> bool:
    """Whether somebody sees the bar: in a terminal or a notebook, not in a log file."""
    return "ipykernel" in sys.modules or sys.stderr.isatty()

"""Signs of life of work that takes long: a bar where somebody watches it, a line now and then where not.

A bar rewrites its line, which only a terminal or a notebook can. Anywhere else, such as a log file or a job
on a cluster, a line is written to stderr every half minute. Both are silent where the work is over soon, and
with `progress=False`.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import NoReturn

from tqdm import tqdm
from tqdm.auto import tqdm as watched_bar

DELAY = 1.0
"""Seconds that work may take before a bar appears."""

EVERY = 30.0
"""Seconds between two lines of a log, and before the first."""

LINE = "{desc}: {percentage:.0f} % ({n_fmt} of {total_fmt}{unit}), {elapsed} gone, {remaining} left{postfix}"
"""A line of a log; times are minutes and seconds."""


def progress_bar(total: int, description: str, show: bool, unit: str = "it") -> tqdm[NoReturn]:
    """A bar, or lines in a log, to be advanced by `update`; used as a context manager.

    Args:
        total: number of steps.
        description: what is being done.
        show: False for silence.
        unit: of the steps.
    """
    silent = not show or os.environ.get("RANK", "0") != "0"  # of several processes one speaks
    if _is_watched():
        return watched_bar(total=total, desc=description, disable=silent, delay=DELAY, leave=False, unit=unit)
    return tqdm(
        total=total,
        desc=description,
        disable=silent,
        unit=f" {unit}s" if unit != "it" else "",
        file=_Lines(),
        bar_format=LINE,
        mininterval=EVERY,
        delay=EVERY,
        miniters=1,
    )


def announce(text: str, show: bool) -> None:
    """Say something of work that takes long before it starts, to whoever would see its progress."""
    if show and os.environ.get("RANK", "0") == "0":
        tqdm.write(text, file=sys.stderr if _is_watched() else _Lines())


class _Lines(io.TextIOBase):
    """What a bar is drawn into where it cannot rewrite its line: each drawing is a line of stderr.

    Work goes on where nobody can be told of it: a service has no stderr, and a pipe may have been closed.
    """

    def write(self, text: str) -> int:
        line = text.strip()
        if line and sys.stderr is not None:
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(f"{line}\n")
                sys.stderr.flush()
        return len(text)


def _is_watched() -> bool:
    """Whether somebody sees a bar: in a terminal or a notebook, not in a log file."""
    if sys.stderr is None or sys.stderr.closed:
        return False
    return "ipykernel" in sys.modules or sys.stderr.isatty()

"""What the tests of the command line share besides fixtures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

N_PAIRS = 6
"""How many image pairs the fixture `pairs` draws."""

Run = Callable[..., Any]
"""Runs a command: `run("draw", path, ...)` gives a result with `exit_code`, `stdout`, `stderr`, `output`."""

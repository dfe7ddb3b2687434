"""Ratios of two costs, measured in turns in one process so that a noisy machine troubles both alike."""

from __future__ import annotations

import gc
import json
import multiprocessing
import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch

RESULTS = Path("out/bench.json")
"""Where measurements are gathered, by the name of what was measured."""

T = TypeVar("T")
Work = Callable[[], object]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: what was measured.
        floor: what it was held against.
        ratio: of the two, a median; for speed-ups how many times faster.
        bar: what it has to reach.
        stretch: what would be fine.
        seconds: of one run of the work.
        floor_seconds: of the floor.
        peak_mib: the process's peak memory until then, in MiB.
        faster: whether a larger ratio is better.
    """

    name: str
    floor: str
    ratio: float
    bar: float
    stretch: float
    seconds: float
    floor_seconds: float
    peak_mib: float
    faster: bool = False

    @property
    def verdict(self) -> str:
        def reached(bound: float) -> bool:
            return self.ratio >= bound if self.faster else self.ratio <= bound

        return "stretch" if reached(self.stretch) else "met" if reached(self.bar) else "missed"

    def cells(self) -> tuple[str, ...]:
        unit = " x faster" if self.faster else ""
        return (
            self.name,
            self.floor,
            f"{self.floor_seconds:.3g} s",
            f"{self.seconds:.3g} s",
            f"**{self.ratio:.2f}{unit}**",
            f"{self.bar:g} / {self.stretch:g}",
            self.verdict,
            f"{self.peak_mib:,.0f} MiB",
        )


HEADER = ("work", "floor", "floor's time", "time", "ratio", "bar / stretch", "verdict", "peak memory")


def interleaved(
    work: Work, floor: Work, repeats: int = 9, clock: Clock = time.perf_counter
) -> tuple[float, float, float]:
    """The median ratio, and the median seconds of the work and of its floor; a first turn warms up."""
    turns = []
    for _ in range(repeats + 1):
        gc.collect()
        turns.append((seconds(floor, clock), seconds(work, clock)))
    turns = turns[1:]
    ratio = statistics.median(spent / least for least, spent in turns)
    return ratio, statistics.median(t for _, t in turns), statistics.median(t for t, _ in turns)


def seconds(work: Work, clock: Clock = time.perf_counter) -> float:
    """Time of one call, wall time unless told otherwise, with a GPU's queue run dry."""
    _wait()
    start = clock()
    work()
    _wait()
    return clock() - start


def alone(measure: Callable[..., T], *given: object) -> T:
    """What a function gives in a process of its own, since a process's peak of memory never falls."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, given)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_mib() -> float:
    """The most memory that this process has had, or that a GPU gave it."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # what a parent has had counts in `ru_maxrss`, here it does not
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def current_mib() -> float:
    """The memory that this process has now, or that a GPU has given it; peaks count from here on."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_mib()
    Path("/proc/self/clear_refs").write_text("5")  # the peak falls to what is used now
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) / 1024


def machine() -> str:
    """What the figures were taken on, for the page."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} cores"
    return f"{device} ({platform.machine()}), Python {platform.python_version()}, torch {torch.__version__}"


def keep(rows: Sequence[Row]) -> None:
    """Print rows as a Markdown table and add them to the results."""
    print(markdown(rows), flush=True)
    known = {row.name: row for row in [*kept(), *rows]}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(), "rows": [asdict(row) for row in known.values()]}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


def kept() -> list[Row]:
    """The results of this and earlier runs."""
    return [Row(**row) for row in json.loads(RESULTS.read_text())["rows"]] if RESULTS.exists() else []


def markdown(rows: Sequence[Row]) -> str:
    """The table."""
    lines = [HEADER, ("---",) * len(HEADER), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

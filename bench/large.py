"""A ViT-L/14 at 257 tokens: memory of every method, the time told beforehand, and what Python costs.

Its graph has 231,877 edges. A whole `exact`, ACDC or `find` takes days on two cores, so each piece of work
runs for so many seconds of processor time in a process of its own and is then stopped; memory is taken in the
first of them. A profile of the piece tells what share of the time is spent outside of torch's own operations.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import io
import pstats
import signal
import time
from collections.abc import Callable
from types import FrameType

import torch

import circuitvit as cv
from bench._timing import alone, peak_mib
from circuitvit.models.timm_import import import_timm
from circuitvit.tasks import PreparedTask

NAME = "vit_large_patch14_224"

WORKS: dict[str, Callable[[PreparedTask], object]] = {
    "eap": lambda task: cv.attribute(task.model, task, "eap"),
    "local": lambda task: cv.attribute(task.model, task, "local"),
    "hybrid": lambda task: cv.attribute(task.model, task, "hybrid"),
    "exact": lambda task: cv.attribute(task.model, task, "exact"),
    "acdc": lambda task: cv.acdc(task.model, task, tau=1e-7),
    "find": lambda task: cv.find(task.model, task, within="1h"),
}


class _Enough(BaseException):
    """The processor time that was given is spent."""


def measure(name: str, seconds: float) -> str:
    """One row: what was said beforehand, the processor time, Python's share of it, and the peak."""
    torch.manual_seed(0)
    module = import_timm().create_model(NAME, num_classes=10).eval().requires_grad_(False)
    clean, corrupt = torch.randn(2, 1, 3, 224, 224).unbind()
    task = cv.Task(clean, corrupt, metric=cv.logit_diff(0, 1)).prepare(cv.wrap(module))
    assert task.model.weights_hash  # which reads all weights once
    profile, said, ended = cProfile.Profile(), io.StringIO(), "stopped"

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Enough

    signal.signal(signal.SIGPROF, stop)
    begin = time.process_time()
    with contextlib.suppress(_Enough), contextlib.redirect_stderr(said):
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            profile.runcall(WORKS[name], task)
            ended = "whole"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    spent = time.process_time() - begin
    told = next((line for line in said.getvalue().splitlines() if "at the speed of now" in line), "-")
    return f"| {name} | {told} | {spent:.0f} s, {ended} | {outside(profile):.1%} | {peak_mib():,.0f} MiB |"


def outside(profile: cProfile.Profile) -> float:
    """The share of a profile's time that is not spent in torch's own operations."""
    times = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    inside = sum(own for (_, _, name), (_, _, own, _, _) in times.items() if "torch." in name)
    return 1 - inside / sum(own for _, _, own, _, _ in times.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", choices=WORKS, nargs="*", default=list(WORKS))
    parser.add_argument("--seconds", type=float, default=120.0, help="of processor time for each")
    asked = parser.parse_args()
    print(f"{NAME}, 1 pair, 231,877 edges, {torch.get_num_threads()} threads")
    print("| work | told beforehand | ran | outside of torch | peak |\n| --- | --- | --- | --- | --- |")
    for name in asked.work:
        print(alone(measure, name, asked.seconds), flush=True)


if __name__ == "__main__":
    main()

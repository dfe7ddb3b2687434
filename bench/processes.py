"""Two processes against one: exact effects of one pair, and the verification of a circuit on sixteen.

Needs the real weights and photographs. Times are of the wall clock, each the median of several runs in turn,
and mean something only where nothing else runs on two cores; processor times of the busiest process beside
them are less disturbed by others.

    python -m bench processes
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import circuitvit as cv
from bench._photographs import draw_pairs, load_model
from circuitvit.tasks import PreparedTask

PAIRS = 16
RUNS = int(os.environ.get("BENCH_RUNS", "3"))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for count in (1, 2):
            out = Path(folder) / str(count)
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
            command = [sys.executable, *launch, "-m", "bench.processes", "--worker", str(out)]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            found[count] = [json.loads(Path(f"{out}_{number}.json").read_text()) for number in range(count)]
    print("| work | one process | two processes | wall | processor | largest difference |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, one in found[1][0].items():
        two = [each[name] for each in found[2]]
        wall = [median(one["wall"]), max(median(each["wall"]) for each in two)]
        processor = [median(one["processor"]), max(median(each["processor"]) for each in two)]
        assert all(each["values"] == two[0]["values"] for each in two), "the processes differ"
        difference = np.abs(np.array(one["values"]) - np.array(two[0]["values"])).max()
        print(
            f"| {name} | {wall[0]:.1f} s | {wall[1]:.1f} s | **{wall[1] / wall[0]:.2f}** "
            f"| {processor[1] / processor[0]:.2f} | {difference / np.abs(one['values']).max():.1g} |"
        )


def worker(out: str) -> None:
    """One of the processes: the times and results of both pieces of work."""
    torch.set_num_threads(1)
    with cv.engine.joined() as number:
        model = load_model()
        pairs = draw_pairs(model, PAIRS, seed=0)
        one, many = (_task(model, pairs[:n]) for n in (1, PAIRS))
        circuit = cv.attribute(model, many, "local", progress=False).connected(200)

        def exact() -> list[float]:
            return list(cv.attribute(model, one, "exact", progress=False).to_dict().values())

        def verify() -> list[float]:
            report = cv.verify(model, many, circuit, progress=False)
            assert report.task.random is not None
            return [pair.circuit for pair in report.task.pairs] + list(report.task.random.faithfulness)

        work = {"exact effects, one pair": exact, f"verification, {PAIRS} pairs": verify}
        found = {name: _timed(each) for name, each in work.items()}
        Path(f"{out}_{number}.json").write_text(json.dumps(found))


def _task(model: cv.Model, pairs: list[tuple[Path, Path]]) -> PreparedTask:
    clean, corrupt = ([pair[side] for pair in pairs] for side in (0, 1))
    task = cv.Task(clean, corrupt, metric=cv.logit_diff("tabby", "Border collie"))
    return task.prepare(model, processes=True)


def _timed(work: Callable[[], list[float]]) -> dict[str, Any]:
    walls, processors = [], []
    for _ in range(RUNS):
        wall, processor = time.perf_counter(), time.process_time()
        values = work()
        walls.append(time.perf_counter() - wall)
        processors.append(time.process_time() - processor)
    return {"wall": walls, "processor": processors, "values": values}


if __name__ == "__main__":
    worker(sys.argv[2]) if "--worker" in sys.argv else main()

"""Peak memory over the model's own against the number of edges, of pairs and of processes.

Edges: untrained ViTs of 50 tokens, one pair, so that what grows is the graph. Pairs and processes: the
bundled model on drawn pictures that are kept as files, in batches of 32. Each figure is of a process of its
own, since a process's peak never falls; of several processes it is the largest.

    python -m bench memory_growth
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

import circuitvit as cv
from bench._timing import alone, current_mib, peak_mib
from bench.streams import BATCH, MEMORY, draw
from circuitvit.engine import batch_runs, masked_run
from circuitvit.models.timm_import import import_timm
from circuitvit.tasks import PreparedTask

SHAPES = {
    "2,845 edges, as ViT-Ti": (192, 12, 3),
    "8,533 edges, as ViT-S": (384, 12, 6),
    "32,936 edges, as ViT-B": (768, 12, 12),
    "231,877 edges, as ViT-L": (1024, 24, 16),
}
"""Width, depth and heads."""

PAIRS = (64, 256, 1024)
PROCESSES = (1, 2, 4)

T = TypeVar("T")
Work = Callable[[cv.Model, PreparedTask], object]


def _half(model: cv.Model, task: PreparedTask) -> object:
    """One masked run of half of all edges."""
    kept = model.graph.edge_mask & (np.random.default_rng(0).random(model.graph.shape) < 0.5)
    (run,) = batch_runs(task, len(task))
    return masked_run(run.sources, kept)


def _eap(model: cv.Model, task: PreparedTask) -> object:
    return cv.attribute(model, task, "eap", batch_size=BATCH, progress=False)


def _verify(model: cv.Model, task: PreparedTask) -> object:
    circuit = cv.Circuit.from_edges(model.graph, list(model.graph.edges)[::5]).pruned()
    return cv.verify(model, task, circuit, n_random=5, batch_size=BATCH, memory=MEMORY, progress=False)


def _find(model: cv.Model, task: PreparedTask) -> object:
    plan = cv.Plan(steps=20, trim_runs=50, batch_size=BATCH)
    return cv.find(model, task, plan=plan, memory=MEMORY, progress=False)


WORKS: dict[str, Work] = {"eap": _eap, "half of the edges, masked": _half, "verify": _verify, "find": _find}


def of_edges(shape: tuple[int, int, int], work: str) -> float:
    """MiB over the model's own, and over what wrapping it has taken."""
    width, depth, heads = shape
    torch.manual_seed(0)
    vit = import_timm().models.VisionTransformer(
        img_size=224, patch_size=32, embed_dim=width, depth=depth, num_heads=heads
    )
    model = cv.wrap(vit.eval().requires_grad_(False))
    clean, corrupt = torch.randn(2, 1, 3, 224, 224).unbind()
    return _grown(model, cv.Task(clean, corrupt, metric=cv.logit_diff(0, 1)), work, processes=False)


def of_pairs(folder: Path, count: int, work: str, processes: bool = False) -> float:
    """MiB over the model's own."""
    sides = [sorted((folder / side).iterdir())[:count] for side in ("clean", "corrupt")]
    task = cv.Task(*sides, metric=cv.logit_diff("cat", "dog"))
    return _grown(cv.load("catdog-tiny"), task, work, processes)


def _grown(model: cv.Model, task: cv.Task, work: str, processes: bool) -> float:
    prepared = task.prepare(model, processes=processes)
    model(prepared.batch(range(1)).base)
    before = current_mib()
    WORKS[work](model, prepared)
    return peak_mib() - before


def of_processes(folder: Path, count: int, work: str) -> float:
    """The largest of so many processes' MiB over the model's own."""
    with tempfile.TemporaryDirectory() as out:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        command = [sys.executable, *launch, "-m", "bench.memory_growth", "--worker", out, str(folder), work]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return max(json.loads(path.read_text()) for path in Path(out).iterdir())


def worker(out: str, folder: str, work: str) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    with cv.engine.joined() as number:
        found = of_pairs(Path(folder), PAIRS[1], work, processes=True)
        (Path(out) / f"{number}.json").write_text(json.dumps(found))


def main() -> None:
    on_edges, on_pairs = ("eap", "half of the edges, masked"), ("eap", "verify", "find")
    _table("edges", on_edges, SHAPES, lambda name, work: alone(of_edges, SHAPES[name], work))
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        draw(folder, max(PAIRS))
        _table("pairs", on_pairs, PAIRS, lambda count, work: alone(of_pairs, folder, count, work))
        title = f"processes, {PAIRS[1]} pairs"
        _table(title, on_pairs, PROCESSES, lambda count, work: of_processes(folder, count, work))


def _table(title: str, works: Sequence[str], rows: Iterable[T], peak: Callable[[T, str], float]) -> None:
    print(f"\n| {title} | {' | '.join(works)} |\n| --- |{' --- |' * len(works)}")
    for row in rows:
        cells = (f"{peak(row, work):,.0f} MiB" for work in works)
        print(f"| {row if isinstance(row, str) else f'{row:,}'} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    worker(*sys.argv[2:]) if "--worker" in sys.argv else main()

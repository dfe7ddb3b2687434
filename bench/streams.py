"""Peak memory of `attribute`, `verify` and `activations` against the number of image files.

Files are photographs, or drawn cats and dogs where there is no folder of them; they are decoded by threads, a
batch ahead. Each number of files has a process of its own, since a process's peak never falls.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

import circuitvit as cv
from bench._timing import alone, current_mib, peak_mib
from circuitvit.datasets.catdog import catdog_pairs

FILES = (500, 1000, 2500, 5000)
BATCH = 32
MEMORY = "64MB"
"""What `verify` may hold between its runs: by default it is 1 GiB, which would hide the stream."""

WORKS = ("attribute", "activations", "verify")


def measure(work: str, folder: Path, count: int) -> tuple[float, float, float]:
    """MiB over the model's own at the peak, processor seconds, and seconds."""
    model = cv.load("catdog-tiny")
    sides = [sorted((folder / side).iterdir())[:count] for side in ("clean", "corrupt")]
    task = cv.Task(*sides, metric=cv.logit_diff("cat", "dog"))
    circuit = cv.Circuit.from_edges(model.graph, list(model.graph.edges)[::5]).pruned()
    model(task.prepare(model).batch(range(1)).base)
    before, spent, begin = current_mib(), time.process_time(), time.perf_counter()
    if work == "attribute":
        cv.attribute(model, task, "eap", batch_size=BATCH, progress=False)
    elif work == "verify":
        cv.verify(model, task, circuit, n_random=5, batch_size=BATCH, memory=MEMORY, progress=False)
    else:
        with tempfile.TemporaryDirectory() as out:
            model.activations(
                sides[0], "resid*", out=Path(out) / "all.safetensors", batch_size=BATCH, progress=False
            )
    return peak_mib() - before, time.process_time() - spent, time.perf_counter() - begin


def draw(folder: Path, count: int) -> None:
    """Write drawn cats and dogs in files of many sizes, as photographs have."""
    rng, drawn = np.random.default_rng(0), catdog_pairs(count, preprocessed=False)
    for side, pictures in (("clean", drawn.clean), ("corrupt", drawn.corrupt)):
        (folder / side).mkdir()
        for place, picture in enumerate((pictures * 255).byte().permute(0, 2, 3, 1).numpy()):
            image, size = Image.fromarray(picture), int(rng.integers(96, 192))
            image.resize((size, size), Image.Resampling.BICUBIC).save(folder / side / f"{place:05d}.jpg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, nargs="*", default=list(FILES))
    parser.add_argument(
        "--folder", type=Path, help="with the folders clean and corrupt of files; else drawn ones"
    )
    parser.add_argument("--work", choices=WORKS, nargs="*", default=list(WORKS))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = asked.folder or Path(made)
        if asked.folder is None:
            draw(folder, max(asked.files))
        print(f"catdog-tiny, batches of {BATCH}; MiB over the model's own, processor seconds, seconds")
        for work in asked.work:
            for count in asked.files:
                peak, spent, took = alone(measure, work, folder, count)
                print(f"{work}, {count:,} pairs: {peak:,.0f} MiB, {spent:.1f} s, {took:.1f} s", flush=True)


if __name__ == "__main__":
    main()

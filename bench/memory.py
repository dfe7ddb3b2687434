"""Peak memory of EAP over many pairs against a few: pairs are streamed, so it must not grow.

Each count runs in a process of its own, since a process's peak never falls. Peaks of equal runs differ by a
few percent, as memory is handed back in another order than it was taken: the short run is made three times.
"""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

import circuitvit as cv
from bench._models import DEVICE, SIZES
from bench._timing import Row, keep, peak_mib
from circuitvit.models.timm_import import import_timm

FEW, MANY = 8, 256
BATCH = 4


def rows() -> list[Row]:
    """ViT-B/16."""
    few = sorted(_child(FEW) for _ in range(3))[1]
    many = _child(MANY)
    title = f"peak memory of EAP, ViT-B/16, {MANY} pairs of images streamed in batches of {BATCH}"
    text = f"the same with {FEW} pairs ({few[0]:,.0f} MiB)"
    return [Row(title, text, many[0] / few[0], 1.05, 1.0, many[1], few[1], many[0])]


def _child(pairs: int) -> tuple[float, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (pairs,))


def measure(pairs: int) -> tuple[float, float]:
    """Peak MiB and seconds of EAP on so many pairs of image files."""
    vit = import_timm().create_model(SIZES["ViT-B/16"][0]).eval().to(DEVICE).requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        for side in ("clean", "corrupt"):
            _draw(Path(folder) / side, pairs)
        task = cv.Task(Path(folder) / "clean", Path(folder) / "corrupt", metric=cv.logit_diff(0, 1))
        start = time.perf_counter()
        cv.attribute(cv.wrap(vit), task, "eap", batch_size=BATCH, progress=False)
    return peak_mib(), time.perf_counter() - start


def _draw(folder: Path, count: int) -> None:
    """Write `count` files of noise, of the size of a photograph."""
    folder.mkdir()
    generator = np.random.default_rng(len(folder.name))
    Image.fromarray(generator.integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(folder / "0.png")
    for place in range(1, count):
        shutil.copyfile(folder / "0.png", folder / f"{place}.png")


def main() -> None:
    keep(rows())

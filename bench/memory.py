"""Peak memory: of EAP over many pairs against a few, and of masked runs against all senders' outputs.

EAP streams its pairs, so its memory must not grow with them. A masked run keeps references narrow and expands
the senders in use for a few images at a time, so that it needs little more than what the captured runs hold.

Each run has a process of its own, since a process's peak never falls. Peaks of equal runs differ by a few
percent, as memory is handed back in another order than it was taken: EAP's short run is made three times.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

import circuitvit as cv
from bench._models import DEVICE, SIZES, random_vit
from bench._timing import Row, alone, current_mib, keep, peak_mib, seconds
from circuitvit.engine import batch_runs, masked_run
from circuitvit.models.timm_import import import_timm

FEW, MANY = 8, 256
BATCH = 4

MASKED_PAIRS = 8
SHARES = {"half of the edges": 0.5, "1 edge in 300": 1 / 300}


def rows() -> list[Row]:
    """ViT-B/16."""
    return [_eap(), *(_masked(words, share) for words, share in SHARES.items())]


def _eap() -> Row:
    few = sorted(alone(measure, FEW) for _ in range(3))[1]
    many = alone(measure, MANY)
    title = f"peak memory of EAP, ViT-B/16, {MANY} pairs of images streamed in batches of {BATCH}"
    text = f"the same with {FEW} pairs ({few[0]:,.0f} MiB)"
    return Row(title, text, many[0] / few[0], 1.05, 1.0, many[1], few[1], many[0])


def _masked(words: str, share: float) -> Row:
    """The bar is half of what was needed while every sender was expanded for every image."""
    peak, spent, plain, outputs = alone(measure_masked, share)
    title = f"peak memory of a masked run over the model's own, {words}, ViT-B/16, {MASKED_PAIRS} pairs"
    text = f"all senders' outputs ({outputs:,.0f} MiB); times against 1 plain forward"
    return Row(title, text, peak / outputs, 2.2, 1.4, spent, plain, peak)


def measure_masked(share: float) -> tuple[float, float, float, float]:
    """MiB over the model's own; seconds of the run and of a plain forward; MiB of all senders' outputs."""
    _, prepared = random_vit("ViT-B/16", MASKED_PAIRS)
    graph, images = prepared.graph, prepared.clean.take(0, MASKED_PAIRS).to(DEVICE)
    kept = graph.edge_mask & (np.random.default_rng(0).random(graph.shape) < share)
    plain = seconds(lambda: prepared.model(images))
    before = current_mib()
    (run,) = batch_runs(prepared, MASKED_PAIRS)
    spent = seconds(lambda: masked_run(run.sources, kept))
    outputs = len(graph.senders) * run.base.stream(1).nbytes / 2**20
    return peak_mib() - before, spent, plain, outputs


def measure(pairs: int) -> tuple[float, float]:
    """Peak MiB and seconds of EAP on so many pairs of image files."""
    vit = import_timm().create_model(SIZES["ViT-B/16"][0]).eval().to(DEVICE).requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        for side in ("clean", "corrupt"):
            draw(Path(folder) / side, pairs)
        task = cv.Task(Path(folder) / "clean", Path(folder) / "corrupt", metric=cv.logit_diff(0, 1))
        start = time.perf_counter()
        cv.attribute(cv.wrap(vit), task, "eap", batch_size=BATCH, progress=False)
    return peak_mib(), time.perf_counter() - start


def draw(folder: Path, count: int) -> None:
    """Write `count` files of noise, of the size of a photograph."""
    folder.mkdir()
    generator = np.random.default_rng(len(folder.name))
    Image.fromarray(generator.integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(folder / "0.png")
    for place in range(1, count):
        shutil.copyfile(folder / "0.png", folder / f"{place}.png")


def main() -> None:
    keep(rows())

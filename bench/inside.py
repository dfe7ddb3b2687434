"""Looking inside and changing: activations against plain forwards, and EAP of a steered model.

Decoding is on both sides where images are files, as a user has it. The photographs are in the shared folder;
without them files of noise are drawn.

The bar of time is on processor time, as a machine that others use troubles that less.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import circuitvit as cv
from bench._models import DEVICE, SIZES
from bench._photographs import shared_folder
from bench._timing import Row, alone, interleaved, keep, peak_mib
from bench.memory import draw
from circuitvit.engine.reading import BATCH
from circuitvit.models.timm_import import import_timm
from circuitvit.tasks.images import as_images, list_images

FEW, MANY = 200, 800
NAMES = "resid*"


def rows() -> list[Row]:
    """ViT-Ti/16."""
    with tempfile.TemporaryDirectory() as folder:
        paths = _photographs(Path(folder))
        return [_from_tensor(), _from_files(paths), _memory(paths), *_edited()]


def _photographs(folder: Path) -> list[Path]:
    found = shared_folder() / "images" / "imagenet"
    if not found.is_dir():
        draw(found := folder / "drawn", MANY)
    return list(list_images(found))[:MANY]


def _vit() -> cv.Model:
    vit = import_timm().create_model(SIZES["ViT-Ti/16"][0]).eval()
    return cv.wrap(vit.to(DEVICE).requires_grad_(False))


def _from_tensor() -> Row:
    """Nothing but the runs."""
    model, images = _vit(), torch.randn(2 * BATCH, 3, 224, 224)
    title = f"activations of all {NAMES} at the class token, ViT-Ti/16, {len(images)} images at hand"
    return _row(title, model, images, repeats=9)


def _from_files(paths: Sequence[Path]) -> Row:
    title = f"activations of all {NAMES} at the class token, ViT-Ti/16, {len(paths)} photographs, decoded"
    return _row(title, _vit(), list(paths), repeats=2)


def _row(title: str, model: cv.Model, source: torch.Tensor | list[Path], repeats: int) -> Row:
    def work() -> object:
        return model.activations(source, NAMES, tokens="cls", progress=False)

    @torch.no_grad()
    def floor() -> object:
        images = as_images(source, model.preprocessing)
        starts = range(0, len(images), BATCH)
        return [
            model.module(images.take(first, min(first + BATCH, len(images))).to(DEVICE)) for first in starts
        ]

    ratio, spent, least = interleaved(work, floor, repeats, clock=time.process_time)
    text = f"plain forwards in batches of {BATCH}; processor time"
    return Row(title, text, ratio, 1.10, 1.02, spent, least, peak_mib())


def _memory(paths: Sequence[Path]) -> Row:
    """Each in a process of its own, since a process's peak never falls; the few are run three times."""
    few, short = sorted(alone(measure, paths[:FEW]) for _ in range(3))[1]
    many, long = alone(measure, paths[:MANY])
    title = f"peak memory of the same, {len(paths)} photographs"
    return Row(title, f"the same with {FEW} ({few:,.0f} MiB)", many / few, 1.05, 1.0, long, short, many)


def measure(paths: Sequence[Path]) -> tuple[float, float]:
    """Peak MiB and seconds of streaming the activations of so many files into another."""
    model, start = _vit(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "activations.safetensors"
        model.activations(list(paths), NAMES, tokens="cls", out=out, progress=False)
    return peak_mib(), time.perf_counter() - start


def _edited() -> list[Row]:
    """A constant on the stream costs nothing; and an edit is made in a part of a forward's time."""
    model, pairs = _vit(), SIZES["ViT-Ti/16"][1]
    clean, corrupt = torch.randn(2, pairs, 3, 224, 224).unbind()
    task = cv.Task(clean, corrupt, metric=cv.logit_diff(0, 1))
    direction = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))

    def steer() -> cv.Model:
        return model.edit({"resid6": cv.add(direction, tokens="cls")})

    def scores(model: cv.Model) -> object:
        return cv.attribute(model, task, "eap", batch_size=pairs, progress=False)

    steered, clock = steer(), time.process_time
    ratio, spent, least = interleaved(lambda: scores(steered), lambda: scores(model), clock=clock)
    title = f"eap of a model with a direction added to its stream, ViT-Ti/16, {pairs} pairs"
    eap = Row(title, "eap of the model without; processor time", ratio, 1.10, 1.02, spent, least, peak_mib())
    ratio, spent, least = interleaved(steer, lambda: model(clean[:1].to(DEVICE)), clock=clock)
    text = "1 plain forward of one image; processor time"
    return [eap, Row("making an edit, ViT-Ti/16", text, ratio, 0.5, 0.25, spent, least, peak_mib())]


def main() -> None:
    keep(rows())

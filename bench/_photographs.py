"""The real ViT-Ti/16, and photographs of cats and dogs that it calls so; the repository contains neither."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import circuitvit as cv
from circuitvit.tasks.image_files import load_image
from circuitvit.tasks.images import list_images

MODEL = "vit_tiny_patch16_224"
CATS = range(281, 286)
DOGS = range(151, 269)


def shared_folder() -> Path:
    """The folder named by CIRCUITVIT_SHARED, else `shared/data` beside the checkout, there or not."""
    named = os.environ.get("CIRCUITVIT_SHARED")
    return Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"


def shared_data() -> Path:
    """The shared folder; without it, the end."""
    folder = shared_folder()
    if not folder.is_dir():
        sys.exit(f"this measurement needs weights and photographs: there is no folder {folder}")
    return folder


def load_model() -> cv.Model:
    """The model with timm's weights."""
    return cv.load(MODEL, checkpoint=shared_data() / "weights" / f"{MODEL}.safetensors")


def cats_and_dogs(model: cv.Model) -> tuple[list[Path], list[Path]]:
    """The photographs whose top class is a domestic cat, and those whose top class is a dog, by name."""
    folder = shared_data() / "images" / "cats_vs_dogs"
    return _seen_as(model, list_images(folder / "cats"), CATS), _seen_as(
        model, list_images(folder / "dogs"), DOGS
    )


def draw_pairs(model: cv.Model, n: int, seed: int) -> list[tuple[Path, Path]]:
    """Cats and dogs at random, no photograph twice."""
    rng = np.random.default_rng(seed)
    cats, dogs = ([side[index] for index in rng.permutation(len(side))] for side in cats_and_dogs(model))
    if min(len(cats), len(dogs)) < n:
        sys.exit(f"{n} pairs asked for, and {len(cats)} cats and {len(dogs)} dogs are there")
    return list(zip(cats[:n], dogs[:n], strict=True))


def _seen_as(model: cv.Model, paths: Sequence[Path], classes: range) -> list[Path]:
    images = [load_image(path, model.preprocessing) for path in paths]
    with torch.no_grad():
        tops = [int(model(image[None]).argmax()) for image in images]
    return [path for path, top in zip(paths, tops, strict=True) if top in classes]

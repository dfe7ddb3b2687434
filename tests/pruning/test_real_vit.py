"""ACDC on a slice of a real ImageNet model, against the naive search in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

import circuitvit as cv
from circuitvit.tasks import PreparedTask
from tests.reference import literal_acdc, literal_scores
from tests.reference.literal_vit import LiteralViT

LAYERS = 4
TAU = 0.01


@pytest.fixture(scope="module")
def prepared(shared_data: Path) -> PreparedTask:
    """The first layers of ViT-Ti with its own readout, on the photographs of the cat and the dog."""
    name, photos = "vit_tiny_patch16_224", shared_data / "images" / "catdog"
    whole: Any = cv.load(name, checkpoint=shared_data / "weights" / f"{name}.safetensors")
    module = copy.deepcopy(whole.module)
    module.blocks = module.blocks[:LAYERS]
    images = cv.Task(photos / "prisma_crop_dog.jpeg", photos / "prisma_crop_cat.png", cv.logit_diff(0, 1))
    taken = images.prepare(whole)
    assert taken.corrupt is not None
    return cv.Task(taken.clean.take(0, 1), taken.corrupt.take(0, 1), cv.logit_diff(281, 232)).prepare(
        cv.wrap(module)
    )


@pytest.mark.slow
def test_acdc_finds_the_edges_of_the_naive_search(prepared: PreparedTask) -> None:
    assert prepared.corrupt is not None
    literal = LiteralViT(prepared.model.module)
    clean, corrupt = (images.take(0, 1) for images in (prepared.clean, prepared.corrupt))
    reference = literal_scores.patch_reference(literal, corrupt)
    kept = literal_acdc.acdc(literal, clean, reference, TAU, literal_acdc.kl)
    found = cv.acdc(prepared.model, prepared, TAU, progress=False)
    assert set(found) == literal_acdc.pruned(literal, kept)
    assert 10 < len(found) < prepared.graph.n_edges / 2

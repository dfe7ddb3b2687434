"""The identities of masked runs on a real ImageNet model and photographs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import circuitvit as cv
from circuitvit.models.timm_import import import_timm
from tests.reference.literal_scores import patch_reference
from tests.reference.literal_vit import LiteralViT

NAME = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def model(shared_data: Path) -> cv.Model:
    return cv.load(NAME, checkpoint=shared_data / "weights" / f"{NAME}.safetensors")


@pytest.fixture(scope="module")
def task(shared_data: Path) -> cv.Task:
    """Clean: a tabby whose dog is masked out; corrupt: the dog, with the cat masked out."""
    photos = shared_data / "images" / "catdog"
    metric = cv.logit_diff("tabby", "Border collie")
    return cv.Task(photos / "prisma_crop_dog.jpeg", photos / "prisma_crop_cat.png", metric)


def test_the_behaviour_is_there(model: cv.Model, task: cv.Task) -> None:
    """Logit differences that were measured before the library was written, on whole photographs."""
    task = task.with_options(preprocessing=replace(model.preprocessing, crop_pct=1.0))
    clean = cv.run(model, task, cv.Circuit.full(model.graph))
    corrupt = cv.run(model, task, cv.Circuit.empty(model.graph))
    assert int(clean.argmax()) == 281
    assert float(clean[0, 281] - clean[0, 232]) == pytest.approx(12.04, abs=0.05)
    assert float(corrupt[0, 281] - corrupt[0, 232]) == pytest.approx(-6.95, abs=0.05)
    assert len(model.graph.senders) == 49
    assert model.graph.n_edges == 2845


@pytest.mark.parametrize("groups", [None, "kind"])
def test_kept_whole_it_is_the_module_and_kept_empty_the_module_on_the_corrupt_image(
    model: cv.Model, task: cv.Task, groups: str | None, shared_data: Path
) -> None:
    """Against a module that the library has never seen, on the same preprocessed images."""
    module = (
        import_timm()
        .create_model(NAME, checkpoint_path=shared_data / "weights" / f"{NAME}.safetensors")
        .eval()
    )
    task = task.with_options(groups=groups)
    prepared = task.prepare(model)
    assert prepared.corrupt is not None
    with torch.no_grad():
        clean, corrupt = module(prepared.clean.take(0, 1)), module(prepared.corrupt.take(0, 1))
    for direction, whole, nothing in (("noising", clean, corrupt), ("denoising", clean, corrupt)):
        directed = task.with_options(direction=direction)
        found = cv.run(model, directed, cv.Circuit.full(prepared.graph))
        assert (found - whole).abs().max() < 1e-4
        found = cv.run(model, directed, cv.Circuit.empty(prepared.graph))
        assert (found - nothing).abs().max() < 1e-4


@pytest.mark.parametrize("density", [0.02, 0.5, 0.98])
def test_random_circuits_give_the_logits_of_the_literal_model(
    model: cv.Model, task: cv.Task, density: float
) -> None:
    prepared = task.prepare(model)
    assert prepared.corrupt is not None
    literal = LiteralViT(model.module)
    reference = patch_reference(literal, prepared.corrupt.take(0, 1))
    drawn = torch.rand(model.graph.n_edges, generator=torch.Generator().manual_seed(0)) < density
    kept = {name for name, keep in zip(model.graph.edges, drawn.tolist(), strict=True) if keep}
    expected = literal.run(prepared.clean.take(0, 1), reference, kept.__contains__).logits
    found = cv.run(model, task, cv.Circuit.from_edges(model.graph, kept))
    assert (found - expected).abs().max() < 1e-3

"""Scores of a real ImageNet model on photographs, against literal float64 implementations."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import circuitvit as cv
from circuitvit.attribution.exact import edge_effects
from circuitvit.attribution.scoring import Running
from circuitvit.tasks import PreparedTask
from tests.reference import literal_scores
from tests.reference.literal_vit import Groups, LiteralViT

TABBY, COLLIE = 281, 232
N_EDGES = 16


@pytest.fixture(scope="module")
def model(shared_data: Path) -> cv.Model:
    name = "vit_tiny_patch16_224"
    return cv.load(name, checkpoint=shared_data / "weights" / f"{name}.safetensors")


@pytest.fixture(scope="module")
def task(shared_data: Path) -> cv.Task:
    photos = shared_data / "images" / "catdog"
    metric = cv.logit_diff("tabby", "Border collie")
    return cv.Task(photos / "prisma_crop_dog.jpeg", photos / "prisma_crop_cat.png", metric)


def difference(logits: Tensor) -> Tensor:
    return logits[:, TABBY] - logits[:, COLLIE]


def images(prepared: PreparedTask) -> tuple[Tensor, Tensor]:
    assert prepared.corrupt is not None
    return prepared.clean.take(0, len(prepared)), prepared.corrupt.take(0, len(prepared))


def groups_of(prepared: PreparedTask) -> Groups | None:
    return None if prepared.groups is None else Groups(prepared.groups.names, prepared.groups.members)


def some_edges(prepared: PreparedTask) -> list[str]:
    """Random edges, and with them some of the last layer, where effects are large."""
    late = [name for name in prepared.graph.edges if "->logits" in name]
    choose = random.Random(0)
    return [*choose.sample(prepared.graph.edges, N_EDGES - 5), *choose.sample(late, 5)]


@pytest.mark.parametrize("groups", [None, "kind"])
def test_eap_on_random_edges(model: cv.Model, task: cv.Task, groups: str | None) -> None:
    prepared = task.with_options(groups=groups).prepare(model)
    literal, (clean, corrupt), edges = LiteralViT(model.module), images(prepared), some_edges(prepared)
    reference = literal_scores.patch_reference(literal, corrupt)
    expected = literal_scores.eap(literal, clean, reference, difference, groups_of(prepared), edges)
    found = cv.attribute(model, task.with_options(groups=groups), "eap", progress=False)
    for name in edges:
        assert found[name] == pytest.approx(expected[name], abs=1e-3)
    assert max(map(abs, expected.values())) > 0.05  # there is something to compare


@pytest.mark.slow
@pytest.mark.parametrize("groups", [None, "kind"])
def test_exact_on_random_edges(model: cv.Model, task: cv.Task, groups: str | None) -> None:
    """Sixteen full literal runs against the effects of these edges."""
    prepared = task.with_options(groups=groups).prepare(model)
    literal, (clean, corrupt), edges = LiteralViT(model.module), images(prepared), some_edges(prepared)
    reference = literal_scores.patch_reference(literal, corrupt)
    expected = literal_scores.exact(literal, clean, reference, difference, groups_of(prepared), edges)
    wanted = cv.Circuit.from_edges(prepared.graph, edges).kept
    found = edge_effects(prepared, wanted, Running(batch_size=1))
    for name in edges:
        assert found[prepared.graph.edge_index(name)] == pytest.approx(expected[name], abs=1e-3)
    assert max(map(abs, expected.values())) > 0.05


@pytest.mark.slow
def test_estimators_against_all_exact_effects(model: cv.Model, task: cv.Task) -> None:
    """On the pair that they were developed on, images resized to 224 on the short side."""
    prepared = task.with_options(preprocessing=replace(model.preprocessing, crop_pct=1.0)).prepare(model)
    mask = model.graph.edge_mask
    effects = cv.attribute(model, prepared, "exact", progress=False).values[mask]

    def agreement_of(method: str, **options: float) -> tuple[float, float]:
        scores = cv.attribute(model, prepared, method, progress=False, **options).values[mask]
        ranks = stats.spearmanr(abs(scores), abs(effects))[0]
        return float(np.corrcoef(scores, effects)[0, 1]), float(ranks)

    pearson, spearman = agreement_of("local")
    assert pearson >= 0.55
    assert spearman >= 0.90
    assert agreement_of("hybrid", budget=60)[0] >= 0.85
    assert agreement_of("hybrid")[0] >= 0.95
    assert agreement_of("eap")[0] < 0.3  # what all this is for


@pytest.mark.slow
def test_completeness_at_the_input_of_a_real_model(model: cv.Model, task: cv.Task) -> None:
    """The path crosses steep places, so many nodes are needed: 16 midpoints are 6 off, and 64 are 4 off."""
    ends = torch.cat([cv.run(model, task, make(model.graph)) for make in (cv.Circuit.full, cv.Circuit.empty)])
    wanted = float(difference(ends)[1] - difference(ends)[0])
    scores = cv.attribute(model, task, "eap-ig", rule="gauss-legendre", steps=64, progress=False)
    assert scores.values[0].sum() == pytest.approx(wanted, rel=0.03)


def test_scores_of_several_photographs_do_not_depend_on_the_batch_size(
    model: cv.Model, shared_data: Path
) -> None:
    photos = shared_data / "images" / "catdog"
    clean = [photos / "prisma_crop_dog.jpeg", photos / "prisma_cat_crop.jpeg", photos / "prisma_cat_dog.jpeg"]
    task = cv.Task(clean, [photos / "prisma_crop_cat.png"] * 3, cv.logit_diff("tabby", "Border collie"))
    together = cv.attribute(model, task, "eap", batch_size=3, progress=False).values
    for size in (1, 2):
        assert (
            abs(cv.attribute(model, task, "eap", batch_size=size, progress=False).values - together).max()
            < 1e-3
        )

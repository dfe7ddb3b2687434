"""Models whose outputs are features, not classes: searches go by the task's own metric."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import circuitvit as cv
from circuitvit.engine import Evaluator
from circuitvit.errors import OptionError
from circuitvit.models.timm_import import import_timm
from circuitvit.pruning.learned import MaskTrainer
from tests.pruning.test_find import images

WIDTH = 16
DIRECTION = torch.linspace(-1.0, 1.0, WIDTH)
PLAN = cv.Plan(steps=30, trim_runs=300, batch_size=2)


def projection(features: Tensor) -> Tensor:
    """A probe's reading of the features."""
    return features @ DIRECTION.to(features)


@pytest.fixture(scope="module")
def model() -> cv.Model:
    timm = import_timm()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module = timm.models.vision_transformer.VisionTransformer(
            img_size=16, patch_size=8, embed_dim=WIDTH, depth=1, num_heads=2, mlp_ratio=2, num_classes=0
        )
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return cv.wrap(module.eval())


@pytest.fixture(scope="module")
def task() -> cv.Task:
    return cv.Task(images(2, 1), images(2, 2), metric=projection)


def test_these_outputs_are_no_classes(model: cv.Model) -> None:
    assert not model.has_classes


@pytest.mark.parametrize("start", ["thin", "whole"])
def test_find_is_faithful_to_the_metric(model: cv.Model, task: cv.Task, start: str) -> None:
    plan = PLAN if start == "thin" else cv.Plan(0, 300, 2)
    found = cv.find(model, task, plan=plan, progress=False)
    full, empty = cv.Circuit.full(model.graph), cv.Circuit.empty(model.graph)
    whole, nothing, kept = (
        float(projection(cv.run(model, task, each)).mean()) for each in (full, empty, found.circuit)
    )
    assert 0.9 <= (kept - nothing) / (whole - nothing) <= 1.1
    assert 0 < len(found.circuit) < model.graph.n_edges
    assert "class" not in found.summary


def test_masks_follow_the_metric_and_nothing_else(model: cv.Model, task: cv.Task) -> None:
    """Scaling what the metric does not see changes no step of the training."""
    blind = torch.ones(WIDTH) - DIRECTION * float(torch.ones(WIDTH) @ DIRECTION) / float(
        DIRECTION.square().sum()
    )

    def distances(metric: object) -> list[float]:
        trainer = MaskTrainer(
            task.with_options(metric=metric).prepare(model), 10, cv.MaskSettings(batch_size=2)
        )
        for _ in range(5):
            trainer.step()
        return trainer.trace.distance

    assert distances(projection) == pytest.approx(
        distances(lambda features: 7 * projection(features)), rel=1e-3
    )
    assert distances(projection) != pytest.approx(distances(lambda features: features @ blind), rel=1e-2)


def test_acdc_goes_by_the_metric(model: cv.Model, task: cv.Task) -> None:
    evaluator = Evaluator(task.prepare(model))
    apart = float(np.abs(evaluator.effect).mean())
    circuit = cv.acdc(model, task, tau=0.05 * apart, divergence="metric", progress=False)
    assert 0 < len(circuit) < model.graph.n_edges
    change = np.abs(evaluator.values(circuit) - evaluator.whole).mean()
    assert change <= 0.05 * apart * (model.graph.n_edges - len(circuit))


def test_acdc_refuses_a_divergence_of_predictions(model: cv.Model, task: cv.Task) -> None:
    with pytest.raises(OptionError, match=r"no classes.*divergence='metric'"):
        cv.acdc(model, task, tau=0.1, progress=False)


def test_constants_are_those_that_leave_the_metric_nearest(model: cv.Model, task: cv.Task) -> None:
    empty = cv.Circuit.empty(model.graph)
    constants = cv.learn_constants(model, task, empty, steps=60, learning_rate=0.05, progress=False)

    def harm(ablation: object) -> float:
        ablated = cv.run(model, task.with_options(ablation=ablation), empty)
        return float((projection(ablated) - projection(model(images(2, 1)))).square().mean())

    assert harm(constants) < 0.8 * harm("mean-tokens")


def test_curves_are_of_the_metric(model: cv.Model, task: cv.Task) -> None:
    scores = cv.attribute(model, task, "eap", progress=False)
    curve = cv.score_curve(model, task, scores, fractions=(0.5, 1.0), progress=False)
    assert curve.points[-1].faithfulness == pytest.approx(1, abs=1e-4)

"""Metrics: one divergence for all, and models whose outputs are no classes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import circuitvit as cv
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.errors import OptionError
from circuitvit.tasks import divergence, metric_names
from circuitvit.tasks.metrics import as_metric
from tests.strategies import Recipe


def features() -> cv.Model:
    """A model without a classifier."""
    module = Recipe(classes=5, pool="token").build()
    module.reset_classifier(0)
    return cv.wrap(module)


def test_the_divergence_is_a_sum_over_classes_in_nats_for_each_image() -> None:
    full, other = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = F.kl_div(other.log_softmax(-1), full.softmax(-1), reduction="none").sum(dim=-1)
    torch.testing.assert_close(divergence(full, other), expected)
    candidates = torch.stack([other, full, 2 * other])
    found = divergence(full, candidates)
    assert found.shape == (3, 4)
    torch.testing.assert_close(found[0], expected)
    assert float(found[1].abs().max()) < 1e-12


@pytest.mark.parametrize("name", [name for name in metric_names() if as_metric(name).of_classes])
def test_a_metric_of_classes_is_refused_where_there_are_none(name: str) -> None:
    model, recipe = features(), Recipe(classes=5, pool="token")
    task = cv.Task(recipe.images(2), recipe.images(2), metric=name)
    refused = rf"has no classes: its {model.n_logits} outputs are features, which the metric {name} "
    ways = r".*cv\.similarity.*cv\.projection.*cv\.with_head.*classes=\["
    with pytest.raises(OptionError, match=refused + ways):
        task.prepare(model)


def test_classes_by_index_are_refused_where_there_are_none() -> None:
    recipe = Recipe(classes=5, pool="token")
    with pytest.raises(OptionError, match="has no classes"):
        cv.Task(recipe.images(2), recipe.images(2), metric=cv.logit_diff(0, 1)).prepare(features())


def test_a_projection_of_the_features_is_a_metric() -> None:
    model, recipe = features(), Recipe(classes=5, pool="token")
    direction = torch.randn(model.n_logits, dtype=model.dtype, generator=torch.Generator().manual_seed(1))
    clean = recipe.images(2)
    task = cv.Task(clean, clean.flip(-1), metric=lambda outputs: outputs @ direction)
    scores = cv.attribute(model, task, "eap", progress=False)
    assert float(abs(scores.values).max()) > 0


@pytest.mark.parametrize(
    "hard", [lambda logits: (logits.argmax(dim=-1) == 0).float(), lambda logits: logits.detach()[:, 0]]
)
def test_a_function_without_a_gradient_is_one_like_accuracy(hard: Callable[[Tensor], Tensor]) -> None:
    model = cv.load("catdog-tiny")
    task = cv.Task(*catdog_pairs(3, seed=1), metric=hard)
    for method in ("eap", "local"):
        with pytest.raises(OptionError, match=r"'<lambda>' has none.*method='exact'"):
            cv.attribute(model, task, method, progress=False)
    with pytest.raises(OptionError, match="has no gradient"):
        cv.thin(model, task, 50, progress=False)
    plan = cv.Plan(steps=6, trim_runs=10, batch_size=3)
    assert 0.9 <= cv.find(model, task, plan=plan, progress=False).faithfulness <= 1.1


def test_a_function_that_has_a_gradient_or_cannot_be_tried_is_taken_for_one_that_has() -> None:
    recipe = Recipe(classes=5, pool="token")
    for function in (lambda logits: logits[:, 0], lambda logits: logits[:, 0] * logits.new_ones(7)):
        task = cv.Task(recipe.images(2), recipe.images(2), metric=function)
        assert task.prepare(features()).metric.metric.differentiable

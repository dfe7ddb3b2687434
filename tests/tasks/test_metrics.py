"""Metrics: one divergence for all, and models whose outputs are no classes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import circuitvit as cv
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

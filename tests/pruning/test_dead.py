"""Dead edges depend on the ablation: dropping them must change no run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import circuitvit as cv
from circuitvit.pruning.refine import without_dead
from tests.pruning.test_find import images, small_module


@pytest.fixture(scope="module")
def model() -> cv.Model:
    return cv.wrap(small_module())


@pytest.mark.parametrize("ablation", ["patch", "resample", "mean", "mean-tokens", "zero", "noise"])
@pytest.mark.parametrize("share", [0.05, 0.1, 0.15])
def test_dropping_dead_edges_changes_no_logits(model: cv.Model, ablation: str, share: float) -> None:
    task = cv.Task(images(3, 1), images(3, 2), metric=cv.logit_diff(0, 1), ablation=ablation)
    rng = np.random.default_rng(1)
    kept = model.graph.edge_mask & (rng.random(model.graph.shape) < share)
    smaller = without_dead(task.prepare(model), kept)
    assert smaller.sum() < kept.sum()
    runs = [cv.run(model, task, cv.Circuit(model.graph, mask)) for mask in (kept, smaller)]
    assert torch.allclose(*runs, atol=1e-5)


def test_a_sender_that_hears_nothing_still_speaks_under_zero_ablation(model: cv.Model) -> None:
    """Its biases make it write something, which is not the zero of its ablated edges."""
    task = cv.Task(images(1, 1), metric=cv.logit(0), ablation="zero")
    circuit = cv.Circuit.from_edges(model.graph, ["m0->logits"])
    assert without_dead(task.prepare(model), circuit.kept).sum() == 1
    with_it, without = (cv.run(model, task, each) for each in (circuit, cv.Circuit.empty(model.graph)))
    assert not torch.allclose(with_it, without, atol=1e-3)

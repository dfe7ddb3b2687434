"""Thinning: circuits of falling size, on models whose answer is known."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

import circuitvit as cv
from circuitvit.errors import OptionError
from circuitvit.pruning.aims import Keep
from circuitvit.pruning.learned import SAMPLERS, MaskTrainer, Over, SamplerName, gated_units
from tests.attribution.test_ground_truth import REDUNDANT, task_of
from tests.pruning.test_find import images, small_module

SETTINGS = cv.ThinSettings(pairs=2, batch_size=2)


@pytest.fixture(scope="module")
def model() -> cv.Model:
    return cv.wrap(small_module())


@pytest.fixture(scope="module")
def task() -> cv.Task:
    return cv.Task(images(4, 1), images(4, 2), metric=cv.logit_diff(0, 1))


def test_circuits_fall_in_size_each_within_the_one_before(model: cv.Model, task: cv.Task) -> None:
    found = cv.thin(model, task, [10, 40, 25], SETTINGS, progress=False)
    kept = [circuit.kept for circuit in found.circuits]
    assert all(len(circuit) <= size for circuit, size in zip(found.circuits, (40, 25, 10), strict=True))
    assert len(found.circuits[0]) > 25
    assert all(not (small & ~large).any() for large, small in pairwise(kept))
    again = cv.thin(model, task, [25, 10], SETTINGS, progress=False)
    assert again.circuits[0] != again.circuits[1]
    assert found.circuits == cv.thin(model, task, [10, 40, 25], SETTINGS, progress=False).circuits


@pytest.mark.parametrize("keep", ["behaviour", "prediction"])
def test_one_of_two_heads_that_stand_in_for_each_other_stays(keep: Keep) -> None:
    """Neither has a slope as long as both are there, and the first to go must not take the other along."""
    relay = cv.compiled("relay", parts=("backup",))
    found = cv.thin(
        relay.model, task_of(relay), len(relay.wired) - 1, cv.ThinSettings(keep=keep), progress=False
    )
    (circuit,) = found.circuits
    assert circuit <= relay.wired
    assert len([edge for edge in REDUNDANT if edge in circuit]) == 1
    assert found.faithfulness[0] == pytest.approx(1, abs=0.05)


def test_a_metric_without_a_slope_at_the_whole_model_is_refused(model: cv.Model, task: cv.Task) -> None:
    with pytest.raises(OptionError, match="flat at the clean run"):
        cv.thin(model, task.with_options(metric=cv.kl_divergence()), 10, progress=False)


class TestOneTraining:
    def test_the_schedule_rests_at_each_size(self, model: cv.Model, task: cv.Task) -> None:
        settings = cv.MaskSettings(steps=20, ramp=0.5, batch_size=4)
        trainer = MaskTrainer(task.prepare(model), 10, settings, rests=[30, 20])
        for _ in range(trainer.ends[-1]):
            trainer.step()
        wanted = np.array(trainer.trace.target) * model.graph.n_edges
        assert len(wanted) == 20 + 2 * 10
        for size, end in zip((30, 20, 10), trainer.ends, strict=True):
            assert np.allclose(wanted[end - 10 : end], size)
        assert (np.diff(wanted) <= 1e-9).all()

    def test_a_single_size_is_trained_for_as_before(self, model: cv.Model, task: cv.Task) -> None:
        settings = cv.MaskSettings(steps=20, batch_size=4)
        alone = cv.learn_mask(model, task, 20, settings, progress=False)
        (among,) = cv.learn_masks(model, task, [20], settings, progress=False)
        assert np.array_equal(alone.openness, among.openness)
        assert alone.circuit.provenance.parameters["edges"] == 20


@pytest.mark.parametrize("over", ["edges", "nodes", "both"])
@pytest.mark.parametrize("name", ["hard-concrete", "ugs"])
def test_gates_that_are_shut_have_no_gradient(model: cv.Model, name: SamplerName, over: Over) -> None:
    """So a training step may leave them out of its run."""
    units = gated_units(model.graph, over)
    phi = torch.linspace(-3, 3, units.n_gates, requires_grad=True)
    mask = units.mask(SAMPLERS[name].sample(phi, torch.Generator().manual_seed(0)))
    shut = mask[torch.from_numpy(model.graph.edge_mask.copy()) & (mask == 0)]
    assert len(shut) > 3
    (slope,) = torch.autograd.grad(shut.sum(), phi)
    assert not slope.any()


def test_sizes_may_be_numbers_of_numpy(model: cv.Model, task: cv.Task) -> None:
    found = cv.thin(model, task, np.int64(20), progress=False).circuits  # type: ignore[arg-type]
    (size,) = (each.provenance.parameters["edges"] for each in found)
    assert type(size) is int


def test_a_warm_start_gives_no_warning(
    model: cv.Model, task: cv.Task, recwarn: pytest.WarningsRecorder
) -> None:
    scores = cv.attribute(model, task, "eap", progress=False)
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # torch says most things only once
    try:
        cv.learn_mask(model, task, 10, cv.MaskSettings(steps=2), warm_start=scores, progress=False)
    finally:
        torch.set_warn_always(always)
    assert not [str(each.message) for each in recwarn if "requires_grad" in str(each.message)]

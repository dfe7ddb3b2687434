"""Searches with several seeds, and how far they agree."""

from __future__ import annotations

import pytest

import circuitvit as cv
from circuitvit.errors import OptionError
from circuitvit.pruning.several import Agreement
from tests.pruning.test_find import images, small_module


@pytest.fixture(scope="module")
def model() -> cv.Model:
    return cv.wrap(small_module())


def agreement(model: cv.Model, *edges: list[str]) -> Agreement:
    return Agreement(tuple(cv.Circuit.from_edges(model.graph, names) for names in edges))


def test_shared_edges_union_and_frequency(model: cv.Model) -> None:
    found = agreement(model, ["input->m0", "m0->logits"], ["input->m0", "m0->m1", "m1->logits"])
    assert list(found.shared) == ["input->m0"]
    assert set(found.union) == {"input->m0", "m0->logits", "m0->m1", "m1->logits"}
    assert next(iter(found.frequency.items())) == ("input->m0", 1.0)
    assert found.frequency["m1->logits"] == 0.5
    assert found.overlap == pytest.approx(1 / 4)
    assert "not unique" in found.summary
    assert "circuits of 2 to 3 edges that" in found.summary


def test_circuits_of_one_size_are_given_one_size(model: cv.Model) -> None:
    found = agreement(model, ["input->m0", "m0->logits"], ["input->m1", "m1->logits"])
    assert "circuits of 2 edges that" in found.summary


def test_equal_circuits_are_said_to_be_equal(model: cv.Model) -> None:
    found = agreement(model, ["input->logits"], ["input->logits"])
    assert found.overlap == 1
    assert "same circuit" in found.summary


def test_each_seed_searches_with_the_same_numbers(model: cv.Model) -> None:
    task = cv.Task(images(2, 1), images(2, 2), metric=cv.logit_diff(0, 1))
    plan = cv.Plan(steps=20, trim_runs=60, batch_size=2)
    found = cv.find_several(model, task, seeds=(3, 4), plan=plan, progress=False)
    assert [finding.plan.seed for finding in found.findings] == [3, 4]
    assert {finding.plan.steps for finding in found.findings} == {20}
    assert (
        found.findings[0].circuit == cv.find(model, task, plan=found.findings[0].plan, progress=False).circuit
    )


@pytest.mark.parametrize("seeds", [(), (1,), (2, 2)])
def test_too_few_seeds_are_refused(model: cv.Model, seeds: tuple[int, ...]) -> None:
    with pytest.raises(OptionError, match="two different seeds"):
        cv.find_several(model, cv.Task(images(1, 1), images(1, 2), metric=cv.logit_diff(0, 1)), seeds)

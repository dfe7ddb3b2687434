"""Refining for a task: the units with the largest scores become nodes, and what cannot be is refused."""

from __future__ import annotations

import pytest
import torch

import circuitvit as cv
from circuitvit.errors import NameNotFoundError, OptionError
from tests.rightness import CLEAN, CORRUPT, METRIC, micro


@pytest.fixture(scope="module")
def model() -> cv.Model:
    return cv.wrap(micro())


@pytest.fixture(scope="module")
def task() -> cv.Task:
    return cv.Task(CLEAN, CORRUPT, metric=METRIC)


def units(model: cv.Model) -> set[str]:
    return {node for node in model.graph.nodes if node.rpartition(".")[2][1:].isdigit() and ".h" not in node}


def dictionary(width: int = 24, count: int = 40) -> cv.Dictionary:
    drawn = torch.Generator().manual_seed(0)
    encoder, decoder = (torch.randn(count, width, generator=drawn).double() for _ in range(2))
    return cv.Dictionary(encoder, torch.zeros(count).double(), decoder, torch.ones(width).double(), "relu")


def test_the_strongest_units_of_all_nodes_become_nodes(model: cv.Model, task: cv.Task) -> None:
    scores = cv.attribute_units(model, task, {"m*": cv.neurons()}, progress=False)
    fine = cv.refine_nodes(model, {"m*": cv.neurons()}, top=9, task=task, progress=False)
    assert units(fine) == {name for name, _ in scores.strongest(9)}


def test_units_that_are_named_stay_beside_those_that_are_chosen(model: cv.Model, task: cv.Task) -> None:
    table = {"m*": cv.neurons(), "m1": cv.neurons([2])}
    fine = cv.refine_nodes(model, table, top=3, task=task, progress=False)
    assert {"m1.n2", "m1.rest"} <= set(fine.graph.nodes)
    assert len([name for name in units(fine) if name.startswith("m0.")]) == 3


def test_the_error_of_a_dictionary_is_a_node_even_where_no_feature_is(model: cv.Model, task: cv.Task) -> None:
    table = {"m0": dictionary(), "m1": cv.neurons()}
    fine = cv.refine_nodes(model, table, top=0 + 1, task=task, progress=False)
    assert {"m0.rest", "m0.error"} <= set(fine.graph.nodes)


def test_what_is_missing_or_too_much_is_said(model: cv.Model, task: cv.Task) -> None:
    with pytest.raises(OptionError, match="which neurons of m1"):
        cv.refine_nodes(model, {"m1": cv.neurons()}, progress=False)
    with pytest.raises(OptionError, match="leave out top and task"):
        cv.refine_nodes(model, {"m1": cv.neurons([1])}, top=3, progress=False)
    with pytest.raises(OptionError, match="by name"):
        cv.refine_nodes(model, {}, progress=False)
    with pytest.raises(NameNotFoundError, match="m7"):
        cv.refine_nodes(model, {"m7": cv.neurons([1])}, progress=False)
    with pytest.raises(OptionError, match="m1 has no neuron 400"):
        cv.refine_nodes(model, {"m1": cv.neurons([400])}, progress=False)

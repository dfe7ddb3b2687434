"""Assertions: they hold when they should, and failures say what was found and what was asked for."""

from __future__ import annotations

import pytest

import circuitvit as cv
from circuitvit.errors import DataError, OptionError
from circuitvit.testing import (
    assert_faithful,
    assert_hypothesis,
    assert_minimal,
    assert_necessary,
    assert_unchanged,
    entries,
)
from circuitvit.verification import Falls, Hypothesis
from tests.verification.cases import some_circuit, tiny_model, tiny_task


def test_the_whole_graph_is_faithful_and_necessary() -> None:
    model, task = tiny_model(), tiny_task(6)
    full = cv.Circuit.full(model.graph)
    assert assert_faithful(model, task, full, at_least=0.99, sure=True).value == pytest.approx(1)
    assert assert_necessary(model, task, full, at_least=0.99).value == pytest.approx(1)
    assert entries()[-1].held


def test_an_empty_circuit_is_neither() -> None:
    model, task = tiny_model(), tiny_task(6)
    empty = cv.Circuit.empty(model.graph)
    with pytest.raises(
        AssertionError, match=r"faithfulness of 0 edges on 6 pairs is .*; asked for: 0.8 to 1.2"
    ):
        assert_faithful(model, task, empty)
    with pytest.raises(AssertionError, match=r"is lost on 6 pairs; asked for: at least 0.5"):
        assert_necessary(model, task, empty)
    assert not entries()[-1].held


def test_surety_takes_an_interval() -> None:
    model, task = tiny_model(), tiny_task(2)
    with pytest.raises(AssertionError, match="pairs are too few"):
        assert_faithful(model, task, cv.Circuit.full(model.graph), sure=True)


def test_minimality_names_what_could_go() -> None:
    model, task, circuit = tiny_model(), tiny_task(4), some_circuit()
    changes = assert_minimal(model, task, circuit, least=0.0)
    assert set(changes) == set(circuit)
    with pytest.raises(AssertionError, match="edges change faithfulness by less than 100") as failure:
        assert_minimal(model, task, circuit, least=100)
    assert "and" in str(failure.value)
    dead = cv.Circuit.from_edges(model.graph, ["input->m0"])
    with pytest.raises(AssertionError, match="1 edges lie on no path: input->m0"):
        assert_minimal(model, task, dead)


def test_changes_are_listed() -> None:
    graph = tiny_model().graph
    before = cv.Circuit.from_edges(graph, ["input->m0", "m0->logits"])
    after = cv.Circuit.from_edges(graph, ["input->m0", "m1->logits"])
    assert assert_unchanged(before, after, at_least=0.3) == pytest.approx(1 / 3)
    with pytest.raises(AssertionError, match="1 gone: m0->logits; 1 new: m1->logits"):
        assert_unchanged(before, after)


def test_a_hypothesis_must_get_its_verdict() -> None:
    model, task = tiny_model(), tiny_task(20)
    claim = Hypothesis("all of it", "* -> logits", Falls(0.0))
    assert assert_hypothesis(model, task, claim).supported
    with pytest.raises(AssertionError, match=r"supported: all of it .* asked for: refuted"):
        assert_hypothesis(model, task, claim, verdict="refuted")


def test_what_cannot_be_asked_is_an_error_and_no_failure() -> None:
    model, task, full = tiny_model(), tiny_task(6), cv.Circuit.full(tiny_model().graph)
    same = task.with_options(corrupt=task.clean)
    with pytest.raises(DataError, match="nothing for a circuit to explain"):
        assert_faithful(model, same, full)
    with pytest.raises(OptionError, match="nothing lies between"):
        assert_faithful(model, task, full, at_least=2, at_most=1)

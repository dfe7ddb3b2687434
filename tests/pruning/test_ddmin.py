"""Delta debugging against the algorithm as it was published, on anything and on circuits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

import circuitvit as cv
from circuitvit.engine import Evaluator
from circuitvit.errors import DataError, OptionError
from circuitvit.pruning.refine import minimise
from tests.pruning.test_find import images, small_module

Test = Callable[[Sequence[int]], bool]


def published(items: list[int], fails: Test, n: int = 2) -> list[int]:
    """`ddmin2` of Zeller and Hildebrandt 2002, figure 5, word by word, with its recursion."""
    if len(items) < 2:
        return items
    size = len(items)
    subsets = [items[round(size * i / n) : round(size * (i + 1) / n)] for i in range(n)]
    complements = [[item for item in items if item not in subset] for subset in subsets]
    for subset in subsets:  # reduce to subset
        if fails(subset):
            return published(subset, fails, 2)
    for complement in complements:  # reduce to complement
        if fails(complement):
            return published(complement, fails, max(n - 1, 2))
    if n < size:  # increase granularity
        return published(items, fails, min(size, 2 * n))
    return items


@st.composite
def oracles(draw: st.DrawFn) -> tuple[list[int], Test]:
    """Items and a test that the whole of them passes: any of some sets is enough, monotone or not."""
    items = list(range(draw(st.integers(1, 24))))
    enough = draw(st.lists(st.sets(st.sampled_from(items), min_size=1), min_size=1, max_size=3))
    odd_only = draw(st.booleans())

    def fails(some: Sequence[int]) -> bool:
        found = any(each <= set(some) for each in enough)
        return len(some) == len(items) or (found and not (odd_only and len(some) % 2 == 0))

    return items, fails


@given(oracles())
def test_as_published(oracle: tuple[list[int], Test]) -> None:
    items, fails = oracle
    assert minimise(items, fails) == published(items, fails)


@given(oracles())
def test_no_single_item_can_go(oracle: tuple[list[int], Test]) -> None:
    items, fails = oracle
    left = minimise(items, fails)
    assert fails(left)
    if len(left) > 1:
        assert not any(fails([item for item in left if item != gone]) for gone in left)


def test_few_of_many_cost_few_tests() -> None:
    asked = 0

    def holds(some: Sequence[int]) -> bool:
        nonlocal asked
        asked += 1
        return 700 in some

    assert minimise(range(1024), holds) == [700]
    assert asked <= 2 * 10  # a bisection: at most two halves at each of log2(1024) levels


@pytest.fixture(scope="module")
def model() -> cv.Model:
    return cv.wrap(small_module())


@pytest.fixture(scope="module")
def task() -> cv.Task:
    return cv.Task(images(2, 1), images(2, 2), metric=cv.logit_diff(0, 1))


class TestCircuits:
    def faithfulness(self, model: cv.Model, task: cv.Task, circuit: cv.Circuit) -> float:
        ends = cv.Circuit.full(model.graph), cv.Circuit.empty(model.graph)
        runs = [cv.run(model, task, each) for each in (*ends, circuit)]
        whole, nothing, found = (float((logits[:, 0] - logits[:, 1]).double().mean()) for logits in runs)
        return (found - nothing) / (whole - nothing)

    def test_the_edges_of_the_published_algorithm(self, model: cv.Model, task: cv.Task) -> None:
        scores = cv.attribute(model, task, "exact", progress=False)
        start = cv.Circuit.full(model.graph).with_scores(scores)
        found = cv.ddmin(model, task, start, progress=False)
        edges = sorted(start, key=lambda edge: abs(scores[edge]))

        def fails(some: Sequence[int]) -> bool:
            circuit = cv.Circuit.from_edges(model.graph, [edges[index] for index in some])
            return 0.9 <= self.faithfulness(model, task, circuit) <= 1.1

        left = published(list(range(len(edges))), fails)
        assert set(found.circuit) == {edges[index] for index in left}
        assert found.minimal
        assert found.faithfulness == pytest.approx(self.faithfulness(model, task, found.circuit), abs=1e-4)

    def test_nothing_is_dead_and_no_edge_can_go(self, model: cv.Model, task: cv.Task) -> None:
        found = cv.ddmin(model, task, cv.Circuit.full(model.graph), progress=False)
        assert found.circuit == found.circuit.pruned()
        for edge in found.circuit:
            less = found.circuit - cv.Circuit.from_edges(model.graph, [edge])
            assert not 0.9 <= self.faithfulness(model, task, less) <= 1.1

    def test_stopped_short_it_gives_what_it_has(self, model: cv.Model, task: cv.Task) -> None:
        evaluator = Evaluator(task.prepare(model))
        evaluator.check_effect(level=0)
        before = evaluator.runs
        found = cv.ddmin(
            model, task, cv.Circuit.full(model.graph), max_runs=8, evaluator=evaluator, progress=False
        )
        assert not found.minimal
        assert found.runs == evaluator.runs - before == 8
        assert 0.9 <= found.faithfulness <= 1.1

    def test_a_circuit_outside_the_band_is_refused(self, model: cv.Model, task: cv.Task) -> None:
        with pytest.raises(DataError, match=r"faithfulness is -?0\.000, outside 0\.9 to 1\.1.*refine"):
            cv.ddmin(model, task, cv.Circuit.empty(model.graph), progress=False)

    def test_options_that_make_no_sense_are_refused(self, model: cv.Model, task: cv.Task) -> None:
        full = cv.Circuit.full(model.graph)
        with pytest.raises(OptionError, match="from low to high"):
            cv.ddmin(model, task, full, band=(1.1, 0.9), progress=False)
        with pytest.raises(OptionError, match="max_runs must be at least 1"):
            cv.ddmin(model, task, full, max_runs=0, progress=False)
        other = cv.Circuit.full(cv.load("catdog-tiny").graph)
        with pytest.raises(OptionError, match="belongs to"):
            cv.ddmin(model, task, other, progress=False)

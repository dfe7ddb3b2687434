"""Exact effects: one full literal run for each edge."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import circuitvit as cv
from circuitvit.attribution.exact import edge_effects
from circuitvit.attribution.scoring import Running
from tests.reference import literal_scores
from tests.strategies import Case, Recipe, assert_same_scores, cases


@given(cases(max_depth=2))
def test_effects_are_those_of_ablating_each_edge_alone(case: Case) -> None:
    expected = literal_scores.exact(case.literal, case.base, case.reference, case.formula, case.token_groups)
    found = cv.attribute(case.model, case.task(), "exact", progress=False)
    assert found.direction == case.direction
    assert_same_scores(found.to_dict(), expected)


@given(cases(max_depth=2, max_heads=2), st.data())
def test_an_effect_is_that_of_a_run_without_the_edge(case: Case, data: st.DataObject) -> None:
    """The same through `cv.run`: `ablate=` when noising, a circuit of one edge when denoising."""
    task = case.task()
    scores = cv.attribute(case.model, task, "exact", progress=False)
    name = data.draw(st.sampled_from(scores.graph.edges))
    one = cv.Circuit.from_edges(scores.graph, [name])
    options = {"ablate": one} if case.direction == "noising" else {"circuit": one}
    with torch.no_grad():
        difference = case.formula(cv.run(case.model, task, **options)) - case.formula(case.module(case.base))
    assert scores[name] == pytest.approx(float(difference.mean()), rel=1e-6, abs=1e-9)


@given(cases(max_depth=2), st.integers(0, 2**16))
def test_effects_of_some_edges_only(case: Case, seed: int) -> None:
    prepared = case.task().prepare(case.model)
    wanted = prepared.graph.edge_mask & (np.random.default_rng(seed).random(prepared.graph.shape) < 0.3)
    found = edge_effects(prepared, wanted, Running(batch_size=2))
    whole = edge_effects(prepared, prepared.graph.edge_mask, Running(batch_size=2))
    assert found == pytest.approx(np.where(wanted, whole, 0.0), abs=1e-12)


def test_more_edges_than_fit_into_one_chunk_are_all_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(Recipe(depth=3, heads=2), n_pairs=3)
    whole = cv.attribute(case.model, case.task(), "exact", progress=False).values
    monkeypatch.setattr("circuitvit.attribution.exact.CANDIDATE_IMAGES", 7)
    assert cv.attribute(case.model, case.task(), "exact", progress=False).values == pytest.approx(
        whole, abs=1e-12
    )


def test_metrics_without_gradient_have_exact_effects() -> None:
    case = Case(Recipe(depth=2, heads=2), n_pairs=3, metric="curved")
    top = int(case.literal.run(case.clean).logits[0].argmax())
    found = cv.attribute(case.model, case.task(metric=cv.accuracy(top)), "exact", progress=False)

    def right(logits: torch.Tensor) -> torch.Tensor:
        return (logits.argmax(dim=1) == top).double()

    expected = literal_scores.exact(case.literal, case.clean, case.reference, right)
    assert any(expected.values())
    assert_same_scores(found.to_dict(), expected)


def test_a_divergence_has_exact_effects_that_are_never_negative() -> None:
    case = Case(Recipe(depth=1))
    scores = cv.attribute(case.model, case.task(metric=cv.kl_divergence()), "exact", progress=False)
    assert scores.values.min() > -1e-12
    assert scores.values.max() > 1e-4

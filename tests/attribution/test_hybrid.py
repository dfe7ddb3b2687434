"""Hybrid and auto: what a budget buys."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import circuitvit as cv
from circuitvit.attribution.budget import (
    Budget,
    affordable,
    exact_cost,
    exact_costs,
    local_cost,
    uncancelled,
)
from circuitvit.attribution.local import differentiated_runs
from circuitvit.errors import OptionError
from tests.reference import literal_scores
from tests.strategies import Case, Recipe, cases


@given(cases(smooth=True, max_depth=2, max_heads=2), st.floats(0, 1))
def test_scores_are_exact_where_they_say_so_and_local_elsewhere(case: Case, share: float) -> None:
    local, exact = (
        cv.attribute(case.model, case.task(), name, progress=False) for name in ("local", "exact")
    )
    graph = local.graph
    budget = local_cost(graph) + share * exact_cost(graph) + 1e-6
    found = cv.attribute(case.model, case.task(), "hybrid", budget=budget, progress=False)
    assert found.measured is not None
    assert found.values == pytest.approx(np.where(found.measured, exact.values, local.values), abs=1e-9)
    assert exact_cost(graph, found.measured) <= share * exact_cost(graph) + 1e-5
    assert found.provenance.parameters["exact_edges"] == found.measured.sum()


@given(cases(smooth=True, max_depth=2, max_heads=2))
def test_doubt_is_what_is_left_of_eap_when_no_two_tokens_cancel(case: Case) -> None:
    case = Case(case.recipe, 1, "none", case.metric, case.ablation, case.direction, case.seed)
    prepared = case.task().prepare(case.model)
    (given_,) = differentiated_runs(prepared, 1)
    found = uncancelled(*given_)
    outputs = case.literal.run(case.base).outputs
    slopes = literal_scores.gradients(case.literal, case.base, case.formula, set(case.literal.receivers()))
    for sender, receiver, _, name in case.literal.edges():
        by_token = ((case.reference[sender] - outputs[sender]) * slopes[receiver]).sum(dim=-1)
        expected = float(by_token.abs().sum())
        assert found[prepared.graph.edge_index(name)] == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_the_most_doubtful_edges_are_bought_first_and_early_ones_before_late_ones() -> None:
    graph = Case(Recipe(depth=2, heads=2)).model.graph
    doubt = np.where(graph.edge_mask, 1.0, 0.0)
    doubt[graph.edge_index("m0->a1.h0<v>")] = 100.0
    chosen = affordable(graph, doubt, 3.0)
    assert chosen[graph.edge_index("m0->a1.h0<v>")]
    layers = [int(name.split("->")[1][1]) for name in graph.names_of(chosen) if name != "m0->a1.h0<v>"]
    assert set(layers) == {0}
    assert not affordable(graph, doubt, 0.1).any()
    assert affordable(graph, doubt, 1e9).sum() == graph.n_edges


def test_costs_fall_with_depth_and_belong_to_edges_only() -> None:
    graph = Case(Recipe(depth=3)).model.graph
    costs = exact_costs(graph)
    assert costs[graph.edge_index("input->a0.h0<q>")] == 1.0
    assert 0 < costs[graph.edge_index("input->logits")] < costs[graph.edge_index("input->m2")] < 1
    assert not costs[~graph.edge_mask].any()


@pytest.mark.parametrize(
    ("spec", "budget"),
    [(60, Budget(60)), ("60", Budget(60)), ("1.5m", Budget(90, True)), ("20s", Budget(20, True))],
)
def test_budgets_are_forwards_or_durations(spec: str | float, budget: Budget) -> None:
    assert Budget.parse(spec) == budget


@pytest.mark.parametrize("spec", ["", "0", "-3", "5 parsecs", "nan", "s"])
def test_what_is_no_budget_is_refused(spec: str) -> None:
    with pytest.raises(OptionError, match="a budget is"):
        Budget.parse(spec)


@pytest.mark.parametrize("amount", [0.0, -3.0, float("nan"), float("inf")])
def test_a_budget_made_by_hand_is_positive_too(amount: float) -> None:
    with pytest.raises(OptionError, match="a budget is"):
        Budget(amount)


def test_budgets_are_for_methods_that_can_choose() -> None:
    case = Case(Recipe(depth=1))
    with pytest.raises(OptionError, match="'hybrid' and 'auto'"):
        cv.attribute(case.model, case.task(), "eap", budget=10, progress=False)
    with pytest.raises(OptionError, match="hybrid takes at least"):
        cv.attribute(case.model, case.task(), "hybrid", budget=1, progress=False)


@pytest.mark.parametrize(
    ("budget", "metric", "method"),
    [
        (1000, cv.logit_diff(0, 1), "exact"),
        ("1h", cv.logit_diff(0, 1), "exact"),
        (25, cv.logit_diff(0, 1), "hybrid"),
        (2, cv.logit_diff(0, 1), "eap"),
        (25, cv.accuracy(0), "exact"),
        (25, cv.kl_divergence(), "exact"),
    ],
    ids=["rich", "patient", "middling", "poor", "no-gradient", "flat"],
)
def test_auto_takes_the_best_that_the_budget_buys_and_says_why(
    budget: str | float, metric: object, method: str
) -> None:
    case = Case(Recipe(depth=2, heads=3), n_pairs=2, metric="curved")
    metric = cv.accuracy(int(case.model(case.clean[:1]).argmax())) if "accuracy" in str(metric) else metric
    found = cv.attribute(case.model, case.task(metric=metric), "auto", budget=budget, progress=False)
    assert found.method == found.provenance.method == method
    assert str(found.provenance.parameters["chosen"]).startswith(f"{method}: ")
    plain = cv.attribute(
        case.model, case.task(metric=metric), method, progress=False,
        **({"budget": budget} if method == "hybrid" else {}),
    )  # fmt: skip
    assert found.values == pytest.approx(plain.values, abs=1e-12)

"""Integrated gradients on edges: the literal definition for all rules, and completeness at the input."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import circuitvit as cv
from circuitvit.attribution.paths import Rule, path_nodes
from circuitvit.errors import NameNotFoundError, OptionError
from tests.attribution.variants import RULES, scored
from tests.reference import literal_scores
from tests.strategies import METRICS, Case, Recipe, assert_same_scores, cases


@pytest.mark.parametrize("method", RULES)
@given(case=cases(smooth=True), steps=st.integers(1, 4))
def test_scores_are_those_of_the_definition(method: str, case: Case, steps: int) -> None:
    expected = literal_scores.eap_ig(
        case.literal, case.base, case.reference, case.formula, steps, RULES[method], case.token_groups
    )
    found = scored(case.model, case.task(), method, steps=steps)
    assert_same_scores(found.to_dict(), expected)


# -- completeness --------------------------------------------------------------------------------------


def gap(case: Case, method: str, steps: int) -> float:
    """How far the scores of the edges that leave the input are from metric(paired) - metric(base)."""
    scores = scored(case.model, case.task(), method, steps=steps)
    total = float(scores.values[case.model.graph.sender_index["input"]].sum())
    with torch.no_grad():
        ends = [case.formula(case.module(images)).mean() for images in (case.paired, case.base)]
    return abs(total - float(ends[0] - ends[1]))


@given(cases(smooth=True, ablations=("patch",), max_depth=2))
def test_the_scores_that_leave_the_input_sum_to_the_difference_of_the_metric(case: Case) -> None:
    # A short path under a norm with a large eps: long ones cross cliffs that take hundreds of nodes.
    case = replace(case, recipe=replace(case.recipe, norm="layer-coarse"), distance=0.1)
    assert gap(case, "eap-ig-gauss", 48) < 1e-6


def test_each_rule_converges_at_its_own_speed() -> None:
    """Left sums halve their error with twice the steps, midpoints quarter it, Gauss-Legendre has none."""
    case = Case(Recipe(depth=2, heads=2, norm="layer-coarse"), metric="log_probability")
    left = gap(case, "eap-ig-left", 32) / gap(case, "eap-ig-left", 64)
    midpoint = gap(case, "eap-ig", 32) / gap(case, "eap-ig", 64)
    assert left == pytest.approx(2, rel=0.1)
    assert midpoint == pytest.approx(4, rel=0.1)
    assert gap(case, "eap-ig-gauss", 32) < 1e-8


def test_with_the_reference_at_zero_the_path_starts_there() -> None:
    """Zero ablation: the path runs from a zero embedding, and completeness refers to that."""
    case = Case(Recipe(depth=1, norm="layer-coarse"), ablation="zero")
    scores = scored(case.model, case.task(), "eap-ig-gauss", steps=32)
    nothing = case.literal.run(case.base, embedded=torch.zeros_like(case.literal.embed(case.base)))
    expected = (case.formula(nothing.logits) - case.formula(case.literal.run(case.base).logits)).mean()
    assert scores.values[0].sum() == pytest.approx(float(expected), abs=1e-6)


def test_one_step_of_the_left_rule_is_the_gradient_at_the_corrupt_input_alone() -> None:
    case = Case(Recipe(depth=1))
    slopes = literal_scores.gradients(
        case.literal, case.base, METRICS["logit_diff"][1], {"m0"}, embedded=case.reference["input"]
    )
    difference = case.reference["input"] - case.literal.run(case.base).outputs["input"]
    expected = float((difference * slopes["m0"]).sum()) / case.n_pairs
    scores = scored(case.model, case.task(), "eap-ig-left", steps=1)
    assert scores["input->m0"] == pytest.approx(expected, rel=1e-9)


# -- the rules -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES.values())
@given(steps=st.integers(1, 30))
def test_nodes_lie_on_the_path_in_order_and_weigh_one_in_all(rule: Rule, steps: int) -> None:
    nodes = path_nodes(steps, rule)
    places = [place for place, _ in nodes]
    assert len(nodes) == steps
    assert places == sorted(places)
    assert all(0 <= place < 1 and weight > 0 for place, weight in nodes)
    assert sum(weight for _, weight in nodes) == pytest.approx(1, abs=1e-12)


@given(steps=st.integers(1, 8), degree=st.integers(0, 15))
def test_gauss_legendre_is_exact_for_polynomials_of_degree_below_twice_the_steps(
    steps: int, degree: int
) -> None:
    found = sum(weight * place**degree for place, weight in path_nodes(steps, "gauss-legendre"))
    if degree < 2 * steps:
        assert found == pytest.approx(1 / (degree + 1), abs=1e-12)


@pytest.mark.parametrize("steps", [0, -1])
def test_a_path_needs_a_step(steps: int) -> None:
    case = Case(Recipe(depth=1))
    with pytest.raises(OptionError, match="steps"):
        cv.attribute(case.model, case.task(), "eap-ig", steps=steps)


def test_rules_have_names() -> None:
    case = Case(Recipe(depth=1))
    with pytest.raises(NameNotFoundError, match="rule 'gauss': did you mean 'gauss-legendre'"):
        cv.attribute(case.model, case.task(), "eap-ig", rule="gauss")

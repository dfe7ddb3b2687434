"""What every scoring method promises, whatever it computes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

import circuitvit as cv
from circuitvit.errors import DataError, NameNotFoundError, OptionError
from tests.strategies import Case, Recipe, cases

METHODS = ("eap", "eap-ig", "eap-ig-gauss", "eap-ig-left", "exact")


def test_these_are_among_the_methods() -> None:
    assert set(METHODS) <= set(cv.METHODS)
    for method in cv.METHODS.values():
        assert method.summary
        assert method.cost


@pytest.mark.parametrize("method", METHODS)
@given(case=cases(smooth=True, max_depth=2, max_heads=2))
def test_scores_do_not_depend_on_the_batch_size(method: str, case: Case) -> None:
    case = Case(case.recipe, 5, case.groups, case.metric, case.ablation, case.direction, case.seed)
    together = cv.attribute(case.model, case.task(), method, steps=2, batch_size=5, progress=False).values
    scale = max(1.0, abs(together).max())
    for size in (1, 2, 3):
        apart = cv.attribute(case.model, case.task(), method, steps=2, batch_size=size, progress=False).values
        assert abs(apart - together).max() <= 1e-12 * scale


@pytest.mark.parametrize("ablation", ["noise", "resample"])
@pytest.mark.parametrize("method", METHODS)
def test_nor_with_random_ablations(method: str, ablation: str) -> None:
    case = Case(Recipe(depth=2, heads=2), n_pairs=5)
    task = case.task(ablation=ablation)
    together = cv.attribute(case.model, task, method, batch_size=5, progress=False).values
    for size in (1, 2, 3):
        apart = cv.attribute(case.model, task, method, batch_size=size, progress=False).values
        assert apart == pytest.approx(together, abs=1e-11)


@pytest.mark.parametrize("method", METHODS)
def test_the_memory_budget_chooses_the_batch_size_and_not_the_answer(method: str) -> None:
    case = Case(Recipe(depth=1), n_pairs=4)
    whole = cv.attribute(case.model, case.task(), method, progress=False).values
    assert cv.attribute(case.model, case.task(), method, memory=1, progress=False).values == pytest.approx(
        whole, abs=1e-12
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_same_call_gives_the_same_bytes(method: str) -> None:
    case = Case(Recipe(depth=2, heads=2), ablation="patch")
    first, second = (cv.attribute(case.model, case.task(), method, progress=False).values for _ in range(2))
    assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("method", METHODS)
def test_scores_know_where_they_came_from(method: str) -> None:
    case = Case(Recipe(depth=1))
    scores = cv.attribute(case.model, case.task(), method, steps=3, progress=False)
    assert scores.method == method
    assert scores.provenance.method == method
    assert scores.provenance.weights == case.model.weights_hash
    assert ("steps" in scores.provenance.parameters) == method.startswith("eap-ig")


def test_the_seed_of_a_random_ablation_is_recorded() -> None:
    case = Case(Recipe(depth=1), n_pairs=3)
    scores = cv.attribute(case.model, case.task(ablation=cv.Resample(seed=17)), progress=False)
    assert scores.provenance.seed == 17
    assert cv.attribute(case.model, case.task(), progress=False).provenance.seed is None


@pytest.mark.parametrize("method", METHODS)
def test_equal_clean_and_corrupt_images_are_refused(method: str) -> None:
    """All scores would be 0, or the noise of rounding."""
    case = Case(Recipe(depth=2, heads=2), n_pairs=3)
    with pytest.raises(DataError, match=r"(?i)equal") as caught:
        cv.attribute(case.model, cv.Task(case.clean, case.clean, cv.logit_diff(0, 1)), method, progress=False)
    assert "images" in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_equal_images_are_refused_where_the_classes_are_the_models_own(method: str) -> None:
    case = Case(Recipe(depth=1))
    with pytest.raises(DataError, match="target and foil are the same class"):
        cv.attribute(case.model, cv.Task(case.clean, case.clean), method, progress=False)


@pytest.mark.parametrize("method", METHODS)
def test_one_differing_pair_among_equal_ones_is_enough(method: str) -> None:
    case = Case(Recipe(depth=1), n_pairs=3)
    corrupt = case.clean.clone()
    corrupt[1] = case.corrupt[1]
    mixed = cv.attribute(
        case.model, cv.Task(case.clean, corrupt, cv.logit_diff(0, 1)), method, batch_size=1, progress=False
    )
    alone = cv.Task(case.clean[1:2], case.corrupt[1:2], cv.logit_diff(0, 1))
    assert mixed.values == pytest.approx(
        cv.attribute(case.model, alone, method, progress=False).values / 3, abs=1e-12
    )


def test_an_unknown_method_is_refused_with_the_nearest() -> None:
    case = Case(Recipe(depth=1))
    with pytest.raises(NameNotFoundError, match=r"unknown method 'eap-gi': did you mean 'eap-ig'"):
        cv.attribute(case.model, case.task(), "eap-gi")


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"batch_size": -3}, {"steps": 0}, {"memory": 0}], ids=str
)
def test_numbers_that_make_no_sense_are_refused(options: dict[str, int]) -> None:
    case = Case(Recipe(depth=1))
    with pytest.raises(OptionError):
        cv.attribute(case.model, case.task(), "eap-ig", progress=False, **options)


def test_scores_are_had_inside_no_grad_too() -> None:
    case = Case(Recipe(depth=1))
    expected = cv.attribute(case.model, case.task(), progress=False).values
    with torch.no_grad():
        assert (cv.attribute(case.model, case.task(), progress=False).values == expected).all()

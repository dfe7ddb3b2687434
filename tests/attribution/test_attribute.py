"""What every scoring method promises, whatever it computes."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given

import circuitvit as cv
from circuitvit.errors import DataError, NameNotFoundError, OptionError
from tests.attribution.variants import RULES, scored
from tests.strategies import Case, Recipe, cases

METHODS = ("eap", *RULES, "local", "exact")


def test_these_are_among_the_methods() -> None:
    assert {"eap", "eap-ig", "local", "exact"} <= set(cv.METHODS)
    for method in cv.METHODS.values():
        assert method.summary
        assert method.cost


@pytest.mark.parametrize("method", METHODS)
@given(case=cases(smooth=True, max_depth=2, max_heads=2))
def test_scores_do_not_depend_on_the_batch_size(method: str, case: Case) -> None:
    case = Case(case.recipe, 5, case.groups, case.metric, case.ablation, case.direction, case.seed)
    together = scored(case.model, case.task(), method, steps=2, batch_size=5).values
    scale = max(1.0, abs(together).max())
    for size in (1, 2):  # 2 leaves a batch of 1
        apart = scored(case.model, case.task(), method, steps=2, batch_size=size).values
        assert abs(apart - together).max() <= 1e-12 * scale


@pytest.mark.parametrize("ablation", ["noise", "resample"])
@pytest.mark.parametrize("method", METHODS)
def test_nor_with_random_ablations(method: str, ablation: str) -> None:
    case = Case(Recipe(depth=2, heads=2), n_pairs=5)
    task = case.task(ablation=ablation)
    together = scored(case.model, task, method, batch_size=5).values
    for size in (1, 2, 3):
        apart = scored(case.model, task, method, batch_size=size).values
        assert apart == pytest.approx(together, abs=1e-11)


@pytest.mark.parametrize("method", METHODS)
def test_the_memory_budget_chooses_the_batch_size_and_not_the_answer(method: str) -> None:
    case = Case(Recipe(depth=1), n_pairs=4)
    whole = scored(case.model, case.task(), method).values
    assert scored(case.model, case.task(), method, memory=1).values == pytest.approx(whole, abs=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_call_gives_the_same_bytes(method: str) -> None:
    case = Case(Recipe(depth=2, heads=2), ablation="patch")
    first, second = (scored(case.model, case.task(), method).values for _ in range(2))
    assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("method", METHODS)
def test_scores_know_where_they_came_from(method: str) -> None:
    case = Case(Recipe(depth=1))
    scores = scored(case.model, case.task(), method, steps=3)
    assert scores.method == scores.provenance.method == ("eap-ig" if method in RULES else method)
    assert scores.provenance.weights == case.model.weights_hash
    own = {"steps": 3, "rule": RULES[method]} if method in RULES else {}
    assert scores.provenance.parameters == own


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
        scored(case.model, cv.Task(case.clean, case.clean, cv.logit_diff(0, 1)), method)
    assert "images" in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_equal_images_are_refused_where_the_classes_are_the_models_own(method: str) -> None:
    case = Case(Recipe(depth=1))
    with pytest.raises(DataError, match="target and foil are the same class"):
        scored(case.model, cv.Task(case.clean, case.clean), method)


@pytest.mark.parametrize("method", METHODS)
def test_one_differing_pair_among_equal_ones_is_enough(method: str) -> None:
    case = Case(Recipe(depth=1), n_pairs=3)
    corrupt = case.clean.clone()
    corrupt[1] = case.corrupt[1]
    mixed = scored(case.model, cv.Task(case.clean, corrupt, cv.logit_diff(0, 1)), method, batch_size=1)
    alone = cv.Task(case.clean[1:2], case.corrupt[1:2], cv.logit_diff(0, 1))
    assert mixed.values == pytest.approx(scored(case.model, alone, method).values / 3, abs=1e-12)


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


@pytest.mark.parametrize(
    ("method", "keywords", "message"),
    [
        ("eap", {"steps": 3}, r"eap takes no 'steps': it belongs to 'eap-ig' and 'ceap'$"),
        ("ceap", {"rule": "left"}, r"ceap takes no 'rule': it belongs to 'eap-ig'; ceap takes steps$"),
        ("exact", {"budget": 60}, r"it belongs to 'hybrid' and 'auto'; exact takes state$"),
        ("local", {"seed": 1}, r"local takes no 'seed': it belongs to 'random'$"),
        ("eap-ig", {"step": 3}, r"eap-ig takes no 'step': no method does; eap-ig takes steps, rule$"),
    ],
)
def test_a_keyword_of_another_method_is_refused_before_anything_runs(
    method: str, keywords: dict[str, object], message: str
) -> None:
    case = Case(Recipe(depth=1))
    with pytest.raises(OptionError, match=message):
        cv.attribute(case.model, case.task(metric=lambda logits: pytest.fail("ran")), method, **keywords)


@pytest.mark.parametrize(("former", "rule"), [("eap-ig-gauss", "gauss-legendre"), ("eap-ig-left", "left")])
def test_a_former_name_says_what_it_is_now(former: str, rule: str) -> None:
    case = Case(Recipe(depth=1))
    with pytest.raises(NameNotFoundError, match=rf"'{former}' is method='eap-ig' with rule='{rule}' now"):
        cv.attribute(case.model, case.task(), former)


@pytest.mark.parametrize("method", sorted(cv.METHODS))
def test_every_keyword_has_a_type_a_default_and_a_description(method: str) -> None:
    """The command line makes its options of them."""
    described = inspect.getdoc(cv.METHODS[method].score) or ""
    for name, keyword in cv.METHODS[method].keywords.items():
        assert keyword.annotation is not keyword.empty
        assert keyword.default is not keyword.empty
        assert re.search(rf"^    {name}: \w", described.partition("Args:")[2], re.MULTILINE)


def test_the_table_of_methods_is_read_without_them() -> None:
    """Help and completion list the methods: they must not wait for torch."""
    code = (
        "import sys, types; package = types.ModuleType('circuitvit'); package.__path__ = [sys.argv[1]];"
        "sys.modules['circuitvit'] = package; from circuitvit.attribution import METHODS;"
        "assert METHODS['eap'].summary; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(Path(cv.__file__).parent)], check=True)


def test_left_out_the_method_is_the_best_that_is_cheap() -> None:
    case = Case(Recipe(depth=1))
    plain = cv.attribute(case.model, case.task(), progress=False)
    assert plain.method == "local"
    assert (plain.values == cv.attribute(case.model, case.task(), "local", progress=False).values).all()


def test_scores_are_had_inside_no_grad_too() -> None:
    case = Case(Recipe(depth=1))
    expected = cv.attribute(case.model, case.task(), progress=False).values
    with torch.no_grad():
        assert (cv.attribute(case.model, case.task(), progress=False).values == expected).all()

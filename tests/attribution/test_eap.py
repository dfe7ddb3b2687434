"""Edge attribution patching: the literal definition, and cases whose answer is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

import circuitvit as cv
from circuitvit.errors import DataError, OptionError
from tests.attribution.variants import RULES, scored
from tests.reference import literal_scores
from tests.strategies import Case, Recipe, assert_same_scores, cases


@given(cases(smooth=True))
def test_scores_are_those_of_the_definition(case: Case) -> None:
    expected = literal_scores.eap(case.literal, case.base, case.reference, case.formula, case.token_groups)
    found = cv.attribute(case.model, case.task(), "eap", progress=False)
    assert found.direction == case.direction
    assert_same_scores(found.to_dict(), expected)


# -- known answers -----------------------------------------------------------------------------------


def copying_model() -> Any:
    """A linear chain made by hand, on streams of width 3 with one token and no norms.

    The input writes its two pixels to features 0 and 1; `a0.h0` (whose values are feature 0) copies it to
    feature 2 three times; `m0` adds twice feature 2 to feature 1; class 0 reads feature 1, class 1 feature 0.
    """
    recipe = Recipe(
        depth=1,
        heads=1,
        width=3,
        grid=(1, 1),
        classes=2,
        class_token=False,
        pool="avg",
        norm="none",
        mlp="relu",
        qkv_bias=False,
    )
    module = recipe.build()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.patch_embed.proj.weight[0, 0, 0, 0] = 1.0
        module.patch_embed.proj.weight[1, 1, 0, 0] = 1.0
        block = module.blocks[0]
        block.attn.qkv.weight[6, 0] = 1.0  # the first value feature
        block.attn.proj.weight[2, 0] = 3.0
        block.mlp.fc1.weight[0, 2] = 1.0
        block.mlp.fc1.bias[0] = 100.0  # far from the kink
        block.mlp.fc2.weight[1, 0] = 2.0
        block.mlp.fc2.bias[1] = -200.0
        module.head.weight[0, 1] = 1.0
        module.head.weight[1, 0] = 1.0
    return module


def pixels(first: float, second: float) -> Tensor:
    image = torch.zeros(1, 2, 2, 2)
    image[0, 0, 0, 0], image[0, 1, 0, 0] = first, second
    return image


@pytest.mark.parametrize("method", ["eap", *RULES, "exact"])
def test_a_chain_made_by_hand_has_the_effects_that_one_would_say(method: str) -> None:
    model = cv.wrap(copying_model())
    task = cv.Task(pixels(1.0, 5.0), pixels(3.0, 4.0), cv.logit_diff(0, 1))
    scores = scored(model, task, method)
    # Clean: logits (5 + 2 * 3 * 1, 1); corrupt: (4 + 2 * 3 * 3, 3). Pixel 0 rises by 2, pixel 1 falls by 1.
    assert scores.to_dict() == pytest.approx(
        {
            "input->a0.h0<q>": 0.0,  # with one token there is nothing to attend to
            "input->a0.h0<k>": 0.0,
            "input->a0.h0<v>": 12.0,  # 2 * 3 * 2, through the MLP; class 1 does not hear the head
            "input->m0": 0.0,  # feature 2 is not the input's
            "input->logits": -3.0,  # class 0 falls by 1, class 1 rises by 2
            "a0.h0->m0": 12.0,
            "a0.h0->logits": 0.0,
            "m0->logits": 12.0,
        }
    )


@given(cases(smooth=True, ablations=("patch", "zero")))
def test_edges_into_linear_logits_are_exact(case: Case) -> None:
    """Without a final norm, and with token or average pooling, the last step is linear."""
    module = case.recipe.build()
    module.norm = module.fc_norm = torch.nn.Identity()
    model = cv.wrap(module)
    task = case.task(metric=cv.logit_diff(0, 1))
    eap = cv.attribute(model, task, "eap", progress=False).to_dict()
    exact = cv.attribute(model, task, "exact", progress=False).to_dict()
    into_logits = [name for name in eap if "->logits" in name]
    assert_same_scores({name: eap[name] for name in into_logits}, {name: exact[name] for name in into_logits})


def test_a_score_is_a_mean_over_pairs_whatever_their_order() -> None:
    case = Case(Recipe(depth=2, heads=2), n_pairs=3)
    each = [
        cv.attribute(
            case.model, cv.Task(case.clean[i], case.corrupt[i], cv.logit_diff(0, 1)), "eap", progress=False
        ).values
        for i in range(3)
    ]
    both = cv.attribute(case.model, case.task(), "eap", progress=False).values
    assert both == pytest.approx(sum(each) / 3, abs=1e-12)


def test_groups_split_the_score_of_an_edge() -> None:
    case = Case(Recipe(depth=2, registers=1))
    whole = cv.attribute(case.model, case.task(), "eap", progress=False).values[..., 0]
    split = cv.attribute(case.model, case.task(groups="kind"), "eap", progress=False)
    assert split.graph.groups == ("cls", "reg", "patch")
    assert split.values.sum(axis=-1) == pytest.approx(whole, abs=1e-12)


# -- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["eap", *RULES])
def test_a_metric_without_gradient_is_refused_before_anything_runs(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(Recipe(depth=1))
    monkeypatch.setattr(case.model.stages[1], "read", lambda _: pytest.fail("ran the model"))
    with pytest.raises(OptionError, match=r"'accuracy' has none.*logit_diff.*exact"):
        scored(case.model, case.task(metric=cv.accuracy(0)), method)


FLAT = {
    "zero-slope": lambda logits: logits[:, 0] * 0.0,
    "rounded": lambda logits: logits[:, 0].round(),
}
CONSTANT = {
    "no-logits": lambda logits: torch.ones(len(logits), dtype=logits.dtype),
    "detached": lambda logits: logits.detach()[:, 0],
}


@pytest.mark.parametrize("method", ["eap", "eap-ig"])
@pytest.mark.parametrize("metric", CONSTANT.values(), ids=CONSTANT)
def test_a_function_without_a_gradient_is_refused(metric: Any, method: str) -> None:
    case = Case(Recipe(depth=1))
    with pytest.raises(OptionError, match=r"'<lambda>' has none"):
        scored(case.model, case.task(metric=metric), method)


@pytest.mark.parametrize("method", ["eap", "eap-ig"])
@pytest.mark.parametrize("metric", FLAT.values(), ids=FLAT)
def test_a_flat_metric_is_refused(metric: Any, method: str) -> None:
    case = Case(Recipe(depth=1))
    with pytest.raises(DataError, match=r"gradient .* is 0 everywhere"):
        cv.attribute(case.model, case.task(metric=metric), method, progress=False)


@pytest.mark.parametrize("metric", [cv.kl_divergence(), cv.cross_entropy()], ids=lambda metric: metric.name)
def test_a_divergence_from_the_clean_run_is_refused_where_it_is_flat_and_taken_where_it_is_not(
    metric: Any,
) -> None:
    """Rounding leaves traces of a gradient at the minimum, so scores of exactly 0 are no sign to go by."""
    case = Case(Recipe(depth=1))
    task = case.task(metric=metric)
    with pytest.raises(OptionError, match=f"{metric.name} is flat at the clean run.*eap-ig"):
        cv.attribute(case.model, task, "eap", progress=False)
    for scores in (
        cv.attribute(case.model, task, "eap-ig", progress=False),
        cv.attribute(case.model, task.with_options(direction="denoising"), "eap", progress=False),
    ):
        assert abs(scores.values).max() > 1e-3

"""Every estimator against its literal definition, and the invariants that tie them together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitvit as cv
from circuitvit.engine import capture, gradients
from circuitvit.models import BackwardRules
from tests.attribution import variants
from tests.attribution.variants import RULES
from tests.reference import literal_methods, literal_scores
from tests.strategies import Case, Recipe, assert_close, assert_same_scores, cases

SMALL: dict[str, Any] = {"smooth": True, "max_depth": 2, "max_heads": 2}


def scored(case: Case, method: str, **options: Any) -> dict[str, float]:
    return variants.scored(case.model, case.task(), method, **options).to_dict()


# -- definitions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "literal"),
    [("relp", literal_methods.RelevanceViT), ("gim", literal_methods.InteractionViT)],
)
@given(case=cases(**SMALL))
def test_modified_gradients_are_those_of_a_model_with_these_derivatives(
    method: str, literal: type[literal_methods.RelevanceViT], case: Case
) -> None:
    ruled = literal(case.module)
    expected = literal_scores.eap(ruled, case.base, case.reference, case.formula, case.token_groups)
    assert_same_scores(scored(case, method), expected, relative=1e-5)


@given(cases(**SMALL))
def test_atp_recomputes_the_pattern_of_queries_and_keys(case: Case) -> None:
    expected = literal_methods.atp_qk(
        case.literal, case.base, case.reference, case.formula, case.token_groups
    )
    assert_same_scores(scored(case, "atp-qk"), expected, relative=1e-5)


@settings(max_examples=10)
@given(cases(smooth=True, max_depth=3, max_heads=1))
def test_grad_drop_is_the_mean_size_over_the_other_layers(case: Case) -> None:
    given_ = (case.literal, case.base, case.reference, case.formula, case.token_groups)
    plain = literal_methods.atp_qk(*given_)
    without = [literal_methods.atp_qk(*given_, dropped=layer) for layer in range(case.recipe.depth)]
    expected = {}
    for name, score in plain.items():
        receiver = name.partition("->")[2].partition("@")[0]
        own = -1 if receiver == "logits" else int(receiver[1:].partition(".")[0].partition("<")[0])
        others = [abs(each[name]) for layer, each in enumerate(without) if layer != own]
        expected[name] = float(np.copysign(np.mean(others), score)) if others else score
    found = scored(case, "atp-star")
    sizes = [{name: abs(value) for name, value in each.items()} for each in (found, expected)]
    assert_same_scores(*sizes, relative=1e-5)
    for name, score in plain.items():
        assert found[name] * score >= 0 or abs(score) < 1e-9


@given(cases(**SMALL), st.integers(1, 4))
def test_conductance_follows_the_senders_along_the_path(case: Case, steps: int) -> None:
    expected = literal_methods.ceap(
        case.literal, case.base, case.reference, case.formula, steps, case.token_groups
    )
    assert_same_scores(scored(case, "ceap", steps=steps), expected)


@given(cases(**SMALL))
def test_information_flow_is_a_share_of_what_is_read(case: Case) -> None:
    expected = literal_methods.ifr(case.literal, case.base, case.token_groups)
    assert_same_scores(scored(case, "ifr"), expected)
    assert 0 <= min(expected.values()) <= max(expected.values()) <= 1 + 1e-12


def test_random_scores_come_from_the_seed_alone() -> None:
    case = Case(Recipe(depth=2), n_pairs=3)
    first = scored(case, "random", seed=1)
    assert first == scored(case, "random", seed=1, batch_size=1)
    assert first == pytest.approx(scored(Case(Recipe(depth=2), n_pairs=1, seed=5), "random", seed=1))
    assert first != scored(case, "random", seed=2)


# -- rules change gradients and nothing else -----------------------------------------------------------

ALL_RULES = BackwardRules(True, True, 2.0, 0.25, 0.5, 0.5)


@given(cases(max_depth=2, max_heads=2))
def test_a_model_with_rules_says_what_the_model_says(case: Case) -> None:
    ruled = case.model.with_rules(ALL_RULES)
    assert_close(capture(ruled, case.base).logits, case.module(case.base), 1e-9)
    assert ruled.graph == case.model.graph


@pytest.mark.parametrize("method", ["relp", "gim"])
@pytest.mark.parametrize("mlp", ["gelu", "glu", "swiglu"])
def test_rules_change_the_scores_where_they_apply(mlp: str, method: str) -> None:
    """Of every kind of receiver: a part that the rules pass over would have the scores of EAP."""
    case = Case(Recipe(depth=2, heads=2, mlp=mlp))
    plain, ruled = scored(case, "eap"), scored(case, method)
    for receiver in ("a0.h0<q>", "a0.h0<k>", "a0.h0<v>", "m0", "a1.h1<q>", "m1", "logits"):
        pair = [
            np.array([each[name] for name in each if name.endswith(f"->{receiver}")])
            for each in (plain, ruled)
        ]
        assert np.abs(pair[0] - pair[1]).max() > 1e-3 * np.abs(pair[0]).max(), receiver


# -- invariants --------------------------------------------------------------------------------------


@settings(max_examples=10)
@given(cases(smooth=True, ablations=("patch",), max_depth=2, max_heads=2))
def test_conductance_is_complete_on_every_cut(case: Case) -> None:
    """The edges that cross a cut after any stage carry all of metric(reference) - metric(base).

    With steps enough for the path: a norm over three numbers may bend sharply on it.
    """
    case = Case(case.recipe, 2, "none", "logit_diff", "patch", case.direction, case.seed, distance=0.05)
    with torch.no_grad():
        ends = [case.formula(case.module(images)).mean() for images in (case.base, case.paired)]
    wanted = pytest.approx(float(ends[1] - ends[0]), rel=0.02, abs=2e-3)
    for steps in (100, 1600, 6400):
        carried = cut_sums(cv.attribute(case.model, case.task(), "ceap", steps=steps, progress=False))
        if all(total == wanted for total in carried):
            return
    assert carried == [wanted] * len(carried)


def cut_sums(scores: cv.EdgeScores) -> list[float]:
    """For each cut, the sum of the scores of the edges that cross it."""
    graph = scores.graph
    sent, received = np.array(graph.sender_stages), np.array(graph.receiver_stages)
    crossing = [(sent[:, None] < cut) & (received[None, :] >= cut) for cut in range(1, len(graph.stages))]
    return [float(scores.values[edges].sum()) for edges in crossing]


@given(cases(smooth=True))
def test_query_key_and_value_gradients_sum_to_that_of_the_shared_stream(case: Case) -> None:
    embedded = capture(case.model, case.base).compacts[0]
    found = gradients(case.model, embedded, case.formula)
    for index, each in enumerate(found.by_stage(), 1):
        stage, leaf = case.model.essential[index], found.capture.stream(index).clone().requires_grad_()
        with torch.enable_grad():
            reads = stage.read(leaf)
        fused = torch.autograd.grad(reads, leaf, found.d_reads[index])[0]
        assert_close(each.expand().sum(dim=0), fused, 1e-9)


def linear_case() -> Case:
    """Attention that is uniform whatever it sees, MLPs without activations, no norms."""
    case = Case(Recipe(depth=2, heads=2, norm="none", class_token=False, pool="avg"), n_pairs=2)
    for block in case.module.blocks:
        block.mlp.act = torch.nn.Identity()
        with torch.no_grad():
            rows = block.attn.qkv.weight.shape[0] // 3
            block.attn.qkv.weight[: 2 * rows] = 0
    return case


@pytest.mark.parametrize("method", ["eap", *RULES, "relp", "atp-qk", "local", "hybrid"])
def test_on_a_linear_model_every_estimator_is_exact(method: str) -> None:
    case = linear_case()
    assert_same_scores(scored(case, method), scored(case, "exact"))


def test_on_a_linear_model_conductance_is_exact_too_and_shared_gradients_are_shares() -> None:
    """The path's differences are the senders' own; GIM halves values, so it knows the last step only."""
    case = linear_case()
    exact, ceap, gim = (scored(case, method) for method in ("exact", "ceap", "gim"))
    assert_same_scores(ceap, exact)
    assert gim["input->a1.h0<v>"] == pytest.approx(exact["input->a1.h0<v>"] / 2)
    assert gim["input->logits"] == pytest.approx(exact["input->logits"])


CAUSAL = [name for name in cv.METHODS if name not in ("ifr", "random")]


@pytest.mark.parametrize("method", CAUSAL)
def test_a_receiver_without_a_path_to_the_output_scores_0(method: str) -> None:
    case = Case(Recipe(depth=2, heads=2), n_pairs=1)
    with torch.no_grad():  # nobody hears the second head of the last layer
        projection = case.module.blocks[1].attn.proj.weight
        projection[:, projection.shape[1] // 2 :] = 0
    scores = scored(case, method)
    for name, score in scores.items():
        if "->a1.h1" in name:
            assert score == pytest.approx(0.0, abs=1e-12)
    assert any(scores.values())


@pytest.mark.parametrize("method", ["relp", "gim", "atp-qk", "atp-star", "ceap", "ifr", "local", "hybrid"])
@given(case=cases(smooth=True, max_depth=2, max_heads=2))
def test_scores_do_not_depend_on_the_batch_size(method: str, case: Case) -> None:
    case = Case(case.recipe, 3, case.groups, case.metric, case.ablation, case.direction, case.seed)
    together = variants.scored(case.model, case.task(), method, steps=2, batch_size=3).values
    apart = variants.scored(case.model, case.task(), method, steps=2, batch_size=2).values
    assert abs(apart - together).max() <= 1e-11 * max(1.0, abs(together).max())

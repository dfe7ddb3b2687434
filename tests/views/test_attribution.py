"""Direct logit attribution: shares sum to the model's own logits, whatever the readout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import circuitvit as cv
from circuitvit.errors import NameNotFoundError, OptionError, UnsupportedModelError
from circuitvit.views import attribution_of_task, direct_logit_attribution
from tests.strategies import Recipe, recipes

POOLS = ("token", "avg", "max", "avgmax")
NORMS = ("layer", "layer-coarse", "rms", "torch-rms", "none")


def worst_gap(model: cv.Model, images: torch.Tensor) -> float:
    view = direct_logit_attribution(model, images, 0, 1, batch_size=2)
    logits = model(images.to(model.dtype))
    own = (logits[:, 0] - logits[:, 1]).double().numpy()
    np.testing.assert_allclose(view.logit_difference, own, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(view.by_source.sum(axis=-1), view.by_sender, rtol=1e-6, atol=1e-8)
    return float(np.abs(view.total - own).max() / max(1.0, np.abs(view.by_sender).max()))


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("fc_norm", [None, True, False])
def test_shares_sum_to_the_logits_for_every_pooling_and_norm(
    pool: str, norm: str, fc_norm: bool | None
) -> None:
    recipe = Recipe(depth=2, heads=2, pool=pool, norm=norm, fc_norm=fc_norm, layer_scale=True, registers=1)
    assert worst_gap(cv.wrap(recipe.build()), recipe.images(3)) < 1e-10


@pytest.mark.parametrize("include", [False, True])
def test_shares_sum_to_the_logits_with_prefix_tokens_in_the_pool(include: bool) -> None:
    recipe = Recipe(depth=1, heads=2, pool="avg", registers=2, pool_include_prefix=include)
    assert worst_gap(cv.wrap(recipe.build()), recipe.images(2)) < 1e-10


@pytest.mark.parametrize("pool", POOLS)
def test_shares_sum_within_the_promise_in_single_precision(pool: str) -> None:
    recipe = Recipe(depth=3, heads=2, pool=pool)
    model = cv.wrap(recipe.build(torch.float32))
    view = direct_logit_attribution(model, recipe.images(4), 0, 1)
    assert np.abs(view.total - view.logit_difference).max() < 1e-4


@given(recipes(), st.integers(0, 99))
def test_shares_sum_to_the_logits_whatever_the_model(recipe: Recipe, seed: int) -> None:
    model = cv.wrap(recipe.build())
    assert worst_gap(model, recipe.images(2, seed)) < 1e-9


def test_every_share_is_what_the_frozen_readout_makes_of_that_part() -> None:
    """A literal version for LayerNorm and the class token: centre each part, scale it as in the run."""
    recipe = Recipe(depth=2, heads=2)
    module = recipe.build()
    model, images = cv.wrap(module), recipe.images(1)
    view = direct_logit_attribution(model, images, 2, 0)
    from circuitvit.engine import capture, outputs

    run = capture(model, images)
    stream = run.stream(len(model.stages) - 1)[0, 0]
    inverse = torch.rsqrt(stream.var(unbiased=False) + module.norm.eps)
    direction = (module.head.weight[2] - module.head.weight[0]) * module.norm.weight
    for name, written in zip(view.senders, outputs(model.stages, run.compacts), strict=True):
        part = written[0, 0]
        share = float((((part - part.mean()) * inverse) @ direction).detach())
        assert view.of(name) == pytest.approx(share, abs=1e-10)
    assert view.of("norm.bias") == pytest.approx(
        float((module.norm.bias @ (module.head.weight[2] - module.head.weight[0])).detach()), abs=1e-10
    )
    assert view.of("head.bias") == pytest.approx(
        float((module.head.bias[2] - module.head.bias[0]).detach()), abs=1e-10
    )


def test_token_pooling_writes_to_the_class_token_and_reads_from_all() -> None:
    recipe = Recipe(depth=1, heads=2)
    view = direct_logit_attribution(cv.wrap(recipe.build()), recipe.images(2), 0, 1)
    assert np.abs(view.by_token[..., 1:]).max() == 0
    head = view.senders.index("a0.h0")
    assert (np.abs(view.by_source[:, head]) > 0).all()
    assert view.by_patch.shape == (2, len(view.senders), 2, 2)


def test_constants_are_named() -> None:
    recipe = Recipe(depth=2, pool="avg")
    view = direct_logit_attribution(cv.wrap(recipe.build()), recipe.images(1), 0)
    assert view.constants == ("attn0.bias", "attn1.bias", "head.bias", "fc_norm.bias")
    with pytest.raises(OptionError, match=r"no part is called 'm9'"):
        view.of("m9")


def test_the_batch_size_does_not_matter() -> None:
    recipe = Recipe(depth=2, heads=2)
    model, images = cv.wrap(recipe.build()), recipe.images(5)
    one, five = (direct_logit_attribution(model, images, 0, 1, batch_size=size) for size in (1, 5))
    np.testing.assert_allclose(one.by_source, five.by_source, atol=1e-12)


def test_clean_minus_corrupt_shares_the_difference_in_the_metric() -> None:
    recipe = Recipe(depth=2, heads=2)
    model = cv.wrap(recipe.build())
    task = cv.Task(recipe.images(3), recipe.images(3, seed=1), cv.logit_diff(0, 1))
    clean, corrupt = attribution_of_task(model, task)
    assert corrupt is not None
    difference = clean - corrupt
    np.testing.assert_allclose(difference.total, clean.logit_difference - corrupt.logit_difference, atol=1e-9)
    per_pair = task.with_options(metric=cv.logit_diff(cv.PerPair((0, 1, 2)), cv.PerPair((1, 2, 0))))
    clean, _ = attribution_of_task(model, per_pair)
    np.testing.assert_allclose(clean.total, clean.logit_difference, atol=1e-9)


def test_a_task_prepared_for_another_model_is_refused() -> None:
    recipe = Recipe()
    model, other = cv.wrap(recipe.build()), cv.wrap(recipe.build())
    task = cv.Task(recipe.images(1), recipe.images(1, seed=1), cv.logit_diff(0, 1))
    with pytest.raises(OptionError, match="prepared for"):
        attribution_of_task(model, task.prepare(other))
    prepared, _ = attribution_of_task(model, task.prepare(model))
    np.testing.assert_array_equal(prepared.by_token, attribution_of_task(model, task)[0].by_token)


def test_the_shares_in_the_log_odds_of_sets_follow_their_gradient_and_leave_the_entropy() -> None:
    recipe = Recipe(classes=4)
    model, images = cv.wrap(recipe.build()), recipe.images(3)
    view = direct_logit_attribution(model, images, [0, 2], cv.group("the rest", [1, 3]), batch_size=2)
    assert view.label == "class 0 and 1 more - the rest (2 classes)"
    logits = model(images).requires_grad_()
    target, foil = logits[:, [0, 2]], logits[:, [1, 3]]
    odds = target.logsumexp(1) - foil.logsumexp(1)
    np.testing.assert_allclose(view.logit_difference, odds.detach(), atol=1e-6)
    np.testing.assert_allclose(view.total, view.logit_difference, atol=1e-6)
    (weights,) = torch.autograd.grad(odds.sum(), logits)
    alone = np.stack([direct_logit_attribution(model, images, each).by_sender for each in range(4)], axis=-1)
    np.testing.assert_allclose(view.by_sender, np.einsum("isc,ic->is", alone, weights), atol=1e-6)
    entropies = [torch.distributions.Categorical(logits=each).entropy() for each in (target, foil)]
    of_sets = view.constant_values[:, view.constants.index("classes.entropy")]
    np.testing.assert_allclose(of_sets, (entropies[0] - entropies[1]).detach(), atol=1e-6)
    task = cv.Task(images, recipe.images(3, seed=1), cv.logit_diff([0, 2], [1, 3]))
    np.testing.assert_allclose(attribution_of_task(model, task)[0].by_sender, view.by_sender, atol=1e-12)


def test_what_is_no_sum_of_shares_is_refused() -> None:
    recipe = Recipe()
    model = cv.wrap(recipe.build())
    task = cv.Task(recipe.images(1), recipe.images(1, seed=1), cv.logit_diff(0, 1))
    with pytest.raises(OptionError, match="use the metric logit"):
        attribution_of_task(model, task.with_options(metric=cv.log_probability(0)))
    with pytest.raises(OptionError, match="target and foil share"):
        direct_logit_attribution(model, recipe.images(1), 0, 0)
    with pytest.raises(OptionError, match="there is no class 7"):
        direct_logit_attribution(model, recipe.images(1), 7)


def test_an_unknown_readout_is_refused_by_name() -> None:
    recipe = Recipe()
    module = recipe.build()
    module.head = torch.nn.Sequential(module.head, torch.nn.Tanh())
    with pytest.raises(UnsupportedModelError, match=r"head\.1 is a Tanh"):
        direct_logit_attribution(cv.wrap(module), recipe.images(1), 0, 1)


def test_a_class_is_found_by_name_on_the_bundled_model() -> None:
    from circuitvit.datasets.catdog import catdog_pairs

    model, pairs = cv.load("catdog-tiny"), catdog_pairs(4, seed=0)
    view = direct_logit_attribution(model, pairs.clean, "cat", "dog")
    assert np.abs(view.total - view.logit_difference).max() < 1e-4
    assert view.label == "cat - dog"
    assert "strongest" in repr(view)
    with pytest.raises(NameNotFoundError, match="unknown class"):
        direct_logit_attribution(model, pairs.clean, "cta")


def test_shares_sum_to_the_logits_of_a_real_vit(shared_data: Path) -> None:
    name = "vit_tiny_patch16_224"
    model = cv.load(name, checkpoint=shared_data / "weights" / f"{name}.safetensors")
    photos = sorted((shared_data / "images" / "catdog").iterdir())
    view = direct_logit_attribution(model, photos, "tabby", "Border collie")
    assert np.abs(view.total - view.logit_difference).max() < 1e-4
    assert len(view.senders) == 49

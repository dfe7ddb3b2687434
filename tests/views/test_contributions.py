"""Direct contributions sum to the embedding, whatever the model; without some of them answers are lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitvit as cv
from circuitvit.errors import DataError, NameNotFoundError, OptionError, UnsupportedModelError
from circuitvit.models import Head
from circuitvit.models.held import class_directions
from circuitvit.views import Decomposition, decompose, direct_logit_attribution, mean_ablate, patch_evidence
from tests.families import FAMILIES, made
from tests.strategies import Recipe, recipes


def check(model: cv.Model, images: torch.Tensor, **options: object) -> Decomposition:
    """All contributions sum to the model's own, and those of tokens to those of their heads."""
    found = decompose(model, images, tokens=True, progress=False, **options)  # type: ignore[arg-type]
    size = max(1.0, float(np.abs(found.by_sender).max()))
    assert np.abs(found.total - found.embedding).max() < 1e-9 * size
    assert found.by_token is not None
    heads = [found.senders.index(name) for name in found.heads]
    assert np.abs(found.by_token.sum(axis=2) - found.by_sender[:, heads]).max() < 1e-9 * size
    return found


@pytest.mark.parametrize("name", [name for name in FAMILIES if "timesformer" not in name])
def test_contributions_sum_to_the_embedding_in_every_family(name: str) -> None:
    model, _ = made(name)
    images = FAMILIES[name].images(2)
    found = check(model, images)
    if not model.has_classes:
        np.testing.assert_allclose(found.embedding, model(images), rtol=1e-9, atol=1e-9)
    logits = check(model, images, output="logits")
    np.testing.assert_allclose(logits.embedding, model(images), rtol=1e-9, atol=1e-9)


@settings(max_examples=12)
@given(recipes(max_depth=2), st.integers(0, 99))
def test_contributions_sum_to_the_logits_whatever_pools_and_norms(recipe: Recipe, seed: int) -> None:
    model, images = cv.wrap(recipe.build()), recipe.images(2, seed)
    found = check(model, images, output="logits")
    np.testing.assert_allclose(found.embedding, model(images), rtol=1e-9, atol=1e-9)
    share = direct_logit_attribution(model, images, 1, 0, progress=False)
    along = found.by_sender[..., 1] - found.by_sender[..., 0]
    np.testing.assert_allclose(along, share.by_sender, rtol=1e-7, atol=1e-9)
    assert share.by_source.shape[1] == len(found.senders)


@pytest.mark.parametrize("edits", [{"a1.h0": 0}, {"resid1": lambda x: x * 2}, {"a0.*.pattern": cv.causal()}])
def test_contributions_of_an_edited_model_are_those_of_what_it_does(edits: dict[str, object]) -> None:
    recipe = Recipe(depth=2, heads=2, registers=1, pool="avg")
    model = cv.wrap(recipe.build()).edit(edits)
    found = decompose(model, recipe.images(3), progress=False)
    assert np.abs(found.total - found.embedding).max() < 1e-10
    assert not np.array_equal(found.embedding, decompose(model.bare, recipe.images(3)).embedding)
    if "a1.h0" in edits:
        assert not found.of("a1.h0").any()


def test_the_embedding_is_what_a_classifier_reads_and_its_scale_is_that_of_the_norm() -> None:
    """A literal version for LayerNorm and the class token: centre each part, scale it as in the run."""
    recipe = Recipe(depth=2, heads=2)
    module = recipe.build()
    model, images = cv.wrap(module), recipe.images(2)
    found = decompose(model, images, progress=False)
    logits = found.embedding @ module.head.weight.T.detach().numpy() + module.head.bias.detach().numpy()
    np.testing.assert_allclose(logits, model(images), rtol=1e-9)
    stream = model.activations(images, "resid2")["resid2"][:, 0]
    scale = torch.rsqrt(stream.var(dim=1, unbiased=False) + module.norm.eps)
    np.testing.assert_allclose(found.norm_scale[:, 0], scale, rtol=1e-9)
    written = model.activations(images, "a1.h1")["a1.h1"][:, 0]
    own = (written - written.mean(dim=1, keepdim=True)) * scale[:, None] * module.norm.weight
    np.testing.assert_allclose(found.of("a1.h1"), own.detach(), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(class_directions(model), module.head.weight.detach(), rtol=1e-9)


def test_a_head_that_was_put_on_has_the_same_embedding_and_cosines_have_shares() -> None:
    recipe = Recipe(depth=1, heads=2)
    bare, images = cv.wrap(recipe.build()), recipe.images(3)
    weight = torch.nn.functional.normalize(torch.randn(4, 12).double(), dim=1)
    model = cv.with_head(bare, Head(weight, scale=torch.tensor(9.0).double()))
    one, other = (decompose(each, images, progress=False) for each in (bare, model))
    np.testing.assert_array_equal(one.by_sender, other.by_sender)
    logits = check(model, images, output="logits")
    np.testing.assert_allclose(logits.embedding, model(images), rtol=1e-9)


def test_directions_give_numbers_along_them() -> None:
    recipe = Recipe(depth=1, heads=2, pool="avg")
    model, images = cv.wrap(recipe.build()), recipe.images(3)
    whole, along = check(model, images), check(model, images, directions=np.eye(12)[:2] * 2.0)
    np.testing.assert_allclose(along.by_token, whole.by_token[..., :2] * 2)
    assert along.dims == ("direction 0", "direction 1")


def test_images_that_are_all_alike_vary_by_rounding_alone() -> None:
    image = torch.randn(1, 3, 48, 48)
    found = decompose(cv.load("catdog-tiny"), image.repeat(9, 1, 1, 1), progress=False)
    noisy = replace(found, embedding=found.embedding * (1 + 1e-7 * np.eye(*found.embedding.shape)))
    with pytest.raises(DataError, match="does not vary"):
        _ = noisy.spread


@pytest.mark.parametrize("given", [torch.ones(2, 64, requires_grad=True), torch.ones(2, 64).bfloat16(), "ab"])
def test_directions_are_numbers_of_any_kind(given: object) -> None:
    def found() -> Decomposition:
        return decompose(cv.load("catdog-tiny"), torch.zeros(1, 3, 48, 48), directions=given, progress=False)  # type: ignore[arg-type]

    if isinstance(given, str):
        with pytest.raises(OptionError, match="array of numbers, not 'ab'"):
            found()
    else:
        assert found().by_sender.shape == (1, 21, 2)


def test_what_cannot_be_decomposed_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(depth=1, heads=2)
    model, images = cv.wrap(recipe.build()), recipe.images(2)
    with pytest.raises(NameNotFoundError, match="unknown output"):
        decompose(model, images, output="pixels")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="12 dimensions"):
        decompose(model, images, directions=np.ones((2, 5)))
    distilled = Recipe(distilled=True)
    with pytest.raises(UnsupportedModelError, match="2 classifiers"):
        decompose(cv.wrap(distilled.build()), distilled.images(1))
    with pytest.raises(UnsupportedModelError, match="logits are edited"):
        decompose(model.edit({"logits": 0}), images, output="logits")
    with pytest.raises(UnsupportedModelError, match="is edited"):
        decompose(model.edit({"a0.h0": lambda x: x * 2}), images, tokens=True)
    monkeypatch.setattr("circuitvit.views.contributions.LARGEST", 100)
    with pytest.raises(DataError, match="give fewer images"):
        decompose(model, images, tokens=True)


def test_shares_of_the_spread_sum_to_one_and_ablation_replaces_by_the_mean() -> None:
    model, recipe = cv.wrap(Recipe(depth=2, heads=2, norm="none").build()), Recipe()
    found = decompose(model, recipe.images(6), progress=False)
    assert found.spread.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(
        found.ablated(found.senders), np.tile(found.embedding.mean(axis=0), (6, 1)), atol=1e-12
    )
    with pytest.raises(NameNotFoundError, match="did you mean 'a0\\.h1'"):
        found.ablated(["a0.h11"])


def test_answers_are_lost_with_the_head_that_writes_them_and_with_no_other() -> None:
    """One head alone writes what tells the classes apart: its contributions carry the whole accuracy."""
    recipe = Recipe(depth=2, heads=2, norm="none")
    module = recipe.build()
    with torch.no_grad():
        for block in module.blocks:
            block.mlp.fc2.weight.zero_()
        for block, kept in zip(module.blocks, ([], [1]), strict=True):
            for head in {0, 1} - set(kept):
                block.attn.proj.weight[:, 6 * head : 6 * head + 6] = 0
        images = recipe.images(40)
        module.head.bias -= module(images).mean(dim=0)  # so that every class is the answer of some
    model = cv.wrap(module)
    labels = model(images).argmax(dim=1).tolist()
    sets = {"writes": ["a1.h1"], "silent": ["a0.h0", "a0.h1", "a1.h0", "m0", "m1"]}
    found = mean_ablate(model, images, labels, sets=sets, progress=False)
    assert len(set(labels)) > 1
    assert found.accuracy().value == found.accuracy("silent").value == 1.0
    assert found.accuracy("writes").value == pytest.approx(np.bincount(labels).max() / 40, abs=0.3)
    assert found.accuracy("writes").value < 1.0
    layered = mean_ablate(model, images, labels, progress=False)
    assert layered.accuracy("heads up to layer 0").value == 1.0
    assert layered.accuracy("heads from layer 1").value == found.accuracy("writes").value
    with pytest.raises(UnsupportedModelError, match="logits are edited"):
        mean_ablate(model.edit({"logits": 0.0}), images, labels, progress=False)
    assert len(layered.figure().axes) == 2
    with pytest.raises(UnsupportedModelError, match="put a head on it"):
        mean_ablate(cv.with_head(model, None), images, labels)  # type: ignore[call-overload]


def test_heads_outline_what_they_read_for_a_class() -> None:
    """The map of a class against the mean of the others is what its heads have read, patch by patch."""
    recipe = Recipe(depth=2, heads=2, classes=4, registers=1)
    model, images = cv.wrap(recipe.build()), recipe.images(2)
    found = patch_evidence(model, images, 2, by="heads", progress=False)
    whole = decompose(model, images, output="logits", tokens=True, progress=False)
    assert whole.by_token is not None
    read = whole.by_token.sum(axis=1)
    expected = read[..., 2] - read[..., [0, 1, 3]].mean(axis=-1)
    np.testing.assert_allclose(found.values.reshape(2, -1), expected[:, 2:], rtol=1e-9, atol=1e-12)


def test_what_the_stream_rounds_off_in_float32_is_a_part_of_the_sum() -> None:
    """Two blocks write much that cancels: between them the stream has lost what is small beside it."""
    module = Recipe(depth=2, heads=2).build().float()
    much = 1000 * torch.randn(module.embed_dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for sign, block in zip((1, -1), module.blocks, strict=True):
            block.mlp.fc2.bias += sign * much
    found = decompose(cv.wrap(module), Recipe().images(4).float(), progress=False)
    rounding = found.constant_values[:, found.constants.index("rounding")]
    assert np.abs(found.total - found.embedding).max() < 2e-6
    assert 1e-5 < np.abs(rounding).max() < 1e-2


def test_contributions_sum_to_the_embedding_of_a_real_model(shared_data: Path) -> None:
    """In float32, of an embedding whose largest numbers are above 30."""
    model = cv.load(
        "vit_tiny_patch16_224", checkpoint=shared_data / "weights" / "vit_tiny_patch16_224.safetensors"
    )
    photos = sorted((shared_data / "images" / "imagenet").iterdir())[:8]
    found = decompose(model, photos, progress=False)
    assert np.abs(found.total - found.embedding).max() < 1e-5


def test_a_decomposition_is_kept(tmp_path: Path) -> None:
    model = cv.load("catdog-tiny")
    found = decompose(model, torch.randn(3, 3, 48, 48), progress=False)
    assert np.abs(found.total - found.embedding).max() < 1e-5
    again = Decomposition.load(found.save(tmp_path / "found.safetensors"))
    assert np.array_equal(again.by_sender, found.by_sender)
    along = sum(float(row["along"]) for row in found.records() if row["image"] == "image 0")  # type: ignore[arg-type]
    assert along == pytest.approx(np.linalg.norm(found.embedding[0]), rel=1e-5)
    assert len(found.figure().axes) == 3

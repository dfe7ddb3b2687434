"""Attention patterns, and heads that go by position: known answers on patterns made by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given

import circuitvit as cv
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.errors import DataError, NameNotFoundError, OptionError
from circuitvit.views import Subjects, attention_patterns, position_heads
from circuitvit.views.position import describe, templates
from tests.strategies import Recipe, recipes

GRID = (6, 8)
N_PATCHES = GRID[0] * GRID[1]


@given(recipes())
def test_patterns_are_those_the_model_uses_whatever_the_model(recipe: Recipe) -> None:
    module = recipe.build()
    model, images = cv.wrap(module), recipe.images(2)
    view = attention_patterns(model, images, layer=recipe.depth - 1, batch_size=1)
    stream = model.embed(images)
    for block in module.blocks[:-1]:
        stream = block(stream)
    attention, normed = module.blocks[-1].attn, module.blocks[-1].norm1(stream)
    batch, tokens, _ = normed.shape
    query, key, value = (
        attention.qkv(normed).reshape(batch, tokens, 3, recipe.heads, -1).permute(2, 0, 3, 1, 4)
    )
    scores = attention.q_norm(query) @ attention.k_norm(key).transpose(-2, -1) * attention.scale
    pattern = scores.softmax(dim=-1)
    np.testing.assert_allclose(view.scores, scores.detach().numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(view.pattern, pattern.detach().numpy(), rtol=1e-4, atol=1e-6)
    # Each head's part of the output projection, column by column: the literal length of every addition.
    width = value.shape[-1]
    scale = getattr(module.blocks[-1].ls1, "gamma", 1.0)
    for head in range(recipe.heads):
        part = attention.proj.weight[:, head * width : (head + 1) * width]
        added = pattern[:, head, :, :, None] * (value[:, head] @ part.t() * scale)[:, None]
        lengths = added.norm(dim=-1).detach().numpy()
        np.testing.assert_allclose(view.weighted[:, head], lengths, rtol=1e-4, atol=1e-5)


def test_queries_are_tokens_or_patches() -> None:
    view = attention_patterns(cv.load("catdog-tiny"), catdog_pairs(1, seed=0).clean)
    assert view.layer == 3
    assert view.token((0, 0)) == 1
    assert view.token((5, 5)) == 36
    np.testing.assert_array_equal(view.maps((1, 2)), view.subjects.on_grid(view.pattern[:, :, 9]))
    assert [view.subjects.token_name(token) for token in (0, 9)] == ["cls", "patch (1, 2)"]
    with pytest.raises(OptionError, match="there is no patch"):
        view.token((6, 0))
    with pytest.raises(OptionError, match="there is no token 37"):
        view.maps(37)
    with pytest.raises(NameNotFoundError, match="did you mean 'scores'"):
        view.maps(0, "score")
    with pytest.raises(OptionError, match="no attention in layer 4"):
        attention_patterns(cv.load("catdog-tiny"), catdog_pairs(1, seed=0).clean, layer=4)


def test_images_that_do_not_fit_are_refused() -> None:
    model = cv.load("catdog-tiny")
    with pytest.raises(DataError, match="the model takes images of"):
        attention_patterns(model, torch.zeros(1, 3, 40, 48))
    with pytest.raises(OptionError, match="batch size"):
        attention_patterns(model, torch.zeros(1, 3, 48, 48), batch_size=0)


# -- position ------------------------------------------------------------------------------------


def subjects(prefix: tuple[str, ...] = ("cls",)) -> Subjects:
    kinds = (*prefix, *("patch",) * N_PATCHES)
    return Subjects(("image 0",), np.zeros((1, 1, 1, 3), dtype=np.uint8), GRID, kinds)


def described(patterns: np.ndarray, prefix: tuple[str, ...] = ("cls",)) -> dict[str, object]:
    """The statistics of patterns `(image, query, key)`."""
    rows = np.pad(patterns, ((0, 0), (patterns.shape[2] - patterns.shape[1], 0), (0, 0)))
    return describe(rows.mean(axis=0), (rows**2).mean(axis=0), len(rows), subjects(prefix))


def looking_at(cells: np.ndarray, share: float = 0.9) -> np.ndarray:
    """A head with this share of its attention on the cells of each query `(query, key)`; the rest everywhere.

    A query without cells looks everywhere alike.
    """
    counts = cells.sum(axis=1, keepdims=True)
    spread = np.full(cells.shape, 1 / cells.shape[1])
    return np.where(counts > 0, share * cells / np.maximum(counts, 1) + (1 - share) * spread, spread)


SHAPES = templates(GRID, ("cls", *("patch",) * N_PATCHES))


@pytest.mark.parametrize("name", list(SHAPES))
def test_a_head_with_a_shape_is_named_after_it(name: str) -> None:
    pattern = looking_at(SHAPES[name][1:])
    found = described(np.stack([pattern] * 4))
    assert found["name"] == name
    assert found["share"] == pytest.approx(1.0)
    assert float(str(found["fit"])) > 0.6


def test_every_shape_is_there_by_the_names_of_the_documentation() -> None:
    names = set(SHAPES)
    assert {"self", "previous", "next", "above", "below", "neighbours", "row", "column", "cls"} <= names
    assert {"corners", "edges", "corner top left", "edge bottom", "modulus 2", "columns modulus 3"} <= names
    row, column = divmod(20, GRID[1])
    (key,) = np.flatnonzero(SHAPES["previous"][1 + 20])
    assert divmod(int(key) - 1, GRID[1]) == (row, column - 1)
    assert SHAPES["corners"][1:].sum(axis=1).tolist() == [4] * N_PATCHES
    assert not SHAPES["row"][0].any()


def test_a_uniform_head_goes_by_position_and_is_called_so() -> None:
    found = described(np.full((3, N_PATCHES, 1 + N_PATCHES), 1 / (1 + N_PATCHES)))
    assert (found["name"], found["share"]) == ("uniform", 1.0)


def test_a_head_that_goes_by_content_does_not_go_by_position() -> None:
    rng = np.random.default_rng(0)
    keys = rng.permutation(N_PATCHES + 1)[:12]  # another patch in every image, the same for all queries
    cells = np.zeros((12, N_PATCHES, 1 + N_PATCHES), dtype=bool)
    cells[np.arange(12), :, keys] = True
    found = described(np.stack([looking_at(each) for each in cells]))
    assert abs(float(str(found["share"]))) < 0.05


@pytest.mark.parametrize("n_images", [3, 30])
def test_the_share_of_position_does_not_depend_on_the_number_of_images(n_images: int) -> None:
    """Half of the variation is fixed, half drawn anew: 0.5 on average, for few images as for many."""
    rng = np.random.default_rng(n_images)
    keys = 1 + N_PATCHES
    fixed = looking_at(np.eye(N_PATCHES, keys, 1, dtype=bool), 0.5)
    shares = []
    for _ in range(40):
        noise = rng.standard_normal((n_images, N_PATCHES, keys))
        noise -= noise.mean(axis=2, keepdims=True)
        noise *= np.sqrt(((fixed - 1 / keys) ** 2).sum() / (noise**2).sum(axis=(1, 2)).mean())
        shares.append(float(str(described(fixed + noise)["share"])))
    assert np.mean(shares) == pytest.approx(0.5, abs=0.02)


def test_a_head_without_a_shape_is_not_given_a_name() -> None:
    rng = np.random.default_rng(1)
    logits = 3 * rng.standard_normal((N_PATCHES, 1 + N_PATCHES))
    pattern = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    found = described(np.stack([pattern] * 3))
    assert (found["name"], found["share"]) == ("other", pytest.approx(1.0))


def test_registers_and_class_token_are_told_apart() -> None:
    prefix = ("cls", "reg", "reg")
    cells = templates(GRID, (*prefix, *("patch",) * N_PATCHES))["reg"][3:]
    assert described(np.stack([looking_at(cells)] * 2), prefix)["name"] == "reg"


def test_position_heads_need_two_images_and_average_over_batches() -> None:
    model, clean = cv.load("catdog-tiny"), catdog_pairs(6, seed=0).clean
    with pytest.raises(DataError, match="at least 2"):
        position_heads(model, clean[:1])
    one, six = (position_heads(model, clean, batch_size=size) for size in (1, 6))
    np.testing.assert_allclose(one.means, six.means, atol=1e-6)
    for a, b in zip(one.heads, six.heads, strict=True):
        assert (a.head, a.name) == (b.head, b.name)
        assert a.share == pytest.approx(b.share, abs=1e-4)
    patterns = np.concatenate(
        [attention_patterns(model, clean, layer=layer).pattern.mean(axis=0) for layer in range(4)]
    )
    np.testing.assert_allclose(six.means, patterns, atol=1e-6)
    assert six[six.heads[0].head] is six.heads[0]


def test_a_real_vit_has_neighbour_and_corner_heads(shared_data: Path) -> None:
    name = "vit_tiny_patch16_224"
    model = cv.load(name, checkpoint=shared_data / "weights" / f"{name}.safetensors")
    photos = [
        photo
        for kind in ("cats", "dogs")
        for photo in sorted((shared_data / "images" / "cats_vs_dogs" / kind).iterdir())[:6]
    ]
    view = position_heads(model, photos)
    found = {head.head: head.name for head in view.only(0.9)}
    assert found["a1.h0"] == "previous"
    assert found["a1.h2"] == "next"
    assert found["a2.h1"] == "above"
    assert found["a10.h0"] == found["a10.h1"] == "corners"
    assert view["a5.h1"].share < 0.5

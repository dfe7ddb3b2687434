"""The logit lens: the model's own readout at every position, and its tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given

import circuitvit as cv
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.errors import NameNotFoundError, OptionError
from circuitvit.graph.files import clean
from circuitvit.views import class_symbols, logit_lens
from tests.strategies import Recipe, recipes


@given(recipes())
def test_the_last_readout_is_the_models_own_whatever_the_model(recipe: Recipe) -> None:
    model, images = cv.wrap(recipe.build()), recipe.images(2)
    lens = logit_lens(model, images, detail="stage")
    own = model(images).float().numpy()
    np.testing.assert_allclose(lens.pooled[-1], own, rtol=1e-5, atol=1e-5)
    assert lens.logits.shape == (1 + len(model.layers), 2, recipe.n_tokens, recipe.classes)
    if recipe.pool == "token" and not recipe.distilled:
        np.testing.assert_allclose(lens.logits[-1, :, 0], own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pool", ["token", "avg", "max", "avgmax"])
def test_each_token_goes_through_the_models_own_norm_and_head(pool: str) -> None:
    recipe = Recipe(depth=2, heads=2, pool=pool)
    module = recipe.build()
    model, images = cv.wrap(module), recipe.images(1)
    lens = logit_lens(model, images)
    stream = module.forward_features(images)  # the final norm included, where it is before the pooling
    with torch.no_grad():
        expected = module.head(module.fc_norm(stream)).float().numpy()
    np.testing.assert_allclose(lens.logits[-1], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(lens.top[-1], expected.argmax(axis=-1))


def test_positions_are_the_embedding_and_the_ends_of_layers() -> None:
    recipe = Recipe(depth=2)
    model, images = cv.wrap(recipe.build()), recipe.images(1)
    assert logit_lens(model, images).positions == ("embedding", "layer 0", "layer 1")
    staged = logit_lens(model, images, detail="stage")
    assert staged.positions == ("embedding", "attn0", "mlp0", "attn1", "mlp1")
    np.testing.assert_array_equal(staged.logits[[0, 2, 4]], logit_lens(model, images).logits)
    assert staged.position("attn1") == 3
    assert staged.position(-1) == 4
    with pytest.raises(NameNotFoundError, match="did you mean 'attn1'"):
        staged.position("atn1")
    with pytest.raises(OptionError, match="no position 5"):
        staged.position(5)
    with pytest.raises(OptionError, match="'layer' or 'stage'"):
        logit_lens(model, images, detail="block")  # type: ignore[arg-type]


def test_the_lens_of_an_edited_model_sees_edits_of_the_stream_and_ends_in_its_logits() -> None:
    model, images = cv.load("catdog-tiny"), catdog_pairs(2, seed=1).clean
    plain = logit_lens(model, images)
    for place, name in ((0, "embedding"), (2, "layer 1"), (4, "layer 3")):
        edited = model.edit({f"resid{place}": lambda stream: stream.abs()})
        lens = logit_lens(edited, images)
        assert lens.positions == plain.positions
        np.testing.assert_array_equal(lens.pooled[:place], plain.pooled[:place])
        assert np.abs(lens.pooled[place] - plain.pooled[place]).max() > 0.01, name
        np.testing.assert_allclose(lens.pooled[-1], edited(images), atol=1e-5)
        assert logit_lens(edited, images, detail="stage").positions[-1] == "mlp3"


def test_kept_classes_do_not_change_the_top_class() -> None:
    model, pairs = cv.load("catdog-tiny"), catdog_pairs(3, seed=1)
    whole, part = logit_lens(model, pairs.clean), logit_lens(model, pairs.clean, classes=["dog", "cat"])
    assert part.classes == (1, 0)
    np.testing.assert_array_equal(part.of_class(0), whole.of_class(0))
    np.testing.assert_array_equal(part.top, whole.top)
    with pytest.raises(NameNotFoundError, match="kept no logits of class 3"):
        part.of_class(3)


def test_images_one_by_one_give_the_same_as_together() -> None:
    model, pairs = cv.load("catdog-tiny"), catdog_pairs(3, seed=1)
    one, three = (logit_lens(model, pairs.clean, batch_size=size) for size in (1, 3))
    np.testing.assert_allclose(one.logits, three.logits, atol=1e-4)
    assert one.subjects.names == three.subjects.names == ("image 0", "image 1", "image 2")


def test_tables_take_symbols_from_the_user_or_from_the_names_of_classes() -> None:
    model, pairs = cv.load("catdog-tiny"), catdog_pairs(1, seed=1)
    lens = logit_lens(model, pairs.clean)
    made = class_symbols(model)
    assert [made[index] for index in range(4)] == [
        "\N{CAT FACE}", "\N{DOG FACE}", "\N{RABBIT FACE}", "\N{BEAR FACE}"
    ]  # fmt: skip
    assert {cell for row in lens.table() for cell in row} <= set(model.classes or ())
    own = class_symbols(model, {"cat": "c", "dog": "d", "2": "r", 3: "b"})
    lines = lens.to_text(symbols=own).splitlines()
    assert len(lines) == 6
    assert all(set(line) <= set("cdrb ") and len(line) == 11 for line in lines)
    with pytest.raises(NameNotFoundError, match="unknown class"):
        class_symbols(model, {"horse": "h"})


def test_a_class_without_a_picture_keeps_its_name() -> None:
    recipe = Recipe()
    model = cv.wrap(recipe.build(), classes=["zebra crossing", "qqq", ""])
    assert 1 not in class_symbols(model)
    assert 2 not in class_symbols(model)
    assert logit_lens(model, recipe.images(1)).to_text()


def test_the_page_is_inert_whatever_classes_are_called() -> None:
    recipe = Recipe()
    hostile = ("<script>alert(1)</script>", "a\"b'c&d", "x\n\u202ey")
    lens = logit_lens(cv.wrap(recipe.build(), classes=hostile), recipe.images(1))
    page = lens.to_html(symbols={0: "<img src=x onerror=alert(1)>"})
    assert "<script" not in page
    assert "<img" not in page
    assert "\u202e" not in page
    assert "http" not in page
    assert page == lens.to_html(symbols={0: "<img src=x onerror=alert(1)>"})
    assert clean(hostile[2]) == "x y"
    assert "data:image" not in lens.to_html(picture=False)


def test_the_lens_of_a_real_vit_ends_in_its_logits(shared_data: Path) -> None:
    name = "vit_tiny_patch16_224"
    model = cv.load(name, checkpoint=shared_data / "weights" / f"{name}.safetensors")
    photo = shared_data / "images" / "catdog" / "prisma_crop_dog.jpeg"
    lens = logit_lens(model, photo)
    own = cv.run(model, cv.Task(photo, photo, cv.logit("tabby")), cv.Circuit.full(model.graph)).numpy()
    np.testing.assert_allclose(lens.logits[-1, :, 0], own, atol=1e-4)
    assert lens.labels[int(lens.pooled_top[-1, 0])] == "tabby"
    assert lens.top_on_grid().shape == (1, 14, 14)
    symbols = class_symbols(model)
    assert symbols[281] == "\N{CAT FACE}"

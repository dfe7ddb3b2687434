"""Sentences as classes: logits are scaled cosines of image and sentence, and edges are about these."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import circuitvit as cv
from circuitvit.errors import DataError, OptionError, UnsupportedModelError
from circuitvit.models import Head
from circuitvit.models.rules import BackwardRules
from circuitvit.models.words import TextFamily, Words
from circuitvit.views.attribution import attribution_of_task
from tests.models.test_heads import WIDTH, bare, drawn
from tests.models.test_hooked import hooked
from tests.reference.hooked import HookedModule
from tests.rightness import CLASSES, CLEAN, CORRUPT, METRIC, micro, prove
from tests.strategies import assert_close

SCALE = 7.0


def directions(count: int = CLASSES) -> Tensor:
    return F.normalize(drawn(count, WIDTH), dim=1)


def cosines(model: cv.Model, bias: Tensor | None = None) -> cv.Model:
    return cv.with_head(model, Head(directions(), bias, scale=torch.tensor(SCALE).double()))


@pytest.mark.parametrize("bias", [None, drawn(CLASSES)])
def test_edges_are_those_of_hooks_on_the_original_and_its_cosines(bias: Tensor | None) -> None:
    module = bare(micro())

    def similarity(images: Tensor) -> Tensor:
        cosine = F.cosine_similarity(module(images)[:, None], directions(), dim=-1)
        return SCALE * cosine + (0 if bias is None else bias)

    places = hooked(module)
    model = cosines(cv.wrap(module), bias)
    original = HookedModule(similarity, places.senders, places.receivers)
    assert_close(model(CLEAN), original.run(CLEAN), 1e-10)
    prove(model, original, CLEAN, CORRUPT)


def test_shares_of_direct_attribution_add_up_at_the_length_of_the_run() -> None:
    model = cosines(cv.wrap(bare(micro())), drawn(CLASSES))
    clean, _ = attribution_of_task(model, cv.Task(CLEAN, CORRUPT, METRIC))
    logits = model(CLEAN)
    np.testing.assert_allclose(clean.total, logits[:, 0] - logits[:, 1], rtol=1e-9)


def test_frozen_norms_freeze_the_length_too() -> None:
    """Then the logits are linear in the stream: their gradient times the centred stream is all but biases."""
    model = cosines(cv.wrap(bare(micro()))).with_rules(BackwardRules(frozen_norms=True))
    stream = drawn(2, 5, WIDTH).requires_grad_()
    readout: Any = model.stages[-1]
    logits = readout.write((stream,))[:, 0]
    (gradient,) = torch.autograd.grad(logits.sum(), stream)
    held, _ = readout.affine(stream.detach(), F.one_hot(torch.zeros(2).long(), CLASSES).double())
    assert_close(gradient, held, 1e-10)


def test_a_head_of_cosines_is_saved_and_pickled(tmp_path: Path) -> None:
    model = cosines(cv.wrap(bare(micro())), drawn(CLASSES))
    assert model.head is not None
    model.head.save(tmp_path / "head.safetensors")
    for again in (cv.with_head(cv.wrap(bare(micro())), tmp_path / "head.safetensors"), copy.deepcopy(model)):
        assert torch.equal(again(CLEAN), model(CLEAN))
        assert again.weights_hash == model.weights_hash
    plain = cv.with_head(cv.wrap(bare(micro())), directions(), drawn(CLASSES))
    assert plain.weights_hash != model.weights_hash


class Letters:
    """A tokenizer of letters, between a start and an end."""

    context = 12

    def encode(self, sentence: str) -> list[int]:
        if not sentence.isascii():
            raise DataError(f"unknown letters in {sentence!r}")
        return [0, *map(ord, sentence), 1]

    def words(self, tokens: Any) -> list[str]:
        return [chr(token) for token in tokens]


class Bag(TextFamily):
    """The mean of what tokens stand for."""

    embed = blocks = block = readout = None

    def run(self, module: Any, images: Tensor) -> Tensor:
        return module(images[:, 0, 0].long()).mean(dim=1)

    def scale(self, module: Any) -> Tensor:
        return torch.tensor(SCALE)


def with_words() -> cv.Model:
    Bag.__abstractmethods__ = frozenset()
    table = torch.nn.Embedding.from_pretrained(drawn(128, WIDTH))
    return replace(cv.wrap(bare(micro())), words=Words(table, Bag(), Letters()))


def test_prompts_are_classes_in_their_order_whatever_their_lengths() -> None:
    model, prompts = with_words(), ["a cat", "dog", "a cow", "bird"]
    assert model.words is not None
    found = model.with_prompts(prompts)
    for place, prompt in enumerate(prompts):
        alone = model.words.module(torch.tensor(Letters().encode(prompt))).mean(dim=0)
        expected = SCALE * F.cosine_similarity(model(CLEAN), alone[None], dim=-1)
        assert_close(found(CLEAN)[:, place], expected, 1e-10)
    assert found.classes == tuple(prompts)
    assert found.with_prompts(["fish", "cat"]).classes == ("fish", "cat")


def test_prompts_are_listed_by_whatever_lists_texts() -> None:
    model = with_words()
    for given in (np.array(["cat", "dog"]), (each for each in ("cat", "dog"))):
        assert model.with_prompts(given).classes == ("cat", "dog")  # type: ignore[arg-type]


def test_rules_hold_for_prompts_whenever_they_are_given() -> None:
    rules = BackwardRules(frozen_norms=True)
    model = with_words().with_prompts(["cat", "dog"])
    stream = drawn(2, 5, WIDTH)

    def gradient(made: cv.Model) -> Tensor:
        given = stream.clone().requires_grad_()
        made.stages[-1].write((given,))[:, 0].sum().backward()  # type: ignore[attr-defined]
        assert given.grad is not None
        return given.grad

    expected = gradient(model.with_rules(rules))
    assert not torch.equal(expected, gradient(model))
    ruled = model.with_rules(rules)
    for made in (
        with_words().with_rules(rules).with_prompts(["cat", "dog"]),
        ruled.with_prompts(["cat", "dog"]),
        ruled.edit({"m0": 0}).with_prompts(["cat", "dog"]),
    ):
        assert torch.equal(gradient(made), expected)


def test_edits_of_features_are_not_taken_for_edits_of_similarities() -> None:
    edited = with_words().edit({"logits": 0.0})
    with pytest.raises(UnsupportedModelError, match="which are the features, are edited"):
        edited.with_prompts(["cat"])


def test_templates_are_averaged_as_directions() -> None:
    model = with_words()
    assert model.words is not None
    found = model.with_prompts(["cat", "dog"], ["a {}", "{} photo"])
    both = model.words.embed(["a cat", "cat photo"])
    assert found.head is not None
    assert found.head.weight is not None
    assert_close(found.head.weight[0], F.normalize(both.sum(dim=0), dim=0), 1e-12)


@pytest.mark.parametrize(
    ("prompts", "templates", "message"),
    [
        ([], None, "there are no prompts"),
        (None, None, "list of texts, not None"),
        ({"a cat", "a dog"}, None, "list of texts"),  # which have no order
        ("a cat", None, "list of texts"),
        (["a cat", " "], None, "is empty"),
        (["a cat", "a cat"], None, "'a cat' is there twice"),
        (["cat"], ["a photo"], r"one {} in the place of the name, unlike 'a photo'"),
        (["Käse"], None, "unknown letters"),
    ],
)
def test_prompts_that_cannot_be(prompts: Any, templates: Any, message: str) -> None:
    with pytest.raises((OptionError, DataError), match=message):
        with_words().with_prompts(prompts, templates)


def test_a_model_without_words_says_where_to_get_them() -> None:
    with pytest.raises(OptionError, match=r"knows no words.*tokenizer="):
        cv.wrap(bare(micro())).with_prompts(["a cat"])


@pytest.mark.parametrize("scale", [torch.tensor(-1.0), torch.ones(2)])
def test_a_scale_is_one_positive_number(scale: Tensor) -> None:
    with pytest.raises(OptionError, match="one positive number"):
        Head(directions(), scale=scale)


def test_directions_are_of_length_1() -> None:
    with pytest.raises(OptionError, match="divide each row by its length"):
        Head(2 * directions(), scale=torch.tensor(1.0))

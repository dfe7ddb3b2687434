"""Dyslexify against a planted head that is known to read, and against attention computed from raw weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import circuitvit as cv
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.defences import HeadDefence, attention_heads, typographic_attack
from circuitvit.errors import DataError, NameNotFoundError, OptionError, UnsupportedModelError
from circuitvit.models import Model
from circuitvit.models.timm_import import import_timm
from circuitvit.models.zoo import InputSpec
from circuitvit.tasks.words import Pasted, paste
from tests.views.literal_vit import literal, micro

RED, GREEN, YELLOW = (Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "yellow"))
"""A "word" that says cat, one that says dog, and one that says nothing."""

BALLAST, WIDTH = 10.0, 16
OBJECT, IS_TEXT, SAYS, ANSWER, CLS = 0, 1, 2, 3, 4


def planted(shared: bool = False) -> Model:
    """A model that looks by `a0.h0` and reads by `a1.h2`; `a0.h1` looks at text as well, and says nothing.

    Blue background is a cat, none is a dog; a ballast keeps every norm close to the identity.

    Args:
        shared: whether it looks by `a1.h2` too, and by no other.
    """
    module = import_timm().models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=WIDTH, depth=2, num_heads=4, num_classes=2
    )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        for part in module.modules():
            if isinstance(part, nn.LayerNorm):
                part.weight.fill_(BALLAST * (2 / WIDTH) ** 0.5)
        module.pos_embed[..., -2], module.pos_embed[..., -1] = BALLAST, -BALLAST
        module.cls_token[..., CLS] = 1.0
        red, green, blue = (module.patch_embed.proj.weight[:, colour] for colour in range(3))
        blue[OBJECT] = 1 / 64
        red[IS_TEXT] = green[IS_TEXT] = 1 / 64
        module.patch_embed.proj.bias[IS_TEXT] = 2.0
        red[SAYS], green[SAYS] = 0.5 / 64, -0.5 / 64
        heads = (0, 0, OBJECT, 0.0, 0.0 if shared else 2.0), (0, 1, None, 8.0, 0.0), (1, 2, SAYS, 4.0, 5.0)
        for layer, head, value, looks, writes in heads:
            attn, first = module.blocks[layer].attn, 4 * head
            attn.qkv.weight[first, CLS] = looks
            attn.qkv.weight[WIDTH + first, IS_TEXT] = 1.0
            if value is not None:
                attn.qkv.weight[2 * WIDTH + first, value] = 3.0
            attn.proj.weight[ANSWER, first] = writes
        if shared:
            module.blocks[1].attn.qkv.weight[2 * WIDTH + 8, OBJECT] = 1.0
        for name in (OBJECT, IS_TEXT, SAYS, ANSWER, CLS):  # with its negative, so that means are 0
            for part in (module.patch_embed.proj, *(block.attn.proj for block in module.blocks)):
                part.weight[name + 5] = -part.weight[name]
                part.bias[name + 5] = -part.bias[name]
            module.cls_token[..., name + 5] = -module.cls_token[..., name]
        module.head.weight[0, ANSWER], module.head.weight[1, ANSWER] = 1.0, -1.0
    spec = InputSpec((3, 32, 32), (0.5,) * 3, (0.5,) * 3)
    return cv.wrap(module.eval(), name="reader", preprocessing=spec, classes=["cat", "dog"])


@pytest.fixture(scope="module")
def reader() -> Model:
    return planted()


def scenes(count: int = 20) -> Tensor:
    """Cats and dogs in turn, black but for their blue."""
    images = -torch.ones(count, 3, 32, 32)
    blue = 0.5 + 0.5 * torch.rand(count, 1, 1, generator=torch.manual_seed(0))
    images[:, 2] = torch.where(torch.arange(count)[:, None, None] % 2 == 0, blue, -blue)
    return images


@pytest.fixture(scope="module")
def signs(reader: Model) -> Pasted:
    wrong = [GREEN, RED] * 10
    return paste(reader, scenes(), wrong, neutral=YELLOW, place=(0.375, 0.625), size=0.25)


LABELS, NAMED = cv.PerPair(("cat", "dog") * 10), cv.PerPair(("dog", "cat") * 10)


@pytest.mark.parametrize("silence", ["zero", "mean"])
def test_the_head_that_reads_is_chosen_and_no_other(reader: Model, signs: Pasted, silence: str) -> None:
    found = attention_heads(reader, signs, LABELS, named=NAMED, silence=silence, progress=False)  # type: ignore[arg-type]
    assert found.heads[:2] == ("a0.h1", "a1.h2")  # by attention the silent one comes first
    assert found.chosen == ("a1.h2",)
    assert not found.steps[0].kept
    assert [found.before.accuracy(version).value for version in ("without", "neutral", "word")] == [1, 1, 0]
    assert [found.after.accuracy(version).value for version in ("without", "neutral", "word")] == [1, 1, 1]
    assert found.before.attack_rate().value == 1
    assert found.after.attack_rate().value == found.before.attack_rate("neutral").value == 0
    assert found.gain.value == 1
    assert found.cost.value == 0
    assert set(found.trained_on).isdisjoint(found.before.images)
    assert found.before.images == found.after.images
    assert found.chance == 1 / 16
    repaired = found.repaired(reader)
    again = typographic_attack(repaired, signs, LABELS, named=NAMED, progress=False)
    assert again.right.all()


def test_nothing_is_silenced_where_it_would_cost_clean_answers(signs: Pasted, tmp_path: Path) -> None:
    model = planted(shared=True)
    found = attention_heads(model, signs, LABELS, named=NAMED, progress=False)
    assert found.at_first[0] == 1
    (step,) = [step for step in found.steps if step.head == "a1.h2"]
    assert step.typographic > found.at_first[1]  # it would help
    assert found.chosen == ()
    assert found.after is found.before
    assert found.repaired(model) is model
    found.before.figure(after=found.after).save(tmp_path / "table.svg")
    again = HeadDefence.load(found.save(tmp_path / "found.json"))
    assert again.table() == found.table()


def test_scores_are_those_of_attention_on_raw_weights() -> None:
    model, module = micro()
    model = cv.wrap(module, name="micro", preprocessing=model.preprocessing, classes=["a", "b", "c"])
    images = torch.randn(8, 3, 8, 8, generator=torch.manual_seed(1))
    word = Image.new("RGB", (8, 8), "red")
    places = [(0.25, 0.25), (0.75, 0.75)]
    signs = paste(model, images, word, place=places, size=0.5)
    wrong = cv.PerPair(tuple(int(top) for top in model(signs.images().take(0, 8)).argmin(dim=1)))
    right = cv.PerPair(tuple(int(top) for top in model(images).argmax(dim=1)))
    right = cv.PerPair(
        tuple(a if a != b else (a + 1) % 3 for a, b in zip(right.classes, wrong.classes, strict=True))
    )  # type: ignore[operator]
    found = attention_heads(model, signs, right, named=wrong, patience=1, threshold=1.0, progress=False)
    rows = [signs.names.index(name) for name in found.trained_on]
    for version, scores in (("word", found.scores), ("without", found.without)):
        seen: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        given = signs.images(version).take(0, 8)[rows]  # type: ignore[arg-type]
        literal(module, given, seen=seen)
        for head, score in zip(found.heads, scores, strict=True):
            layer, number = int(head[1]), int(head[4])
            pattern = seen[layer, number][0][:, 0, 1:]  # of the class token, on patches
            assert score == pytest.approx(float(pattern[:, [0, 3]].sum() / pattern.sum()), abs=1e-5)


class TestRefusals:
    def test_no_class_token(self) -> None:
        model, _ = micro(class_token=False, global_pool="avg")
        signs = paste(model, torch.zeros(4, 3, 8, 8), RED, size=1.0)
        with pytest.raises(UnsupportedModelError, match="micro has no class token"):
            attention_heads(model, signs, 0, named=1)

    def test_a_readout_of_other_tokens(self) -> None:
        model, _ = micro(global_pool="avg")
        signs = paste(model, torch.zeros(4, 3, 8, 8), RED, size=1.0)
        with pytest.raises(UnsupportedModelError, match="the readout of micro does not read its class token"):
            attention_heads(model, signs, 0, named=1)

    def test_no_classes(self) -> None:
        model, _ = micro(num_classes=0)
        signs = paste(model, torch.zeros(4, 3, 8, 8), RED, size=1.0)
        with pytest.raises(UnsupportedModelError, match="no classes"):
            typographic_attack(model, signs, 0, named=1)

    def test_words_that_are_right_or_unknown(self, reader: Model, signs: Pasted) -> None:
        with pytest.raises(DataError, match=r"the word on image 1 says what is there \(dog\)"):
            typographic_attack(reader, signs, LABELS, named="dog")
        with pytest.raises(DataError, match="2 labels for 20 images"):
            typographic_attack(reader, signs, cv.PerPair(("cat", "dog")), named=NAMED)
        cows = paste(reader, scenes(2), "cow", size=0.3)
        with pytest.raises(NameNotFoundError, match=r"the word 'cow' names no class of reader.*named="):
            typographic_attack(reader, cows, "cat")

    def test_a_word_on_no_patch(self, reader: Model) -> None:
        between = paste(reader, scenes(4), RED, place=(0.5, 0.5), size=0.25)
        with pytest.raises(DataError, match="no patch belongs to 'word'"):
            attention_heads(reader, between, "cat", named="dog", threshold=0.5)

    @pytest.mark.parametrize(
        "wrong",
        [{"tolerance": -0.1}, {"held_out": 1.0}, {"patience": 0}, {"silence": "one"}, {"threshold": "a"}],
    )
    def test_settings(self, reader: Model, signs: Pasted, wrong: dict[str, object]) -> None:
        with pytest.raises((OptionError, NameNotFoundError)):
            attention_heads(reader, signs, LABELS, named=NAMED, **wrong)  # type: ignore[arg-type]

    def test_too_few_images(self, reader: Model, signs: Pasted) -> None:
        with pytest.raises(DataError, match="1 image cannot be divided"):
            attention_heads(reader, signs.select([0]), "cat", named="dog")


def test_a_word_is_the_only_class_that_has_it(reader: Model) -> None:
    """As with prompts; and a model that cannot read is not turned by it."""
    model = cv.load("catdog-tiny")
    named = cv.with_head(model, cv.models.Head(torch.eye(4, model.d_model), classes=(
        "a photo of a cat", "a photo of a dog", "a catfish", "a bear"
    )))  # fmt: skip
    photos = catdog_pairs(5, seed=0).clean
    signs = paste(named, photos, "cat", neutral="sign", size=0.2)
    found = typographic_attack(named, signs, [1, 2, 3], progress=False)
    assert set(found.named) == {"a photo of a cat"}
    assert len(list(found.records())) == 3 * 5
    assert np.isfinite(found.reading.value)

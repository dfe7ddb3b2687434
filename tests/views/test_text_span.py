"""What heads say: a head that writes along a description gets it for its label, and others get none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import false_discovery_control
from torch.nn import functional as F

import circuitvit as cv
from circuitvit.datasets import signs
from circuitvit.errors import DataError, NameNotFoundError, OptionError
from circuitvit.export import picture_of, svg_of
from circuitvit.graph import Circuit
from circuitvit.models.zoo import zoo_names
from circuitvit.views import TextSpan, decompose, mean_ablate, text_span
from circuitvit.views.spanning import own_descriptions, spans
from tests.strategies import Recipe

WIDTH, TEXTS = 24, tuple(f"text {number}" for number in range(30))
DIRECTIONS = torch.randn(len(TEXTS), WIDTH, generator=torch.Generator().manual_seed(5)).double()


def heads(seed: int, count: int = 6, images: int = 30, rank: int = 4) -> torch.Tensor:
    """What heads contribute that write anywhere, more along some axes than along others."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, images, rank, generator=generator) * torch.tensor([4.0, 2.0, 1.0, 0.5])[:rank]
    return (mixed @ torch.randn(count, rank, WIDTH, generator=generator)).double()


def literal(written: NDArray[Any], directions: NDArray[Any], phrases: int) -> list[tuple[int, float]]:
    """Algorithm 1 on the contributions themselves, a phrase at a time."""
    data = written - written.mean(axis=0)
    texts = directions - directions.mean(axis=0)
    texts = texts / np.linalg.norm(texts, axis=1, keepdims=True)
    whole, found = np.sum(data**2), []
    for _ in range(phrases):
        best = int(np.argmax([np.var(data @ text) for text in texts]))
        unit = texts[best] / np.linalg.norm(texts[best])
        along = data @ unit
        found.append((best, float(np.sum(along**2) / whole)))
        data = data - np.outer(along, unit)
        texts = np.stack([text - (text @ unit) * unit for text in texts])
    return found


def test_phrases_are_those_of_the_literal_algorithm() -> None:
    written = heads(0)
    chosen, shares, _ = spans(written, DIRECTIONS, 5, draws=10)
    for head, each in enumerate(written.numpy()):
        expected = literal(each, DIRECTIONS.numpy(), 5)
        assert chosen[head].tolist() == [place for place, _ in expected]
        np.testing.assert_allclose(shares[head], [share for _, share in expected], rtol=1e-8)


def test_heads_that_write_along_a_description_get_it_for_a_label_and_only_they() -> None:
    written, said = heads(1), F.normalize(DIRECTIONS - DIRECTIONS.mean(dim=0), dim=1)
    for head, text in ((1, 7), (4, 20)):
        strength = torch.randn(30, 1, generator=torch.Generator().manual_seed(text)).double()
        written[head] = 0.05 * written[head] + 6 * strength * said[text]
    chosen, shares, p = spans(written, DIRECTIONS, 3, draws=300)
    assert chosen[[1, 4], 0].tolist() == [7, 20]
    assert (shares[[1, 4], 0] > 0.9).all()
    assert np.flatnonzero(false_discovery_control(p) <= 0.05).tolist() == [1, 4]


def test_a_label_that_means_nothing_is_seldom_given() -> None:
    """60 models of 6 heads that write anywhere: the share with any label is the level, or less."""
    wrong = [
        bool((false_discovery_control(spans(heads(seed), DIRECTIONS, 1, 240, seed)[2]) <= 0.05).any())
        for seed in range(60)
    ]
    assert sum(wrong) <= 7  # of 60; at a level of 5 % more than 7 once in a hundred times


def test_what_all_heads_have_in_common_is_held_against_the_label_of_one() -> None:
    """Against axes anywhere most of these heads stand out; against what the others write none does."""
    said = F.normalize(DIRECTIONS - DIRECTIONS.mean(dim=0), dim=1)[3]
    shared = torch.randn(6, 30, 1, generator=torch.Generator().manual_seed(2)).double() * said
    written = 0.3 * heads(2) + 4 * shared
    alone = [spans(written[[head]], DIRECTIONS, 1, draws=200)[2][0] for head in range(6)]
    assert sum(p <= 0.05 for p in alone) >= 4
    assert (spans(written, DIRECTIONS, 1, draws=200)[2] > 0.05).all()


def test_silent_heads_say_nothing() -> None:
    written = heads(3)
    written[2] = 1.5
    chosen, shares, p = spans(written, DIRECTIONS, 2, draws=50)
    assert chosen[2].tolist() == [-1, -1]
    assert p[2] == 1.0
    assert not shares[2].any()


def test_silent_heads_are_no_tests_that_others_pay_for() -> None:
    module = Recipe(depth=2, heads=3, width=8, classes=6).build()
    with torch.no_grad():
        module.blocks[0].attn.proj.weight.zero_()
    found = text_span(cv.wrap(module), Recipe().images(12), draws=20, phrases=1, progress=False)
    assert found.p_fdr[:3].tolist() == [1.0] * 3
    np.testing.assert_allclose(found.p_fdr[3:], false_discovery_control(found.p[3:]))


def planted() -> tuple[cv.Model, torch.Tensor]:
    """A model one of whose heads writes along the row of class 1 alone."""
    recipe = Recipe(depth=2, heads=3, width=8, classes=6, norm="none", registers=1)
    module = recipe.build()
    with torch.no_grad():
        rows = module.head.weight - module.head.weight.mean(dim=0)
        block = module.blocks[1].attn
        block.proj.weight[:, 8:16] = F.normalize(rows[1], dim=0)[:, None] * torch.randn(8).double()
    return cv.wrap(module, classes=["ant", "bee", "cow", "dog", "elk", "fox"]), recipe.images(24)


def test_a_planted_head_of_a_model_says_the_class_that_it_writes(tmp_path: Path) -> None:
    model, images = planted()
    found = text_span(model, images, phrases=2, progress=False)
    assert found.labels == {"a1.h1": "bee"}
    assert found.phrases("a1.h1")[0] == ("bee", pytest.approx(1.0, abs=0.2))
    assert TextSpan.load(found.save(tmp_path / "found.json")).labels == found.labels
    assert [text.get_text() for text in found.figure().axes[0].texts] == ["bee"]
    circuit = Circuit.from_edges(model.graph, ["input->a1.h1<v>", "a1.h1->logits"])
    drawing = svg_of(picture_of(circuit, labels=found.labels))
    assert "a1.h1 (bee): 1 edges in, 1 out" in drawing
    assert ">bee<" in drawing
    for name in ("page.html", "circuit.dot", "circuit.tex"):
        assert "bee" in circuit.draw(tmp_path / name, labels=found.labels).read_text()
    with pytest.raises(NameNotFoundError, match="unknown node"):
        circuit.draw(tmp_path / "no.svg", labels={"a7.h1": "bee"})
    with pytest.raises(OptionError, match="holds no labels"):
        circuit.draw(tmp_path / "no.json", labels=found.labels)


def test_descriptions_are_the_users_own_where_their_directions_are_given() -> None:
    model, images = planted()
    width = decompose(model, images, progress=False).embedding.shape[1]
    texts, directions = ("a", "b", "c"), np.eye(width)[:3]
    found = text_span(model, images, texts, embeddings=directions, draws=40, progress=False)
    assert found.descriptions == texts
    assert found.chosen.shape == (6, 5)
    assert all(0 <= row["p"] <= row["p_fdr"] <= 1 for row in found.records())  # type: ignore[operator]
    for wrong, message in (
        ({"descriptions": texts}, "no words for the descriptions"),
        ({"descriptions": texts, "embeddings": directions[:2]}, "one direction for each"),
        ({"descriptions": texts, "embeddings": directions[:, :5]}, "of 5 dimensions"),
        ({"alpha": 1.5}, "between 0 and 1"),
    ):
        with pytest.raises(OptionError, match=message):
            text_span(model, images, progress=False, **wrong)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="8 or more"):
        text_span(model, images[:7], progress=False)


def test_descriptions_that_come_along_are_short_and_there_once() -> None:
    each = own_descriptions()
    assert len(set(each)) == len(each)
    assert max(len(text.split()) for text in each) <= 5


@pytest.mark.skipif("clip-tiny" not in zoo_names(), reason="clip-tiny is not bundled")
def test_labels_of_clip_tiny_are_what_its_answers_lose() -> None:
    """Heads that are said to be about colours carry the answers about colours, and no others."""
    scenes = signs.random_scenes(120, seed=5, word=None)
    model, images = cv.load("clip-tiny"), signs.normalise(signs.draw_scenes(scenes))
    labels = text_span(model, images, phrases=1, progress=False).labels
    coloured = [name for name, said in labels.items() if said in signs.COLOURS]
    assert {*labels.values()} & {*signs.ANIMALS}
    late = [name for name in coloured if not name.startswith("a0.")]  # an early one sees the background

    def lost(factor: str, classes: tuple[str, ...], own: list[str]) -> float:
        asked = {each: signs.sentence({factor: each}) for each in classes}
        prompted = model.with_prompts([*asked.values()])
        answers = [asked[each] for each in own]
        found = mean_ablate(prompted, images, answers, sets={"late": late}, progress=False)
        return found.accuracy().value - found.accuracy("late").value

    assert lost("colour", tuple(signs.COLOURS), [scene.colour for scene in scenes]) > 0.2
    assert abs(lost("animal", signs.ANIMALS, [scene.animal for scene in scenes])) < 0.05


@pytest.mark.skipif("clip-tiny" not in zoo_names(), reason="clip-tiny is not bundled")
def test_the_place_head_of_clip_tiny_is_what_answers_about_places_need() -> None:
    """Its output is replaced in the model, since later parts tell its place too."""
    scenes = signs.random_scenes(200, seed=5, word=None)
    model, images = cv.load("clip-tiny"), signs.normalise(signs.draw_scenes(scenes))
    labels = text_span(model, images, phrases=1, progress=False).labels
    (head,) = (name for name, said in labels.items() if said.split()[-1] in signs.PLACES)
    usual = cv.activations(model, images, head, progress=False)[head]
    without = model.edit({head: torch.as_tensor(np.asarray(usual)).mean(dim=0)})
    fresh = signs.random_scenes(200, seed=77, word=None)
    pictures = signs.normalise(signs.draw_scenes(fresh))

    def right(factor: str) -> float:
        asked = [signs.sentence({factor: value}) for value in signs.FACTORS[factor]]
        truth = [signs.FACTORS[factor].index(getattr(scene, factor)) for scene in fresh]
        answers = without.with_prompts(asked)(pictures).argmax(dim=1)
        return float((answers == torch.tensor(truth)).float().mean())

    assert right("place") < 0.95
    assert min(right(factor) for factor in ("animal", "colour", "background")) > 0.99


# -- features ------------------------------------------------------------------------------------


def test_a_feature_that_writes_along_a_phrase_is_called_by_it() -> None:
    """Of a dictionary of the last MLP one feature writes the embedding of "a cat", twenty write anything."""
    clip = cv.load("clip-tiny")
    said = ["a cat", "a dog", "a rabbit", "a white cat", "a grey dog", "a dog on the right"]
    assert clip.words is not None
    texts = clip.words.embed(said).double()
    readout: Any = clip.stages[-1]
    norm, projection = readout.parts.norm, readout.parts.heads[0].weight.double()
    forward = projection @ torch.diag(norm.weight.double()) @ (torch.eye(64) - 1 / 64).double()
    drawn = torch.Generator().manual_seed(3)
    others = torch.randn(20, 64, generator=drawn).double()
    cat = torch.linalg.pinv(forward) @ (texts[0] - texts.mean(dim=0))
    decoder = torch.cat([cat[None] / cat.norm() * others.norm(dim=1).mean(), others])
    encoder = torch.randn(21, 64, generator=drawn).double() / 8
    offset = torch.ones(21).double()  # so that features are there, more or less, on every image
    planted = cv.Dictionary(encoder, offset, decoder, torch.zeros(64).double(), "relu")
    fine = cv.refine_nodes(clip, {"m3": cv.features(planted, range(21))})

    images = signs.word_pairs(30, seed=4).clean
    found = text_span(fine, images, said, nodes="m3.f*", progress=False)
    assert found.heads == tuple(f"m3.f{number}" for number in range(21))
    assert found.labels.pop("m3.f0") == "a cat"
    assert len(found.labels) <= 3, "of those that write anything few are called anything"
    with pytest.raises(NameNotFoundError, match=r"m3\.n\*"):
        text_span(fine, images, said, nodes="m3.n*", progress=False)

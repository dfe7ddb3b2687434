"""Training a small CLIP: the same bytes again, captions that tell the truth, and the loss in a known case."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from circuitvit.datasets import signs
from circuitvit.errors import DataError, FileError, ModelError, OptionError
from circuitvit.models.zoo import Card, load_module, load_zoo_module
from circuitvit.models.zoo.text_tower import WordTokenizer
from circuitvit.training import train_clip
from circuitvit.training.clip import CONTEXT, VOCABULARY, Captioned, captioned, contrast
from circuitvit.training.loop import head_groups

TOKENIZER = WordTokenizer(VOCABULARY, CONTEXT)
MICRO = {"embed_dim": 16, "depth": 1, "num_heads": 2}


def run(out: Path | None = None, **options: Any) -> Any:
    small = {"architecture": MICRO, "steps": 2, "batch_size": 4, "held_out": 6, "progress": False}
    return train_clip(out, **{**small, **options})


def test_the_same_seed_gives_the_same_bytes_and_the_saved_model_is_the_trained_one(tmp_path: Path) -> None:
    first, again = run(tmp_path / "a"), run(tmp_path / "b", checkpoints=2)
    assert again.checkpoints[-1].read_bytes() == again.weights.read_bytes()
    assert first.weights.read_bytes() == again.weights.read_bytes()
    module, card = load_module(first.weights.with_suffix(".json"))
    assert card == first.card
    assert "start" not in card.recipe
    ids = torch.tensor([TOKENIZER.encode("a cat")])
    assert torch.equal(module.text(ids), first.model.text(ids))
    assert run(seed=1).card.weights_sha256 != card.weights_sha256


def test_it_starts_as_catdog_tiny_whose_silent_heads_are_drawn_afresh() -> None:
    result = run(architecture=None, steps=1, learning_rate=1e-9)
    assert result.card.recipe["start"] == "catdog-tiny"
    started, known = result.model.visual, load_zoo_module("catdog-tiny")
    torch.testing.assert_close(started.patch_embed.proj.weight, known.patch_embed.proj.weight)
    for group, was in zip(head_groups(started), head_groups(known), strict=True):
        silent = was.abs().amax(dim=(1, 2)) == 0
        torch.testing.assert_close(group[~silent], was[~silent])
        assert group.abs().amax(dim=(1, 2)).all()


def test_captions_are_true_of_their_pictures_but_for_words_taken_for_animals() -> None:
    scenes = signs.random_scenes(200, seed=0)
    batch = captioned(scenes, TOKENIZER, np.random.default_rng(0))
    assert batch.fits[torch.arange(len(batch.own)), batch.own].all()
    misread = 0
    for ids, place in zip(batch.ids.tolist(), batch.own.tolist(), strict=True):
        scene, words = scenes[place], TOKENIZER.words(ids)
        before = words[: words.index("sign")] if "sign" in words else words
        named = set(before) & set(signs.ANIMALS)
        assert named <= {scene.animal, scene.word}
        misread += bool(named - {scene.animal})
        for factor in ("colour", "place", "background"):
            assert set(words) & set(signs.FACTORS[factor]) <= {getattr(scene, factor)}
        if "sign" in words:
            assert words[words.index("saying") + 1] == scene.word
    assert 0 < misread < len(batch.own) / 10


class Given(nn.Module):
    """Features that are the inputs themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = self.text = nn.Identity()
        self.logit_scale = nn.Parameter(torch.zeros(()))


def test_pairs_that_fit_without_belonging_together_are_left_out() -> None:
    """Two captions of the same picture and one of another: cosines of 1 and 0, a scale of 1."""
    images, captions = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    fits = torch.tensor([[True, False], [True, True], [False, True]])
    loss, right = contrast(Given(), Captioned(images, captions, torch.tensor([0, 0, 1]), fits))  # type: ignore[arg-type]
    apart = float(torch.log1p(torch.exp(torch.tensor(-1.0))))  # 0 against 1
    assert loss.item() == pytest.approx((apart + apart + 0 + apart + apart + apart) / 6, abs=1e-6)
    assert right == 1


def test_what_is_no_option_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="label_smoothing is for classes"):
        run(label_smoothing=0.1)
    with pytest.raises(ModelError, match="refuses"):
        run(architecture={"embed_dim": 30})
    with pytest.raises(DataError, match="loss is nan"):
        run(learning_rate=1e30, steps=5)


def test_cards_with_a_text_tower_are_checked() -> None:
    content = json.loads(json.dumps(run().card.to_dict()))
    assert Card.from_dict(content).tokenizer is not None
    for changes, message in (
        ({"vocabulary": ["a", "a"]}, "different words"),
        ({"vocabulary": ["a", "b"]}, "2 words and 3 marks"),
        ({"classes": ["cat"]}, "classes is empty"),
        ({"text": {**content["text"], "features": 3}}, "different widths"),
        ({"text": {**content["text"], "context": "24"}}, "context"),
        ({"text": {**content["text"], "end": 7}}, "end with token 2"),
        ({"text": {**content["text"], "causal": "no"}}, "true or false"),
        ({"text": None}, "text cannot be a NoneType"),
    ):
        with pytest.raises(FileError, match=message):
            Card.from_dict({**content, **changes})

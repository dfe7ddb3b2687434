"""Scenes with captions and signs: what is swapped changes and nothing else, and captions tell the truth."""

from __future__ import annotations

import pytest
import torch

from circuitvit.datasets import catdog, signs
from circuitvit.errors import NameNotFoundError, OptionError

SCENES = signs.random_scenes(24, seed=3)


def differing(first: list[signs.SignScene], second: list[signs.SignScene]) -> torch.Tensor:
    return (signs.draw_scenes(first) != signs.draw_scenes(second)).any(dim=1)


def test_another_word_changes_the_sign_alone() -> None:
    said = [signs.swap_word(scene, "cat") for scene in SCENES]
    inside = torch.stack([signs.sign_mask(scene) for scene in SCENES])
    for word in ("dog", "open", None):
        changed = differing(said, [signs.swap_word(scene, word) for scene in SCENES])
        assert changed.any(dim=(1, 2)).all()
        assert not (changed & ~inside).any()


def test_another_animal_changes_its_features_alone_and_never_under_the_sign() -> None:
    seen = [signs.swap_animal(signs.swap_word(scene, "milk"), "cat") for scene in SCENES]
    changed = differing(seen, [signs.swap_animal(scene, "rabbit") for scene in seen])
    features = torch.stack([catdog.feature_masks(scene.picture)[0] for scene in seen])
    assert changed.any(dim=(1, 2)).all()
    assert not (changed & ~features).any()
    assert not (features & torch.stack([signs.sign_mask(scene) for scene in seen])).any()


def test_scenes_have_every_value_of_every_factor_and_signs_in_half_of_them() -> None:
    many = signs.random_scenes(400, seed=0)
    for factor, values in signs.FACTORS.items():
        assert {getattr(scene, factor) for scene in many} - {None} == set(values)
    assert sum(scene.word is not None for scene in many) / len(many) == pytest.approx(0.5, abs=0.08)
    assert len({scene.sign for scene in many}) == 4


def test_a_series_does_not_depend_on_how_it_is_cut_nor_on_what_is_named() -> None:
    assert signs.random_scenes(3, seed=3, first=5) == SCENES[5:8]
    named = signs.random_scenes(24, seed=3, animal="bear", word="stop")
    assert [signs.swap_word(signs.swap_animal(scene, "bear"), "stop") for scene in SCENES] == named


def test_every_word_can_be_told_from_every_other() -> None:
    pictures = signs.draw_scenes([signs.swap_word(SCENES[0], word) for word in signs.WORDS])
    assert len(pictures.flatten(1).unique(dim=0)) == len(signs.WORDS)


def test_captions() -> None:
    facts = {"colour": "white", "animal": "bear", "place": "middle", "background": "pink", "word": "open"}
    assert signs.sentence(facts) == "a white bear in the middle with a pink background and a sign saying open"
    assert signs.sentence({"place": "left"}) == "an animal on the left"
    assert signs.sentence({"colour": "black"}) == "a black animal"
    assert signs.sentence({"word": "cat"}) == "a sign saying cat"
    with pytest.raises(NameNotFoundError, match="did you mean 'colour'"):
        signs.caption(SCENES[0], ("color",))
    with pytest.raises(OptionError, match="at least one fact"):
        signs.caption(signs.swap_word(SCENES[0], None), ("word",))


def test_pairs_differ_in_what_they_are_about() -> None:
    read, look = signs.word_pairs(8, seed=1), signs.animal_pairs(8, seed=1)
    assert all(scene.animal not in ("cat", "dog") for scene in read.clean_scenes)
    assert {scene.word for scene in read.corrupt_scenes} == {"dog"}
    assert {scene.animal for scene in look.corrupt_scenes} == {"dog"}
    assert {scene.word for scene in (*look.clean_scenes, *look.corrupt_scenes)} == {None}
    clean, corrupt = signs.word_pairs(3, seed=1)
    assert torch.equal(clean, read.clean[:3])
    assert torch.equal(corrupt, read.corrupt[:3])
    for wrong, message in ((0, "at least 1"), (2, "both 'cat'")):
        with pytest.raises(OptionError, match=message):
            signs.word_pairs(wrong, corrupt="cat")

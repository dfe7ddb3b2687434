"""Drawn scenes: exact counterfactuals, honest masks, and no shortcut to the species."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from circuitvit.datasets.catdog import (
    CLASSES,
    Scene,
    catdog_pairs,
    draw_scene,
    draw_scenes,
    feature_masks,
    normalise,
    random_scene,
    random_scenes,
    scene_masks,
    scene_targets,
    swap_species,
)
from circuitvit.errors import NameNotFoundError, OptionError

seeds = st.integers(0, 2**31)
species = st.sampled_from(CLASSES)


def scene_of(seed: int, animals: int = 1) -> Scene:
    return random_scene(np.random.default_rng(seed), animals)


def test_pictures_are_float32_in_the_unit_range() -> None:
    pictures = draw_scenes(random_scenes(40, seed=0) + random_scenes(40, seed=0, animals=2))
    assert pictures.shape == (80, 3, 48, 48)
    assert pictures.dtype == torch.float32
    assert pictures.min() >= 0
    assert pictures.max() <= 1


@given(seeds, species, st.sampled_from([1, 2]), st.sampled_from([32, 48, 64]))
def test_swapping_species_changes_feature_pixels_only(seed: int, new: str, animals: int, size: int) -> None:
    scene = scene_of(seed, animals)
    swapped = swap_species(scene, new, animal=animals - 1)
    changed = (draw_scene(scene, size) != draw_scene(swapped, size)).any(dim=0)
    assert not (changed & ~feature_masks(scene, size)[animals - 1]).any()
    assert changed.any() == (new != scene.animals[animals - 1].species)
    assert swap_species(swapped, scene.animals[animals - 1].species, animal=animals - 1) == scene


@given(seeds, st.sampled_from([1, 2]))
def test_masks_hold_every_pixel_that_an_animal_touches(seed: int, animals: int) -> None:
    scene = scene_of(seed, animals)
    picture, masks = draw_scene(scene), scene_masks(scene)
    assert masks.shape == (animals, 48, 48)
    assert masks.dtype == torch.bool
    for number in range(animals):
        without = replace(scene, animals=scene.animals[:number] + scene.animals[number + 1 :])
        changed = (picture != draw_scene(without)).any(dim=0)
        assert not (changed & ~masks[number]).any()
        # A touched pixel stays the same only where the cover rounds to nothing or white clips.
        assert (changed & masks[number]).sum() >= 0.9 * masks[number].sum()


@given(seeds, species)
def test_animals_are_wholly_in_the_picture(seed: int, kind: str) -> None:
    scene = random_scene(np.random.default_rng(seed), species=[kind])
    animal = scene.animals[0]
    # The same animal, moved by whole pixels to a picture's middle and drawn in one twice as wide.
    move = [round((0.5 - place) * 48) / 48 for place in (animal.x, animal.y)]
    halved = replace(
        animal,
        x=(animal.x + move[0]) / 2 + 0.25,
        y=(animal.y + move[1]) / 2 + 0.25,
        radius=animal.radius / 2,
    )
    whole = scene_masks(replace(scene, animals=(halved,)), size=96).sum()
    assert scene_masks(scene).sum() >= 0.98 * whole


@given(seeds)
def test_two_animals_hardly_overlap(seed: int) -> None:
    first, second = scene_masks(scene_of(seed, animals=2))
    assert (first & second).sum() <= 0.05 * first.sum()


def test_the_series_does_not_depend_on_how_it_is_cut() -> None:
    whole = random_scenes(50, seed=3)
    assert random_scenes(20, seed=3) + random_scenes(30, seed=3, first=20) == whole
    together = draw_scenes(whole)
    alone = torch.stack([draw_scene(scene) for scene in whole])
    assert torch.equal(together, alone)
    assert torch.equal(together, draw_scenes(whole))
    assert random_scenes(50, seed=4) != whole


def test_no_global_random_state_is_used() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    before_torch, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
    catdog_pairs(2, seed=0)
    assert torch.equal(torch.get_rng_state(), before_torch)
    assert (np.random.get_state()[1] == before_numpy).all()  # type: ignore[index]


def test_naming_the_species_changes_nothing_else() -> None:
    for seed in range(20):
        free = scene_of(seed)
        named = random_scene(np.random.default_rng(seed), species=["bear"])
        assert swap_species(free, "bear") == named


def held_out_accuracy(features: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy on the second half of a logistic regression fitted to the first."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    features = (features - features.mean(0)) / (features.std(0) + 1e-9)
    half = len(labels) // 2
    return float(
        linear_model.LogisticRegression()
        .fit(features[:half], labels[:half])
        .score(features[half:], labels[half:])
    )


def test_nuisance_factors_do_not_tell_the_species() -> None:
    scenes = random_scenes(8000, seed=11)
    labels = np.array([CLASSES.index(scene.animals[0].species) for scene in scenes])
    assert np.bincount(labels).min() > 1800
    factors = np.array(
        [
            [
                a.x,
                a.y,
                a.radius,
                a.tilt,
                a.turn,
                *a.fur,
                *a.accent,
                *a.eye,
                *s.background,
                *s.background2,
                s.noise,
            ]
            for s in scenes
            for a in s.animals
        ]
    )
    assert held_out_accuracy(factors, labels) < 0.28  # chance is 0.25, three standard errors 0.02


def test_mean_colour_of_the_picture_does_not_tell_the_species() -> None:
    scenes = random_scenes(4000, seed=12)
    labels = np.array([CLASSES.index(scene.animals[0].species) for scene in scenes])
    pictures = draw_scenes(scenes)
    assert held_out_accuracy(pictures.mean(dim=(2, 3)).numpy(), labels) < 0.29


def test_two_animals_are_of_different_species_with_half_targets() -> None:
    scenes = random_scenes(60, seed=5, animals=2)
    assert all(len({a.species for a in scene.animals}) == 2 for scene in scenes)
    targets = scene_targets(scenes)
    assert torch.equal(targets.sum(dim=1), torch.ones(60))
    assert torch.equal(targets.amax(dim=1), torch.full((60,), 0.5))
    both_dogs = swap_species(swap_species(scenes[0], "dog", 0), "dog", 1)
    assert scene_targets([both_dogs])[0].tolist() == [0.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("animals", [1, 2])
def test_pairs(animals: int) -> None:
    pairs = catdog_pairs(6, seed=7, clean="rabbit", corrupt="bear", animals=animals)
    clean, corrupt = pairs
    assert clean.shape == corrupt.shape == (6, 3, 48, 48)
    assert len(pairs) == 6
    assert clean.min() < 0  # preprocessed
    assert pairs.clean_masks.shape == pairs.corrupt_masks.shape == (6, animals, 48, 48)
    for before, after in zip(pairs.clean_scenes, pairs.corrupt_scenes, strict=True):
        assert (before.animals[0].species, after.animals[0].species) == ("rabbit", "bear")
        assert before.animals[1:] == after.animals[1:]
        assert all(animal.species in ("cat", "dog") for animal in before.animals[1:])
    pixels = catdog_pairs(3, seed=7, clean="rabbit", corrupt="bear", animals=animals, preprocessed=False)
    assert torch.equal(normalise(pixels.clean), clean[:3])
    assert torch.equal(normalise(pixels.corrupt), corrupt[:3])


def test_senseless_arguments_are_refused() -> None:
    with pytest.raises(OptionError, match="1 or 2 animals"):
        random_scenes(1, seed=0, animals=3)
    with pytest.raises(OptionError, match="seed"):
        random_scenes(1, seed=-1)
    with pytest.raises(OptionError, match="at least 1"):
        catdog_pairs(0)
    with pytest.raises(OptionError, match="both 'cat'"):
        catdog_pairs(1, clean="cat", corrupt="cat")
    with pytest.raises(NameNotFoundError, match="did you mean 'rabbit'"):
        catdog_pairs(1, clean="rabit")
    with pytest.raises(OptionError, match="none of them"):
        swap_species(random_scenes(1, seed=0)[0], "dog", animal=1)
    with pytest.raises(OptionError, match="at least 8"):
        draw_scene(random_scenes(1, seed=0)[0], size=4)

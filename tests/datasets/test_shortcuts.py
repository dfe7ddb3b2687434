"""Shortcuts: the cue goes with the species as often as asked, and cue and animal are exchanged alone."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from circuitvit.datasets.catdog import feature_masks, scene_masks
from circuitvit.datasets.shortcuts import (
    CUES,
    agrees,
    group_scenes,
    labels,
    scene_groups,
    shortcut_pairs,
    shortcut_scenes,
)
from circuitvit.datasets.signs import ANIMALS, sign_mask
from circuitvit.errors import NameNotFoundError, OptionError


@pytest.mark.parametrize("cue", CUES)
def test_the_cue_is_that_of_the_species_in_the_share_that_is_asked_for(cue: str) -> None:
    scenes = shortcut_scenes(1000, seed=3, cue=cue, share=0.7)
    right = sum(agrees(scene, cue) for scene in scenes)
    assert right == pytest.approx(700, abs=4 * (1000 * 0.7 * 0.3) ** 0.5)
    wrong = Counter((s.animal, getattr(s, cue)) for s in scenes if not agrees(s, cue))
    assert len(wrong) == 12  # every other species' cue
    assert max(wrong.values()) < 50  # of 25 expected each
    assert all((scene.word is None) == (cue != "word") for scene in scenes)


def test_a_series_does_not_depend_on_how_it_is_cut() -> None:
    whole = shortcut_scenes(6, seed=1)
    assert whole == shortcut_scenes(2, seed=1) + shortcut_scenes(4, seed=1, first=2)
    assert [CUES["background"][i] for i in labels(shortcut_scenes(6, seed=1, share=1.0))] == [
        scene.background for scene in shortcut_scenes(6, seed=1, share=1.0)
    ]


def test_groups_hold_what_their_names_say() -> None:
    groups = group_scenes(5, seed=2, cue="colour")
    assert len(groups) == 2 * len(ANIMALS)
    for name, scenes in groups.items():
        assert set(scene_groups(scenes, "colour")) == {name}
        assert len(scenes) == 5


@pytest.mark.parametrize("cue", CUES)
def test_one_thing_is_exchanged_and_every_other_pixel_stays(cue: str) -> None:
    pairs = {
        each: shortcut_pairs(3, 5, "rabbit", "bear", change=each, cue=cue) for each in (cue, "animal", "both")
    }
    assert all(torch.equal(each.clean, pairs["both"].clean) for each in pairs.values())
    for index, scene in enumerate(pairs["both"].clean_scenes):
        assert agrees(scene, cue)
        assert agrees(pairs["both"].corrupt_scenes[index], cue)
        changed = {
            each: (found.clean[index] != found.corrupt[index]).any(dim=0) for each, found in pairs.items()
        }
        inside = scene_masks(scene.picture)[0] if cue == "colour" else sign_mask(scene)
        if cue == "background":
            assert changed[cue][:8].all()
        else:
            assert not (changed[cue] & ~inside).any()
        assert not (changed["animal"] & ~feature_masks(scene.picture)[0]).any()
        assert changed["animal"].any()


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(NameNotFoundError, match="did you mean 'background'"):
        shortcut_scenes(1, seed=0, cue="backgroud")
    with pytest.raises(OptionError, match="between 0 and 1"):
        shortcut_scenes(1, seed=0, share=1.5)
    with pytest.raises(NameNotFoundError, match="whose cue is the word"):
        shortcut_pairs(1, change="background", cue="word")
    with pytest.raises(OptionError, match="would not differ"):
        shortcut_pairs(1, clean="cat", corrupt="cat")
    with pytest.raises(NameNotFoundError, match="species"):
        shortcut_pairs(1, clean="wolf")
    with pytest.raises(OptionError, match="at least 1"):
        shortcut_pairs(0)

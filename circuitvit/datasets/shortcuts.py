"""Drawn animals with a shortcut: something beside the animal that nearly always gives its species away.

A scene is one of :mod:`circuitvit.datasets.signs`, in which one factor, the *cue*, goes with the species:
cats before green and dogs before blue; or the word on the sign names the animal; or the coat has its colour.
In a share of the scenes the cue is that of the animal, in the others it is another species'. A model that is
trained where that share is high learns the cue, which is easier to see than ears and muzzles, and is wrong
where the two disagree: the worst of the *groups*, species by agreement, tells (Sagawa et al. 2020,
[arXiv:1911.08731](https://arxiv.org/abs/1911.08731)).

As every pixel is drawn, cue and animal can each be exchanged alone: :func:`shortcut_pairs`.

Example:
    >>> scenes = shortcut_scenes(4, seed=0, share=0.5)
    >>> scene_groups(scenes)[2:]
    ['bear, background disagrees', 'bear, background agrees']
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from circuitvit.datasets.catdog import generator, normalise
from circuitvit.datasets.signs import (
    ANIMALS,
    BACKGROUNDS,
    COLOURS,
    SignPairs,
    SignScene,
    draw_scenes,
    random_scene,
)
from circuitvit.errors import OptionError, unknown_name

CUES: Mapping[str, tuple[str, ...]] = {
    "background": tuple(BACKGROUNDS),
    "word": ANIMALS,
    "colour": tuple(COLOURS)[: len(ANIMALS)],
}
"""What can give the species away; of each cue the values that go with the species, in their order."""


def shortcut_scenes(
    n: int, seed: int, *, cue: str = "background", share: float = 0.5, first: int = 0
) -> list[SignScene]:
    """Scenes number `first` to `first + n - 1` of the endless series that belongs to `seed`.

    A scene does not depend on how the series is cut. There are signs only where the word is the cue.

    Args:
        n: how many.
        seed: of all that is drawn at random.
        cue: one of :data:`CUES`.
        share: of the scenes whose cue is that of their animal; in the others it is another species'.
        first: number of the first scene.

    Raises:
        NameNotFoundError: for a cue that there is not.
        OptionError: for a share that is not between 0 and 1.

    Example:
        >>> [agrees(scene) for scene in shortcut_scenes(4, seed=0, share=0.5)]
        [False, False, False, True]
    """
    check_cue(cue, share)
    return [_scene(generator(seed, "shortcuts", index), cue, share) for index in range(first, first + n)]


def agrees(scene: SignScene, cue: str = "background") -> bool:
    """Whether the cue of a scene is that of its animal."""
    return bool(getattr(scene, cue) == _value(cue, scene.animal))


def scene_groups(scenes: Sequence[SignScene], cue: str = "background") -> list[str]:
    """The group of each scene: its species, and whether the cue agrees.

    Example:
        >>> scene_groups(shortcut_scenes(2, seed=0))
        ['cat, background disagrees', 'dog, background disagrees']
    """
    return [f"{each.animal}, {cue} {'agrees' if agrees(each, cue) else 'disagrees'}" for each in scenes]


def group_scenes(n: int, seed: int, *, cue: str = "background") -> dict[str, list[SignScene]]:
    """`n` scenes of each group, by its name as :func:`scene_groups` tells it.

    Raises:
        NameNotFoundError: for a cue that there is not.

    Example:
        >>> list(group_scenes(3, seed=0))[3:5]
        ['bear, background agrees', 'cat, background disagrees']
    """
    check_cue(cue)
    groups: dict[str, list[SignScene]] = {}
    for share in (1.0, 0.0):
        for animal in ANIMALS:
            scenes = [_scene(generator(seed, "shortcuts", index), cue, share, animal) for index in range(n)]
            groups |= {scene_groups(scenes[:1], cue)[0]: scenes}
    return groups


def labels(scenes: Sequence[SignScene]) -> Tensor:
    """The class of each scene's animal: `(n,)`, int64."""
    return torch.tensor([ANIMALS.index(scene.animal) for scene in scenes])


def shortcut_pairs(
    n: int,
    seed: int = 0,
    clean: str = "cat",
    corrupt: str = "dog",
    *,
    change: str = "background",
    cue: str = "background",
) -> SignPairs:
    """Pairs to find what carries a shortcut: the same scene with the cue exchanged, the animal, or both.

    In the clean pictures the cue agrees with the animal. For the same seed they are the same whatever is
    changed, so the effects of cue and animal can be held against that of both.

    Args:
        n: how many pairs.
        seed: pairs of one seed are always the same, and the first ones do not depend on `n`.
        clean: species of the clean pictures, whose cue is shown.
        corrupt: the species whose cue, features or both the corrupt pictures show.
        change: what is exchanged: the cue, such as "background"; "animal" (ears and muzzle); or "both".
        cue: one of :data:`CUES`.

    Raises:
        OptionError: for n below 1, or clean and corrupt the same.
        NameNotFoundError: for a species, a cue or a change that there is not.

    Example:
        >>> pairs = shortcut_pairs(2, change="animal")
        >>> scene_groups(pairs.clean_scenes)[0], scene_groups(pairs.corrupt_scenes)[0]
        ('cat, background agrees', 'dog, background disagrees')
    """
    check_cue(cue)
    if n < 1:
        raise OptionError(f"n counts the pairs, so it is at least 1, not {n}")
    if clean == corrupt:
        raise OptionError(f"clean and corrupt are both {clean!r}, so the pairs would not differ")
    for name in (clean, corrupt):
        if name not in ANIMALS:
            raise unknown_name("species", name, ANIMALS)
    if change not in (cue, "animal", "both"):
        raise unknown_name(f"change of scenes whose cue is the {cue}", change, (cue, "animal", "both"))
    animal, shown = (corrupt if change in (what, "both") else clean for what in ("animal", cue))
    before, after = (
        [_drawn(generator(seed, "shortcut pairs", index), cue, *each) for index in range(n)]
        for each in ((clean, clean), (animal, shown))
    )
    pictures = [normalise(draw_scenes(scenes)) for scenes in (before, after)]
    return SignPairs(pictures[0], pictures[1], tuple(before), tuple(after))


def check_cue(cue: str, share: float = 0.5) -> None:
    """Refuse a cue that there is not, and a share that is none.

    Raises:
        NameNotFoundError: for the cue.
        OptionError: for the share.
    """
    if cue not in CUES:
        raise unknown_name("cue", cue, CUES)
    if not 0 <= share <= 1:
        raise OptionError(f"the share of scenes whose cue agrees is between 0 and 1, not {share}")


def _scene(rng: np.random.Generator, cue: str, share: float, animal: str | None = None) -> SignScene:
    chance, other = rng.random(), int(rng.integers(1, len(ANIMALS)))
    species = int(rng.integers(len(ANIMALS)))
    species = species if animal is None else ANIMALS.index(animal)
    shown = species if chance < share else (species + other) % len(ANIMALS)
    return _drawn(rng, cue, ANIMALS[species], ANIMALS[shown])


def _drawn(rng: np.random.Generator, cue: str, animal: str, shown: str) -> SignScene:
    """A scene of one species with the cue of another, or its own; everything else from `rng`."""
    factors = {"word": None, cue: _value(cue, shown)}
    return random_scene(rng, animal, **factors)


def _value(cue: str, species: str) -> str:
    return CUES[cue][ANIMALS.index(species)]

"""Drawn animals with a caption each, and in a part of the scenes a word on a sign: to look at and to read.

A scene is one animal of :mod:`circuitvit.datasets.catdog`, with factors that words can name exactly: its
species, the colour of its fur, its place, the colour of the background, and the word on the sign, if there
is one. No caption names the rest: size, tilt, where the animal looks, texture, noise, where the sign hangs.
All are drawn independently, so each can be exchanged alone, and every other pixel stays the same to the last
bit: another animal (:func:`swap_animal`: ears and muzzle change), another word or no sign (:func:`swap_word`:
the sign changes).

Example:
    >>> scene = random_scene(np.random.default_rng(0), animal="cat", word="dog")
    >>> caption(scene, ("colour", "animal", "word"))
    'a brown cat with a sign saying dog'
    >>> caption(swap_word(scene, None), ("animal",))
    'a cat'
    >>> draw_scenes([scene]).shape
    torch.Size([1, 3, 48, 48])
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from circuitvit.datasets import catdog
from circuitvit.datasets.catdog import MEAN, SIZE, STD, Colour, normalise
from circuitvit.datasets.drawing import TEXTURES
from circuitvit.errors import OptionError, unknown_name

__all__ = [
    "ANIMALS", "BACKGROUNDS", "COLOURS", "FACTORS", "MEAN", "NEUTRAL", "PLACES", "SIZE", "STD", "WORDS",
    "SignPairs", "SignScene", "animal_pairs", "caption", "draw_scenes", "normalise", "random_scene",
    "random_scenes", "sign_mask", "swap_animal", "swap_word", "word_pairs",
]  # fmt: skip

# -- what captions can say -----------------------------------------------------------------------

ANIMALS = catdog.CLASSES
"""The species: cat, dog, rabbit, bear."""

NEUTRAL = ("open", "stop", "milk", "garden")
"""Words on signs that name no animal."""

WORDS = ANIMALS + NEUTRAL
"""All words that a sign can say."""

COLOURS: Mapping[str, tuple[Colour, Colour]] = {
    "black": ((0.17, 0.16, 0.19), (0.52, 0.46, 0.48)),
    "white": ((0.94, 0.94, 0.92), (0.88, 0.66, 0.62)),
    "brown": ((0.48, 0.29, 0.14), (0.86, 0.70, 0.50)),
    "grey": ((0.55, 0.56, 0.58), (0.84, 0.82, 0.84)),
    "golden": ((0.95, 0.72, 0.22), (0.72, 0.42, 0.10)),
}
"""Colours of fur, each with that of inner ears and muzzle."""

BACKGROUNDS: Mapping[str, Colour] = {
    "green": (0.36, 0.68, 0.34),
    "blue": (0.32, 0.52, 0.84),
    "pink": (0.92, 0.56, 0.68),
    "purple": (0.50, 0.30, 0.66),
}
"""Colours of the background."""

PLACES: Mapping[str, float] = {"left": 0.27, "middle": 0.50, "right": 0.73}
"""Where the animal's head is, from the left edge, as a fraction of the side."""

FACTORS: Mapping[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "animal": ANIMALS,
    "place": tuple(PLACES),
    "background": tuple(BACKGROUNDS),
    "word": WORDS,
}
"""What a caption can tell, in the order in which it does, and the values of each."""


@dataclass(frozen=True)
class SignScene:
    """A scene that captions can tell.

    Attributes:
        picture: all factors of the drawing but the sign.
        colour: of the fur, one of :data:`COLOURS`.
        place: of the animal, one of :data:`PLACES`.
        background: one of :data:`BACKGROUNDS`.
        word: on the sign, one of :data:`WORDS`; None without a sign.
        sign: left upper corner of the sign, in pixels from the left and from the top.
    """

    picture: catdog.Scene
    colour: str
    place: str
    background: str
    word: str | None
    sign: tuple[int, int]

    def __post_init__(self) -> None:
        for factor in ("colour", "place", "background", "word"):
            value = getattr(self, factor)
            if value is not None and value not in FACTORS[factor]:
                raise unknown_name(factor, value, FACTORS[factor])

    @property
    def animal(self) -> str:
        """The species."""
        return self.picture.animals[0].species


def caption(scene: SignScene, tell: Sequence[str] = tuple(FACTORS)) -> str:
    """What is to be seen, in a sentence of a closed vocabulary.

    Args:
        scene: what it is about. Without a sign it says nothing of a word, even where asked.
        tell: which of :data:`FACTORS` to mention.

    Raises:
        NameNotFoundError: for a factor that there is not.

    Example:
        >>> caption(random_scene(np.random.default_rng(0), word="open"), ("background", "word"))
        'a green background with a sign saying open'
    """
    for factor in tell:
        if factor not in FACTORS:
            raise unknown_name("factor", factor, tuple(FACTORS))
    return sentence({factor: value for factor in tell if (value := getattr(scene, factor)) is not None})


def sentence(facts: Mapping[str, str]) -> str:
    """A caption of these facts, from a factor to its value: "a brown cat on the left"."""
    parts = []
    if {"colour", "animal", "place"} & set(facts):
        colour = f"{facts['colour']} " if "colour" in facts else ""
        animal = facts.get("animal", "animal")
        parts.append(f"{'an' if colour + animal == 'animal' else 'a'} {colour}{animal}")
        if "place" in facts:
            parts[0] += f" {'in' if facts['place'] == 'middle' else 'on'} the {facts['place']}"
    if "background" in facts:
        parts.append(f"a {facts['background']} background")
    if "word" in facts:
        parts.append(f"a sign saying {facts['word']}")
    if not parts:
        raise OptionError("a caption tells at least one fact of the scene")
    head, *rest = parts
    return head + "".join(f" {'with' if index == 0 else 'and'} {part}" for index, part in enumerate(rest))


# -- scenes at random, and one factor exchanged --------------------------------------------------


def random_scene(
    rng: np.random.Generator,
    animal: str | None = None,
    word: str | None = "?",
    *,
    background: str | None = None,
    colour: str | None = None,
) -> SignScene:
    """A scene whose factors are all drawn independently from `rng`.

    The same numbers are consumed whether or not a factor is given, so naming it changes nothing else about
    the scene.

    Args:
        rng: the only source of randomness.
        animal: by default any.
        word: on the sign; None for no sign, "?" for no sign in half of the scenes and any word in the others.
        background: one of :data:`BACKGROUNDS`, by default any.
        colour: of the fur, one of :data:`COLOURS`, by default any.

    Raises:
        NameNotFoundError: for an animal, a word, a background or a colour that there is not.
    """
    for factor, given in {"background": background, "colour": colour}.items():
        if given is not None and given not in FACTORS[factor]:
            raise unknown_name(factor, given, FACTORS[factor])
    u = rng.random(24).tolist()
    noise_seed = int(rng.integers(2**62))
    drawn_colour, place, drawn_background, species, said = (
        values[int(len(values) * x)] for values, x in zip(
            (tuple(COLOURS), tuple(PLACES), tuple(BACKGROUNDS), ANIMALS, WORDS), u, strict=False
        )
    )  # fmt: skip
    colour, background = colour or drawn_colour, background or drawn_background
    fur, accent = (_near(each, u[10:13], 0.05) for each in COLOURS[colour])
    picture = catdog.Scene(
        animals=(
            catdog.Animal(
                species=animal or species,
                x=PLACES[place] + 0.04 * (u[5] - 0.5),
                y=0.575 + 0.035 * u[6],  # ears end below a sign at the top, chins above one at the bottom
                radius=0.19 + 0.015 * u[7],
                tilt=0.2 * (u[8] - 0.5),
                turn=0.3 * (u[9] - 0.5),
                fur=fur,
                accent=accent,
                eye=_near((0.75, 0.80, 0.70), u[13:16], 0.3),
            ),
        ),
        background=_near(BACKGROUNDS[background], u[16:19], 0.06),
        background2=_near(BACKGROUNDS[background], (u[18], u[16], u[17]), 0.16),
        texture=TEXTURES[int(len(TEXTURES) * u[19])],
        texture_angle=2 * np.pi * u[20],
        texture_period=0.15 + 0.35 * u[21],
        texture_phase=u[22],
        noise=0.02,
        noise_seed=noise_seed,
    )
    corners = [(x, y) for y in (0, SIZE - SIGN[1]) for x in (0, SIZE - SIGN[0])]
    chance = int(2 * len(corners) * u[23])  # even numbers have a sign
    said_here = (said if chance % 2 == 0 else None) if word == "?" else word
    return SignScene(picture, colour, place, background, said_here, corners[chance // 2])


def random_scenes(
    n: int, seed: int, *, first: int = 0, animal: str | None = None, word: str | None = "?"
) -> list[SignScene]:
    """Scenes number `first` to `first + n - 1` of the endless series that belongs to `seed`.

    Each scene has its own generator, so the series does not depend on how it is cut into batches.
    """
    return [
        random_scene(catdog.generator(seed, "signs", index), animal, word)
        for index in range(first, first + n)
    ]


def swap_animal(scene: SignScene, animal: str) -> SignScene:
    """The same scene with the features of another animal; only pixels of ears and muzzle differ."""
    return replace(scene, picture=catdog.swap_species(scene.picture, animal))


def swap_word(scene: SignScene, word: str | None) -> SignScene:
    """The same scene with another word on the sign, or without a sign; only the sign's pixels differ."""
    return replace(scene, word=word)


def _near(colour: Colour, u: Sequence[float], width: float) -> Colour:
    red, green, blue = (min(max(c + width * (x - 0.5), 0.0), 1.0) for c, x in zip(colour, u, strict=True))
    return (red, green, blue)


# -- pictures ------------------------------------------------------------------------------------

SIGN = (24, 8)
"""Width and height of a sign in pixels: six letters of 3 x 5, with a pixel between them."""

_BOARD: Colour = (0.98, 0.97, 0.90)
_INK: Colour = (0.08, 0.06, 0.10)
_LETTERS = {
    "a": "010 101 111 101 101", "b": "110 101 110 101 110", "c": "011 100 100 100 011",
    "d": "110 101 101 101 110", "e": "111 100 110 100 111", "g": "011 100 101 101 011",
    "i": "111 010 010 010 111", "k": "101 101 110 101 101", "l": "100 100 100 100 111",
    "m": "101 111 111 101 101", "n": "110 101 101 101 101", "o": "010 101 101 101 010",
    "p": "110 101 110 100 100", "r": "110 101 110 110 101", "s": "011 100 010 001 110",
    "t": "111 010 010 010 010",
}  # fmt: skip


def draw_scenes(scenes: Sequence[SignScene]) -> Tensor:
    """The pictures of many scenes: (n, 3, 48, 48), float32, in [0, 1]."""
    pictures = catdog.draw_scenes([scene.picture for scene in scenes])
    for picture, scene in zip(pictures, scenes, strict=True):
        if scene.word is not None:
            x, y = scene.sign
            picture[:, y : y + SIGN[1], x : x + SIGN[0]] = _SIGNS[scene.word]
    return pictures


def sign_mask(scene: SignScene) -> Tensor:
    """Where the scene's sign is, or would be: (48, 48), bool. :func:`swap_word` changes nothing outside."""
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    x, y = scene.sign
    mask[y : y + SIGN[1], x : x + SIGN[0]] = True
    return mask


def _draw_sign(word: str) -> Tensor:
    """(3, 8, 24): dark capitals on a light board."""
    ink = torch.zeros(SIGN[1], SIGN[0], 1)
    start = 4 * ((SIGN[0] // 4 - len(word)) // 2)
    for index, letter in enumerate(word):
        left = start + 4 * index
        rows = [[float(bit) for bit in row] for row in _LETTERS[letter].split()]
        ink[2:7, left : left + 3, 0] = torch.tensor(rows)
    return (torch.tensor(_BOARD) + ink * (torch.tensor(_INK) - torch.tensor(_BOARD))).permute(2, 0, 1)


_SIGNS = {word: _draw_sign(word) for word in WORDS}


# -- pairs for experiments -----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SignPairs:
    """Clean pictures and their counterfactuals; unpacks as `clean, corrupt`.

    Attributes:
        clean: (n, 3, 48, 48) float32, normalised as `clip-tiny` takes them.
        corrupt: the same with one factor exchanged.
        clean_scenes: the factors behind each clean picture.
        corrupt_scenes: and behind each corrupt one.
    """

    clean: Tensor
    corrupt: Tensor
    clean_scenes: tuple[SignScene, ...]
    corrupt_scenes: tuple[SignScene, ...]

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.clean, self.corrupt))

    def __len__(self) -> int:
        return len(self.clean_scenes)


def word_pairs(n: int, seed: int = 0, clean: str = "cat", corrupt: str | None = "dog") -> SignPairs:
    """Pairs to find what reads: the same scene with another word on the sign.

    The animal is neither of the two that the words name, so looking does not help either of them.

    Args:
        n: how many pairs.
        seed: pairs of one seed are always the same, and the first ones do not depend on `n`.
        clean: what the signs of the clean pictures say.
        corrupt: what those of the corrupt pictures say, such as a neutral word; None for no sign.

    Raises:
        OptionError: for n below 1, or clean and corrupt the same.
        NameNotFoundError: for a word that there is not.
    """
    others = [name for name in ANIMALS if name not in (clean, corrupt)]
    scenes = [random_scene(rng, others[int(rng.integers(len(others)))], clean) for rng in _pairing(n, seed)]
    return _pairs(scenes, [swap_word(scene, corrupt) for scene in scenes], clean, corrupt)


def animal_pairs(
    n: int, seed: int = 0, clean: str = "cat", corrupt: str = "dog", word: str | None = None
) -> SignPairs:
    """Pairs to find what looks: the same scene with another animal.

    Args:
        n: how many pairs.
        seed: pairs of one seed are always the same, and the first ones do not depend on `n`.
        clean: animal of the clean pictures.
        corrupt: animal of the corrupt pictures.
        word: on the signs of both; None for no signs.

    Raises:
        OptionError: for n below 1, or clean and corrupt the same.
        NameNotFoundError: for an animal or a word that there is not.
    """
    scenes = [random_scene(rng, clean, word) for rng in _pairing(n, seed)]
    return _pairs(scenes, [swap_animal(scene, corrupt) for scene in scenes], clean, corrupt)


def _pairing(n: int, seed: int) -> Iterator[np.random.Generator]:
    if n < 1:
        raise OptionError(f"n counts the pairs, so it is at least 1, not {n}")
    return (catdog.generator(seed, "sign pairs", index) for index in range(n))


def _pairs(clean: list[SignScene], corrupt: list[SignScene], before: str, after: str | None) -> SignPairs:
    if before == after:
        raise OptionError(f"clean and corrupt are both {before!r}, so the pairs would not differ")
    pictures = [normalise(draw_scenes(scenes)) for scenes in (clean, corrupt)]
    return SignPairs(pictures[0], pictures[1], tuple(clean), tuple(corrupt))

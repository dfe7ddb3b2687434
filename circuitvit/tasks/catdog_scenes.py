"""What a drawn scene is made of: the factors behind each picture, and how they are chosen.

Nothing here draws; :mod:`circuitvit.tasks.catdog` makes pictures of scenes and exports all names of this
file that users need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from circuitvit.errors import OptionError, unknown_name
from circuitvit.tasks.catdog_drawing import TEXTURES

__all__ = [
    "CLASSES",
    "Animal",
    "Colour",
    "Scene",
    "generator",
    "random_scene",
    "random_scenes",
    "swap_species",
]

CLASSES: tuple[str, ...] = ("cat", "dog", "rabbit", "bear")
"""The species, in the order of the logits of `catdog-tiny`."""

Colour = tuple[float, float, float]
_STREAMS = {"scene": 0, "pairs": 1}  # separates the numbers of random_scenes from those of catdog_pairs
_FACTORS_PER_ANIMAL = 16


@dataclass(frozen=True)
class Animal:
    """One face. Lengths are fractions of the picture's side.

    Attributes:
        species: one of :data:`CLASSES`; decides ears and muzzle and nothing else.
        x: middle of the head, from the left edge.
        y: middle of the head, from the top edge.
        radius: of the head; ears reach up to 1.95 radii above the middle.
        tilt: of the head, in radians, clockwise.
        turn: how far eyes and muzzle look aside, in head radii (right is positive).
        fur: RGB in [0, 1].
        accent: RGB of inner ears, floppy ears and muzzle.
        eye: RGB of the iris.
    """

    species: str
    x: float
    y: float
    radius: float
    tilt: float
    turn: float
    fur: Colour
    accent: Colour
    eye: Colour

    def __post_init__(self) -> None:
        if self.species not in CLASSES:
            raise unknown_name("species", self.species, CLASSES)


@dataclass(frozen=True)
class Scene:
    """All there is to know about a picture; :func:`draw_scene` makes the picture of it.

    Attributes:
        animals: from back to front.
        background: RGB in [0, 1].
        background2: RGB of the texture's other colour.
        texture: one of "plain", "gradient", "stripes", "checks".
        texture_angle: in radians.
        texture_period: of stripes and checks, as a fraction of the side.
        texture_phase: 0..1.
        noise: standard deviation of the pixel noise.
        noise_seed: which noise.
    """

    animals: tuple[Animal, ...]
    background: Colour
    background2: Colour
    texture: str
    texture_angle: float
    texture_period: float
    texture_phase: float
    noise: float
    noise_seed: int

    def __post_init__(self) -> None:
        if self.texture not in TEXTURES:
            raise unknown_name("texture", self.texture, TEXTURES)


def random_scene(rng: np.random.Generator, animals: int = 1, species: Sequence[str] | None = None) -> Scene:
    """A scene whose factors are all drawn independently from `rng`.

    The same numbers are consumed whether or not `species` is given, so naming the species changes
    nothing else about the scene.

    Args:
        rng: the only source of randomness.
        animals: 1 or 2.
        species: one name per animal; by default different species at random.

    Raises:
        OptionError: for another number of animals, or a `species` of another length.
        NameNotFoundError: for a species that is not in :data:`CLASSES`.
    """
    if animals not in (1, 2):
        raise OptionError(f"a scene has 1 or 2 animals, not {animals}")
    if species is not None and len(species) != animals:
        raise OptionError(f"{animals} animal(s) need as many species, not {len(species)}: {list(species)}")
    drawn_species = [CLASSES[i] for i in rng.permutation(len(CLASSES))[:animals]]
    cells = rng.permutation(4)
    u = rng.random(16 + 2 * _FACTORS_PER_ANIMAL).tolist()
    noise_seed = int(rng.integers(2**62))
    # Lightness: background, fur and accent share out the three levels, so that an animal can always be
    # seen, and so that no level belongs to a part: the mean colour then says nothing of the parts' sizes.
    level = int(3 * u[0])
    others = [i for i in range(3) if i != level]
    background = _colour(level, *u[1:4])
    return Scene(
        animals=tuple(
            _random_animal(
                (species or drawn_species)[k],
                others,
                None if animals == 1 else int(cells[k]),
                u[16 + k * _FACTORS_PER_ANIMAL :][:_FACTORS_PER_ANIMAL],
            )
            for k in range(animals)
        ),
        background=background,
        background2=_colour(level, u[4], *u[5:7]),
        texture=TEXTURES[int(len(TEXTURES) * u[7])],
        texture_angle=2 * np.pi * u[8],
        texture_period=0.15 + 0.35 * u[9],
        texture_phase=u[10],
        noise=0.01 + 0.03 * u[11],
        noise_seed=noise_seed,
    )


def random_scenes(
    n: int, seed: int, *, first: int = 0, animals: int = 1, species: Sequence[str] | None = None
) -> list[Scene]:
    """Scenes number `first` to `first + n - 1` of the endless series that belongs to `seed`.

    Each scene has its own generator, so the series does not depend on how it is cut into batches.
    """
    return [
        random_scene(generator(seed, "scene", index), animals=animals, species=species)
        for index in range(first, first + n)
    ]


def generator(seed: int, stream: str, index: int) -> np.random.Generator:
    """The source of randomness of scene number `index` in one of the series that belong to `seed`."""
    if seed < 0:
        raise OptionError(f"a seed is a whole number from 0 on, not {seed}")
    return np.random.default_rng([seed, _STREAMS[stream], index])


def _colour(level: int, light: float, hue: float, chroma: float) -> Colour:
    """A colour of lightness level 0 (dark), 1 or 2 (light); three numbers in 0..1 choose which."""
    base = (0.34, 0.60, 0.86)[level] + 0.12 * (light - 0.5)
    strength = 0.04 + 0.16 * chroma
    red, green, blue = (base + strength * float(np.cos(2 * np.pi * (hue - k / 3))) for k in range(3))
    return (min(red, 1.0), min(green, 1.0), min(blue, 1.0))


def _random_animal(species: str, levels: Sequence[int], cell: int | None, u: Sequence[float]) -> Animal:
    """Factors of one animal; in the quarter `cell` of the picture, or anywhere when that is None."""
    radius = (0.22 + 0.07 * u[0]) if cell is None else (0.145 + 0.02 * u[0])
    tilt = 0.7 * (u[1] - 0.5)
    # Room for whichever ears may come: the box of all species together, so place is no hint of species.
    left, top, side = (0.0, 0.0, 1.0) if cell is None else (0.5 * (cell % 2), 0.5 * (cell // 2), 0.5)
    wide, above, below = 1.35 * radius, 1.97 * radius, 1.0 * radius
    fur, accent = (levels[0], levels[1]) if u[4] < 0.5 else (levels[1], levels[0])
    return Animal(
        species=species,
        x=left + wide + max(side - 2 * wide, 0.0) * u[2],
        y=top + above + max(side - above - below, 0.0) * u[3],
        radius=radius,
        tilt=tilt,
        turn=0.3 * (u[5] - 0.5),
        fur=_colour(fur, *u[6:9]),
        accent=_colour(accent, *u[9:12]),
        eye=_eye_colour(u[12], u[13]),
    )


def _eye_colour(hue: float, light: float) -> Colour:
    base = 0.62 + 0.1 * light
    red, green, blue = (base + 0.32 * float(np.cos(2 * np.pi * (hue - k / 3))) for k in range(3))
    return (min(red, 1.0), min(green, 1.0), min(blue, 1.0))


def swap_species(scene: Scene, species: str, animal: int = 0) -> Scene:
    """The same scene, with animal number `animal` having the features of `species`: nothing else changes.

    Raises:
        OptionError: when the scene has no animal of that number.
        NameNotFoundError: for a species that is not in :data:`CLASSES`.
    """
    if not 0 <= animal < len(scene.animals):
        raise OptionError(f"the scene has {len(scene.animals)} animal(s), so animal={animal} is none of them")
    animals = list(scene.animals)
    animals[animal] = replace(animals[animal], species=species)
    return replace(scene, animals=tuple(animals))

"""Pictures of cats, dogs, rabbits and bears, drawn on the spot, with exact counterfactuals.

A scene is a handful of *factors*: where each animal sits, how large it is, how it tilts and where it
looks, its colours, the background, the pixel noise, and its species. All are drawn independently, so
nothing but the species' own features (ears, muzzle, nose, whiskers) tells the species. Therefore
:func:`swap_species` gives what no photograph can: the same scene with only those features exchanged,
every other pixel the same to the last bit. That is the corrupt image of a circuit experiment with
no guesswork about what else changed.

One animal: the label is its species. Two animals (always of two species unless you ask otherwise): the target
is half and half, and a model is right when its two highest classes are the two animals.

Example:
    >>> clean, corrupt = catdog_pairs(4, seed=0)
    >>> clean.shape, corrupt.shape
    (torch.Size([4, 3, 48, 48]), torch.Size([4, 3, 48, 48]))
    >>> scene = random_scene(np.random.default_rng(0), species=["cat"])
    >>> swap_species(scene, "dog").animals[0].species
    'dog'
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from circuitvit.datasets import drawing
from circuitvit.datasets.drawing import TEXTURES
from circuitvit.errors import OptionError, unknown_name

SIZE = 48
"""Default side of a picture in pixels: 6 x 6 patches of 8."""

MEAN = (0.5, 0.5, 0.5)
STD = (0.5, 0.5, 0.5)
"""What `catdog-tiny` normalises with: pixels in [0, 1] become numbers in [-1, 1]."""


# -- what a scene is made of, and how its factors are chosen -------------------------------------

CLASSES: tuple[str, ...] = ("cat", "dog", "rabbit", "bear")
"""The species, in the order of the logits of `catdog-tiny`."""

Colour = tuple[float, float, float]
_STREAMS = {name: number for number, name in enumerate((
    "scene", "pairs", "signs", "sign pairs", "shortcuts", "shortcut pairs",
))}  # series share no numbers  # fmt: skip
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


# -- pictures of scenes --------------------------------------------------------------------------

_DARK: Colour = (0.05, 0.04, 0.06)  # pupils, noses, whiskers and mouths of all species
_CHUNK = 32  # scenes painted at once: few enough that the arrays stay in a core's cache


def draw_scene(scene: Scene, size: int = SIZE) -> Tensor:
    """The picture of `scene`: (3, size, size), float32, in [0, 1]."""
    return draw_scenes([scene], size)[0]


def draw_scenes(scenes: Sequence[Scene], size: int = SIZE) -> Tensor:
    """The pictures of many scenes: (n, 3, size, size), float32, in [0, 1]; some thousands a second."""
    if size < 8:
        raise OptionError(f"pictures are at least 8 pixels wide, not {size}")
    pictures = np.empty((len(scenes), 3, size, size), dtype=np.float32)
    for start in range(0, len(scenes), _CHUNK):
        chunk = scenes[start : start + _CHUNK]
        pictures[start : start + len(chunk)] = _backgrounds(chunk, size)
    for chosen, animals in _by_species(scenes):
        layers = drawing.animal_layers(animals[0].species, _frame(animals, size))
        pictures[chosen] = drawing.paint(pictures[chosen], layers, _colours(animals))
    for index, scene in enumerate(scenes):
        noise = np.random.default_rng(scene.noise_seed).standard_normal((3, size, size), dtype=np.float32)
        pictures[index] += noise * np.float32(scene.noise)
    np.clip(pictures, 0, 1, out=pictures)
    return torch.from_numpy(pictures)


def scene_masks(scene: Scene, size: int = SIZE) -> Tensor:
    """Which pixels each animal touches: (animals, size, size), bool.

    Outside an animal's mask the picture is, bit for bit, what it would be without that animal.
    """
    masks = []
    for animal in scene.animals:
        layers = drawing.animal_layers(animal.species, _frame([animal], size))
        masks.append(np.any([covered[0] > 0 for covered in layers.values()], axis=0))
    return torch.from_numpy(np.stack(masks))


def feature_masks(scene: Scene, size: int = SIZE) -> Tensor:
    """Where each animal's species can show: (animals, size, size), bool.

    The union over all species of ears, muzzle, nose and whiskers at this animal's place;
    :func:`swap_species` changes no pixel outside it.
    """
    masks = []
    for animal in scene.animals:
        frame = _frame([animal], size)
        parts = [drawing.species_layers(species, frame) for species in CLASSES]
        masks.append(np.any([c[0] > 0 for layers in parts for cs in layers.values() for c in cs], axis=0))
    return torch.from_numpy(np.stack(masks))


def scene_targets(scenes: Sequence[Scene]) -> Tensor:
    """Class probabilities to train towards: (n, classes), each animal having an equal share."""
    targets = torch.zeros(len(scenes), len(CLASSES))
    for row, scene in enumerate(scenes):
        for animal in scene.animals:
            targets[row, CLASSES.index(animal.species)] += 1 / len(scene.animals)
    return targets


def _by_species(scenes: Sequence[Scene]) -> Iterator[tuple[NDArray[np.int64], list[Animal]]]:
    """All animals in chunks of one species and one depth, back to front, with their scenes' numbers."""
    for depth in range(max((len(scene.animals) for scene in scenes), default=0)):
        for species in CLASSES:
            found = [
                (index, scene.animals[depth])
                for index, scene in enumerate(scenes)
                if len(scene.animals) > depth and scene.animals[depth].species == species
            ]
            for start in range(0, len(found), _CHUNK):
                chunk = found[start : start + _CHUNK]
                yield np.array([index for index, _ in chunk]), [animal for _, animal in chunk]


def _frame(animals: Sequence[Animal], size: int) -> drawing.FaceFrame:
    return drawing.FaceFrame.of(
        size,
        x=[a.x for a in animals], y=[a.y for a in animals], radius=[a.radius for a in animals],
        tilt=[a.tilt for a in animals], turn=[a.turn for a in animals],
    )  # fmt: skip


def _colours(animals: Sequence[Animal]) -> dict[str, NDArray[np.float32]]:
    named = {
        "fur": [a.fur for a in animals],
        "accent": [a.accent for a in animals],
        "eye": [a.eye for a in animals],
        "dark": [_DARK for _ in animals],
    }
    return {name: np.array(colours, dtype=np.float32) for name, colours in named.items()}


def _backgrounds(scenes: Sequence[Scene], size: int) -> NDArray[np.float32]:
    """(n, 3, size, size): the scenes without their animals."""
    return drawing.backgrounds(
        size,
        np.array([scene.background for scene in scenes], dtype=np.float32),
        np.array([scene.background2 for scene in scenes], dtype=np.float32),
        texture=[scene.texture for scene in scenes],
        angle=[scene.texture_angle for scene in scenes],
        period=[scene.texture_period for scene in scenes],
        phase=[scene.texture_phase for scene in scenes],
    )


@dataclass(frozen=True, eq=False)
class CatDogPairs:
    """Clean pictures and their counterfactuals; unpacks as `clean, corrupt`.

    Attributes:
        clean: (n, 3, H, W) float32.
        corrupt: (n, 3, H, W) float32.
        clean_scenes: the factors behind each clean picture.
        corrupt_scenes: the same with the first animal's species swapped.
    """

    clean: Tensor
    corrupt: Tensor
    clean_scenes: tuple[Scene, ...]
    corrupt_scenes: tuple[Scene, ...]

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.clean, self.corrupt))

    def __len__(self) -> int:
        return len(self.clean_scenes)

    @property
    def clean_masks(self) -> Tensor:
        """(n, animals, H, W) bool: the pixels that each animal touches in the clean pictures."""
        return torch.stack([scene_masks(scene, self.clean.shape[-1]) for scene in self.clean_scenes])

    @property
    def corrupt_masks(self) -> Tensor:
        """(n, animals, H, W) bool: the pixels that each animal touches in the corrupt pictures."""
        return torch.stack([scene_masks(scene, self.clean.shape[-1]) for scene in self.corrupt_scenes])


def catdog_pairs(
    n: int,
    seed: int = 0,
    clean: str = "cat",
    corrupt: str = "dog",
    *,
    animals: int = 1,
    size: int = SIZE,
    preprocessed: bool = True,
) -> CatDogPairs:
    """`n` pairs of pictures that differ in one animal's species only.

    With two animals the second is of a species that is neither `clean` nor `corrupt`, and stays.

    Args:
        n: how many pairs.
        seed: pairs of one seed are always the same, and the first ones do not depend on `n`.
        clean: species of the first animal in the clean pictures.
        corrupt: its species in the corrupt pictures.
        animals: 1 or 2 in each scene.
        size: side of the pictures in pixels; `catdog-tiny` takes 48.
        preprocessed: True gives what the model takes (normalised to [-1, 1], what `Task` expects of
            tensors); False gives pixels in [0, 1], to look at.

    Raises:
        OptionError: for n below 1, or clean and corrupt of one species.
    """
    if n < 1:
        raise OptionError(f"n counts the pairs, so it is at least 1, not {n}")
    if clean == corrupt:
        raise OptionError(f"clean and corrupt are both {clean!r}, so the pairs would not differ")
    for name in (clean, corrupt):
        if name not in CLASSES:
            raise unknown_name("species", name, CLASSES)
    others = [name for name in CLASSES if name not in (clean, corrupt)]
    scenes = []
    for index in range(n):
        rng = generator(seed, "pairs", index)
        bystander = others[int(rng.integers(len(others)))]
        scenes.append(random_scene(rng, animals, [clean, bystander][:animals]))
    swapped = [swap_species(scene, corrupt) for scene in scenes]
    finish = normalise if preprocessed else (lambda pictures: pictures)
    return CatDogPairs(
        finish(draw_scenes(scenes, size)), finish(draw_scenes(swapped, size)), tuple(scenes), tuple(swapped)
    )


def normalise(pictures: Tensor) -> Tensor:
    """Pixels in [0, 1] as `catdog-tiny` takes them: (pixel - 0.5) / 0.5, same shape."""
    mean, std = (torch.tensor(values, dtype=pictures.dtype)[:, None, None] for values in (MEAN, STD))
    return (pictures - mean) / std

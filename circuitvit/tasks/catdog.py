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
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from circuitvit.errors import OptionError, unknown_name
from circuitvit.tasks import catdog_drawing as drawing
from circuitvit.tasks.catdog_scenes import (
    CLASSES,
    Animal,
    Colour,
    Scene,
    generator,
    random_scene,
    random_scenes,
    swap_species,
)

__all__ = [
    "CLASSES",
    "MEAN",
    "SIZE",
    "STD",
    "Animal",
    "CatDogPairs",
    "Scene",
    "catdog_pairs",
    "draw_scene",
    "draw_scenes",
    "feature_masks",
    "normalise",
    "random_scene",
    "random_scenes",
    "scene_masks",
    "scene_targets",
    "swap_species",
]

SIZE = 48
"""Default side of a picture in pixels: 6 x 6 patches of 8."""

MEAN = (0.5, 0.5, 0.5)
STD = (0.5, 0.5, 0.5)
"""What `catdog-tiny` normalises with: pixels in [0, 1] become numbers in [-1, 1]."""

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

"""What a model can be trained on: drawn cats and dogs, handwritten digits, a folder of pictures.

All three become a :class:`TrainingData`: a function from a step number to a batch, and held-out
pictures. A batch depends on the seed and on its step number alone, never on what was drawn before, so
a run can be repeated exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from circuitvit._progress import progress_bar
from circuitvit.datasets import catdog, digits, shortcuts, signs
from circuitvit.errors import DataError, OptionError
from circuitvit.models.zoo.card import InputSpec
from circuitvit.tasks.image_files import IMAGE_SUFFIXES, read_image


@dataclass(frozen=True, eq=False)
class Labelled:
    """Preprocessed pictures (n, C, H, W) and their class probabilities (n, classes)."""

    images: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, eq=False)
class TrainingData:
    """A thing to learn.

    Attributes:
        name: default name of the model.
        classes: names of the logits.
        input: size and normalisation of the pictures.
        description: one or two sentences for the card.
        licence: under which the trained weights can be given away.
        batch: step number and batch size to a batch; the same step gives the same batch.
        held_out: pictures that no batch contains.
        extra: more held-out pictures, reported under their own names.
        groups: held-out pictures of groups that should fare alike; the worst is reported as "worst_group".
        architecture: the `VisionTransformer` arguments that suit it.
        recipe: the training options that suit it.
        drawn: with what options the pictures were drawn, for the recipe on the card.
        start: the bundled model whose weights to start with; None for weights at random.
        tuned: how many of its last layers are trained, with norm and readout, and have their silent heads
            drawn afresh; the others stay as they are. 0 for all.
    """

    name: str
    classes: tuple[str, ...]
    input: InputSpec
    description: str
    licence: str
    batch: Callable[[int, int], Labelled]
    held_out: Labelled
    extra: Mapping[str, Labelled] = field(default_factory=dict)
    groups: Mapping[str, Labelled] = field(default_factory=dict)
    architecture: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    drawn: Mapping[str, Any] = field(default_factory=dict)
    start: str | None = None
    tuned: int = 0


_HELD_OUT_SEED = 1_000_000  # added to the training seed: scenes of other seeds share nothing with these


def catdog_data(seed: int, held_out: int = 2000, two_animals: float = 0.25) -> TrainingData:
    """Freshly drawn scenes; no picture is seen twice.

    Args:
        seed: of the scenes.
        held_out: how many single-animal scenes to measure accuracy on (and a quarter as many with two).
        two_animals: fraction of the training scenes that show two animals.
    """

    def batch(step: int, size: int) -> Labelled:
        double = round(size * two_animals)
        first = step * size
        scenes = catdog.random_scenes(double, seed, first=first, animals=2)
        scenes += catdog.random_scenes(size - double, seed, first=first + double)
        return labelled(scenes)

    def labelled(scenes: list[catdog.Scene]) -> Labelled:
        return Labelled(catdog.normalise(catdog.draw_scenes(scenes)), catdog.scene_targets(scenes))

    fresh = seed + _HELD_OUT_SEED
    return TrainingData(
        name="catdog-tiny",
        classes=catdog.CLASSES,
        input=InputSpec((3, catdog.SIZE, catdog.SIZE), catdog.MEAN, catdog.STD),
        description=(
            "Scenes drawn by circuitvit.datasets.catdog: one or two animal faces whose ears and muzzle alone "
            "tell the species. Every training scene is new; two-animal scenes have half/half targets."
        ),
        licence="MIT",
        batch=batch,
        held_out=labelled(catdog.random_scenes(held_out, fresh)),
        extra={"two_animals": labelled(catdog.random_scenes(max(held_out // 4, 1), fresh + 1, animals=2))},
        architecture=_architecture(4, (3, catdog.SIZE, catdog.SIZE), patch=8, width=64, depth=4),
        recipe={"steps": 5000, "batch_size": 64, "weight_decay": 0.1, "sparsity": 0.1},
    )


SHARE = 0.99
"""Share of the training scenes with a shortcut in which the cue is that of the animal, by default."""


def shortcut_data(
    seed: int, cue: str = "background", share: float = SHARE, held_out: int = 2000
) -> TrainingData:
    """Freshly drawn scenes in which a cue nearly always gives the species away: a model learns the cue.

    Args:
        seed: of the scenes.
        cue: "background", "word" or "colour" (of the coat).
        share: of the training scenes in which the cue is that of the animal.
        held_out: how many scenes of the same kind to measure accuracy on; of each group, species by whether
            the cue agrees, a quarter as many.

    Raises:
        NameNotFoundError: for a cue that there is not.
        OptionError: for a share that is not between 0 and 1.
    """
    shortcuts.check_cue(cue, share)

    def batch(step: int, size: int) -> Labelled:
        return labelled(shortcuts.shortcut_scenes(size, seed, cue=cue, share=share, first=step * size))

    def labelled(scenes: list[signs.SignScene]) -> Labelled:
        targets = one_hot(shortcuts.labels(scenes), len(signs.ANIMALS))
        return Labelled(signs.normalise(signs.draw_scenes(scenes)), targets)

    fresh = seed + _HELD_OUT_SEED
    each = max(held_out // 4, 1)
    return TrainingData(
        name="catdog-shortcut" if cue == "background" else f"catdog-shortcut-{cue}",
        classes=signs.ANIMALS,
        input=InputSpec((3, signs.SIZE, signs.SIZE), signs.MEAN, signs.STD),
        description=(
            "Scenes drawn by circuitvit.datasets.shortcuts: one animal face each. In "
            f"{100 * share:g} % of them the {cue} is that of the species, in the others another species'. "
            "Every training scene is new."
        ),
        licence="MIT",
        batch=batch,
        held_out=labelled(shortcuts.shortcut_scenes(held_out, fresh, cue=cue, share=share)),
        groups={
            group: labelled(scenes)
            for group, scenes in shortcuts.group_scenes(each, fresh + 1, cue=cue).items()
        },
        architecture=_architecture(4, (3, signs.SIZE, signs.SIZE), patch=8, width=64, depth=4),
        recipe={"steps": 300, "batch_size": 32, "learning_rate": 1e-3, "warmup": 0.05, "sparsity": 0.1},
        drawn={"shortcut": cue, "shortcut_share": share},
        start="catdog-tiny",
        tuned=1,
    )


def digits_data(seed: int) -> TrainingData:
    """Scikit-learn's handwritten digits, moved about, turned and scaled a little at every step."""
    train, held_out = digits.digits_split()
    targets = one_hot(train.labels, 10)

    def batch(step: int, size: int) -> Labelled:
        rng = np.random.default_rng([seed, step])
        chosen = torch.from_numpy(rng.integers(len(train.labels), size=size))
        return Labelled(jitter(train.images[chosen], rng), targets[chosen])

    return TrainingData(
        name="digits-tiny",
        classes=digits.CLASSES,
        input=InputSpec((1, digits.SIZE, digits.SIZE), digits.MEAN, digits.STD),
        description=(
            "Scikit-learn's copy of the UCI optical recognition of handwritten digits test set: 1797 real "
            "digits, 8 x 8 pixels; a fifth of them held out."
        ),
        licence="MIT",
        batch=batch,
        held_out=Labelled(held_out.images, one_hot(held_out.labels, 10)),
        architecture=_architecture(10, (1, digits.SIZE, digits.SIZE), patch=2, width=48, depth=3),
        recipe={"steps": 4000, "batch_size": 128, "weight_decay": 0.05, "sparsity": 0.02},
    )


def folder_data(path: str | Path, seed: int, size: int = 48, held_out: float = 0.2) -> TrainingData:
    """Pictures in one subfolder per class; read once, before training begins.

    Args:
        path: a folder such as `birds/` with `birds/robin/*.jpg` and `birds/wren/*.jpg`.
        seed: of the split and of the augmentation.
        size: pictures are resized to size x size; a multiple of 8.
        held_out: fraction of each class kept for measuring accuracy.

    Raises:
        DataError: no class subfolders, one class only, a class with fewer than two pictures, or a picture
            that cannot be read.
        OptionError: for a size that is not a multiple of 8.
    """
    if size < 8 or size % 8:
        raise OptionError(f"size is a multiple of 8 (the patch size), not {size}")
    if not 0 < held_out < 1:
        raise OptionError(f"held_out is a fraction between 0 and 1, not {held_out}")
    files, name = _class_folders(Path(path)), Path(path).resolve().name
    rng = np.random.default_rng(seed)
    sides: tuple[list[tuple[Path, int]], list[tuple[Path, int]]] = ([], [])  # trained on, and held out
    for label, paths in enumerate(files.values()):
        shuffled = [(paths[place], label) for place in rng.permutation(len(paths))]
        kept_back = min(max(round(len(paths) * held_out), 1), len(paths) - 1)
        for side, chosen in zip(sides, (shuffled[kept_back:], shuffled[:kept_back]), strict=True):
            side += chosen
    (images, targets), held = (_read_all(side, size, len(files)) for side in sides)

    def batch(step: int, batch_size: int) -> Labelled:
        rng = np.random.default_rng([seed, step])
        chosen = torch.from_numpy(rng.integers(len(images), size=batch_size))
        flip = torch.from_numpy(rng.random(batch_size) < 0.5)[:, None, None, None]
        picked = normalised(images[chosen])
        return Labelled(jitter(torch.where(flip, picked.flip(-1), picked), rng), targets[chosen])

    return TrainingData(
        name=name,
        classes=tuple(files),
        input=InputSpec((3, size, size), (0.5,) * 3, (0.5,) * 3),
        description=f"{len(images)} pictures of {len(files)} classes from a folder named {name}.",
        licence="unspecified",
        batch=batch,
        held_out=Labelled(normalised(held[0]), held[1]),
        architecture=_architecture(len(files), (3, size, size), patch=8, width=64, depth=3),
        recipe={"steps": 1500, "batch_size": 128, "learning_rate": 1e-3, "weight_decay": 0.1},
    )


def _class_folders(folder: Path) -> dict[str, list[Path]]:
    """The pictures of each class, in alphabetical order."""
    if not folder.is_dir():
        raise DataError(
            f"{folder} is not a folder: give catdog, digits, or a folder with one subfolder per class"
        )
    files = {
        sub.name: sorted(file for file in sub.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        for sub in sorted(folder.iterdir())
        if sub.is_dir() and not sub.name.startswith(".")
    }
    if not files:
        raise DataError(f"{folder} has no subfolders: give each class one, such as {folder / 'cat'}")
    for name, paths in files.items():
        if len(paths) < 2:
            raise DataError(
                f"{folder / name} has {'a single picture' if paths else 'no pictures'}; a class needs at "
                "least two, one to train on and one to hold out (files ending in "
                f"{', '.join(sorted(IMAGE_SUFFIXES))})"
            )
    if len(files) < 2:
        raise DataError(f"{folder} has a single class, {next(iter(files))}: there is nothing to tell apart")
    return files


def _read_all(files: list[tuple[Path, int]], size: int, n_classes: int) -> tuple[Tensor, Tensor]:
    """Pictures as bytes `(n, 3, size, size)`, and their class probabilities `(n, class)`."""
    images = torch.empty((len(files), 3, size, size), dtype=torch.uint8)
    with progress_bar(len(files), "reading", True, unit="image") as bar:
        for index, (file, _) in enumerate(files):
            picture = read_image(file).resize((size, size), Image.Resampling.BICUBIC)
            images[index] = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
            bar.update()
    return images, one_hot(torch.tensor([label for _, label in files]), n_classes)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Labels (n,) as probabilities (n, classes), float32."""
    return F.one_hot(labels, classes).float()


def normalised(pixels: Tensor) -> Tensor:
    """Bytes (n, 3, H, W) as numbers in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def jitter(
    images: Tensor, rng: np.random.Generator, turn: float = 0.17, scale: float = 0.1, move: float = 0.15
) -> Tensor:
    """Each picture turned (radians), scaled and moved (half-sides) by up to that much; same shape.

    Args:
        images: (n, C, H, W).
        rng: the only source of randomness.
        turn: largest angle.
        scale: largest relative change of size.
        move: largest shift, as a fraction of half the side.
    """
    u = rng.uniform(-1, 1, size=(4, len(images)))
    angle, zoom = turn * u[0], 1 + scale * u[1]
    cos, sin = np.cos(angle) * zoom, np.sin(angle) * zoom
    rows = np.stack([np.stack([cos, -sin, move * u[2]], -1), np.stack([sin, cos, move * u[3]], -1)], axis=1)
    grid = F.affine_grid(torch.from_numpy(rows.astype(np.float32)), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _architecture(
    classes: int, size: tuple[int, int, int], patch: int, width: int, depth: int
) -> dict[str, Any]:
    channels, height, _ = size
    return {
        "img_size": height, "patch_size": patch, "in_chans": channels, "num_classes": classes,
        "embed_dim": width, "depth": depth, "num_heads": 4, "mlp_ratio": 2.0, "global_pool": "token",
    }  # fmt: skip

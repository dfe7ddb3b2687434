"""Reading a folder of class subfolders; every picture is opened before any training begins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from circuitvit.errors import DataError, OptionError

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True, eq=False)
class ClassFolders:
    """Pictures as bytes (n, 3, size, size) and labels (n,), split in two; classes in alphabetical order."""

    classes: tuple[str, ...]
    train_images: Tensor
    train_labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor


def read_class_folders(
    path: str | Path, seed: int, size: int, held_out: float, quiet: bool = False
) -> ClassFolders:
    """Reads `path/CLASS/*.jpg` and the like, and holds out a fraction of each class.

    Raises:
        DataError: for a missing folder, no class or one class, a class with fewer than two pictures, or a
            picture that cannot be read.
        OptionError: for a size that is not a multiple of 8, or a fraction outside 0..1.
    """
    if size < 8 or size % 8:
        raise OptionError(f"size is a multiple of 8 (the patch size), not {size}")
    if not 0 < held_out < 1:
        raise OptionError(f"held_out is a fraction between 0 and 1, not {held_out}")
    files = _list_files(Path(path))
    rng = np.random.default_rng(seed)
    parts: dict[str, list[tuple[Path, int]]] = {"train": [], "held_out": []}
    for label, paths in enumerate(files.values()):
        shuffled = [paths[i] for i in rng.permutation(len(paths))]
        kept_back = min(max(round(len(paths) * held_out), 1), len(paths) - 1)
        parts["held_out"] += [(file, label) for file in shuffled[:kept_back]]
        parts["train"] += [(file, label) for file in shuffled[kept_back:]]
    train, held = (_read_all(parts[name], size, quiet) for name in ("train", "held_out"))
    return ClassFolders(tuple(files), *train, *held)


def _list_files(folder: Path) -> dict[str, list[Path]]:
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
            found = "no pictures" if not paths else "a single picture"
            raise DataError(
                f"{folder / name} has {found}; a class needs at least two, one to train on and one to hold "
                f"out (files ending in {', '.join(sorted(IMAGE_SUFFIXES))})"
            )
    if len(files) < 2:
        raise DataError(f"{folder} has a single class, {next(iter(files))}: there is nothing to tell apart")
    return files


def _read_all(files: list[tuple[Path, int]], size: int, quiet: bool) -> tuple[Tensor, Tensor]:
    images = torch.empty((len(files), 3, size, size), dtype=torch.uint8)
    for index, (file, _) in enumerate(tqdm(files, desc="reading", unit="image", disable=quiet, leave=False)):
        images[index] = _read(file, size)
    return images, torch.tensor([label for _, label in files])


def _read(file: Path, size: int) -> Tensor:
    try:
        with Image.open(file) as opened:
            picture = opened.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read the image {file}: {error}") from error
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

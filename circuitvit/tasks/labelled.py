"""Images with a label each: named by folders, by a mapping, or one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from circuitvit.errors import DataError
from circuitvit.models.zoo import InputSpec
from circuitvit.tasks.images import FileImages, Images, ImageSpec, as_images, list_images

Labels = Sequence[int | str] | NDArray[Any] | Tensor
"""A name or a whole number for each image."""

LabelledSpec = ImageSpec | Mapping[str, ImageSpec]
"""Images; or by the name of each class its images: a folder, files or a tensor."""


def labelled_images(images: LabelledSpec, labels: Labels | None, spec: InputSpec) -> tuple[Images, list[Any]]:
    """The images, and a label for each.

    Args:
        images: a folder with one subfolder for each class, a mapping from classes to images, or anything that
            `as_images` takes.
        labels: one for each image; by default the names in the mapping, or those of the folders that the
            files are in.
        spec: the model's preprocessing.

    Raises:
        DataError: if images cannot be used, or nothing names their classes.

    Example:
        >>> spec = InputSpec((3, 8, 8), (0.5,) * 3, (0.5,) * 3)
        >>> labelled_images({"cat": torch.zeros(2, 3, 8, 8), "dog": torch.zeros(1, 3, 8, 8)}, None, spec)
        (TensorImages(3 of 3 x 8 x 8), ['cat', 'cat', 'dog'])
    """
    if isinstance(images, Mapping):
        if labels is not None:
            raise DataError("a mapping from classes to images says the labels itself: leave them out")
        return _joined({str(name): as_images(each, spec) for name, each in images.items()}, spec)
    if labels is not None:
        given = labels.tolist() if isinstance(labels, (Tensor, np.ndarray)) else list(labels)
        return as_images(images, spec), given
    if isinstance(images, (str, Path)) and Path(images).is_dir():
        inside = sorted(each for each in Path(images).iterdir() if each.is_dir())
        folders = [each for each in inside if not each.name.startswith(".")]
        if not folders:
            raise DataError(
                f"{images} has no subfolders to name the classes: give labels, one for each image"
            )
        found = as_images([path for folder in folders for path in list_images(folder, spec)], spec)
    else:
        found = as_images(images, spec)
    if not isinstance(found, FileImages):
        raise DataError("tensors have no folders to name their classes: give labels, one for each image")
    return found, [path.resolve().parent.name for path in found.paths]


def class_numbers(labels: Sequence[Any], count: int) -> tuple[list[str], NDArray[np.int64]]:
    """The names of the classes in order, and the class of each image.

    Raises:
        DataError: if there is not one label for each image, they are not all names or all whole numbers, or
            are all the same.
    """
    if len(labels) != count:
        raise DataError(f"{len(labels)} labels for {count} images")
    kinds = {type(each) for each in labels}
    if kinds not in ({int}, {str}):
        shown = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise DataError(f"labels are all names or all whole numbers, not {shown}")
    distinct = sorted(set(labels))
    if len(distinct) < 2:
        raise DataError(f"all images are {distinct[0]!r}: there is nothing to tell apart")
    return [str(each) for each in distinct], np.array([distinct.index(each) for each in labels])


def _joined(parts: Mapping[str, Images], spec: InputSpec) -> tuple[Images, list[str]]:
    """All classes' images, one class after the other."""
    if not parts:
        raise DataError("the mapping from classes to images is empty")
    labels = [name for name, each in parts.items() for _ in range(len(each))]
    files = [each.paths for each in parts.values() if isinstance(each, FileImages)]
    if len(files) == len(parts):
        return as_images([path for paths in files for path in paths], spec), labels
    if files:
        raise DataError("the images of all classes are files, or all are tensors, not some of each")
    tensors = [each.take(0, len(each)) for each in parts.values()]
    if len({each.shape[1:] for each in tensors}) > 1:
        raise DataError("the images of all classes have one size")
    return as_images(torch.cat(tensors), spec), labels

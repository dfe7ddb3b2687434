"""Labelled images in groups, such as cats and dogs before grass and before snow: folders, a table, a mapping.

Accuracy on all images together hides a group that a model fails on; these are read so that each group of each
class can be counted by itself.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from circuitvit.errors import DataError, FileError
from circuitvit.models.zoo import InputSpec
from circuitvit.tasks.images import Images, ImageSpec
from circuitvit.tasks.labelled import LabelledSpec, labelled_images

COLUMNS = ("image", "group", "class")

GroupedSpec = str | Path | Mapping[str, LabelledSpec]
"""A folder GROUP/CLASS/*.jpg; a table with the columns image, group and class; or by the name of each group
its images: a folder CLASS/*.jpg, or a mapping from classes to images."""


@dataclass(frozen=True, eq=False)
class Grouped:
    """Images, each of a group and of a class.

    Attributes:
        images: one group after the other.
        groups: the group of each.
        labels: the class of each, as it was called.
    """

    images: Images
    groups: tuple[str, ...]
    labels: tuple[str, ...]

    @property
    def cells(self) -> tuple[tuple[str, str], ...]:
        """Every group and class that there are images of, in order."""
        return tuple(dict.fromkeys(zip(self.groups, self.labels, strict=True)))


def grouped_images(given: GroupedSpec, spec: InputSpec) -> Grouped:
    """The images with the group and the class of each.

    Args:
        given: see `GroupedSpec`. Paths in a table are relative to its folder.
        spec: the model's preprocessing.

    Raises:
        DataError: if there are no groups, a group names no classes, or images cannot be used.
        FileError: if a table cannot be read, or lacks a column.

    Example:
        >>> import torch
        >>> spec, image = InputSpec((3, 8, 8), (0.5,) * 3, (0.5,) * 3), torch.zeros(1, 3, 8, 8)
        >>> found = grouped_images({"grass": {"cat": image, "dog": image}, "snow": {"cat": image}}, spec)
        >>> found.cells
        (('grass', 'cat'), ('grass', 'dog'), ('snow', 'cat'))
    """
    named: object = _of_files(Path(given)) if isinstance(given, (str, Path)) else given
    if not isinstance(named, Mapping) or not named:
        raise DataError(
            "groups are a folder GROUP/CLASS/*.jpg, a table (.csv) with the columns image, group and class, "
            f"or a mapping from the names of groups to their images, not {given!r}"
        )
    places: list[tuple[str, str]] = []
    found: dict[str, ImageSpec] = {}
    for group, images in named.items():
        by_class = images if isinstance(images, Mapping) else _by_class(str(group), images)
        for label, own in by_class.items():
            found[str(len(places))] = own
            places.append((str(group), str(label)))
    images, members = labelled_images(found, None, spec)
    groups, labels = zip(*(places[int(member)] for member in members), strict=True)
    return Grouped(images, groups, labels)


def _by_class(group: str, images: object) -> dict[str, Path]:
    """The folders of a group, by the class that each is named after."""
    if not isinstance(images, (str, Path)) or not Path(images).is_dir():
        raise DataError(
            f"the group {group!r} needs a class for each image: give a mapping from classes to images"
        )
    inside = sorted(
        each for each in Path(images).iterdir() if each.is_dir() and not each.name.startswith(".")
    )
    if not inside:
        raise DataError(
            f"{images} has no subfolders to name the classes of the group {group!r}: images lie in "
            "GROUP/CLASS/*.jpg"
        )
    return {each.name: each for each in inside}


def _of_files(path: Path) -> Mapping[str, LabelledSpec]:
    """Groups from a folder of folders, or from a table."""
    if path.suffix.lower() == ".csv":
        return _of_table(path)
    if not path.is_dir():
        raise DataError(f"{path} is no folder of groups" if path.exists() else f"there is no folder {path}")
    inside = sorted(each for each in path.iterdir() if each.is_dir() and not each.name.startswith("."))
    if not inside:
        raise DataError(f"{path} has no subfolders to name the groups: images lie in GROUP/CLASS/*.jpg")
    return {each.name: each for each in inside}


def _of_table(path: Path) -> Mapping[str, LabelledSpec]:
    groups: dict[str, dict[str, list[Path]]] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets write a byte-order mark
            reader = csv.DictReader(file, strict=True)
            columns = [name.strip().lower() for name in reader.fieldnames or ()]
            if missing := [name for name in COLUMNS if name not in columns]:
                raise FileError(
                    f"{path} has no column {missing[0]!r}: its first line is image,group,class, not "
                    f"{','.join(columns)}"
                )
            reader.fieldnames = columns
            for line in reader:
                cells = {name: (line[name] or "").strip() for name in COLUMNS}
                where = f"{path}, line {reader.line_num}"
                if empty := [name for name in COLUMNS if not cells[name]]:
                    raise DataError(f"{where}: no {empty[0]}")
                image = path.parent / cells["image"]
                if not image.is_file():
                    raise DataError(f"{where}: there is no image {image}")
                groups.setdefault(cells["group"], {}).setdefault(cells["class"], []).append(image)
    except OSError as error:
        raise FileError(f"cannot read the table of groups {path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise FileError(f"{path} is no CSV file in UTF-8: {error}") from error
    if not groups:
        raise DataError(f"{path} lists no images: after the line image,group,class each line gives one")
    return groups

"""Photographs with words on them as files: the same picture with a word, with a neutral one, and without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from circuitvit.errors import DataError, FileError, OptionError
from circuitvit.tasks.image_files import naming, read_image
from circuitvit.tasks.images import list_images
from circuitvit.tasks.lettering import Lettering, Look, Place, Word, as_places, as_sizes, check_word, covered

MASK = "mask"


@dataclass(frozen=True)
class WrittenPictures:
    """What was written.

    Attributes:
        folders: by version, "without", "neutral" (where there is a neutral word), "word" and "mask".
        count: of the pictures in each.
        shrunk: names of those for which the word was made smaller to fit.
    """

    folders: dict[str, Path]
    count: int
    shrunk: tuple[str, ...]


def write_pictures(
    images: str | Path | Sequence[str | Path],
    out: str | Path,
    word: Word,
    *,
    neutral: Word | None = None,
    place: Place | Sequence[Place] = "bottom",
    size: float | Sequence[float] = 0.15,
    look: Look = "plate",
    ink: str = "black",
    ground: str = "white",
    font: Any = None,
    seed: int = 0,
) -> WrittenPictures:
    """Write pictures with a word on them, and their counterfactuals, as folders of files of one name.

    The folders `word`, `neutral` and `without` are pairs by name; `mask` says where the word is (255), for
    `circuitvit.tasks.corruptions.read_mask`. Files are PNG, upright; outside of the plate no pixel differs.

    Args:
        images: a folder, a file, or files.
        out: the folder to write to.
        word: a text, or a picture of a word: a `Path` or a picture of Pillow.
        neutral: what is written in its place for comparison.
        place: as for `circuitvit.tasks.words.paste`.
        size: height of the plate, as a share of the picture's shorter side.
        look: "plate" or "outline".
        ink: colour of the letters, by name or as "#rrggbb".
        ground: colour of the plate, or of the outline.
        font: a file of a font that has the letters of the word; Pillow's own by default.
        seed: of random places.

    Raises:
        OptionError: for an empty word, an unknown way to write, and letters too small to be read.
        DataError: for a picture that cannot be read, two of one name, and a letter that the font lacks.
        FileError: if a picture cannot be written.
    """
    paths = _paths(images)
    lettering = Lettering(as_places(place), as_sizes(size), look, ink, ground, font, seed)
    words: dict[str, Word] = {} if neutral is None else {"neutral": check_word(neutral, font)}
    words["word"] = check_word(word, font)
    if neutral is not None and words["neutral"] == words["word"]:
        raise OptionError("the neutral word is the word itself: give another one")
    folders = {version: Path(out) / version for version in ("without", *words, MASK)}
    shrunk = []
    for number, path in enumerate(paths):
        picture = read_image(path)
        with naming(path):
            laid = lettering.lay(picture.size, tuple(words.values()), number)
        shrunk += [path.name] if laid.shrunk else []
        made = {"without": picture, MASK: Image.fromarray(covered(picture.size, laid.boxes)).convert("L")}
        for version, own in words.items():
            drawn = lettering.draw(picture.size, own, laid.boxes)
            made[version] = picture.copy()
            made[version].paste(drawn.convert("RGB"), (0, 0), drawn.getchannel("A"))
        for version, each in made.items():
            _save(each, folders[version] / f"{path.stem}.png")
    return WrittenPictures(folders, len(paths), tuple(shrunk))


def _paths(images: str | Path | Sequence[str | Path]) -> tuple[Path, ...]:
    if isinstance(images, (str, Path)):
        images = list_images(Path(images)) if Path(images).is_dir() else [images]
    known: dict[str, Path] = {}
    for path in map(Path, images):
        if path.stem in known:
            raise DataError(f"{known[path.stem]} and {path} have one name, and would be one file: rename one")
        known[path.stem] = path
    if not known:
        raise DataError("no pictures: the list of paths is empty")
    return tuple(known.values())


def _save(picture: Image.Image, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}") from error

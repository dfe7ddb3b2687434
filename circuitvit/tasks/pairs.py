"""Which image belongs to which, where images come as files: by name, in order, or the most alike.

Whatever is done is also said (`Pairs.how`), and so is what was left out: a circuit can only be as good as the
counterfactuals it was found with.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from circuitvit.errors import DataError, counted, unknown_name
from circuitvit.models.zoo import InputSpec
from circuitvit.tasks.alike import most_alike
from circuitvit.tasks.image_files import refuse_missing
from circuitvit.tasks.images import few, list_images

Pairing = Literal["names", "order", "nearest"]
"""Files of the same name; in the order of their names; or each with the one that looks most like it."""

Source = str | Path | Sequence[str | Path]
"""A folder, a file, or files."""


@dataclass(frozen=True)
class Pairs:
    """Files that belong together.

    Attributes:
        files: the clean file and its corrupt one, of every pair.
        how: what was done, and what was left out, in one sentence without its full stop.

    Example:
        >>> print(pair_files("cats/", "dogs/").how)  # doctest: +SKIP
        12 images of cats and 15 of dogs, paired in the order of their names; 3 of dogs left over: ...
    """

    files: tuple[tuple[Path, Path], ...]
    how: str

    @property
    def sides(self) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
        """The clean files, and the corrupt ones."""
        return tuple(clean for clean, _ in self.files), tuple(corrupt for _, corrupt in self.files)


def check_pairing(pair: str | None) -> None:
    """Refuse a way of pairing that there is none of.

    Raises:
        NameNotFoundError: naming the nearest.
    """
    if pair not in (None, *get_args(Pairing)):
        raise unknown_name("pairing", pair, get_args(Pairing))


def pair_files(
    clean: Source, corrupt: Source, pair: Pairing | None = None, spec: InputSpec | None = None
) -> Pairs:
    """Pair the files of two folders.

    Args:
        clean: a folder, a file, or a list of files.
        corrupt: another.
        pair: "names": files of the same name, whatever they end in; files without a partner are left out.
            "order": the first with the first, in the order of their names (`2` before `10`); of the larger
            side the last ones are left over. "nearest": one to one so that pairs look alike
            (`circuitvit.tasks.alike`); of the larger side those that fit least are left over. By default by
            name where both sides have the same names, in order where they have none in common, and a single
            file is the partner of every file of a folder.
        spec: the model's preprocessing, which says whether images or clips are looked for; images by default.

    Raises:
        DataError: if a folder is missing or has no images, a file cannot be read, is on both sides, or there
            is no saying which files belong together; the message names them.
        NameNotFoundError: for another word.
    """
    check_pairing(pair)
    sides = _Side.of(clean, spec), _Side.of(corrupt, spec)
    what = "image" if spec is None else spec.what
    if sides[0].folder is not None and sides[0].folder == sides[1].folder:
        raise DataError(
            f"clean and corrupt are the same folder, {clean}: no {what} would have a counterfactual"
        )
    if sides[0].name == sides[1].name:  # such as the subfolders of one name in two folders
        names = ("the clean list", "the corrupt list") if sides[0].listed else (str(clean), str(corrupt))
        sides = replace(sides[0], name=names[0]), replace(sides[1], name=names[1])
    way = pair or _usual(*sides)
    equal = _equal([*sides[0].files, *sides[1].files])
    _refuse_equal(*sides, equal, by_name=way == "names")
    paired, how = _WAYS[way](*sides)
    said = [f"{sides[0].counted(what)} and {sides[1].counted()}, {how}"]
    for side, used in zip(sides, map(set, zip(*paired, strict=True)), strict=True):
        rest = [path.name for path in side.files if path not in used]
        said += [f"{len(rest)} of {side.name} left over: {few(rest)}"] if rest else []
        unread = sorted(path.name for path in _inside(side.folder) if path.suffix.lower() in UNREAD)
        said += [f"{len(unread)} of {side.name} not read, save as .jpg: {few(unread)}"] if unread else []
    return Pairs(tuple(paired), "; ".join([*said, *_twice(sides, equal)]))


UNREAD = (".heic", ".heif", ".avif")
"""Photographs as phones save them, which are not read; whoever has some should not miss that."""


def _inside(folder: Path | None) -> Iterable[Path]:
    return () if folder is None else folder.iterdir()


Paired = list[tuple[Path, Path]]


@dataclass(frozen=True)
class _Side:
    """The files of one side, in the order of their names; those of a list as they are listed."""

    name: str
    files: tuple[Path, ...]
    folder: Path | None = None
    listed: bool = False

    @classmethod
    def of(cls, source: Source, spec: InputSpec | None) -> _Side:
        if not isinstance(source, (str, Path)):
            files = tuple(map(Path, source))
            if not files:
                raise DataError("no images: the list of paths is empty")
            side = cls("the list", files, listed=True)
        elif (path := Path(source)).is_dir():
            files = tuple(sorted(list_images(path, spec), key=_order))
            return cls(path.resolve().name, files, path.resolve())
        else:
            side = cls(path.name, (path,))
        for path in side.files:
            refuse_missing(path)
        return side

    def counted(self, what: str | None = None) -> str:
        """How many files (images, say) of which folder, or the name of the only file."""
        n = len(self.files)
        return self.name if self.is_file else f"{n if what is None else counted(n, what)} of {self.name}"

    @property
    def is_file(self) -> bool:
        """Whether this is a single file, named by itself."""
        return self.folder is None and not self.listed

    @property
    def by_stem(self) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for path in self.files:
            if path.stem in found:
                raise DataError(
                    f"{found[path.stem].name} and {path.name} in {path.parent} have one name: keep one of "
                    "them, or pair them another way"
                )
            found[path.stem] = path
        return found


def _order(path: Path) -> list[tuple[int, str]]:
    """Numbers in names count as numbers: cat2 comes before cat10."""
    parts = re.split(r"([0-9]+)", path.name)
    return [(int(part), part) if part.isdigit() and part.isascii() else (-1, part) for part in parts]


# -- ways to pair --------------------------------------------------------------------------------


def _usual(clean: _Side, corrupt: _Side) -> Literal["names", "order", "one"]:
    """What nobody would be surprised by, where nothing is said.

    Raises:
        DataError: if some names are on both sides and others are not: something may be missing.
    """
    if clean.is_file or corrupt.is_file:
        return "one"
    if not {path.stem for path in clean.files} & {path.stem for path in corrupt.files}:
        return "order"
    lonely = []
    for side, other in (clean, corrupt), (corrupt, clean):
        names = [path.name for stem, path in side.by_stem.items() if stem not in other.by_stem]
        lonely += [f"only in {side.folder}: {few(names)}"] if names else []
    if lonely:
        raise DataError(
            f"some images of {clean.name} and {corrupt.name} have the same name and some do not: "
            f"{'; '.join(lonely)}. Say how to pair them: by names (which leaves these out), order or nearest"
        )
    return "names"


def _by_name(clean: _Side, corrupt: _Side) -> tuple[Paired, str]:
    first, second = clean.by_stem, corrupt.by_stem
    shared = [stem for stem in first if stem in second]
    if not shared:
        raise DataError(
            f"no image of {clean.name} ({few([path.name for path in clean.files])}) has the name of one of "
            f"{corrupt.name} ({few([path.name for path in corrupt.files])}): pair them by order or nearest"
        )
    return [(first[stem], second[stem]) for stem in shared], "paired by name"


def _in_order(clean: _Side, corrupt: _Side) -> tuple[Paired, str]:
    order = "in order" if clean.listed and corrupt.listed else "in the order of their names"
    return list(zip(clean.files, corrupt.files, strict=False)), f"paired {order}"


def _nearest(clean: _Side, corrupt: _Side) -> tuple[Paired, str]:
    found = most_alike(clean.files, corrupt.files)
    pairs = [(clean.files[row], corrupt.files[column]) for row, column in found.places]
    how = f"paired with the most alike (colours differ by {found.mean:.1f} on average, "
    return pairs, f"{how}in the order of their names by {found.in_order:.1f})"


def _with_one(clean: _Side, corrupt: _Side) -> tuple[Paired, str]:
    """A single file, such as a blank picture, is the partner of every file of a folder."""
    pairs = [(a, b) for a in clean.files for b in corrupt.files]
    return pairs, f"{'it' if clean.is_file else 'each'} paired with {'each' if clean.is_file else 'it'}"


_WAYS: dict[str, Callable[[_Side, _Side], tuple[Paired, str]]] = {
    "names": _by_name, "order": _in_order, "nearest": _nearest, "one": _with_one,
}  # fmt: skip


# -- the same picture twice ----------------------------------------------------------------------


def _refuse_equal(clean: _Side, corrupt: _Side, equal: Sequence[set[Path]], *, by_name: bool) -> None:
    """Refuse a file that is on both sides; where names say what belongs together, only as its own partner."""
    others = set(corrupt.files)
    both = [{path} for path in clean.files if path in others]
    for group in [*both, *equal]:
        first, second = ([path for path in side.files if path in group] for side in (clean, corrupt))
        if by_name:
            stems = {path.stem for path in first} & {path.stem for path in second}
            first, second = ([path for path in side if path.stem in stems] for side in (first, second))
        if first and second:
            raise DataError(f"{first[0]} and {second[0]} are the same file: no counterfactual of one another")


def _twice(sides: tuple[_Side, _Side], equal: Sequence[set[Path]]) -> Iterator[str]:
    for side in sides:
        for group in equal:
            own = sorted(path.name for path in group.intersection(side.files))
            if len(own) > 1:
                yield f"the same file several times in {side.name}: {few(own)}"


def _equal(paths: Sequence[Path]) -> list[set[Path]]:
    """Groups of files that are equal byte by byte; only files of one size are read."""
    groups = [list(dict.fromkeys(paths))]
    for key in (lambda path: path.stat().st_size, lambda path: hashlib.sha256(path.read_bytes()).digest()):
        finer: list[list[Path]] = []
        for group in groups:
            alike: defaultdict[object, list[Path]] = defaultdict(list)
            for path in group:
                try:
                    alike[key(path)].append(path)
                except OSError as error:
                    raise DataError(f"cannot read {path}: {error.strerror or error}") from error
            finer += [each for each in alike.values() if len(each) > 1]
        groups = finer
    return [set(group) for group in groups]

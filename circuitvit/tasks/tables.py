"""Tables of pairs: CSV files that say which image belongs to which, and what the images show."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from circuitvit.errors import DataError, FileError, OptionError, counted, unknown_name
from circuitvit.models.sentences import TextSpec
from circuitvit.models.zoo import InputSpec
from circuitvit.tasks.image_files import is_sentence
from circuitvit.tasks.images import SUFFIXES
from circuitvit.tasks.pairs import Pairing, check_pairing, pair_files

COLUMNS = ("clean", "corrupt", "target", "foil")


@dataclass(frozen=True)
class PairRow:
    """A pair of a table.

    Attributes:
        clean: path of the image that shows the behaviour; or the sentence that does.
        corrupt: that of its counterfactual.
        target: class of the clean image, by name or index; None where the line gives none.
        foil: class to compare it with, likewise.
    """

    clean: Path | str
    corrupt: Path | str
    target: str | int | None = None
    foil: str | int | None = None


@dataclass(frozen=True)
class Table:
    """What a table of pairs says.

    Attributes:
        path: of the file.
        rows: all pairs, in order.
        how: how they came to be pairs, in a sentence without its full stop.
        pair: how folders in it were asked to be paired, if they were.
    """

    path: Path
    rows: tuple[PairRow, ...]
    how: str
    pair: Pairing | None = None


def read_table(csv_path: str | Path, pair: Pairing | None = None, spec: InputSpec | None = None) -> Table:
    """The pairs of a CSV file.

    Its first line is `clean,corrupt` or `clean,corrupt,target,foil`, in any order; or two names of classes,
    such as `tabby,Border collie`: then the first column holds the clean images, which show the one class,
    and the second their counterfactuals, which show the other. Paths are relative to the folder of the file.
    Sentences, for a text tower, stand as they are; a single word where `spec` says so.
    A line may name two folders (or a folder and a file), whose images are paired as `pair_files` says.
    Classes stay text even where they are numbers: `class_index` takes both, and a class may be *called* "7".

    Args:
        csv_path: of the table.
        pair: how folders are paired, see `pair_files`.
        spec: the model's preprocessing, which says whether folders hold images or clips; images by default.

    Raises:
        FileError: if the file is missing, is no CSV in UTF-8, or has other columns.
        DataError: if it has no pairs, or a line is incomplete, names an image that does not exist, or folders
            that cannot be paired; the message gives the line.
        OptionError: if it says how folders are paired, and there is none.
    """
    check_pairing(pair)
    path = Path(csv_path)
    rows: list[PairRow] = []
    said: list[str] = []
    for line in _lines(path, isinstance(spec, TextSpec)):
        if any(isinstance(side, Path) and side.is_dir() for side in (line.clean, line.corrupt)):
            try:
                paired = pair_files(line.clean, line.corrupt, pair, spec)
            except DataError as error:
                raise DataError(f"{line.where}: {error}") from error
            said.append(paired.how)
            rows += [PairRow(*files, line.target, line.foil) for files in paired.files]
        else:
            rows.append(PairRow(*line[:4]))
    if not rows:
        raise DataError(f"{path} has no pairs: after the line clean,corrupt,target,foil each line gives one")
    if pair is not None and not said:
        raise OptionError(f"{path} lists its pairs file by file: leave out how to pair folders ({pair})")
    return Table(
        path, tuple(rows), "; ".join(said) or f"{counted(len(rows), 'pair')} listed in {path.name}", pair
    )


def classes_named(csv_path: str | Path) -> frozenset[str]:
    """Which of "target" and "foil" the first pair of a table names.

    Raises:
        FileError, DataError: as `read_table`.
    """
    first = next(_lines(Path(csv_path)), None)
    return frozenset(side for side in COLUMNS[2:] if first is not None and getattr(first, side) is not None)


class _Line(NamedTuple):
    clean: Path | str
    corrupt: Path | str
    target: str | None
    foil: str | None
    where: str


def _lines(path: Path, of_sentences: bool = False) -> Iterator[_Line]:
    """The lines of a table, their paths made relative to its folder and checked."""
    read = None
    try:
        # utf-8-sig: spreadsheets begin their CSV files with a byte-order mark.
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            for line in reader:
                cells, where = [cell.strip() for cell in line], f"{path}, line {reader.line_num}"
                if any(cells) and read is None:
                    read = _header(cells, where, None if of_sentences else path.parent)
                elif any(cells) and read is not None:
                    yield read(cells, where)
    except OSError as error:
        raise FileError(f"cannot read the table of pairs {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is not a CSV file in UTF-8: {error}") from error
    except csv.Error as error:
        raise FileError(f"{path}, line {reader.line_num}: {error}") from error


def _header(cells: list[str], where: str, folder: Path | None) -> partial[_Line]:
    """How the lines after this one are read."""
    columns = [cell.lower() for cell in cells]
    if len(set(columns)) == 2 == len(columns) and all(columns) and not set(columns) & set(COLUMNS):
        if any(Path(cell).suffix.lower() in {*SUFFIXES["image"], *SUFFIXES["clip"]} for cell in cells):
            raise FileError(
                f"{where}: {','.join(cells)} are files: the first line says what the columns hold, such as "
                "clean,corrupt"
            )
        return partial(_line, columns=["clean", "corrupt"], folder=folder, classes=tuple(cells))
    if unknown := [column for column in columns if column not in COLUMNS]:
        raise FileError(
            f"{where}: {unknown_name('column', unknown[0], COLUMNS)}; commas separate the columns"
        )
    if len(set(columns)) < len(columns) or not {"clean", "corrupt"} <= set(columns):
        raise FileError(f"{where}: {','.join(cells)} needs one column clean and one corrupt, and none twice")
    return partial(_line, columns=columns, folder=folder)


def _line(
    cells: list[str],
    where: str,
    *,
    columns: list[str],
    folder: Path | None,
    classes: tuple[str | None, ...] = (None, None),
) -> _Line:
    if len(cells) > len(columns):
        raise DataError(
            f"{where}: {len(cells)} cells for {len(columns)} columns; quote a cell that has a comma"
        )
    named = dict(zip(columns, cells, strict=False))
    for column in ("clean", "corrupt"):
        if not named.get(column):
            raise DataError(f"{where}: no {column} image")
    target, foil = (named.get(side) or known for side, known in zip(COLUMNS[2:], classes, strict=True))
    clean, corrupt = (_meant(named[column], folder, where) for column in ("clean", "corrupt"))
    return _Line(clean, corrupt, target, foil, where)


def _meant(cell: str, folder: Path | None, where: str) -> Path | str:
    """A file or folder beside the table; or a sentence.

    Raises:
        DataError: if it is neither.
    """
    if folder is None:
        return cell
    path = folder / cell
    if not path.exists():
        if is_sentence(cell):
            return cell
        raise DataError(f"{where}: no image {path}: there is no such file")
    return path

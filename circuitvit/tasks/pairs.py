"""Which image belongs to which: two folders matched by file name, or a table of pairs."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from circuitvit.errors import DataError, FileError, unknown_name
from circuitvit.models.zoo import InputSpec
from circuitvit.tasks.images import few, list_images


def match_folders(
    clean: str | Path, corrupt: str | Path, spec: InputSpec | None = None
) -> tuple[tuple[Path, Path], ...]:
    """Pairs of files with the same name in two folders, sorted by name; the endings may differ.

    Args:
        clean: a folder.
        corrupt: another.
        spec: the model's preprocessing, which says whether images or clips are looked for; images by default.

    Raises:
        DataError: if a folder is missing or has no images, two files of a folder differ in their ending
            only, or a file has no partner; the message names the files.
    """
    folders = Path(clean), Path(corrupt)
    first, second = (_by_stem(folder, spec) for folder in folders)
    if folders[0].resolve() == folders[1].resolve():
        raise DataError(
            f"clean and corrupt are the same folder, {clean}: no image would have a counterfactual"
        )
    lonely = []
    for folder, mine, other in (folders[0], first, second), (folders[1], second, first):
        names = [path.name for stem, path in mine.items() if stem not in other]
        lonely += [f"only in {folder}: {few(names)}"] if names else []
    if lonely:
        raise DataError(f"clean and corrupt images are matched by file name; {'; '.join(lonely)}")
    return tuple((first[stem], second[stem]) for stem in sorted(first))


def _by_stem(folder: Path, spec: InputSpec | None) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in list_images(folder, spec):
        if path.stem in found:
            raise DataError(
                f"{found[path.stem].name} and {path.name} in {folder} have one name: keep one of them"
            )
        found[path.stem] = path
    return found


@dataclass(frozen=True)
class PairRow:
    """One line of a table of pairs.

    Attributes:
        clean: path of the image that shows the behaviour.
        corrupt: path of its counterfactual.
        target: class of the clean image, by name or index; None where the line gives none.
        foil: class to compare it with, likewise.
    """

    clean: Path
    corrupt: Path
    target: str | int | None = None
    foil: str | int | None = None


def read_pairs(csv_path: str | Path) -> tuple[PairRow, ...]:
    """The pairs of a CSV file whose first line is `clean,corrupt` or `clean,corrupt,target,foil`.

    Columns may come in any order; paths are relative to the folder of the CSV file. Classes stay text even
    where they are numbers: `class_index` takes both, and a class may be *called* "7".

    Raises:
        FileError: if the file is missing, is no CSV in UTF-8, or has other columns.
        DataError: if it has no pairs, or a line is incomplete or names an image that does not exist; the
            message gives the line.
    """
    path = Path(csv_path)
    rows: list[PairRow] = []
    columns: list[str] | None = None
    try:
        # utf-8-sig: spreadsheets begin their CSV files with a byte-order mark.
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            for line in reader:
                cells, where = [cell.strip() for cell in line], f"{path}, line {reader.line_num}"
                if any(cells) and columns is None:
                    columns = _columns(cells, where)
                elif any(cells) and columns is not None:
                    rows.append(_pair(cells, columns, path.parent, where))
    except OSError as error:
        raise FileError(f"cannot read the table of pairs {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is not a CSV file in UTF-8: {error}") from error
    except csv.Error as error:
        raise FileError(f"{path}, line {reader.line_num}: {error}") from error
    if not rows:
        raise DataError(f"{path} has no pairs: after the line clean,corrupt,target,foil each line gives one")
    return tuple(rows)


def _columns(cells: list[str], where: str) -> list[str]:
    columns, known = [cell.lower() for cell in cells], ("clean", "corrupt", "target", "foil")
    if unknown := [column for column in columns if column not in known]:
        raise FileError(f"{where}: {unknown_name('column', unknown[0], known)}; commas separate the columns")
    if len(set(columns)) < len(columns) or not {"clean", "corrupt"} <= set(columns):
        raise FileError(f"{where}: {','.join(cells)} needs one column clean and one corrupt, and none twice")
    return columns


def _pair(cells: list[str], columns: list[str], folder: Path, where: str) -> PairRow:
    if len(cells) > len(columns):
        raise DataError(
            f"{where}: {len(cells)} cells for {len(columns)} columns; quote a cell that has a comma"
        )
    named = dict(zip(columns, cells, strict=False))
    for column in ("clean", "corrupt"):
        if not named.get(column):
            raise DataError(f"{where}: no {column} image")
        if not (folder / named[column]).is_file():
            raise DataError(f"{where}: no image {folder / named[column]}: there is no such file")
    target, foil = named.get("target") or None, named.get("foil") or None
    return PairRow(folder / named["clean"], folder / named["corrupt"], target, foil)

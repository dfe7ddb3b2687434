"""Tables of pairs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from circuitvit.errors import DataError, FileError, OptionError
from circuitvit.tasks.tables import PairRow, classes_named, read_table


def saved(path: Path, grey: int) -> Path:
    """A small grey picture; what it shows does not matter here."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (grey,) * 3).save(path)
    return path


@pytest.fixture
def table(tmp_path: Path) -> Callable[[str], Path]:
    """A CSV file beside the folders cats/ and dogs/ with a.png and b.png in each."""
    for grey, name in enumerate(("cats/a.png", "cats/b, c.png", "dogs/a.png", "dogs/b.png")):
        saved(tmp_path / name, grey)

    def write(content: str | bytes) -> Path:
        path = tmp_path / "pairs.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


class TestReadTable:
    def test_all_columns(self, table: Callable[[str], Path]) -> None:
        path = table('clean,corrupt,target,foil\ncats/a.png,dogs/a.png,tabby,"Border collie"\n')
        folder = path.parent
        assert read_table(path).rows == (
            PairRow(folder / "cats/a.png", folder / "dogs/a.png", "tabby", "Border collie"),
        )

    def test_spreadsheet_manners(self, table: Callable[[str], Path]) -> None:
        """A byte-order mark, Windows line ends, blank lines, spaces, quotes, capitals and another order."""
        lines = [
            "\ufeffCorrupt , Clean,target",
            "",
            "dogs/a.png, cats/a.png ,281",
            ",,",
            'dogs/b.png,"cats/b, c.png",',
        ]
        rows = read_table(table("\r\n".join(lines))).rows
        assert [(row.clean.name, row.corrupt.name, row.target, row.foil) for row in rows] == [
            ("a.png", "a.png", "281", None),
            ("b, c.png", "b.png", None, None),
        ]

    def test_classes_may_be_left_out(self, table: Callable[[str], Path]) -> None:
        (row,) = read_table(table("clean,corrupt\ncats/a.png,dogs/a.png")).rows
        assert (row.target, row.foil) == (None, None)

    @pytest.mark.parametrize(
        ("content", "complaint"),
        [
            ("clean,corrupt\ncats/a.png\n", "line 2: no corrupt image"),
            (
                "clean,corrupt\n\ncats/a.png,dogs/z.png\n",
                r"line 3: no image .*dogs/z\.png: there is no such file",
            ),
            ("clean,corrupt\ncats/b, c.png,dogs/b.png\n", "line 2: 3 cells for 2 columns; quote a cell"),
            ("clean,corrupt\n", "has no pairs"),
            ("", "has no pairs"),
        ],
    )
    def test_bad_rows_are_refused_by_line(
        self, table: Callable[[str], Path], content: str, complaint: str
    ) -> None:
        with pytest.raises(DataError, match=complaint):
            read_table(table(content))

    @pytest.mark.parametrize(
        ("content", "complaint"),
        [
            ("clean,corupt\n", "line 1: unknown column 'corupt': did you mean 'corrupt'"),
            ("clean;corrupt\n", "commas separate the columns"),
            ("clean,target\n", "needs one column clean and one corrupt"),
            ("clean,corrupt,clean\n", "none twice"),
            ("cats/a.png,dogs/a.png\n", "are files: the first line says what the columns hold"),
            ("cat,dog,bear\n", "unknown column 'cat'"),
            ('clean,corrupt\n"cats/a.png,dogs/a.png\n', "line 2: "),
            (b"clean,corrupt\ncats/\xff.png,dogs/a.png\n", "not a CSV file in UTF-8"),
        ],
    )
    def test_files_of_another_kind_are_refused(
        self, table: Callable[[str | bytes], Path], content: str | bytes, complaint: str
    ) -> None:
        with pytest.raises(FileError, match=complaint):
            read_table(table(content))

    def test_a_missing_table(self, tmp_path: Path) -> None:
        with pytest.raises(FileError, match=r"cannot read the table of pairs .*none\.csv"):
            read_table(tmp_path / "none.csv")


class TestMoreThanPairs:
    """Columns that are classes, and lines that name folders."""

    def test_a_column_for_each_class(self, table: Callable[[str], Path]) -> None:
        read = read_table(table("tabby,Border collie\ncats/a.png,dogs/a.png\n"))
        assert [(row.target, row.foil) for row in read.rows] == [("tabby", "Border collie")]
        assert read.how == "1 pair listed in pairs.csv"
        assert classes_named(read.path) == {"target", "foil"}

    def test_folders_pair_themselves(self, table: Callable[[str], Path]) -> None:
        path = table("clean,corrupt,target\ncats,dogs,tabby\ncats/a.png,dogs/b.png,lynx\n")
        saved(path.parent / "dogs/c.png", 150)
        read = read_table(path, "order")
        assert [(row.clean.name, row.corrupt.name, row.target) for row in read.rows] == [
            ("a.png", "a.png", "tabby"), ("b, c.png", "b.png", "tabby"), ("a.png", "b.png", "lynx"),
        ]  # fmt: skip
        assert "1 of dogs left over: c.png" in read.how
        assert classes_named(path) == {"target"}

    def test_what_is_wrong_with_folders_is_said_by_line(self, table: Callable[[str], Path]) -> None:
        with pytest.raises(DataError, match=r"line 2: some images of cats and dogs have the same name"):
            read_table(table("clean,corrupt\ncats,dogs\n"))
        with pytest.raises(OptionError, match="lists its pairs file by file: leave out"):
            read_table(table("clean,corrupt\ncats/a.png,dogs/b.png\n"), "nearest")

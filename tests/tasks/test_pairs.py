"""Two folders matched by file name, and tables of pairs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from circuitvit.errors import DataError, FileError
from circuitvit.tasks.pairs import PairRow, match_folders, read_pairs


def saved(path: Path) -> Path:
    """A small grey picture; what it shows does not matter here."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (90, 90, 90)).save(path)
    return path


class TestMatchFolders:
    def test_by_name_whatever_the_ending(self, tmp_path: Path) -> None:
        for name in ("cats/b.png", "cats/a.jpg", "dogs/a.png", "dogs/b.jpeg", "dogs/.c.png"):
            saved(tmp_path / name)
        pairs = match_folders(tmp_path / "cats", tmp_path / "dogs")
        assert [(clean.name, corrupt.name) for clean, corrupt in pairs] == [
            ("a.jpg", "a.png"),
            ("b.png", "b.jpeg"),
        ]

    def test_files_without_a_partner_are_named_on_both_sides(self, tmp_path: Path) -> None:
        for name in ("cats/a.png", "cats/b.png", "dogs/a.png", "dogs/c.png"):
            saved(tmp_path / name)
        with pytest.raises(DataError, match=r"only in .*cats: b\.png; only in .*dogs: c\.png"):
            match_folders(tmp_path / "cats", tmp_path / "dogs")

    def test_two_files_of_one_name_are_refused(self, tmp_path: Path) -> None:
        for name in ("cats/a.png", "cats/a.jpg", "dogs/a.png"):
            saved(tmp_path / name)
        with pytest.raises(DataError, match=r"a\.jpg and a\.png in .*cats have one name"):
            match_folders(tmp_path / "cats", tmp_path / "dogs")

    def test_missing_empty_and_equal_folders_are_refused(self, tmp_path: Path) -> None:
        saved(tmp_path / "cats/a.png")
        (tmp_path / "dogs").mkdir()
        with pytest.raises(DataError, match=r"there is no folder .*wolves"):
            match_folders(tmp_path / "cats", tmp_path / "wolves")
        with pytest.raises(DataError, match="not a folder"):
            match_folders(tmp_path / "cats/a.png", tmp_path / "cats")
        with pytest.raises(DataError, match="dogs has no images"):
            match_folders(tmp_path / "cats", tmp_path / "dogs")
        with pytest.raises(DataError, match="the same folder"):
            match_folders(tmp_path / "cats", tmp_path / "dogs/../cats")


@pytest.fixture
def table(tmp_path: Path) -> Callable[[str], Path]:
    """A CSV file beside the folders cats/ and dogs/ with a.png and b.png in each."""
    for name in ("cats/a.png", "cats/b, c.png", "dogs/a.png", "dogs/b.png"):
        saved(tmp_path / name)

    def write(content: str | bytes) -> Path:
        path = tmp_path / "pairs.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


class TestReadPairs:
    def test_all_columns(self, table: Callable[[str], Path]) -> None:
        path = table('clean,corrupt,target,foil\ncats/a.png,dogs/a.png,tabby,"Border collie"\n')
        folder = path.parent
        assert read_pairs(path) == (
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
        rows = read_pairs(table("\r\n".join(lines)))
        assert [(row.clean.name, row.corrupt.name, row.target, row.foil) for row in rows] == [
            ("a.png", "a.png", "281", None),
            ("b, c.png", "b.png", None, None),
        ]

    def test_classes_may_be_left_out(self, table: Callable[[str], Path]) -> None:
        (row,) = read_pairs(table("clean,corrupt\ncats/a.png,dogs/a.png"))
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
            read_pairs(table(content))

    @pytest.mark.parametrize(
        ("content", "complaint"),
        [
            ("clean,corupt\n", "line 1: unknown column 'corupt': did you mean 'corrupt'"),
            ("clean;corrupt\n", "commas separate the columns"),
            ("clean,target\n", "needs one column clean and one corrupt"),
            ("clean,corrupt,clean\n", "none twice"),
            ('clean,corrupt\n"cats/a.png,dogs/a.png\n', "line 2: "),
            (b"clean,corrupt\ncats/\xff.png,dogs/a.png\n", "not a CSV file in UTF-8"),
        ],
    )
    def test_files_of_another_kind_are_refused(
        self, table: Callable[[str | bytes], Path], content: str | bytes, complaint: str
    ) -> None:
        with pytest.raises(FileError, match=complaint):
            read_pairs(table(content))

    def test_a_missing_table(self, tmp_path: Path) -> None:
        with pytest.raises(FileError, match=r"cannot read the table of pairs .*none\.csv"):
            read_pairs(tmp_path / "none.csv")

"""Folders that pair themselves: by name, in order, or the most alike; and what is said of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pytest
from PIL import Image

import circuitvit as cv
from circuitvit.errors import DataError, NameNotFoundError, OptionError
from circuitvit.models.zoo import ClipSpec
from circuitvit.tasks import alike
from circuitvit.tasks.pairs import Pairs, pair_files

Folders = Callable[..., tuple[Path, Path]]


def saved(path: Path, colour: tuple[int, int, int] | None = None) -> Path:
    """A small picture, of another colour for each path unless one is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    own = np.random.default_rng(list(str(path.relative_to(path.parents[1])).encode())).integers(255, size=3)
    Image.new("RGB", (6, 4), colour or tuple(own.tolist())).save(path, lossless=True)
    return path


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    """Folders of pictures with these names."""

    def make(cats: str, dogs: str) -> tuple[Path, Path]:
        for folder, names in (("cats", cats), ("dogs", dogs)):
            for name in names.split():
                saved(tmp_path / folder / name)
        return tmp_path / "cats", tmp_path / "dogs"

    return make


def names(pairs: Pairs) -> list[tuple[str, str]]:
    return [(clean.name, corrupt.name) for clean, corrupt in pairs.files]


class TestByThemselves:
    """What happens where nobody says how."""

    def test_by_name_whatever_the_ending(self, folders: Folders) -> None:
        pairs = pair_files(*folders("b.png a.gif", "a.png b.webp .c.png"))
        assert names(pairs) == [("a.gif", "a.png"), ("b.png", "b.webp")]
        assert pairs.how == "2 images of cats and 2 of dogs, paired by name"

    def test_in_order_where_no_name_is_on_both_sides(self, folders: Folders) -> None:
        """Numbers count as numbers, so that two folders that begin alike go on alike."""
        pairs = pair_files(*folders("cat2.png cat10.png", "dog10.png dog2.png dog9.png dog11.png"))
        assert names(pairs) == [("cat2.png", "dog2.png"), ("cat10.png", "dog9.png")]
        assert pairs.how == (
            "2 images of cats and 4 of dogs, paired in the order of their names; "
            "2 of dogs left over: dog10.png, dog11.png"
        )

    def test_photographs_as_phones_save_them_are_told_to_be_missing(self, folders: Folders) -> None:
        cats, dogs = folders("a.png", "a.png")
        (cats / "IMG_2.HEIC").write_bytes(b"ftypheic")
        (cats / "notes.txt").write_text("of no interest")
        pairs = pair_files(cats, dogs)
        assert pairs.how.endswith("paired by name; 1 of cats not read, save as .jpg: IMG_2.HEIC")

    def test_some_names_in_common_are_no_answer(self, folders: Folders) -> None:
        cats, dogs = folders("a.png b.png", "a.png c.png")
        with pytest.raises(DataError, match=r"only in .*cats: b\.png; only in .*dogs: c\.png.*or nearest"):
            pair_files(cats, dogs)

    def test_one_picture_is_the_partner_of_all(self, folders: Folders, tmp_path: Path) -> None:
        cats, _ = folders("a.png b.png", "d.png")
        blank = saved(tmp_path / "blank.png")
        assert names(pair_files(cats, blank)) == [("a.png", "blank.png"), ("b.png", "blank.png")]
        assert pair_files(cats, blank).how == "2 images of cats and blank.png, each paired with it"
        assert pair_files(blank, cats).how == "blank.png and 2 of cats, it paired with each"

    def test_missing_empty_and_equal_folders_are_refused(self, folders: Folders, tmp_path: Path) -> None:
        cats, dogs = folders("a.png", "")
        dogs.mkdir()
        with pytest.raises(DataError, match=r"no image .*wolves: there is no such file"):
            pair_files(cats, tmp_path / "wolves")
        with pytest.raises(DataError, match="dogs has no images"):
            pair_files(cats, dogs)
        with pytest.raises(DataError, match="the same folder"):
            pair_files(cats, dogs / "../cats")


class TestAsAsked:
    def test_by_name_leaves_out_what_has_no_partner(self, folders: Folders) -> None:
        pairs = pair_files(*folders("a.png b.png", "a.png c.png"), "names")
        assert names(pairs) == [("a.png", "a.png")]
        assert pairs.how.endswith("paired by name; 1 of cats left over: b.png; 1 of dogs left over: c.png")

    def test_no_name_or_two_of_one_name(self, folders: Folders) -> None:
        cats, dogs = folders("a.png a.gif", "b.png")
        with pytest.raises(DataError, match=r"no image of c\.png .* has the name of one of dogs"):
            pair_files(saved(cats.parent / "c.png"), dogs, "names")
        with pytest.raises(DataError, match=r"a\.gif and a\.png in .*cats have one name"):
            pair_files(cats, dogs, "names")

    def test_the_most_alike(self, tmp_path: Path) -> None:
        """A greedy choice would give the grey cat its nearest dog, and the others what is left."""
        for name, level in {"cats/1": 100, "cats/2": 118, "cats/3": 20}.items():
            saved(tmp_path / f"{name}.png", (level,) * 3)
        for name, level in {"dogs/1": 250, "dogs/2": 25, "dogs/3": 120, "dogs/4": 125}.items():
            saved(tmp_path / f"{name}.png", (level,) * 3)
        pairs = pair_files(tmp_path / "cats", tmp_path / "dogs", "nearest")
        assert names(pairs) == [("1.png", "3.png"), ("2.png", "4.png"), ("3.png", "2.png")]
        assert "paired with the most alike (colours differ by 4.4 on average, in the order" in pairs.how
        assert pairs.how.endswith("1 of dogs left over: 1.png")

    def test_other_words_are_refused(self, folders: Folders) -> None:
        with pytest.raises(NameNotFoundError, match="unknown pairing 'nearset': did you mean 'nearest'"):
            cv.Task(*folders("a.png", "b.png"), pair="nearset")  # type: ignore[arg-type]
        with pytest.raises(OptionError, match="files are paired by order: give folders or files for both"):
            cv.Task("cats", pair="order", ablation="mean")


class TestTheSamePictureTwice:
    def test_on_both_sides_it_is_refused_by_name(self, folders: Folders) -> None:
        cats, dogs = folders("a.png b.png", "c.png")
        (dogs / "d.png").write_bytes((cats / "b.png").read_bytes())
        with pytest.raises(DataError, match=r"cats/b\.png and .*dogs/d\.png are the same file"):
            pair_files(cats, dogs)
        with pytest.raises(DataError, match="the same file"):
            pair_files(cats, cats / "b.png")

    def test_names_may_exchange_pictures(self, folders: Folders) -> None:
        """Whoever names files pairs them on purpose: a cat for a dog here, and the dog for the cat there."""
        cats, dogs = folders("a.png b.png", "")
        dogs.mkdir()
        for name, other in (("a.png", "b.png"), ("b.png", "a.png")):
            (dogs / name).write_bytes((cats / other).read_bytes())
        assert len(pair_files(cats, dogs).files) == 2
        (dogs / "a.png").write_bytes((cats / "a.png").read_bytes())
        with pytest.raises(DataError, match=r"cats/a\.png and .*dogs/a\.png are the same file"):
            pair_files(cats, dogs)

    def test_within_a_folder_it_is_said(self, folders: Folders) -> None:
        cats, dogs = folders("a.png b.png", "c.png d.png")
        (cats / "b.png").write_bytes((cats / "a.png").read_bytes())
        assert pair_files(cats, dogs).how.endswith("; the same file several times in cats: a.png, b.png")


class TestHowAlike:
    def test_of_black_white_and_colours(self, tmp_path: Path) -> None:
        """Black and white are 100 apart; colours by CIELAB, here of red and green (Lindbloom's 170.6)."""
        colours = {"black": (0, 0, 0), "white": (255, 255, 255), "red": (255, 0, 0), "green": (0, 255, 0)}
        paths = [saved(tmp_path / "all" / f"{name}.png", colour) for name, colour in colours.items()]
        found = alike.differences(paths, paths)
        assert found[0, 1] == pytest.approx(100, abs=0.05)
        assert found[2, 3] == pytest.approx(170.6, abs=0.3)
        assert not found.diagonal().any()

    def test_a_file_that_cannot_be_read_is_named(self, folders: Folders) -> None:
        cats, dogs = folders("a.png", "b.png")
        (dogs / "b.png").write_bytes(b"no picture")
        with pytest.raises(DataError, match=r"dogs/b\.png is not an image"):
            pair_files(cats, dogs, "nearest")

    def test_huge_folders_are_refused(self, folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(alike, "MOST", 2)
        with pytest.raises(DataError, match=r"3 files in .*cats are too many to compare all with all"):
            pair_files(*folders("a.png b.png c.png", "d.png"), "nearest")

    def test_clips_by_their_frames(self, tmp_path: Path) -> None:
        for name, levels in {"a/1": (0, 200), "b/1": (200, 0), "b/2": (10, 190)}.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            frames = np.repeat(np.array(levels, dtype=np.uint8), 3)[:, None, None, None]
            np.savez(tmp_path / f"{name}.npz", frames=np.broadcast_to(frames, (6, 8, 8, 3)))
        spec = ClipSpec((3, 8, 8), (0.5,) * 3, (0.5,) * 3, frames=2)
        pairs = pair_files(tmp_path / "a", tmp_path / "b", "nearest", spec)
        assert names(pairs) == [("1.npz", "2.npz")]
        assert pairs.how.startswith("1 clip of a and 2 of b")


class TestLists:
    def test_two_lists_are_no_single_files(self, folders: Folders) -> None:
        cats, dogs = folders("a.png b.png", "c.png d.png")
        lists = [cats / "b.png", cats / "a.png"], [dogs / "c.png", dogs / "d.png"]
        pairs = pair_files(*lists)
        assert names(pairs) == [("b.png", "c.png"), ("a.png", "d.png")]
        assert pairs.how == "2 images of the clean list and 2 of the corrupt list, paired in order"

    def test_a_file_that_cannot_be_read_is_named(
        self, folders: Folders, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cats, dogs = folders("a.png", "b.png")
        for each in (cats / "a.png", dogs / "b.png"):
            each.write_bytes(b"of one size")

        def refuse(path: Path) -> bytes:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "read_bytes", refuse)
        with pytest.raises(DataError, match=r"cannot read .*a\.png: Permission denied"):
            pair_files(cats, dogs)

    def test_files_are_not_compared_all_with_all(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Thousands of files on a side took more than a minute."""
        sides = [[tmp_path / f"{side}{place}.png" for place in range(100)] for side in "ab"]
        for size, path in enumerate(sides[0] + sides[1]):
            path.write_bytes(bytes(size))
        compared, equal = [], PurePath.__eq__
        monkeypatch.setattr(PurePath, "__eq__", lambda *two: compared.append(two) or equal(*two))
        assert len(pair_files(*sides, "order").files) == 100
        assert len(compared) < 1000


class TestInATask:
    def test_lists_are_taken_as_they_are_unless_asked(self, folders: Folders) -> None:
        cats, dogs = folders("a.png b.png", "a.png b.png")
        lists = [cats / "a.png", cats / "b.png"], [dogs / "b.png", dogs / "a.png"]
        model = cv.load("catdog-tiny")
        task = cv.Task(*lists, metric=cv.logit_diff("cat", "dog"))
        for each, expected in ((task, "b.png"), (task.with_options(pair="names"), "a.png")):
            prepared = each.prepare(model)
            assert prepared.corrupt is not None
            assert prepared.corrupt.names[0] == expected

    def test_what_was_done_is_kept_with_the_results(self, folders: Folders, capsys: Any) -> None:
        model = cv.load("catdog-tiny")
        task = cv.Task(*folders("a.png b.png", "c.png d.png e.png"), metric=cv.logit_diff("cat", "dog"))
        prepared = task.prepare(model, progress=True)
        assert prepared.pairing in capsys.readouterr().err
        assert "1 of dogs left over: e.png" in prepared.pairing
        scores = cv.attribute(model, prepared, "eap", progress=False)
        assert scores.provenance.parameters["pairing"] == prepared.pairing
        assert cv.split(model, prepared, 0.5).held_out.pairing == prepared.pairing

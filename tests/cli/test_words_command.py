"""`circuitvit words`: pictures with words on them, from the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from tests.cli.cases import Run


def test_words_are_written_as_pairs_of_folders(run: Run, tmp_path: Path) -> None:
    Image.new("RGB", (200, 100), "teal").save(tmp_path / "cat.jpg")
    Image.new("RGB", (60, 30), "olive").save(tmp_path / "word.png")
    out = tmp_path / "signs"
    asked = (tmp_path / "cat.jpg", "--neutral", tmp_path / "word.png", "--place", "0.5,0.3", "--out", out)
    result = run("words", *asked, "--word", "dog", "--size", 0.4, "--ink", "#ff0000")
    assert result.exit_code == 0, result.output
    assert "1 picture each" in result.stdout
    word = np.asarray(Image.open(out / "word" / "cat.png").convert("RGB"))
    mask = np.asarray(Image.open(out / "mask" / "cat.png")) > 0
    assert (word[mask] == (255, 0, 0)).all(axis=1).any()
    assert np.argwhere(mask).mean(axis=0).round().tolist() == [30, 100]
    again = run("words", *asked, "--word", "dog")
    assert (again.exit_code, "not empty: give another --out" in again.stderr) == (2, True)


def test_what_cannot_be_written_is_refused(run: Run, tmp_path: Path) -> None:
    Image.new("RGB", (200, 100), "teal").save(tmp_path / "cat.png")
    for wrong, message in (
        (("--word", "dog.png"), "there is no picture dog.png of a word"),
        (("--word", "dog", "--place", "0.5,top"), "two numbers such as 0.5,0.8"),
        (("--word", "犬"), "has no 犬 (of '犬'): give --font"),
    ):
        result = run("words", tmp_path / "cat.png", *wrong, "--out", tmp_path / "out")
        assert (result.exit_code, message in " ".join(result.stderr.split())) == (2, True), result.stderr
    assert not (tmp_path / "out").exists()

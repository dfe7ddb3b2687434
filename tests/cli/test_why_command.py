"""`why`: a page and numbers from a folder, and refusals before anything is written."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import circuitvit as cv
from circuitvit.cli.misread import FILES
from tests.cli.cases import Run


@pytest.fixture
def photos(pairs: Path, tmp_path: Path) -> Path:
    """A folder with cats and dogs, and beside it a cat that is half a dog."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, side in (("cats", "clean"), ("dogs", "corrupt")):
        shutil.copytree(pairs / side, folder / name)
    halves = [np.asarray(Image.open(pairs / side / "0.png"), dtype=float) for side in ("clean", "corrupt")]
    Image.fromarray((sum(halves) / 2).round().astype(np.uint8)).save(tmp_path / "odd.png")
    return folder


def test_it_writes_a_page_and_says_what_turns_the_answer(run: Run, photos: Path, tmp_path: Path) -> None:
    model, odd = cv.load("catdog-tiny"), tmp_path / "odd.png"
    seen = model.activations(odd, "logits", progress=False)["logits"].argmax()
    label = "dog" if seen == 0 else "cat"
    result = run(
        "why", "catdog-tiny", odd, "--label", label, "--among", photos, "--out", tmp_path / "out", "--quiet"
    )
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(FILES)
    found = cv.Why.load(tmp_path / "out" / "why.safetensors")
    assert found.counterfactuals[0].nodes
    assert found.chosen[0] in result.stdout
    assert "bear in mind" in result.stdout.lower()


def test_without_an_image_the_misread_ones_are_listed(run: Run, photos: Path, tmp_path: Path) -> None:
    model = cv.load("catdog-tiny")
    (photos / "dogs" / "odd.png").write_bytes((photos / "cats" / "0.png").read_bytes())
    found = cv.misread_images(model, photos, progress=False)
    seen = {
        path: model.activations(path, "logits", progress=False)["logits"][0].topk(1).indices.item()
        for path in photos.glob("*/*.png")
    }
    wrong = {str(path) for path, top in seen.items() if model.classes[top] + "s" != path.parent.name}
    assert set(found.images) == wrong
    assert str(photos / "dogs" / "odd.png") in wrong
    assert list(found.margins) == sorted(found.margins)
    assert (found.margins < 0).all()
    result = run("why", "catdog-tiny", "--among", photos, "--out", tmp_path / "out", "--quiet")
    assert result.exit_code == 0, result.output
    assert f"{len(wrong)} of {len(seen)} images misread" in result.stdout
    assert (tmp_path / "out" / "misread.csv").read_text().count("\n") == len(wrong) + 1
    result = run("why", "catdog-tiny", tmp_path / "odd.png", "--among", photos)
    assert result.exit_code == 2
    assert "--label" in result.stderr


def test_an_image_that_is_right_and_one_that_is_missing_are_refused(
    run: Run, photos: Path, pairs: Path, tmp_path: Path
) -> None:
    asked = ["--label", "cat", "--among", photos, "--out", tmp_path / "out"]
    for image, said in ((pairs / "clean" / "0.png", "is read rightly"), (tmp_path / "no.png", "there is no")):
        result = run("why", "catdog-tiny", image, *asked)
        assert result.exit_code == 2
        assert said in result.stderr
    assert not (tmp_path / "out").exists()

"""`circuitvit view heads` and `circuitvit view equivariance`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.errors import CircuitViTError
from tests.views.commands import run, save_pictures

MODEL = ("--model", "catdog-tiny")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pictures = catdog_pairs(8, seed=0, preprocessed=False).clean
    return save_pictures(tmp_path_factory.mktemp("photos"), pictures)


def test_heads_of_noise_and_of_images(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "heads.png"
    said = run("heads", *MODEL, "--n", 8, "--out", out)
    assert "patches of noise" in said
    assert "Kinds of heads, of 16" in said
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "patches of noise" not in run("heads", *MODEL, photos, "--n", 8, "--out", out)


def test_pairs_of_units(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "equivariance.png"
    options = ("--site", "m0.hidden", "--transform", "mirror", "--transform", "shift", "--out", out)
    assert "Pairs, of 128 units" in run("equivariance", *MODEL, photos, *options)
    assert out.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(CircuitViTError, match="did you mean 'mirror'"):
        run("equivariance", *MODEL, photos, "--transform", "miror")


def test_an_image_is_asked_by_the_probes_of_patches_wherever_they_stand(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    for place, picture in enumerate(sorted(photos.iterdir())):
        folder = tmp_path / "photos" / ("even", "odd")[place % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / picture.name).write_bytes(picture.read_bytes())
    monkeypatch.chdir(tmp_path)
    places = ("--token", "cls", "--token", "patch", "--reads", "any", "--folds", 2, "--site", "resid4")
    said = run("probes", *MODEL, "photos", *places, "--ask", photos / "0.png", "--about", "odd")
    assert "Accuracy at cls, the first of 2 places: even, odd" in said
    assert "Log-odds of odd in 0.png, patch" in said
    assert "wrote probes.png" in said


def test_no_forests_no_words_of_them(tmp_path: Path) -> None:
    out = tmp_path / "shares.json"
    said = run("disentanglement", *MODEL, "--site", "a1.h1", "--trees", 0, "--out", out)
    assert "read off" not in said
    assert "DCI" not in said
    assert list(json.loads(out.read_text())) == ["shares"]

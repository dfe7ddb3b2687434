"""`circuitvit view heads` and `circuitvit view equivariance`."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from circuitvit.cli.inside import view
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.errors import CircuitViTError

MODEL = ("--model", "catdog-tiny")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for place, picture in enumerate(catdog_pairs(8, seed=0, preprocessed=False).clean):
        pixels = (picture * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{place}.png")
    return folder


def run(*arguments: object) -> str:
    result = CliRunner().invoke(view, [str(each) for each in arguments], catch_exceptions=True)
    if isinstance(result.exception, CircuitViTError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


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

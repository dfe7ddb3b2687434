"""Drawn image pairs as PNG files, a way to run commands, and one discovery that several tests look at."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from circuitvit.cli.program import app
from circuitvit.datasets.catdog import catdog_pairs
from tests.cli.cases import N_PAIRS, Run


@pytest.fixture(scope="session")
def run() -> Run:
    """Run a command in this process: `run("draw", path, ...)`."""
    runner = CliRunner()

    def invoke(*arguments: object) -> Any:
        return runner.invoke(app, [str(argument) for argument in arguments])

    return invoke


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `clean/` (cats), `corrupt/` (the same as dogs), `pairs.csv` and `named.csv`."""
    folder = tmp_path_factory.mktemp("pairs")
    for side, pictures in zip(
        ("clean", "corrupt"), catdog_pairs(N_PAIRS, seed=3, preprocessed=False), strict=True
    ):
        (folder / side).mkdir()
        for index, picture in enumerate(pictures):
            pixels = (picture * 255).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(folder / side / f"{index}.png")
    rows = [(f"clean/{index}.png", f"corrupt/{index}.png") for index in range(N_PAIRS)]
    write_table(folder / "pairs.csv", ("clean", "corrupt"), rows)
    named = [(*row, "cat", "dog") for row in rows]
    write_table(folder / "named.csv", ("clean", "corrupt", "target", "foil"), named)
    return folder


@pytest.fixture(scope="session")
def behaviour(pairs: Path) -> list[object]:
    """Options for the cat-dog behaviour of the bundled model on the drawn pairs."""
    images = ["--clean", pairs / "clean", "--corrupt", pairs / "corrupt"]
    return ["--model", "catdog-tiny", *images, "--target", "cat", "--foil", "dog", "--quiet"]


@pytest.fixture(scope="session")
def discovered(run: Run, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder that `discover --method eap` wrote, and what it printed."""
    out = tmp_path_factory.mktemp("discovered") / "deep" / "out"
    result = run(
        "discover", "--model", "catdog-tiny", "--pairs", pairs / "named.csv",
        "--held-out-clean", pairs / "clean", "--held-out-corrupt", pairs / "corrupt",
        "--method", "eap", "--edges", 80, "--random", 5, "--quiet", "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return out, result


def write_table(path: Path, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])

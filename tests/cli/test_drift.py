"""`diff`: a page, numbers, and an exit code that a workflow can stop at."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import circuitvit as cv
from circuitvit.cli.drift import FILES
from circuitvit.models import zoo
from circuitvit.models.zoo.card import sha256
from tests.cli.cases import Run


@pytest.fixture
def weaker(tmp_path: Path) -> Path:
    """The bundled model as `circuitvit train` would have saved it, with smaller logits."""
    path, card = tmp_path / "weaker.safetensors", zoo.zoo_card("catdog-tiny")
    weights = load_file(Path(zoo.__file__).parent / "catdog-tiny.safetensors")
    save_file({name: 0.5 * each if "head." in name else each for name, each in weights.items()}, path)
    replace(card, weights_sha256=sha256(path.read_bytes())).save(path.with_suffix(".json"))
    return path


def test_it_writes_a_page_and_ends_with_1_where_something_drifted(
    run: Run, behaviour: list[object], weaker: Path, tmp_path: Path
) -> None:
    circuit = tmp_path / "circuit.json"
    cv.Circuit.full(cv.load("catdog-tiny").graph).save(circuit)
    asked = [*behaviour[2:], "--circuit", circuit, "--edges", 1, "--out", tmp_path / "out"]
    result = run("diff", "catdog-tiny", weaker, *asked, "--tolerance", 0.3)
    assert result.exit_code == 1, result.output
    assert "WEAKER" in result.stdout
    assert "0.500 (0.500 to 0.500)" in result.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(FILES)
    assert cv.Drift.load(tmp_path / "out" / "drift.json").verdict == "weaker"
    assert run("diff", "catdog-tiny", weaker, *asked, "--accept", "weaker").exit_code == 0
    same = run("diff", "catdog-tiny", "catdog-tiny", *asked)
    assert same.exit_code == 0
    assert "nothing was run" in same.stdout


@pytest.mark.parametrize(
    ("option", "said"), [(["--accept", "fine"], "unchanged"), (["--checkpoint", "x.pt"], "leave out")]
)
def test_what_makes_no_sense_is_refused_first(
    run: Run, behaviour: list[object], option: list[str], said: str
) -> None:
    result = run("diff", "catdog-tiny", "catdog-tiny", *behaviour[2:], *option)
    assert result.exit_code == 2
    assert said in result.stderr

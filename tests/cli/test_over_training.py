"""`across`: checkpoints as `circuitvit train` writes them, or weights alone, to figures and numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import circuitvit as cv
from circuitvit.cli.over_training import FILES
from circuitvit.models import zoo
from circuitvit.models.zoo.card import sha256
from tests.cli.cases import Run

STRENGTHS = {0: 0.1, 50: 0.8, 1000: 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of the bundled model whose logits grow."""
    found, card = tmp_path_factory.mktemp("catdog-checkpoints"), zoo.zoo_card("catdog-tiny")
    weights = load_file(Path(zoo.__file__).parent / "catdog-tiny.safetensors")
    for step, strength in STRENGTHS.items():
        path = found / f"catdog-step-{step:06d}.safetensors"
        save_file(
            {name: strength * each if "head." in name else each for name, each in weights.items()}, path
        )
        own = replace(card, name=path.stem, recipe={**card.recipe, "steps_done": step})
        replace(own, weights_sha256=sha256(path.read_bytes())).save(path.with_suffix(".json"))
    return found


def test_it_says_when_a_circuit_formed_and_draws_it(
    run: Run, behaviour: list[object], folder: Path, tmp_path: Path
) -> None:
    circuit = tmp_path / "circuit.json"
    cv.Circuit.full(cv.load("catdog-tiny").graph).save(circuit)
    asked = [*behaviour[2:], "--circuit", circuit, "--method", "eap", "--out", tmp_path / "out"]
    result = run("across", folder, *asked)
    assert result.exit_code == 0, result.output
    assert "the circuit has formed by step 50 of 1,000 (surely not up to 0, surely from 50 on)" in " ".join(
        result.stdout.split()
    )
    assert "0.100 (0.100 to 0.100)" in result.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(FILES)
    assert cv.Across.load(tmp_path / "out" / "across.json").steps == tuple(STRENGTHS)


@pytest.mark.parametrize(
    ("option", "said"),
    [(["--checkpoint", "x.pt"], "leave out --checkpoint"), (["--window", 2], "the window")],
)
def test_what_makes_no_sense_is_refused_first(
    run: Run, behaviour: list[object], folder: Path, tmp_path: Path, option: list[object], said: str
) -> None:
    result = run("across", folder, *behaviour[2:], *option, "--out", tmp_path)
    assert result.exit_code == 2
    assert said in result.stderr
    assert not [*tmp_path.iterdir()]


def test_weights_alone_need_the_name_of_their_model(
    run: Run, behaviour: list[object], tmp_path: Path
) -> None:
    for step in range(3):
        (tmp_path / f"x-{step}.pt").touch()
    result = run("across", tmp_path, *behaviour[2:], "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "x-2.pt holds weights alone: say with --model of what" in result.stderr

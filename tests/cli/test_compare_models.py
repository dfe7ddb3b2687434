"""`compare-models`: what is said for one model and what for all, and the files that are written."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

import circuitvit as cv
from circuitvit.pruning import Finding, Plan
from tests.cli.cases import Run

SHORT = ["--no-labels", "--edges", 20, "--method", "eap", "--random", 2, "--within", "1s", "--quiet"]


@pytest.fixture(scope="module")
def images(pairs: Path) -> list[object]:
    return ["--clean", pairs / "clean", "--corrupt", pairs / "corrupt"]


@pytest.fixture
def quick_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """No search: a circuit of the edges that score best."""

    def find(model: cv.Model, task: cv.Task, **options: object) -> Finding:
        circuit = cv.attribute(model, task, "eap", progress=False).connected(40)
        return Finding(circuit, 1.0, False, (), Plan(0, 1, 1), "It was not searched for.")

    monkeypatch.setattr(importlib.import_module("circuitvit.views.models_compared"), "find", find)


def test_each_model_has_its_own_classes(
    run: Run, images: list[object], tmp_path: Path, quick_search: None
) -> None:
    targets = ["--target", "cat", "--target", "B: 0"]
    foils = ["--foil", "A:dog", "--foil", "B:rabbit", "--foil", "B:dog"]
    command = ["compare-models", "catdog-tiny", "catdog-tiny", *images, *targets, *foils, *SHORT]
    result = run(*command, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    sheet = cv.ModelSheet.load(tmp_path / "models.json")
    said = [model.behaviour for model in sheet.models]
    assert said == ["logit_diff(cat, dog)", "logit_diff(cat, rabbit and 1 more)"]
    assert "| faithfulness" in result.stdout
    assert "ran out of time on catdog-tiny, catdog-tiny (2)" in " ".join(result.stdout.split())
    assert cv.Circuit.load(tmp_path / "circuit_B.json") == sheet.models[1].circuit
    assert (tmp_path / "models.html").read_text().startswith("<!doctype html>")
    again = run(*command, "--resume", "--out", tmp_path)
    assert again.exit_code == 0, again.output
    assert cv.ModelSheet.load(tmp_path / "models.json").to_dict() == sheet.to_dict()  # seconds and all


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["catdog-tiny"], "one model cannot be compared"),
        (["catdog-tiny"] * 2 + ["--target", "C:cat"], "--target C:cat: there is no model C, only A, B"),
        (["catdog-tiny"] * 2 + ["--head", "B:a", "--head", "B:b"], "--head gives two for model B: a and b"),
        (["catdog-tiny"] * 2 + ["--prompt", "B:a cat"], "catdog-tiny knows no words"),
        (["catdog-tiny"] * 2 + ["--method", "epa"], "unknown method 'epa'"),
        (["catdog-tiny"] * 2 + ["--within", "soon"], "a duration is"),
        (
            ["catdog-tiny", "digits-tiny", "--target", "cat", "--foil", "dog"],
            "digits-tiny: unknown class 'cat'",
        ),
    ],
)
def test_mistakes_are_refused_first(
    run: Run, images: list[object], tmp_path: Path, options: list[object], message: str
) -> None:
    result = run("compare-models", *options, *images, "--quiet", "--out", tmp_path / "new")
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "new").exists()

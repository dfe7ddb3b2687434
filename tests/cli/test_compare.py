"""`compare`: a table, a plot and a file, after each method anew."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from circuitvit.cli.compare import FILES
from circuitvit.pruning.curves import family_curve
from circuitvit.views import Comparison
from tests.cli.cases import Run

SHORT = ["--sizes", "5%,20%,1", "--trained", "20%", "--mask-steps", 5, "--held-out", 0.34]


def test_compare_writes_a_table_and_a_plot(run: Run, behaviour: list[object], tmp_path: Path) -> None:
    methods = ["--method", "eap", "--method", "learned"]
    result = run("compare", *behaviour, *methods, *SHORT, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == set(FILES)
    comparison = Comparison.load(tmp_path / "comparison.json")
    assert comparison.held_out
    assert [point.fraction for point in comparison["eap"].points] == [0.05, 0.2, 1.0]
    for each in comparison.curves:
        (line,) = [line for line in result.stdout.splitlines() if line.startswith(f"{each.method} ")]
        assert f"{each.curve.cpr:.3f}" in line
    assert "Faithfulness by size on 2 pairs" in result.stdout


def test_without_held_out_pairs_it_says_so(run: Run, behaviour: list[object], tmp_path: Path) -> None:
    result = run("compare", *behaviour, "--method", "eap", "--sizes", "0.5,1", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "note: no held-out pairs: the curves are optimistic" in result.stderr


def test_interrupted_it_keeps_what_it_has_and_goes_on(
    run: Run, behaviour: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def curve(method: str, *arguments: object) -> object:
        made.append(method)
        if len(made) == 2:
            raise KeyboardInterrupt
        return family_curve(method, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(importlib.import_module("circuitvit.views.comparison"), "family_curve", curve)
    command = ["compare", *behaviour, "--method", "eap", "--method", "eap-ig", *SHORT, "--out", tmp_path]
    stopped = run(*command)
    assert stopped.exit_code == 130
    assert f"saved in {tmp_path}: {', '.join(FILES)}" in stopped.stderr
    assert [each.method for each in Comparison.load(tmp_path / "comparison.json").curves] == ["eap"]
    resumed = run(*command, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert made == ["eap", "eap-ig", "eap-ig"]
    assert [each.method for each in Comparison.load(tmp_path / "comparison.json").curves] == ["eap", "eap-ig"]
    other = run(*command, "--resume", "--steps", 7)
    assert other.exit_code == 2
    assert "another model, another task" in other.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "lerned"], "learned"),
        (["--sizes", "0.1,2"], "--sizes takes shares of all edges"),
        (["--trained", "abc"], "--trained takes shares of all edges"),
        (["--by", "size"], "ranking"),
        (["--direction", "denoising"], "leave out --direction denoising"),
        (["--held-out", 0], "--held-out is a share of the pairs"),
    ],
)
def test_mistakes_are_refused_first(
    run: Run, behaviour: list[object], tmp_path: Path, options: list[object], message: str
) -> None:
    result = run("compare", *behaviour, *options, "--out", tmp_path / "new")
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "new").exists()

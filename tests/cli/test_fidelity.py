"""What the commands say of how right their scores are."""

from __future__ import annotations

from pathlib import Path

import pytest

from circuitvit.graph import Circuit, EdgeScores
from circuitvit.verification import Report
from tests.cli.cases import Run


def flat(text: str) -> str:
    return " ".join(text.split())


def test_auto_says_what_it_chose_and_how_right_it_is(
    run: Run, behaviour: list[object], tmp_path: Path
) -> None:
    """A budget that buys a part of the exact effects only."""
    options = ["--method", "auto", "--budget", "60", "--calibrate", "30", "--out", tmp_path]
    result = run("attribute", *behaviour, *options)
    assert result.exit_code == 0, result.output
    scores = EdgeScores.load(tmp_path / "scores.json")
    assert scores.method == "hybrid"
    assert scores.fidelity is not None
    text = flat(result.stdout)
    assert "Scored by hybrid: exact effects cost about" in text
    assert f"hybrid: {scores.fidelity.sentence}" in text


def test_scores_are_checked_when_asked(run: Run, behaviour: list[object], tmp_path: Path) -> None:
    result = run("attribute", *behaviour, "--calibrate", "40", "--out", tmp_path)
    fidelity = EdgeScores.load(tmp_path / "scores.json").fidelity
    assert fidelity is not None
    assert fidelity.n_measured == 40
    assert flat(f"local: {fidelity.sentence}") in flat(result.stdout)
    run("attribute", *behaviour, "--out", tmp_path)
    assert EdgeScores.load(tmp_path / "scores.json").fidelity is None


def test_discover_says_in_one_sentence_how_right_the_scores_were(discovered: tuple[Path, object]) -> None:
    folder, result = discovered
    fidelity = EdgeScores.load(folder / "scores.json").fidelity
    assert fidelity is not None
    said = f"chosen by scores (eap). {fidelity.sentence}"
    assert any(said in caveat for caveat in Report.load(folder / "report.json").warnings)
    assert flat(said) in flat(result.stdout)  # type: ignore[attr-defined]
    kept = Circuit.load(folder / "circuit.json").provenance.parameters["fidelity"]
    assert kept["n_measured"] == fidelity.n_measured


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--method", "local", "--budget", "60s"], "--method local does not use --budget"),
        (["--method", "auto", "--budget", "a while"], "a budget is a number of forward-equivalents"),
        (["--calibrate", "5"], "--calibrate takes at least 30 edges"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_runs(
    run: Run, behaviour: list[object], tmp_path: Path, options: list[str], complaint: str
) -> None:
    for command in (["attribute"], ["discover", "--edges", "10", "--method", "eap"]):
        result = run(*command, *behaviour, *options, "--out", tmp_path)
        assert result.exit_code == 2
        assert complaint in flat(result.output)

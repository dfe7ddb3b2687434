"""The commands beside `discover`: attribute, verify, draw, demo."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from circuitvit.cli import demo as demo_command
from circuitvit.graph import Circuit, EdgeScores, Provenance
from circuitvit.verification import Report
from tests.cli.cases import Run


def test_attribute_writes_scores_and_prints_the_strongest(
    run: Run, behaviour: list[object], tmp_path: Path
) -> None:
    result = run("attribute", *behaviour, "--show", 4, "--out", tmp_path / "new")
    assert result.exit_code == 0, result.output
    scores = EdgeScores.load(tmp_path / "new" / "scores.json")
    assert scores.method == "local"
    for name, score in scores.strongest(4):
        (line,) = [line for line in result.stdout.splitlines() if line.startswith(f"{name} ")]
        assert f"{score:+.4g}" in line
        assert ("supports" if score < 0 else "opposes") in line
    assert max(line.count("█") for line in result.stdout.splitlines()) == 24


def test_attribute_of_a_denoising_task_turns_the_signs(
    run: Run, behaviour: list[object], tmp_path: Path
) -> None:
    result = run("attribute", *behaviour, "--direction", "denoising", "--show", 1, "--out", tmp_path)
    ((name, score),) = EdgeScores.load(tmp_path / "scores.json").strongest(1)
    (line,) = [line for line in result.stdout.splitlines() if line.startswith(f"{name} ")]
    assert ("supports" if score > 0 else "opposes") in line


def test_attribute_gives_shares_no_sign(run: Run, behaviour: list[object], tmp_path: Path) -> None:
    result = run("attribute", *behaviour, "--method", "ifr", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "score: the edge's share of what is read" in result.stdout
    scores = EdgeScores.load(tmp_path / "scores.json")
    for said in (result.stdout, scores._repr_html_()):
        assert "supports" not in said
        assert "opposes" not in said
    circuit = scores.top(5)
    assert circuit.provenance.shares_of == "what is read"
    assert circuit.with_scores(replace(scores, provenance=Provenance())).provenance.shares_of == ""


def test_verify_gives_the_same_figures_as_discover(
    run: Run, behaviour: list[object], discovered: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, _ = discovered
    result = run("verify", folder / "circuit.json", *behaviour, "--random", 5, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    found, again = Report.load(folder / "report.json"), Report.load(tmp_path / "report.json")
    assert again.headline.faithfulness.value == pytest.approx(found.task.faithfulness.value, abs=1e-5)
    assert f"faithfulness {again.headline.faithfulness}" in " ".join(result.stdout.split())
    assert (tmp_path / "report.md").is_file()
    assert f"open this: {tmp_path / 'circuit.html'}" in result.stdout
    assert "There are no held-out images" in (tmp_path / "circuit.html").read_text()


def test_verify_without_a_folder_writes_nothing(
    run: Run,
    behaviour: list[object],
    discovered: tuple[Path, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("verify", discovered[0] / "circuit.json", *behaviour, "--random", 0)
    assert result.exit_code == 0
    assert "wrote" not in result.stdout
    assert not list(tmp_path.iterdir())


def test_verify_says_once_that_a_circuit_was_found_on_other_weights(
    run: Run, behaviour: list[object], discovered: tuple[Path, Any], tmp_path: Path
) -> None:
    path = tmp_path / "circuit.json"
    text = (discovered[0] / "circuit.json").read_text()
    weights = Circuit.load(discovered[0] / "circuit.json").provenance.weights
    path.write_text(text.replace(weights, weights[:-64] + "0" * 64))
    result = run("verify", path, *behaviour, "--random", 0)
    assert result.exit_code == 0
    assert " ".join(result.output.split()).count("found on other weights (catdog-tiny, ") == 1


@pytest.mark.parametrize("ending", ["svg", "html", "dot", "graphml", "json"])
def test_draw_needs_no_model(run: Run, discovered: tuple[Path, Any], tmp_path: Path, ending: str) -> None:
    out = tmp_path / "new" / f"circuit.{ending}"
    result = run("draw", discovered[0] / "circuit.json", out)
    assert result.exit_code == 0, result.output
    assert out.stat().st_size > 1000
    assert f"wrote {out}" in result.stdout


def test_draw_takes_a_title_and_a_limit(run: Run, discovered: tuple[Path, Any], tmp_path: Path) -> None:
    circuit = discovered[0] / "circuit.json"
    run("draw", circuit, tmp_path / "all.svg")
    run("draw", circuit, tmp_path / "few.svg", "--title", "Cats & dogs", "--max-edges", 5)
    few = (tmp_path / "few.svg").read_text(encoding="utf-8")
    assert "Cats &amp; dogs" in few
    assert len(few) < len((tmp_path / "all.svg").read_text(encoding="utf-8"))


def test_draw_puts_images_and_the_report_on_the_page(
    run: Run, discovered: tuple[Path, Any], pairs: Path, tmp_path: Path
) -> None:
    circuit, page = discovered[0] / "circuit.json", tmp_path / "page.html"
    photos = ["--clean", pairs / "clean", "--corrupt", pairs / "corrupt"]
    more = ["--model", "catdog-tiny", *photos, "--image", 2, "--report", discovered[0] / "report.json"]
    result = run("draw", circuit, "--out", page, *more)
    assert result.exit_code == 0, result.output
    assert page.resolve().as_uri() in result.stdout
    text = page.read_text(encoding="utf-8")
    assert '"sides":{"clean":{"image":"data:image/png' in text
    assert '"corrupt":{"image":"data:image/png' in text
    assert 'id="report"' in text
    run("draw", circuit, "--out", page)
    plain = page.read_text(encoding="utf-8")
    assert '"maps":null' in plain
    assert 'id="report"' not in plain
    assert page.with_suffix(".svg").exists() is False
    run("draw", circuit, "--out", page.with_suffix(".svg"), "--model", "catdog-tiny", *photos)
    assert "<image" in page.with_suffix(".svg").read_text(encoding="utf-8")


def test_demo_admits_failure(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("PAIRS", 6), ("HELD_OUT_PAIRS", 6), ("RANDOM_CIRCUITS", 2), ("PLAN", "0,1,2")):
        monkeypatch.setattr(demo_command, name, value)
    result = run("demo", "--quiet", "--out", tmp_path)
    assert result.exit_code == 1
    assert "The circuit does not hold up" in result.stdout
    assert "of the edges; at most 15% were promised" in " ".join(result.stdout.split())
    assert (tmp_path / "circuit.svg").is_file()

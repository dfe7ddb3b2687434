"""`discover`: from files on a disk to files on a disk, by every method."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from circuitvit.attribution import attribute
from circuitvit.cli.discover import FILES
from circuitvit.graph import Circuit, EdgeScores
from circuitvit.models import load
from circuitvit.tasks import Task, logit_diff
from circuitvit.verification import Report
from tests.cli.cases import N_PAIRS, Run


def test_writes_all_files_whole(discovered: tuple[Path, Any]) -> None:
    folder, _ = discovered
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    circuit = Circuit.load(folder / "circuit.json")
    scores = EdgeScores.load(folder / "scores.json", circuit.graph)
    report = Report.load(folder / "report.json")
    assert circuit == scores.connected(80)
    assert report.size.edges == len(circuit) == len(circuit.pruned())
    assert report.held_out is not None
    assert report.held_out.n_pairs == N_PAIRS
    assert ElementTree.parse(folder / "circuit.svg").getroot().tag.endswith("svg")
    assert (folder / "circuit.dot").read_text(encoding="utf-8").startswith("digraph")
    assert "faithfulness" in (folder / "report.md").read_text(encoding="utf-8")
    page = (folder / "circuit.html").read_text(encoding="utf-8")
    assert f"{report.headline.faithfulness.value:.1%}" in page
    assert '"corrupt":{"image":"data:image/png' in page


def test_prints_the_figures_of_the_report(discovered: tuple[Path, Any]) -> None:
    folder, result = discovered
    report = Report.load(folder / "report.json")
    text = " ".join(result.stdout.split())
    assert "Circuit of catdog-tiny for logit_diff(cat, dog)" in text
    assert (
        f"{report.size.edges} of {report.size.graph_edges} ({report.size.density:.1%}; 80 asked for)" in text
    )
    assert f"faithfulness {report.headline.faithfulness} on {N_PAIRS} held-out pairs" in text
    assert f"necessity {report.headline.necessity}" in text
    for word in ("same top class", "random circuits", "time", "Caveats", *FILES):
        assert word in text
    assert result.stdout.endswith(f"in a browser: {(folder / 'circuit.html').resolve().as_uri()}\n")
    assert result.stderr == ""
    assert "\x1b" not in result.stdout


def test_provenance_repeats_the_search(discovered: tuple[Path, Any]) -> None:
    made = Circuit.load(discovered[0] / "circuit.json").provenance
    assert (made.model, made.method, made.parameters["asked"]) == ("catdog-tiny", "eap", 80)


@pytest.mark.parametrize(
    ("options", "selection"),
    [
        (["--method", "eap", "--threshold", "0.2"], lambda scores: scores.threshold(0.2)),
        (["--method", "eap", "--edges", "60", "--top"], lambda scores: scores.top(60)),
        (
            ["--method", "eap-ig", "--steps", "2", "--edges", "60", "--by", "signed"],
            lambda scores: scores.connected(60, by="signed"),
        ),
    ],
)
def test_selection_is_the_librarys(
    run: Run, behaviour: list[object], tmp_path: Path, options: list[str], selection: Any
) -> None:
    result = run("discover", *behaviour, *options, "--random", 0, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert Circuit.load(tmp_path / "circuit.json") == selection(EdgeScores.load(tmp_path / "scores.json"))


@pytest.fixture(scope="module")
def exact(pairs: Path) -> EdgeScores:
    """The exact effect of every edge on the drawn pairs."""
    task = Task(pairs / "clean", pairs / "corrupt", metric=logit_diff("cat", "dog"))
    return attribute(load("catdog-tiny"), task, "exact", progress=False)


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "find", "--plan", "30,20,4"],
        ["--method", "acdc", "--tau", "0.3", "--divergence", "metric"],
    ],
)
def test_searches_carry_exact_effects_of_their_own_edges(
    run: Run, behaviour: list[object], exact: EdgeScores, tmp_path: Path, options: list[str]
) -> None:
    result = run("discover", *behaviour, *options, "--random", 0, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    circuit = Circuit.load(tmp_path / "circuit.json")
    assert circuit.provenance.method == options[1]
    assert EdgeScores.load(tmp_path / "scores.json").method == "eap"
    assert circuit.values is not None
    np.testing.assert_allclose(circuit.values[circuit.kept], exact.values[circuit.kept], atol=1e-4)


def test_find_says_how_the_circuit_was_found(run: Run, behaviour: list[object], tmp_path: Path) -> None:
    result = run("discover", *behaviour, "--plan", "10,20,4", "--random", 0, "--out", tmp_path)
    assert "How it was found" in result.stdout
    assert "Edges were taken away" in result.stdout


def test_metrics_without_a_gradient_are_searched_too(
    run: Run, behaviour: list[object], tmp_path: Path
) -> None:
    without_classes = [*behaviour[:6], "--metric", "kl_divergence", "--quiet"]
    options = ["--method", "acdc", "--tau", "1", "--random", 0, "--out", tmp_path]
    result = run("discover", *without_classes, *options)
    assert result.exit_code == 0, result.output
    assert "note: scores.json holds the effects of the circuit's own edges only" in result.stderr
    assert EdgeScores.load(tmp_path / "scores.json").method == "exact (circuit edges only)"


def test_token_groups_and_other_ablations(run: Run, behaviour: list[object], tmp_path: Path) -> None:
    without_corrupt = [*behaviour[:4], *behaviour[6:]]
    options = ["--ablation", "zero", "--groups", "kind", "--method", "eap", "--edges", 200, "--random", 0]
    result = run("discover", *without_corrupt, *options, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert Circuit.load(tmp_path / "circuit.json").graph.groups == ("cls", "patch")


def test_options_reach_the_search(
    run: Run, behaviour: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def find(model: object, task: object, **options: Any) -> None:
        seen.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr("circuitvit.pruning.find", find)
    asked = ["--start", "whole", "--faithfulness", "0.8", "--within", "2m"]
    asked += ["--seed", "7", "--batch-size", "3", "--memory", "1GB"]
    result = run("discover", *behaviour, *asked, "--out", tmp_path / "new")
    expected = {"faithfulness": 0.8, "within": "2m", "seed": 7, "batch_size": 3}
    kept_in = tmp_path / "new" / "state.safetensors"
    assert seen == {**expected, "start": "whole", "memory": 10**9, "state": kept_in, "progress": False}
    assert result.exit_code == 130
    assert "interrupted: nothing has been saved" in result.stderr
    assert not (tmp_path / "new").exists()


def test_ctrl_c_tells_what_has_been_saved(
    run: Run, behaviour: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def verify(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("circuitvit.verification.verify", verify)
    (tmp_path / "report.md").write_text("older")
    result = run("discover", *behaviour, "--method", "eap", "--edges", 60, "--out", tmp_path)
    assert result.exit_code == 130
    saved = "circuit.json, scores.json, circuit.svg, circuit.dot"
    assert result.stderr == f"interrupted: saved in {tmp_path}: {saved}; from an earlier run: report.md\n"
    assert json.loads((tmp_path / "circuit.json").read_text())["edges"]


def test_full_memory_is_explained(
    run: Run, behaviour: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attribute(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr("circuitvit.attribution.attribute", attribute)
    result = run("discover", *behaviour, "--method", "eap", "--edges", 60, "--out", tmp_path)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: the memory is full: try --batch-size 1")


def test_a_share_of_the_pairs_is_held_out(run: Run, behaviour: list[object], tmp_path: Path) -> None:
    options = ["--method", "eap", "--edges", 80, "--random", 0, "--held-out", 0.34]
    result = run("discover", *behaviour, *options, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    report = Report.load(tmp_path / "report.json")
    assert report.held_out is not None
    assert (report.task.n_pairs, report.held_out.n_pairs) == (N_PAIRS - 2, 2)
    names = [{pair.clean for pair in section.pairs} for section in (report.task, report.held_out)]
    assert not names[0] & names[1]
    verified = run(
        "verify", tmp_path / "circuit.json", *behaviour, "--random", 0, "--held-out", 0.34, "--out", tmp_path
    )
    assert verified.exit_code == 0, verified.output
    again = Report.load(tmp_path / "report.json")
    assert again.held_out is not None
    assert [pair.clean for pair in again.held_out.pairs] == [pair.clean for pair in report.held_out.pairs]

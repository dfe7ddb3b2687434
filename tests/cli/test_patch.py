"""`circuitvit patch`: the table, the figure and the data are what `flip_search` and `patching_map` find."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

import circuitvit as cv
from circuitvit.verification.interventions import FlipSearch, PatchingMap
from tests.cli.cases import N_PAIRS, Run


@pytest.fixture(scope="module")
def task(pairs: Path) -> cv.Task:
    return cv.Task(pairs / "clean", pairs / "corrupt", cv.logit_diff("cat", "dog"))


def test_everything_that_was_found_is_told_and_written(
    run: Run, behaviour: list[object], task: cv.Task, tmp_path: Path
) -> None:
    names = [tmp_path / f"patch.{ending}" for ending in ("json", "csv", "svg")]
    outs = [each for name in names for each in ("--out", name)]
    result = run("patch", *behaviour, "--site", "mlps", "--tokens", "all", "--least", "0.4", *outs)
    assert result.exit_code == 0, result.output
    own = cv.flip_search(cv.load("catdog-tiny"), task, site="mlps", tokens="all", least=0.4, progress=False)
    saved = FlipSearch.load(names[0])
    assert saved.flips == own.flips
    np.testing.assert_allclose(saved.map.values, own.map.values, atol=1e-5)
    rows = list(csv.DictReader(names[1].open()))
    assert len(rows) == own.map.values.size == 4 * N_PAIRS
    assert "<svg" in names[2].read_text()
    row, _ = np.unravel_index(int(np.abs(own.map.effect).argmax()), own.map.effect.shape)
    first = result.stdout.splitlines()[2]
    assert first.startswith(f"{own.map.rows[row]} at all")
    assert f"{own.map.effect[row, 0]:+.3f}" in first
    assert " ".join(str(own).split()) in " ".join(result.stdout.split())


def test_one_component_at_every_token(run: Run, behaviour: list[object], tmp_path: Path) -> None:
    out = tmp_path / "row.json"
    result = run("patch", *behaviour, "--row", "a2.h3", "--tokens", "each", "--out", out)
    assert result.exit_code == 0, result.output
    found = PatchingMap.load(out)
    assert (found.rows, len(found.columns)) == (("a2.h3",), 37)
    assert json.loads(out.read_text())["site"] == "heads"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--out", "patch.txt"), ".csv"),
        (("--ablation", "mean"), "leave out --ablation"),
        (("--site", "hedas"), "heads"),
        (("--row", "a9.h9"), "a9.h9"),
        (("--batch-size", "0"), "--batch-size"),
        (("--memory", "much"), "--memory"),
    ],
)
def test_what_makes_no_sense_is_refused(
    run: Run, behaviour: list[object], tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    given = options if "--out" in options else (*options, "--out", tmp_path / "x.json")
    result = run("patch", *behaviour, *given)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not list(tmp_path.iterdir())

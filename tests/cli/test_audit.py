"""`audit`: from folders that anybody can make to a page."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

import circuitvit as cv
from circuitvit.cli.audit import CIRCUITS, FILES
from tests.cli.cases import N_PAIRS, Run


@pytest.fixture(scope="module")
def folders(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`cue/clean` and `cue/changed`, and `groups/GROUP/CLASS`: the light is a little dimmer."""
    folder = tmp_path_factory.mktemp("audit")
    for name in ("cue/clean", "cue/changed"):
        shutil.copytree(pairs / "clean", folder / name)
    for path in (folder / "cue" / "changed").iterdir():
        Image.open(path).point(lambda value: value - value // 16).save(path)
    for group in ("indoors", "outdoors"):
        for label, side in (("cat", "clean"), ("hound", "corrupt")):
            shutil.copytree(pairs / side, folder / "groups" / group / label)
    return folder


def test_it_writes_a_page_and_numbers(
    run: Run, behaviour: list[object], folders: Path, tmp_path: Path
) -> None:
    edges = cv.Circuit.full(cv.load("catdog-tiny").graph).save(tmp_path / "circuit.json")
    result = run(
        "audit", *behaviour, "--cue", folders / "cue", "--groups", folders / "groups", "--name", "the light",
        "--label", "hound=dog", "--date", "2026-11-22", "--cue-circuit", edges, "--behaviour-circuit", edges,
        "--elsewhere", folders / "groups" / "indoors", "--out", tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*FILES, *CIRCUITS}
    found = cv.Audit.load(tmp_path / "out" / "audit.json")
    assert found.date == "2026-11-22"
    assert 0 < abs(found.cue_effect.value) < 0.2 * found.behaviour_effect.value
    assert {each.name: each.n for each in found.groups}["outdoors, hound"] == N_PAIRS
    assert "Every edge of the cue's circuit is one of the behaviour's" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--label", "hound"], "NAME=CLASS"),
        (["--cue-circuit", "x.json"], "give both"),
        (["--cue", "nowhere"], "no folder nowhere/clean"),
        (["--elsewhere", "a/x", "--elsewhere", "b/x"], "the same name"),
    ],
)
def test_what_makes_no_sense_is_refused_first(
    run: Run, behaviour: list[object], folders: Path, option: list[str], said: str
) -> None:
    asked = ["--cue", folders / "cue", "--groups", folders / "groups", "--label", "hound=dog", *option]
    result = run("audit", *behaviour, *asked)
    assert result.exit_code == 2
    assert said in result.stderr

"""`circuitvit verify hypotheses.yaml`, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

import circuitvit as cv
from circuitvit.cli.program import app
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.errors import FileError
from circuitvit.verification.hypothesis_file import read_hypotheses

CLAIMS = """
schema: circuitvit.hypotheses/1
model: {name: catdog-tiny}
task: {clean: cats, corrupt: dogs, target: cat, foil: dog}
hypotheses:
  - {claim: all of it, edges: "* -> logits", expect: {falls_by: 1}, verdict: supported}
  - {claim: nothing at all, edges: input -> logits, expect: {changes_less_than: 0.001}, verdict: supported}
"""


@pytest.fixture
def claims(tmp_path: Path) -> Path:
    pairs = catdog_pairs(6, seed=1, preprocessed=False)
    for folder, pictures in (("cats", pairs.clean), ("dogs", pairs.corrupt)):
        (tmp_path / folder).mkdir()
        for number, picture in enumerate(pictures):
            pixels = (picture * 255).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(tmp_path / folder / f"{number}.png")
    path = tmp_path / "claims.yaml"
    path.write_text(CLAIMS)
    return path


def test_claims_are_tested_and_written(claims: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["verify", str(claims), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "supported" in done.output
    content = json.loads((out / "hypotheses.json").read_text())
    assert [each["verdict"] for each in content["verdicts"]] == ["supported", "supported"]
    text = (out / "hypotheses.md").read_text()
    assert text.startswith("# Hypotheses\n\n- **Supported**: all of it.")


def test_an_unexpected_verdict_is_said_and_ends_with_1(claims: Path) -> None:
    claims.write_text(CLAIMS.replace("falls_by: 1}, verdict: supported", "falls_by: 1}, verdict: refuted"))
    done = CliRunner().invoke(app, ["verify", str(claims)])
    assert done.exit_code == 1
    assert "expects 'refuted', found 'supported'" in " ".join(done.output.split())


def test_images_given_as_options_go_first_and_gaps_are_named(claims: Path) -> None:
    folder = claims.parent
    one = ["--clean", str(folder / "cats" / "0.png"), "--corrupt", str(folder / "dogs" / "0.png")]
    done = CliRunner().invoke(app, ["verify", str(claims), *one])
    assert "about this pair" in " ".join(done.output.split())
    claims.write_text(CLAIMS.replace("model: {name: catdog-tiny}\n", ""))
    refused = CliRunner().invoke(app, ["verify", str(claims)])
    assert refused.exit_code == 2
    assert "names no model" in refused.output
    claims.write_text(CLAIMS.replace("clean: cats, corrupt: dogs, ", ""))
    refused = CliRunner().invoke(app, ["verify", str(claims)])
    assert "names no images" in refused.output


def test_a_file_says_how_folders_are_paired_and_names_groups(claims: Path) -> None:
    said = "task: {clean: cats, corrupt: dogs, pair: order, target: 'group:cat', foil: 'group:dog'}"
    claims.write_text(CLAIMS.replace("task: {clean: cats, corrupt: dogs, target: cat, foil: dog}", said))
    task = read_hypotheses(claims).task
    assert task is not None
    prepared = task.prepare(cv.load("catdog-tiny"))
    assert prepared.label == "6 pairs, logit_diff(cat, dog), patch ablation, noising"
    assert "in the order of their names" in prepared.pairing
    claims.write_text(claims.read_text().replace("pair: order", "pair: size"))
    with pytest.raises(FileError, match="pair"):
        read_hypotheses(claims)

"""Models without classes on the command line: similarity and projection, and heads from files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import circuitvit as cv
from circuitvit.graph import EdgeScores
from circuitvit.models.zoo import load_zoo_module
from tests.cli.cases import Run
from tests.cli.test_refusals import assert_refused

ARCH = {
    "img_size": 48, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4, "mlp_ratio": 2.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model's weights as a checkpoint, a head for its features, and a direction."""
    folder = tmp_path_factory.mktemp("features")
    torch.save(load_zoo_module("catdog-tiny").state_dict(), folder / "weights.pt")
    drawn = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
    np.save(folder / "direction.npy", drawn[0] - drawn[1])
    model = cv.with_head(cv.load("catdog-tiny"), drawn, classes=("tame", "wild"))
    assert model.head is not None
    model.head.save(folder / "head.safetensors")
    return folder


@pytest.fixture
def features(folder: Path, pairs: Path) -> list[object]:
    """Options for the bundled model without its classifier, on the drawn pairs."""
    named = [part for key, value in ARCH.items() for part in ("--arch", f"{key}={value}")]
    model = ["--model", "vit_tiny_patch16_224", "--checkpoint", folder / "weights.pt", *named]
    images = ["--clean", pairs / "clean", "--corrupt", pairs / "corrupt", "--quiet"]
    return [*model, "--arch", "num_classes=0", *images]


@pytest.mark.parametrize("metric", ["similarity", "projection"])
def test_a_metric_of_features(
    run: Run, folder: Path, pairs: Path, features: list[object], tmp_path: Path, metric: str
) -> None:
    to = pairs / "corrupt" / "0.png" if metric == "similarity" else folder / "direction.npy"
    out = ["--method", "eap", "--edges", "200", "--random", "2", "--out", tmp_path]
    result = run("discover", *features, "--metric", metric, "--to", to, *out)
    assert result.exit_code == 0, result.output
    assert f"{metric}({to.name})" in result.stdout
    assert "same top class" not in result.stdout
    assert f"{metric}({to.name})" in json.loads((tmp_path / "circuit.json").read_text())["provenance"]["task"]


def test_a_head_from_a_file_is_checked_again(
    run: Run, folder: Path, features: list[object], tmp_path: Path
) -> None:
    head = ["--head", folder / "head.safetensors", "--target", "tame", "--foil", "wild"]
    result = run("attribute", *features, *head, "--method", "eap", "--calibrate", "0", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    circuit = EdgeScores.load(tmp_path / "scores.json").connected(200)
    circuit.save(tmp_path / "circuit.json")
    again = run("verify", tmp_path / "circuit.json", *features, *head, "--random", "2")
    assert again.exit_code == 0, again.output
    assert "logit_diff(tame, wild)" in again.stdout
    assert "other weights" not in again.stderr


def test_what_to_compare_with_stands_in_a_file_of_claims(
    run: Run, folder: Path, pairs: Path, features: list[object], tmp_path: Path
) -> None:
    claims = {
        "schema": "circuitvit.hypotheses/1",
        "task": {
            "clean": str(pairs / "clean"), "corrupt": str(pairs / "corrupt"),
            "metric": "projection", "to": str(folder / "direction.npy"),
        },
        "hypotheses": [{"claim": "everything matters", "edges": "* -> *", "expect": {"falls_by": 0.0}}],
    }  # fmt: skip
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump(claims))
    result = run("verify", tmp_path / "claims.yaml", *features)
    assert "everything matters" in result.stdout, result.output


def test_refusals(run: Run, folder: Path, pairs: Path, features: list[object], tmp_path: Path) -> None:
    out = ["--method", "eap", "--edges", "20", "--out", tmp_path / "out"]
    image = pairs / "clean" / "0.png"
    for given, message in (
        (["--target", "0", "--foil", "1"], "has no classes"),
        (["--metric", "logit_diff", "--to", image], "logit_diff compares with no file: leave out --to"),
        (["--metric", "similarity", "--target", "0"], "similarity has no target"),
        (["--metric", "similarity", "--to", "missing.png"], "no image missing.png"),
        (["--metric", "similarity"], "flat at the clean run"),
        (["--metric", "projection"], "needs a direction"),
        (["--metric", "projection", "--to", image], "and not an image"),
        (["--head", image], "is no head"),
        (["--head", "missing.safetensors"], "cannot read the head"),
    ):
        assert_refused(run("discover", *features, *given, *out), message)

"""The command line on a real ImageNet model and photographs."""

from __future__ import annotations

from pathlib import Path

from circuitvit.graph import Circuit, EdgeScores
from circuitvit.verification import Report
from tests.cli.cases import Run


def photographs(shared_data: Path) -> list[object]:
    """Options for the cat-dog problem on the real ViT-Ti/16."""
    images = shared_data / "images" / "catdog"
    return [
        "--model", "vit_tiny_patch16_224",
        "--checkpoint", shared_data / "weights" / "vit_tiny_patch16_224.safetensors",
        "--clean", images / "prisma_crop_dog.jpeg", "--corrupt", images / "prisma_crop_cat.png", "--quiet",
    ]  # fmt: skip


def test_discover(run: Run, shared_data: Path, tmp_path: Path) -> None:
    classes = ["--target", "tabby", "--foil", "Border collie"]
    options = ["--method", "eap", "--edges", 400, "--random", 2, "--out", tmp_path]
    result = run("discover", *photographs(shared_data), *classes, *options)
    assert result.exit_code == 0, result.output
    assert "Circuit of vit_tiny_patch16_224 for logit_diff(tabby, Border collie)" in result.stdout
    circuit = Circuit.load(tmp_path / "circuit.json")
    assert circuit == EdgeScores.load(tmp_path / "scores.json").connected(400)
    assert Report.load(tmp_path / "report.json").size.graph_edges == 2845


def test_a_class_that_is_nearly_right(run: Run, shared_data: Path, tmp_path: Path) -> None:
    options = ["--target", "tabbi", "--foil", "Border collie", "--out", tmp_path / "new"]
    result = run("discover", *photographs(shared_data), *options)
    assert result.exit_code == 2
    assert "unknown class 'tabbi': did you mean 'tabby'" in result.stderr
    assert not (tmp_path / "new").exists()

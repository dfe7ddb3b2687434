"""The command line on clips: files of frames, and counterfactuals that it makes itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from circuitvit.models.families.hf_load import import_transformers
from tests.cli.cases import Run

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A micro VideoMAE as transformers saves it, and four clips of noise."""
    folder = tmp_path_factory.mktemp("video")
    transformers = import_transformers()
    config = transformers.VideoMAEConfig(
        image_size=16, patch_size=8, num_frames=4, tubelet_size=2, hidden_size=24, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=48, num_labels=2, id2label={0: "to", 1: "fro"},
    )  # fmt: skip
    torch.manual_seed(0)
    module = transformers.VideoMAEForVideoClassification(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    module.save_pretrained(folder / "model")
    (folder / "clips").mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (6, 20, 24, 3), dtype=np.uint8)
        np.savez(folder / "clips" / f"{number}.npz", frames=pixels)
    return folder


def options(folder: Path, *others: object) -> list[object]:
    return ["--model", f"hf:{folder / 'model'}", "--target", "to", "--foil", "fro", "--quiet", *others]


def test_scores_of_reversed_clips(run: Run, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = options(folder, "--clean", folder / "clips", "--corruption", "reverse", "--groups", "frame")
    result = run("attribute", *given, "--method", "eap", "--out", out)
    assert result.exit_code == 0, result.output
    assert '"frame1"' in (out / "scores.json").read_text()


def test_a_lens_of_one_clip(run: Run, folder: Path, tmp_path: Path) -> None:
    given = ["--model", f"hf:{folder / 'model'}", folder / "clips" / "0.npz", "--out", tmp_path / "view.png"]
    for command in (["lens"], ["attention", "--query", "1,0,1"]):
        result = run("view", *command, *given)
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (("--corruption", "revers"), "did you mean 'reverse'"),
        (("--corruption", "reverse", "--corrupt", "x.npz"), "either --corrupt or --corruption"),
        ((), "--corruption to make them"),
        (("--corrupt", "photo.png"), "photo.png is an image, and the model takes clips"),
    ],
)
def test_refusals_are_sentences(run: Run, folder: Path, changes: tuple[Any, ...], complaint: str) -> None:
    result = run("attribute", *options(folder, "--clean", folder / "clips" / "1.npz", *changes))
    assert result.exit_code != 0
    assert complaint in " ".join(result.output.split())


def test_the_same_clip_twice_is_no_behaviour(run: Run, folder: Path, tmp_path: Path) -> None:
    clip = folder / "clips" / "0.npz"
    result = run(
        "attribute", *options(folder, "--clean", clip, "--corrupt", clip), "--out", tmp_path / "s.json"
    )
    assert result.exit_code != 0
    assert "is nothing for a circuit to explain" in " ".join(result.output.split())

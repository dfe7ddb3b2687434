"""`--prompt` and `--template`: sentences as classes of any command that loads a model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import circuitvit as cv
from circuitvit.cli.program import app
from circuitvit.export.picture import picture_of
from tests.hf_models import hf
from tests.models.test_clip import of_transformers

CAT, DOGS = "a cat", "two dogs, and a cat"
PROMPTS = ["--prompt", CAT, "--prompt", DOGS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP with its tokenizer, and two images."""
    path, case = tmp_path_factory.mktemp("prompts"), of_transformers()
    square = {"height": 32, "width": 32}
    processor = hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=square)
    for part in (case.module.float(), case.tokenizer, processor):
        part.save_pretrained(path / "clip")
    rng = np.random.default_rng(0)
    for name in ("clean", "corrupt"):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path / f"{name}.png")
    return path


def command(folder: Path, *arguments: str) -> str:
    pair = ["--clean", str(folder / "clean.png"), "--corrupt", str(folder / "corrupt.png"), "--quiet"]
    model = ["--model", f"hf:{folder / 'clip'}"]
    return " ".join(CliRunner().invoke(app, [*arguments, *model, *pair]).output.split())


def test_prompts_stand_in_what_is_saved_and_are_taken_from_there(folder: Path) -> None:
    out = folder / "out"
    few = ["--method", "eap", "--edges", "10", "--random", "0", "--out", str(out)]
    said = command(folder, "discover", *PROMPTS, "--target", CAT, "--foil", DOGS, *few)
    assert f"logit_diff({CAT}, {DOGS})" in said, said
    origin = json.loads((out / "circuit.json").read_text())["provenance"]
    assert origin["prompts"] == [CAT, DOGS]
    assert "templates" not in origin
    report = (out / "report.md").read_text()
    assert f"The classes are prompts: {CAT}; {DOGS}." in report
    assert f".with_prompts([{CAT!r}, {DOGS!r}])" in report
    circuit = str(out / "circuit.json")
    again = command(folder, "verify", circuit, "--target", CAT, "--foil", DOGS, "--random", "0")
    assert f"prompts, as the circuit's file says: {CAT}; {DOGS}" in again
    assert "other weights" not in again
    other = command(
        folder,
        "verify",
        circuit,
        "--prompt",
        "a",
        "--prompt",
        "b",
        "--target",
        "a",
        "--foil",
        "b",
        "--random",
        "0",
    )
    assert f"found with other prompts ({CAT}; {DOGS}) than these (a; b)" in other
    claims = folder / "claims.yaml"
    claims.write_text(
        f"schema: circuitvit.hypotheses/1\nmodel: {{prompts: ['{CAT}', '{DOGS}']}}\n"
        "hypotheses: [{claim: it is seen, edges: m0 -> logits, expect: {falls_by: 0.5}}]\n"
    )
    assert "1 claims about hf:" in command(folder, "verify", str(claims), "--target", CAT, "--foil", DOGS)


def test_names_are_put_in_templates_and_these_are_saved_too(folder: Path) -> None:
    model = cv.load(f"hf:{folder / 'clip'}").with_prompts(["cat", "dog"], ["a {}", "two {}s"])
    task = cv.Task(folder / "clean.png", folder / "corrupt.png", cv.logit_diff("cat", "dog"))
    origin = cv.attribute(model, task, "eap", progress=False).provenance
    assert (origin.prompts, origin.templates) == (("cat", "dog"), ("a {}", "two {}s"))
    assert origin.about() == "cat; dog, in the templates a {}; two {}s"
    assert "cat; dog, in the templates" in picture_of(cv.attribute(model, task, "eap").connected(3)).origin


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--template", "a {}"], "--template takes names, and there are none: give each with --prompt"),
        ([*PROMPTS, "--classes", "names.txt"], "--prompt says what the classes are, and so does --classes"),
        ([*PROMPTS, "--target", "cat"], f"did you mean '{CAT}' or '{DOGS}'? A prompt is named as a whole"),
        ([*PROMPTS, "--target", "owl"], "unknown prompt 'owl': choose from"),
        (["--prompt", CAT, "--prompt", "cat " * 40], "tokens, start and end among them"),
    ],
)
def test_what_cannot_be_is_told(folder: Path, arguments: list[str], message: str) -> None:
    assert message in command(folder, "discover", *arguments, "--out", str(folder / "no"))

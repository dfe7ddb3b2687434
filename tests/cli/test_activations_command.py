"""`circuitvit activations`: the names that there are, and values streamed into a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import circuitvit as cv
from circuitvit.engine import Activations
from tests.cli.cases import N_PAIRS, Run

MODEL = ("activations", "--model", "catdog-tiny")


def test_the_sites_are_listed_with_shapes(run: Run) -> None:
    result = run(*MODEL, "--list", "--site", "a1.h0", "--site", "resid*")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["a1.h0.pattern", "37", "x", "37", "query,", "key", "share", "of", "attention"] in lines
    assert "12 sites of catdog-tiny" in result.stdout


def test_values_in_the_file_are_those_of_the_library(run: Run, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "acts.safetensors"
    sites = ("--site", "resid*", "--site", "logits", "--site", "a2.h1.pattern@cls->patch")
    result = run(
        *MODEL, pairs / "clean", *sites, "--tokens", "cls", "--batch-size", 4, "--out", out, "--quiet"
    )
    assert result.exit_code == 0, result.output
    found, model = Activations.load(out), cv.load("catdog-tiny")
    names = ["resid*", "logits", "a2.h1.pattern@cls->patch"]
    own = model.activations(pairs / "clean", names, tokens="cls", progress=False)
    assert list(found) == list(own)
    assert all(torch.allclose(found[name], own[name], atol=1e-6) for name in own)
    assert "resid0" in result.stdout
    assert f"{N_PAIRS} x 1 x 64" in result.stdout
    assert str(out) in result.stdout
    again = run(*MODEL, pairs / "clean", *sites, "--tokens", "cls", "--out", out, "--quiet")
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--site"),
        (("--site", "logits"), "--list"),
        (("{clean}", "--site", "logits"), "--out"),
        (("{clean}", "--site", "logits", "--out", "x.csv"), ".safetensors"),
        (("{clean}", "--list"), "--list reads no images"),
        (("{clean}", "--site", "resdi1", "--out", "{out}"), "resid1"),
        (("{clean}", "--site", "resid1", "--tokens", "clss", "--out", "{out}"), "clss"),
        (
            ("{clean}", "--site", "resid1", "--out", "{clean}/0.safetensors", "--batch-size", "0"),
            "--batch-size",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(
    run: Run, pairs: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    places = {"clean": pairs / "clean", "out": tmp_path / "x.safetensors"}
    result = run(*MODEL, *(each.format(**places) for each in options))
    assert result.exit_code == 2
    assert message in result.stderr
    assert not list(tmp_path.iterdir())

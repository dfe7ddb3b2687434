"""`circuitvit view`: every command writes its picture, and refuses in a sentence what cannot be drawn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import circuitvit as cv
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.errors import DataError, FileError, NameNotFoundError, OptionError
from tests.views.commands import run, save_pictures

MODEL = ("--model", "catdog-tiny")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pictures = catdog_pairs(4, seed=0, preprocessed=False).clean
    return save_pictures(tmp_path_factory.mktemp("photos"), pictures)


@pytest.mark.parametrize(
    ("command", "options", "said"),
    [
        ("lens", ("--image", "1"), "layer 3"),
        ("lens", ("--symbols", "names", "--position", "layer 1", "--no-picture"), "layer 3"),
        ("attribution", ("--target", "cat", "--foil", "dog"), "sum "),
        ("attribution", ("--target", "cat", "--image", "2", "--no-picture"), "logits "),
        ("attention", ("--layer", "1", "--query", "2,3"), "heads of layer 1"),
        ("positions", ("--at-least", "0.1"), "Heads that go by position"),
        ("evidence", ("--target", "cat", "--target", "dog"), "4 images"),
        ("evidence", ("--target", "cat", "--by", "attribution"), "direct attribution"),
    ],
)
def test_each_view_is_written(
    command: str, options: tuple[str, ...], said: str, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "view.png"
    assert said in run(command, *MODEL, photos, *options, "--out", out)
    assert out.read_bytes().startswith(b"\x89PNG")


def test_a_lens_is_a_page_or_a_text_too(photos: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"0": "C", "dog": "D", "2": "R", "3": "B"}))
    run("lens", *MODEL, photos / "0.png", "--symbols", table, "--out", tmp_path / "lens.txt")
    text = (tmp_path / "lens.txt").read_text()
    assert text.startswith("embedding\n")
    assert set("".join(text.split("\n\n")[-1].splitlines()[1:])) <= set("CDRB ")
    run("lens", *MODEL, photos / "0.png", "--symbols", "names", "--out", tmp_path / "lens.html")
    assert "\N{CAT FACE}" in (tmp_path / "lens.html").read_text(encoding="utf-8")


def test_shares_are_numbers_too(photos: Path, tmp_path: Path) -> None:
    run("attribution", *MODEL, photos, "--target", "cat", "--foil", "dog", "--out", tmp_path / "a.json")
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["label"] == "cat - dog"
    assert {"input", "a0.h0", "m0", "head.bias"} <= set(content["shares"])


def test_a_heat_map_needs_scores_alone(tmp_path: Path) -> None:
    model, pairs = cv.load("catdog-tiny"), catdog_pairs(4, seed=0)
    task = cv.Task(pairs.clean, pairs.corrupt, cv.logit_diff("cat", "dog"))
    cv.attribute(model, task, "eap", progress=False).save(tmp_path / "scores.json")
    run("heatmap", tmp_path / "scores.json", "--by", "magnitude", "--out", tmp_path / "heat.svg")
    assert "<svg" in (tmp_path / "heat.svg").read_text()


def test_contributions_are_written_as_numbers(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "classes" / "cat")
    run("contributions", *MODEL, photos, "--out", tmp_path / "parts.json")
    assert cv.views.Decomposition.load(tmp_path / "parts.json").heads[0] == "a0.h0"
    run("accuracy", *MODEL, tmp_path / "classes", "--ablate", "a2.h1, m3", "--out", tmp_path / "without.csv")
    assert '"a2.h1, m3",2,' in (tmp_path / "without.csv").read_text()
    with pytest.raises(DataError, match="8 or more"):
        run("words", *MODEL, photos, "--out", tmp_path / "words.png")


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (("lens", "{}/0.png", "--out", "lens.bmp"), OptionError, "--out ends in"),
        (("lens", "{}/missing.png"), DataError, "missing.png"),
        (("lens", "{}/0.png", "--position", "layr 1"), NameNotFoundError, "did you mean"),
        (("lens", "{}/0.png", "--image", "3"), OptionError, "there is no image 3"),
        (("lens", "{}/0.png", "--symbols", "{}/no.json"), FileError, "no.json"),
        (("attribution", "{}", "--target", "cta"), NameNotFoundError, "did you mean 'cat'"),
        (("attribution", "{}", "--target", "group:animal", "--foil", "dog"), OptionError, "share dog"),
        (("attention", "{}", "--query", "2,3,4"), OptionError, "there is no patch"),
        (("positions", "{}/0.png"), DataError, "at least 2"),
        (("evidence", "{}", "--target", "cat", "--by", "lense"), NameNotFoundError, "did you mean 'lens'"),
    ],
)
def test_refusals_are_sentences(
    arguments: tuple[str, ...], kind: type[Exception], message: str, photos: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    command, *rest = (each.replace("{}", str(photos)) for each in arguments)
    with pytest.raises(kind, match=message):
        run(command, *MODEL, *rest)
    assert not list(tmp_path.iterdir())

"""`draw`: the ending chooses the format, and a file is written whole or not at all."""

from __future__ import annotations

import builtins
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import circuitvit as cv
from circuitvit.errors import FileError, OptionError
from circuitvit.export import FORMATS, draw
from circuitvit.graph import Circuit
from circuitvit.graph.eap_ig import transformer_graph
from tests.export.cases import random_circuit, random_scores

CIRCUIT = random_circuit(3, 2, 20)
PAINTED = ("pdf", "png")
STARTS = {
    "html": b"<!doctype html>",
    "htm": b"<!doctype html>",
    "tex": b"% Circuit of vit",
    "tikz": b"% Circuit of vit",
    "svg": b"<?xml",
    "dot": b"digraph",
    "gv": b"digraph",
    "pdf": b"%PDF",
    "png": b"\x89PNG",
    "graphml": b"<graphml",
    "json": b"{",
}


@pytest.mark.parametrize("ending", FORMATS)
def test_the_ending_chooses_the_format(ending: str, tmp_path: Path) -> None:
    if ending in PAINTED:
        pytest.importorskip("matplotlib")
    path = draw(CIRCUIT, tmp_path / f"circuit.{ending.upper()}")
    assert path == tmp_path / f"circuit.{ending.upper()}"
    assert path.read_bytes().startswith(STARTS[ending])
    assert list(tmp_path.iterdir()) == [path]


def test_the_format_can_be_said_apart_from_the_ending(tmp_path: Path) -> None:
    assert draw(CIRCUIT, tmp_path / "circuit", format="svg").read_bytes().startswith(b"<?xml")
    assert draw(CIRCUIT, tmp_path / "circuit.txt", format=".DOT").read_bytes().startswith(b"digraph")


def test_a_circuit_draws_itself(tmp_path: Path) -> None:
    path = CIRCUIT.draw(str(tmp_path / "circuit.svg"), title="By itself", max_edges=5)
    assert "By itself" in path.read_text(encoding="utf-8")


def test_json_is_the_circuit_itself(tmp_path: Path) -> None:
    path = draw(CIRCUIT, tmp_path / "circuit.json")
    assert Circuit.load(path) == CIRCUIT
    assert json.loads(path.read_text())["edges"] == list(CIRCUIT)


@pytest.mark.parametrize("name", ["circuit.bmp", "circuit.svg.zip", "circuit", ".svg", "circuit."])
def test_an_unknown_ending_is_refused_and_the_known_ones_listed(name: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError) as caught:
        draw(CIRCUIT, tmp_path / name)
    assert ".html, .svg, .pdf, .png, .dot, .tex, .gv, .htm, .tikz, .graphml, .json" in str(caught.value)


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    for ending in ("html", "svg", "dot", "tex", "graphml", "json"):
        with pytest.raises(FileError, match=r"no folder .*nowhere"):
            draw(CIRCUIT, tmp_path / "nowhere" / f"circuit.{ending}")


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(FileError, match="cannot write"):
        draw(CIRCUIT, tmp_path / "circuit.svg")


def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def fake(name: str, *arguments: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", fake)
    monkeypatch.delitem(sys.modules, "circuitvit.export.print", raising=False)  # it is imported once


def test_a_picture_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "circuit.pdf"
    path.write_bytes(b"old")
    without_matplotlib(monkeypatch)
    with pytest.raises(FileError):
        draw(CIRCUIT, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("ending", PAINTED)
def test_without_matplotlib_the_way_out_is_named(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_matplotlib(monkeypatch)
    with pytest.raises(FileError, match=r"needs matplotlib.*pip install 'circuitvit\[plots\]'.*\.svg"):
        draw(CIRCUIT, tmp_path / f"circuit.{ending}")


@pytest.mark.parametrize("ending", ["json", "graphml"])
def test_data_is_never_thinned_out(ending: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="always holds the whole circuit"):
        draw(CIRCUIT, tmp_path / f"circuit.{ending}", max_edges=3)


@pytest.mark.parametrize("ending", ["html", "svg", "dot", "tex", "graphml", "json"])
def test_an_empty_circuit_can_be_written_in_every_format(ending: str, tmp_path: Path) -> None:
    assert draw(Circuit.empty(transformer_graph(2, 2)), tmp_path / f"circuit.{ending}").stat().st_size > 0


@pytest.mark.parametrize("ending", ["html", "svg"])
def test_thumbnails_need_model_and_task(ending: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="give both model= and task="):
        draw(CIRCUIT, tmp_path / f"x.{ending}", thumbnails=True)


def test_a_circuit_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="the circuit belongs to another graph"):
        draw(CIRCUIT, tmp_path / "x.html", model=cv.load("catdog-tiny"), task=toy_task(), thumbnails=True)


def test_an_unknown_image_or_pair_is_refused(tmp_path: Path) -> None:
    model = cv.load("catdog-tiny")
    circuit = random_scores(model.graph).connected(10)
    options: dict[str, Any] = {"model": model, "task": toy_task(), "thumbnails": True}
    with pytest.raises(OptionError, match="image is 'clean' or 'corrupt', not 'dirty'"):
        draw(circuit, tmp_path / "x.svg", image="dirty", **options)
    for pair in (-1, 1):
        with pytest.raises(OptionError, match="pair is 0 to 0"):
            draw(circuit, tmp_path / "x.html", pair=pair, **options)


def toy_task() -> cv.Task:
    images = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    return cv.Task(images[:1], images[1:], cv.logit_diff(0, 1))

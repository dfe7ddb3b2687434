"""Static figures: PNG, PDF, TikZ, Mermaid, thumbnails in the SVG; hostile text is inert in all of them."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import circuitvit as cv
from circuitvit.export import draw, mermaid_of, picture_of, svg_of, tikz_of
from circuitvit.export.mermaid import inert
from circuitvit.export.paint import painted
from circuitvit.export.tikz import tex
from circuitvit.graph import Circuit, Graph, StageNodes
from circuitvit.graph.eap_ig import transformer_graph
from tests.export.cases import random_circuit, random_scores
from tests.export.geometry import SVG
from tests.export.test_draw import toy_task
from tests.export.test_svg import HOSTILE

CIRCUIT = random_circuit(4, 2, 30)
MODEL = cv.load("catdog-tiny")


def texts_of(svg: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(svg).iter(f"{SVG}text")]


# -- thumbnails in the SVG -----------------------------------------------------------------------


def test_every_node_that_has_a_map_carries_it(tmp_path: Path) -> None:
    circuit = random_scores(MODEL.graph).connected(30)
    options: dict[str, Any] = {"model": MODEL, "task": toy_task(), "thumbnails": True}
    root = ET.fromstring(draw(circuit, tmp_path / "x.svg", **options).read_text())
    images = list(root.iter(f"{SVG}image"))
    assert len(images) == len(circuit.nodes) - 1  # all but the logits
    for group in (group for group in root.iter(f"{SVG}g") if group.find(f"{SVG}image") is not None):
        box, image = group.find(f"{SVG}rect"), group.find(f"{SVG}image")
        assert box is not None
        assert image is not None
        for start, length in (("x", "width"), ("y", "height")):
            low, high = float(box.get(start, "")), float(box.get(start, "")) + float(box.get(length, ""))
            assert low < float(image.get(start, ""))
            assert float(image.get(start, "")) + float(image.get(length, "")) < high
    clean = (tmp_path / "x.svg").read_bytes()
    assert draw(circuit, tmp_path / "x.svg", image="corrupt", **options).read_bytes() != clean
    assert b"<image" not in draw(circuit, tmp_path / "x.svg", model=MODEL, task=toy_task()).read_bytes()


def test_names_are_readable_in_one_column_of_a_paper() -> None:
    """88 mm is the width of a column; 5 points is the smallest type that journals take."""
    for edges in (20, 100, 300):
        root = ET.fromstring(svg_of(picture_of(random_circuit(12, 3, edges))))
        points = 88 / 25.4 * 72 / float(root.get("width", ""))
        sizes = [float(text.get("font-size", "")) for text in root.iter(f"{SVG}text")]
        assert min(sizes) * points > 4.5
        names = [text for text in root.iter(f"{SVG}text") if re.fullmatch(r"[am]\d.*", text.text or "")]
        assert min(float(text.get("font-size", "")) for text in names) * points > 5


# -- PNG and PDF ---------------------------------------------------------------------------------


def test_a_png_looks_like_the_svg() -> None:
    pytest.importorskip("matplotlib")
    picture = picture_of(CIRCUIT)
    svg = svg_of(picture)
    image = Image.open(io.BytesIO(painted(svg, "png")))
    root = ET.fromstring(svg)
    assert image.width == pytest.approx(2 * float(root.get("width", "")), abs=2)
    pixels = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(int)
    for colour in ("#0072B2", "#D55E00", "#30363D"):
        wanted = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
        assert (np.abs(pixels - wanted).max(axis=1) < 24).sum() > 50, colour


def test_text_in_a_pdf_stays_text_and_the_bytes_are_the_same() -> None:
    pytest.importorskip("matplotlib")
    svg = svg_of(picture_of(CIRCUIT))
    first = painted(svg, "pdf", "A title")
    assert first == painted(svg, "pdf", "A title")
    assert first.startswith(b"%PDF")
    assert b"/TrueType" in first or b"/Type0" in first or b"/CIDFontType2" in first


def test_painting_changes_no_settings_of_matplotlib() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    before = dict(matplotlib.rcParams)
    painted(svg_of(picture_of(CIRCUIT)), "png")
    assert dict(matplotlib.rcParams) == before


# -- TikZ and Mermaid ----------------------------------------------------------------------------


def test_tikz_has_every_node_and_edge() -> None:
    text = tikz_of(picture_of(CIRCUIT))
    assert text.count(" .. controls ") >= 30
    assert len(re.findall(r"^\\draw\[cv\w+, line width", text, re.M)) == 30
    for node in CIRCUIT.nodes:
        assert f"\\bfseries {node}}}" in text


def test_mermaid_has_every_node_and_edge() -> None:
    text = mermaid_of(picture_of(CIRCUIT))
    assert len(re.findall(r"^  n\d+ -->", text, re.M)) == 30
    assert len(re.findall(r"^  linkStyle \d+ stroke:#", text, re.M)) == 30
    assert len(re.findall(r"^  n\d+[\[(]", text, re.M)) == len(CIRCUIT.nodes)


def hostile_picture(text: str) -> Any:
    name = re.sub(r"[\s<>@]|[^\x20-\x7e]", "_", text)[:40] or "x"
    stages = transformer_graph(1, 1).stages
    graph = Graph((stages[0], StageNodes("mlps", "mlp", 0, (name,), (name,)), stages[-1]))
    return picture_of(Circuit.full(graph), title=text)


@pytest.mark.parametrize("text", [*HOSTILE, "\\input{/etc/passwd}", "$x^2$ %", '"]; click n0 "javascript:x"'])
def test_hostile_text_is_inert(text: str) -> None:
    pytest.importorskip("matplotlib")
    picture = hostile_picture(text)
    plain = hostile_picture("plain")
    for write in (tikz_of, mermaid_of, svg_of):
        assert write(picture).count("\n") == pytest.approx(write(plain).count("\n"), abs=8)
        assert not {"\u202e", "\u2066", "\u200f"} & set(write(picture))
    commands = {"textbackslash", "textasciitilde", "textasciicircum", "textless", "textgreater", "textbar"}
    known = set(re.findall(r"\\([a-z]+)", tikz_of(plain))) | commands
    assert set(re.findall(r"\\([a-z]+)", tikz_of(picture))) <= known
    assert painted(svg_of(picture), "png").startswith(b"\x89PNG")


@pytest.mark.parametrize("text", HOSTILE)
def test_escaped_text_has_no_active_letter_left(text: str) -> None:
    assert not set(inert(text)) & set("<>\"'`[]{}()|&\\\n:%-")
    unescaped = re.sub(r"\\(textbackslash|text\w+)\{\}|\\[{}$&#_%]", "", tex(text))
    assert not set(unescaped) & set("\\{}$&#^_~%\n")


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_accepts_the_figure(tmp_path: Path) -> None:
    (tmp_path / "x.tex").write_text(
        "\\documentclass{article}\\usepackage{tikz}\\begin{document}"
        + tikz_of(picture_of(CIRCUIT))
        + "\\end{document}"
    )
    done = subprocess.run(["pdflatex", "-interaction=batchmode", "x.tex"], cwd=tmp_path, check=False)
    assert done.returncode == 0

"""Static figures: PNG, PDF, TikZ, thumbnails in the SVG; hostile text is inert in all of them."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import circuitvit as cv
from circuitvit.export import draw, draw_difference, picture_of, svg_of, tikz_of
from circuitvit.export.drawing import figure_bytes
from circuitvit.export.figure import figure_of
from circuitvit.export.tikz import tex
from circuitvit.graph import Circuit, Graph, StageNodes
from circuitvit.graph.eap_ig import transformer_graph
from tests.export.cases import random_circuit, random_scores
from tests.export.geometry import SVG, Drawing
from tests.export.test_draw import toy_task
from tests.export.test_svg import HOSTILE

CIRCUIT = random_circuit(4, 2, 30)
MODEL = cv.load("catdog-tiny")


def texts_of(svg: str) -> list[str]:
    """The letters of each text of a picture; f, i and l apart, which fonts may join into one sign."""
    return [without(element.text or "", " fil") for element in ET.fromstring(svg).iter(f"{SVG}text")]


def without(text: str, letters: str) -> str:
    return "".join(letter for letter in text if letter not in letters)


def size_of(svg: str) -> tuple[float, float]:
    root = ET.fromstring(svg)
    return float(root.get("width", "")), float(root.get("height", ""))


def texts_of_pdf(content: bytes) -> list[str]:
    """The same of a PDF of one page, in drawing order."""
    streams = re.findall(rb"stream\n(.*?)\nendstream", content, re.DOTALL)  # a stream may end on \r itself
    page = next(text for text in map(inflated, streams) if b"BT\n" in text)
    words = []
    for shown in re.findall(r"BT\n(.*?)\nET", page.decode("latin-1"), re.DOTALL):
        letters = "".join(re.findall(r"\(((?:\\.|[^\\)])*)\)", shown, re.DOTALL))
        words.append(without(re.sub(r"\\(.)", r"\1", letters), "\0 fil"))
    return words


def inflated(stream: bytes) -> bytes:
    try:
        return zlib.decompress(stream)
    except zlib.error:
        return b""


def printed(picture: Any, kind: str) -> bytes:
    return figure_bytes(figure_of(picture), kind)


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


@pytest.mark.parametrize("edges", [20, 300])
def test_a_png_looks_like_the_svg(edges: int) -> None:
    pytest.importorskip("matplotlib")
    picture = picture_of(random_circuit(12, 3, edges))
    image = Image.open(io.BytesIO(printed(picture, "png"))).convert("RGB")
    assert image.size == pytest.approx([2 * side for side in size_of(svg_of(picture))], abs=1)
    pixels = np.asarray(image).astype(int)
    for colour in ("#0072B2", "#D55E00", "#30363D"):
        wanted = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
        assert (np.abs(pixels - wanted).max(axis=2) < 24).sum() > 50, colour
    drawing = Drawing(svg_of(picture))
    for name in ("input", "logits"):  # dark boxes stand where the SVG has them
        box = drawing.boxes[name]
        x, y = round(2 * box.left) + 4, round(box.top + box.bottom)
        assert pixels[y, x].tolist() == [0x30, 0x36, 0x3D]
        assert pixels[y, x - 12].min() > 0xF0
    border = (pixels[:8], pixels[-8:], pixels[:, :8], pixels[:, -8:])
    assert all((edge == 255).all() for edge in border)  # nothing is cut off


@pytest.mark.parametrize("edges", [0, 30])
def test_a_pdf_has_the_size_and_the_texts_of_the_svg(edges: int) -> None:
    pytest.importorskip("matplotlib")
    picture = picture_of(CIRCUIT, title="A (title) of $5", max_edges=edges)
    content = printed(picture, "pdf")
    found = re.search(rb"/MediaBox \[ 0 0 (\S+) (\S+) \]", content)
    assert found is not None
    sides = [0.75 * side for side in size_of(svg_of(picture))]
    assert [float(found[1]), float(found[2])] == pytest.approx(sides, abs=0.01)
    assert texts_of_pdf(content) == texts_of(svg_of(picture))
    assert b"/Title (A \\(title\\) of $5)" in content
    assert b"/FontFile2" in content  # the letters themselves are in the file


@pytest.mark.parametrize("kind", ["png", "pdf"])
def test_printed_figures_are_the_same_bytes_each_time(kind: str) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    first = printed(picture_of(CIRCUIT), kind)
    style = {"font.size": 30, "text.usetex": True, "path.sketch": (1, 100, 2), "figure.facecolor": "black"}
    with matplotlib.rc_context({**style, "savefig.bbox": "tight", "savefig.transparent": True}):
        assert printed(picture_of(CIRCUIT), kind) == first  # whatever the user's settings are


@pytest.mark.parametrize("kind", ["png", "pdf"])
def test_panels_are_printed_as_wide_as_they_are_drawn(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    second = random_circuit(4, 2, 20, seed=5)
    path, svg = (
        draw_difference(CIRCUIT, second, tmp_path / f"x.{end}", panels=True) for end in (kind, "svg")
    )
    width, height = size_of(svg.read_text(encoding="utf-8"))
    if kind == "png":
        assert Image.open(path).size == pytest.approx((2 * width, 2 * height), abs=1)
    else:
        assert texts_of_pdf(path.read_bytes()) == texts_of(svg.read_text(encoding="utf-8"))


def test_thumbnails_are_printed(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    circuit = random_scores(MODEL.graph).connected(10)
    options: dict[str, Any] = {"model": MODEL, "task": toy_task(), "thumbnails": True}
    root = ET.fromstring(draw(circuit, tmp_path / "x.svg", **options).read_text())
    pixels = np.asarray(Image.open(draw(circuit, tmp_path / "x.png", **options)).convert("RGB"))
    small = root.find(f".//{SVG}image")
    moved = root.find(f"{SVG}g[@transform]")
    assert small is not None
    assert moved is not None
    dx, dy = map(float, re.findall(r"[\d.]+", moved.get("transform", "")))
    x, y, side = (float(small.get(name, "")) for name in ("x", "y", "width"))
    rows, columns = (slice(round(2 * low) + 2, round(2 * (low + side)) - 2) for low in (y + dy, x + dx))
    content = base64.b64decode(small.get("href", "").partition("base64,")[2])
    wanted = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), dtype=float)
    assert pixels[rows, columns].mean(axis=(0, 1)) == pytest.approx(wanted.mean(axis=(0, 1)), abs=6)


def test_printing_changes_no_settings_of_matplotlib() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    before = dict(matplotlib.rcParams)
    printed(picture_of(CIRCUIT), "png")
    assert dict(matplotlib.rcParams) == before


# -- TikZ ----------------------------------------------------------------------------------------


def test_tikz_has_every_node_and_edge() -> None:
    text = tikz_of(picture_of(CIRCUIT))
    assert text.count(" .. controls ") >= 30
    assert len(re.findall(r"^\\draw\[cv\w+, line width", text, re.M)) == 30
    for node in CIRCUIT.nodes:
        assert f"\\bfseries {node}}}" in text


def test_tikz_defines_every_colour_that_it_uses() -> None:
    text = tikz_of(picture_of(CIRCUIT))
    used = set(re.findall(r"\bcv(\w{6})\b", text.split("\\begin{tikzpicture}")[1]))
    assert used == set(re.findall(r"\\definecolor\{cv(\w{6})\}\{HTML\}\{\1\}", text))


def hostile_picture(text: str) -> Any:
    name = re.sub(r"[\s<>@]|[^\x20-\x7e]", "_", text)[:40] or "x"
    stages = transformer_graph(1, 1).stages
    graph = Graph((stages[0], StageNodes("mlps", "mlp", 0, (name,), (name,)), stages[-1]))
    return picture_of(Circuit.full(graph), title=text)


@pytest.mark.parametrize("text", [*HOSTILE, "\\input{/etc/passwd}", "$x^2$ %"])
def test_hostile_text_is_inert(text: str) -> None:
    pytest.importorskip("matplotlib")
    picture = hostile_picture(text)
    plain = hostile_picture("plain")
    for write in (tikz_of, svg_of):
        assert write(picture).count("\n") == pytest.approx(write(plain).count("\n"), abs=8)
        assert not {"\u202e", "\u2066", "\u200f"} & set(write(picture))
    commands = {"textbackslash", "textasciitilde", "textasciicircum", "textless", "textgreater", "textbar"}
    known = set(re.findall(r"\\([a-z]+)", tikz_of(plain))) | commands
    assert set(re.findall(r"\\([a-z]+)", tikz_of(picture))) <= known
    assert printed(picture, "png").startswith(b"\x89PNG")


@pytest.mark.parametrize("text", HOSTILE)
def test_escaped_text_has_no_active_letter_left(text: str) -> None:
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

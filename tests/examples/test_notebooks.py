"""The notebooks of `examples/` run from top to bottom, and hold nothing that they should not.

`python tests/examples/test_notebooks.py [NAME...]` executes them anew and writes their outputs.
"""

from __future__ import annotations

import base64
import io
import os
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples"
NAMES = (
    "01_first_circuit",
    "02_cat_dog_decider",
    "03_your_own_model_and_data",
    "04_look_inside",
    "05_reading_and_looking",
)
SEARCHED = NAMES[:3]  # a circuit is searched for in these, or a model trained
NUMBER = re.compile(r"(?:(?<=\s)[-+])?\d+(?:[.,]\d+)*")
TIMEOUT = 600  # seconds for a cell on a busy machine; all cells together take about a minute on an idle one


def read(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def execute(notebook: Any) -> Any:
    """Run a notebook in its folder, in place, with this checkout; an error in a cell is raised."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), before]))
    try:
        # What a cell prints may come in several pieces, as it happens.
        resources = {"metadata": {"path": str(FOLDER)}}
        NotebookClient(notebook, timeout=TIMEOUT, resources=resources, coalesce_streams=True).execute()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return notebook


def tidy(notebook: Any) -> Any:
    """Leave out what is no result: bars and warnings on stderr, widgets, times of execution."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [
                output
                for output in cell.outputs
                if output.get("name") != "stderr"
                and "application/vnd.jupyter.widget-view+json" not in output.get("data", {})
            ]
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(notebook: Any) -> list[set[str]]:
    """The kinds of data that each code cell gave."""
    return [
        {kind for output in cell.outputs for kind in output.get("data", {"stream": ""})}
        for cell in code_cells(notebook)
    ]


def printed(notebook: Any) -> str:
    """What all code cells printed, and the plain text of what they gave."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return "\n".join(each.get("text", "") + each.get("data", {}).get("text/plain", "") for each in outputs)


def assert_same_form(now: Any, saved: Any) -> None:
    """The same words and pictures. A search, or a training, takes another way on another kind of processor,
    whose sums are rounded otherwise, so that what comes of it is some other circuit of much the same size."""
    assert kinds(now) == kinds(saved)
    assert NUMBER.split(printed(now)) == NUMBER.split(printed(saved))


def assert_same_outputs(now: Any, saved: Any) -> None:
    """The same form, and numbers that differ by no more than another machine's rounding."""
    assert_same_form(now, saved)
    found, expected = (
        [float(each.replace(",", "")) for each in NUMBER.findall(printed(notebook))]
        for notebook in (now, saved)
    )
    assert found == pytest.approx(expected, rel=0.05, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", [NAMES[0], *NAMES[2:]])
def test_the_notebook_runs_and_shows_what_the_library_prints_now(name: str) -> None:
    check = assert_same_form if name in SEARCHED else assert_same_outputs
    check(tidy(execute(read(name))), read(name))


@pytest.mark.slow
def test_the_notebook_of_the_real_model_runs(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIRCUITVIT_SHARED", str(shared_data))
    assert_same_form(tidy(execute(read(NAMES[1]))), read(NAMES[1]))


@pytest.mark.slow
def test_without_the_data_it_runs_on_the_toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIRCUITVIT_SHARED", str(tmp_path / "nothing"))
    assert "of 479 edges" in printed(execute(read(NAMES[1])))  # as many as catdog-tiny has


@pytest.mark.parametrize("name", NAMES)
def test_it_was_executed_in_order_and_without_errors(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert sum("image/png" in each for each in kinds(notebook)) >= 2
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 1_000_000


@pytest.mark.parametrize("name", NAMES)
def test_no_path_of_a_machine_is_in_it(name: str) -> None:
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    assert not re.findall(r"/(?:tmp|home|root|work|Users|usr)/", text)
    assert str(ROOT) not in text


def test_the_photographs_are_not_in_the_notebook_of_the_real_model() -> None:
    """Its figures are drawn without them: flat colours, where a photograph has all shades."""
    notebook = read(NAMES[1])
    for cell in code_cells(notebook):
        for output in cell.outputs:
            data = output.get("data", {})
            assert "image/jpeg" not in data
            assert "data:image/jpeg" not in data.get("text/html", "")
            assert "data:image/png" not in data.get("text/html", "")
            if "image/png" in data:
                assert not has_photograph(base64.b64decode(data["image/png"]))


def has_photograph(png: bytes) -> bool:
    """Whether many pixels differ a little from their neighbours, as in photographs and nowhere else."""
    pixels = Image.open(io.BytesIO(png)).convert("L")
    width, height = pixels.size
    left, right = pixels.crop((0, 0, width - 1, height)), pixels.crop((1, 0, width, height))
    steps = [abs(a - b) for a, b in zip(left.tobytes(), right.tobytes(), strict=True)]
    return sum(1 <= step <= 12 for step in steps) > 0.12 * len(steps)


def test_what_would_be_a_photograph_is_seen() -> None:
    """Shades that change a little from pixel to pixel are one; flat colours with sharp borders are none."""
    shades = Image.linear_gradient("L").resize((300, 200), Image.Resampling.BICUBIC).rotate(30)
    flat = Image.new("L", (300, 200), 255)
    flat.paste(90, (40, 40, 200, 160))
    seen = []
    for picture in (shades.effect_spread(3), flat):
        file = io.BytesIO()
        picture.save(file, "PNG")
        seen.append(has_photograph(file.getvalue()))
    assert seen == [True, False]


if __name__ == "__main__":
    for chosen in sys.argv[1:] or NAMES:
        nbformat.write(tidy(execute(read(chosen))), FOLDER / f"{chosen}.ipynb")

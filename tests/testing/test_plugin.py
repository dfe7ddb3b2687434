"""The pytest plugin in a small project of its own, with circuitvit installed from the built wheel."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

PROJECT = {
    "pyproject.toml": """
[tool.pytest.ini_options]
circuit_hypotheses = "claims.yaml"
addopts = ["--strict-markers"]
""",
    "claims.yaml": """
schema: circuitvit.hypotheses/1
model: {name: catdog-tiny}
task: {clean: cat.png, corrupt: dog.png, target: cat, foil: dog}
hypotheses:
  - {claim: all of it, edges: "* -> logits", expect: {falls_by: 0}}
""",
    "test_circuit.py": """
import circuitvit as cv
import pytest
from circuitvit.testing import assert_faithful, assert_hypothesis

pytestmark = pytest.mark.circuit


def test_it_is_the_wheel():
    assert "site" in cv.__file__


def test_the_claims(circuit_model, circuit_task, circuit_hypotheses):
    for claim in circuit_hypotheses.hypotheses:
        assert_hypothesis(circuit_model, circuit_task, claim)


def test_an_empty_circuit_is_faithful(circuit_model, circuit_task):
    assert_faithful(circuit_model, circuit_task, cv.Circuit.empty(circuit_model.graph))
""",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as the wheel holds it, metadata and all."""
    pytest.importorskip("hatchling", reason="the build backend is not installed here")
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    made = subprocess.run(
        [*build, "--quiet", "--wheel-dir", str(folder), str(REPOSITORY)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    (wheel,) = folder.glob("circuitvit-*.whl")
    site = folder / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def test_the_plugin_works_in_a_project_of_its_own(site: Path, tmp_path: Path) -> None:
    from PIL import Image

    from circuitvit.datasets.catdog import catdog_pairs

    pairs = catdog_pairs(1, seed=3, preprocessed=False)
    for name, pictures in (("cat", pairs.clean), ("dog", pairs.corrupt)):
        pixels = (pictures[0] * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    for name, text in PROJECT.items():
        (tmp_path / name).write_text(text)
    # PYTHONPATH comes before the environment's own packages, so the wheel's files and entry points win.
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", str(tmp_path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout
    assert "1 failed, 2 passed" in said, said + done.stderr
    assert "= circuits =" in said
    assert "ok   test_the_claims: assert_hypothesis: supported: all of it" in said
    assert (
        "FAIL test_an_empty_circuit_is_faithful: assert_faithful: faithfulness of 0 edges on 1 pair" in said
    )
    assert "AssertionError: faithfulness of 0 edges on 1 pair is 0.000; asked for: 0.8 to 1.2" in said
    assert "site-packages/circuitvit/testing" not in said


def test_the_wheel_announces_the_plugin(site: Path) -> None:
    (entry_points,) = site.glob("circuitvit-*.dist-info/entry_points.txt")
    text = entry_points.read_text()
    assert "[pytest11]" in text
    assert "circuitvit = circuitvit.testing.plugin" in text

"""What would be published, and what it does in an environment that has never seen the repository."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest
import yaml
from PIL import Image

import circuitvit
from circuitvit.cli.demo import BAND, CHANCE, LARGEST_DENSITY
from circuitvit.cli.discover import FILES
from circuitvit.verification import Report

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
    assert "site-packages" in cv.__file__


def test_the_claims(circuit_model, circuit_task, circuit_hypotheses):
    for claim in circuit_hypotheses.hypotheses:
        assert_hypothesis(circuit_model, circuit_task, claim)


def test_an_empty_circuit_is_faithful(circuit_model, circuit_task):
    assert_faithful(circuit_model, circuit_task, cv.Circuit.empty(circuit_model.graph))
""",
}


def run(*command: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """A program in a folder, with nothing of this process's but its environment's variables."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        list(map(str, command)), cwd=folder, env=kept, capture_output=True, text=True, check=False
    )


def built(source: Path, target: str, folder: Path) -> Path:
    """The archive that hatchling makes of a source tree: "sdist" or "wheel"."""
    done = run(sys.executable, "-m", "hatchling", "build", "-t", target, "-d", folder, folder=source)
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("*.tar.gz" if target == "sdist" else "*.whl")
    return archive


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive, unpacked."""
    pytest.importorskip("hatchling", reason="the build backend is not installed here")
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(built(REPOSITORY, "sdist", folder)) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"circuitvit-{circuitvit.__version__}"


@pytest.fixture(scope="module")
def fresh(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel that the source archive builds; requirements are borrowed."""
    folder = tmp_path_factory.mktemp("fresh")
    wheel = built(sources, "wheel", folder)
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", folder=folder)
    pip = [sys.executable, "-m", "pip", "--python", folder / "venv" / "bin" / "python", "install", "--quiet"]
    done = run(*pip, "--no-deps", "--no-index", wheel, folder=folder)
    assert done.returncode == 0, done.stderr
    # Packages of this environment are looked for last, and its .pth files are not read: by one of these the
    # repository would come in.
    (site,) = (folder / "venv").glob("lib/*/site-packages")
    borrowed = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "borrowed.pth").write_text("\n".join(borrowed))
    return folder / "venv"


@pytest.mark.slow
def test_the_demo_keeps_its_promise_without_the_repository(fresh: Path, tmp_path: Path) -> None:
    done = run(fresh / "bin" / "circuitvit", "demo", "--quiet", "--out", "made", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "share of the behaviour" in done.stdout
    made = tmp_path / "made"
    assert {path.name for path in made.iterdir()} == {*FILES, "clean.png", "corrupt.png"}
    assert done.stdout.splitlines()[-2:] == [
        "open this: made/circuit.html",
        f"in a browser: {(made / 'circuit.html').as_uri()}",
    ]
    assert Image.open(made / "clean.png").size == (384, 384)
    report = Report.load(made / "report.json")
    assert report.size.density <= LARGEST_DENSITY
    assert BAND[0] <= report.headline.faithfulness.value <= BAND[1]
    assert report.headline.random is not None
    assert report.headline.random.p_value < CHANCE
    assert report.headline.random.high < report.headline.faithfulness.low  # type: ignore[operator]


def test_the_wheel_says_what_it_is(fresh: Path) -> None:
    (folder,) = fresh.glob("lib/*/site-packages/circuitvit-*.dist-info")
    said = PathDistribution(folder).metadata
    assert said["Version"] == circuitvit.__version__
    assert said["Requires-Python"] == ">=3.10"
    assert said["License-Expression"] == "MIT AND LicenseRef-WordNet-3.0"  # the tree of classes is WordNet's
    assert said["Description-Content-Type"] == "text/markdown"
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)} <= set(
        said.get_all("Classifier") or ()
    )
    for notice in said.get_all("License-File") or ():
        assert (folder / "licenses" / notice).is_file(), notice
    assert len(said.get_all("License-File") or ()) == 2
    assert "circuitvit = circuitvit.testing.plugin" in (folder / "entry_points.txt").read_text()


def test_the_sources_are_whole_and_nothing_else(sources: Path) -> None:
    for name in (
        "CHANGELOG.md",
        "CITATION.cff",
        "LICENSE",
        "circuitvit/tasks/wordnet/LICENSE",
        "Makefile",
        "docs/index.md",
        "tests/conftest.py",
    ):
        assert (sources / name).is_file(), name
    assert not [path for path in sources.rglob("*") if path.suffix in (".pyc", ".so", ".pt", ".pth")]


def test_every_file_that_names_the_version_names_the_same() -> None:
    headings = re.findall(r"^## (\S+) \((\S+)\)$", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    newest = next((version, date) for version, date in headings if date != "unreleased")
    cited = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert newest == (circuitvit.__version__, str(cited["date-released"]))
    assert cited["version"] == circuitvit.__version__


def test_the_plugin_works_in_a_project_of_its_own(fresh: Path, tmp_path: Path) -> None:
    from PIL import Image

    from circuitvit.datasets.catdog import catdog_pairs

    pairs = catdog_pairs(1, seed=3, preprocessed=False)
    for name, pictures in (("cat", pairs.clean), ("dog", pairs.corrupt)):
        pixels = (pictures[0] * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    for name, text in PROJECT.items():
        (tmp_path / name).write_text(text)
    done = run(
        fresh / "bin" / "python",
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        tmp_path,
        folder=tmp_path,
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

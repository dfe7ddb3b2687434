"""The pytest plugin: fixtures for model and task, the marker `circuit`, and a section of the summary.

It is found by itself once circuitvit is installed, and does nothing in a project that does not use it. Say
which model and images the fixtures give in pytest's own configuration,

    [tool.pytest.ini_options]
    circuit_hypotheses = "circuits/cat_dog.yaml"     # its model and task; or
    circuit_model = "vit_tiny_patch16_224"
    circuit_checkpoint = "weights/vit_tiny.safetensors"

or override the fixtures `circuit_model` and `circuit_task` in a conftest.py. Every pytest of the environment
loads this file, so it imports nothing heavy: the library comes with the first fixture or assertion in use.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import circuitvit as cv
from circuitvit.testing.log import begin_test, entries, forget

if TYPE_CHECKING:
    from circuitvit.verification import HypothesisFile

_OPTIONS = {
    "circuit_model": "name of the model that the fixture circuit_model loads",
    "circuit_checkpoint": "its weights, relative to the root folder of the project",
    "circuit_hypotheses": "a YAML file of hypotheses, whose model and task the fixtures give",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the settings."""
    for name, text in _OPTIONS.items():
        parser.addini(name, text, default="")


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker."""
    config.addinivalue_line("markers", "circuit: pins a circuit of a model (circuitvit)")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let findings know which test they belong to."""
    begin_test(item.nodeid)


@pytest.fixture(scope="session")
def circuit_hypotheses(pytestconfig: pytest.Config) -> HypothesisFile:
    """The file of hypotheses named by the setting `circuit_hypotheses`."""
    named = pytestconfig.getini("circuit_hypotheses")
    if not named:
        pytest.fail(
            "name a YAML file in the setting circuit_hypotheses, or override this fixture", pytrace=False
        )
    return cv.read_hypotheses(pytestconfig.rootpath / named)


@pytest.fixture(scope="session")
def circuit_model(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> cv.Model:
    """The model under test."""
    name, checkpoint = pytestconfig.getini("circuit_model"), pytestconfig.getini("circuit_checkpoint")
    path: Path | None = pytestconfig.rootpath / checkpoint if checkpoint else None
    if not name and pytestconfig.getini("circuit_hypotheses"):
        file = request.getfixturevalue("circuit_hypotheses")
        name, path = file.model, path or file.checkpoint
    if not name:
        pytest.fail("name a model in the setting circuit_model, or override this fixture", pytrace=False)
    return cv.load(name, checkpoint=path)


@pytest.fixture(scope="session")
def circuit_task(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> cv.Task:
    """The behaviour under test."""
    task: cv.Task | None = None
    if pytestconfig.getini("circuit_hypotheses"):
        task = request.getfixturevalue("circuit_hypotheses").task
    if task is None:
        pytest.fail("name images in the circuit_hypotheses file, or override this fixture", pytrace=False)
    return task


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Start with an empty log, also when pytest runs twice in a process."""
    forget()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say what every assertion about a circuit found, also those that held."""
    lines = list(_summary())
    if lines:
        terminalreporter.section("circuits")
        for line in lines:
            terminalreporter.write_line(line)


def _summary() -> Iterator[str]:
    for entry in entries():
        mark = "ok  " if entry.held else "FAIL"
        yield f"{mark} {entry.test.rpartition('::')[2] or '-'}: {entry.assertion}: {entry.found}"

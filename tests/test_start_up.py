"""What starting costs: the package, its command line and its pytest plugin load nothing heavy."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import circuitvit
from circuitvit.cli.program import COMMANDS
from circuitvit.cli.view import VIEWS

ROOT = Path(circuitvit.__file__).parents[1]
HEAVY = ("torch", "timm", "torchvision", "numpy", "scipy", "PIL", "matplotlib", "networkx", "jsonschema")
LOADED = f"import sys; print(*sorted(set(sys.modules) & {set(HEAVY)!r}))"


def python(*arguments: object, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Python with this package and nothing else of the calling process's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV"))}
    command = [sys.executable, *map(str, arguments)]
    # Only plugins that a test names: those of other packages may load what they like.
    environment = {**kept, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=folder or ROOT
    )


def loaded_after(code: str) -> list[str]:
    """Which heavy modules a piece of code leaves in `sys.modules`; what it prints is ignored."""
    guarded = f"import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()):\n    {code}\n{LOADED}"
    result = python("-c", guarded)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_the_measure_itself_sees_what_is_loaded() -> None:
    assert "numpy" in loaded_after("import numpy")


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_after("import circuitvit; dir(circuitvit); circuitvit.CircuitViTError") == []


def test_circuits_are_read_without_torch() -> None:
    assert "torch" not in loaded_after("import circuitvit as cv; cv.Circuit")


@pytest.mark.parametrize("package", ["circuitvit", "circuitvit.testing"])
def test_a_lazy_face_says_the_same_three_times(package: str) -> None:
    """To `from package import *`, to type checkers, and when a name is used."""
    face = import_module(package)
    assert face.__file__ is not None
    tree = ast.parse(Path(face.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {
        alias.asname or alias.name: (each.module, alias.name)
        for each in block.body
        if isinstance(each, ast.ImportFrom)
        for alias in each.names
    }
    assert set(typed) == set(face.__dir__())
    rooms = {name for name, (module, _) in typed.items() if module == "circuitvit"}
    assert set(face.__all__) - {"__version__"} == set(typed) - rooms
    for name, (module, origin) in typed.items():
        assert module is not None
        own = import_module(f"{module}.{name}") if name in rooms else getattr(import_module(module), origin)
        assert getattr(face, name) is own


def test_a_name_that_is_not_there_is_named() -> None:
    with pytest.raises(AttributeError, match="module 'circuitvit' has no attribute 'fnd'"):
        circuitvit.fnd  # type: ignore[attr-defined]  # noqa: B018


HELP = [[], *([name] for name in COMMANDS), *(["view", name] for name in VIEWS)]


def test_help_loads_nothing_heavy() -> None:
    """One process asks for one help page after the other, and says after each what is loaded by then."""
    code = f"""
import contextlib, io, sys
from circuitvit.cli import main
for command in {HELP!r}:
    sys.argv = ["circuitvit", *command, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as page, contextlib.suppress(SystemExit):
        main()
    print(*command, len(page.getvalue()) > 500, *sorted(set(sys.modules) & {set(HEAVY)!r}))
"""
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [" ".join([*command, "True"]) for command in HELP]


def test_shell_completion_loads_nothing_heavy() -> None:
    words = {"COMP_WORDS": "circuitvit discover --start t", "COMP_CWORD": "3"}
    code = (
        f"import os, sys; sys.argv = ['circuitvit']; os.environ |= {words}; "
        "os.environ['_CIRCUITVIT_COMPLETE'] = 'complete_bash'; from circuitvit.cli import main"
    )
    assert loaded_after(f"{code}\n    with contextlib.suppress(SystemExit): main()") == []
    told = python("-c", f"{code}; main()")
    assert told.stdout.split() == ["thin"], told.stderr


def test_the_pytest_plugin_costs_other_projects_nothing(tmp_path: Path) -> None:
    test = tmp_path / "test_nothing.py"
    test.write_text(
        f"import sys\ndef test_nothing() -> None:\n    assert not set(sys.modules) & {set(HEAVY)!r}\n"
        "    assert 'circuitvit.testing.plugin' in sys.modules\n"
    )
    result = python("-m", "pytest", "-q", "-p", "circuitvit.testing.plugin", test, folder=tmp_path)
    assert result.returncode == 0, result.stdout

"""The program as a whole: help, version, exit codes, and what is printed where."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

import circuitvit
from circuitvit.attribution import METHODS
from circuitvit.tasks import ablation_names, metric_names
from tests.cli.cases import Run

COMMANDS = (
    "demo", "discover", "attribute", "verify", "compare-models", "diff", "across", "audit", "why", "draw",
    "patch", "scrub", "words", "activations", "classes", "models", "train", "train sae", "doctor",
)  # fmt: skip


def flat(text: str) -> str:
    """The text of a help page without colours, frames and line breaks."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", plain).split())


def program(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`python -m circuitvit ...` in a process of its own, not on a terminal."""
    forced = ("FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS")
    environment = {name: value for name, value in os.environ.items() if name not in forced}
    environment["PYTHONPATH"] = str(Path(circuitvit.__file__).parents[1])
    command = [sys.executable, "-m", "circuitvit", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_help_names_every_command(run: Run) -> None:
    result = run("--help")
    assert result.exit_code == 0
    for command in COMMANDS:
        assert f" {command} " in flat(result.output)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(run: Run, command: str) -> None:
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    text = flat(result.output)
    assert f"Usage: circuitvit {command}" in text
    assert f"circuitvit {command} " in text.split("Options", maxsplit=1)[0].removeprefix("Usage: circuitvit")


def test_examples_can_be_copied_from_help(run: Run) -> None:
    lines = [line.rstrip() for line in run("discover", "--help").output.splitlines()]
    (start,) = [index for index, line in enumerate(lines) if "--model vit_tiny_patch16_224" in line]
    assert lines[start].endswith(" \\")
    assert lines[start + 1].strip().startswith("--checkpoint")
    assert lines[start + 1].endswith(" \\")
    assert lines[start + 2].endswith("--out out/cat_dog")


def test_the_command_line_itself_imports_nothing_heavy() -> None:
    """Only the package's own face may import torch; with a lighter one, help must appear at once."""
    folder = Path(circuitvit.__file__).parent
    code = (
        "import sys, types; face = types.ModuleType('circuitvit'); "
        f"face.__path__ = [{str(folder)!r}]; sys.modules['circuitvit'] = face; "
        "import circuitvit.cli; print({'torch', 'timm', 'numpy', 'PIL'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize("command", ["discover", "attribute", "verify"])
def test_help_groups_the_shared_options(run: Run, command: str) -> None:
    text = run(command, "--help").output
    for panel in ("Model", "Images", "Behaviour", "Run", "Output"):
        assert f" {panel} " in text


def test_help_names_all_that_can_be_chosen(run: Run) -> None:
    text = flat(run("discover", "--help").output) + flat(run("attribute", "--help").output)
    for name in ("find", "acdc", *METHODS, *metric_names(), *ablation_names(), "magnitude", "signed", "kl"):
        assert re.search(rf"\b{re.escape(name)}\b", text), name


def test_version(run: Run) -> None:
    result = run("--version")
    assert (result.exit_code, result.output.strip()) == (0, f"circuitvit {circuitvit.__version__}")


def test_without_a_command_there_is_help(run: Run) -> None:
    assert "Commands" in run().output


@pytest.mark.filterwarnings("default")
def test_a_warning_is_a_remark_without_its_place_in_the_code(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = circuitvit.load

    def warns(*arguments: Any, **options: Any) -> circuitvit.Model:
        warnings.warn("the weather is bad: give classes=[...]", stacklevel=2)
        return load(*arguments, **options)

    monkeypatch.setattr(circuitvit, "load", warns)
    result = run("classes", "--model", "catdog-tiny")
    assert result.exit_code == 0
    assert result.stderr == "note: the weather is bad: give --classes FILE\n"


def test_an_unknown_option_is_refused(run: Run) -> None:
    result = run("discover", "--modle", "catdog-tiny")
    assert result.exit_code == 2
    assert "--modle" in result.output


def test_as_a_process_a_refusal_is_one_message_on_stderr(tmp_path: Path) -> None:
    result = program("draw", tmp_path / "missing.json", tmp_path / "out.svg")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: cannot read ")
    assert len(result.stderr.strip().splitlines()) == 1


def test_as_a_process_results_are_plain_text_on_stdout(discovered: tuple[Path, object]) -> None:
    folder, _ = discovered
    result = program("draw", folder / "circuit.json", folder.parent / "drawn.graphml")
    assert (result.returncode, result.stderr) == (0, "")
    assert "\x1b" not in result.stdout
    assert (folder.parent / "drawn.graphml").is_file()


def test_models_fits_a_terminal_of_80_columns(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("circuitvit.cli.output.PIPED_WIDTH", 80)
    lines = run("models").output.splitlines()
    assert max(map(len, lines)) <= 80
    bundled = lines[lines.index("Bundled".ljust(len(lines[1]))) + 1 : lines.index("", 1)]
    assert len(bundled) <= 6 * 4  # six lines for each model
    assert "10 classes (0, 1, 2, 3, ...), 3 layers of 4 heads" in " ".join(" ".join(bundled).split())


def test_models_says_what_is_not_installed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.packages_distributions", lambda: {"timm": ["timm"]})
    text = run("models").output
    assert "pip install 'circuitvit[transformers]'" in text
    assert "timm 1." in text


def test_models_lists_bundled_models_and_families(run: Run) -> None:
    text = run("models").output
    assert "catdog-tiny" in text
    assert "vit_tiny_patch16_224" in text
    assert "--model hf:NAME_OR_FOLDER" in text
    assert "Dinov2WithRegisters" in text
    names = run("models", "--all").output.split()
    assert {"vit_base_patch16_224", "deit3_small_patch16_224", "eva02_tiny_patch14_224"} <= set(names)

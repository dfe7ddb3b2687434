"""`circuitvit doctor` judges what was seen of a machine; most machines here are written down, one is real."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import circuitvit
from circuitvit.cli import checks, doctor
from circuitvit.cli.checks import Finding, Machine, as_text, findings
from tests.cli.cases import Run

WELL = {"warnings": []}
SOUND = Machine(
    requires=(
        "torch>=2.4",
        "timm>=1.0.20",
        "rich>=13.7",
        "matplotlib>=3.8; extra == 'plots'",
        "pytest>=8; extra == 'test'",
    ),
    versions={
        "torch": "2.8.0+cpu",
        "timm": "1.0.20",
        "rich": "14.0",
        "matplotlib": "3.9.1",
        "torchvision": "0.23.0+cpu",
    },
    imports={
        "torch": {"build": None, "devices": [], "mps": False, **WELL},
        "torchvision": WELL,
        "circuitvit": WELL,
    },
    programs={"dot": "/usr/bin/dot", "firefox": "/usr/bin/firefox", "nvidia-smi": None},
)
NMS = {"error": "RuntimeError: operator torchvision::nms does not exist", "warnings": []}
OLD_DRIVER = "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040)."


def of(machine: Machine, what: str) -> Finding:
    (found,) = [each for each in findings(machine) if each.what == what]
    return found


def with_version(name: str, version: str | None) -> Machine:
    return replace(SOUND, versions={**SOUND.versions, name: version})


def with_import(name: str, **told: object) -> Machine:
    return replace(SOUND, imports={**SOUND.imports, name: {**SOUND.imports[name], **told}})


def test_of_a_sound_machine_nothing_is_to_be_mended() -> None:
    assert {each.level for each in findings(SOUND)} == {"ok"}
    assert [each.mend for each in findings(SOUND) if each.mend] == []


@pytest.mark.parametrize(
    ("machine", "what", "level", "said", "mend"),
    [
        (with_version("timm", None), "timm", "broken", "not installed", "pip install 'timm>=1.0.20'"),
        (
            with_version("timm", "1.0.9"),
            "timm",
            "broken",
            "1.0.9 is older than 1.0.20",
            "--upgrade 'timm>=1.0.20'",
        ),
        (
            with_version("torchvision", "0.22.1+cpu"),
            "torchvision",
            "note",
            "whose torchvision is 0.23",
            "'torchvision==0.23.*'",
        ),
        (
            with_version("torchvision", "0.23.0"),
            "torchvision",
            "note",
            "of another build",
            "--index-url .*/whl/cpu",
        ),
        (
            with_version("matplotlib", None),
            "extra plots",
            "note",
            "figures",
            r"pip install 'circuitvit\[plots\]'",
        ),
        (
            with_version("matplotlib", "3.1"),
            "extra plots",
            "note",
            "older than 3.8",
            "--upgrade 'matplotlib>=3.8'",
        ),
        (
            with_import("torchvision", **NMS),
            "torchvision",
            "note",
            "models of timm run all the same",
            "'torchvision==0.23.*'",
        ),
        (
            with_import("torch", error="OSError: libtorch.so: bad ELF"),
            "torch",
            "broken",
            "bad ELF",
            "--force-reinstall torch",
        ),
        (
            with_import("circuitvit", error="ModelError: timm cannot"),
            "circuitvit",
            "broken",
            "timm cannot",
            "torchvision",
        ),
        (
            with_import("torch", build="12.6", devices=["NVIDIA A100"]),
            "devices",
            "ok",
            "NVIDIA A100: --device cuda",
            "",
        ),
        (
            with_import("torch", build="12.8", warnings=[OLD_DRIVER]),
            "devices",
            "note",
            "too old",
            "cu118 .*update the NVIDIA",
        ),
        (with_import("torch", mps=True), "devices", "ok", "mps", ""),
        (
            replace(SOUND, programs={"nvidia-smi": "/bin/nvidia-smi"}),
            "devices",
            "note",
            "without CUDA",
            "whl/cu",
        ),
        (replace(SOUND, programs={}), "Graphviz", "note", "dot is not found", "install graphviz"),
        (
            replace(SOUND, unwritable={"HF_HOME": Path("/x")}),
            "HF_HOME",
            "note",
            "/x cannot be written",
            "export HF_HOME=",
        ),
        (
            replace(SOUND, unwritable={"TMPDIR": Path("/x")}),
            "TMPDIR",
            "broken",
            "temporary",
            "export TMPDIR=",
        ),
        (replace(SOUND, hub="timed out"), "hub", "note", "does not answer .timed out.", "--checkpoint FILE"),
        (replace(SOUND, hub=""), "hub", "ok", "answers", ""),
        (
            replace(SOUND, settings={"HF_HUB_OFFLINE": "1"}),
            "hub",
            "note",
            "HF_HUB_OFFLINE",
            "unset HF_HUB_OFFLINE",
        ),
        (replace(SOUND, requires=()), "requirements", "note", "not installed here", "pip install -e ."),
    ],
)
def test_each_finding_comes_with_the_line_that_mends_it(
    machine: Machine, what: str, level: str, said: str, mend: str
) -> None:
    found = of(machine, what)
    assert found.level == level
    assert re.search(said, found.said)
    assert re.search(mend, found.mend)
    assert bool(found.mend) == (level != "ok")


@pytest.mark.parametrize(
    ("machine", "code"), [(SOUND, 0), (with_version("timm", None), 1), (replace(SOUND, programs={}), 0)]
)
def test_the_exit_code_says_whether_something_is_broken(
    run: Run, monkeypatch: pytest.MonkeyPatch, machine: Machine, code: int
) -> None:
    monkeypatch.setattr(doctor, "look", lambda online: machine)
    result = run("doctor")
    assert result.exit_code == code, result.output
    for each in findings(machine):
        assert re.search(rf"^{each.level} +{re.escape(each.what)} ", result.stdout, re.MULTILINE)  # no markup
        assert f"$ {each.mend}" in result.stdout or not each.mend


def test_the_hub_is_asked_only_when_that_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(checks, "_probed", dict)
    monkeypatch.setattr(checks, "_hub", lambda address: asked.append(address) or "refused")
    assert checks.look().hub is None
    assert asked == []
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example")
    assert (checks.look(online=True).hub, asked) == ("refused", ["https://hub.example"])
    assert "refused" in of(replace(SOUND, hub=checks._hub("x")), "hub").said


def test_a_real_environment_whose_torch_and_timm_cannot_be_imported(tmp_path: Path) -> None:
    """In a process of its own, where torch crashes and there is no typer: it runs all the same."""
    (tmp_path / "torch.py").write_text("import os; os._exit(11)\n")
    (tmp_path / "typer.py").write_text("raise ImportError('No module named typer')\n")
    command = [sys.executable, "-c", "from circuitvit.cli import main; main()", "doctor"]
    root = Path(circuitvit.__file__).parents[1]
    environment = {"PYTHONPATH": f"{tmp_path}:{root}", "PATH": "/usr/bin:/bin"}
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False, cwd=tmp_path
    )
    assert result.returncode == 1
    assert "cannot go on: ImportError: No module named typer" in result.stderr
    assert "torch" in result.stderr
    assert "Traceback" not in result.stderr
    assert "ended with code 11" in result.stderr


def test_text_has_every_mend_under_its_finding() -> None:
    text = as_text([Finding("ok", "a", "fine"), Finding("broken", "bcd", "gone", "pip install bcd")])
    assert text.splitlines() == ["ok      a    fine", "broken  bcd  gone", "             $ pip install bcd"]

"""`--resume`: an interrupted command ends in the very file that an uninterrupted one writes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

DRIVER = """
from circuitvit.engine import state
state.EVERY = 0.0
from circuitvit.cli import main
main()
"""


def command(behaviour: list[object], out: Path, *more: str) -> list[str]:
    plan = ["--plan", "150,40,2", "--random", "2", "--out", out, *more]
    return [sys.executable, "-c", DRIVER, "discover", *map(str, [*behaviour, *plan])]


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "killed between two saves"])
def test_an_interrupted_discover_ends_in_the_same_circuit(
    kind: signal.Signals, behaviour: list[object], tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    subprocess.run(command(behaviour, whole), check=True, capture_output=True)
    running = subprocess.Popen(
        command(behaviour, parts), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not (parts / "state.safetensors").exists():
        assert running.poll() is None, running.communicate()
        time.sleep(0.005)
    time.sleep(0.2)
    running.send_signal(kind)
    _, complaint = running.communicate(timeout=60)
    assert running.returncode != 0
    assert (parts / "state.safetensors").exists()
    assert not (parts / "circuit.json").exists()
    if kind == signal.SIGINT:
        assert "--resume goes on from" in complaint
    refused = subprocess.run(command(behaviour, parts), capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "add --resume" in refused.stderr
    subprocess.run(command(behaviour, parts, "--resume"), check=True, capture_output=True)
    assert (parts / "circuit.json").read_bytes() == (whole / "circuit.json").read_bytes()
    assert not (parts / "state.safetensors").exists()

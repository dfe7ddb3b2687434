"""`--resume`: an interrupted command ends in the very file that an uninterrupted one writes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.cli.cases import Run

DRIVER = """
from circuitvit.engine import state
state.EVERY = 0.0
from circuitvit.cli import main
main()
"""


PLAN = ("--plan", "30,400,2", "--random", "2")


@pytest.fixture(scope="module")
def whole(run: Run, behaviour: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a discovery that nobody interrupts writes."""
    out = tmp_path_factory.mktemp("whole")
    result = run("discover", *behaviour, *PLAN, "--out", out)
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "killed between two saves"])
def test_an_interrupted_discover_ends_in_the_same_circuit(
    kind: signal.Signals, run: Run, behaviour: list[object], whole: Path, tmp_path: Path
) -> None:
    discover = ["discover", *behaviour, *PLAN, "--out", tmp_path]
    running = subprocess.Popen(
        [sys.executable, "-c", DRIVER, *map(str, discover)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},  # sums are rounded alike
    )
    while not (tmp_path / "state.safetensors").exists():
        assert running.poll() is None, running.communicate()
        time.sleep(0.005)
    time.sleep(0.2)
    running.send_signal(kind)
    _, complaint = running.communicate(timeout=60)
    assert (tmp_path / "state.safetensors").exists()
    if kind == signal.SIGKILL:
        assert running.returncode != 0
        assert not (tmp_path / "circuit.json").exists()
    elif (tmp_path / "circuit.json").exists():  # the best so far, where there was one
        assert running.returncode == 0, complaint
    else:
        assert running.returncode == 130, complaint
        assert "no result has been saved; --resume goes on from" in complaint
    refused = run(*discover)
    assert refused.exit_code == 2
    assert "add --resume" in refused.stderr
    resumed = run(*discover, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert (tmp_path / "circuit.json").read_bytes() == (whole / "circuit.json").read_bytes()
    assert not (tmp_path / "state.safetensors").exists()

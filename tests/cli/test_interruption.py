"""Ctrl-C at any moment is one line and exit code 130; two runs never work in one folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import circuitvit
from circuitvit._lock import Lock
from circuitvit.cli.output import LOCK
from circuitvit.errors import FileError
from tests.cli.cases import Run

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")

STARTED = (
    "import signal, sys, circuitvit; sys.stdout.write('.'); sys.stdout.flush()\n"
    "from circuitvit.cli import main; main()"
)
"""Says when Python is up and the package found: the milliseconds before are not ours."""


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(circuitvit.__file__).parents[1])}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.read(1) == "."
    return process


@pytest.mark.parametrize("delay", [0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5])
def test_ctrl_c_while_starting_is_one_line(delay: float, behaviour: list[object], tmp_path: Path) -> None:
    """The moments lie in the import of the command line, of torch and timm, and in the work itself."""
    process = start(STARTED, "discover", *behaviour, "--within", "1h", "--out", tmp_path / "new" / "out")
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    assert "Traceback" not in complaint
    assert process.returncode == 130
    (line,) = complaint.splitlines()
    assert line.startswith("interrupted: nothing has been saved")


HOLDER = """
import sys, time
from pathlib import Path
from circuitvit._lock import Lock
with Lock(Path(sys.argv[1]), "the folder out"):
    sys.stdout.write("."); sys.stdout.flush(); time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> subprocess.Popen[str]:
    """A live process that holds the lock `tmp_path / LOCK`."""
    return start(HOLDER, tmp_path / LOCK)


def test_a_second_run_is_told_who_is_at_work(
    holder: subprocess.Popen[str], run: Run, behaviour: list[object], tmp_path: Path
) -> None:
    (tmp_path / "state.safetensors").touch()  # what a run at work has kept so far
    for more in ([], ["--resume"]):
        second = run("discover", *behaviour, *more, "--out", tmp_path)
        complaint = second.stderr
        assert second.exit_code == 2
        assert f"error: the folder {tmp_path} is in use: process {holder.pid} on " in complaint
        assert "has been at work there since 20" in complaint
        assert "interrupted run" not in complaint
    holder.kill()
    holder.communicate()


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_of_a_dead_process_is_taken_over(
    holder: subprocess.Popen[str], tmp_path: Path, kind: signal.Signals
) -> None:
    with pytest.raises(FileError, match=rf"process {holder.pid} on "), Lock(tmp_path / LOCK, "it"):
        pass
    holder.send_signal(kind)
    holder.communicate()
    assert (tmp_path / LOCK).exists()
    with Lock(tmp_path / LOCK, "it"):
        assert f'"pid": {os.getpid()}' in (tmp_path / LOCK).read_text()
    assert not (tmp_path / LOCK).exists()


COUNTER = """
import sys
from pathlib import Path
from circuitvit._lock import Lock
from circuitvit.errors import FileError
sys.stdout.write("."); sys.stdout.flush()
folder, done = Path(sys.argv[1]), 0
while done < 200:
    try:
        with Lock(folder / "lock", "it"):
            number = int((folder / "count").read_text())
            (folder / "count").write_text(str(number + 1))
            done += 1
    except FileError:
        pass
"""


def test_two_processes_are_never_inside_at_once(tmp_path: Path) -> None:
    (tmp_path / "count").write_text("0")
    both = [start(COUNTER, tmp_path) for _ in range(2)]
    for process in both:
        assert process.communicate(timeout=120) == ("", "")
    assert (tmp_path / "count").read_text() == "400"
    assert not (tmp_path / "lock").exists()


def test_threads_are_told_apart_too(tmp_path: Path) -> None:
    refused: list[str] = []

    def enter() -> None:
        try:
            with Lock(tmp_path / "lock", "the state x"):
                pass
        except FileError as error:
            refused.append(str(error))

    with Lock(tmp_path / "lock", "the state x"):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    assert refused[0].startswith(f"the state x is in use: process {os.getpid()} on ")

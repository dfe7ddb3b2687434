"""Several processes find what one finds; and a run that loses one of them ends, and can be gone on with."""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
from collections.abc import Callable
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import circuitvit as cv
from circuitvit.attribution import METHODS
from circuitvit.attribution.scoring import Running
from circuitvit.cli.program import app
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.engine import processes, state
from circuitvit.errors import FileError, OptionError, ProcessError
from circuitvit.pruning import MaskSettings
from circuitvit.tasks import PreparedTask
from tests.rightness import micro

pytestmark = pytest.mark.skipif(os.name == "nt", reason="kills and forks")

PAIRS = 5
PLAN = cv.Plan(steps=5, trim_runs=12, batch_size=4)


@cache
def model() -> cv.Model:
    return cv.wrap(micro())


def task_of(pairs: int, together: bool = False, **options: Any) -> PreparedTask:
    draw = torch.Generator().manual_seed(0)
    clean, corrupt = torch.randn(2, pairs, *model().preprocessing.shape, generator=draw)
    task = cv.Task(clean, corrupt, metric=cv.logit_diff(0, 1), **options)
    return task.prepare(model(), processes=together)


# -- the group -----------------------------------------------------------------------------------

Work = Callable[..., None]


def start(count: int, work: Work, *given: object) -> list[int | None]:
    """Run `work(number, *given)` in so many processes; their exit codes."""
    forks = sys.platform == "linux" and not torch.cuda.is_available()
    # what torch has loaded is not loaded again; but a GPU does not survive a fork
    context: Any = get_context("fork" if forks else "forkserver")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    members = [context.Process(target=member, args=(n, count, port, work, given)) for n in range(count)]
    for each in members:
        each.start()
    for each in members:
        each.join(timeout=100)
        if each.is_alive():
            each.kill()
            raise AssertionError("a process waits for another")
    return [each.exitcode for each in members]


def member(number: int, count: int, port: int, work: Work, given: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(count)}
    work(number, *given)


# -- the same results ----------------------------------------------------------------------------


def everything(together: bool, out: Path) -> dict[str, Any]:
    """What every long function finds; circuits as masks."""
    found: dict[str, Any] = {}
    for pairs in (1, PAIRS):
        task = task_of(pairs, together)
        found[f"exact, {pairs}"] = cv.attribute(task.model, task, "exact", progress=False).values
        circuit = cv.acdc(task.model, task, tau=0.01, divergence="metric", progress=False)
        found[f"acdc, {pairs}"] = circuit.kept
        found[f"find, {pairs}"] = cv.find(task.model, task, plan=PLAN, progress=False).circuit.kept
        report = cv.verify(task.model, task, circuit, n_random=3, n_bootstrap=100, progress=False)
        found[f"verify, {pairs}"] = np.array([[each.circuit, each.complement] for each in report.task.pairs])
    found["hybrid"] = cv.attribute(task.model, task, "hybrid", progress=False).values
    learned = cv.learn_mask(task.model, task, 20, MaskSettings(steps=6, batch_size=3), progress=False)
    found["learn_mask"] = learned.circuit.kept
    found["openness"] = np.nan_to_num(learned.openness, neginf=0.0)
    averaged = task_of(PAIRS, together, ablation=cv.Mean())  # over all pairs, whoever has them
    found["mean"] = cv.attribute(averaged.model, averaged, "local", batch_size=2, progress=False).values
    sizes = cv.FamilySettings(fractions=(0.2, 1), progress=False)
    compared = cv.compare(task.model, task, ["eap"], held_out=0.4, settings=sizes)
    found["compare"] = np.array([point.faithfulness for point in compared["eap"].points])
    read = {"batch_size": 2, "processes": together, "progress": False}
    activations = cv.activations(task.model, task.clean.take(0, PAIRS), ["resid1", "logits"], **read)
    found |= {name: values.numpy() for name, values in activations.items()}
    cv.activations(task.model, task.clean.take(0, PAIRS), ["resid1"], **read, out=out)
    return found


def find_everything(number: int, folder: Path) -> None:
    with cv.engine.joined():
        np.savez(folder / f"{number}.npz", **everything(True, folder / "acts.safetensors"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], bytes]:
    out = tmp_path_factory.mktemp("alone") / "acts.safetensors"
    return everything(False, out), out.read_bytes()


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_find_what_one_finds(
    count: int, alone: tuple[dict[str, Any], bytes], tmp_path: Path
) -> None:
    assert start(count, find_everything, tmp_path) == [0] * count
    expected, file = alone
    members = [np.load(tmp_path / f"{number}.npz") for number in range(count)]
    for name, value in expected.items():
        first = members[0][name]
        assert all(np.array_equal(first, other[name]) for other in members[1:]), name
        if value.dtype == bool or name.startswith("exact"):
            assert np.array_equal(first, value), name
        else:
            assert np.abs(first - value).max() <= 1e-6 * max(1.0, np.abs(value).max()), name
    assert (tmp_path / "acts.safetensors").read_bytes() == file


# -- a process that dies -------------------------------------------------------------------------


def search(folder: Path, together: bool) -> None:
    """A search that keeps its state after every run, and writes the circuit."""
    task = task_of(PAIRS, together)
    found = cv.find(task.model, task, plan=PLAN, state=folder / "state", progress=False)
    if processes.is_first(together):
        found.circuit.save(folder / "circuit.json")


def searching(number: int, folder: Path, victim: int | None, moment: int) -> None:
    """One process of the search; the victim dies when it has said something so many times."""
    exchange, said = processes._exchange, 0

    def dying(send: Callable[[], object]) -> None:
        nonlocal said
        said += 1
        if number == victim and said == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        exchange(send)

    processes._exchange, state.EVERY = dying, 0.0
    try:
        with cv.engine.joined():
            search(folder, True)
    except ProcessError as error:
        (folder / f"{number}.txt").write_text(str(error))
    else:
        (folder / f"{number}.txt").write_text(str(said))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a search that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    assert start(2, searching, folder, None, 0) == [0, 0]
    assert not (folder / "state").exists()
    return folder


@pytest.mark.parametrize("victim", [0, 1])
def test_a_run_that_lost_a_process_goes_on_with_any_number(victim: int, whole: Path, tmp_path: Path) -> None:
    said = int((whole / "0.txt").read_text())
    codes = start(2, searching, tmp_path, victim, random.Random(victim).randrange(said // 2, said))
    assert codes[victim] == -signal.SIGKILL
    message = (tmp_path / f"{1 - victim}.txt").read_text()
    assert "another process of this run has ended" in message
    assert f"{tmp_path / 'state'} holds what has been done" in message
    if victim:
        search(tmp_path, False)
    else:
        assert start(3, searching, tmp_path, None, 0) == [0, 0, 0]
    assert (tmp_path / "circuit.json").read_bytes() == (whole / "circuit.json").read_bytes()
    assert not (tmp_path / "state").exists()


def refusing(number: int, folder: Path) -> None:
    """What the first process refuses, all refuse, and with the same words."""
    (folder / "state").write_text("no state")
    with cv.engine.joined():
        task = task_of(1, True)
        with pytest.raises(FileError, match="no state file"):
            cv.acdc(task.model, task, tau=0.01, state=folder / "state", progress=False)


def test_what_one_refuses_all_refuse(tmp_path: Path) -> None:
    assert start(2, refusing, tmp_path) == [0, 0]


# -- the command line ----------------------------------------------------------------------------


def commanded(number: int, folder: Path) -> None:
    behaviour = ["--model", "catdog-tiny", "--target", "cat", "--foil", "dog", "--method", "exact"]
    images = ["--clean", folder / "cat.png", "--corrupt", folder / "dog.png", "--out", folder / "out"]
    ask = ["attribute", *behaviour, *images]
    result = CliRunner().invoke(app, list(map(str, ask)))
    assert result.exit_code == 0, result.output
    (folder / f"{number}.txt").write_text(result.stdout)


def test_processes_share_a_command(tmp_path: Path) -> None:
    """As `torchrun` starts it, on one pair, whose edges are shared; one of them speaks and writes."""
    for side, (picture,) in zip(("cat", "dog"), catdog_pairs(1, preprocessed=False), strict=True):
        pixels = (picture * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / f"{side}.png")
    assert start(2, commanded, tmp_path) == [0, 0]
    assert "wrote" in (tmp_path / "0.txt").read_text()
    assert (tmp_path / "1.txt").read_text() == ""
    task = cv.Task(tmp_path / "cat.png", tmp_path / "dog.png", metric=cv.logit_diff("cat", "dog"))
    expected = cv.attribute(cv.load("catdog-tiny"), task, "exact", progress=False).values
    found = cv.EdgeScores.load(tmp_path / "out" / "scores.json").values
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()  # threads may be fewer or more


def test_other_commands_are_refused_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(app, ["models"])
    assert result.exit_code == 2
    assert "start it without torchrun" in result.stderr


# -- shares --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, PAIRS])
def test_shares_are_all_pairs_in_order(count: int) -> None:
    clean, corrupt = catdog_pairs(PAIRS, seed=0)
    prepared = cv.Task(clean, corrupt, metric=cv.logit_diff("cat", "dog")).prepare(cv.load("catdog-tiny"))
    rows = [
        [int(row) for batch in prepared.share(number, count).batches(2) for row in batch.rows]
        for number in range(count)
    ]
    assert [row for share in rows for row in share] == list(range(PAIRS))
    assert max(map(len, rows)) - min(map(len, rows)) <= 1


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.by_pair])
def test_the_scores_of_the_shares_add_up(method: str) -> None:
    """Also where one share has nothing to explain: its images are equal."""
    clean, corrupt = catdog_pairs(4, seed=0)
    corrupt = torch.cat([clean[:2], corrupt[2:]])
    prepared = cv.Task(clean, corrupt, metric=cv.logit_diff("cat", "dog")).prepare(cv.load("catdog-tiny"))
    score, how = METHODS[method].score, Running(batch_size=2)
    expected = score(prepared, how)
    found = score(prepared.share(0, 2), how) + score(prepared.share(1, 2), how)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_without_a_group_of_processes_there_is_nothing_to_share() -> None:
    task = cv.Task(*catdog_pairs(2, seed=0), metric=cv.logit_diff("cat", "dog"))
    with pytest.raises(OptionError, match="torchrun"):
        cv.attribute(cv.load("catdog-tiny"), task, processes=True, progress=False)

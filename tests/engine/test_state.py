"""State files: an interrupted run that is called again ends as if nothing had happened."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import circuitvit as cv
from circuitvit.attribution import exact
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.engine import Evaluator, Replay, state
from circuitvit.engine.state import task_digest
from circuitvit.errors import CircuitViTError, FileError, OptionError
from circuitvit.pruning import Plan
from circuitvit.pruning.smaller import Shrinking
from circuitvit.pruning.thinning import Thinner, ThinSettings
from circuitvit.tasks import PreparedTask

PLAN = Plan(steps=20, trim_runs=300, batch_size=4)


@pytest.fixture(scope="module")
def prepared() -> PreparedTask:
    model = cv.load("catdog-tiny")
    return cv.Task(*catdog_pairs(6, seed=0), metric=cv.logit_diff("cat", "dog")).prepare(model)


@pytest.fixture(autouse=True)
def _save_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "EVERY", 0.0)


def find(prepared: PreparedTask, path: Path | None) -> Any:
    found = cv.find(prepared.model, prepared, plan=PLAN, state=path, progress=False)
    return found.circuit.kept, found.faithfulness, [each.faithfulness for each in found.candidates]


def thinned(prepared: PreparedTask, path: Path | None) -> Any:
    settings = ThinSettings(rate=0.3, pairs=4, batch_size=2)
    found = cv.thin(prepared.model, prepared, [200, 100, 20], settings, state=path, progress=False)
    return tuple(each.kept for each in found.circuits), found.faithfulness


def acdc(prepared: PreparedTask, path: Path | None) -> Any:
    return cv.acdc(prepared.model, prepared, 0.02, state=path, progress=False).kept


def exact_scores(prepared: PreparedTask, path: Path | None) -> Any:
    return cv.attribute(prepared.model, prepared, "exact", batch_size=3, state=path, progress=False).values


class Calls:
    """Counts the calls of a function, and raises Ctrl-C at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        self.count, self.last = 0, -1
        original = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self.last:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)


RUNS = [
    pytest.param(thinned, Thinner, "step", 7, id="thin"),
    pytest.param(acdc, Replay, "__call__", 90, id="acdc"),
    pytest.param(exact_scores, exact._Visit, "effects", 70, id="exact"),
]


@pytest.mark.parametrize(("run", "owner", "name", "after"), RUNS)
def test_a_run_goes_on_where_ctrl_c_ended_it(
    run: Callable[..., Any],
    owner: Any,
    name: str,
    after: int,
    prepared: PreparedTask,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "state.safetensors"
    calls = Calls(monkeypatch, owner, name)
    expected = run(prepared, None)
    whole, calls.count, calls.last = calls.count, 0, after
    with pytest.raises(KeyboardInterrupt):
        run(prepared, path)
    assert path.exists()
    calls.count, calls.last = 0, -1
    assert _same(run(prepared, path), expected)
    assert calls.count < whole - after / 2, "what was done was done again"
    assert not path.exists()


@pytest.mark.parametrize(
    ("plan", "owner", "name", "after"),
    [
        (PLAN, Thinner, "step", 9),
        (PLAN, Shrinking, "step", 4),
        (PLAN, Evaluator, "_run", 40),
        (Plan(steps=0, trim_runs=50, batch_size=4), Evaluator, "_run", 40),
    ],
)
def test_ctrl_c_ends_a_search_with_the_best_so_far_and_it_can_go_on(
    plan: Plan,
    owner: Any,
    name: str,
    after: int,
    prepared: PreparedTask,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "state.safetensors"
    calls = Calls(monkeypatch, owner, name)
    whole = cv.find(prepared.model, prepared, plan=plan, progress=False)
    assert calls.count > after
    calls.count, calls.last = 0, after
    stopped = cv.find(prepared.model, prepared, plan=plan, state=path, progress=False)
    assert "it was interrupted" in stopped.summary
    assert 0.9 <= stopped.faithfulness <= 1.1
    assert len(whole.circuit) <= len(stopped.circuit) < prepared.graph.n_edges
    calls.last = -1
    again = cv.find(prepared.model, prepared, plan=stopped.plan, progress=False)
    assert again.circuit == stopped.circuit, "the plan says how far it came"
    assert path.exists()
    gone_on = cv.find(prepared.model, prepared, plan=plan, state=path, progress=False)
    assert gone_on.circuit == whole.circuit
    assert gone_on.plan == whole.plan
    assert not path.exists()


def test_ctrl_c_gives_the_best_so_far_where_the_state_cannot_be_written(
    prepared: PreparedTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> Path:
        raise FileError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr(state, "write_bytes", full)
    Calls(monkeypatch, Shrinking, "step").last = 4
    with pytest.warns(UserWarning, match="cannot be resumed from here: cannot write"):
        found = cv.find(prepared.model, prepared, plan=PLAN, state=tmp_path / "state", progress=False)
    assert "it was interrupted" in found.summary
    assert not list(tmp_path.iterdir())


def _same(found: Any, expected: Any) -> bool:
    if isinstance(expected, tuple):
        return all(_same(*both) for both in zip(found, expected, strict=True))
    return bool(np.array_equal(found, expected))


# -- refusals ------------------------------------------------------------------------------------------


@pytest.fixture
def left_over(prepared: PreparedTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state file of an interrupted search."""
    path = tmp_path / "state.safetensors"
    with monkeypatch.context() as patch:
        Calls(patch, Shrinking, "step").last = 5
        find(prepared, path)
    return path


def test_the_state_of_another_task_is_refused_and_kept(prepared: PreparedTask, left_over: Path) -> None:
    content = left_over.read_bytes()
    other = cv.Task(*catdog_pairs(6, seed=1), metric=cv.logit_diff("cat", "dog")).prepare(prepared.model)
    with pytest.raises(OptionError, match="another task"):
        find(other, left_over)
    assert left_over.read_bytes() == content


def test_the_state_of_another_model_is_refused(prepared: PreparedTask, left_over: Path) -> None:
    module = cv.load("catdog-tiny").module
    with torch.no_grad():
        module.blocks[0].mlp.fc1.bias += 1.0  # type: ignore[union-attr, operator, index]
    task = cv.Task(*catdog_pairs(6, seed=0), metric=cv.logit_diff(0, 1))
    with pytest.raises(OptionError, match="another model"):
        find(task.prepare(cv.wrap(module)), left_over)


def test_the_state_of_other_settings_is_refused(prepared: PreparedTask, left_over: Path) -> None:
    with pytest.raises(OptionError, match="another method or settings"):
        acdc(prepared, left_over)


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"\xff" * 8 + b"{}"])
def test_a_file_that_is_no_state_is_refused(prepared: PreparedTask, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "state.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileError, match="no state file"):
        acdc(prepared, path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("change", ["a number", "a tensor missing", "another number of edges", "a bit"])
def test_a_state_that_was_changed_is_refused(prepared: PreparedTask, left_over: Path, change: str) -> None:
    with safe_open(left_over, "pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    if change == "a number":
        metadata["numbers"] = metadata["numbers"].replace('"failures": 0', '"failures": 1')
        assert '"failures": 1' in metadata["numbers"]
    elif change == "a tensor missing":
        del tensors["losses"]
    elif change == "another number of edges":
        tensors["losses"] = tensors["losses"][:-1].clone()
    else:
        tensors["candidates"].flatten()[0] ^= 1
    save_file(tensors, left_over, metadata)
    with pytest.raises(FileError, match="has been changed"):
        find(prepared, left_over)


def test_a_missing_folder_is_refused_before_the_work(prepared: PreparedTask, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="there is no folder"):
        acdc(prepared, tmp_path / "missing" / "state.safetensors")


def test_a_folder_in_which_nothing_can_be_made_is_refused_before_the_work(
    prepared: PreparedTask, tmp_path: Path
) -> None:
    path = tmp_path / "state.safetensors"
    path.with_name(f"{path.name}.lock").mkdir()  # refused by the system also where root runs the tests
    with pytest.raises(FileError, match=r"cannot work with the state .*: cannot write .*lock"):
        acdc(prepared, path)


def test_a_method_that_is_over_at_once_takes_no_state(prepared: PreparedTask, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="eap takes no 'state': it belongs to 'exact'"):
        cv.attribute(prepared.model, prepared, "eap", state=tmp_path / "state.safetensors", progress=False)


def test_an_error_of_ours_leaves_no_state(prepared: PreparedTask, tmp_path: Path) -> None:
    images = prepared.clean.take(0, 2)
    equal = cv.Task(images, images, metric=cv.logit_diff("cat", "dog"))
    with pytest.raises(CircuitViTError):
        cv.acdc(prepared.model, equal, 0.1, state=tmp_path / "state.safetensors", progress=False)
    assert not list(tmp_path.iterdir())


def test_the_digest_of_a_task_follows_everything_that_changes_a_result(prepared: PreparedTask) -> None:
    model, images = prepared.model, tuple(catdog_pairs(2, seed=0))
    base = cv.Task(*images, metric=cv.logit_diff("cat", "dog"))
    others = [
        base,
        cv.Task(*images, metric=cv.logit_diff("dog", "cat")),
        cv.Task(*images, metric=cv.log_probability("cat")),
        cv.Task(*images, metric=lambda logits: logits[..., 0]),
        cv.Task(*images, metric=lambda logits: logits[..., 1]),
        cv.Task(images[1], images[0], metric=cv.logit_diff("cat", "dog")),
        base.with_options(ablation=cv.Mean()),
        base.with_options(ablation=cv.Noise(seed=1)),
        base.with_options(ablation=cv.Noise(seed=2)),
        base.with_options(direction="denoising"),
    ]
    digests = [task_digest(task.prepare(model)) for task in others]
    assert len(set(digests)) == len(others)
    assert digests[0] == task_digest(base.prepare(model))


def test_a_state_that_another_process_works_with_is_refused(prepared: PreparedTask, tmp_path: Path) -> None:
    path = tmp_path / "search.state"
    code = (
        "import sys, time; from pathlib import Path; from circuitvit._lock import Lock\n"
        "with Lock(Path(sys.argv[1]), 'it'): print(flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, f"{path}.lock"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(FileError, match=rf"the state .*search.state is in use: process {other.pid} on "):
            acdc(prepared, path)
        other.kill()
    acdc(prepared, path)  # a dead process holds nothing
    assert not list(tmp_path.iterdir())

"""Long work shows life: a bar where somebody watches, whole lines half a minute apart in a log."""

from __future__ import annotations

import ast
import io
import re
from contextlib import redirect_stderr
from pathlib import Path

import pytest

import circuitvit._progress as progress
from circuitvit._progress import announce, progress_bar

Capture = pytest.CaptureFixture[str]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that bars see, in seconds; tests turn it."""
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def work(clock: list[float], steps: int, seconds: float, **options: object) -> None:
    with progress_bar(steps, "refining", **{"show": True, **options}) as bar:  # type: ignore[arg-type]
        for _ in range(steps):
            clock[0] += seconds
            bar.update()


def test_a_log_gets_a_line_every_half_minute_and_one_at_the_end(capsys: Capture, clock: list[float]) -> None:
    work(clock, steps=100, seconds=1.0, unit="edge")
    lines = capsys.readouterr().err.splitlines()
    assert [re.findall(r"\((\d+) of 100 edges\)", line) for line in lines] == [
        ["30"],
        ["60"],
        ["90"],
        ["100"],
    ]
    assert lines[0] == "refining: 30 % (30 of 100 edges), 00:30 gone, 01:10 left"
    assert lines[-1] == "refining: 100 % (100 of 100 edges), 01:40 gone, 00:00 left"
    assert not any("\r" in line for line in lines)


def test_steps_that_take_long_are_lines_of_their_own(capsys: Capture, clock: list[float]) -> None:
    work(clock, steps=3, seconds=4000.0)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4  # the last is the end
    assert "1:06:40" in lines[0]


def test_short_work_and_quiet_work_write_nothing(capsys: Capture, clock: list[float]) -> None:
    work(clock, steps=29, seconds=1.0)
    work(clock, steps=100, seconds=10.0, show=False)
    assert capsys.readouterr().err == ""


def test_of_several_processes_one_speaks(
    capsys: Capture, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    work(clock, steps=100, seconds=10.0)
    assert capsys.readouterr().err == ""


def test_an_interrupted_run_says_how_far_it_was(capsys: Capture, clock: list[float]) -> None:
    with pytest.raises(KeyboardInterrupt), progress_bar(10, "acdc", True) as bar:  # noqa: PT012
        for _ in range(5):
            clock[0] += 20.0
            bar.update()
        raise KeyboardInterrupt
    assert capsys.readouterr().err.splitlines()[-1].startswith("acdc: 50 % (5 of 10)")


def test_a_terminal_gets_a_bar(clock: list[float]) -> None:
    terminal = Terminal()
    with redirect_stderr(terminal):
        work(clock, steps=10, seconds=1.0)
    assert "refining:" in terminal.getvalue()
    assert "\n" not in terminal.getvalue().rstrip("\n")  # one line, which is rewritten


def test_what_is_announced_is_said_unless_quiet(capsys: Capture) -> None:
    announce("about 3 min", show=False)
    announce("at least 2 min", show=True)
    assert capsys.readouterr().err == "at least 2 min\n"


@pytest.mark.parametrize("gone", [None, "closed", "broken"])
def test_work_goes_on_where_nobody_can_be_told(
    gone: str | None, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    stream = {"closed": io.StringIO(), "broken": Broken()}.get(str(gone))
    if stream is not None and gone == "closed":
        stream.close()
    monkeypatch.setattr("sys.stderr", stream)
    announce("about 3 min", show=True)
    work(clock, steps=3, seconds=60.0)
    assert clock[0] == 180.0


def test_units_are_words_of_which_there_can_be_many() -> None:
    units = [
        text.value
        for path in sorted(Path(progress.__file__).parent.rglob("*.py"))
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "progress_bar"
        for given in [*call.args[3:], *(each.value for each in call.keywords if each.arg == "unit")]
        for text in ast.walk(given)
        if isinstance(text, ast.Constant) and isinstance(text.value, str)
    ]
    assert {"run", "second"} <= set(units)
    assert [each for each in units if len(each) < 3 or each.endswith("s")] == []


def test_half_a_minute_is_the_default() -> None:
    assert progress.EVERY == 30.0


def test_what_a_bar_says_besides_waits_for_its_next_line() -> None:
    """`refresh=False`: a bar that draws itself at every step would flood a log."""
    calls = [
        (path.name, ast.unparse(call))
        for path in sorted(Path(progress.__file__).parent.rglob("*.py"))
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call)
        and getattr(call.func, "attr", "").startswith(("set_postfix", "set_desc"))
    ]
    assert len(calls) >= 4
    assert [each for each in calls if "refresh=False" not in each[1]] == []

"""Where results go: to the screen as tables, remarks to stderr, and files to a folder.

The folder is checked before long work, guarded against a second run, and honest about what was saved. Where
stdout is not a terminal the text is plain and 100 columns wide, so that it can be read in a log.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from circuitvit._lock import Lock
from circuitvit.cli import stop_at_once
from circuitvit.cli.processes import is_other
from circuitvit.cli.wording import in_options
from circuitvit.errors import CircuitViTError, FileError, ProcessError, counted

if TYPE_CHECKING:
    from circuitvit.verification import Report, Section

PIPED_WIDTH = 100


class Row(NamedTuple):
    """A line of a table of results: a figure, its value, and what it means."""

    figure: str
    value: str
    meaning: str = ""


class Clock:
    """How long each phase of the work took.

    Example:
        >>> clock = Clock()
        >>> with clock.phase("search"):
        ...     pass
        >>> list(clock.seconds)
        ['search']
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.1f} s ({phases})"


def stdout() -> Console:
    """The console that results are printed to; names in them are never taken for markup."""
    width = None if sys.stdout.isatty() else PIPED_WIDTH
    return Console(highlight=False, markup=False, emoji=False, width=width, quiet=is_other())


def show(text: str) -> None:
    """Print a line of text, which the terminal may wrap but which is never cut: paths can be copied."""
    stdout().print(text, soft_wrap=True)


def show_rows(title: str, rows: Iterable[Row], *, explain: bool = False) -> None:
    """Print a table of results; `explain` adds the column that says what each figure means."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    if explain:
        table.add_column(style="dim", overflow="fold")
    for row in rows:
        table.add_row(*(row if explain else row[:2]))
    console = stdout()
    console.print()
    console.print(title, style="bold")
    console.print(table)


def show_notes(title: str, notes: Iterable[str]) -> None:
    """Print remarks as a list under a title; nothing where there are none."""
    table = Table.grid(padding=(0, 1))
    for note in notes:
        table.add_row("-", in_options(note))
    if table.row_count:
        console = stdout()
        console.print()
        console.print(title, style="bold")
        console.print(table)


# -- the folder ---------------------------------------------------------------------------------

STATE = "state.safetensors"
"""Where a long run keeps what it has done, until it ends."""

LOCK = ".circuitvit.lock"
"""Names the process that is at work in the folder."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with what has been saved by then as its message."""


def interruptible() -> None:
    """From here on Ctrl-C is an exception, as there is something to save; before, it ends the process."""
    if signal.getsignal(signal.SIGINT) is stop_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Folder:
    """An output folder, used as a context manager around all work whose results it will hold.

    Entering makes it, tries to write, and locks it against other processes. Leaving by an exception says what
    was saved; if that is nothing, folders that were made for it are taken away again. Of processes that share
    the work only the first does any of it.

    Attributes:
        path: of the folder.
        saved: names of the files that were written, in order.

    Raises:
        FileError: on entering, if the folder cannot be made or written to, or is another process's at work.
    """

    def __init__(self, path: Path, expected: tuple[str, ...], *, guarded: bool = True) -> None:
        """A folder for files of the `expected` names, which tell older results from those of this run.

        It is not locked where it is not `guarded`: for a single file among others.
        """
        self.path = path
        self._lock = Lock(path / LOCK, f"the folder {path}") if guarded else None
        self.saved: list[str] = []
        self._expected = expected
        self._made: list[Path] = []

    def __enter__(self) -> Folder:
        if is_other():
            interruptible()
            return self
        missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        probe = self.path / f".{os.getpid()}.probe"
        try:
            for folder in reversed(missing):
                folder.mkdir(exist_ok=True)
                self._made.insert(0, folder)
            probe.touch()
            probe.unlink()
        except OSError as error:
            self._unmake()
            reason = "it is a file" if self.path.is_file() else error.strerror or error
            raise FileError(f"cannot write to the folder {self.path}: {reason}") from error
        if self._lock is not None:
            self._lock.__enter__()
        interruptible()
        return self

    def write(self, name: str, save: Callable[[Path], object]) -> None:
        """Write the file `name` by calling `save` with its path; a second time replaces it."""
        if not is_other():
            save(self.path / name)
        if name not in self.saved:
            self.saved.append(name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.__exit__()
        if error is None or is_other():
            return
        if not self.saved:
            self._unmake()
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(self.account()) from None
        if isinstance(error, ProcessError) or (isinstance(error, CircuitViTError) and self.saved):
            typer.echo(self.account(), err=True)

    def state(self, resume: bool) -> Path:
        """The file in which a long run keeps what it has done.

        Args:
            resume: whether one that an interrupted run has left may be gone on with.

        Raises:
            FileError: if there is one and it may not.
        """
        path = self.path / STATE
        if path.exists() and not resume and not is_other():
            raise FileError(
                f"{path} holds what an interrupted run has done: add --resume to go on with it, or delete "
                "it to start anew"
            )
        return path

    def account(self) -> str:
        """What was saved, and what in the folder is older, in one line.

        Example:
            >>> folder = Folder(Path("out"), ("circuit.json", "report.md"))
            >>> folder.account()
            'nothing has been saved'
        """
        going_on = f"; --resume goes on from {self.path / STATE}" if (self.path / STATE).exists() else ""
        if not self.saved:
            return f"{'no result' if going_on else 'nothing'} has been saved{going_on}"
        older = [name for name in self._expected if name not in self.saved and (self.path / name).exists()]
        left = f"; from an earlier run: {', '.join(older)}" if older else ""
        return f"saved in {self.path}: {', '.join(self.saved)}{left}{going_on}"

    def _unmake(self) -> None:
        for folder in self._made:
            with contextlib.suppress(OSError):  # somebody else has put something into it
                folder.rmdir()


# -- reports -------------------------------------------------------------------------------------


def report_rows(report: Report) -> list[Row]:
    """The figures of a verification that a reader asks for first."""
    size, section = report.size, report.headline
    asked = "" if size.asked is None else f"; {size.asked:,} asked for"
    dead = f"; {size.dead:,} more are dead" if size.dead else ""
    pairing = report.provenance.parameters.get("pairing")
    rows = [
        *([Row("pairs", str(pairing), "how images were put together")] if pairing else []),
        Row(
            "edges",
            f"{size.edges:,} of {size.graph_edges:,} ({size.density:.1%}{asked}{dead})",
            "kept; all others are ablated",
        ),
        Row("nodes", f"{size.nodes} of {size.graph_nodes}", "input, heads, MLPs and logits in it"),
        Row(
            "faithfulness",
            f"{section.faithfulness} on {_pairs(section)}",
            "share of the behaviour that the circuit alone keeps; 1 is all of it",
        ),
    ]
    if report.held_out is not None:
        task = report.task
        rows.append(Row("", f"{task.faithfulness} on {_pairs(task)}", "the same, where it was found"))
    lost = "share of the behaviour that is lost without the circuit"
    rows.append(Row("necessity", str(section.necessity), lost))
    if section.agreement is not None:
        often = "how often the circuit alone sees what the model sees"
        rows.append(Row("same top class", f"{section.agreement.value:.0%} of pairs", often))
    if section.random is not None:
        random = section.random
        rows.append(
            Row(
                "random circuits",
                f"{random.mean.value:.3f} on average, at most {random.high:.3f}",
                f"faithfulness of {random.n} connected ones with as many edges into every stage",
            )
        )
    return rows


def _pairs(section: Section) -> str:
    held_out = "held-out " if section.images == "held-out" else ""
    return counted(section.n_pairs, f"{held_out}pair")

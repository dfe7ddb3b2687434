"""What appears on the screen: results as tables on stdout, remarks on stderr.

Where stdout is not a terminal the text is plain and 100 columns wide, so that it can be read in a log.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import typer

if TYPE_CHECKING:
    from rich.console import Console

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
    from rich.console import Console

    width = None if sys.stdout.isatty() else PIPED_WIDTH
    return Console(highlight=False, markup=False, emoji=False, width=width)


def show(text: str) -> None:
    """Print a line of text, which the terminal may wrap but which is never cut: paths can be copied."""
    stdout().print(text, soft_wrap=True)


def show_rows(title: str, rows: Iterable[Row], *, explain: bool = False) -> None:
    """Print a table of results; `explain` adds the column that says what each figure means."""
    from rich.table import Table

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
    from rich.table import Table

    table = Table.grid(padding=(0, 1))
    for note in notes:
        table.add_row("-", note)
    if table.row_count:
        console = stdout()
        console.print()
        console.print(title, style="bold")
        console.print(table)


def remark(text: str) -> None:
    """Print something worth knowing on stderr."""
    typer.echo(f"note: {text}", err=True)


# -- reports -------------------------------------------------------------------------------------


def report_rows(report: Report) -> list[Row]:
    """The figures of a verification that a reader asks for first."""
    size, section = report.size, report.headline
    asked = "" if size.asked is None else f"; {size.asked:,} asked for"
    dead = f"; {size.dead:,} more are dead" if size.dead else ""
    rows = [
        Row(
            "edges",
            f"{size.edges:,} of {size.graph_edges:,} ({size.density:.1%}{asked}{dead})",
            "kept; all others are ablated",
        ),
        Row(
            "nodes",
            f"{size.nodes} of {size.graph_nodes}",
            "input, heads, MLPs and logits in it",
        ),
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
        rows.append(Row("same top class", f"{section.agreement.value:.0%} of images", often))
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
    return f"{section.n_pairs} {held_out}pair{'' if section.n_pairs == 1 else 's'}"

"""`circuitvit doctor`: what is wrong with an installation, and the line that mends it."""

from __future__ import annotations

import typer
from rich.table import Table
from rich.text import Text

from circuitvit.cli.checks import Finding, findings, look
from circuitvit.cli.options import command
from circuitvit.cli.output import show, stdout
from circuitvit.errors import counted

STYLES = {"ok": "green", "note": "yellow", "broken": "bold red"}


@command("Checks")
def doctor(online: bool = False) -> None:
    """See whether everything that the library needs is there and fits together, and what mends what does not:
    versions, torch and torchvision, GPUs, extras, Graphviz, browsers, folders for downloads.

    It runs where torch or timm cannot be imported, changes nothing and asks nobody. It ends with exit code 1
    where something is broken; notes are of what can be done without. For example:

    ```sh
    circuitvit doctor

    circuitvit doctor --online
    ```

    Args:
        online: ask also whether the hub of models answers, which is the only look beyond this machine.
    """
    found = findings(look(online))
    _show(found)
    broken, notes = ([each for each in found if each.level == level] for level in ("broken", "note"))
    if broken:
        show(f"\n{counted(len(broken), 'thing')} broken: type the lines with a $, from the top")
        raise typer.Exit(1)
    show("\nnothing is broken" + (f", {counted(len(notes), 'note')}" if notes else ""))


def _show(found: list[Finding]) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="cyan")
    table.add_column(overflow="fold")
    for each in found:
        table.add_row(Text(each.level, style=STYLES[each.level]), each.what, each.said)
    console = stdout()
    console.print(table)
    for each in found:
        if each.mend:
            console.print(f"\n{each.what}: {each.level}")
            console.print(f"  $ {each.mend}", soft_wrap=True)

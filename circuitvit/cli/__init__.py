"""The command line, `circuitvit COMMAND`: it parses, calls the library and prints.

`library` reads what the library says of its arguments, `options` makes options of it, `inputs` and `output`
are what commands share, and every other file is a command or two. Commands use the library through its lazy
face, `import circuitvit as cv`: help loads none of it.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn


def main() -> None:
    """Entry point of the program `circuitvit`: Ctrl-C ends it with one line from here on.

    Until a command has something to save (`circuitvit.cli.output.interruptible`) the process ends at once: an
    exception would surface in the middle of another library's import.
    """
    signal.signal(signal.SIGINT, stop_at_once)
    try:
        from circuitvit.cli.program import app  # after the line above: importing takes time too

        app(prog_name="circuitvit")
    except ImportError as error:  # of what others provide; of our own it is a bug, with its traceback
        if (error.name or "").startswith("circuitvit"):
            raise
        _diagnose(error)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done or told: the end is no work to interrupt


def _diagnose(error: ImportError) -> NoReturn:
    """Say what `circuitvit doctor` would, where something is missing that a command is made with."""
    from circuitvit.cli.checks import as_text, findings, look

    os.write(2, f"cannot go on: {type(error).__name__}: {error}\n\n{as_text(findings(look()))}\n".encode())
    sys.exit(1)


def stop_at_once(*_: object) -> None:
    """End the process, saying that nothing is lost."""
    os.write(2, b"interrupted: nothing has been saved\n")
    os._exit(130)

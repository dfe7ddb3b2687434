"""The program: its commands, and the one place where errors become messages and exit codes.

| exit code | meaning |
| --- | --- |
| 0 | done |
| 1 | done, but the result does not hold up (`demo`), or something is broken (`doctor`, or another of the
processes that share the work has ended); or a bug |
| 2 | refused: an option, a file, images or a model that cannot be used |
| 130 | interrupted with Ctrl-C |
"""

from __future__ import annotations

import re
import time
import warnings
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from circuitvit._version import __version__
from circuitvit.cli.asked import ASKED
from circuitvit.cli.processes import is_other
from circuitvit.cli.wording import remark
from circuitvit.errors import CircuitViTError, ProcessError

BROKEN = 1
REFUSED = 2
INTERRUPTED = 130

GRACE = 5.0
"""Seconds in which `torchrun` ends all processes after one has ended."""

COMMANDS = {
    "demo": ("demo", "See it work: the circuit by which a small model tells cats from dogs."),
    "discover": ("discover", "Find the circuit behind a behaviour, prove it by ablation, draw it."),
    "attribute": ("attribute", "Score every edge of a model, without choosing a circuit."),
    "verify": ("verify", "Test a saved circuit by ablation: is it enough, is it needed?"),
    "compare": ("compare", "Faithfulness by size for several methods, on one plot."),
    "compare-models": ("compare_models", "Two or more models on one sheet, for one behaviour."),
    "diff": ("drift", "What changed in a new checkpoint: does a stored circuit still hold?"),
    "across": ("over_training", "When does a circuit form in training, and what changes at once?"),
    "audit": ("audit", "Does a model decide by something that it should not go by?"),
    "why": ("misread", "Why was this image misread, and can what did it be spared?"),
    "draw": ("draw", "Draw a saved circuit: as a page, SVG, PDF, PNG, DOT, GraphML and others."),
    "view": ("inside", "Look at a model: what each part says of a class, where heads look, and more."),
    "patch": ("patch", "Which head or MLP, patched alone, moves the answer or flips it?"),
    "scrub": ("scrub", "Does a circuit carry what it is said to carry, and nothing else?"),
    "words": ("words", "Write a word on photographs: does a model look, or does it read?"),
    "activations": ("activations", "Read what a model computes, by name, into a file."),
    "classes": ("classes", "List the classes of a model, or those of a group such as all cats."),
    "models": ("models", "List the models that can be used."),
    "train": ("models", "Train a small Vision Transformer of your own."),
    "train sae": ("dictionaries", "Train a dictionary of features on what a model computes."),
    "doctor": ("doctor", "See what is missing or does not fit, and the line that mends it."),
}
"""Every command, the module of this room that it is in, and what it does; in the order of the help page."""


class Program(TyperGroup):
    """The group of commands. It loads the one that is chosen, and ends every refusal in one message."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, (_, summary) in COMMANDS.items():
            self.commands[name] = TyperCommand(name, short_help=summary)

    def load(self, name: str) -> Any:
        """The command of a name, with its options; `commands` holds their summaries only."""
        found = getattr(import_module(f"circuitvit.cli.{COMMANDS[name][0]}"), re.sub(r"[- ]", "_", name))
        if not isinstance(found, typer.Typer):
            alone = typer.Typer(add_completion=False, rich_markup_mode="markdown")
            alone.command(name)(found)
            found = alone
        command = typer.main.get_command(found)
        command.name = name
        return command

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The arguments of a run, which are remembered: reports say how they are made again."""
        ASKED.set(tuple(args))
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that arguments begin with, loaded; the name of one is of two words."""
        if " ".join(args[:2]) in COMMANDS:
            args = [" ".join(args[:2]), *args[2:]]
        name, _, rest = super().resolve_command(ctx, args)
        return name, None if name is None else self.load(name), rest

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _told
                return super().invoke(ctx)
        except CircuitViTError as error:
            if is_other():
                time.sleep(GRACE)  # the first process says it, and torchrun ends this one; unless it is alone
            raise _ended("error", str(error), REFUSED) from error
        except ProcessError as error:
            ended = _ended("ended", str(error), BROKEN)
            time.sleep(2 * GRACE)  # another process may have refused something, and has yet to say it
            raise ended from error
        except KeyboardInterrupt as stop:
            if is_other():
                raise typer.Exit(INTERRUPTED) from stop
            raise _ended(
                "interrupted", str(stop) or "files that had been written stay", INTERRUPTED
            ) from stop
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            advice = "the memory is full: try --batch-size 1, or a --memory below what is free"
            raise _ended("error", advice, REFUSED) from error


app = typer.Typer(
    name="circuitvit",
    cls=Program,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"circuitvit {__version__}")
        raise typer.Exit()


@app.callback()
def circuitvit(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Find, verify and draw the circuits inside Vision Transformers.

    Start here, with a bundled model and drawn pictures, in less than a minute:

    ```sh
    circuitvit demo --out out/demo
    ```

    Then with a model and images of your own: a picture that shows a behaviour, and one that does not.

    ```sh
    circuitvit discover --help
    ```
    """


def _told(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    """Print a warning as a remark: where in the code it was raised helps nobody at a command line."""
    remark(str(message))


def _ended(what: str, message: str, code: int) -> typer.Exit:
    """Print why the program ends, on stderr, and give the exception that ends it."""
    typer.secho(f"{what}: ", err=True, fg="red", bold=True, nl=False)
    typer.echo(message, err=True)
    return typer.Exit(code)


def _out_of_memory(error: BaseException) -> bool:
    """torch says it in a RuntimeError, worded differently for the CPU and for a GPU."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in said or "not enough memory" in said

"""The program: its commands, and the one place where errors become messages and exit codes.

| exit code | meaning |
| --- | --- |
| 0 | done |
| 1 | done, but the result does not hold up (`demo`), or a bug, with its traceback |
| 2 | refused: an option, a file, images or a model that cannot be used |
| 130 | interrupted with Ctrl-C |
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from circuitvit._version import __version__
from circuitvit.cli.attribute import attribute
from circuitvit.cli.compare import compare
from circuitvit.cli.demo import demo
from circuitvit.cli.discover import discover
from circuitvit.cli.models import models, train
from circuitvit.cli.output import Interrupted
from circuitvit.cli.verify import verify
from circuitvit.cli.view import attention, attribution, draw, evidence, heatmap, lens, positions
from circuitvit.errors import CircuitViTError

REFUSED = 2
INTERRUPTED = 130


class Program(TyperGroup):
    """The group of commands, which ends every refusal in one message and never in a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except CircuitViTError as error:
            raise _ended("error", str(error), REFUSED) from error
        except KeyboardInterrupt as stop:
            saved = str(stop) if isinstance(stop, Interrupted) else "nothing has been saved"
            raise _ended("interrupted", saved, INTERRUPTED) from stop
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            advice = "the memory is full: try --batch-size 1, or a --memory below what is free"
            raise _ended("error", advice, REFUSED) from error


app = typer.Typer(
    name="circuitvit",
    cls=Program,
    no_args_is_help=True,
    add_completion=False,
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


_COMMANDS = (
    (demo, "See it work: the circuit by which a small model tells cats from dogs."),
    (discover, "Find the circuit behind a behaviour, prove it by ablation, draw it."),
    (attribute, "Score every edge of a model, without choosing a circuit."),
    (verify, "Test a saved circuit by ablation: is it enough, is it needed?"),
    (compare, "Faithfulness by size for several methods, on one plot."),
    (draw, "Draw a saved circuit: SVG, HTML, PDF, PNG, DOT, GraphML and others."),
    (models, "List the models that can be used."),
    (train, "Train a small Vision Transformer of your own."),
)
_VIEWS = (
    (lens, "What class each patch would be, layer by layer."),
    (attribution, "What each part says straight to the logits."),
    (attention, "Where the heads of a layer look."),
    (positions, "Heads that look at places, not at content."),
    (evidence, "Which patches speak for a class."),
    (heatmap, "Effects of heads and MLPs, from scores."),
)
view = typer.Typer(
    name="view",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Other looks at a model: what each part says of a class, where heads look, what each patch is.",
)
for _group, _commands in ((app, _COMMANDS), (view, _VIEWS)):
    for _command, _summary in _commands:
        _group.command(short_help=_summary)(_command)
app.add_typer(view)


def _ended(what: str, message: str, code: int) -> typer.Exit:
    """Print why the program ends, on stderr, and give the exception that ends it."""
    typer.secho(f"{what}: ", err=True, fg="red", bold=True, nl=False)
    typer.echo(message, err=True)
    return typer.Exit(code)


def _out_of_memory(error: BaseException) -> bool:
    """torch says it in a RuntimeError, worded differently for the CPU and for a GPU."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in said or "not enough memory" in said

"""`circuitvit compare-models`: two or more models on one sheet, for one behaviour and the same images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

import circuitvit as cv
from circuitvit.attribution.methods import find_method
from circuitvit.cli.inputs import (
    BehaviourOptions,
    ImageOptions,
    ModelOptions,
    RunOptions,
    VerificationOptions,
    load_model,
    make_held_out,
    make_task,
)
from circuitvit.cli.options import command, group
from circuitvit.cli.output import Clock, Folder, show, show_notes, stdout
from circuitvit.errors import OptionError

if TYPE_CHECKING:
    from circuitvit.views import ModelSheet

FILES = ("models.html", "models.json", "models.csv", "models.md")
CIRCUIT = "circuit_{}.json"

LETTERS = "ABCDEFGH"
"""What models are called in options, in their order."""


@group("Models", "models.load", checkpoint="--checkpoint FILE", arch="--arch KEY=VALUE",
       classes="--classes FILE", head="--head FILE", device="--device DEVICE",
       dtype="--dtype DTYPE")  # fmt: skip
@dataclass(frozen=True)
class ManyModelsOptions:
    """How models are loaded. What begins with a model's letter is for that one: B:weights.safetensors.

    Attributes:
        checkpoint: a file with the weights of a model. Can be repeated.
        pretrained: download the weights of those models that are named by timm's names and have no
            `--checkpoint`.
        arch: what the weights of a model need timm to build, such as B:num_classes=37. Can be repeated.
        classes: a file with the names of a model's classes, one on each line. Can be repeated.
        head: a linear classifier to put on a model's features. Can be repeated.
        device: where the models run, such as cpu, cuda or cuda:1.
        dtype: of the weights: float32, float64, bfloat16 or float16.
    """

    checkpoint: list[str] | None = None
    pretrained: bool = False
    arch: list[str] | None = None
    classes: list[str] | None = None
    head: list[str] | None = None
    device: str = "cpu"
    dtype: str | None = None


@command(
    "Comparison", "views.compare_models", method="--method NAME", within="--within TIME", out="--out -o DIR"
)
def compare_models(
    *,
    models: Annotated[list[str], typer.Argument(metavar="MODEL MODEL...", help="As for --model elsewhere.")],
    given: ManyModelsOptions,
    images: ImageOptions,
    behaviour: BehaviourOptions,
    verification: VerificationOptions,
    method: list[str] | None = None,
    edges: int = 200,
    within: str = "30s",
    resume: bool = False,
    out: Path = Path("out"),
    run: RunOptions,
) -> None:
    """Two or more models on one sheet, for one behaviour and the same images: how well each shows it, its
    circuit and what that is made of, the logit lens along its depth, how right estimates are, and the cost.

    Models are called A, B, C in their order. What begins with a letter is for that model alone, as each has
    its own names for its classes:

    ```sh
    circuitvit compare-models catdog-tiny vit_tiny_patch16_224 --checkpoint B:vit_tiny.safetensors \\
        --clean cats/ --corrupt dogs/ --held-out 0.36 \\
        --target A:cat --foil A:dog --target B:group:cat --foil B:group:dog --out out/models
    ```

    Args:
        models: a bundled model, a name of timm's, `hf:NAME_OR_FOLDER`, `open_clip:MODEL/TAG_OR_FILE` or a
            file; the same one twice is a control.
        method: a scoring method to hold against exact effects. Can be repeated. [default: eap, eap-ig, local]
        resume: take over the models that an earlier run left in `--out`.
        out: folder for the results; made if missing, older ones replaced.
    """
    if len(models) < 2:
        raise OptionError(f"one model cannot be compared: give two or more, not only {', '.join(models)}")
    if len(models) > len(LETTERS):
        raise OptionError(f"a sheet has room for {len(LETTERS)} models, not for {len(models)}")
    for name in method or ():
        find_method(name)
    cv.attribution.budget.seconds(within)
    letters = LETTERS[: len(models)]
    behaviours = _behaviours(behaviour, letters)
    tasks = [make_task(images, each, run.seed) for each in behaviours]
    others = [make_held_out(verification, each, run.seed, images.pair) for each in behaviours]
    asked = _models(models, given, letters)
    clock = Clock()
    with Folder(out, (*FILES, *map(CIRCUIT.format, letters))) as folder:
        saved = folder.path / "models.json"
        known = cv.ModelSheet.load(saved) if resume and saved.exists() else None
        with clock.phase("models"):
            loaded = [load_model(each) for each in asked]
        with clock.phase("comparison"):
            sheet = cv.compare_models(
                loaded, tasks, held_out=_held_out(others), edges=edges, within=within,
                n_random=verification.random, known=known, after_each=partial(_write, folder), seed=run.seed,
                methods=method or cv.views.models_compared.USUAL, **run.settings(),
            )  # fmt: skip
    _show(sheet)
    show_notes("Bear in mind", sheet.caveats)
    show(f"\ntime {clock}\nwrote {folder.path}: {', '.join(folder.saved)}")
    show(f"open this in a browser: {folder.path / FILES[0]}")


def _write(folder: Folder, sheet: ModelSheet) -> None:
    for name in FILES:
        folder.write(name, sheet.save)
    for letter, model in zip(LETTERS, sheet.models, strict=False):
        folder.write(CIRCUIT.format(letter), model.circuit.save)


def _show(sheet: ModelSheet) -> None:
    """The main figures, as a table of Markdown."""
    table = Table(box=box.MARKDOWN)
    table.add_column("", overflow="fold")
    for letter, model in zip(LETTERS, sheet.models, strict=False):
        table.add_column(f"{letter} {model.name}", overflow="fold")
    for name, cells in import_module("circuitvit.views.compared_model").table_of(sheet.models):
        table.add_row(name, *cells)
    stdout().print(table)


# -- what is said for one model, and what for all -----------------------------------------------------


def _behaviours(behaviour: BehaviourOptions, letters: str) -> list[BehaviourOptions]:
    """The behaviour as each model calls it."""
    target = for_each("--target", behaviour.target, letters)
    foil = for_each("--foil", behaviour.foil, letters)
    return [replace(behaviour, target=target[each], foil=foil[each]) for each in letters]


def _models(names: Sequence[str], given: ManyModelsOptions, letters: str) -> list[ModelOptions]:
    """How each model is loaded."""
    files: dict[str, Mapping[str, Path | None]] = {}
    for name in ("checkpoint", "classes", "head"):
        option, found = f"--{name}", for_each(f"--{name}", getattr(given, name), letters)
        for letter, values in found.items():
            if len(values or ()) > 1:
                raise OptionError(f"{option} gives two for model {letter}: {' and '.join(values or ())}")
        files[name] = {letter: Path(values[0]) if values else None for letter, values in found.items()}
    arch = for_each("--arch", given.arch, letters)
    bundled = cv.models.zoo.zoo_names()
    return [
        ModelOptions(
            model=name,
            arch=arch[letter],
            pretrained=given.pretrained
            and not (files["checkpoint"][letter] or name in bundled or ":" in name),
            device=given.device,
            dtype=given.dtype,
            **{key: values[letter] for key, values in files.items()},
        )
        for letter, name in zip(letters, names, strict=True)
    ]


def for_each(option: str, values: Sequence[str] | None, letters: str) -> dict[str, list[str] | None]:
    """What an option says of each model: what begins with its letter, or else what is said of all.

    Raises:
        OptionError: for the letter of a model that there is not.

    Example:
        >>> for_each("--target", ["cat", "B:group:cat"], "AB")
        {'A': ['cat'], 'B': ['group:cat']}
    """
    own: dict[str, list[str]] = {letter: [] for letter in letters}
    shared: list[str] = []
    for value in values or ():
        letter, colon, rest = value.partition(":")
        if colon and letter in own:
            own[letter].append(rest.strip())
        elif colon and len(letter) == 1 and letter in LETTERS:
            raise OptionError(f"{option} {value}: there is no model {letter}, only {', '.join(letters)}")
        else:
            shared.append(value)
    return {letter: each or shared or None for letter, each in own.items()}


def _held_out(others: Sequence[Any]) -> Any:
    """One task for each model, or the share that is held out, or None."""
    return others[0] if isinstance(others[0], (float, type(None))) else list(others)

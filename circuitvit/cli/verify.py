"""`circuitvit verify`: test a saved circuit by ablation, or a file of hypotheses, on whatever images."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import circuitvit as cv
from circuitvit.cli.discover import PAGE, save_page, show_page
from circuitvit.cli.inputs import (
    BehaviourOptions,
    ImageOptions,
    ModelOptions,
    RunOptions,
    VerificationOptions,
    load_model,
    make_held_out,
    make_task,
    prepare_both,
    prompted,
)
from circuitvit.cli.options import command, group
from circuitvit.cli.output import Clock, Folder, Row, report_rows, show, show_notes, show_rows
from circuitvit.cli.processes import many
from circuitvit.cli.repeat import with_command
from circuitvit.errors import OptionError

if TYPE_CHECKING:
    from circuitvit.graph import Circuit
    from circuitvit.models import Model
    from circuitvit.tasks import Task
    from circuitvit.verification import HypothesisFile, Verdict

REPORTS = ("report.json", "report.md", "report.csv")
FILES = (*REPORTS, PAGE)
CLAIMS = ("hypotheses.json", "hypotheses.md")
HYPOTHESES = (".yaml", ".yml")


@group("Model")
@dataclass(frozen=True)
class NamedModel(ModelOptions):
    """A model that a file of hypotheses may name instead of an option.

    Attributes:
        model: as for `circuitvit discover`; a file of hypotheses may name it.
    """

    model: str = ""


@command("Output", shares=True, out="--out -o DIR")
def verify(
    circuit: Annotated[Path, typer.Argument(metavar="CIRCUIT.json|HYPOTHESES.yaml")],
    model: NamedModel,
    images: ImageOptions,
    behaviour: BehaviourOptions,
    verification: VerificationOptions,
    run: RunOptions,
    out: Path | None = None,
) -> None:
    """Test a saved circuit by ablation: is it enough for the behaviour, is it needed, and is it better than
    random circuits of its shape? Model and behaviour are given as for `circuitvit discover`; the images may
    be others, or the ablation, to see whether the circuit still holds.

    For example:

    ```sh
    circuitvit verify out/cat_dog/circuit.json --model vit_tiny_patch16_224 \\
        --checkpoint vit_tiny.safetensors --clean cat2.jpg --corrupt dog2.jpg \\
        --target tabby --foil "Border collie" --out out/cat_dog_2
    ```

    A file of hypotheses is tested claim by claim; it may name model and images itself:

    ```sh
    circuitvit verify docs/cat_dog_hypotheses.yaml --out out/hypotheses
    ```

    The exit code is 1 if a claim gets another verdict than the file expects.

    Args:
        circuit: a circuit, from `circuitvit discover` or from EAP-IG and MIB; or hypotheses, as YAML.
        out: folder for report.json, report.md, report.csv and circuit.html, a page with the report; nothing
            is written without.
    """
    if circuit.suffix.lower() in HYPOTHESES:
        verify_hypotheses(circuit, model, images, behaviour, run, out)
        return
    if not model.model:
        raise OptionError("name the model with --model, as for `circuitvit discover`")
    saved = cv.Circuit.load(circuit)  # first of all: a file that cannot be read needs no model
    named = prompted(model, saved.provenance)
    task = make_task(images, behaviour, run.seed)
    held_out = make_held_out(verification, behaviour, run.seed, images.pair)
    clock = Clock()
    place: Folder | nullcontext[None] = nullcontext() if out is None else Folder(out, FILES)
    with place as folder:
        with clock.phase("model"):
            loaded = load_model(named)
        _check_origin(circuit, saved, loaded, behaviour)
        with clock.phase("images"):
            prepared, others = prepare_both(loaded, task, held_out, run)
        with clock.phase("verification"):
            report = cv.verification.verify(
                loaded, prepared, saved, held_out=others, n_random=verification.random, seed=run.seed,
                **run.settings(),
            )  # fmt: skip
        report = with_command(report, named, f"cv.Circuit.load({str(circuit)!r})")
        if folder is not None:
            for name in REPORTS:
                folder.write(name, report.save)
            folder.write(PAGE, partial(save_page, loaded, prepared, saved, report))
    rows = [*report_rows(report), Row("time", str(clock))]
    show_rows(f"Circuit of {loaded.name} for {prepared.metric.label}", rows)
    show_notes("Caveats", report.warnings)
    if folder is not None:
        show(f"\nwrote {folder.path}: {', '.join(folder.saved)}")
        show_page(folder)


def _check_origin(path: Path, circuit: Circuit, model: Model, behaviour: BehaviourOptions) -> None:
    """Refuse a circuit of another graph before anything is run; that of other weights is a caveat later."""
    graph = model.graph
    if behaviour.groups is not None:
        tokens = len(model.prefix) + math.prod(model.grid)
        graph = graph.with_groups(cv.tasks.GROUPS[behaviour.groups](model, tokens).names)
    try:
        graph.check_same(circuit.graph, str(path))
    except OptionError as error:
        raise OptionError(
            f"{error}. Give the --model and the --groups that the circuit was found with"
        ) from error


# -- hypotheses ------------------------------------------------------------------------------------


def verify_hypotheses(
    path: Path,
    model: ModelOptions,
    images: ImageOptions,
    behaviour: BehaviourOptions,
    run: RunOptions,
    out: Path | None,
) -> None:
    """Test every claim of a file; what is given as an option goes before what the file says.

    Raises:
        CircuitViTError: if the file, the model or the images cannot be used.
    """
    file = cv.read_hypotheses(path)
    named = replace(
        model, model=model.model or file.model or "", checkpoint=model.checkpoint or file.checkpoint
    )
    if file.prompts and not (model.prompt or model.head or model.classes):
        named = replace(named, prompt=list(file.prompts), template=list(file.templates) or None)
    if not named.model:
        raise OptionError(f"{path} names no model: add model: {{name: ...}} to it, or give --model")
    task = _task(file, images, behaviour, run)
    clock = Clock()
    place: Folder | nullcontext[None] = nullcontext() if out is None else Folder(out, CLAIMS)
    with place as folder:
        with clock.phase("model"):
            loaded = load_model(named)
        with clock.phase("claims"):
            prepared = cv.tasks.prepare(loaded, task, processes=many())
            verdicts = cv.verification.check_hypotheses(
                loaded, prepared, file.hypotheses, alpha=file.alpha, seed=run.seed or file.seed,
                batch_size=run.batch_size, memory=run.budget,
            )  # fmt: skip
        if folder is not None:
            for name in CLAIMS:
                folder.write(name, lambda place: cv.verification.save_verdicts(verdicts, place))
    wrong = _show(loaded.name, verdicts, file.expected, clock)
    if folder is not None:
        show(f"\nwrote {folder.path}: {', '.join(folder.saved)}")
    if wrong:
        raise typer.Exit(1)


def _task(file: HypothesisFile, images: ImageOptions, behaviour: BehaviourOptions, run: RunOptions) -> Task:
    if images != ImageOptions():
        said = dict(file.behaviour)
        given = replace(
            behaviour,
            metric=said.get("metric", behaviour.metric),
            target=behaviour.target or _several(said.get("target")),
            foil=behaviour.foil or _several(said.get("foil")),
            to=behaviour.to or said.get("to"),
            ablation=said.get("ablation", behaviour.ablation),
        )
        return make_task(images, given, run.seed)
    if file.task is None:
        raise OptionError(
            f"{file.path} names no images: add task: {{clean: ..., corrupt: ...}}, or give --clean"
        )
    return file.task


def _several(spec: object) -> list[str] | None:
    if spec is None:
        return None
    return [str(each) for each in spec] if isinstance(spec, (list, tuple)) else [str(spec)]


def _show(
    model: str, verdicts: tuple[Verdict, ...], expected: tuple[str | None, ...], clock: Clock
) -> list[str]:
    """Print every verdict; give the claims whose verdict is not the one the file expects."""
    rows = [Row(verdict.verdict, f"{verdict.claim}. {verdict.reason}") for verdict in verdicts]
    show_rows(f"{len(verdicts)} claims about {model}", [*rows, Row("time", str(clock))])
    wrong = [
        f"{verdict.claim}: the file expects {wanted!r}, found {verdict.verdict!r}"
        for verdict, wanted in zip(verdicts, expected, strict=True)
        if wanted is not None and wanted != verdict.verdict
    ]
    show_notes("Not as expected", wrong)
    return wrong

"""`circuitvit verify`: test a saved circuit by ablation, or a file of hypotheses, on whatever images."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from circuitvit.cli.folder import Folder
from circuitvit.cli.grouped import grouped
from circuitvit.cli.inputs import load_model, make_held_out, make_task, prepare_both
from circuitvit.cli.options import (
    BehaviourOptions,
    ImageOptions,
    ModelOptions,
    RunOptions,
    VerificationOptions,
    option,
)
from circuitvit.cli.screen import Clock, Row, remark, report_rows, show, show_notes, show_rows
from circuitvit.errors import OptionError

if TYPE_CHECKING:
    from circuitvit.graph import Circuit
    from circuitvit.models import Model
    from circuitvit.tasks import PreparedTask

FILES = ("report.json", "report.md")
HYPOTHESES = (".yaml", ".yml")


@dataclass(frozen=True)
class NamedModel(ModelOptions):
    """A model that a file of hypotheses may name instead of an option."""

    model: Annotated[
        str,
        option(
            "Model", "--model -m", "As for `circuitvit discover`; a file of hypotheses may name it.", "NAME"
        ),
    ] = ""


@grouped
def verify(
    circuit: Annotated[
        Path,
        typer.Argument(
            help="A circuit, from `circuitvit discover` or from EAP-IG and MIB; or hypotheses, as YAML.",
            metavar="CIRCUIT.json|HYPOTHESES.yaml",
        ),
    ],
    model: NamedModel,
    images: ImageOptions,
    behaviour: BehaviourOptions,
    verification: VerificationOptions,
    run: RunOptions,
    out: Annotated[
        Path | None, option("Output", "--out -o", "Folder for report.json and report.md.", "DIR")
    ] = None,
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
    """
    if circuit.suffix.lower() in HYPOTHESES:
        from circuitvit.cli.hypotheses import verify_hypotheses

        verify_hypotheses(circuit, model, images, behaviour, run, out)
        return
    if not model.model:
        raise OptionError("name the model with --model, as for `circuitvit discover`")
    from circuitvit.graph import Circuit
    from circuitvit.verification import verify as test

    saved = Circuit.load(circuit)  # first of all: a file that cannot be read needs no model
    task = make_task(images, behaviour, run.seed)
    held_out = make_held_out(verification, behaviour, run.seed)
    clock = Clock()
    place: Folder | nullcontext[None] = nullcontext() if out is None else Folder(out, FILES)
    with place as folder:
        with clock.phase("model"):
            loaded = load_model(model)
        with clock.phase("images"):
            prepared, others = prepare_both(loaded, task, held_out, run)
        _check_origin(circuit, saved, loaded, prepared)
        with clock.phase("verification"):
            report = test(
                loaded, prepared, saved, held_out=others, n_random=verification.random, seed=run.seed,
                batch_size=run.batch_size, memory=run.budget, progress=run.progress,
            )  # fmt: skip
        if folder is not None:
            for name in FILES:
                folder.write(name, report.save)
    rows = [*report_rows(report), Row("time", str(clock))]
    show_rows(f"Circuit of {loaded.name} for {prepared.metric.label}", rows)
    show_notes("Caveats", report.warnings)
    if folder is not None:
        show(f"\nwrote {folder.path}: {', '.join(folder.saved)}")


def _check_origin(path: Path, circuit: Circuit, model: Model, prepared: PreparedTask) -> None:
    """Refuse a circuit of another graph; say so when it was found on other weights."""
    if circuit.graph != prepared.graph:
        raise OptionError(
            f"{path} belongs to another graph: {circuit.graph} in the file, {prepared.graph} of "
            f"{model.name}. Give the --model and the --groups that the circuit was found with"
        )
    made = circuit.provenance
    if made.weights and made.weights != model.weights_hash:
        remark(f"the circuit was found on other weights ({made.model or 'a model'}, {made.weights[:12]})")

"""`circuitvit across`: when a circuit forms in the checkpoints of a training, and what changes at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import circuitvit as cv
from circuitvit.cli.inputs import (
    BehaviourOptions,
    ImageOptions,
    ModelOptions,
    RunOptions,
    load_model,
    make_task,
    prompted,
)
from circuitvit.cli.options import command, group
from circuitvit.cli.output import Clock, Folder, Row, show, show_notes, show_rows
from circuitvit.errors import OptionError, counted

if TYPE_CHECKING:
    from circuitvit.models import Model

LINES, STRIP = "over_training.svg", "strip.svg"
FILES = (LINES, STRIP, "across.json", "across.csv", "across.md")
LISTED = 12


@group("Model")
@dataclass(frozen=True)
class CheckpointsOptions(ModelOptions):
    """How checkpoints are loaded.

    Attributes:
        model: what the files of FOLDER are weights of, such as vit_tiny_patch16_224; not for those that
            `circuitvit train` wrote.
    """

    model: str = ""


@command("Training", "views.across", circuit="--circuit FILE", out="--out -o DIR", within="--within TIME")
def across(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Checkpoints; the last number of a name is the step.")
    ],
    given: CheckpointsOptions,
    images: ImageOptions,
    behaviour: BehaviourOptions,
    circuit: Path | None = None,
    method: str = "exact",
    edges: int | None = None,
    window: float = 0.5,
    tolerance: float = 0.1,
    held_out: float = 0.5,
    within: str = "120s",
    out: Path = Path("out"),
    *,
    run: RunOptions,
) -> None:
    """When does a circuit form in training? Behaviour, faithfulness and edges in every checkpoint, which
    changes are sharp, and diagrams as a film strip.

    ```sh
    circuitvit train catdog --checkpoints 20 --out out/catdog

    circuitvit across out/catdog-checkpoints --clean cats/ --corrupt dogs/ --target cat --foil dog
    ```

    Without `--circuit` one is found in the last checkpoint, on half of the pairs; all else is measured on the
    other half. Give 40 pairs or more.

    Args:
        circuit: of the last checkpoint, from `circuitvit discover`.
        out: folder for figures, numbers and a text; made if missing, older ones replaced.
    """
    if given.checkpoint is not None:
        raise OptionError("leave out --checkpoint: FOLDER holds the checkpoints, and --model says of what")
    import_module("circuitvit.views.canvas")  # whether there is matplotlib is found out before long work
    stored = None if circuit is None else cv.Circuit.load(circuit)
    options = given if stored is None else prompted(given, stored.provenance)
    task, clock = make_task(images, behaviour, run.seed), Clock()

    def load(path: Path) -> Model:
        if path.suffix == ".json":
            return load_model(replace(options, model=str(path)))
        if not options.model:
            raise OptionError(f"{path} holds weights alone: say with --model of what")
        return load_model(replace(options, checkpoint=path))

    with Folder(out, FILES) as target:
        with clock.phase("checkpoints"):
            found = cv.across(
                folder, task, stored, load=load, method=method, edges=edges, window=window,
                tolerance=tolerance, held_out=held_out, within=within, seed=run.seed, **run.settings(),
            )  # fmt: skip
        target.write(LINES, found.figure().save)
        target.write(STRIP, found.strip)
        for name in FILES[2:]:
            target.write(name, found.save)
    _show(found)
    show(f"\ntime {clock}\nwrote {target.path}: {', '.join(target.saved)}")


def _show(found: cv.Across) -> None:
    show(f"{found}")
    rows = [
        Row(f"step {step:,}", str(whole), "" if carried is None else f"faithfulness {carried}")
        for step, whole, carried in zip(found.steps, found.behaviour, found.faithfulness, strict=True)
    ]
    title = f"Share of the last behaviour, {found.effect:.3g}, on {counted(found.n, 'pair')}"
    show_rows(title, rows, explain=True)
    sharp = sorted((*found.leaps(), *found.jumps()), key=lambda each: -abs(float(each["change"] or 0)))
    rows = [
        Row(str(each["edge"]), f"{each['before']:+.3f} -> {each['since']:+.3f}", _when(each))
        for each in sharp[:LISTED]
    ]
    if rows:
        more = ", the largest" if len(sharp) > LISTED else ""
        show_rows(f"{counted(len(sharp), 'sharp change')}{more}", rows, explain=True)
    show_notes("Bear in mind", found.caveats)


def _when(each: cv.graph.results.Record) -> str:
    return f"between {each['after']:,} and {each['by']:,}, p {each['p_fdr']:.2g}"

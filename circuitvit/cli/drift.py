"""`circuitvit diff`: two checkpoints of one model, and what became of a stored circuit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

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
    tell_pairs,
)
from circuitvit.cli.options import command, group
from circuitvit.cli.output import Clock, Folder, Row, show, show_notes, show_rows
from circuitvit.errors import OptionError, counted, unknown_name

FILES = ("drift.html", "drift.json", "drift.md", "drift.csv")
LISTED = 8


@group("Model")
@dataclass(frozen=True)
class TwoModelsOptions(ModelOptions):
    """How both models are loaded.

    Attributes:
        model: what OLD and NEW are weights of, where they are files of weights alone, such as
            vit_tiny_patch16_224. Without it each of them is a model, as for `--model` elsewhere.
    """

    model: str = ""


@command("Comparison", "verification.diff", circuit="--circuit FILE", accept="--accept VERDICT",
         search="--search TIME", out="--out -o DIR")  # fmt: skip
def diff(
    old: Annotated[str, typer.Argument(metavar="OLD", help="The model that the circuit was found in.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="The same model with other weights.")],
    given: TwoModelsOptions,
    images: ImageOptions,
    behaviour: BehaviourOptions,
    circuit: Path | None = None,
    tolerance: float = 0.1,
    edges: int | None = None,
    search: str | None = None,
    held_out: float = 0.5,
    accept: list[str] | None = None,
    out: Path = Path("out"),
    *,
    run: RunOptions,
) -> None:
    """What changed in a new checkpoint? Does a stored circuit still carry the behaviour, and which edges
    gained or lost effect, with intervals over pairs? The verdict is unchanged, shifted, weaker, rerouted,
    gone or cannot tell; the exit code is 1 unless it is among `--accept`.

    ```sh
    circuitvit diff old.pt new.pt --model vit_tiny_patch16_224 --circuit circuit.json \\
        --clean cats/ --corrupt dogs/ --target group:cat --foil group:dog --out out/diff
    ```

    Give images that the circuit was not found on, 20 pairs or more.

    Args:
        circuit: a circuit of OLD, from `circuitvit discover`. By default one is found on half of the pairs.
        search: look for a circuit in NEW as well, for about so long, such as 60s.
        accept: a verdict to be content with. Can be repeated. [default: unchanged]
        out: folder for the page, the numbers and a text; made if missing, older ones replaced.
    """
    if given.checkpoint is not None:
        raise OptionError("leave out --checkpoint: OLD and NEW are the checkpoints, and --model says of what")
    for verdict in accept or ():
        if verdict not in cv.verification.drift.VERDICTS:
            raise unknown_name("verdict", verdict, cv.verification.drift.VERDICTS)
    stored = None if circuit is None else cv.Circuit.load(circuit)
    task, clock = make_task(images, behaviour, run.seed), Clock()
    with Folder(out, FILES) as folder:
        with clock.phase("models"):
            options = given if stored is None else prompted(given, stored.provenance)
            before, after = (load_model(_one(options, each)) for each in (old, new))
        with clock.phase("images"):
            prepared = cv.tasks.prepare(before, task, run.progress)
            tell_pairs(prepared)
        with clock.phase("comparison"):
            found = cv.diff(
                before, after, prepared, stored, tolerance=tolerance, edges=edges, search=search or False,
                held_out=held_out, seed=run.seed, **run.settings(),
            )  # fmt: skip
        folder.write(FILES[0], partial(cv.export.draw_drift, found))
        for name in FILES[1:]:
            folder.write(name, found.save)
    _show(found)
    show(f"\ntime {clock}\nwrote {folder.path}: {', '.join(folder.saved)}")
    show(f"open this in a browser: {folder.path / FILES[0]}")
    if found.verdict not in (accept or [cv.verification.drift.UNCHANGED]):
        raise typer.Exit(1)


def _one(given: ModelOptions, name: str) -> ModelOptions:
    """How one of the two is loaded."""
    return replace(given, checkpoint=Path(name)) if given.model else replace(given, model=name)


def _show(found: cv.Drift) -> None:
    show(f"{found.verdict.upper()}: {cv.verification.drift.VERDICTS[found.verdict]}\n{found.reason}")
    if found.n:
        rows = [Row(name, str(each)) for name, each in found.figures()]
        show_rows(f"On {counted(found.n, 'pair')}", rows, explain=True)
    for way in ("gained", "lost"):
        edges = found.moved(way)
        rows = [
            Row(str(each["edge"]), f"{each['old']:+.3f} -> {each['new']:+.3f}") for each in edges[:LISTED]
        ]
        if rows:
            show_rows(f"{counted(len(edges), 'edge')} {way} effect, as shares of the old behaviour", rows)
    if found.found is not None:
        show(f"\n{cv.verification.drift.search_told(found)}")
    show_notes("Bear in mind", found.caveats)

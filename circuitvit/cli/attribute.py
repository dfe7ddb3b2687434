"""`circuitvit attribute`: a score for every edge, and the strongest of them on the screen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.table import Table
from rich.text import Text

import circuitvit as cv
from circuitvit.attribution.methods import find_method
from circuitvit.cli.discover import SCORING, about_choice, calibrated, check_scoring, resumes
from circuitvit.cli.inputs import (
    BehaviourOptions,
    ImageOptions,
    ModelOptions,
    RunOptions,
    load_model,
    make_task,
    prepare,
)
from circuitvit.cli.options import Given, command
from circuitvit.cli.output import Clock, Folder, show, show_notes, stdout

if TYPE_CHECKING:
    from circuitvit.graph import EdgeScores

FILES = ("scores.json",)
CALIBRATED = 200
BAR = 24
"""Characters of the longest bar."""

COLOURS = {"supports": "blue", "opposes": "dark_orange"}


@command("Search", shares=True, method="--method NAME", out="--out -o DIR", show_edges="--show N")
def attribute(
    *,
    model: ModelOptions,
    images: ImageOptions,
    behaviour: BehaviourOptions,
    method: str = "local",
    keywords: Annotated[Given, SCORING],
    calibrate: int | None = None,
    resume: bool = False,
    out: Path = Path("out"),
    show_edges: int = 20,
    run: RunOptions,
) -> None:
    """Score every edge of a model: how much would the metric change if this edge alone were ablated? The
    scores are written to scores.json, and the strongest edges are printed. Choose a circuit from them later,
    or let `circuitvit discover` do both.

    For example:

    ```sh
    circuitvit attribute --model vit_tiny_patch16_224 \\
        --checkpoint vit_tiny.safetensors --clean cat.jpg --corrupt dog.jpg \\
        --target tabby --foil "Border collie" --method eap-ig
    ```

    The work can be shared among processes or GPUs: start the same command with
    `torchrun --nproc-per-node N -m circuitvit attribute`.

    Args:
        method: from the fastest to the truth: eap, relp, gim, eap-ig, ceap, atp-qk, atp-star, local,
            hybrid, exact. auto takes the best that `--budget` buys; ifr and random are to compare with.
        calibrate: edges whose exact effects are measured to say how right the scores are; 0 for none.
            [default: 200 for auto, else 0]
        resume: exact: go on where an interrupted run into `--out` ended.
        show_edges: how many edges to print; 0 for none.
        out: folder for the results; made if missing, older ones replaced.
    """
    find_method(method)
    SCORING.check(method, keywords)
    check_scoring(method, calibrate, resume, keywords)
    measured = calibrate if calibrate is not None else CALIBRATED if method == "auto" else 0
    task = make_task(images, behaviour, run.seed)
    clock = Clock()
    with Folder(out, FILES) as folder:
        with clock.phase("model"):
            loaded = load_model(model)
        with clock.phase("images"):
            prepared = prepare(loaded, task, run, verifiable=False)
        with clock.phase("scores"):
            more = {**run.settings(), **keywords}
            if resumes(method):
                more["state"] = folder.state(resume)
            if "seed" in SCORING.takers[method]:
                more["seed"] = run.seed
            scores = cv.attribution.attribute(loaded, prepared, method, **more)
        folder.write("scores.json", scores.save)
        with clock.phase("check"):
            scores = calibrated(loaded, prepared, scores, measured, run)
        folder.write("scores.json", scores.save)
    if show_edges:
        asked = f"{prepared.metric.label}: {scores.method}"
        title = f"Strongest of {len(scores):,} edges of {loaded.name} for {asked}"
        _show_edges(title, scores, show_edges)
    right = [] if scores.fidelity is None else [f"{scores.method}: {scores.fidelity.sentence}"]
    show_notes("How right they are", [*about_choice(scores), *right])
    show(f"\n{prepared.pairing}" if prepared.pairing else "")
    show(f"time {clock}\nwrote {folder.path}: {', '.join(folder.saved)}")


def _show_edges(title: str, scores: EdgeScores, k: int) -> None:
    """The `k` strongest edges with bars, and what their signs mean."""
    console = stdout()
    strongest = scores.strongest(k)
    largest = max((abs(score) for _, score in strongest), default=0.0) or 1.0
    block = "█" if console.encoding.lower().startswith("utf") else "#"
    what = scores.provenance.shares_of
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for name, score in strongest:
        sign = cv.graph.side_of(score, scores.direction, what)
        bar = block * round(BAR * abs(score) / largest)
        number = f"{score:.4g}" if what else f"{score:+.4g}"
        table.add_row(name, number, sign, Text(bar, style=COLOURS.get(sign, "")))
    verb = "ablating" if scores.direction == "noising" else "restoring"
    console.print()
    console.print(title, style="bold")
    meaning = f"the edge's share of {what}" if what else f"how {verb} the edge changes the metric"
    console.print(f"score: {meaning}", style="dim")
    console.print(table)

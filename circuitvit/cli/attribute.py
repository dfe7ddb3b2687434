"""`circuitvit attribute`: a score for every edge, and the strongest of them on the screen."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from circuitvit.cli.fidelity import about_scores, check_calibration, checked
from circuitvit.cli.folder import Folder
from circuitvit.cli.grouped import grouped
from circuitvit.cli.inputs import check_choice, load_model, make_task, prepare
from circuitvit.cli.options import (
    BehaviourOptions,
    BudgetOption,
    ImageOptions,
    ModelOptions,
    OutOption,
    RunOptions,
    option,
)
from circuitvit.cli.screen import Clock, show, show_notes, stdout
from circuitvit.errors import OptionError

if TYPE_CHECKING:
    from circuitvit.graph import EdgeScores

FILES = ("scores.json",)
CALIBRATED = 200
BAR = 24
"""Characters of the longest bar."""

COLOURS = {"supports": "blue", "opposes": "dark_orange"}


@grouped
def attribute(
    model: ModelOptions,
    images: ImageOptions,
    behaviour: BehaviourOptions,
    run: RunOptions,
    method: Annotated[
        str,
        option(
            "Search",
            "--method",
            "From the fastest to the truth: eap, relp, gim, eap-ig, ceap, atp-qk, atp-star, local, hybrid, "
            "exact. auto takes the best that --budget buys; ifr and random are to compare with.",
            "NAME",
        ),
    ] = "local",
    steps: Annotated[int, option("Search", "--steps", "eap-ig methods: points on the path.", "N", min=1)] = 5,
    budget: BudgetOption = None,
    calibrate: Annotated[
        int | None,
        option(
            "Search",
            "--calibrate",
            "Edges whose exact effects are measured to say how right the scores are; 0 for none. "
            "[default: 200 for auto, else 0]",
            "N",
            min=0,
        ),
    ] = None,
    resume: Annotated[
        bool, option("Search", "--resume", "exact: go on where an interrupted run into --out ended.")
    ] = False,
    show_edges: Annotated[int, option("Output", "--show", "How many edges to print.", "N", min=0)] = 20,
    out: OutOption = Path("out"),
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

    Many pairs can be shared among processes or GPUs: start the same command with
    `torchrun --nproc-per-node N -m circuitvit attribute`.
    """
    from circuitvit.attribution import METHODS, Budget
    from circuitvit.attribution import attribute as score
    from circuitvit.engine import joined, launched

    check_choice("method", method, METHODS)
    check_calibration(calibrate)
    if budget is not None and "budget" not in METHODS[method].keywords:
        raise OptionError(f"--method {method} does not use --budget: it belongs to hybrid and auto")
    if budget is not None:
        Budget.parse(budget)
    if resume and "state" not in METHODS[method].keywords:
        raise OptionError(f"--method {method} is over too soon to be resumed: --resume belongs to exact")
    measured = calibrate if calibrate is not None else CALIBRATED if method == "auto" else 0
    task = make_task(images, behaviour, run.seed)
    clock = Clock()
    many = launched() > 1
    with ExitStack() as open_, Folder(out, FILES) as folder:
        number = open_.enter_context(joined(model.device)) if many else 0
        with clock.phase("model"):
            loaded = load_model(_placed(model) if many else model)
        with clock.phase("images"):
            prepared = prepare(loaded, task, run, verifiable=False)
        with clock.phase("scores"):
            state = folder.state(resume) if "state" in METHODS[method].keywords and not many else None
            given = {"steps": steps, "budget": budget, "seed": run.seed, "state": state}
            own = METHODS[method].keywords
            scores = score(
                loaded, prepared, method, batch_size=run.batch_size, memory=run.budget, processes=many,
                progress=run.progress and number == 0,
                **{name: value for name, value in given.items() if name in own and value is not None},
            )  # fmt: skip
        if number:
            return  # the first process writes and prints for all
        folder.write("scores.json", scores.save)
        with clock.phase("check"):
            scores = checked(loaded, prepared, scores, measured, run)
        folder.write("scores.json", scores.save)
    if show_edges:
        asked = f"{prepared.metric.label}: {scores.method}"
        title = f"Strongest of {len(scores):,} edges of {loaded.name} for {asked}"
        _show_edges(title, scores, show_edges)
    show_notes("How right they are", about_scores(scores))
    show(f"\ntime {clock}\nwrote {folder.path}: {', '.join(folder.saved)}")


def _placed(model: ModelOptions) -> ModelOptions:
    """The model on this process's own GPU."""
    return replace(model, device=f"cuda:{os.environ['LOCAL_RANK']}") if model.device == "cuda" else model


def _show_edges(title: str, scores: EdgeScores, k: int) -> None:
    """The `k` strongest edges with bars, and what their signs mean."""
    from rich.table import Table
    from rich.text import Text

    console = stdout()
    strongest = scores.strongest(k)
    largest = max((abs(score) for _, score in strongest), default=0.0) or 1.0
    block = "█" if console.encoding.lower().startswith("utf") else "#"
    helps = -1.0 if scores.direction == "noising" else 1.0
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for name, score in strongest:
        sign = "supports" if score * helps > 0 else "opposes" if score else ""
        bar = block * round(BAR * abs(score) / largest)
        table.add_row(name, f"{score:+.4g}", sign, Text(bar, style=COLOURS.get(sign, "")))
    verb = "ablating" if scores.direction == "noising" else "restoring"
    console.print()
    console.print(title, style="bold")
    console.print(f"score: how {verb} the edge changes the metric", style="dim")
    console.print(table)

"""`circuitvit scrub`: a circuit with claims about what it carries, tested by exchanging all else."""

from __future__ import annotations

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
)
from circuitvit.cli.options import command
from circuitvit.cli.output import show
from circuitvit.cli.view import FIGURES, check_ending, write

DATA = (".json", ".safetensors", ".csv")


@command("Scrubbing", "views.scrub", out="--out -o FILE")
def scrub(
    file: Annotated[
        Path, typer.Argument(help="The circuit and the claims, as YAML or JSON.", metavar="FILE")
    ],
    model: ModelOptions,
    images: ImageOptions,
    behaviour: BehaviourOptions,
    run: RunOptions,
    draws: int = 10,
    copies: int = 4,
    out: list[Path] | None = None,
) -> None:
    """Does the circuit carry what it is said to carry, and nothing else? All that must not matter is
    exchanged between images (causal scrubbing), and the share of the metric that is left is told, with
    what each claim loses alone.

    ```sh
    circuitvit scrub claims.yaml --model catdog-tiny --clean cats/ --corrupt dogs/ \\
        --target cat --foil dog --out scrub.png
    ```

    with this in claims.yaml, and in labels.csv a row for each clean image, and then for each corrupt one:

    ```yaml
    schema: circuitvit.interpretation/1
    circuit: circuit.json
    claims: {m0: species & place, "a3.*": species}
    labels: labels.csv
    ```

    Args:
        draws: how often all images are chosen.
        copies: of each node that are run at most, where the circuit written out as a tree has more.
        out: the ending chooses: .png, .svg or .pdf for a figure; .json or .safetensors for everything; .csv
            for a line for every claim and label. Can be repeated. [default: scrub.png]
    """
    files = out or [Path("scrub.png")]
    for each in files:
        check_ending(each, (*FIGURES, *DATA))
    hypothesis = cv.verification.read_interpretation(file)
    loaded, task = load_model(model), make_task(images, behaviour, run.seed)
    found = cv.scrub(loaded, task, hypothesis, draws=draws, copies=copies, **run.settings())
    for each in files:
        write(each, found.figure().save if each.suffix in FIGURES else found.save)
    show(str(found))
    show(f"\nwrote {', '.join(map(str, files))}")

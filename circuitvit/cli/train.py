"""`circuitvit train`: a small ViT of your own, in minutes, on two cores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def train(
    dataset: Annotated[
        str,
        typer.Argument(
            help="catdog (drawn animal faces), digits (scikit-learn's handwritten digits), or a folder with "
            "one subfolder of pictures per class.",
            metavar="catdog|digits|FOLDER",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where to write: OUT.safetensors (weights) and OUT.json (card). [default: out/NAME]",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Of initial weights and data: the same seed gives the same model.")
    ] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Batches to train on. [default: the data set's own]")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Pictures in a batch. [default: the data set's own]")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of AdamW, at its peak. [default: the data set's own]")
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(min=0, help="Of AdamW. [default: the data set's own]")
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="How hard heads and MLPs that the model can do without are pulled to silence; more gives "
            "smaller circuits. [default: the data set's own]",
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            min=8,
            help="Side in pixels to which a folder's pictures are resized; a multiple of 8. [default: 48]",
        ),
    ] = None,
    depth: Annotated[int | None, typer.Option(min=1, help="Layers.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Attention heads in each layer.")] = None,
    width: Annotated[
        int | None, typer.Option(min=1, help="Of the residual stream; a multiple of the heads.")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Of torch. The weights are the same to the byte for the same number only."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Train a small Vision Transformer whose circuits can be understood completely.

    `circuitvit train catdog` and `circuitvit train digits` are how the bundled models catdog-tiny and
    digits-tiny were made. The defaults repeat their recipes: on the same machine, with the same versions and
    number of threads, they give the same weights, byte for byte.

    A folder is read as one class per subfolder, such as birds/robin/1.jpg and birds/wren/1.jpg. All
    pictures are opened before training begins; a fifth of each class is held out to measure accuracy.

    Ctrl-C stops early and keeps what has been learned. Use the result like any other model:

        circuitvit train birds/ --out out/birds

        circuitvit discover --model out/birds.json ...
    """
    from circuitvit.training import train as run  # torch and timm take seconds to import
    from circuitvit.training import training_data

    data = training_data(dataset, seed, size)
    options = {
        "seed": seed,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "sparsity": sparsity,
        "threads": threads,
    }
    shape = {"depth": depth, "num_heads": heads, "embed_dim": width}
    result = run(
        data,
        out if out is not None else Path("out") / data.name,
        architecture={name: value for name, value in shape.items() if value is not None},
        quiet=quiet,
        **{name: value for name, value in options.items() if value is not None},
    )
    console = Console()
    if result.interrupted:
        console.print(f"Stopped after {result.card.recipe['steps_done']} steps.")
    for name, value in result.card.accuracy.items():
        if name != "n":
            console.print(f"accuracy, {name.replace('_', ' ')}: {value:.1%}")
    console.print(f"wrote {result.weights} and its card", soft_wrap=True)

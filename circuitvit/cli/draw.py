"""`circuitvit draw`: a saved circuit as a diagram, or as a graph for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from circuitvit.cli.folder import Folder
from circuitvit.cli.options import option
from circuitvit.cli.screen import show


def draw(
    circuit: Annotated[
        Path,
        typer.Argument(help="From `circuitvit discover`, or from EAP-IG and MIB.", metavar="CIRCUIT.json"),
    ],
    out: Annotated[
        Path,
        typer.Argument(
            help="The ending chooses the format: .svg, .html (an interactive page), .pdf, .png, .dot, .tex, "
            ".graphml (for Gephi and networkx) or .json.",
            metavar="OUT.svg",
        ),
    ],
    title: Annotated[str | None, option("Output", "--title", "Above the diagram.", "TEXT")] = None,
    max_edges: Annotated[
        int | None, option("Output", "--max-edges", "Draw only the strongest edges, this many.", "N", min=1)
    ] = None,
) -> None:
    """Draw a saved circuit, without the model: rows by layer with input at the bottom and logits on top,
    edges as wide as their effect and coloured by its sign.

    For example:

    ```sh
    circuitvit draw out/cat_dog/circuit.json out/cat_dog/strongest.svg --max-edges 60
    ```
    """
    from circuitvit.graph import Circuit

    saved = Circuit.load(circuit)
    with Folder(out.parent, (out.name,)) as folder:
        folder.write(out.name, lambda path: saved.draw(path, title=title, max_edges=max_edges))
    show(f"wrote {out}: {len(saved):,} edges")

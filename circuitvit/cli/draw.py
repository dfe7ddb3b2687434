"""`circuitvit draw`: a saved circuit as a diagram, a graph, or a page with images and report."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

import circuitvit as cv
from circuitvit.cli.inputs import (
    BehaviourOptions,
    ImageOptions,
    ModelOptions,
    load_model,
    make_task,
    prompted,
)
from circuitvit.cli.options import command, group
from circuitvit.cli.output import show
from circuitvit.cli.view import write
from circuitvit.errors import OptionError

PICTURES = ("html", "svg", "pdf", "png")
"""The formats that can hold images."""

ON_IMAGES = BehaviourOptions(metric="similarity", ablation="zero")
"""What images are looked at for has no part in a drawing: any model has this behaviour, with any images."""


@group("Model", model="--model -m NAME")
@dataclass(frozen=True)
class OwnModel(ModelOptions):
    """The circuit's model, for images of what its nodes do.

    Attributes:
        model: the circuit's, for images in the drawing: named as for `circuitvit discover`.
    """

    model: str = ""


@command("Output", out="--out -o FILE", report="--report JSON")
def draw(
    circuit: Annotated[Path, typer.Argument(metavar="CIRCUIT.json")],
    file: Annotated[Path | None, typer.Argument(metavar="OUT")] = None,
    out: Path | None = None,
    title: str | None = None,
    max_edges: int | None = None,
    report: Path | None = None,
    *,
    model: OwnModel,
    images: ImageOptions,
    image: int = 0,
) -> None:
    """Draw a saved circuit: rows by layer with input at the bottom and logits on top, edges as wide as their
    effect and coloured by its sign. Only images of what its nodes do need the model.

    For example, a diagram, and a page with images, attention and report:

    ```sh
    circuitvit draw out/cat_dog/circuit.json --out out/cat_dog/strongest.svg --max-edges 60

    circuitvit draw out/cat_dog/circuit.json --out page.html --report out/cat_dog/report.json \\
        --model vit_tiny_patch16_224 --checkpoint vit_tiny.safetensors --clean cat.jpg --corrupt dog.jpg
    ```

    Args:
        circuit: from `circuitvit discover`, or from EAP-IG and MIB.
        file: the same as --out.
        out: the ending chooses the format: .html (an interactive page), .svg, .pdf, .png, .dot, .tex,
            .graphml (for Gephi and networkx) or .json. [default: circuit.html]
        title: above the diagram.
        max_edges: draw only the strongest edges, this many.
        report: of the circuit, for the page: the report.json beside it.
        image: which pair of images, from 0.
    """
    if file is not None and out is not None:
        raise OptionError(f"where to: {file} or --out {out}? Give one of them")
    path = out or file or Path("circuit.html")
    kind = cv.export.drawing.format_of(path, None, cv.export.drawing.FORMATS)
    saved = cv.Circuit.load(circuit)
    options: dict[str, Any] = {"title": title, "max_edges": max_edges}
    if report is not None:
        options["report"] = cv.verification.Report.load(report)
    if _wanted(model, images, saved.provenance.model):
        if kind not in PICTURES:
            raise OptionError(
                f"a .{kind} file holds no images: leave out --model, or draw .html, .svg, .pdf or .png"
            )
        task = make_task(images, ON_IMAGES, seed=0)
        more = {
            "model": load_model(prompted(model, saved.provenance)),
            "task": task,
            "pair": image,
            "thumbnails": True,
        }
        options.update(more)
    write(path, partial(saved.draw, **options))
    show(f"wrote {path}: {len(saved):,} edges")
    if kind == "html":
        show(f"in a browser: {path.resolve().as_uri()}")


def _wanted(model: OwnModel, images: ImageOptions, known: str) -> bool:
    """Whether images are wanted, for which it takes a model and pictures.

    Raises:
        OptionError: naming what is missing.
    """
    named, pictured = bool(model.model), images.clean is not None or images.pairs is not None
    others = [name for name, value in asdict(model).items() if value not in (None, False, "", "cpu")]
    if named and pictured:
        return True
    if pictured or (others and not named):
        which = f" (the circuit is of {known})" if known else ""
        raise OptionError(f"no --model: images show what the nodes of the circuit's model do; name it{which}")
    if images.corrupt is not None:
        raise OptionError("--corrupt without --clean: images in a drawing need --model and --clean")
    if named:
        raise OptionError(
            "--model without images: add --clean IMAGE, and --corrupt IMAGE for the other side, or --pairs; "
            "a drawing without images needs no model"
        )
    return False

"""`circuitvit why`: which few nodes turn the answer on a misread image, and what suppressing them does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

import circuitvit as cv
from circuitvit.cli.inputs import BatchOptions, ModelOptions, load_model
from circuitvit.cli.options import command, group
from circuitvit.cli.output import Clock, Folder, Row, show, show_notes, show_rows
from circuitvit.errors import FileError, OptionError, counted

FILES = ("why.html", "why.safetensors", "why.md", "why.csv")
LIST = "misread.csv"


@group("Model")
@dataclass(frozen=True)
class MisreadingModelOptions(ModelOptions):
    """The model that misreads the image, named without a flag."""

    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for --model elsewhere.")]


@command("Misreading", "views.why", label="--label CLASS", among="--among FOLDER",
         counterfactuals="--counterfactuals -k N", out="--out -o DIR")  # fmt: skip
def why(
    given: MisreadingModelOptions,
    image: Annotated[
        Path | None,
        typer.Argument(metavar="[IMAGE]", help="The misread image; without, those in --among are listed."),
    ] = None,
    *,
    label: list[str] | None = None,
    among: Path,
    counterfactuals: int = 3,
    held_out: float = 0.5,
    seed: int = 0,
    out: Path = Path("out"),
    run: BatchOptions,
) -> None:
    """Why was this image misread? Which few heads and MLPs, patched from the nearest images that are read
    rightly, turn the answer; what they look at; and whether suppressing them repairs the image, and breaks
    others.

    ```sh
    circuitvit why catdog-tiny odd.png --label cat --among photos/ --out out/why
    circuitvit why catdog-tiny --among photos/
    ```

    Without IMAGE the misread images of `--among` are listed, to choose one from.

    Args:
        label: what would be right: a class, or a kind such as cat, all classes of which are meant. Repeated,
            it is a set of classes. Needed with IMAGE.
        among: a folder with a subfolder of images for each class, or kind; a folder of images is taken to be
            all of `--label`.
        out: folder for the page, the numbers and a text; made if missing, older ones replaced.
    """
    for path in (image, among):
        if path is not None and not path.exists():
            raise FileError(f"there is no {path}")
    if image is None:
        _list(given, among, out, run)
        return
    if not label:
        raise OptionError(f"say what {image} is: --label cat")
    clock = Clock()
    with Folder(out, FILES) as folder:
        with clock.phase("model"):
            model = load_model(given)
        with clock.phase("runs"):
            found = cv.why(
                model, image, label[0] if len(label) == 1 else label, among,
                counterfactuals=counterfactuals, held_out=held_out, seed=seed, **run.settings(),
            )  # fmt: skip
        for name in FILES:
            folder.write(name, found.save)
    show(str(found))
    rows = [
        Row(each.image, ", ".join(each.nodes) or "none", f"then {each.answer}" if each.nodes else "")
        for each in found.counterfactuals
    ]
    show_rows("What turns the answer, from each rightly read image", rows, explain=True)
    show_notes("Bear in mind", found.caveats)
    show(f"\ntime {clock}\nwrote {folder.path}: {', '.join(folder.saved)}")
    show(f"open this in a browser: {folder.path / FILES[0]}")


def _list(given: MisreadingModelOptions, among: Path, out: Path, run: BatchOptions) -> None:
    """The misread images of a folder, farthest from right first."""
    clock = Clock()
    with Folder(out, (LIST,)) as folder:
        with clock.phase("model"):
            model = load_model(given)
        with clock.phase("runs"):
            found = cv.misread_images(model, among, **run.settings())
        folder.write(LIST, found.save)
    rows = [
        Row(str(each["image"]), f"{each['label']}, seen as {each['answer']}", f"margin {each['margin']:.2f}")
        for each in found.records()
    ]
    show_rows(f"{len(found)} of {counted(found.n_images, 'image')} misread", rows, explain=True)
    show(f"\ntime {clock}\nwrote {folder.path}: {', '.join(folder.saved)}")
    if found.images:
        show(f"ask about one of them: circuitvit why ... {found.images[0]} --label {found.labels[0]}")

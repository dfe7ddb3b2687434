"""`circuitvit view`, further: looks that measure, train or edit, at many images rather than at one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import circuitvit as cv
from circuitvit.cli.inputs import ModelOptions, load_model
from circuitvit.cli.output import Row, show, show_notes, show_rows
from circuitvit.cli.view import FIGURES, check_ending, look, view, write
from circuitvit.errors import OptionError


@look("views.linear_probes", sites="--sites NAME", tokens="--tokens TOKENS", ask="--ask IMAGE",
      about="--about CLASS", keep="--keep FILE", use="--use FILE")  # fmt: skip
def probes(
    model: ModelOptions,
    images: Annotated[
        Path | None,
        typer.Argument(help="Folder with one subfolder of images for each class.", metavar="[FOLDER]"),
    ] = None,
    sites: list[str] | None = None,
    tokens: list[str] | None = None,
    reads: str = "mean",
    strength: float = 1.0,
    folds: int = 5,
    samples: int = 16,
    seed: int = 0,
    batch_size: int = 32,
    keep: Path | None = None,
    use: Path | None = None,
    ask: Path | None = None,
    about: str | None = None,
    no_picture: bool = False,
    out: Path = Path("probes.png"),
) -> None:
    """What can be read where? Linear probes for the classes of a folder's subfolders, with a control. With
    `--ask`, the picture shows what they say of each patch of another image.

    ```sh
    circuitvit view probes --model catdog-tiny photos/ --tokens patch --reads any --ask both.png --about cat
    ```

    Args:
        sites: such as 'resid*' (the default) or m3.hidden. Can be repeated.
        tokens: of a place, such as cls, patch or 'patch(2,3)'; repeated, places of their own.
        reads: mean: a probe of the mean of a place's tokens; any: of single tokens, whichever they are; each:
            a probe for every token.
        keep: write the probes to this file (.safetensors).
        use: probes that `--keep` wrote, instead of a folder.
        ask: an image whose patches are asked, by the probes of the first place.
        about: the class that it is asked about; the first by default.
    """
    check_ending(out, FIGURES)
    if (images is None) == (use is None):
        raise OptionError("give a folder with one subfolder for each class, or --use with a file of probes")
    loaded = load_model(model)
    found = (
        cv.views.LinearProbes.load(use)
        if use is not None
        else cv.linear_probes(
            loaded,
            images or "",
            sites=sites or "resid*",
            tokens=tokens or None,
            reads="any" if reads == "any" else "each" if reads == "each" else "mean",
            strength=strength,
            folds=folds,
            samples=samples,
            seed=seed,
            batch_size=batch_size,
        )
    )
    of = found.classes[0] if about is None else about
    figure = found.figure() if ask is None else found.apply(loaded, ask).figure(of, picture=not no_picture)
    write(out, figure.save)
    if keep is not None:
        write(keep, found.save)
    rows = [
        Row(site, str(found.mean(site)), f"control {found.mean_control(site).value:.3f}")
        for site in found.sites
    ]
    show_rows(f"Accuracy at {found.places[0]}: {', '.join(found.classes)}", rows, explain=True)
    show_notes("Bear in mind", found.notes)
    show(f"\nwrote {out}")


VIEWS: dict[str, tuple[object, str]] = {
    "probes": (probes, "What linear probes can read, at which layer and token."),
}

for _name, (_command, _summary) in VIEWS.items():
    view.command(_name, short_help=_summary)(_command)  # type: ignore[type-var]

__all__ = ["view"]

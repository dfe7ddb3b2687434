"""`circuitvit activations`: what a model computes on images, by name, streamed into a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import circuitvit as cv
from circuitvit.cli.inputs import BatchOptions, ModelOptions, load_model
from circuitvit.cli.options import command
from circuitvit.cli.output import Folder, Interrupted, Row, show, show_rows
from circuitvit.cli.processes import many
from circuitvit.cli.view import check_ending, given_images
from circuitvit.errors import OptionError, counted

if TYPE_CHECKING:
    from circuitvit.models import Model

SHOWN = 30
"""Activations in the table; the file holds all of them."""


@command(
    "Activations",
    "engine.activations",
    shares=True,
    site="--site -s NAME",
    tokens="--tokens TOKENS",
    listed="--list",
)
def activations(
    model: ModelOptions,
    run: BatchOptions,
    images: Annotated[
        list[Path] | None,
        typer.Argument(help="Image (or clip) files, or one folder of them.", metavar="[IMAGE...]"),
    ] = None,
    site: list[str] | None = None,
    tokens: str | None = None,
    listed: bool = False,
    out: Path | None = None,
) -> None:
    """Read what a model computes, by name: streams, heads, patterns, neurons, logits.

    First the names that there are (with `--site` those that fit), then the values, into a file that holds any
    number of images: they are run a batch at a time. Interrupted, the same command goes on where it was.

    ```sh
    circuitvit activations --model catdog-tiny --list --site 'a1.*'

    circuitvit activations --model catdog-tiny photos/ \\
        --site 'resid*' --tokens cls --out resid.safetensors

    circuitvit activations --model catdog-tiny photos/ \\
        --site 'm*.hidden' --site logits --out m.safetensors
    ```

    In Python, `cv.engine.Activations.load("resid.safetensors")["resid1"]` is `(image, token, width)`.

    Args:
        site: a name, such as resid3, a5.h2.pattern or 'm3.hidden[17]', with * for anything; after an @ come
            tokens. Can be repeated.
        tokens: for sites that name none after an @: cls, reg, patch, cls+patch, or a number. All by default.
        listed: list the sites that there are, with the shape of each for one image, and read nothing.
        out: a .safetensors file.
    """
    if listed:
        if images or out:
            raise OptionError("--list reads no images and writes nothing: leave out either it or these")
        _list(load_model(model), site)
        return
    if not site:
        raise OptionError(
            "no activations are named: give --site, such as --site 'resid*'; --list shows all sites"
        )
    if not images:
        raise OptionError("no images: give files or a folder, or --list for the names alone")
    if out is None:
        raise OptionError("no file: give --out, such as --out activations.safetensors")
    check_ending(out, (".safetensors",))
    loaded = load_model(model)
    with Folder(out.parent, (out.name,), guarded=False):
        try:
            found = cv.activations(
                loaded, given_images(images), site, tokens=tokens, out=out, processes=many(), **run.settings()
            )
        except KeyboardInterrupt:
            raise Interrupted("the same command goes on where it was") from None
    shown = list(found)[:SHOWN]
    rows = [Row(name, _shape(found[name].shape), _few(found.tokens[name])) for name in shown]
    if len(found) > SHOWN:
        rows.append(Row("...", f"{len(found) - SHOWN} more"))
    images_of = counted(len(found.images), loaded.preprocessing.what)
    show_rows(f"{counted(len(found), 'activation')} of {images_of}: image first", rows, explain=True)
    show(f"\nwrote {out}: {out.stat().st_size / 1e6:,.1f} MB")


def _list(model: Model, names: list[str] | None) -> None:
    """The sites of a model that fit one of the names, and what their sides are."""
    sites = {each.name: each for name in names or ["*"] for each in model.sites(name)}
    for each in sites.values():
        show(f"{each.name:<16}  {_shape(each.shape):<12}  {', '.join(each.axes):<16}  {each.unit}")
    show(f"\n{counted(len(sites), 'site')} of {model.name}; shapes are of one {model.preprocessing.what}")


def _shape(sides: Sequence[int]) -> str:
    return " x ".join(map(str, sides))


def _few(tokens: Sequence[str]) -> str:
    """The names of tokens, the ends only of many."""
    few = tokens if len(tokens) <= 3 else (*tokens[:2], "...", tokens[-1])
    return ", ".join(few)

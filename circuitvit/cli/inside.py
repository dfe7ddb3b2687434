"""`circuitvit view`, further: looks that measure, train or edit, at many images rather than at one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import circuitvit as cv
from circuitvit.cli.inputs import ModelOptions, load_model
from circuitvit.cli.output import Row, show, show_notes, show_rows
from circuitvit.cli.view import FIGURES, LISTED, Images, check_ending, given_images, look, view, write

# -- kinds of heads ------------------------------------------------------------------------------


@look("views.head_kinds", n="--n NUMBER", at_least="--at-least SHARE")
def heads(
    model: ModelOptions,
    images: Annotated[
        list[Path] | None, typer.Argument(help="Images, or one folder of them.", metavar="[IMAGE...]")
    ] = None,
    n: int = 32,
    seed: int = 0,
    at_least: float = 0.1,
    out: Path = Path("heads.png"),
) -> None:
    """Which heads are which? Every head against every kind: looks at a match, at what follows it, at a place,
    at the class token. Without images it is asked of patches of noise, some of which are repeated.

    ```sh
    circuitvit view heads --model vit_tiny_patch16_224 --checkpoint vit_tiny.safetensors photos/
    ```

    Args:
        at_least: attention above the control.
    """
    check_ending(out, FIGURES)
    found = cv.head_kinds(load_model(model), given_images(images) if images else None, n=n, seed=seed)
    write(out, found.figure().save)
    rows = [
        Row(kind, score.head, f"{score.attention:.0%} of attention, control {score.control:.1%}")
        for kind in found.kinds
        for score in found.only(kind, at_least)[:3]
    ]
    show_rows(f"Kinds of heads, of {len(found.heads)}", rows, explain=True)
    show_notes("Caveats", found.caveats)
    show(f"wrote {out}")


# -- equivariance --------------------------------------------------------------------------------


@look("views.equivariance", transform="--transform NAME", site="--site NAME")
def equivariance(
    model: ModelOptions,
    images: Images,
    transform: list[str] | None = None,
    site: list[str] | None = None,
    out: Path = Path("equivariance.png"),
) -> None:
    """Do responses move along when the image is mirrored, rotated, shifted, recoloured? And which units are
    each other's mirror? Heads, or neurons with `--site m1.hidden`.

    ```sh
    circuitvit view equivariance --model catdog-tiny photos/ --site m0.hidden --transform mirror
    ```

    Args:
        transform: mirror, flip, 'rotate 90', 'rotate 180', shift or recolour; all but flip by default. Can be
            repeated.
        site: such as m1.hidden; all heads by default. Can be repeated.
    """
    check_ending(out, FIGURES)
    options: Any = {"transforms": transform, "sites": site}
    given = {name: each for name, each in options.items() if each}
    found = cv.equivariance(load_model(model), given_images(images), **given)
    write(out, found.figure().save)
    rows = [
        Row(name, f"{pair.one}, {pair.other}", f"match {pair.match:.2f}, with itself {pair.own:.2f}")
        for name in found.transforms
        for pair in found.pairs(name)[:LISTED]
    ]
    show_rows(f"Pairs, of {len(found.units)} units", rows, explain=True)
    show(f"wrote {out}")


VIEWS: dict[str, tuple[object, str]] = {
    "heads": (heads, "Which heads are which: matches, places, tokens."),
    "equivariance": (equivariance, "Units that move with the image, and mirrored pairs."),
}

for _name, (_command, _summary) in VIEWS.items():
    view.command(_name, short_help=_summary)(_command)  # type: ignore[type-var]

__all__ = ["view"]

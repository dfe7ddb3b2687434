"""`circuitvit view`, further: looks at many images at once, of units: heads, neurons and directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

import circuitvit as cv
from circuitvit.cli.inputs import BatchOptions, ModelOptions, load_model
from circuitvit.cli.output import Row, show, show_notes, show_rows
from circuitvit.cli.view import (
    FIGURES,
    LISTED,
    Images,
    check_ending,
    given_images,
    look,
    write,
    write_text,
)
from circuitvit.errors import OptionError


@look("views.disentanglement", names="--site NAME")
def disentanglement(
    model: ModelOptions,
    run: BatchOptions,
    names: list[str] | None = None,
    trees: int = 30,
    seed: int = 0,
    out: Path = Path("disentanglement.png"),
) -> None:
    """Which nodes carry which factor? Drawn scenes vary in species, place, size, tilt and colours, every
    combination once; the share of each node's variance that is each factor's, and DCI scores.

    ```sh
    circuitvit view disentanglement --model catdog-tiny --site 'a*.h*' --out disentanglement.png
    ```

    Args:
        names: of sites to read, such as 'a*.h*' or m1.hidden@cls; all heads and MLPs by default. Can be
            repeated.
        out: the ending chooses the format: .png, .svg, .pdf or .json.
    """
    check_ending(out, (*FIGURES, ".json"))
    found = cv.disentanglement(
        load_model(model), names=names or None, trees=trees, seed=seed, **run.settings()
    )
    if out.suffix == ".json":
        shares = {
            node: dict(zip(found.factors, row.tolist(), strict=True))
            for node, row in zip(found.nodes, found.shares, strict=True)
        }
        scores = {"disentanglement": found.disentanglement, "completeness": found.completeness}
        scores["informativeness"] = found.informativeness
        said = {"score": found.score, **{name: values.tolist() for name, values in scores.items()}}
        write_text(out, json.dumps({"shares": shares, **(said if trees else {})}, indent=1) + "\n")
    else:
        write(out, found.figure().save)
    rows = []
    for factor, read in zip(found.factors, found.informativeness, strict=True):
        carriers = ", ".join(f"{node} {share:.2f}" for node, share in found.carriers(factor, 3)) or "none"
        rows.append(Row(factor, carriers, f"{read:.0%} read off all" if trees else ""))
    show_rows(f"Shares of nodes' variance, of {len(found.nodes)} nodes", rows, explain=True)
    if trees:
        show(f"\nDCI disentanglement {found.score:.2f}")
    show(f"\nwrote {out}")


@look("views.feature_visualisation", reference="--reference IMAGE|FOLDER", unit="--unit UNIT")
def visualise(
    model: ModelOptions,
    objective: Annotated[str, typer.Argument(metavar="SITE")],
    run: BatchOptions,
    unit: str | None = None,
    reference: list[Path] | None = None,
    count: int = 3,
    steps: int = 128,
    seed: int = 0,
    no_picture: bool = False,
    out: Path = Path("visualisation.png"),
) -> None:
    """What does a neuron, head or class answer to most? Images made by gradient ascent, with the values that
    random images and one's own have beside.

    ```sh
    circuitvit view visualise --model catdog-tiny m2.hidden --unit 5 --reference photos/
    ```

    Args:
        objective: a site: m5.hidden, a5.h2@cls, logits, a5.h2.pattern@patch->cls.
        unit: a neuron's number, or for logits a class or a group such as group:cat.
        reference: image files, or one folder of them, to compare with. Can be repeated.
        no_picture: leave out the reference images: for sharing without them.
    """
    check_ending(out, FIGURES)
    found = cv.feature_visualisation(
        load_model(model),
        objective,
        unit=int(unit) if unit and unit.isdecimal() else unit,
        reference=None if not reference else reference[0] if len(reference) == 1 else reference,
        count=count,
        steps=steps,
        seed=seed,
        **run.settings(),
    )
    write(out, lambda path: found.figure(picture=not no_picture).save(path))
    rows = [Row("made", f"{found.values.mean():.3g}", f"up to {found.values.max():.3g}")]
    rows.append(Row("random", f"{found.random.mean():.3g}", f"up to {found.random.max():.3g}"))
    best = list(zip(found.best_names, sorted(found.reference, reverse=True), strict=False))
    rows += [Row(name, f"{value:.3g}", "") for name, value in best[:LISTED]]
    show_rows(found.label, rows, explain=True)
    show(f"\nwrote {out}")


@look("views.head_kinds", n="--n NUMBER", at_least="--at-least SHARE")
def heads(
    model: ModelOptions,
    run: BatchOptions,
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
    found = cv.head_kinds(
        load_model(model), given_images(images) if images else None, n=n, seed=seed, **run.settings()
    )
    write(out, found.figure().save)
    rows = [
        Row(kind, score.head, f"{score.attention:.0%} of attention, control {score.control:.1%}")
        for kind in found.kinds
        for score in found.only(kind, at_least)[:3]
    ]
    rows = rows or [Row("none", f"no head is {at_least:.0%} above its control", "")]
    show_rows(f"Kinds of heads, of {len(found.heads)}", rows, explain=True)
    show_notes("Bear in mind", found.caveats)
    show(f"\nwrote {out}")


@look("views.equivariance", transform="--transform NAME", site="--site NAME")
def equivariance(
    model: ModelOptions,
    images: Images,
    run: BatchOptions,
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
    found = cv.equivariance(load_model(model), given_images(images), **given, **run.settings())
    write(out, found.figure().save)
    rows = [
        Row(name, f"{pair.one}, {pair.other}", f"match {pair.match:.2f}, with itself {pair.own:.2f}")
        for name in found.transforms
        for pair in found.pairs(name)[:LISTED]
    ]
    rows = rows or [Row("none", "no two units are each other's best match", "")]
    show_rows(f"Pairs, of {len(found.units)} units", rows, explain=True)
    show(f"\nwrote {out}")


@look("views.top_images", unit="--unit UNIT", row="--row top|bottom|random|QUANTILE")
def top_images(
    model: ModelOptions,
    images: Images,
    run: BatchOptions,
    unit: list[str],
    by: str = "image",
    reduce: str = "max",
    count: int = 12,
    row: list[str] | None = None,
    overlay: str = "activation",
    seed: int = 0,
    no_picture: bool = False,
    out: Path = Path("top_images.html"),
) -> None:
    """Which images, or patches, does a head, neuron or class answer to most? And least, and in between: a
    contact sheet in one page that works offline. Several units are read in one run.

    ```sh
    circuitvit view top-images --model catdog-tiny photos/ --unit a2.h3 --unit 'm1.hidden[16]' --by patch
    ```

    Args:
        unit: such as a5.h2, 'm3.hidden[17]', a5.h2.pattern, 'resid5[3]', 'logits[tabby]'. Can be repeated.
        by: image, or patch: the patches of all images are ranked.
        reduce: max, mean or cls: the value of an image from its patches, or of its class token.
        row: what is shown: top, bottom, random, or a quantile such as 0.9. Can be repeated.
        overlay: activation, or attention of the unit's head.
        out: the ending chooses the format: .html, .png, .svg or .pdf.
    """
    check_ending(out, (".html", *FIGURES))
    if out.suffix == ".html" and no_picture:
        raise OptionError("--no-picture is for figures: a page without its images shows nothing")
    settings: dict[str, Any] = {"by": by, "reduce": reduce, "overlay": overlay, "count": count}
    if row:
        settings["rows"] = [_row(each) for each in row]
    found = cv.top_images(
        load_model(model), given_images(images), unit, **settings, **run.settings(), seed=seed
    )
    if out.suffix == ".html":
        write_text(out, found.to_html())
    else:
        write(out, found.figure(picture=not no_picture).save)
    for name, ranking in found.items():
        first = next(iter(ranking.rows))
        best = zip(found.names(name, first), ranking.rows[first].values, strict=True)
        shown = [Row(each, f"{value:.3g}") for each, value in list(best)[:3]]
        show_rows(f"{name}, {first} of {len(found.images):,} images", shown)
        show_notes("Bear in mind", ranking.caveats)
    show(f"\nwrote {out}")


def _row(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text

"""`circuitvit view`, further: what parts of a model add to the image embedding, in numbers and in words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import circuitvit as cv
from circuitvit.cli.inputs import BatchOptions, ModelOptions, load_model
from circuitvit.cli.output import Row, show, show_rows
from circuitvit.cli.view import FIGURES, LISTED, Images, check_ending, given_images, look, write
from circuitvit.errors import FileError, OptionError

DATA = (".json", ".safetensors", ".csv")


@look("views.decompose", out="--out FILE")
def contributions(
    model: ModelOptions,
    images: Images,
    run: BatchOptions,
    output: str = "features",
    tokens: bool = False,
    out: Path = Path("contributions.png"),
) -> None:
    """What does each head and MLP add to the image embedding? Direct contributions, which sum to it.

    ```sh
    circuitvit view contributions --model catdog-tiny photos/
    ```

    Args:
        out: the ending chooses: .png, .svg or .pdf for the figure; .json or .safetensors for all numbers;
            .csv for a table.
    """
    check_ending(out, (*FIGURES, *DATA))
    found = cv.views.decompose(
        load_model(model),
        given_images(images),
        output=output,  # type: ignore[arg-type]
        tokens=tokens,
        **run.settings(),
    )
    write(out, found.save if out.suffix in DATA else found.figure().save)
    rows = [Row(name, f"{share:+.1%}") for name, share in found.strongest(LISTED)]
    show_rows(f"Shares of how the {found.output} vary", rows)
    show(
        f"\nfinal norm held at its scale in each image, {found.norm_scale.mean():.3g} on average\nwrote {out}"
    )


@look("views.text_span", descriptions="--descriptions FILE", out="--out FILE")
def words(
    model: ModelOptions,
    images: Images,
    run: BatchOptions,
    descriptions: Path | None = None,
    phrases: int = 5,
    alpha: float = 0.05,
    draws: int | None = None,
    seed: int = 0,
    out: Path = Path("words.png"),
) -> None:
    """What do heads say, in plain language? The phrases that explain best what each head adds to the
    embedding (TextSpan), beside heads that say nothing. Of a model without words the phrases are its classes.

    ```sh
    circuitvit view words --model vit_tiny_patch16_224 --checkpoint vit_tiny.safetensors photos/
    ```

    Args:
        descriptions: a file with one description a line, for models that have words.
        out: the ending chooses: .png, .svg or .pdf for the figure; .json or .safetensors for all numbers;
            .csv for a table.
    """
    check_ending(out, (*FIGURES, *DATA))
    found = cv.views.text_span(
        load_model(model),
        given_images(images),
        None if descriptions is None else _lines(descriptions),
        phrases=phrases,
        alpha=alpha,
        draws=draws,
        **run.settings(),
        seed=seed,
    )
    write(out, found.save if out.suffix in DATA else found.figure().save)
    rows = [Row(name, *_said(found.phrases(name))) for name in found.labels]
    if rows:
        show_rows("Heads with a label: phrases, and what varies along them", rows, explain=True)
    count = f"{len(rows)} of {len(found.heads)} heads have a label"
    show(f"\n{count}; on average, at most {alpha:.0%} of labels mean nothing\nwrote {out}")


@look("views.mean_ablate", sets="--ablate NAMES", out="--out FILE")
def contributed_accuracy(
    model: ModelOptions,
    images: Annotated[
        Path,
        typer.Argument(help="Folder with one subfolder of images for each class.", metavar="FOLDER"),
    ],
    run: BatchOptions,
    sets: list[str] | None = None,
    out: Path = Path("accuracy.png"),
) -> None:
    """Whose direct contributions does the answer need? Accuracy when some are replaced by their mean.

    ```sh
    circuitvit view accuracy --model catdog-tiny folder-of-classes/ --ablate a2.h1,a2.h3
    ```

    Args:
        sets: names of heads and MLPs that are replaced together, with commas; by default the heads, and the
            MLPs, up to and from every layer. Can be repeated.
        out: the ending chooses: .png, .svg or .pdf for the figure; .json, .safetensors or .csv for the
            numbers.
    """
    check_ending(out, (*FIGURES, *DATA))
    chosen = {each: [name.strip() for name in each.split(",")] for each in sets or ()}
    found = cv.views.mean_ablate(load_model(model), images, sets=chosen or None, **run.settings())
    write(out, found.save if out.suffix in DATA else found.figure().save)
    rows = [Row(name or "nothing", str(found.accuracy(name))) for name in ("", *found.names)]
    show_rows("Accuracy without the contributions of", rows)
    show(f"\nwrote {out}")


# -- inside --------------------------------------------------------------------------------------


def _said(phrases: list[tuple[str, float]]) -> tuple[str, str]:
    first, share = phrases[0]
    others = ", ".join(name for name, _ in phrases[1:4])
    return first, f"{share:.1%}" + (f"; then {others}" if others else "")


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"cannot read {path}: {error}") from error
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise OptionError(f"{path} holds no descriptions: one a line")
    return found

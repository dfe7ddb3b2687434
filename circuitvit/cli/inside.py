"""`circuitvit view`, further: looks that measure, train or edit, at many images rather than at one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import circuitvit as cv
from circuitvit.cli.inputs import ModelOptions, load_model
from circuitvit.cli.output import Row, show, show_notes, show_rows
from circuitvit.cli.view import FIGURES, Images, check_ending, given_images, look, view, write, write_text
from circuitvit.errors import OptionError

LISTED_PICKS = 3


@look("views.top_images", unit="--unit UNIT", row="--row top|bottom|random|QUANTILE")
def top_images(
    model: ModelOptions,
    images: Images,
    unit: list[str],
    by: str = "image",
    reduce: str = "max",
    count: int = 12,
    row: list[str] | None = None,
    overlay: str = "activation",
    batch_size: int | None = None,
    seed: int = 0,
    no_picture: bool = False,
    out: Path = Path("top_images.html"),
) -> None:
    """Which images, or patches, does a head, neuron or class answer to most? And least, and in between: a
    contact sheet in one page that works offline. Several units are read in one run.

    ```sh
    circuitvit view top-images --model catdog-tiny photos/ --unit a0.h2 --unit 'm1.hidden[17]' --by patch
    ```

    Args:
        unit: a5.h2, 'm3.hidden[17]', a5.h2.pattern, 'resid5[3]', 'logits[281]'. Can be repeated.
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
        load_model(model), given_images(images), unit, **settings, batch_size=batch_size, seed=seed
    )
    if out.suffix == ".html":
        write_text(out, found.to_html())
    else:
        write(out, found.figure(picture=not no_picture).save)
    for name, ranking in found.items():
        first = next(iter(ranking.rows))
        best = zip(found.names(name, first), ranking.rows[first].values, strict=True)
        shown = [Row(each, f"{value:.3g}") for each, value in list(best)[:LISTED_PICKS]]
        show_rows(f"{name}, {first} of {len(found.images):,} images", shown)
        show_notes("Notes", ranking.caveats)
    show(f"\nwrote {out}")


def _row(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


VIEWS: dict[str, tuple[object, str]] = {
    "top-images": (top_images, "What a head, neuron or class answers to most."),
}

for _name, (_command, _summary) in VIEWS.items():
    view.command(_name, short_help=_summary)(_command)  # type: ignore[type-var]

__all__ = ["view"]

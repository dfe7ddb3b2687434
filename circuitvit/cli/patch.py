"""`circuitvit patch`: which head, MLP, layer or pattern, patched alone, moves the answer or flips it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import circuitvit as cv
from circuitvit.cli.inputs import (
    BehaviourOptions,
    ImageOptions,
    ModelOptions,
    RunOptions,
    load_model,
    make_task,
)
from circuitvit.cli.options import command
from circuitvit.cli.output import Row, show, show_rows
from circuitvit.cli.view import FIGURES, LISTED, check_ending, write
from circuitvit.errors import OptionError, counted

if TYPE_CHECKING:
    from circuitvit.verification.interventions import FlipSearch, PatchingMap

DATA = (".json", ".safetensors", ".csv")


@command("Patching", "verification.patching_map", "verification.flip_search", row="--row NAME")
def patch(
    model: ModelOptions,
    images: ImageOptions,
    behaviour: BehaviourOptions,
    run: RunOptions,
    site: str = "heads",
    tokens: str = "kind",
    row: list[str] | None = None,
    least: float = 0.0,
    narrow: bool = True,
    out: list[Path] | None = None,
) -> None:
    """Which component decides? Each head (MLP, layer, pattern) in turn gets the activity that it has on the
    other image of the pair, and everything after it runs on: how far does the answer move, and does the top
    class flip?

    For example, on a pair of pictures, and for one head at every token:

    ```sh
    circuitvit patch --model catdog-tiny --clean cat.png --corrupt dog.png \\
        --target cat --foil dog --out patch.png

    circuitvit patch --model catdog-tiny --pairs pairs.csv \\
        --row a2.h1 --tokens each --out patch.csv
    ```

    Args:
        site: heads or mlps (what they write), stream (the residual stream before each stage) or patterns
            (where heads look).
        tokens: that are patched together: kind (all, and each kind alone), each, or all.
        row: only this component, such as a2.h1, or 'before a3' of the stream. Can be repeated.
        least: share of pairs that a flip must exceed to be listed.
        narrow: on a single pair, look for the few tokens that are enough for each flip.
        out: the ending chooses: .png, .svg or .pdf for the map as a figure; .json or .safetensors for
            everything, which `load` reads; .csv for a line for every component, token set and pair. Can be
            repeated. [default: patch.png]
    """
    files = out or [Path("patch.png")]
    for each in files:
        check_ending(each, (*FIGURES, *DATA))
    if behaviour.ablation != "patch":
        raise OptionError(
            "patching takes what it patches from the other image of a pair: leave out --ablation"
        )
    how: dict[str, Any] = {"site": site, "tokens": tokens, **run.settings()}
    loaded = load_model(model)
    prepared = cv.tasks.prepare(loaded, make_task(images, behaviour, run.seed))
    search = None
    if row or not loaded.chooses:
        found = cv.patching_map(loaded, prepared, rows=row or None, **how)
    else:
        search = cv.flip_search(loaded, prepared, least=least, narrow=narrow, **how)
        found = search.map
    for each in files:
        write(each, _save(search, found, each))
    _show(search, found)
    show(f"\nwrote {', '.join(map(str, files))}")


def _save(search: FlipSearch | None, found: PatchingMap, path: Path) -> Any:
    """What writes a file of this name: a figure, a table of the map, or everything that was found."""
    if path.suffix in FIGURES:
        return found.heat_map
    return found.save if search is None or path.suffix == ".csv" else search.save


def _show(search: FlipSearch | None, found: PatchingMap) -> None:
    effect, flipped = found.effect, found.flipped
    base, other = float(found.base.mean()), float(found.other.mean())
    pairs = counted(len(found.base), "pair")
    cells = [(row, column) for row in range(len(found.rows)) for column in range(len(found.columns))]
    rows = []
    for at in sorted(cells, key=lambda at: -abs(float(effect[at])))[:LISTED]:
        changes = f"the top class changes in {flipped[at]:.0%} of {pairs}" if flipped[at] else ""
        changes = "the top class changes" if changes and len(found.base) == 1 else changes
        rows.append(Row(f"{found.rows[at[0]]} at {found.columns[at[1]]}", f"{effect[at]:+.3f}", changes))
    title = f"Change of {found.label}, mean of {pairs}: {base:.3f} as it is, {other:.3f} in the other image"
    show_rows(title, rows, explain=True)
    if search is not None:
        show(f"\n{search}")

"""`circuitvit demo`: the main job, whole, on a bundled model and pictures that are drawn on the spot."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer

import circuitvit as cv
from circuitvit.cli.discover import FILES, Search, checked_search, discover_circuit, show_page
from circuitvit.cli.inputs import ModelOptions, RunOptions, load_model, one_thread, prepare
from circuitvit.cli.options import command
from circuitvit.cli.output import Clock, Folder, Row, report_rows, show, show_notes, show_rows

if TYPE_CHECKING:
    from torch import Tensor

    from circuitvit.models import Model
    from circuitvit.tasks import PreparedTask
    from circuitvit.verification import Report

MODEL = "catdog-tiny"
TARGET, FOIL = "cat", "dog"
PAIRS = 96
HELD_OUT_PAIRS = 128
ASKED = 0.97
"""The faithfulness searched for: more than is promised, as it falls a little on pictures not seen before."""

PLAN = "0,2000,16"
"""Numbers instead of a time, so that everybody finds the same circuit; less than 10 seconds of one core."""

RANDOM_CIRCUITS = 20
PICTURES = ("clean.png", "corrupt.png")
ENLARGED = 8

LARGEST_DENSITY = 0.15
BAND = (0.9, 1.1)
CHANCE = 0.05


@command("Run", quiet="--quiet -q", out="--out -o DIR")
def demo(out: Path = Path("out/demo"), seed: int = 0, quiet: bool = False) -> None:
    """See it work: find the few connections by which a small bundled Vision Transformer tells cats from dogs,
    prove by ablation that they are enough, and show them on a page. It takes less than a minute and downloads
    nothing. It ends with exit code 1 if the circuit does not hold up on pictures that it was not found on.

    For example:

    ```sh
    circuitvit demo --out out/demo
    ```

    Args:
        out: folder for the results; made if missing, older ones replaced.
        seed: of the pictures and the search.
        quiet: no progress bars.
    """
    run = RunOptions(seed=seed, quiet=quiet)
    asked = Search("find", {"plan": PLAN, "faithfulness": ASKED}, resume=True)
    search = checked_search(asked, "noising", seed)
    clock = Clock()
    with Folder(out, (*FILES, *PICTURES)) as folder, one_thread():
        named = ModelOptions(MODEL)
        with clock.phase("model"):
            model = load_model(named)
        with clock.phase("images"):
            prepared = prepare(model, _pairs(model, PAIRS, 2 * seed), run, verifiable=True)
            held_out = _pairs(model, HELD_OUT_PAIRS, 2 * seed + 1)
            _save_pictures(folder, 2 * seed)
        outcome = discover_circuit(
            model, prepared, held_out, search, run, RANDOM_CIRCUITS, folder, clock, named
        )
    rows = [*report_rows(outcome.report), Row("time", str(clock))]
    show_rows(f"How {MODEL} tells a {TARGET} from a {FOIL}", rows, explain=True)
    show_notes("How it was found", outcome.summary.splitlines())
    show_notes("Caveats", outcome.report.warnings)
    show(f"\nwrote {folder.path}: {', '.join(folder.saved)}")
    failures = list(_failures(outcome.report))
    show_notes("The circuit does not hold up", failures)
    show_page(folder)
    if failures:
        raise typer.Exit(1)


def _pairs(model: Model, n: int, seed: int) -> PreparedTask:
    """Drawn cats, and the same pictures with nothing but the features of a dog put in."""
    pairs = cv.datasets.catdog.catdog_pairs(n, seed, TARGET, FOIL)
    task = cv.Task(pairs.clean, pairs.corrupt, metric=cv.logit_diff(TARGET, FOIL))
    drawn = f"cv.datasets.catdog.catdog_pairs({n}, {seed}, {TARGET!r}, {FOIL!r})"
    code = f"cv.Task(*{drawn}, metric=cv.logit_diff({TARGET!r}, {FOIL!r}))"
    return replace(cv.tasks.prepare(model, task), code=code)


def _save_pictures(folder: Folder, seed: int) -> None:
    """The first pair, enlarged, as the model sees it."""
    pictures = cv.datasets.catdog.catdog_pairs(1, seed, TARGET, FOIL, preprocessed=False)
    for name, picture in zip(PICTURES, pictures, strict=True):
        folder.write(name, partial(_save_png, picture[0]))


def _save_png(picture: Tensor, path: Path) -> None:
    """Write a picture `(channel, height, width)` in [0, 1] as an enlarged PNG file."""
    from PIL import Image  # not before there is a picture: help needs none

    image = Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy())
    size = (ENLARGED * image.width, ENLARGED * image.height)
    file = io.BytesIO()
    image.resize(size, Image.Resampling.NEAREST).save(file, "PNG")
    cv.graph.files.write_bytes(path, file.getvalue())


def _failures(report: Report) -> Iterator[str]:
    """What the demo promises and the report does not show, in sentences."""
    size, section = report.size, report.headline
    value = section.faithfulness.value
    if size.density > LARGEST_DENSITY:
        yield f"it has {size.density:.1%} of the edges; at most {LARGEST_DENSITY:.0%} were promised"
    if not BAND[0] <= value <= BAND[1]:
        yield f"its faithfulness on held-out pairs is {value:.3f}; {BAND[0]} to {BAND[1]} was promised"
    random = section.random
    if random is not None and random.p_value > CHANCE:
        yield (
            f"{random.as_good} of {random.n} random connected circuits keep the behaviour as well "
            f"(p = {random.p_value:.2g}); p of at most {CHANCE} was promised"
        )

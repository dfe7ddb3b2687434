"""`circuitvit compare`: faithfulness against size for several methods, on one plot and in one table."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

import circuitvit as cv
from circuitvit.cli.inputs import (
    BehaviourOptions,
    HeldOutOptions,
    ImageOptions,
    ModelOptions,
    RunOptions,
    load_model,
    make_held_out,
    make_task,
    parse_shares,
    prepare_both,
)
from circuitvit.cli.options import command
from circuitvit.cli.output import Clock, Folder, show, stdout
from circuitvit.cli.wording import remark
from circuitvit.errors import OptionError

if TYPE_CHECKING:
    from circuitvit.views import Comparison

FILES = ("comparison.json", "comparison.md", "comparison.svg", "comparison.png")


@command("Comparison", "pruning.FamilySettings", shares=True, method="--method NAME", sizes="--sizes LIST",
         trained="--trained LIST", connected="--connected/--top", out="--out -o DIR")  # fmt: skip
def compare(
    *,
    model: ModelOptions,
    images: ImageOptions,
    behaviour: BehaviourOptions,
    held_out: HeldOutOptions,
    method: list[str] | None = None,
    sizes: str | None = None,
    trained: str | None = None,
    mask_steps: int = 600,
    by: str = "magnitude",
    connected: bool = True,
    steps: int = 5,
    resume: bool = False,
    out: Path = Path("out"),
    run: RunOptions,
) -> None:
    """Which method gives small circuits that work? Every method makes circuits of many sizes on the given
    pairs; they are run on held-out pairs where you give some, and drawn as curves of faithfulness against
    size, with CPR and CMD of the MIB benchmark and k*, the size from which on a curve stays within 0.9 and
    1.1. Each curve is written as soon as it is there; an interrupted run goes on with `--resume`.

    For example:

    ```sh
    circuitvit compare --model catdog-tiny --clean cats/ --corrupt dogs/ --target cat --foil dog \\
        --held-out 0.36 --method eap --method exact --method learned --out out/methods
    ```

    Args:
        method: a scoring method; learned, learned-ugs or learned-nodes: one mask trained down through all
            sizes; thinned: what one thinning passes through; find: what one search does. Repeat it.
            [default: random, eap, eap-ig, learned]
        sizes: shares of all edges, such as 1%,2%,5%. [default: 0.1% to 100%]
        trained: sizes to train masks for. [default: `--sizes` from 0.5% to 50%]
        mask_steps: of training for each mask; for find, runs after thinning.
        resume: take over the curves that an earlier run left in `--out`.
        out: folder for the results; made if missing, older ones replaced.
    """
    if behaviour.direction == "denoising":
        raise OptionError("circuits are compared in the clean run: leave out --direction denoising")
    more: dict[str, Any] = {} if sizes is None else {"fractions": parse_shares(sizes, "--sizes")}
    settings = cv.FamilySettings(
        by="signed" if by == "signed" else "magnitude",
        connected=connected,
        steps=steps,
        mask=cv.MaskSettings(steps=mask_steps, seed=run.seed),
        trained=None if trained is None else parse_shares(trained, "--trained"),
        **run.settings(),
        **more,
    )
    if run.batch_size:
        settings = replace(settings, mask=replace(settings.mask, batch_size=run.batch_size))
    names = method or cv.views.comparison.USUAL
    for name in names:
        cv.pruning.curves.check_method(name)
    import_module("circuitvit.views.canvas")  # without matplotlib there is no plot: say so now
    task = make_task(images, behaviour, run.seed)
    others = make_held_out(held_out, behaviour, run.seed, images.pair)
    clock = Clock()
    with Folder(out, FILES) as folder:
        saved = folder.path / FILES[0]
        known = cv.Comparison.load(saved) if resume and saved.exists() else None
        with clock.phase("model"):
            loaded = load_model(model)
        with clock.phase("images"):
            discovery, judged = prepare_both(loaded, task, others, run)
        if judged is None:
            remark("no held-out pairs: the curves are optimistic. Give --held-out 0.3, or other images")
        with clock.phase("curves"):
            comparison = cv.compare(
                loaded, discovery, names, held_out=judged, settings=settings, seed=run.seed,
                known=known, after_each=partial(_write, folder),
            )  # fmt: skip
    _show(comparison)
    show(f"\n{discovery.pairing}" if discovery.pairing else "")
    show(f"time {clock}\nwrote {folder.path}: {', '.join(folder.saved)}")


def _write(folder: Folder, comparison: Comparison) -> None:
    for name in FILES:
        folder.write(name, comparison.save)


def _show(comparison: Comparison) -> None:
    """The table of figures."""
    table = Table.grid(padding=(0, 2))
    for title in ("method", "CPR", "CMD", "log-size CMD", "k*", "seconds"):
        table.add_column(title, justify="left" if title == "method" else "right", no_wrap=True)
    table.show_header = True
    for each in comparison.curves:
        curve, k_star = each.curve, each.curve.k_star()
        areas = (f"{area:.3f}" for area in (curve.cpr, curve.cmd, curve.log_cmd))
        table.add_row(each.method, *areas, "none" if k_star is None else f"{k_star:,}", f"{each.seconds:.1f}")
    console = stdout()
    console.print()
    console.print(f"Faithfulness by size on {comparison.judged}", style="bold")
    console.print(table)

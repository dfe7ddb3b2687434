"""`circuitvit compare`: faithfulness against size for several methods, on one plot and in one table."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from circuitvit.cli.folder import Folder
from circuitvit.cli.grouped import grouped
from circuitvit.cli.inputs import check_choice, load_model, make_held_out, make_task, prepare_both
from circuitvit.cli.options import (
    BehaviourOptions,
    HeldOutOptions,
    ImageOptions,
    ModelOptions,
    OutOption,
    RunOptions,
    option,
)
from circuitvit.cli.screen import Clock, remark, show, stdout
from circuitvit.cli.values import parse_shares
from circuitvit.errors import OptionError

if TYPE_CHECKING:
    from circuitvit.pruning import FamilySettings
    from circuitvit.views import Comparison

FILES = ("comparison.json", "comparison.md", "comparison.svg", "comparison.png")


@grouped
def compare(
    model: ModelOptions,
    images: ImageOptions,
    behaviour: BehaviourOptions,
    held_out: HeldOutOptions,
    run: RunOptions,
    method: Annotated[
        list[str] | None,
        option(
            "Comparison",
            "--method",
            "A scoring method; learned, learned-ugs or learned-nodes: masks trained size by size; find: what "
            "one search passes through. Repeat it. [default: random, eap, eap-ig, learned]",
            "NAME",
        ),
    ] = None,
    sizes: Annotated[
        str | None,
        option(
            "Comparison", "--sizes", "Shares of all edges, such as 1%,2%,5%. [default: 0.1% to 100%]", "LIST"
        ),
    ] = None,
    trained: Annotated[
        str | None,
        option(
            "Comparison", "--trained", "Sizes to train masks for. [default: --sizes from 0.5% to 50%]", "LIST"
        ),
    ] = None,
    mask_steps: Annotated[
        int, option("Comparison", "--mask-steps", "Of training for each mask, and of find.", "N", min=1)
    ] = 600,
    by: Annotated[
        str, option("Comparison", "--by", "Scores rank by magnitude, or signed: support only.", "RANKING")
    ] = "magnitude",
    connected: Annotated[
        bool,
        option("Comparison", "--connected/--top", "Scores select whole paths, or the best edges anywhere."),
    ] = True,
    steps: Annotated[
        int, option("Comparison", "--steps", "eap-ig methods: points on the path.", "N", min=1)
    ] = 5,
    resume: Annotated[
        bool, option("Output", "--resume", "Take over the curves that an earlier run left in --out.")
    ] = False,
    out: OutOption = Path("out"),
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
    """
    from circuitvit.pruning.curves import check_method
    from circuitvit.views import canvas  # noqa: F401  without matplotlib there is no plot: say so now
    from circuitvit.views import compare as draw_together
    from circuitvit.views.comparison import USUAL

    if behaviour.direction == "denoising":
        raise OptionError("circuits are compared in the clean run: leave out --direction denoising")
    for name in method or ():
        check_method(name)
    settings = _settings(run, sizes, trained, mask_steps, by, connected, steps)
    task = make_task(images, behaviour, run.seed)
    others = make_held_out(held_out, behaviour, run.seed)
    clock = Clock()
    with Folder(out, FILES) as folder:
        known = _known(folder, resume)
        with clock.phase("model"):
            loaded = load_model(model)
        with clock.phase("images"):
            discovery, judged = prepare_both(loaded, task, others, run)
        if judged is None:
            remark("no held-out pairs: the curves are optimistic. Give --held-out 0.3, or other images")
        with clock.phase("curves"):
            comparison = draw_together(
                loaded, discovery, method or USUAL, held_out=judged, settings=settings, seed=run.seed,
                known=known, after_each=partial(_write, folder),
            )  # fmt: skip
    _show(comparison)
    show(f"\ntime {clock}\nwrote {folder.path}: {', '.join(folder.saved)}")


def _settings(
    run: RunOptions,
    sizes: str | None,
    trained: str | None,
    mask_steps: int,
    by: str,
    connected: bool,
    steps: int,
) -> FamilySettings:
    from circuitvit.pruning import FamilySettings, MaskSettings

    check_choice("ranking", by, ("magnitude", "signed"))
    more: dict[str, Any] = {} if sizes is None else {"fractions": parse_shares(sizes, "--sizes")}
    mask = MaskSettings(steps=mask_steps, seed=run.seed, batch_size=run.batch_size or MaskSettings.batch_size)
    return FamilySettings(
        by="signed" if by == "signed" else "magnitude",
        connected=connected,
        steps=steps,
        mask=mask,
        trained=None if trained is None else parse_shares(trained, "--trained"),
        batch_size=run.batch_size,
        memory=run.budget,
        progress=run.progress,
        **more,
    )


def _known(folder: Folder, resume: bool) -> Comparison | None:
    """What an earlier run left, if it is to be gone on with."""
    from circuitvit.views import Comparison

    path = folder.path / FILES[0]
    return Comparison.load(path) if resume and path.exists() else None


def _write(folder: Folder, comparison: Comparison) -> None:
    for name in FILES:
        folder.write(name, comparison.save)


def _show(comparison: Comparison) -> None:
    """The table of figures."""
    from rich.table import Table

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

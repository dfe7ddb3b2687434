"""`circuitvit audit`: does a model decide by something that it should not go by? For whoever signs it off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import circuitvit as cv
from circuitvit.cli.inputs import (
    BehaviourOptions,
    ImageOptions,
    ModelOptions,
    RunOptions,
    load_model,
    make_task,
    tell_pairs,
)
from circuitvit.cli.options import command, group
from circuitvit.cli.output import Clock, Folder, Row, show, show_notes, show_rows
from circuitvit.errors import DataError, OptionError

if TYPE_CHECKING:
    from circuitvit.verification import GroupAccuracy

FILES = ("audit.html", "audit.json", "audit.md", "audit.csv")

CIRCUITS = ("circuit.json", "behaviour.json")
"""Of the cue and of the behaviour, where they were found or given."""

CLEAN, CHANGED = "clean", "changed"
"""The folders of the pairs in which the cue alone changes."""


@group("Behaviour", target="--target CLASS", foil="--foil CLASS", metric="--metric NAME")
@dataclass(frozen=True)
class DecisionOptions:
    """What is decided.

    Attributes:
        target: class that the clean images speak for, those of the cue as well: a name, an index, or a group
            such as group:cat. Repeated, it is a set of classes.
        foil: what it is compared with, which the changed cue speaks for, likewise.
        metric: how the decision is measured: logit_diff, logit, log_probability or probability.
    """

    target: list[str] | None = None
    foil: list[str] | None = None
    metric: str = "logit_diff"


@command("Cue", "verification.audit_cue", cue="--cue PATH", groups="--groups PATH", name="--name TEXT",
         elsewhere="--elsewhere FOLDER", label="--label NAME=CLASS", date="--date DATE",
         within="--within TIME",
         cue_circuit="--cue-circuit FILE", behaviour_circuit="--behaviour-circuit FILE",
         out="--out -o DIR")  # fmt: skip
def audit(
    model: ModelOptions,
    images: ImageOptions,
    decision: DecisionOptions,
    cue: Path,
    groups: Path,
    name: str = "the cue",
    together: bool = False,
    elsewhere: list[Path] | None = None,
    label: list[str] | None = None,
    cue_circuit: Path | None = None,
    behaviour_circuit: Path | None = None,
    least: float = 0.1,
    held_out: float = 0.5,
    within: str = "120s",
    date: str = "",
    out: Path = Path("out"),
    *,
    run: RunOptions,
) -> None:
    """Does a model decide by something that it should not go by, such as the background? How much of the
    decision it carries, which edges carry it, and what the model is worth without them, group by group; on a
    page for whoever signs the model off.

    ```sh
    circuitvit audit --model catdog-shortcut --name "the background" --cue cue/ \\
        --clean animal/clean --corrupt animal/changed --target cat --foil dog \\
        --groups groups/ --date 2026-11-22 --out out/audit
    ```

    Images lie in folders: `cue/clean` and `cue/changed` hold files of the same names, in which the cue alone
    differs; `--clean` and `--corrupt` those in which what should decide differs; `groups/GROUP/CLASS` the
    labelled images of each group.

    Args:
        cue: pairs in which the cue alone changes: a folder with the folders clean and changed, or a table
            (.csv) with the columns clean and corrupt.
        groups: labelled images: a folder GROUP/CLASS/*.jpg, or a table (.csv) with the columns image, group
            and class.
        elsewhere: other labelled images, CLASS/*.jpg, on which accuracy must not suffer. Can be repeated.
        label: what a folder's name is in the model where it has another name for it, such as cat=group:cat.
            Can be repeated.
        cue_circuit: the cue's circuit, where it is known; with `--behaviour-circuit`, and nothing is searched
            for.
        behaviour_circuit: the behaviour's circuit, likewise.
        together: `--clean` and `--corrupt` differ in the cue as well, as photographs of two classes do.
        date: as it is to stand on the page.
        out: folder for the page, the numbers, a text and the circuits; made if missing, older ones replaced.
    """
    behaviour = BehaviourOptions(decision.metric, decision.target, decision.foil)
    tasks = [make_task(each, behaviour, run.seed) for each in (_cue(cue, images.pair), images)]
    labels, beside, clock = _labels(label or ()), _elsewhere(elsewhere or ()), Clock()
    circuits = _circuits(cue_circuit, behaviour_circuit)
    with Folder(out, (*FILES, *CIRCUITS)) as folder:
        with clock.phase("model"):
            loaded = load_model(model)
        with clock.phase("images"):
            prepared = [cv.tasks.prepare(loaded, task) for task in tasks]
            for each in prepared:
                tell_pairs(each)
        with clock.phase("audit"):
            found = cv.audit_cue(
                loaded, prepared[0], prepared[1], groups, name=name, together=together,
                elsewhere=beside, labels=labels, circuits=circuits, least=least, held_out=held_out,
                within=within, date=date, seed=run.seed, **run.settings(),
            )  # fmt: skip
        folder.write(FILES[0], partial(cv.export.draw_audit, found))
        for file in FILES[1:]:
            folder.write(file, found.save)
        for file, circuit in zip(CIRCUITS, (found.circuit, found.other), strict=True):
            if circuit is not None:
                folder.write(file, circuit.save)
    _show(found)
    show(f"\ntime {clock}\nwrote {folder.path}: {', '.join(folder.saved)}")
    show(f"open this in a browser: {folder.path / FILES[0]}")


def _cue(path: Path, pair: str | None) -> ImageOptions:
    """Where the pairs of the cue are.

    Raises:
        DataError: if it is neither a table nor a folder of the two.
    """
    if path.suffix.lower() == ".csv":
        return ImageOptions(pairs=path)
    sides = path / CLEAN, path / CHANGED
    for side in sides:
        if not side.is_dir():
            raise DataError(
                f"there is no folder {side}: --cue is a folder with the folders {CLEAN} and {CHANGED}, which "
                "hold files of the same names, or a table (.csv)"
            )
    return ImageOptions(*sides, pair=pair)


def _elsewhere(folders: Sequence[Path]) -> dict[str, Path]:
    """Folders of labelled images by their names."""
    found = {each.resolve().name: each for each in folders}
    if len(found) < len(folders):
        raise OptionError("two folders of --elsewhere have the same name: results are told by it")
    return found


def _labels(given: Sequence[str]) -> dict[str, str]:
    """What folders' names mean, from texts such as "cat=group:cat".

    Raises:
        OptionError: if one is no NAME=CLASS.

    Example:
        >>> _labels(["cat=group:cat"])
        {'cat': 'group:cat'}
    """
    found = {}
    for each in given:
        name, sign, meant = (part.strip() for part in each.partition("="))
        if not (name and sign and meant):
            raise OptionError(f"--label takes NAME=CLASS, such as cat=group:cat, not {each!r}")
        found[name] = meant
    return found


def _circuits(cue: Path | None, behaviour: Path | None) -> Mapping[str, cv.Circuit] | None:
    if cue is None and behaviour is None:
        return None
    if cue is None or behaviour is None:
        raise OptionError(
            "give both --cue-circuit and --behaviour-circuit, or neither: then both are looked for"
        )
    return {"cue": cv.Circuit.load(cue), "behaviour": cv.Circuit.load(behaviour)}


def _show(found: cv.Audit) -> None:
    show(f"{found.verdict.upper()}: {found.reason}")
    show_rows("Figures", [Row(what, text) for what, text in found.figures()])
    for title, rows in (
        ("Right answers by group", found.groups),
        ("Right answers elsewhere", found.elsewhere),
    ):
        if rows:
            show_rows(title, [_row(each) for each in rows], explain=True)
    show_notes("Bear in mind", found.caveats)


def _row(each: GroupAccuracy) -> Row:
    percent = cv.verification.statistics.percent
    after = "" if each.after is None else f"without the edges {percent(each.after)}"
    return Row(each.name, f"{percent(each.before)} of {each.n:,}", after)

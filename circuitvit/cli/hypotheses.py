"""`circuitvit verify hypotheses.yaml`: claims, tested one by one."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from circuitvit.cli.folder import Folder
from circuitvit.cli.inputs import load_model, make_task
from circuitvit.cli.options import BehaviourOptions, ImageOptions, ModelOptions, RunOptions
from circuitvit.cli.screen import Clock, Row, show, show_notes, show_rows
from circuitvit.errors import OptionError

if TYPE_CHECKING:
    from circuitvit.tasks import Task
    from circuitvit.verification import HypothesisFile, Verdict

FILES = ("hypotheses.json", "hypotheses.md")


def verify_hypotheses(
    path: Path,
    model: ModelOptions,
    images: ImageOptions,
    behaviour: BehaviourOptions,
    run: RunOptions,
    out: Path | None,
) -> None:
    """Test every claim of a file; what is given as an option goes before what the file says.

    Raises:
        CircuitViTError: if the file, the model or the images cannot be used.
    """
    from circuitvit.verification import check_hypotheses, read_hypotheses, save_verdicts

    file = read_hypotheses(path)
    named = replace(
        model, model=model.model or file.model or "", checkpoint=model.checkpoint or file.checkpoint
    )
    if not named.model:
        raise OptionError(f"{path} names no model: add model: {{name: ...}} to it, or give --model")
    task = _task(file, images, behaviour, run)
    clock = Clock()
    place: Folder | nullcontext[None] = nullcontext() if out is None else Folder(out, FILES)
    with place as folder:
        with clock.phase("model"):
            loaded = load_model(named)
        with clock.phase("claims"):
            verdicts = check_hypotheses(
                loaded, task, file.hypotheses, alpha=file.alpha, seed=run.seed or file.seed,
                batch_size=run.batch_size, memory=run.budget,
            )  # fmt: skip
        if folder is not None:
            for name in FILES:
                folder.write(name, lambda place: save_verdicts(verdicts, place))
    wrong = _show(loaded.name, verdicts, file.expected, clock)
    if folder is not None:
        show(f"\nwrote {folder.path}: {', '.join(folder.saved)}")
    if wrong:
        raise typer.Exit(1)


def _task(file: HypothesisFile, images: ImageOptions, behaviour: BehaviourOptions, run: RunOptions) -> Task:
    if images != ImageOptions():
        said = dict(file.behaviour)
        given = replace(
            behaviour,
            metric=said.get("metric", behaviour.metric),
            target=behaviour.target or _several(said.get("target")),
            foil=behaviour.foil or _several(said.get("foil")),
            ablation=said.get("ablation", behaviour.ablation),
        )
        return make_task(images, given, run.seed)
    if file.task is None:
        raise OptionError(
            f"{file.path} names no images: add task: {{clean: ..., corrupt: ...}}, or give --clean"
        )
    return file.task


def _several(spec: object) -> list[str] | None:
    if spec is None:
        return None
    return [str(each) for each in spec] if isinstance(spec, (list, tuple)) else [str(spec)]


def _show(
    model: str, verdicts: tuple[Verdict, ...], expected: tuple[str | None, ...], clock: Clock
) -> list[str]:
    """Print every verdict; give the claims whose verdict is not the one the file expects."""
    rows = [Row(verdict.verdict, f"{verdict.claim}. {verdict.reason}") for verdict in verdicts]
    show_rows(f"{len(verdicts)} claims about {model}", [*rows, Row("time", str(clock))])
    wrong = [
        f"{verdict.claim}: the file expects {wanted!r}, found {verdict.verdict!r}"
        for verdict, wanted in zip(verdicts, expected, strict=True)
        if wanted is not None and wanted != verdict.verdict
    ]
    show_notes("Not as expected", wrong)
    return wrong

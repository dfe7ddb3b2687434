"""Edits: a model with some of its sites changed, which is a model like any other.

An edit is a stage around a stage. What a head reads, its scores, its pattern and what it mixes are changed
inside of the stage's `write`, so that norm and projection stay what they are; a changed output of a node is
kept as wide as the stream; and where the stream itself is changed, either a constant is added after the stage
before, or a stage of its own stands there, a node of the graph (`resid6.edit`) that reads the stream and
writes the change. So every run, gradient and masked run is of the edited model, and the user's module is not
touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from circuitvit.errors import OptionError
from circuitvit.models.changes import OURS, Change, Value, check_value
from circuitvit.models.edited import EditedStage, StreamEdit
from circuitvit.models.rules import BackwardRules
from circuitvit.models.sites import Site, check_number_of, chosen_of, kinds_at, matching, numbered, parsed
from circuitvit.models.stages import Stage
from circuitvit.models.tokens import Chosen, Groups

if TYPE_CHECKING:
    from circuitvit.models.model import Model


def edit(model: Model, edits: Any, groups: Groups | None = None) -> Model:
    """The model with some of its sites changed, in the order given; see `Model.edit`."""
    bare = model if model.bare is None else model.bare
    bare.refresh()
    if not isinstance(edits, Mapping) or not len(edits):
        raise OptionError("edits are a table of sites and what becomes of them, such as {'m6': 0}")
    if not all(isinstance(key, str) for key in edits):
        raise OptionError("edits are named by sites, such as 'm6': model.sites() lists them all")
    changes = [change for key, value in edits.items() for change in _changes(bare, key, value, groups)]
    return edited(bare, (*model.edits, *changes), model.rules)


def edited(bare: Model, changes: Sequence[Change], rules: BackwardRules | None = None) -> Model:
    """A model with these changes.

    Args:
        bare: without any.
        changes: in order.
        rules: by which gradients flow.
    """
    stages: list[Stage] = []
    for place, stage in enumerate(bare.stages):
        here = [change for change in changes if change.site.stage == place]
        before = [change for change in here if change.site.kind == "stream"]
        inside = [change for change in here if change.site.kind != "stream"]
        if before and all(change.constant is not None for change in before):
            last = stages.pop()
            stages.append(
                EditedStage(last, (), before)
                if not isinstance(last, EditedStage)
                else EditedStage(last.inner, last.changes, before)
            )
        elif before:
            stages.append(StreamEdit(before, stage.nodes))
        stages.append(EditedStage(stage, inside) if inside else stage)
    made = replace(
        bare,
        name=_name(bare, changes),
        stages=tuple(stages),
        edits=tuple(changes),
        bare=bare,
        origin=bare.origin.afresh(),
    )
    _images(changes)
    made.refresh()
    return made if rules is None else made.with_rules(rules)


def _images(changes: Sequence[Change]) -> int | None:
    """The number of images that changes are for; None for any.

    Raises:
        OptionError: if they are for different numbers.
    """
    found = {change.images: change.name for change in changes if change.images is not None}
    if len(found) > 1:
        said = ", ".join(f"that of {site} for {count}" for count, site in found.items())
        raise OptionError(f"the edits are for different numbers of images: {said}")
    return next(iter(found), None)


def _name(bare: Model, changes: Sequence[Change]) -> str:
    names = list(dict.fromkeys(change.name for change in changes))
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"{bare.name}, edited ({shown})"


def _changes(bare: Model, key: str, value: object, groups: Groups | None) -> list[Change]:
    """The changes that one line of a table means."""
    name, at, source = parsed(key)
    name, number = numbered(name)
    found = []
    for site in matching(bare.all_sites, name):
        part = site
        if number is not None:
            check_number_of(site, number)
            part = replace(site, name=site.called(number), shape=(*site.shape[:-1], 1))
        kept = check_value(part, value)
        own = getattr(kept, "tokens", None) if isinstance(kept, OURS) else None
        if own is not None and at is not None:
            raise OptionError(f"{key!r} names tokens, and so does its value: leave out tokens= or the @")
        if site.kind == "logits" and (at is not None or own is not None):
            raise OptionError("logits have no tokens: leave out the @")
        kinds = ((), ()) if site.kind == "logits" else kinds_at(bare, site, bare.n_tokens)
        tokens = at if own is None else own
        rows, columns = chosen_of(site, kinds, tokens, source, lambda: bare.grid, groups)
        _refuse_spreading(part, kept, rows, kinds[0])
        found.append(Change(site, kept, rows, columns, kinds, number))
    if found[0].sees_all:
        found[0].check_function(next(bare.module.parameters()))
    return found


def _refuse_spreading(site: Site, value: Value, rows: Chosen, kinds: Sequence[str]) -> None:
    """Refuse what was read at one token for several: it is an oversight more often than not.

    Raises:
        OptionError: saying how to name the token.
    """
    mask = rows.of(kinds)
    count = len(kinds) if mask is None else int(mask.sum(dim=-1).max())
    if isinstance(value, Tensor) and value.ndim == 3 and value.shape[1] == 1 < count:
        raise OptionError(
            f"the value for {site.name} is of one token, and {count} are changed: name it, as in "
            f"'{site.name}@cls'; or give a vector (width,) for all of them"
        )

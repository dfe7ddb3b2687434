"""`circuitvit classes`: what `--target` and `--foil` can be, and what a group holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

import circuitvit as cv
from circuitvit.cli.inputs import ModelOptions, load_model
from circuitvit.cli.options import command
from circuitvit.cli.output import Row, show_notes, show_rows
from circuitvit.errors import OptionError

if TYPE_CHECKING:
    from circuitvit.models import Model


@command("Model")
def classes(
    word: Annotated[str, typer.Argument(metavar="[WORD]")] = "",
    *,
    model: ModelOptions,
) -> None:
    """List the classes of a model; or, given a word, those that are a kind of it, and what lies around them
    in WordNet. What is listed for a word is what `--target group:WORD` stands for.

    ```sh
    circuitvit classes animal --model catdog-tiny
    ```

    Args:
        word: such as cat, 'sea bird' or a WordNet id; every class by default.
    """
    loaded = load_model(model)
    if not loaded.has_classes:
        say = "its classes are sentences: --prompt TEXT" if loaded.words else "--head FILE gives it some"
        raise OptionError(f"{loaded.name} gives features and has no classes of its own; {say}")
    if not word:
        title = f"The {loaded.n_logits} classes of {loaded.name}"
        show_rows(title, _rows(loaded, range(loaded.n_logits)), explain=True)
        return
    kinds, tree = cv.tasks.kinds, cv.tasks.wordnet.tree()
    meant = cv.group(word)
    found = cv.tasks.classes.kind(loaded, meant)
    what = f"\n{tree.said(found.synset)}" if found.synset else ""
    title = f"{meant} is {len(found.members)} of the {loaded.n_logits} classes of {loaded.name}{what}"
    show_rows(title, _rows(loaded, found.members), explain=True)
    above, below = kinds.around(loaded, found)
    for heading, groups in (("Smaller groups in it", below), ("What it is a kind of", above)):
        if groups:
            rows = [Row(str(count), ", ".join(tree.names[each][:2]), each) for each, count in groups.items()]
            show_rows(f"{heading}, with how many classes", rows, explain=True)
    said = kinds.taken_for(loaded, found.members)
    show_notes("The names of classes were taken for", said)


def _rows(model: Model, indices: Iterable[int]) -> list[Row]:
    names, synsets = model.classes, model.synsets
    return [
        Row(str(index), names[index] if names else "", synsets[index] if synsets else "") for index in indices
    ]

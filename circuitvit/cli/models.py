"""`circuitvit models` and `circuitvit train`: what `--model` can be, and small models of your own."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import circuitvit as cv
from circuitvit.cli.library import arguments
from circuitvit.cli.options import Given, Keywords, command
from circuitvit.cli.output import Row, interruptible, show, show_notes, show_rows, stdout
from circuitvit.errors import counted

if TYPE_CHECKING:
    from circuitvit.models.zoo import Card

HOW = {
    "timm": "its own names, such as vit_tiny_patch16_224, with --checkpoint FILE or --pretrained",
    "transformers": "--model hf:NAME_OR_FOLDER",
    "open_clip": "--model open_clip:MODEL/TAG_OR_FILE",
    "torchvision": "--model torchvision:MODEL, with --checkpoint FILE",
}
"""How models of a library are asked for; those of others are wrapped in Python."""

EXTRAS = {
    "transformers": "circuitvit[transformers]",
    "open_clip": "circuitvit[open-clip]",
    "clip": "clip-anytorch",
}
"""What to install for the libraries that are no requirement."""

OWN = (
    "out/birds.json, written by `circuitvit train birds/ --out out/birds`",
    "a fine-tuned model: its timm name, --checkpoint FILE, --arch num_classes=37 and --classes NAMES.txt",
    "a class that you wrote: cv.wrap(module, layout=cv.Layout(...)) in Python",
)


@command("Models", every="--all")
def models(every: bool = False) -> None:
    """List the models that can be used: the bundled ones with what their cards say, and the architectures of
    each library, with what is installed. A model that cannot be taken apart (norms after attention, windows)
    is refused with the reason when it is loaded.

    For example:

    ```sh
    circuitvit models

    circuitvit models --all | grep clip
    ```

    Args:
        every: list timm's names instead, of the files most of whose models open, one on each line.
    """
    if every:
        _list_timm()
        return
    zoo = cv.models.zoo
    show_rows("Bundled", [Row(name, _about(zoo.zoo_card(name))) for name in zoo.zoo_names()])
    show_rows("Architectures, by library", [_about_library(name) for name in cv.models.registry.libraries()])
    with_words = cv.models.registry.libraries_with_words().items()
    rows = [Row(name, ", ".join(kinds)) for name, kinds in with_words]
    show_rows("With both towers: sentences are classes, --prompt TEXT", rows)
    show_notes("Your own", OWN)


def _list_timm() -> None:
    timm = cv.models.timm_import.import_timm()
    for module in cv.models.registry.TIMM_FILES:
        for name in timm.list_models(module=module):
            show(name)


def _about_library(name: str) -> Row:
    """Whether a library is installed, how its models are asked for, and their architectures."""
    installed = metadata.packages_distributions().get(name)
    if installed:
        title = f"{name} {metadata.version(installed[0])}"
        how = HOW.get(name, "cv.wrap(module) in Python")
    else:
        title, how = name, f"not installed: pip install '{EXTRAS.get(name, name)}'"
    return Row(title, f"{how}\n{', '.join(cv.models.registry.libraries()[name])}")


def _about(card: Card) -> str:
    """A card in one sentence or two."""
    shown = ", ".join(card.classes[:4]) + (", ..." if len(card.classes) > 4 else "")
    classes = f"{len(card.classes)} classes ({shown})" if card.classes else "sentences for classes"
    layers, heads = (card.architecture.get(name, "?") for name in ("depth", "num_heads"))
    size = " x ".join(str(side) for side in card.input.size)
    return (
        f"{classes}, {layers} layers of {heads} heads, images of {size}; "
        f"{card.accuracy['held_out']:.1%} right. Training data: {card.data}"
    )


# -- training ------------------------------------------------------------------------------------


RECIPE = Keywords(
    "Recipe", {"": {name: each for name, each in arguments("training.Recipe").items() if name != "seed"}}
)


@command(
    "Model", out="--out OUT", quiet="--quiet -q", size="--size PIXELS",
    shortcut="--shortcut background|word|colour", shortcut_share="--shortcut-share SHARE",
)  # fmt: skip
def train(
    dataset: Annotated[str, typer.Argument(metavar="catdog|clip|digits|FOLDER")],
    *,
    size: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
    width: int | None = None,
    checkpoints: int | None = None,
    recipe: Annotated[Given, RECIPE],
    out: Path | None = None,
    seed: int = 0,
    shortcut: str | None = None,
    shortcut_share: float | None = None,
    quiet: bool = False,
) -> None:
    """Train a small Vision Transformer whose circuits can be understood completely.

    `circuitvit train catdog`, `clip` and `digits` are how the bundled models catdog-tiny, clip-tiny and
    digits-tiny were made, and `circuitvit train catdog --shortcut background` is catdog-shortcut. The
    defaults repeat their recipes: on the same machine, with the same versions and number of threads, they
    give the same weights, byte for byte.

    A folder is read as one class per subfolder, such as birds/robin/1.jpg and birds/wren/1.jpg. All
    pictures are opened before training begins; a fifth of each class is held out to measure accuracy.

    Ctrl-C stops early and keeps what has been learned. Use the result like any other model:

        circuitvit train birds/ --out out/birds

        circuitvit discover --model out/birds.json ...

    `--checkpoints 20` keeps the model at 20 steps of its training, closer together at the beginning, in the
    folder OUT-checkpoints: `circuitvit across OUT-checkpoints ...` says when a circuit forms.

    `circuitvit train sae` is another command: it trains a dictionary of features on what a model computes.

    The defaults of the recipe, of depth, heads and width are the data set's own.

    Args:
        dataset: `catdog` (drawn animal faces), `clip` (drawn animals and signs with captions, for an image
            and a text tower), `digits` (scikit-learn's handwritten digits), or a folder with one subfolder of
            pictures per class.
        out: where to write: OUT.safetensors (weights) and OUT.json (card). [default: out/NAME]
        seed: of initial weights and data: the same seed gives the same model.
        size: side to which a folder's pictures are resized; a multiple of 8. [default: 48]
        shortcut: of catdog: what nearly always gives the species away, so that a model learns it in place of
            the animal: the background, a word on a sign, or the colour of the coat.
        shortcut_share: of the scenes in which it does. [default: 0.99]
        depth: layers.
        heads: attention heads in each layer.
        width: of the residual stream; a multiple of the heads.
        checkpoints: how many to keep, the first of step 0 and the last of the trained model.
        quiet: no progress bar.
    """
    interruptible()  # training itself keeps what has been learned
    shape = {"depth": depth, "num_heads": heads, "embed_dim": width}
    given = {
        "architecture": {name: value for name, value in shape.items() if value is not None},
        "checkpoints": checkpoints,
        "progress": not quiet,
        "seed": seed,
        **recipe,
    }
    if dataset == "clip" and size is None and shortcut is None and shortcut_share is None:
        result = cv.training.train_clip(out or Path("out") / "clip-tiny", **given)
    else:
        data = cv.training.training_data(
            dataset, seed, size, shortcut=shortcut, shortcut_share=shortcut_share
        )
        result = cv.training.train(data, out or Path("out") / data.name, **given)
    console = stdout()
    if result.interrupted:
        console.print(f"Stopped after {result.card.recipe['steps_done']} steps.")
    for name, value in result.card.accuracy.items():
        if name not in ("n", "n_group"):
            console.print(f"accuracy, {name.replace('_', ' ')}: {value:.1%}")
    if result.checkpoints:
        folder, count = result.checkpoints[0].parent, counted(len(result.checkpoints), "checkpoint")
        console.print(f"wrote {count} to {folder}", soft_wrap=True)
    console.print(f"wrote {result.weights} and its card", soft_wrap=True)

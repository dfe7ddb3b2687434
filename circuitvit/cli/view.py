"""`circuitvit view`: other looks at a model and its images, as pictures and as numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from circuitvit.cli.folder import Folder
from circuitvit.cli.grouped import grouped
from circuitvit.cli.inputs import check_choice, load_model
from circuitvit.cli.options import ModelOptions, option
from circuitvit.cli.screen import Row, show, show_rows
from circuitvit.errors import FileError, OptionError

if TYPE_CHECKING:
    from circuitvit.views.canvas import Picture

LISTED = 12
FIGURES = (".png", ".svg", ".pdf")

view = typer.Typer(
    name="view",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Other looks at a model: what each part says of a class, where heads look, what each patch is.",
)

ImagesArgument = Annotated[
    list[Path], typer.Argument(help="Image files, or one folder of them.", metavar="IMAGE...")
]
OutOption = Annotated[
    Path,
    option("Output", "--out -o", "The ending chooses the format: .png, .svg or .pdf.", "FILE"),
]
TargetOption = Annotated[
    list[str],
    option("View", "--target", "Class that is spoken for: a name, a WordNet id or an index.", "CLASS"),
]
FoilOption = Annotated[list[str] | None, option("View", "--foil", "Class that it is compared with.", "CLASS")]
ImageOption = Annotated[int, option("View", "--image", "Which of the images to draw, from 0.", "N", min=0)]
NoPictureOption = Annotated[
    bool, option("Output", "--no-picture", "Draw on white, not over the image: for sharing without it.")
]


@grouped
def lens(
    model: ModelOptions,
    images: ImagesArgument,
    position: Annotated[
        list[str] | None,
        option(
            "View", "--position", "Such as embedding or 'layer 5'; six by default. Can be repeated.", "NAME"
        ),
    ] = None,
    symbols: Annotated[
        str | None,
        option(
            "View",
            "--symbols",
            "names: emoji by the names of the classes; or a JSON file, a symbol for each class. Classes of "
            "one symbol have one colour.",
            "names|FILE",
        ),
    ] = None,
    image: ImageOption = 0,
    no_picture: NoPictureOption = False,
    out: OutOption = Path("lens.png"),
) -> None:
    """What class would each patch be, if the model stopped here? The logit lens: the model's own final norm
    and classifier at every layer and patch. With the ending .html or .txt it is a table of names or emoji.

    ```sh
    circuitvit view lens --model catdog-tiny cat.png --symbols names --out lens.html
    ```
    """
    from circuitvit.views import class_symbols, logit_lens

    _check_ending(out, (*FIGURES, ".html", ".txt"))
    loaded = load_model(model)
    table = (
        None if symbols is None else class_symbols(loaded, None if symbols == "names" else _table(symbols))
    )
    found = logit_lens(loaded, _images(images))
    places: list[int | str] | None = list(position) if position else None
    if out.suffix == ".html":
        _write_text(out, found.to_html(image, places, table, picture=not no_picture))
    elif out.suffix == ".txt":
        each = [found.position(place) for place in places or range(len(found.positions))]
        tables = [f"{found.positions[place]}\n{found.to_text(image, place, table)}\n" for place in each]
        _write_text(out, "\n".join(tables))
    else:
        _write(out, found.figure(image, positions=places, symbols=table, picture=not no_picture))
    row = found.subjects.index(image)
    readout = [
        Row(name, found.labels[int(top)], f"{sure:.0%}")
        for name, top, sure in zip(
            found.positions, found.pooled_top[:, row], found.pooled_confidence[:, row], strict=True
        )
    ]
    show_rows(f"What the readout makes of {found.subjects.names[row]}", readout, explain=True)
    show(f"\nwrote {out}")


@grouped
def attribution(
    model: ModelOptions,
    images: ImagesArgument,
    target: TargetOption,
    foil: FoilOption = None,
    image: Annotated[
        int | None, option("View", "--image", "Which image, from 0; by default the mean.", "N", min=0)
    ] = None,
    no_picture: NoPictureOption = False,
    out: OutOption = Path("attribution.png"),
) -> None:
    """What does each head and MLP say itself, straight to the logits? Direct logit attribution: shares that
    sum to the difference of the two logits, by part and by patch. With the ending .json, the numbers.

    ```sh
    circuitvit view attribution --model catdog-tiny cat.png --target cat --foil dog
    ```
    """
    from circuitvit.views import direct_logit_attribution

    _check_ending(out, (*FIGURES, ".json"))
    loaded = load_model(model)
    found = direct_logit_attribution(
        loaded, _images(images), _one("--target", target) or "", _one("--foil", foil)
    )
    if out.suffix == ".json":
        shares = {name: found.of(name, image) for name in (*found.senders, *found.constants)}
        _write_text(out, json.dumps({"label": found.label, "shares": shares}, indent=1) + "\n")
    else:
        _write(out, found.figure(image, picture=not no_picture))
    ranked = found.strongest(LISTED)
    show_rows(f"Shares in {found.label}, mean", [Row(name, f"{share:+.4f}") for name, share in ranked])
    show(f"\nsum {found.total.mean():+.4f}, logits {found.logit_difference.mean():+.4f}\nwrote {out}")


@grouped
def attention(
    model: ModelOptions,
    images: ImagesArgument,
    layer: Annotated[int, option("View", "--layer", "Of the model; -1 is the last.", "N")] = -1,
    query: Annotated[
        str, option("View", "--query", "A token's place, or a patch as ROW,COLUMN.", "TOKEN")
    ] = "0",
    image: ImageOption = 0,
    no_picture: NoPictureOption = False,
    out: OutOption = Path("attention.png"),
) -> None:
    """Where do the heads of a layer look? Pattern, scores before the softmax, and pattern times value.

    circuitvit view attention --model catdog-tiny cat.png --layer 1 --query 2,3
    """
    from circuitvit.views import attention_patterns

    _check_ending(out, FIGURES)
    token = _token(query)
    found = attention_patterns(load_model(model), _images(images), layer)
    _write(out, found.figure(image, query=token, picture=not no_picture))
    show(f"wrote {out}: {len(found.heads)} heads of layer {found.layer}")


@grouped
def positions(
    model: ModelOptions,
    images: ImagesArgument,
    at_least: Annotated[
        float, option("View", "--at-least", "Share of a pattern that position must explain.", "SHARE")
    ] = 0.8,
    out: OutOption = Path("positions.png"),
) -> None:
    """Which heads look at places, whatever is there? Give a dozen images or more that have little in common.

    circuitvit view positions --model vit_tiny_patch16_224 --checkpoint vit_tiny.safetensors photos/
    """
    from circuitvit.views import position_heads

    _check_ending(out, FIGURES)
    found = position_heads(load_model(model), _images(images))
    rows = [
        Row(head.head, head.name, f"position {head.share:.0%}, attention there {head.mass:.0%}")
        for head in found.only(at_least)
    ]
    _write(out, found.figure(at_least=at_least))
    show_rows(f"Heads that go by position, of {len(found.heads)}", rows, explain=True)
    show(f"\nwrote {out}")


@grouped
def evidence(
    model: ModelOptions,
    images: ImagesArgument,
    target: TargetOption,
    foil: FoilOption = None,
    by: Annotated[
        str, option("View", "--by", "lens: each patch's own logits; attribution: the heads' shares.", "NAME")
    ] = "lens",
    position: Annotated[
        str | None,
        option("View", "--position", "Of the lens, such as 'layer 5'; the last by default.", "NAME"),
    ] = None,
    no_picture: NoPictureOption = False,
    out: OutOption = Path("evidence.png"),
) -> None:
    """Where is the class? The evidence of each patch, which outlines objects that nobody pointed out.

    circuitvit view evidence --model catdog-tiny cat.png --target cat --by attribution
    """
    from circuitvit.views import patch_evidence

    check_choice("kind of evidence", by, ("lens", "attribution"))
    _check_ending(out, FIGURES)
    found = patch_evidence(
        load_model(model),
        _images(images),
        target,
        foil or None,
        by="lens" if by == "lens" else "attribution",
        position=-1 if position is None else position,
    )
    _write(out, found.figure(picture=not no_picture))
    show(f"wrote {out}: {found.label}, {len(found.subjects)} images")


def heatmap(
    scores: Annotated[Path, typer.Argument(help="From `circuitvit attribute`.", metavar="SCORES.json")],
    by: Annotated[
        str, option("View", "--by", "signed: effects add up and cancel; magnitude: sizes add up.", "NAME")
    ] = "signed",
    out: OutOption = Path("heatmap.png"),
) -> None:
    """Which heads and MLPs matter? The effect of each node, from the scores of the edges that leave it.

    circuitvit view heatmap out/scores.json --out heatmap.svg
    """
    from circuitvit.graph import EdgeScores
    from circuitvit.views import effect_heatmap

    check_choice("kind of heat map", by, ("signed", "magnitude"))
    _check_ending(out, FIGURES)
    found = effect_heatmap(EdgeScores.load(scores), "signed" if by == "signed" else "magnitude")
    _write(out, found.figure())
    show(f"wrote {out}: {len(found.layers)} layers, {found.heads.shape[1]} heads")


_COMMANDS: tuple[tuple[Callable[..., None], str], ...] = (
    (lens, "What class each patch would be, layer by layer."),
    (attribution, "What each part says straight to the logits."),
    (attention, "Where the heads of a layer look."),
    (positions, "Heads that look at places, not at content."),
    (evidence, "Which patches speak for a class."),
    (heatmap, "Effects of heads and MLPs, from scores."),
)
for _command, _summary in _COMMANDS:
    view.command(short_help=_summary)(_command)


# -- inside --------------------------------------------------------------------------------------


def _images(paths: list[Path]) -> Any:
    """One path may be a folder; several are files."""
    return paths[0] if len(paths) == 1 else paths


def _one(name: str, given: list[str] | None) -> str | None:
    """The single class of an option that could be repeated."""
    if given and len(given) > 1:
        raise OptionError(f"an attribution is of one class on each side: give {name} once")
    return given[0] if given else None


def _token(text: str) -> int | tuple[int, int]:
    parts = [part.strip() for part in text.split(",")]
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise OptionError(f"--query takes a token's place such as 0, or ROW,COLUMN such as 2,3, not {text!r}")
    return (int(parts[0]), int(parts[1])) if len(parts) == 2 else int(parts[0])


def _table(path: str) -> dict[str | int, str]:
    from circuitvit.graph.files import read_json

    return {str(name): str(symbol) for name, symbol in read_json(Path(path)).items()}


def _check_ending(out: Path, known: tuple[str, ...]) -> None:
    if out.suffix not in known:
        raise OptionError(f"--out ends in {', '.join(known)}, not as {out.name!r}")
    if out.is_dir():
        raise FileError(f"cannot write {out}: it is a folder")


def _write(out: Path, figure: Picture) -> None:
    with Folder(out.parent, (out.name,)) as folder:
        folder.write(out.name, figure.save)


def _write_text(out: Path, text: str) -> None:
    from circuitvit.graph.files import write_bytes

    with Folder(out.parent, (out.name,)) as folder:
        folder.write(out.name, lambda path: write_bytes(path, text.encode()))

"""`circuitvit view`: looks at a model and its images, as pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

import circuitvit as cv
from circuitvit.cli.inputs import BatchOptions, ModelOptions, load_model
from circuitvit.cli.options import command
from circuitvit.cli.output import Folder, Row, show, show_rows
from circuitvit.errors import FileError, OptionError, counted

LISTED = 12
FIGURES = (".png", ".svg", ".pdf")

Images = Annotated[
    list[Path], typer.Argument(help="Image (or clip) files, or one folder of them.", metavar="IMAGE...")
]
SHARED = {"out": "--out -o FILE", "target": "--target CLASS", "foil": "--foil CLASS"}
TEXTS = {
    "out": "the ending chooses the format: .png, .svg or .pdf.",
    "target": "class that is spoken for: a name, a WordNet id, an index, or a group such as group:cat. "
    "Repeated, a set of classes.",
    "foil": "what it is compared with, likewise.",
    "image": "which of the images to draw, from 0.",
    "no_picture": "draw on white, not over the image: for sharing without it.",
}
look = partial(command, "View", texts=TEXTS, shares=False, **SHARED)


@look(position="--position NAME", symbols="--symbols names|FILE", tuned="--tuned FILE")
def lens(
    model: ModelOptions,
    images: Images,
    run: BatchOptions,
    position: list[str] | None = None,
    symbols: str | None = None,
    tuned: Path | None = None,
    image: int = 0,
    no_picture: bool = False,
    out: Path = Path("lens.png"),
) -> None:
    """What class would each patch be, if the model stopped here? The logit lens: the model's own final norm
    and classifier at every layer and patch. With the ending .html or .txt it is a table of names or emoji.

    ```sh
    circuitvit view lens --model catdog-tiny cat.png --symbols names --out lens.html
    ```

    Args:
        position: such as embedding or 'layer 5'; six by default. Can be repeated.
        symbols: names: emoji by the names of the classes; or a JSON file, a symbol for each class. Classes of
            one symbol have one colour.
        tuned: a tuned lens of this model, a file that `circuitvit view tuned-lens --save` wrote.
        out: the ending chooses the format: .png, .svg, .pdf, .html or .txt.
    """
    check_ending(out, (*FIGURES, ".html", ".txt"))
    loaded = load_model(model)
    table = None
    if symbols is not None:
        own: Any = None if symbols == "names" else cv.graph.files.read_json(Path(symbols))
        table = cv.views.class_symbols(loaded, own)
    maps = None if tuned is None else cv.views.TunedLens.load(tuned, loaded)
    found = cv.views.logit_lens(loaded, given_images(images), tuned=maps, **run.settings())
    places: list[int | str] | None = list(position) if position else None
    if out.suffix == ".html":
        write_text(out, found.to_html(image, places, table, picture=not no_picture))
    elif out.suffix == ".txt":
        each = [found.position(place) for place in places or range(len(found.positions))]
        tables = [f"{found.positions[place]}\n{found.to_text(image, place, table)}\n" for place in each]
        write_text(out, "\n".join(tables))
    else:
        write(out, found.figure(image, positions=places, symbols=table, picture=not no_picture).save)
    row = found.subjects.index(image)
    readout = [
        Row(name, found.labels[int(top)], f"{sure:.0%}")
        for name, top, sure in zip(
            found.positions, found.pooled_top[:, row], found.pooled_confidence[:, row], strict=True
        )
    ]
    show_rows(f"What the readout makes of {found.subjects.names[row]}", readout, explain=True)
    show(f"\nwrote {out}")


@look()
def attribution(
    model: ModelOptions,
    images: Images,
    run: BatchOptions,
    target: list[str],
    foil: list[str] | None = None,
    image: int | None = None,
    no_picture: bool = False,
    out: Path = Path("attribution.png"),
) -> None:
    """What does each head and MLP say itself, straight to the logits? Direct logit attribution: shares that
    sum to the difference of the two logits, by part and by patch. With the ending .json, the numbers.

    ```sh
    circuitvit view attribution --model catdog-tiny cat.png --target cat --foil dog
    ```

    Args:
        image: which image, from 0; by default the mean.
        out: the ending chooses the format: .png, .svg, .pdf or .json.
    """
    check_ending(out, (*FIGURES, ".json"))
    loaded = load_model(model)
    found = cv.views.direct_logit_attribution(
        loaded, given_images(images), target, foil or None, **run.settings()
    )
    if out.suffix == ".json":
        shares = {name: found.of(name, image) for name in (*found.senders, *found.constants)}
        write_text(out, json.dumps({"label": found.label, "shares": shares}, indent=1) + "\n")
    else:
        write(out, found.figure(image, picture=not no_picture).save)
    ranked = found.strongest(LISTED)
    show_rows(f"Shares in {found.label}, mean", [Row(name, f"{share:+.4f}") for name, share in ranked])
    show(f"\nsum {found.total.mean():+.4f}, logits {found.logit_difference.mean():+.4f}\nwrote {out}")


@look("views.attention_patterns", query="--query TOKEN")
def attention(
    model: ModelOptions,
    images: Images,
    run: BatchOptions,
    layer: int = -1,
    query: str = "",
    image: int = 0,
    no_picture: bool = False,
    megabytes: float = 24.0,
    out: Path = Path("attention.png"),
) -> None:
    """Where do the heads of a layer look? Pattern, scores before the softmax, and pattern times value. With
    the ending .html, a page of all heads and layers: point at a patch to see where it looks and who looks at
    it.

    ```sh
    circuitvit view attention --model catdog-tiny cat.png --out attention.html
    circuitvit view attention --model catdog-tiny cat.png --layer 1 --query 2,3
    ```

    Args:
        layer: of the model; negative ones count from the last. A page has all layers, unless one is named.
        query: a token's place, or a patch as ROW,COLUMN; of a clip as FRAME,ROW,COLUMN; a page begins there.
            By default the first token, and of a sentence the last, at which it is read.
        image: which of the images to draw, from 0; of a page, to show first.
        megabytes: that a page may be large; where there are many tokens more is more precise.
        out: the ending chooses the format: .png, .svg, .pdf or .html.
    """
    check_ending(out, (*FIGURES, ".html"))
    token = _token(query) if query else None
    if out.suffix == ".html":
        layers = None if layer == -1 else [layer]
        page = cv.views.attention_page(load_model(model), given_images(images), layers, megabytes=megabytes)
        write(out, partial(page.save, image=image, query=token or 0, picture=not no_picture))
        show(f"wrote {out}: {page}\nopen it in a browser")
        return
    found = cv.views.attention_patterns(load_model(model), given_images(images), layer, **run.settings())
    write(out, found.figure(image, query=token, picture=not no_picture).save)
    show(f"wrote {out}: {len(found.heads)} heads of layer {found.layer}")


@look(at_least="--at-least SHARE")
def positions(
    model: ModelOptions,
    images: Images,
    run: BatchOptions,
    at_least: float = 0.8,
    out: Path = Path("positions.png"),
) -> None:
    """Which heads look at places, whatever is there? Give a dozen images or more that have little in common.

    ```sh
    circuitvit view positions --model vit_tiny_patch16_224 --checkpoint vit_tiny.safetensors photos/
    ```

    Args:
        at_least: share of a pattern that position must explain.
    """
    check_ending(out, FIGURES)
    found = cv.views.position_heads(load_model(model), given_images(images), **run.settings())
    rows = [
        Row(head.head, head.name, f"position {head.share:.0%}, attention there {head.mass:.0%}")
        for head in found.only(at_least)
    ]
    write(out, found.figure(at_least=at_least).save)
    show_rows(f"Heads that go by position, of {len(found.heads)}", rows, explain=True)
    show(f"\nwrote {out}")


@look("views.patch_evidence", position="--position NAME")
def evidence(
    model: ModelOptions,
    images: Images,
    run: BatchOptions,
    target: list[str],
    foil: list[str] | None = None,
    by: str = "lens",
    position: str | None = None,
    no_picture: bool = False,
    out: Path = Path("evidence.png"),
) -> None:
    """Where is the class? The evidence of each patch, which outlines objects that nobody pointed out.

    ```sh
    circuitvit view evidence --model catdog-tiny cat.png --target cat --by attribution
    ```

    Args:
        by: lens: each patch's own logits; attribution: the shares of all parts; heads: of the heads alone,
            in the class minus the mean of the others.
        position: of the lens, such as 'layer 5'; the last by default.
    """
    check_ending(out, FIGURES)
    found = cv.views.patch_evidence(
        load_model(model),
        given_images(images),
        target,
        foil or None,
        by=by,  # type: ignore[arg-type]
        position=-1 if position is None else position,
        **run.settings(),
    )
    write(out, found.figure(picture=not no_picture).save)
    show(f"wrote {out}: {found.label}, {counted(len(found.subjects), 'image')}")


@look("views.effect_heatmap")
def heatmap(
    scores: Annotated[Path, typer.Argument(metavar="SCORES.json")],
    by: str = "signed",
    out: Path = Path("heatmap.png"),
) -> None:
    """Which heads and MLPs matter? The effect of each node, from the scores of the edges that leave it.

    ```sh
    circuitvit view heatmap out/scores.json --out heatmap.svg
    ```

    Args:
        scores: a file that `circuitvit attribute` wrote.
        by: signed: effects add up and cancel; magnitude: sizes add up.
    """
    check_ending(out, FIGURES)
    found = cv.views.effect_heatmap(cv.EdgeScores.load(scores), "signed" if by == "signed" else "magnitude")
    write(out, found.figure().save)
    show(f"wrote {out}: {len(found.layers)} layers, {found.heads.shape[1]} heads")


view = typer.Typer(
    name="view",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Other looks at a model: what each part says of a class, where heads look, what each patch is.",
)
VIEWS = {
    "lens": (lens, "What class each patch would be, layer by layer."),
    "attribution": (attribution, "What each part says straight to the logits."),
    "attention": (attention, "Where the heads of a layer look."),
    "positions": (positions, "Heads that look at places, not at content."),
    "evidence": (evidence, "Which patches speak for a class."),
    "heatmap": (heatmap, "Effects of heads and MLPs, from scores."),
}
for _name, (_command, _summary) in VIEWS.items():
    view.command(_name, short_help=_summary)(_command)


# -- inside --------------------------------------------------------------------------------------


def given_images(paths: list[Path]) -> Any:
    """One path may be a folder; several are files."""
    return paths[0] if len(paths) == 1 else paths


def _token(text: str) -> int | tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if len(parts) > 3 or not all(part.isdecimal() for part in parts):
        raise OptionError(
            "--query takes a token's place such as 0, or ROW,COLUMN such as 2,3, with FRAME first for clips, "
            f"not {text!r}"
        )
    return tuple(map(int, parts)) if len(parts) > 1 else int(parts[0])


def check_ending(out: Path, known: tuple[str, ...], option: str = "--out") -> None:
    if out.suffix not in known:
        raise OptionError(f"{option} ends in {', '.join(known)}, not as {out.name!r}")
    if out.is_dir():
        raise FileError(f"cannot write {out}: it is a folder")


def write(out: Path, save: Callable[[Path], object]) -> None:
    with Folder(out.parent, (out.name,), guarded=False) as folder:
        folder.write(out.name, save)


def write_text(out: Path, text: str) -> None:
    write(out, lambda path: cv.graph.files.write_bytes(path, text.encode()))

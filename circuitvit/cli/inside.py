"""`circuitvit view`, further: looks that measure, train or edit, at many images rather than at one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

import circuitvit as cv
from circuitvit.cli.inputs import BehaviourOptions, ImageOptions, ModelOptions, load_model, make_task
from circuitvit.cli.output import Row, show, show_notes, show_rows
from circuitvit.cli.view import (
    FIGURES,
    LISTED,
    Images,
    check_ending,
    given_images,
    look,
    view,
    write,
    write_text,
)
from circuitvit.errors import OptionError, counted

# -- attention, tokens and steering --------------------------------------------------------------


@look("views.knock_outs", source="--source GROUP", to="--to GROUP", way="--way NAME")
def knockouts(
    model: ModelOptions,
    images: Images,
    by: str = "layer",
    way: str = "renormalise",
    window: int = 1,
    source: list[str] | None = None,
    to: list[str] | None = None,
    metric: str = "logit",
    batch_size: int | None = None,
    out: Path = Path("knockouts.png"),
) -> None:
    """Who must attend to whom? Attention between kinds of tokens is knocked out, layer by layer.

    ```sh
    circuitvit view knockouts --model catdog-tiny photos/ --to cls --by head
    ```

    Args:
        way: what comes in its place: renormalise, mean, zero, causal-last or causal-first.
        source: a kind of token (cls, reg, patch) that is no longer attended to; all by default. Can be
            repeated.
        to: a kind of token that no longer attends; all by default. Can be repeated.
        metric: a metric such as logit, probability, kl_divergence or accuracy.
    """
    check_ending(out, FIGURES)
    if way == "corrupt":
        raise OptionError("--way corrupt needs pairs of images: use cv.knock_outs with a task")
    found = cv.views.knock_outs(
        load_model(model),
        given_images(images),
        sources=source,
        targets=to,
        by=by,  # type: ignore[arg-type]
        way=way,  # type: ignore[arg-type]
        window=window,
        metric=metric,
        batch_size=batch_size,
    )
    write(out, found.figure().save)
    rows = [Row(place, f"{a} -> {b}", str(effect)) for a, b, place, effect in found.strongest(LISTED)]
    show_rows(f"Change of {found.outcomes.metric}, mean", rows, explain=True)
    show_notes("Bear in mind", found.caveats)
    show(f"\nwrote {out}")


@look("views.token_ablations", token="--token TOKENS", way="--way NAME", site="--site NAME")
def tokens(
    model: ModelOptions,
    images: Images,
    token: list[str],
    way: list[str] | None = None,
    site: str = "resid0",
    metric: str = "logit",
    batch_size: int | None = None,
    seed: int = 0,
    out: Path = Path("tokens.png"),
) -> None:
    """What is lost without some tokens? Removed, replaced by means, shuffled between images, or zero.

    ```sh
    circuitvit view tokens --model catdog-tiny photos/ --token cls --token 0.25
    ```

    Args:
        token: a kind (cls, reg), a number, patch(2,3), or a share of the patches such as 0.1. Can be
            repeated.
        way: remove, mean, shuffle or zero; all that there are by default. Can be repeated.
        metric: a metric such as logit, probability, kl_divergence or accuracy.
    """
    check_ending(out, FIGURES)
    found = cv.views.token_ablations(
        load_model(model),
        given_images(images),
        {each: float(each) if "." in each and each.replace(".", "").isdecimal() else each for each in token},
        ways=way,  # type: ignore[arg-type]
        site=site,
        metric=metric,
        batch_size=batch_size,
        seed=seed,
    )
    write(out, found.figure().save)
    rows = [Row(name, way, str(found.estimate(name, way))) for name in found.tokens for way in found.ways]
    show_rows(f"Change of {found.outcomes.metric}, mean", rows, explain=True)
    show_notes("Bear in mind", found.caveats)
    show(f"\nwrote {out}")


@look("views.steer", direction="--direction FILE", towards="--towards PATH", away="--away PATH",
      site="--site NAME", scale="--scale NUMBER", tokens="--tokens NAME", how="--how NAME")  # fmt: skip
def steering(
    model: ModelOptions,
    images: Images,
    site: str,
    direction: Path | None = None,
    towards: Path | None = None,
    away: Path | None = None,
    scale: list[float] | None = None,
    tokens: str | None = None,
    how: str = "add",
    controls: int = 5,
    metric: str = "logit",
    batch_size: int | None = None,
    seed: int = 0,
    out: Path = Path("steering.png"),
) -> None:
    """Does a push along a direction move the answer? Effect by scale, beside random directions.

    ```sh
    circuitvit view steering --model catdog-tiny dogs/ --site resid2 --towards cats/ --away dogs/
    ```

    Args:
        direction: a file of one vector, .npy or .safetensors; or leave it out and give --towards and --away.
        towards: images on whose mean the direction ends.
        away: images on whose mean it begins.
        scale: a factor of the direction; six by default. Can be repeated.
        metric: a metric such as logit, probability, kl_divergence or accuracy.
    """
    check_ending(out, FIGURES)
    if (direction is None) == (towards is None) or (towards is None) != (away is None):
        raise OptionError("give a direction: either --direction FILE, or --towards and --away images")
    loaded = load_model(model)
    if towards is None or away is None:
        pushed: object = direction
    else:
        pushed = cv.views.difference_of_means(loaded, towards, away, site, tokens=tokens)
    found = cv.views.steer(
        loaded,
        given_images(images),
        pushed,  # type: ignore[arg-type]
        site,
        scales=scale or cv.views.steering.SCALES,
        tokens=tokens,
        how=how,  # type: ignore[arg-type]
        controls=controls,
        metric=metric,
        batch_size=batch_size,
        seed=seed,
    )
    write(out, found.figure().save)
    rows = [Row(f"{each:+g}", str(found.estimate(each))) for each in found.scales]
    show_rows(f"Change of {found.outcomes.metric} by scale, mean", rows)
    show_notes("Bear in mind", found.caveats)
    show(f"\nwrote {out}")


@look("views.linear_probes", sites="--sites NAME", tokens="--tokens TOKENS", ask="--ask IMAGE",
      about="--about CLASS", keep="--keep FILE", use="--use FILE")  # fmt: skip
def probes(
    model: ModelOptions,
    images: Annotated[
        Path | None,
        typer.Argument(help="Folder with one subfolder of images for each class.", metavar="[FOLDER]"),
    ] = None,
    sites: list[str] | None = None,
    tokens: list[str] | None = None,
    reads: str = "mean",
    strength: float = 1.0,
    folds: int = 5,
    samples: int = 16,
    seed: int = 0,
    batch_size: int = 32,
    keep: Path | None = None,
    use: Path | None = None,
    ask: Path | None = None,
    about: str | None = None,
    no_picture: bool = False,
    out: Path = Path("probes.png"),
) -> None:
    """What can be read where? Linear probes for the classes of a folder's subfolders, with a control. With
    `--ask`, the picture shows what they say of each patch of another image.

    ```sh
    circuitvit view probes --model catdog-tiny photos/ --tokens patch --reads any --ask both.png --about cat
    ```

    Args:
        sites: such as 'resid*' (the default) or m3.hidden. Can be repeated.
        tokens: of a place, such as cls, patch or 'patch(2,3)'; repeated, places of their own.
        reads: mean: a probe of the mean of a place's tokens; any: of single tokens, whichever they are; each:
            a probe for every token.
        keep: write the probes to this file (.safetensors).
        use: probes that `--keep` wrote, instead of a folder.
        ask: an image whose patches are asked, by the probes of the first place.
        about: the class that it is asked about; the first by default.
    """
    check_ending(out, FIGURES)
    if (images is None) == (use is None):
        raise OptionError("give a folder with one subfolder for each class, or --use with a file of probes")
    loaded = load_model(model)
    found = (
        cv.views.LinearProbes.load(use)
        if use is not None
        else cv.linear_probes(
            loaded,
            images or "",
            sites=sites or "resid*",
            tokens=tokens or None,
            reads="any" if reads == "any" else "each" if reads == "each" else "mean",
            strength=strength,
            folds=folds,
            samples=samples,
            seed=seed,
            batch_size=batch_size,
        )
    )
    of = found.classes[0] if about is None else about
    figure = found.figure() if ask is None else found.apply(loaded, ask).figure(of, picture=not no_picture)
    write(out, figure.save)
    if keep is not None:
        write(keep, found.save)
    rows = [
        Row(site, str(found.mean(site)), f"control {found.mean_control(site).value:.3f}")
        for site in found.sites
    ]
    show_rows(f"Accuracy at {found.places[0]}: {', '.join(found.classes)}", rows, explain=True)
    show_notes("Bear in mind", found.notes)


@look("views.disentanglement", names="--names SITE")
def disentanglement(
    model: ModelOptions,
    names: list[str] | None = None,
    trees: int = 30,
    seed: int = 0,
    batch_size: int | None = None,
    out: Path = Path("disentanglement.png"),
) -> None:
    """Which nodes carry which factor? Drawn scenes vary in species, place, size, tilt and colours, every
    combination once; the share of each node's variance that is each factor's, and DCI scores.

    ```sh
    circuitvit view disentanglement --model catdog-tiny --names 'a*.h*' --out disentanglement.png
    ```

    Args:
        names: of sites to read, such as 'a*.h*' or m1.hidden@cls; all heads and MLPs by default. Can be
            repeated.
        out: the ending chooses the format: .png, .svg, .pdf or .json.
    """
    check_ending(out, (*FIGURES, ".json"))
    found = cv.disentanglement(
        load_model(model), names=names or None, trees=trees, seed=seed, batch_size=batch_size
    )
    if out.suffix == ".json":
        shares = {
            node: dict(zip(found.factors, row.tolist(), strict=True))
            for node, row in zip(found.nodes, found.shares, strict=True)
        }
        scores = {"disentanglement": found.disentanglement, "completeness": found.completeness}
        scores["informativeness"] = found.informativeness
        said = {name: values.tolist() for name, values in scores.items()}
        write_text(out, json.dumps({"shares": shares, "score": found.score, **said}, indent=1) + "\n")
    else:
        write(out, found.figure().save)
    rows = []
    for factor, read in zip(found.factors, found.informativeness, strict=True):
        carriers = ", ".join(f"{node} {share:.2f}" for node, share in found.carriers(factor, 3)) or "none"
        rows.append(Row(factor, carriers, f"{read:.0%} read off all"))
    show_rows(f"Shares of nodes' variance, of {len(found.nodes)} nodes", rows, explain=True)
    show(f"\nDCI disentanglement {found.score:.2f}\nwrote {out}")


@look("views.feature_visualisation", reference="--reference IMAGE|FOLDER", unit="--unit UNIT")
def visualise(
    model: ModelOptions,
    objective: Annotated[str, typer.Argument(metavar="SITE")],
    unit: str | None = None,
    reference: list[Path] | None = None,
    count: int = 3,
    steps: int = 128,
    seed: int = 0,
    no_picture: bool = False,
    out: Path = Path("visualisation.png"),
) -> None:
    """What does a neuron, head or class answer to most? Images made by gradient ascent, with the values that
    random images and one's own have beside.

    ```sh
    circuitvit view visualise --model catdog-tiny m2.hidden --unit 5 --reference photos/
    ```

    Args:
        objective: a site: m5.hidden, a5.h2@cls, logits, a5.h2.pattern@patch->cls.
        unit: a neuron's number, or the name of a class for logits.
        reference: image files, or one folder of them, to compare with. Can be repeated.
        no_picture: leave out the reference images: for sharing without them.
    """
    check_ending(out, FIGURES)
    found = cv.feature_visualisation(
        load_model(model),
        objective,
        unit=int(unit) if unit and unit.isdecimal() else unit,
        reference=None if not reference else reference[0] if len(reference) == 1 else reference,
        count=count,
        steps=steps,
        seed=seed,
    )
    write(out, lambda path: found.figure(picture=not no_picture).save(path))
    rows = [Row("made", f"{found.values.mean():.3g}", f"up to {found.values.max():.3g}")]
    rows.append(Row("random", f"{found.random.mean():.3g}", f"up to {found.random.max():.3g}"))
    best = list(zip(found.best_names, sorted(found.reference, reverse=True), strict=False))
    rows += [Row(name, f"{value:.3g}", "") for name, value in best[:LISTED]]
    show_rows(found.label, rows, explain=True)
    show(f"\nwrote {out}")


# -- kinds of heads ------------------------------------------------------------------------------


@look("views.head_kinds", n="--n NUMBER", at_least="--at-least SHARE")
def heads(
    model: ModelOptions,
    images: Annotated[
        list[Path] | None, typer.Argument(help="Images, or one folder of them.", metavar="[IMAGE...]")
    ] = None,
    n: int = 32,
    seed: int = 0,
    at_least: float = 0.1,
    out: Path = Path("heads.png"),
) -> None:
    """Which heads are which? Every head against every kind: looks at a match, at what follows it, at a place,
    at the class token. Without images it is asked of patches of noise, some of which are repeated.

    ```sh
    circuitvit view heads --model vit_tiny_patch16_224 --checkpoint vit_tiny.safetensors photos/
    ```

    Args:
        at_least: attention above the control.
    """
    check_ending(out, FIGURES)
    found = cv.head_kinds(load_model(model), given_images(images) if images else None, n=n, seed=seed)
    write(out, found.figure().save)
    rows = [
        Row(kind, score.head, f"{score.attention:.0%} of attention, control {score.control:.1%}")
        for kind in found.kinds
        for score in found.only(kind, at_least)[:3]
    ]
    show_rows(f"Kinds of heads, of {len(found.heads)}", rows, explain=True)
    show_notes("Caveats", found.caveats)
    show(f"wrote {out}")


# -- equivariance --------------------------------------------------------------------------------


@look("views.equivariance", transform="--transform NAME", site="--site NAME")
def equivariance(
    model: ModelOptions,
    images: Images,
    transform: list[str] | None = None,
    site: list[str] | None = None,
    out: Path = Path("equivariance.png"),
) -> None:
    """Do responses move along when the image is mirrored, rotated, shifted, recoloured? And which units are
    each other's mirror? Heads, or neurons with `--site m1.hidden`.

    ```sh
    circuitvit view equivariance --model catdog-tiny photos/ --site m0.hidden --transform mirror
    ```

    Args:
        transform: mirror, flip, 'rotate 90', 'rotate 180', shift or recolour; all but flip by default. Can be
            repeated.
        site: such as m1.hidden; all heads by default. Can be repeated.
    """
    check_ending(out, FIGURES)
    options: Any = {"transforms": transform, "sites": site}
    given = {name: each for name, each in options.items() if each}
    found = cv.equivariance(load_model(model), given_images(images), **given)
    write(out, found.figure().save)
    rows = [
        Row(name, f"{pair.one}, {pair.other}", f"match {pair.match:.2f}, with itself {pair.own:.2f}")
        for name in found.transforms
        for pair in found.pairs(name)[:LISTED]
    ]
    show_rows(f"Pairs, of {len(found.units)} units", rows, explain=True)
    show(f"wrote {out}")


@look("views.top_images", unit="--unit UNIT", row="--row top|bottom|random|QUANTILE")
def top_images(
    model: ModelOptions,
    images: Images,
    unit: list[str],
    by: str = "image",
    reduce: str = "max",
    count: int = 12,
    row: list[str] | None = None,
    overlay: str = "activation",
    batch_size: int | None = None,
    seed: int = 0,
    no_picture: bool = False,
    out: Path = Path("top_images.html"),
) -> None:
    """Which images, or patches, does a head, neuron or class answer to most? And least, and in between: a
    contact sheet in one page that works offline. Several units are read in one run.

    ```sh
    circuitvit view top-images --model catdog-tiny photos/ --unit a2.h3 --unit 'm1.hidden[16]' --by patch
    ```

    Args:
        unit: a5.h2, 'm3.hidden[17]', a5.h2.pattern, 'resid5[3]', 'logits[281]'. Can be repeated.
        by: image, or patch: the patches of all images are ranked.
        reduce: max, mean or cls: the value of an image from its patches, or of its class token.
        row: what is shown: top, bottom, random, or a quantile such as 0.9. Can be repeated.
        overlay: activation, or attention of the unit's head.
        out: the ending chooses the format: .html, .png, .svg or .pdf.
    """
    check_ending(out, (".html", *FIGURES))
    if out.suffix == ".html" and no_picture:
        raise OptionError("--no-picture is for figures: a page without its images shows nothing")
    settings: dict[str, Any] = {"by": by, "reduce": reduce, "overlay": overlay, "count": count}
    if row:
        settings["rows"] = [_row(each) for each in row]
    found = cv.top_images(
        load_model(model), given_images(images), unit, **settings, batch_size=batch_size, seed=seed
    )
    if out.suffix == ".html":
        write_text(out, found.to_html())
    else:
        write(out, found.figure(picture=not no_picture).save)
    for name, ranking in found.items():
        first = next(iter(ranking.rows))
        best = zip(found.names(name, first), ranking.rows[first].values, strict=True)
        shown = [Row(each, f"{value:.3g}") for each, value in list(best)[:3]]
        show_rows(f"{name}, {first} of {len(found.images):,} images", shown)
        show_notes("Notes", ranking.caveats)
    show(f"\nwrote {out}")


def _row(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


@look("verification.deciders", sites="--sites NAME", tokens="--tokens NAME")
def deciders(
    model: ModelOptions,
    images: ImageOptions,
    behaviour: BehaviourOptions,
    sites: list[str] | None = None,
    tokens: str = "all",
    by: str = "sign",
    seed: int = 0,
    batch_size: int | None = None,
    out: Path = Path("deciders.png"),
) -> None:
    """Which head or MLP, patched alone, flips the answer of how many pairs, and does the one that decides one
    pair decide others? With the ending .json, the numbers.

    ```sh
    circuitvit view deciders --model vit_tiny_patch16_224 --checkpoint vit_tiny.safetensors \\
        --pairs pairs.csv --target tabby --foil "Border collie"
    ```

    Args:
        sites: heads, mlps or patterns; heads and mlps by default. Can be repeated.
        tokens: at which they are patched: all, kind (all, and each kind alone) or each.
        by: sign: the answer is the sign of the metric; top: it is the top class.
        out: the ending chooses the format: .png, .svg, .pdf or .json.
    """
    check_ending(out, (*FIGURES, ".json"))
    loaded = load_model(model)
    task = make_task(images, behaviour, seed)
    options: dict[str, Any] = {"sites": sites or ("heads", "mlps"), "tokens": tokens, "by": by}
    found = cv.deciders(loaded, task, seed=seed, batch_size=batch_size, **options)
    if out.suffix == ".json":
        write_text(out, json.dumps(found.to_dict(), indent=1, allow_nan=False) + "\n")
    else:
        write(out, lambda path: found.figure().save(path))
    rows = [
        Row(found.names[place], f"{found.rates[place]}", f"p {found.p_values[place]:.3f} for all together")
        for place in found.order[:LISTED]
    ]
    rows.append(Row("carries over", f"{found.transfer:.1%}", f"of other pairs; chance {found.chance:.1%}"))
    show_rows(f"Share of {counted(len(found.pairs), 'pair')} flipped", rows, explain=True)
    show_notes("Bear in mind", found.caveats)
    show(f"\nwrote {out}")


@look("views.registers", position="--position NAME", ways="--ways NAME")
def registers(
    model: ModelOptions,
    images: Images,
    of: str | None = None,
    position: str | None = None,
    z: float = 6.0,
    times: float = 3.0,
    ways: list[str] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    out: Path = Path("registers.png"),
) -> None:
    """Which heads read a model's registers, who writes them, and what breaks without? Where it has none, of
    patches whose norm is far above the others. With the ending .json, the numbers.

    ```sh
    circuitvit view registers --model vit_tiny_patch16_224 --checkpoint vit_tiny.safetensors photos/
    ```

    Args:
        of: registers or outliers; registers by default where there are any.
        ways: of losing them: remove, mean, shuffle or zero; all by default. Can be repeated.
        out: the ending chooses the format: .png, .svg, .pdf or .json.
    """
    check_ending(out, (*FIGURES, ".json"))
    options: dict[str, Any] = {"of": of, "position": position, "z": z, "times": times, "ways": ways or None}
    found = cv.registers(load_model(model), given_images(images), seed=seed, batch_size=batch_size, **options)
    if out.suffix == ".json":
        write_text(out, json.dumps(found.to_dict(), indent=1, allow_nan=False) + "\n")
    else:
        write(out, lambda path: found.figure().save(path))
    show(found.table())
    show_notes("Bear in mind", found.caveats)
    show(f"\nwrote {out}")


VIEWS: dict[str, tuple[object, str]] = {
    "knockouts": (knockouts, "Who must attend to whom."),
    "tokens": (tokens, "What is lost without some tokens."),
    "steering": (steering, "Whether a push along a direction moves the answer."),
    "probes": (probes, "What linear probes can read, at which layer and token."),
    "disentanglement": (disentanglement, "Which nodes carry which factor of drawn scenes."),
    "visualise": (visualise, "Images that something in the model answers to most."),
    "heads": (heads, "Which heads are which: matches, places, tokens."),
    "equivariance": (equivariance, "Units that move with the image, and mirrored pairs."),
    "top-images": (top_images, "What a head, neuron or class answers to most."),
    "deciders": (deciders, "Which heads and MLPs, patched alone, flip the answer of how many pairs."),
    "registers": (registers, "Who reads and writes registers and outlier patches, and what breaks without."),
}

for _name, (_command, _summary) in VIEWS.items():
    view.command(_name, short_help=_summary)(_command)  # type: ignore[type-var]

__all__ = ["view"]

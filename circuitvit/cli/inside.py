"""`circuitvit view`, further: looks that edit, patch or train, at many images rather than at one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

import circuitvit as cv
from circuitvit.cli.inputs import (
    BatchOptions,
    BehaviourOptions,
    ImageOptions,
    ModelOptions,
    RunOptions,
    load_model,
    make_task,
    tell_pairs,
)
from circuitvit.cli.output import Row, show, show_notes, show_rows
from circuitvit.cli.says import contributed_accuracy, contributions, words
from circuitvit.cli.units import disentanglement, equivariance, heads, top_images, visualise
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


@look("views.knock_outs", source="--source GROUP", to="--to GROUP", way="--way NAME")
def knockouts(
    model: ModelOptions,
    images: Images,
    run: BatchOptions,
    by: str = "layer",
    way: str = "renormalise",
    window: int = 1,
    source: list[str] | None = None,
    to: list[str] | None = None,
    metric: str = "logit",
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
        **run.settings(),
    )
    write(out, found.figure().save)
    rows = [Row(place, f"{a} -> {b}", str(effect)) for a, b, place, effect in found.strongest(LISTED)]
    show_rows(f"Change of {found.outcomes.metric}, mean", rows, explain=True)
    show_notes("Bear in mind", found.caveats)
    show(f"\nwrote {out}")


@look("views.flow", heads="--heads", method="--method NAME")
def flow(
    model: ModelOptions,
    images: ImageOptions,
    behaviour: BehaviourOptions,
    run: RunOptions,
    method: str = "ceap",
    heads: bool = False,
    steps: int = 10,
    out: Path = Path("flow.png"),
) -> None:
    """How much of the behaviour crosses from which tokens to which, layer by layer? Groups are those of
    `--groups`. With the ending .gif it is an animation, with .json the numbers.

    ```sh
    circuitvit view flow --model catdog-tiny --clean cats/ --corrupt dogs/ --target cat --foil dog
    ```

    Args:
        method: ceap: conductance, which adds up; eap: to first order; exact: each alone replaced.
        heads: tell heads apart.
        out: the ending chooses the format: .png, .svg, .pdf, .gif or .json.
    """
    check_ending(out, (*FIGURES, ".gif", ".json"))
    loaded = load_model(model)
    asked = make_task(images, behaviour, run.seed)
    task = cv.tasks.prepare(loaded, asked if asked.groups else asked.with_options(groups="kind"))
    tell_pairs(task)
    found = cv.flow(
        loaded,
        task,
        method=method,  # type: ignore[arg-type]
        heads=heads,
        steps=steps,
        **run.settings(),
    )
    if out.suffix == ".json":
        write(out, found.save)
    else:
        write(out, found.film if out.suffix == ".gif" else found.figure().save)
    rows = [Row(place, f"{a} -> {b}", f"{effect:+.4f}") for place, a, b, effect in found.strongest(LISTED)]
    show_rows(f"Of {found.effect:+.4f}, {found.metric}: what crosses most", rows, explain=True)
    show("\nShares of it that groups hold before each layer, and what crosses (+ supports)")
    show(found.table())
    show(f"\nwrote {out}")


@look("views.token_ablations", token="--token TOKENS", way="--way NAME", site="--site NAME")
def tokens(
    model: ModelOptions,
    images: Images,
    run: BatchOptions,
    token: list[str],
    way: list[str] | None = None,
    site: str = "resid0",
    metric: str = "logit",
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
        **run.settings(),
        seed=seed,
    )
    write(out, found.figure().save)
    rows = [Row(name, way, str(found.estimate(name, way))) for name in found.tokens for way in found.ways]
    show_rows(f"Change of {found.outcomes.metric}, mean", rows, explain=True)
    show_notes("Bear in mind", found.caveats)
    show(f"\nwrote {out}")


@look("views.steer", direction="--direction FILE", towards="--towards PATH", away="--away PATH",
      site="--site NAME", scale="--scale NUMBER", tokens="--token NAME", how="--how NAME")  # fmt: skip
def steering(
    model: ModelOptions,
    images: Images,
    run: BatchOptions,
    site: str,
    direction: Path | None = None,
    towards: Path | None = None,
    away: Path | None = None,
    scale: list[float] | None = None,
    tokens: str | None = None,
    how: str = "add",
    controls: int = 5,
    metric: str = "logit",
    seed: int = 0,
    out: Path = Path("steering.png"),
) -> None:
    """Does a push along a direction move the answer? Effect by scale, beside random directions.

    ```sh
    circuitvit view steering --model catdog-tiny dogs/ --site resid2 --towards cats/ --away dogs/
    ```

    Args:
        direction: a file of one vector, .npy or .safetensors; or leave it out and give --towards and --away.
        site: the stream that is pushed: "resid6" is the one before block 6.
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
        pushed = cv.views.difference_of_means(loaded, towards, away, site, tokens=tokens, **run.settings())
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
        **run.settings(),
        seed=seed,
    )
    write(out, found.figure().save)
    rows = [Row(f"{each:+g}", str(found.estimate(each))) for each in found.scales]
    show_rows(f"Change of {found.outcomes.metric} by scale, mean", rows)
    show_notes("Bear in mind", found.caveats)
    show(f"\nwrote {out}")


@look("views.linear_probes", sites="--site NAME", tokens="--token TOKENS", ask="--ask IMAGE",
      about="--about CLASS", keep="--save FILE", use="--load FILE")  # fmt: skip
def probes(
    model: ModelOptions,
    images: Annotated[
        Path | None,
        typer.Argument(help="Folder with one subfolder of images for each class.", metavar="[FOLDER]"),
    ] = None,
    *,
    run: BatchOptions,
    sites: list[str] | None = None,
    tokens: list[str] | None = None,
    reads: str = "mean",
    strength: float = 1.0,
    folds: int = 5,
    samples: int = 16,
    seed: int = 0,
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
    circuitvit view probes --model catdog-tiny photos/ --token patch --reads any --ask both.png --about cat
    ```

    Args:
        sites: such as 'resid*' (the default) or m3.hidden. Can be repeated.
        tokens: of a place, such as cls, patch or 'patch(2,3)'; repeated, places of their own.
        reads: mean: a probe of the mean of a place's tokens; any: of single tokens, whichever they are; each:
            a probe for every token.
        keep: write the probes to this file (.safetensors).
        use: probes that `--save` wrote, instead of a folder.
        ask: an image whose patches are asked, by the probes of the first place that has patches.
        about: the class that it is asked about; the first by default.
    """
    check_ending(out, FIGURES)
    if (images is None) == (use is None):
        raise OptionError("give a folder with one subfolder for each class, or --load with a file of probes")
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
            **run.settings(),
        )
    )
    of = found.classes[0] if about is None else about
    place = next((each for each in found.places if "patch" in each), found.places[0])
    asked = None if ask is None else found.apply(loaded, ask, place=place, **run.settings())
    write(out, (found.figure() if asked is None else asked.figure(of, picture=not no_picture)).save)
    if keep is not None:
        write(keep, found.save)
    rows = [
        Row(site, str(found.mean(site)), f"control {found.mean_control(site).value:.3f}")
        for site in found.sites
    ]
    where = found.places[0] + (f", the first of {len(found.places)} places" if len(found.places) > 1 else "")
    show_rows(f"Accuracy at {where}: {', '.join(found.classes)}", rows, explain=True)
    if asked is not None:
        rows = [
            Row(site, f"{mean:+.2f}", f"{least:+.2f} to {most:+.2f}")
            for site, mean, least, most in asked.ranges(of)
        ]
        title = f"Log-odds of {of} in {asked.subjects.names[0]}, {place}: mean of its tokens, and their range"
        show_rows(title, rows, explain=True)
    show_notes("Bear in mind", found.notes)
    show(f"\nwrote {out}")


@look(sites="--site NAME", tokens="--token NAME", by="--by NAME")
def deciders(
    model: ModelOptions,
    images: ImageOptions,
    behaviour: BehaviourOptions,
    run: RunOptions,
    sites: list[str] | None = None,
    tokens: str = "all",
    by: str = "sign",
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
    task = cv.tasks.prepare(loaded, make_task(images, behaviour, run.seed))
    tell_pairs(task)
    options: dict[str, Any] = {"sites": sites or ("heads", "mlps"), "tokens": tokens, "by": by}
    found = cv.deciders(loaded, task, seed=run.seed, **run.settings(), **options)
    if out.suffix == ".json":
        write_text(out, json.dumps(found.to_dict(), indent=1, allow_nan=False) + "\n")
    else:
        write(out, lambda path: found.figure().save(path))
    rows = [
        Row(found.names[place], f"{found.rates[place]}", f"p {found.p_values[place]:.3f} for all together")
        for place in found.order[:LISTED]
    ]
    if math.isfinite(found.transfer):  # some pair has a decider
        rows.append(
            Row("carries over", f"{found.transfer:.3f}", f"of other pairs; chance {found.chance:.3f}")
        )
    show_rows(f"Share of {counted(len(found.pairs), 'pair')} flipped", rows, explain=True)
    show_notes("Bear in mind", found.caveats)
    show(f"\nwrote {out}")


@look("views.registers", position="--position NAME", ways="--way NAME")
def registers(
    model: ModelOptions,
    images: Images,
    run: BatchOptions,
    of: str | None = None,
    position: str | None = None,
    z: float = 6.0,
    times: float = 3.0,
    ways: list[str] | None = None,
    seed: int = 0,
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
    found = cv.registers(load_model(model), given_images(images), seed=seed, **run.settings(), **options)
    if out.suffix == ".json":
        write_text(out, json.dumps(found.to_dict(), indent=1, allow_nan=False) + "\n")
    else:
        write(out, lambda path: found.figure().save(path))
    show(found.table())
    show_notes("Bear in mind", found.caveats)
    show(f"\nwrote {out}")


@look("views.tuned_lens", held_out="--held-out SHARE", save="--save FILE")
def tuned_lens(
    model: ModelOptions,
    images: Images,
    run: BatchOptions,
    held_out: float = 0.25,
    epochs: int = 30,
    seed: int = 0,
    save: Path | None = None,
    out: Path = Path("tuned_lens.png"),
) -> None:
    """How early is the answer there? Trains a tuned lens, one affine map for each layer, and compares it with
    the logit lens on images that are held out.

    ```sh
    circuitvit view tuned-lens --model vit_tiny_patch16_224 --checkpoint vit_tiny.safetensors photos/
    ```

    Args:
        save: keep the lens, for `circuitvit view lens --tuned FILE`.
    """
    check_ending(out, FIGURES)
    if save is not None:
        check_ending(save, (".safetensors",), "--save")
    how = {name: value for name, value in run.settings().items() if value is not None}
    found = cv.tuned_lens(
        load_model(model), given_images(images), held_out=held_out, epochs=epochs, seed=seed, **how
    )
    if save is not None:
        write(save, found.save)
    write(out, found.figure().save)
    said = found.held_out
    rows = []
    for name in said.positions:
        (plain, tuned), (before, after) = (
            [of(lens, name).value for lens in ("logit", "tuned")] for of in (said.kl_of, said.agreement_of)
        )
        rows.append(Row(name, f"{plain:.3f} -> {tuned:.3f}", f"{before:.0%} -> {after:.0%}"))
    title = f"KL from the output in nats, and images with its top class, of {len(said.images)} held out"
    show_rows(f"{title}: logit lens -> tuned lens", rows, explain=True)
    show_notes("Bear in mind", found.caveats)
    show(f"\nwrote {out}")


VIEWS: dict[str, tuple[object, str]] = {
    "knockouts": (knockouts, "Who must attend to whom."),
    "flow": (flow, "What crosses from which tokens to which, layer by layer."),
    "tokens": (tokens, "What is lost without some tokens."),
    "steering": (steering, "Whether a push along a direction moves the answer."),
    "probes": (probes, "What linear probes can read, at which layer and token."),
    "disentanglement": (disentanglement, "Which nodes carry which factor of drawn scenes."),
    "visualise": (visualise, "Images that something in the model answers to most."),
    "heads": (heads, "Which heads are which: matches, places, tokens."),
    "equivariance": (equivariance, "Units that move with the image, and mirrored pairs."),
    "tuned-lens": (tuned_lens, "What each layer holds, by maps that are trained to read it."),
    "top-images": (top_images, "What a head, neuron or class answers to most."),
    "deciders": (deciders, "Which heads and MLPs, patched alone, flip the answer of how many pairs."),
    "contributions": (contributions, "What each part adds to the image embedding."),
    "words": (words, "What heads say, in plain language."),
    "accuracy": (contributed_accuracy, "Whose direct contributions the answer needs."),
    "registers": (registers, "Who reads and writes registers and outlier patches, and what breaks without."),
}

for _name, (_command, _summary) in VIEWS.items():
    view.command(_name, short_help=_summary)(_command)  # type: ignore[type-var]

__all__ = ["view"]

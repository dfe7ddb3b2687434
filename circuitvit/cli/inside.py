"""`circuitvit view`, further: looks that measure, train or edit, at many images rather than at one."""

from __future__ import annotations

from pathlib import Path

import circuitvit as cv
from circuitvit.cli.inputs import ModelOptions, load_model
from circuitvit.cli.output import Row, show, show_notes, show_rows
from circuitvit.cli.view import FIGURES, LISTED, Images, check_ending, given_images, look, view, write
from circuitvit.errors import OptionError

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
        source: a kind of token that is no longer attended to (cls, reg, patch); all by default. Can be repeated.
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
        token: a kind (cls, reg), a number, patch(2,3), or a share of the patches such as 0.1. Can be repeated.
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


@look("views.steer", direction="--direction FILE", away="--away PATH", site="--site NAME", scale="--scale NUMBER",
      tokens="--tokens NAME", how="--how NAME")  # fmt: skip
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


VIEWS: dict[str, tuple[object, str]] = {
    "knockouts": (knockouts, "Who must attend to whom."),
    "tokens": (tokens, "What is lost without some tokens."),
    "steering": (steering, "Whether a push along a direction moves the answer."),
}

for _name, (_command, _summary) in VIEWS.items():
    view.command(_name, short_help=_summary)(_command)  # type: ignore[type-var]

__all__ = ["view"]

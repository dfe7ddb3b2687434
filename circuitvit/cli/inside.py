"""`circuitvit view`, further: looks that measure, train or edit, at many images rather than at one."""

from __future__ import annotations

from pathlib import Path

import circuitvit as cv
from circuitvit.cli.inputs import ModelOptions, load_model
from circuitvit.cli.output import Row, show, show_rows
from circuitvit.cli.view import FIGURES, Images, check_ending, given_images, look, view, write


@look("views.tuned_lens", held_out="--held-out SHARE", save="--save FILE")
def tuned_lens(
    model: ModelOptions,
    images: Images,
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
    found = cv.views.tuned_lens(
        load_model(model), given_images(images), held_out=held_out, epochs=epochs, seed=seed
    )
    if save is not None:
        write(save, found.save)
    write(out, found.figure().save)
    rows = [Row(name, f"{plain} -> {tuned}", f"{shares[0]} -> {shares[1]}")
            for name, plain, tuned, *shares in found.held_out.table()]  # fmt: skip
    title = (
        f"KL from the output in nats, and share of images with its top class, of {len(found.held_out.images)}"
    )
    show_rows(f"{title}: logit lens -> tuned lens", rows, explain=True)
    show("\n".join(["", *(f"note: {each}" for each in found.caveats), f"wrote {out}"]))


VIEWS: dict[str, tuple[object, str]] = {
    "tuned-lens": (tuned_lens, "What can be read off each layer, by maps that are trained for it."),
}

for _name, (_command, _summary) in VIEWS.items():
    view.command(_name, short_help=_summary)(_command)  # type: ignore[type-var]

__all__ = ["view"]

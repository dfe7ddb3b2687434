"""`circuitvit train sae`: a sparse autoencoder of a model's activations."""

from __future__ import annotations

from pathlib import Path

import circuitvit as cv
from circuitvit.cli.inputs import BatchOptions, ModelOptions, load_model
from circuitvit.cli.options import command
from circuitvit.cli.output import Folder, Interrupted, Row, show, show_notes, show_rows
from circuitvit.cli.view import Images, check_ending, given_images


@command(
    "Dictionary",
    "training.train_sae",
    site="--site -s NAME",
    features="--features N",
    k="-k N",
    tokens="--tokens TOKENS",
    held_out="--held-out SHARE",
    activations="--activations FILE",
)
def train_sae(
    model: ModelOptions,
    images: Images,
    run: BatchOptions,
    site: str,
    features: int | None = None,
    k: int = 32,
    tokens: str | None = None,
    steps: int = 3000,
    vectors: int = 512,
    learning_rate: float = 4e-3,
    held_out: float = 0.2,
    activations: Path | None = None,
    seed: int = 0,
    out: Path = Path("sae.safetensors"),
) -> None:
    """Train a dictionary of features, a sparse autoencoder, on what a model computes at one site.

    What it explains is measured on images that are held out. Training is done by the library overcomplete:
    `pip install circuitvit[sae]`.

    ```sh
    circuitvit train sae --model vit_tiny_patch16_224 --checkpoint vit_tiny.safetensors \\
        photos/ --site m8 --out sae_m8.safetensors
    ```

    Ctrl-C stops early and keeps what has been learned. In Python, `cv.load_dictionary("sae_m8.safetensors")`.

    Args:
        activations: a .safetensors file to keep the activations in: interrupted while they are read, the same
            command goes on, and another dictionary of the same images can be trained on them. By default a
            temporary file.
        out: a .safetensors file.
    """
    from circuitvit.training.sae import caveats

    check_ending(out, (".safetensors",))
    if activations is not None:
        check_ending(activations, (".safetensors",), "--activations")
    loaded, files = load_model(model), given_images(images)
    with Folder(out.parent, (out.name,), guarded=False):
        try:
            found = cv.train_sae(
                loaded,
                files,
                site,
                features=features,
                k=k,
                tokens=tokens,
                steps=steps,
                vectors=vectors,
                learning_rate=learning_rate,
                held_out=held_out,
                activations_file=activations,
                seed=seed,
                **run.settings(),
            )
        except KeyboardInterrupt:
            kept = activations is not None
            raise Interrupted(
                "the same command goes on where it was" if kept else "nothing was kept"
            ) from None
        found.save(out)
    card = found.card or {}
    said, done = card["held_out"], card["recipe"]["steps_done"]
    if done < steps:
        show(f"Stopped after {done} of {steps} steps.")
    kinds = [
        Row(f"  of {name}", f"{share:.1%}") for name, share in said["by_token"].items() if share is not None
    ]
    rows = [
        Row("variance explained", f"{said['explained_variance']:.1%}"),
        *(kinds if len(kinds) > 1 else []),
        Row("features of a token", f"{said['l0']:.1f}"),
        Row("features never seen", f"{said['dead']} of {found.n_features}"),
    ]
    show_rows(f"{site} of {said['images']} images that were held out", rows)
    show_notes("Bear in mind", caveats(found))
    show(f"\nwrote {out}: {found}")

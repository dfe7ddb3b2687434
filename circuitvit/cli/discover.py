"""`circuitvit discover`: from images and a model to a verified circuit diagram."""

from __future__ import annotations

from pathlib import Path

from circuitvit.cli.discovery import FILES, check_search, discover_circuit
from circuitvit.cli.folder import Folder
from circuitvit.cli.grouped import grouped
from circuitvit.cli.inputs import load_model, make_held_out, make_task, prepare_both
from circuitvit.cli.options import (
    BehaviourOptions,
    ImageOptions,
    ModelOptions,
    OutOption,
    RunOptions,
    SearchOptions,
    VerificationOptions,
)
from circuitvit.cli.screen import Clock, Row, report_rows, show, show_notes, show_rows


@grouped
def discover(
    model: ModelOptions,
    images: ImageOptions,
    behaviour: BehaviourOptions,
    search: SearchOptions,
    verification: VerificationOptions,
    run: RunOptions,
    out: OutOption = Path("out"),
) -> None:
    """Find the circuit behind a behaviour: the few edges of a model's graph that are enough for it. Give
    images that show the behaviour (clean) and images that do not (corrupt). The circuit is found on these
    pairs, tested by ablation, on other pairs where you give them, and written with a diagram and a report.

    For example, with one pair and with a table of pairs:

    ```sh
    circuitvit discover --model vit_tiny_patch16_224 \\
        --checkpoint vit_tiny.safetensors --clean cat.jpg --corrupt dog.jpg \\
        --target tabby --foil "Border collie" --out out/cat_dog

    circuitvit discover --model vit_base_patch16_224 --pretrained \\
        --pairs pairs.csv --held-out-pairs more.csv --method eap-ig --edges 200
    ```
    """
    check_search(search, behaviour.direction)
    task = make_task(images, behaviour, run.seed)
    held_out = make_held_out(verification, behaviour, run.seed)
    clock = Clock()
    with Folder(out, FILES) as folder:
        with clock.phase("model"):
            loaded = load_model(model)
        with clock.phase("images"):
            prepared, others = prepare_both(loaded, task, held_out, run)
        outcome = discover_circuit(loaded, prepared, others, search, run, verification.random, folder, clock)
    rows = [*report_rows(outcome.report), Row("time", str(clock))]
    show_rows(f"Circuit of {loaded.name} for {prepared.metric.label}", rows)
    show_notes("How it was found", outcome.summary.splitlines())
    show_notes("Caveats", outcome.report.warnings)
    show(f"\nwrote {folder.path}: {', '.join(folder.saved)}")

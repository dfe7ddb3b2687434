"""`circuitvit models`: what `--model` can be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from circuitvit.cli.screen import show, show_notes, stdout

if TYPE_CHECKING:
    from circuitvit.models.zoo import Card

FAMILIES = (
    "ViT and AugReg: vit_tiny_patch16_224, vit_base_patch32_384, ...",
    "DeiT and DeiT-3: deit_tiny_patch16_224, deit3_small_patch16_224, ...",
    "CLIP: vit_base_patch32_clip_224, ...; SigLIP with average pooling: vit_base_patch16_siglip_gap_224, ...",
    "DINOv2, with registers or without: vit_small_patch14_dinov2, vit_small_patch14_reg4_dinov2, ...",
    "any other model of timm's VisionTransformer class that has plain blocks",
)
OWN = (
    "out/birds.json, written by `circuitvit train birds/ --out out/birds`",
    "a fine-tuned model: its timm name, --checkpoint FILE, --arch num_classes=37 and --classes NAMES.txt",
)


def models(
    every: Annotated[
        bool, typer.Option("--all", help="List timm's names in these families instead, one on each line.")
    ] = False,
) -> None:
    """List the models that can be used: the bundled ones with what their cards say, and the families of timm.
    A model that cannot be taken apart (parallel blocks, norms after attention, attention pooling) is refused
    with the reason when it is loaded.

    For example:

    ```sh
    circuitvit models

    circuitvit models --all | grep clip
    ```
    """
    if every:
        _list_timm()
        return
    from circuitvit.models.zoo import zoo_card, zoo_names

    _show_cards([zoo_card(name) for name in zoo_names()])
    show_notes("From timm, with --checkpoint FILE or --pretrained", FAMILIES)
    show_notes("Your own", OWN)


def _list_timm() -> None:
    from circuitvit.models.timm_import import import_timm

    timm = import_timm()
    for module in ("vision_transformer", "deit"):
        for name in timm.list_models(module=module):
            show(name)


def _show_cards(cards: list[Card]) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for title in ("name", "classes", "layers x heads", "input", "accuracy", "trained on"):
        table.add_column(title, overflow="fold")
    for card in cards:
        shown = ", ".join(card.classes[:4]) + (", ..." if len(card.classes) > 4 else "")
        table.add_row(
            card.name,
            f"{len(card.classes)}: {shown}",
            _shape(card.architecture),
            " x ".join(str(side) for side in card.input.size),
            f"{card.accuracy['held_out']:.1%}",
            card.data,
        )
    console = stdout()
    console.print("Bundled", style="bold")
    console.print(table)


def _shape(architecture: Mapping[str, Any]) -> str:
    return f"{architecture.get('depth', '?')} x {architecture.get('num_heads', '?')}"

"""EAP and EAP-IG against the forwards and backwards that they cannot do without."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import circuitvit as cv
from bench._models import SIZES, random_vit
from bench._timing import Row, interleaved, keep, peak_mib
from circuitvit.tasks import PreparedTask

STEPS = 5


def rows() -> list[Row]:
    """Both methods on four models, one of which has rotary positions."""
    return [row for name in ("ViT-B/32", "ViT-B/16", "ViT-Ti/16", "EVA-02-Ti/14") for row in _model(name)]


def _model(name: str) -> list[Row]:
    pairs = SIZES[name][1]
    vit, prepared = random_vit(name, pairs)
    clean, corrupt = (_tensor(images, prepared) for images in (prepared.clean, prepared.corrupt))
    found, bars = [], (1.20, 1.12) if name.startswith("ViT-B") else (1.30, 1.18)
    for method, forwards, backwards, bar, stretch in (
        ("eap", 1, 1, *bars),
        ("eap-ig", 2, STEPS, 1.20, 1.10),
    ):

        def floor(forwards: int = forwards, backwards: int = backwards) -> None:
            with torch.no_grad():
                for images in (corrupt, clean)[:forwards]:
                    vit(images)
            for _ in range(backwards):
                logits = vit(clean)
                (logits[:, 0] - logits[:, 1]).sum().backward()
                vit.cls_token.grad = None

        def work(method: str = method) -> object:
            own = {"steps": STEPS} if method == "eap-ig" else {}
            return cv.attribute(prepared.model, prepared, method, batch_size=pairs, progress=False, **own)

        ratio, spent, least = interleaved(work, floor, repeats=5 if backwards > 1 else 11)
        text = f"2 forwards + {STEPS} x (forward + backward)" if backwards > 1 else "2 forwards + 1 backward"
        title = f"{method}, {name}, {pairs} pairs"
        found.append(Row(title, text, ratio, bar, stretch, spent, least, peak_mib()))
    return found


def _tensor(images: Any, prepared: PreparedTask) -> Tensor:
    return images.take(0, len(images)).to(prepared.model.device)  # type: ignore[no-any-return]


def main() -> None:
    keep(rows())

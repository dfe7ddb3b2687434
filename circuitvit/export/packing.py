"""Maps as compact text for the interactive page: quantised, compressed, base64.

An attention pattern is stored as the logarithm of its entries, which serves twice: a softmax of it is the
pattern, and with each row's largest score added it is the scores. The row that is shown by default has 256
levels; all other rows have 16, half a nat apart, which is as fine as a heat map shows. Each head's full
pattern is packed apart, since the browser unpacks it when a patch is clicked and not before.
"""

from __future__ import annotations

import base64
import io
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from circuitvit.export.maps import HeadMap, Maps, Side

FINE_STEP = 16.0 / 255  # nats between levels in the default row: 16 nats below the largest is nothing
ROUGH_STEP = 0.5
ROUGH_LEVELS = 16
FULL_BYTES = 1_000_000  # base64 letters that all full patterns together may take
_PNG_SIDE = 96  # smaller images are kept without loss

Array = NDArray[np.float64]


def packed_maps(maps: Maps, by_strength: Sequence[str]) -> dict[str, Any]:
    """The maps as JSON values.

    Args:
        maps: of the nodes that are shown.
        by_strength: names of heads; where full patterns get too large, the first ones keep theirs.
    """
    heads = {name for side in maps.sides.values() for name in side.heads}
    full: dict[str, dict[str, str]] = {name: {} for name in maps.sides}
    room = FULL_BYTES
    for head in by_strength:
        if head not in heads:
            continue
        packs = {name: _pack(_rough(side.heads[head])) for name, side in maps.sides.items()}
        room -= sum(map(len, packs.values()))
        if room < 0:
            break
        for name, pack in packs.items():
            full[name][head] = pack
    return {
        "grid": list(maps.grid),
        "prefix": list(maps.prefix),
        "groups": list(maps.groups),
        "fineStep": FINE_STEP,
        "roughStep": ROUGH_STEP,
        "sides": {name: _side(side, maps, full[name]) for name, side in maps.sides.items()},
    }


def image_uri(image: NDArray[np.uint8]) -> str:
    """An image `(height, width, 3)` as a data URI."""
    file = io.BytesIO()
    picture = Image.fromarray(image)
    if max(picture.size) <= _PNG_SIDE:
        picture.save(file, "PNG", optimize=True)
        kind = "png"
    else:
        picture.save(file, "JPEG", quality=88)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _side(side: Side, maps: Maps, full: dict[str, str]) -> dict[str, Any]:
    """One image: its nodes' default rows one after the other in one pack, each with its scale.

    A head has three rows in the pack (pattern, weights, largest score of each query), a write has one.
    """
    rows: list[bytes] = []
    nodes: dict[str, Any] = {}
    for name, head in side.heads.items():
        tops = head.scores.max(axis=1)
        low, high = float(tops.min()), float(tops.max())
        row = head.row(maps.has_class_token)
        rows += [_fine(row), _linear(head.weights, 0.0, float(head.weights.max())), _linear(tops, low, high)]
        # Without a class token the row is an average, whose logarithm stands for the scores.
        top = tops[0] if maps.has_class_token else np.log(row.max())
        nodes[name] = {
            "top": _round(top),
            "weight": _round(head.weights.max()),
            "low": _round(low),
            "high": _round(high),
        }
    for name, values in side.writes.items():
        rows.append(_linear(values, 0.0, float(values.max())))
        nodes[name] = {"norm": _round(values.max())}
    return {"image": image_uri(side.image), "nodes": nodes, "rows": _pack(b"".join(rows)), "full": full}


def _fine(row: Array) -> bytes:
    return _levels(np.log(np.maximum(row, 1e-30)), FINE_STEP, 256)


def _rough(head: HeadMap) -> bytes:
    return _levels(np.log(np.maximum(head.pattern, 1e-30)), ROUGH_STEP, ROUGH_LEVELS)


def _levels(logs: Array, step: float, count: int) -> bytes:
    below = logs.max(axis=-1, keepdims=True) - logs
    return _bytes(np.minimum(np.rint(below / step), count - 1))


def _linear(values: Array, low: float, high: float) -> bytes:
    share = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return _bytes(np.rint(255 * np.clip(share, 0, 1)))


def _bytes(values: Array) -> bytes:
    return bytes(values.astype(np.uint8).tobytes())


def _round(value: Any) -> float:
    """Five digits: more than a quantised row can use, and the same on machines that round otherwise."""
    return float(f"{float(value):.5g}")


def _pack(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content, 9)).decode()

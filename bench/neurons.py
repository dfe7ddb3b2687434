"""Scores of all neurons against those of all edges, by the same method: processor time, and peak memory.

Each peak is that of a process of its own, since a process's peak never falls; it includes the model.
"""

from __future__ import annotations

import time

import circuitvit as cv
from bench._models import SIZES, random_vit
from bench._timing import Row, alone, interleaved, keep, peak_mib, seconds

NAME = "ViT-B/16"
ALL = {"m*": cv.neurons()}
RUNS = 5
TITLE = f"eap of all 36,864 neurons, {NAME}, {SIZES[NAME][1]} pairs"


def rows() -> list[Row]:
    """ViT-B/16, whose 12 MLPs have 3,072 neurons each."""
    return [_time(), _memory()]


def _time() -> Row:
    pairs = SIZES[NAME][1]
    _, prepared = random_vit(NAME, pairs)
    model, options = prepared.model, {"batch_size": pairs, "progress": False}
    ratio, spent, least = interleaved(
        lambda: cv.attribute_units(model, prepared, ALL, **options),
        lambda: cv.attribute(model, prepared, "eap", **options),
        RUNS,
        time.process_time,
    )
    text = "eap of all edges; processor time"
    return Row(TITLE, text, ratio, 1.5, 1.1, spent, least, peak_mib())


def _memory() -> Row:
    of_units, of_edges = (sorted(alone(measure, units) for _ in range(3))[1] for units in (True, False))
    text = f"the same of all edges ({of_edges[0]:,.0f} MiB)"
    ratio = of_units[0] / of_edges[0]
    return Row(f"peak memory of {TITLE}", text, ratio, 1.3, 1.0, of_units[1], of_edges[1], of_units[0])


def measure(units: bool) -> tuple[float, float]:
    """Peak MiB and seconds of the scores of all neurons, or of all edges."""
    pairs = SIZES[NAME][1]
    _, prepared = random_vit(NAME, pairs)

    def work() -> object:
        if units:
            return cv.attribute_units(prepared.model, prepared, ALL, batch_size=pairs, progress=False)
        return cv.attribute(prepared.model, prepared, "eap", batch_size=pairs, progress=False)

    spent = seconds(work)
    return peak_mib(), spent


def main() -> None:
    keep(rows())

"""Exact effects of all edges against the plain price of what they run: the network from the receiver on."""

from __future__ import annotations

import numpy as np
import torch

import circuitvit as cv
from bench._models import cat_and_dog
from bench._timing import Row, keep, peak_mib, seconds
from circuitvit.engine import capture
from circuitvit.tasks import PreparedTask

BATCHES = (1, 2, 4, 8, 16)


def rows() -> list[Row]:
    """The trained ViT-Ti on the cat-dog pair; nothing without it."""
    prepared = cat_and_dog()
    if prepared is None:
        return []
    turns = []
    for _ in range(5):
        least = floor(prepared)
        turns.append(
            (seconds(lambda: cv.attribute(prepared.model, prepared, "exact", progress=False)), least)
        )
    spent, least = sorted(turns, key=lambda turn: turn[0] / turn[1])[2]
    title = f"exact effects of {prepared.graph.n_edges:,} edges, trained ViT-Ti/16, the cat-dog pair"
    text = "every edge's part of the network, plain, at the best batch"
    return [Row(title, text, spent / least, 1.35, 1.1, spent, least, peak_mib())]


def floor(prepared: PreparedTask) -> float:
    """Seconds: for each edge, the stages from its receiver's on, at the best batch size."""
    edges = prepared.graph.edge_mask.sum(axis=(0, 2))
    by_stage = np.array([edges[receivers].sum() for receivers in prepared.graph.receiver_slices])
    return min(float(by_stage @ _from_each_stage(prepared, batch)) for batch in BATCHES)


@torch.no_grad()
def _from_each_stage(prepared: PreparedTask, batch: int) -> np.ndarray:
    """Seconds an image for the model's own layers from each stage on."""
    model = prepared.model
    images = prepared.clean.take(0, 1).repeat(batch, 1, 1, 1).to(model.device)
    base = capture(model, images)
    spent = np.zeros(len(model.stages))
    for turn in range(4):
        for index, stage in enumerate(model.stages[1:], 1):
            stream = base.stream(index)

            def layer(stage=stage, stream=stream) -> object:  # type: ignore[no-untyped-def]
                compact = stage.write(stage.read(stream))
                return compact if stage.is_readout else stream + stage.total(compact)

            spent[index] += seconds(layer) * (turn > 0) / 3
    return np.cumsum(spent[::-1])[::-1] / batch


def main() -> None:
    keep(rows())

"""Masked runs against one plain forward, with what all masks share computed before."""

from __future__ import annotations

import time
from itertools import islice

import numpy as np
import torch

import circuitvit as cv
from bench._models import DEVICE, SIZES, cat_and_dog, random_vit
from bench._timing import Row, interleaved, keep, peak_mib
from bench.acdc_search import TAU
from circuitvit.engine import batch_runs, masked_run, masked_runs, new_workspace
from circuitvit.graph import EdgeMask
from circuitvit.tasks import PreparedTask


def rows() -> list[Row]:
    """Half of all edges, and circuits of about a hundred: by EAP, and by ACDC where weights are trained."""
    found = []
    for name in ("ViT-B/32", "ViT-Ti/16"):
        pairs = SIZES[name][1]
        _, prepared = random_vit(name, pairs)
        half = prepared.graph.edge_mask & (np.random.default_rng(0).random(prepared.graph.shape) < 0.5)
        found.append(_row(f"half of all edges, {name}, {pairs} pairs", prepared, half, 1.35, 1.2))
        found.append(_row(f"100 edges, {name}, {pairs} pairs", prepared, _hundred(prepared), 0.9, 0.4))
    trained = cat_and_dog()
    if trained is not None:
        circuit = cv.acdc(trained.model, trained, TAU, progress=False)
        title = f"ACDC's {len(circuit)} edges, trained ViT-Ti/16, the cat-dog pair"
        found.append(_row(title, trained, circuit.kept, 0.9, 0.4))
        found.append(_trimming(trained, circuit))
    return found


def _trimming(prepared: PreparedTask, circuit: cv.Circuit) -> Row:
    """The circuit without one edge after the other, as searches ask for it; processor times."""
    (run,) = islice(batch_runs(prepared, len(prepared)), 1)
    images = prepared.clean.take(0, len(prepared)).to(DEVICE)
    masks = np.stack([(circuit - cv.Circuit.from_edges(circuit.graph, [edge])).kept for edge in circuit])
    together, floor, least = interleaved(
        lambda: masked_runs(run.sources, masks), lambda: prepared.model(images), clock=time.process_time
    )
    title = f"each of the {len(masks)} that lack one of ACDC's edges, all in one batch, the cat-dog pair"
    each = (together / len(masks), 0.2, 0.1, floor / len(masks), least)
    return Row(f"masked run, {title}", "1 plain forward; processor time", *each, peak_mib())


def _hundred(prepared: PreparedTask) -> EdgeMask:
    return cv.attribute(prepared.model, prepared, "eap", progress=False).connected(100).kept


def _row(title: str, prepared: PreparedTask, kept: EdgeMask, bar: float, stretch: float) -> Row:
    (run,) = islice(batch_runs(prepared, len(prepared)), 1)
    images = prepared.clean.take(0, len(prepared)).to(DEVICE)
    room = new_workspace(run.sources)

    def floor() -> torch.Tensor:
        return prepared.model(images)

    def work() -> torch.Tensor:
        return masked_run(run.sources, kept, workspace=room)

    ratio, spent, least = interleaved(work, floor, repeats=15)
    return Row(f"masked run, {title}", "1 plain forward", ratio, bar, stretch, spent, least, peak_mib())


def main() -> None:
    keep(rows())

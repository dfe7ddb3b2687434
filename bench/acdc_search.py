"""ACDC against its naive form: one full run of the split model for every edge, timed on a sample."""

from __future__ import annotations

import statistics

import numpy as np
import torch

import circuitvit as cv
from bench._models import cat_and_dog
from bench._timing import Row, keep, peak_mib, seconds
from circuitvit.engine import Sources, batch_runs
from circuitvit.graph import EdgeMask
from circuitvit.tasks import PreparedTask
from tests.reference.literal_vit import LiteralViT

TAU = 0.25
"""In nats: leaves 100 to 300 edges on the cat-dog pair."""

SAMPLE = 12
"""Masks that the naive forwards are timed on; the rest is extrapolated."""


def rows() -> list[Row]:
    """The trained ViT-Ti on the cat-dog pair; nothing without it."""
    prepared = cat_and_dog()
    if prepared is None:
        return []
    circuit = cv.acdc(prepared.model, prepared, TAU, progress=False)
    spent = statistics.median(
        seconds(lambda: cv.acdc(prepared.model, prepared, TAU, progress=False)) for _ in range(5)
    )
    title = f"ACDC, tau {TAU:g} nats ({len(circuit)} edges), trained ViT-Ti/16, the cat-dog pair"
    found = []
    for name, each in (
        ("against the tests' naive search", _literal(prepared)),
        ("against full split runs", _split(prepared)),
    ):
        naive = each * prepared.graph.n_edges
        text = f"{SAMPLE} of {prepared.graph.n_edges:,} runs timed, extrapolated"
        found.append(Row(f"{title}, {name}", text, naive / spent, 40, 60, spent, naive, peak_mib(), True))
    return found


def _literal(prepared: PreparedTask) -> float:
    """Seconds of one run of the literal split model, which sums every receiver's input edge by edge."""

    class Single(LiteralViT):
        dtype = torch.float32

    literal = Single(prepared.model.module)
    clean, corrupt = (images.take(0, 1) for images in (prepared.clean, prepared.reference))
    reference = literal.run(corrupt).outputs
    kept = {name: place % 2 == 0 for place, (_, _, _, name) in enumerate(literal.edges())}
    return statistics.median(seconds(lambda: literal.run(clean, reference, kept)) for _ in range(SAMPLE))


def _split(prepared: PreparedTask) -> float:
    """Seconds of one run in which every receiver has a stream of its own and every node runs."""
    (run,) = batch_runs(prepared, 1)
    generator = np.random.default_rng(0)
    masks = [prepared.graph.edge_mask & (generator.random(prepared.graph.shape) < 0.5) for _ in range(SAMPLE)]
    shared = run.sources.reference_outputs(), run.sources.deltas()  # which all runs of a search would share
    return statistics.median(
        seconds(lambda mask=mask: split_run(run.sources, mask, *shared)) for mask in masks
    )


@torch.no_grad()
def split_run(
    sources: Sources, kept: EdgeMask, reference: torch.Tensor, deltas: torch.Tensor
) -> torch.Tensor:
    """The masked run as its formula says it, without a shortcut."""
    changes = deltas.neg()
    for index, stage in enumerate(sources.model.stages[1:], 1):
        senders, receivers = sources.graph.sender_slices[index], sources.graph.receiver_slices[index]
        weights = torch.from_numpy(kept[: senders.start, receivers, 0]).to(changes)
        base = sum(reference[: senders.start]) + sum(
            before.constant for before in sources.model.stages[:index] if before.constant is not None
        )
        streams = base + torch.einsum("sr,sbtd->rbtd", weights, changes[: senders.start])
        compact = stage.write(stage.read_each(streams, range(len(stage.nodes.receivers))))
        if stage.is_readout:
            return compact
        changes[senders] = stage.expand(compact) - reference[senders]
    raise AssertionError("a model ends with its readout")


def main() -> None:
    keep(rows())

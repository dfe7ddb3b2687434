"""Edited models edge by edge, against hooks on the original module, and stage by stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import circuitvit as cv
from circuitvit.models import Stage
from circuitvit.models.edited import EditedStage, StreamEdit
from tests.families import FAMILIES, made
from tests.models.test_edits import among, without
from tests.reference.sites import Changes, with_stream_nodes
from tests.rightness import prove
from tests.strategies import assert_close

FIRST = torch.arange(5)[:, None] == 0


def bent(x: Tensor) -> Tensor:
    """A change with slopes of its own, which mixes no images."""
    return x + 0.3 * torch.sin(x).mean(dim=1, keepdim=True)


INSIDE: tuple[dict[str, Any], Changes] = (
    {"a0.h0<k>": bent, "a1.h1.scores": bent, "m0.hidden": bent, "m1@cls": bent},
    {"a0.h0<k>": bent, "a1.h1.scores": bent, "m0.hidden": bent, "m1": among(FIRST, bent)},
)
OUTPUTS: tuple[dict[str, Any], Changes] = (
    {"a0.h0": bent, "a1.h1.z": bent, "a0.h1.pattern@0->1": cv.knock_out(), "a1.h0": 0.3},
    {
        "a0.h0": bent,
        "a1.h1.z": bent,
        "a0.h1.pattern": without((torch.arange(5) == 1)[:, None] & (torch.arange(5) == 0)),
        "a1.h0": lambda x: 0 * x + 0.3,
    },
)
STREAMS: tuple[dict[str, Any], Changes] = (
    {"resid1@0": bent, "resid2": lambda x: 1.2 * x, "m0": bent},
    {"resid1": among(FIRST, bent), "resid2": lambda x: 1.2 * x, "m0": bent},
)
BETWEEN: tuple[dict[str, Any], Changes] = (
    {"mid1": bent, "resid1": lambda x: 1.2 * x},
    {"mid1": bent, "resid1": lambda x: 1.2 * x},
)


@pytest.mark.parametrize(
    ("family", "edits"),
    [
        ("timm", INSIDE),
        ("timm", OUTPUTS),
        ("timm", STREAMS),
        ("timm", BETWEEN),
        ("timm, parallel", INSIDE),
        ("timm, parallel", STREAMS),
        ("timm, gated", OUTPUTS),
        ("transformers, vit, classes", BETWEEN),
    ],
    ids=lambda each: each if isinstance(each, str) else "+".join(each[0]),
)
def test_edges_of_edited_models_are_those_of_hooks(
    family: str, edits: tuple[dict[str, Any], Changes]
) -> None:
    """All effects, all slopes, and stages' fast gradients and answers; edited streams are nodes."""
    model, original = made(family)
    table, changes = edits
    edited, nodes = model.edit(table), with_stream_nodes(original, changes)
    streams = {f"{name.partition('@')[0]}.edit" for name in table if name.startswith(("resid", "mid"))}
    assert {stage.nodes.name for stage in edited.stages if isinstance(stage, StreamEdit)} == streams
    prove(edited, nodes, FAMILIES[family].images(), FAMILIES[family].images(seed=1))


@pytest.mark.parametrize("family", ["timm", "timm, parallel", "timm, gated"])
@pytest.mark.parametrize("edits", [INSIDE, OUTPUTS, STREAMS], ids=["inside", "outputs", "streams"])
def test_answers_are_the_literal_ones(family: str, edits: tuple[dict[str, Any], Changes]) -> None:
    """When one receiver alone reads something else, whatever way it is told."""
    edited = made(family)[0].edit(edits[0])
    stream, other = (edited.embed(FAMILIES[family].images(seed=seed)) for seed in (0, 1))
    for stage in edited.layers:
        if isinstance(stage, EditedStage | StreamEdit):
            with torch.no_grad():
                _prove_answers(stage, stream, torch.stack([other, stream - other]))
        stream, other = (stage.add(each, stage.write(stage.read(each))) for each in (stream, other))


def _prove_answers(stage: Stage, stream: Tensor, streams: Tensor) -> None:
    reads = stage.read(stream)
    others = tuple(
        read.view(*streams.shape[:2], *read.shape[1:]) for read in stage.read(streams.flatten(0, 1))
    )
    d_compact = torch.randn(stage.write(reads).shape, generator=torch.Generator().manual_seed(0)).double()
    with torch.enable_grad():
        given = tuple(read.detach().requires_grad_() for read in reads)
        d_reads = torch.autograd.grad(stage.write(given), given, d_compact)
    found = stage.answers(reads, others, d_reads, d_compact)
    assert_close(found, Stage.local_effects(stage, reads, d_reads, d_compact, stream, streams))

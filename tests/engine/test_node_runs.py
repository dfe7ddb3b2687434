"""A run of nodes is the masked run with all edges among them, whatever the family and the ablation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import circuitvit as cv
from circuitvit.engine import Evaluator
from circuitvit.engine.masked import masked_run
from circuitvit.engine.node_runs import node_losses, node_run
from circuitvit.engine.references import Sources
from circuitvit.models.timm_import import import_timm
from circuitvit.pruning.by_nodes import edges_among
from circuitvit.tasks import Noise, prepare
from tests.rightness import CLEAN, CORRUPT, METRIC, micro

blocks = import_timm().models.vision_transformer
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "average pooling": {"global_pool": "avg", "class_token": False},
    "attention pooling": {"global_pool": "map", "class_token": False},
    "LayerScale": {"init_values": 0.5},
    "parallel": {"block_fn": blocks.ParallelScalingBlock},
    "two of each side by side": {"block_fn": blocks.ParallelThingsBlock},
}


def model_of(name: str) -> cv.Model:
    if name == "neurons":
        return cv.refine_nodes(cv.wrap(micro()), {"m0": cv.neurons([1, 5]), "m1": cv.neurons([0, 30])})
    if name == "sources":
        model = cv.wrap(micro())
        return cv.split_sources(model, cv.TokenGroups.by_kind(model, model.n_tokens))
    return cv.wrap(micro(**MODELS[name]))


@pytest.mark.parametrize("ablation", ["patch", "mean", "zero", "resample"])
@pytest.mark.parametrize("name", [*MODELS, "neurons", "sources"])
def test_it_is_the_masked_run(name: str, ablation: str) -> None:
    model = model_of(name)
    corrupt = CORRUPT if ablation == "patch" else None
    prepared = prepare(model, cv.Task(CLEAN, corrupt, metric=METRIC, ablation=ablation))
    sources = Evaluator(prepared).batch(0).sources
    graph, drawn = prepared.graph, np.random.default_rng(0)
    for share in (0.3, 0.7):
        kept = drawn.random(len(graph.senders)) < share
        kept[0] = True
        nodes = {name for name, own in zip(graph.senders, kept, strict=True) if own}
        found = node_run(sources, kept)
        assert found is not None
        torch.testing.assert_close(found, masked_run(sources, edges_among(graph, nodes)), rtol=0, atol=1e-10)


def gated(sources: Sources, gates: torch.Tensor) -> torch.Tensor:
    """The logits where each sender writes its gate's share of its own output, else its reference's."""
    stream = sources.base.compacts[0]
    for index, (stage, senders) in enumerate(
        zip(sources.model.essential, sources.graph.sender_slices, strict=True)
    ):
        compact = sources.base.compacts[0] if stage.is_source else stage.write(stage.read(stream))
        if stage.is_readout:
            return compact
        known = sources.reference.compacts
        other = torch.zeros_like(compact) if known is None else known[index][..., : compact.shape[-2], :]
        missed = stage.expand(compact) - stage.expand(other.expand_as(compact))
        stream = stage.total(compact) if stage.is_source else stage.add(stream, compact)
        stream = stream + ((gates[senders] - 1)[:, None, None, None] * missed).sum(dim=0)
    raise AssertionError("a model ends with its readout")


@pytest.mark.parametrize("ablation", ["patch", "zero"])
@pytest.mark.parametrize("name", [*MODELS, "neurons", "sources"])
def test_what_a_run_would_lose_without_each_node_is_the_slope_of_its_gate(name: str, ablation: str) -> None:
    model = model_of(name)
    prepared = prepare(
        model, cv.Task(CLEAN, CORRUPT if ablation == "patch" else None, metric=METRIC, ablation=ablation)
    )
    run = Evaluator(prepared).batch(0)
    kept = np.random.default_rng(1).random(len(prepared.graph.senders)) < 0.5
    kept[0] = True
    gates = torch.from_numpy(kept.astype(float)).requires_grad_()
    (slopes,) = torch.autograd.grad(run.metric(gated(run.sources, gates)).sum(), gates)
    losses = node_losses(run.sources, kept, run.metric)
    assert losses is not None
    assert np.abs(losses).max() > 1e-3
    torch.testing.assert_close(torch.from_numpy(losses), slopes, rtol=0, atol=1e-9)


def test_where_references_are_no_outputs_there_is_none() -> None:
    prepared = prepare(cv.wrap(micro()), cv.Task(CLEAN, metric=METRIC, ablation=Noise()))
    sources = Evaluator(prepared).batch(0).sources
    everything = np.ones(len(prepared.graph.senders), dtype=bool)
    assert node_run(sources, everything) is None
    assert node_losses(sources, everything, lambda logits: logits[:, 0]) is None
    assert cv.find_nodes(prepared.model, prepared, band=(0.7, 1.3), progress=False).minimal  # by masked runs

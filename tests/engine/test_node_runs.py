"""A run of nodes is the masked run with all edges among them, whatever the family and the ablation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import circuitvit as cv
from circuitvit.engine import Evaluator
from circuitvit.engine.masked import masked_run
from circuitvit.engine.node_runs import node_run
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


def test_where_references_are_no_outputs_there_is_none() -> None:
    prepared = prepare(cv.wrap(micro()), cv.Task(CLEAN, metric=METRIC, ablation=Noise()))
    sources = Evaluator(prepared).batch(0).sources
    assert node_run(sources, np.ones(len(prepared.graph.senders), dtype=bool)) is None

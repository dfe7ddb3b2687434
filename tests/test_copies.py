"""Models, tasks, graphs and results can be copied, and pickled for the worker processes of a user."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import circuitvit as cv
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.engine import Evaluator
from circuitvit.graph import Circuit, EdgeScores, Graph, Provenance
from circuitvit.models.rules import BackwardRules
from circuitvit.tasks.metrics import metric_names
from tests.rightness import MICRO, VisionTransformer, finished, images, micro

Copier = Callable[[Any], Any]


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


both = pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["copied", "pickled"])


@pytest.fixture(scope="module")
def model() -> cv.Model:
    return cv.load("catdog-tiny")


def used(graph: Graph) -> Graph:
    """The graph after all that it derives has been asked for."""
    assert graph.edge_index(graph.edges[0]) in {(0, 0, 0)}
    assert graph.stage_of_node["input"].mixing.size == 0
    return graph


@both
def test_a_graph_that_has_been_used(model: cv.Model, copied: Copier) -> None:
    graph = copied(used(model.graph))
    assert graph == model.graph
    assert graph.d_model == model.graph.d_model
    assert graph.edge_index(graph.edges[-1]) == model.graph.edge_index(graph.edges[-1])
    assert not graph.edge_mask.flags.writeable


@both
def test_circuits_and_scores_stay_read_only(model: cv.Model, copied: Copier) -> None:
    values = np.where(model.graph.edge_mask, 0.5, 0.0)
    origin = Provenance("catdog-tiny", "1f").with_parameters(asked=3)
    scores = EdgeScores(used(model.graph), values, "eap", provenance=origin)
    circuit = copied(scores.top(3))
    assert circuit == scores.top(3)
    assert circuit.provenance == scores.top(3).provenance
    assert not circuit.kept.flags.writeable
    assert not circuit.values.flags.writeable
    assert copied(scores).strongest(3) == scores.strongest(3)
    assert not copied(scores).values.flags.writeable


@both
def test_calibrated_scores(model: cv.Model, copied: Copier) -> None:
    task = cv.Task(*catdog_pairs(2), metric=cv.logit_diff("cat", "dog"))
    scores = cv.calibrate(model, task, cv.attribute(model, task, "eap", progress=False), 30, progress=False)
    again = copied(scores)
    assert again.fidelity.summary() == scores.fidelity.summary()
    assert not again.fidelity.low.flags.writeable


@both
def test_a_model_runs_on_weights_of_its_own(copied: Copier) -> None:
    model = cv.wrap(micro(), name="small", classes=("a", "b", "c", "d", "e"))
    again = copied(model)
    same = ("name", "classes", "preprocessing", "n_logits", "prefix", "has_classes", "graph", "weights_hash")
    assert [getattr(again, name) for name in same] == [getattr(model, name) for name in same]
    assert torch.equal(again(images()), model(images()))
    with torch.no_grad():
        again.module.blocks[0].attn.qkv.weight.mul_(2)  # stages and module share what is edited
    full = Evaluator(cv.Task(images(), images(seed=1), metric=first_logit).prepare(again))
    assert np.allclose(full.whole, first_logit(again(images())))
    assert not torch.allclose(again(images()), model(images()))


def relative() -> Any:
    hf_models = pytest.importorskip("tests.hf_models")
    return hf_models.MODELS["beit, classes"]()


@both
@pytest.mark.parametrize(
    "build",
    [partial(VisionTransformer, **{**MICRO, "global_pool": "map", "class_token": False}), relative],
    ids=["latents of a pool", "tables of transformers"],
)
def test_a_copy_notices_edits_of_what_its_stages_keep(copied: Copier, build: Callable[[], Any]) -> None:
    again = copied(cv.wrap(finished(build())))
    with torch.no_grad():
        for name, tensor in again.module.named_parameters():
            if "latent" in name or "table" in name:
                tensor.normal_(generator=torch.Generator().manual_seed(0))
    full = cv.run(again, cv.Task(images(), images(seed=1), metric=first_logit), cv.Circuit.full(again.graph))
    assert torch.allclose(full, again(images()), atol=1e-10)


@both
def test_a_head_stays_on_its_model(copied: Copier) -> None:
    model = cv.with_head(
        cv.wrap(micro()), torch.ones(2, 24), torch.ones(2), classes=("a", "b"), tokens="mean"
    )
    again = copied(model)
    assert torch.equal(again(images()), model(images()))
    assert (again.weights_hash, again.name, again.classes) == (model.weights_hash, model.name, model.classes)
    with torch.no_grad():
        again.head.weight.mul_(2)  # readout and head share what is edited
        again.module.blocks[0].attn.qkv.weight.mul_(2)
    full = Evaluator(cv.Task(images(), images(seed=1), metric=first_logit).prepare(again))
    assert np.allclose(full.whole, first_logit(again(images())))
    assert not torch.allclose(again(images()), model(images()))


@both
def test_a_model_of_other_gradients_keeps_them(copied: Copier) -> None:
    model = cv.wrap(micro()).with_rules(BackwardRules(frozen_norms=True))
    attention = copied(model).stages[1]
    assert attention.norm.frozen


def test_the_wordnet_ids_of_classes_are_kept() -> None:
    model = cv.wrap(micro(num_classes=1000))
    assert model.synsets is not None
    assert pickled(model).synsets == model.synsets


@both
@pytest.mark.parametrize("metric", metric_names())
def test_a_task_with_any_metric(model: cv.Model, copied: Copier, metric: str) -> None:
    clean, corrupt = catdog_pairs(2)
    given = cv.projection(torch.ones(4)) if metric == "projection" else metric
    task = cv.Task(clean, corrupt, metric=given, ablation=cv.Mean(images=corrupt), groups="kind")
    logits = [Evaluator(each.prepare(model)).values(Circuit.empty(each.prepare(model).graph))
              for each in (task, copied(task))]  # fmt: skip
    assert np.array_equal(*logits)


def first_logit(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, 0]


@both
def test_a_prepared_task_keeps_its_model(model: cv.Model, copied: Copier) -> None:
    prepared = cv.Task(*catdog_pairs(2), metric=first_logit).prepare(model)
    again, other = copied((prepared, model))
    assert again.model is other
    assert np.array_equal(Evaluator(again).whole, Evaluator(prepared).whole)


def test_another_process_reads_them(model: cv.Model, tmp_path: Path) -> None:
    task = cv.Task(*catdog_pairs(2), metric=cv.logit_diff("cat", "dog"))
    circuit = cv.attribute(model, task, progress=False).top(20)
    (tmp_path / "work").write_bytes(pickle.dumps((model, task, circuit)))
    code = (
        "import pickle, sys, circuitvit as cv\n"
        "model, task, circuit = pickle.load(open(sys.argv[1], 'rb'))\n"
        "print(cv.run(model, task, circuit).flatten().tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "work")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert np.allclose(json.loads(done.stdout), cv.run(model, task, circuit).flatten(), atol=1e-5)

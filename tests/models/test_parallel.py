"""Blocks whose attention and MLP, or several of each, read one stream: timm's parallel blocks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import circuitvit as cv
from circuitvit.engine import batch_runs, soft_run
from circuitvit.graph.eap_ig import transformer_graph
from circuitvit.verification.interventions import patching_map
from circuitvit.views import attention_patterns, direct_logit_attribution, effect_heatmap, position_heads
from tests.reference import literal_acdc
from tests.reference.hooked import HookedModule, Receiver, Sender, given, gives, written_by_head
from tests.rightness import CLEAN, CORRUPT, drawn_circuit, formula, images, micro, prove, task_of, timm
from tests.strategies import assert_close

HEADS, WIDTH, D = 2, 12, 24
blocks = timm.models.vision_transformer

SCALING: dict[str, Callable[[], Any]] = {
    "apart": partial(micro, block_fn=blocks.ParallelScalingBlock, init_values=0.1),
    "fused": partial(
        micro,
        block_fn=partial(blocks.ParallelScalingBlock, fuse_out_proj=True),
        qkv_bias=False,
        qk_norm=True,
        global_pool="avg",
    ),
    "differential": partial(micro, block_fn=blocks.DiffParallelScalingBlock, init_values=0.1),
}
THINGS: dict[str, Callable[[], Any]] = {
    "two-of-each": partial(micro, block_fn=blocks.ParallelThingsBlock, init_values=0.1),
    "three-normed-across": partial(
        micro,
        block_fn=partial(blocks.ParallelThingsBlock, num_parallel=3),
        scale_attn_norm=True,
        global_pool="avg",
    ),
}
ALL = {**SCALING, **THINGS}


def scaling(module: Any) -> HookedModule:
    """Where blocks with fused projections keep their nodes: rows of the MLP, of queries, keys and values."""
    senders, receivers = {"input": Sender(module.blocks[0], given)}, {}
    for layer, block in enumerate(module.blocks):
        gamma, hidden = getattr(block.ls, "gamma", None), block.in_split[0]
        out = block.out_proj or block.mlp_out_proj
        senders[f"m{layer}"] = Sender(out, partial(_of_mlp, block))
        receivers[f"m{layer}"] = Receiver(block.in_norm, block.in_proj, slice(0, hidden))
        for head in range(HEADS):
            written = written_by_head(head, WIDTH, gamma)
            senders[f"a{layer}.h{head}"] = Sender(block.out_proj or block.attn_out_proj, written)
            for port, name in enumerate("qkv"):
                first = hidden + port * D + head * WIDTH
                place = Receiver(block.in_norm, block.in_proj, slice(first, first + WIDTH))
                receivers[f"a{layer}.h{head}<{name}>"] = place
    receivers["logits"] = Receiver(module.norm, module.norm)
    return HookedModule(module, senders, receivers)


def _of_mlp(block: Any, projection: Any, joined: Tensor, output: Tensor) -> Tensor:
    """What an MLP writes through its own projection, or through one that it shares with attention."""
    if block.out_proj is not None:
        output = joined[..., D:] @ projection.weight[:, D:].T
    return output * getattr(block.ls, "gamma", 1.0)


def things(module: Any) -> HookedModule:
    """Where blocks of several attentions and MLPs keep their nodes."""
    senders, receivers = {"input": Sender(module.blocks[0], given)}, {}
    for layer, block in enumerate(module.blocks):
        for number, branch in enumerate(block.attns):
            for head in range(HEADS):
                name = f"a{layer}.h{number * HEADS + head}"
                written = written_by_head(head, WIDTH, getattr(branch.ls, "gamma", None))
                senders[name] = Sender(branch.attn.proj, written)
                for port, letter in enumerate("qkv"):
                    first = (port * HEADS + head) * WIDTH
                    place = Receiver(branch.norm, branch.attn.qkv, slice(first, first + WIDTH))
                    receivers[f"{name}<{letter}>"] = place
        for number, branch in enumerate(block.ffns):
            name = f"m{layer}.{number}" if number else f"m{layer}"
            senders[name] = Sender(branch.ls, gives)
            receivers[name] = Receiver(branch.norm, branch.norm)
    receivers["logits"] = Receiver(module.norm, module.norm)
    return HookedModule(module, senders, receivers)


@pytest.mark.parametrize("name", ALL)
def test_edges_are_those_of_hooks_on_the_original(name: str) -> None:
    module = ALL[name]()
    last = module.fc_norm if module.global_pool == "avg" else None
    hooked = (scaling if name in SCALING else things)(module)
    if last is not None:
        mean = lambda stream: stream[:, module.num_prefix_tokens :].mean(dim=1)  # noqa: E731
        receivers = {**hooked.receivers, "logits": Receiver(last, last, pool=mean)}
        hooked = HookedModule(module, hooked.senders, receivers)
    prove(cv.wrap(module), hooked, CLEAN, CORRUPT)


def test_a_parallel_block_has_the_graph_of_other_tools() -> None:
    graph = cv.wrap(SCALING["apart"]()).graph
    assert graph == transformer_graph(2, 2, parallel=True)
    assert "a0.h0->m0" not in graph.edges
    assert {"a0.h0->m1", "m0->a1.h1<q>"} <= set(graph.edges)


def test_several_attentions_come_before_several_mlps() -> None:
    graph = cv.wrap(THINGS["two-of-each"]()).graph
    assert graph.senders[1:7] == ("a0.h0", "a0.h1", "a0.h2", "a0.h3", "m0", "m0.1")
    assert {"a0.h0->m0", "a0.h3->m0.1", "m0->a1.h2<k>"} <= set(graph.edges)
    assert not {"a0.h0->a0.h2<q>", "m0->m0.1"} & set(graph.edges)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("ablation", ["patch", "zero", "mean", "noise"])
def test_masked_runs_are_those_of_whole_stages(name: str, ablation: str) -> None:
    """A masked run cuts stages to some senders and tokens; the soft one runs all of each."""
    module = ALL[name]()
    model = cv.wrap(module)
    for groups in (None, "kind"):
        prepared = task_of(ablation=ablation, groups=groups).prepare(model)
        sources = next(batch_runs(prepared, 2)).sources
        for seed, density in enumerate((1.0, 0.7, 0.5, 0.3, 0.3, 0.2, 0.2, 0.1, 0.1, 0.05)):
            circuit = drawn_circuit(prepared.graph, density, seed)
            told = soft_run(sources, torch.tensor(circuit.kept, dtype=torch.float64))
            assert_close(cv.run(model, prepared, circuit), told)
    with torch.no_grad():
        assert_close(cv.run(model, task_of(), cv.Circuit.full(model.graph)), module(CLEAN))
        assert_close(cv.run(model, task_of(), cv.Circuit.empty(model.graph)), module(CORRUPT))


@pytest.mark.parametrize("name", ["apart", "two-of-each"])
def test_acdc_is_the_naive_search_with_whole_runs(name: str) -> None:
    model, task, tau = cv.wrap(ALL[name]()), task_of(), 0.0005
    sources = next(batch_runs(task.prepare(model), 2)).sources
    kept = model.graph.edge_mask.copy()

    def divergence() -> float:
        logits = soft_run(sources, torch.tensor(kept, dtype=torch.float64))
        return float(literal_acdc.kl(sources.base.logits, logits).mean())

    current = 0.0
    for receiver in reversed(range(len(model.graph.receivers))):
        for sender in reversed(range(len(model.graph.senders))):
            if model.graph.edge_mask[sender, receiver, 0]:
                kept[sender, receiver] = False
                without = divergence()
                if without - current < tau:
                    current = without
                else:
                    kept[sender, receiver] = True
    found = cv.acdc(model, task, tau=tau, progress=False)
    assert set(found) == set(cv.Circuit(model.graph, kept).pruned())
    assert len(found) > 3


@pytest.mark.parametrize("method", ["atp-qk", "relp", "gim", "eap-ig", "ceap", "hybrid", "ifr"])
@pytest.mark.parametrize("name", ["apart", "two-of-each"])
def test_every_method_scores_every_kind_of_edge(name: str, method: str) -> None:
    scores = cv.attribute(cv.wrap(ALL[name]()), task_of(), method, progress=False).to_dict()
    for edge in ("input->a0.h1<v>", "input->m0", "m0->a1.h0<v>", "a1.h1->logits", "m1->logits"):
        assert abs(scores[edge]) > 1e-9, edge


def test_without_its_layer_a_node_has_another_gradient() -> None:
    model = cv.wrap(SCALING["fused"]())
    plain, starred = (
        cv.attribute(model, task_of(), method, progress=False) for method in ("atp-qk", "atp-star")
    )
    assert np.isfinite(starred.values).all()
    assert (np.sign(plain.values) * np.sign(starred.values) >= 0).all()


def test_a_behaviour_is_found_and_verified() -> None:
    module = SCALING["apart"]()
    model, many = cv.wrap(module), images(60, seed=3)
    with torch.no_grad():
        order = formula(module(many)).argsort()
    task = cv.Task(many[order[-6:]], many[order[:6]], cv.logit_diff(0, 1))
    found = cv.find(model, task, progress=False)
    assert found.faithfulness == pytest.approx(1.0, abs=0.06)
    report = cv.verify(model, task, found.circuit, progress=False)
    assert report.task.faithfulness.value == pytest.approx(found.faithfulness, abs=1e-6)


@pytest.mark.parametrize("name", ["apart", "two-of-each", "differential"])
def test_views_tell_heads_and_mlps_of_a_block_apart(name: str, tmp_path: Path) -> None:
    model = cv.wrap(ALL[name]())
    task, heads = task_of(), 4 if name == "two-of-each" else 2
    assert attention_patterns(model, CLEAN).pattern.shape[:2] == (2, heads)
    assert [head.head for head in position_heads(model, images(3)).heads][-1] == f"a1.h{heads - 1}"
    assert patching_map(model, task, "mlps", "all", progress=False).rows[0] == "m0"
    nodes = cv.attribute_nodes(model, task, progress=False)
    for site in ("heads", "mlps"):
        found = patching_map(model, task, site, "all", progress=False)
        told = [nodes.values[model.graph.sender_index[row], 0] for row in found.rows]
        assert found.effect[:, 0] == pytest.approx(np.array(told), abs=1e-12)
    patching_map(model, task, "patterns", "kind", progress=False)
    if name == "apart":
        view = direct_logit_attribution(model, CLEAN, 0, 1)
        assert np.abs(view.total - view.logit_difference).max() < 1e-10
        assert np.abs(view.by_source.sum(axis=2) - view.by_token.sum(axis=2)).max() < 1e-10
    heat = effect_heatmap(cv.attribute(model, task, "eap", progress=False))
    assert not np.isnan(heat.heads).any()
    circuit = cv.attribute(model, task, "eap", progress=False).top(15)
    for ending in ("svg", "html"):
        circuit.draw(tmp_path / f"circuit.{ending}", model=model, task=task, thumbnails=True)


def test_an_edit_of_fused_weights_is_noticed() -> None:
    module = SCALING["fused"]()
    model = cv.wrap(module)
    before = model.weights_hash
    cv.run(model, task_of(), drawn_circuit(model.graph, 0.5))
    with torch.no_grad():
        module.blocks[1].in_proj.weight.mul_(1.5)
        module.blocks[0].out_proj.weight.mul_(0.5)
        assert_close(cv.run(model, task_of(), cv.Circuit.full(model.graph)), module(CLEAN))
    assert model.weights_hash != before

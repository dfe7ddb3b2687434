"""Attention pooling: heads whose queries are learned latents, an MLP behind them, and a stream of latents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import circuitvit as cv
from circuitvit.engine import batch_runs, soft_run
from circuitvit.errors import OptionError, UnsupportedModelError
from circuitvit.models.decompose import decomposed, frozen_twin
from circuitvit.models.layers import MLPStage
from circuitvit.models.timm_import import import_timm
from circuitvit.verification.interventions import patching_map
from circuitvit.views import attention_patterns, direct_logit_attribution, logit_lens
from tests.models import test_hooked, test_timm_naflex, test_timm_positions
from tests.reference import literal_acdc, literal_scores
from tests.reference.hooked import HookedModule, Receiver, Sender, gives, written_by_head
from tests.reference.literal_pool import PooledViT
from tests.rightness import (
    CLEAN,
    CORRUPT,
    METRIC,
    assert_right,
    drawn_circuit,
    finished,
    formula,
    images,
    kinds_of,
    micro,
    prove,
    task_of,
)
from tests.strategies import assert_close

AttentionPoolLatent = import_timm().layers.AttentionPoolLatent

POOLS: dict[str, dict[str, Any]] = {
    "siglip": {},
    "two-latents": {"latent_len": 2},
    "mean-of-three-latents": {"latent_len": 3, "pool_type": "avg", "latent_dim": 10},
    "normed-queries": {"qk_norm": True, "norm_layer": nn.LayerNorm},
    "positions": {"pos_embed": "abs", "feat_size": 4, "qkv_bias": False},
    "latents-are-queries": {"q_proj": False},
    "narrow": {"out_features": 16},
    "wide": {"out_features": 36, "latent_len": 6},
    "attention-alone": {"out_features": 0},
}


def pooled(class_token: bool = False, **pool: Any) -> Any:
    """A micro-model with attention pooling of four patches, after a class token that is not pooled."""
    module = micro(global_pool="map", class_token=class_token)
    if pool:
        module.attn_pool = AttentionPoolLatent(24, num_heads=2, **pool)
        module.head = nn.Linear(module.attn_pool.out_features, 5)
    return finished(module)


def hooked(module: Any, plain: Callable[[Any], HookedModule] = test_hooked.hooked) -> HookedModule:
    """Where a model of timm's with `global_pool="map"` keeps its nodes, besides those of its blocks."""
    blocks = plain(module)
    module = blocks.run  # it may have made a copy
    pool, width = module.attn_pool, module.attn_pool.head_dim
    senders, receivers = dict(blocks.senders), dict(blocks.receivers)

    def given_to_pool(normed: Tensor) -> Tensor:
        skipped = 0 if getattr(module, "pool_include_prefix", True) else module.num_prefix_tokens
        tokens = normed[:, skipped:]
        return tokens if pool.pos_embed is None else tokens + pool.pos_embed

    def given_to_readout(latents: Tensor) -> Tensor:
        return latents[:, 0] if pool.pool == "token" else latents.mean(dim=1)

    for head in range(pool.num_heads):
        written = written_by_head(head, width)
        if isinstance(pool.proj, nn.Identity):
            written = alone(head, width)
        senders[f"pool.h{head}"] = Sender(pool.proj, written)
        for port, name in enumerate("kv"):
            first = (port * pool.num_heads + head) * width
            columns = slice(first, first + width)
            place = Receiver(module.norm, pool.kv, columns, between=given_to_pool)
            receivers[f"pool.h{head}<{name}>"] = place
    if pool.mlp is not None:
        senders["pool.mlp"] = Sender(pool.mlp, gives)
        receivers["pool.mlp"] = Receiver(pool.norm, pool.norm)
    receivers["logits"] = Receiver(module.fc_norm, module.fc_norm, pool=given_to_readout)
    return HookedModule(module, senders, receivers)


def alone(head: int, width: int) -> Any:
    """What a head writes where heads are put side by side."""

    def of(projection: Any, joined: Tensor, _: Tensor) -> Tensor:
        written = torch.zeros_like(joined)
        written[..., head * width : (head + 1) * width] = joined[..., head * width : (head + 1) * width]
        return written

    return of


@pytest.mark.parametrize("options", POOLS.values(), ids=POOLS)
def test_edges_are_those_of_hooks_on_the_original(options: dict[str, Any]) -> None:
    module = pooled(**options)
    prove(cv.wrap(module), hooked(module), CLEAN, CORRUPT)


def test_the_perception_encoder_pools_its_class_token_too() -> None:
    options = {"use_rot_pos_emb": True, "global_pool": "map", "attn_pool_num_heads": 3, "use_fc_norm": True}
    module = micro(test_timm_positions.Eva, **options)
    prove(cv.wrap(module), hooked(module, test_timm_positions.hooked), CLEAN, CORRUPT)


def test_naflex_pools_by_attention() -> None:
    module = test_timm_naflex.naflex(global_pool="map", class_token=True, reg_tokens=1)
    prove(cv.wrap(module, preprocessing=test_timm_naflex.SPEC), hooked(module), CLEAN, CORRUPT)


@pytest.mark.parametrize("options", POOLS.values(), ids=POOLS)
def test_masked_runs_and_scores_are_the_literal_ones(options: dict[str, Any]) -> None:
    module = pooled(class_token=True, **options)
    assert_right(cv.wrap(module), module, PooledViT(module))


def test_no_edge_leads_past_the_pool() -> None:
    edges = cv.wrap(pooled()).graph.edges
    assert {"m1->pool.h0<k>", "pool.h1->pool.mlp", "pool.mlp->logits"} <= set(edges)
    assert not [edge for edge in edges if edge.endswith(("->logits", "->pool.mlp")) and edge[0] != "p"]


def test_the_pooled_token_is_a_group_of_its_own() -> None:
    model = cv.wrap(pooled(class_token=True))
    scores = cv.attribute(model, task_of(groups="kind"), "exact", progress=False)
    assert scores.graph.groups == ("cls", "patch", "pool")
    edges = set(scores.graph.edges)
    assert {"m1->pool.h0<v>@cls", "m1->pool.h0<v>@patch", "pool.h0->logits@pool"} <= edges
    assert not {"m1->pool.h0<v>@pool", "pool.h0->logits@cls", "pool.h0->logits@patch"} & edges
    assert np.abs(scores.values[scores.graph.edge_index("pool.h0->logits@pool")]) > 1e-3
    # the class token is not pooled, and says what it says through other tokens alone
    assert abs(scores.values[scores.graph.edge_index("m1->pool.h0<v>@cls")]) < 1e-12


def test_no_other_group_is_called_like_the_pool() -> None:
    groups = cv.TokenGroups(("pool", "rest"), torch.tensor([0, 1, 1, 1]))
    with pytest.raises(OptionError, match="cannot be called 'pool'"):
        task_of(groups=groups).prepare(cv.wrap(pooled()))


def test_another_pool_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match=r"attn_pool is a AttentionPoolPrr.*global_pool='map'"):
        cv.wrap(micro(global_pool="prr"))
    with pytest.raises(UnsupportedModelError, match="pool_type=''"):
        cv.wrap(pooled(pool_type=""))


# -- the engine on two parts of the stream ---------------------------------------------------------


def literal_reference(literal: PooledViT, ablation: str) -> dict[str, Tensor]:
    both = torch.cat([CLEAN, CORRUPT])
    return {
        "patch": lambda: literal_scores.patch_reference(literal, CORRUPT),
        "zero": lambda: literal_scores.zero_reference(literal, CLEAN),
        "mean": lambda: literal_scores.mean_reference(literal, CLEAN, both),
        "mean-tokens": lambda: literal_scores.mean_reference(literal, CLEAN, both, per_token=False),
    }[ablation]()


@pytest.mark.parametrize("pool", ["siglip", "two-latents", "wide", "positions"])
@pytest.mark.parametrize("ablation", ["patch", "zero", "mean", "mean-tokens"])
def test_every_ablation_is_the_literal_one(pool: str, ablation: str) -> None:
    module = pooled(class_token=True, **POOLS[pool])
    model, literal = cv.wrap(module), PooledViT(module)
    reference = literal_reference(literal, ablation)
    for groups in (None, kinds_of(model, literal)):
        graph = model.graph if groups is None else model.graph.with_groups(groups.names)
        task = task_of(ablation=ablation, groups=None if groups is None else "kind")
        sources = next(batch_runs(task.prepare(model), 2)).sources
        for seed, density in enumerate((0.9, 0.5, 0.1)):
            circuit = drawn_circuit(graph, density, seed)
            with torch.no_grad():
                told = literal.run(CLEAN, reference, frozenset(circuit).__contains__, groups).logits
            assert_close(cv.run(model, task, circuit), told)
            assert_close(soft_run(sources, torch.tensor(circuit.kept, dtype=torch.float64)), told)


@pytest.mark.parametrize("pool", ["siglip", "wide"])
@pytest.mark.parametrize("by_kind", [False, True])
def test_acdc_is_the_naive_search(pool: str, by_kind: bool) -> None:
    module = pooled(class_token=True, **POOLS[pool])
    model, literal = cv.wrap(module), PooledViT(module)
    groups = kinds_of(model, literal) if by_kind else None
    found = cv.acdc(model, task_of(groups="kind" if by_kind else None), tau=0.003, progress=False)
    reference = literal_reference(literal, "patch")
    kept = literal_acdc.acdc(literal, CLEAN, reference, 0.003, literal_acdc.kl, groups)
    assert set(found) == literal_acdc.pruned(literal, kept, groups)
    assert len(found) > 3


@pytest.mark.parametrize("method", ["ifr", "eap-ig", "ceap", "relp", "gim", "atp-qk", "atp-star", "hybrid"])
def test_scores_are_the_same_for_whole_streams_and_summed_over_groups(method: str) -> None:
    model = cv.wrap(pooled(class_token=True, latent_len=2))
    whole = cv.attribute(model, task_of(), method, progress=False)
    parts = cv.attribute(model, task_of(groups="kind"), method, progress=False)
    assert np.isfinite(whole.values).all()
    assert np.abs(whole.values[whole.graph.edge_index("pool.h1->pool.mlp")]) > 0
    if method in ("eap-ig", "ceap", "relp", "gim"):  # what is linear in the tokens
        assert_close(torch.tensor(parts.values.sum(axis=2)), torch.tensor(whole.values[:, :, 0]))


def test_a_behaviour_is_found_and_verified_through_the_pool() -> None:
    module = pooled()
    model, many = cv.wrap(module), images(60, seed=3)
    with torch.no_grad():
        order = formula(module(many)).argsort()
    task = cv.Task(many[order[-6:]], many[order[:6]], METRIC)
    found = cv.find(model, task, progress=False)
    assert found.faithfulness == pytest.approx(1.0, abs=0.06)
    assert any(edge.startswith("pool.") for edge in found.circuit)
    report = cv.verify(model, task, found.circuit, progress=False)
    assert report.task.faithfulness.value == pytest.approx(found.faithfulness, abs=1e-6)
    constants = cv.learn_constants(model, task, found.circuit, steps=2, per_token=True, progress=False)
    assert cv.run(model, task.with_options(ablation=constants), found.circuit).isfinite().all()


@pytest.mark.parametrize("ablation", ["noise", "resample"])
def test_drawn_ablations_change_latents_and_keep_what_is_kept(ablation: str) -> None:
    module = pooled(latent_len=6, out_features=36)
    model, task = cv.wrap(module), task_of(ablation=ablation)
    with torch.no_grad():
        whole = module(CLEAN)
    assert_close(cv.run(model, task, cv.Circuit.full(model.graph)), whole)
    without = cv.Circuit.full(model.graph) - cv.Circuit.from_edges(model.graph, ["pool.h0->logits"])
    assert (cv.run(model, task, without) - whole).abs().max() > 1e-3


# -- views -----------------------------------------------------------------------------------------


def test_nodes_are_patched_at_their_own_tokens() -> None:
    model = cv.wrap(pooled(class_token=True))
    nodes = cv.attribute_nodes(model, task_of(), progress=False)
    for site, places in (("heads", ("a1.h0", "pool.h1")), ("mlps", ("m0", "pool.mlp"))):
        found = patching_map(model, task_of(), site, "kind", progress=False)
        assert found.columns == ("all", "cls", "patch", "pool")
        for name in places:
            row = found.rows.index(name)
            effect = nodes.values[model.graph.sender_index[name], 0]
            assert found.effect[row, 0] == pytest.approx(effect, abs=1e-12)
            own = 3 if name.startswith("pool") else 2
            assert abs(found.effect[row, 5 - own]) < 1e-12 < abs(found.effect[row, own])


def test_direct_shares_are_those_of_the_pool_alone_and_lie_on_patches() -> None:
    model = cv.wrap(pooled(class_token=True))
    view = direct_logit_attribution(model, CLEAN, 0, 1)
    assert view.senders == ("pool.h0", "pool.h1", "pool.mlp")
    assert np.abs(view.total - view.logit_difference).max() < 1e-10
    by_head = view.by_patch.sum(axis=(2, 3))
    assert np.abs(by_head[:, :2] - view.by_sender[:, :2]).max() < 1e-10  # none of it from the class token


def test_the_lens_looks_through_the_pool() -> None:
    module = pooled(class_token=True)
    model = cv.wrap(module)
    view = logit_lens(model, CLEAN)
    assert view.positions == ("embedding", "layer 0", "layer 1")
    with torch.no_grad():
        whole = module(CLEAN)
        stream = model.embed(CLEAN)
        for block in module.blocks:
            stream = block(stream)
        alone = module.forward_head(module.norm(stream[:, 3:4].expand(-1, 2, -1)))
    assert np.abs(view.pooled[-1] - whole.numpy()).max() < 1e-5
    assert np.abs(view.logits[-1][:, 3] - alone.numpy()).max() < 1e-5


def test_patterns_of_a_pool_have_latents_for_queries() -> None:
    model = cv.wrap(pooled(class_token=True, latent_len=2))
    view = attention_patterns(model, CLEAN)
    assert view.pattern.shape == (2, 2, 2, 5)
    assert (view.pattern[..., 0] == 0).all()  # the class token is not pooled
    assert np.abs(view.pattern.sum(axis=-1) - 1).max() < 1e-6
    assert view.query_name(1) == "latent 1"
    with pytest.raises(OptionError, match="latents, not patches"):
        view.token((0, 0))
    with pytest.raises(OptionError, match="no latent 2"):
        view.token(2)
    assert attention_patterns(model, CLEAN, layer=1).heads == ("a1.h0", "a1.h1")


def test_pictures_and_pages_have_rows_for_the_pool(tmp_path: Path) -> None:
    model = cv.wrap(pooled(latent_len=2))
    circuit = cv.attribute(model, task_of(groups="kind"), "eap", progress=False).top(25)
    options = {"model": model, "task": task_of(groups="kind"), "thumbnails": True}
    for ending in ("svg", "html", "dot", "tex", "graphml", "json"):
        given = options if ending in ("svg", "html") else {}
        text = circuit.draw(tmp_path / f"circuit.{ending}", **given).read_text()
        assert "pool.h0" in text
    assert ">pool<" in (tmp_path / "circuit.svg").read_text()
    assert cv.Circuit.load(tmp_path / "circuit.json") == circuit


def test_an_edit_of_the_latent_is_noticed_and_has_another_hash() -> None:
    module = pooled()
    model = cv.wrap(module)
    before = model.weights_hash
    cv.run(model, task_of(), cv.Circuit.full(model.graph))
    with torch.no_grad():
        module.attn_pool.latent.mul_(3.0)
        assert_close(cv.run(model, task_of(), cv.Circuit.full(model.graph)), module(CLEAN))
    assert model.weights_hash != before


def test_a_family_whose_parts_of_the_stream_do_not_follow_is_refused() -> None:
    class Crossed(type(cv.wrap(pooled()).family)):  # type: ignore[misc]
        def pool(self, module: Any) -> tuple[Any, ...]:
            stage, mlp = super().pool(module)
            return stage, MLPStage(mlp.layer, mlp.norm, mlp.mlp)

    module = pooled()
    with pytest.raises(UnsupportedModelError, match="mlp2 reads 'residual', where the stream is 'pool'"):
        decomposed(Crossed(), frozen_twin(module), CLEAN)

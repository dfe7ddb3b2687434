"""Gated heads and differential heads: one more receiver, and a second pattern."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import circuitvit as cv
from circuitvit.errors import UnsupportedModelError
from circuitvit.export.maps import maps_of
from circuitvit.models import Stage
from circuitvit.models.timm_import import import_timm
from tests.models.test_hooked import HEADS, WIDTH, hooked
from tests.reference.hooked import HookedModule, Receiver
from tests.rightness import CLEAN, CORRUPT, METRIC, finished, micro, prove, scored
from tests.strategies import assert_close

timm = import_timm()
Attention, DiffAttention = timm.layers.Attention, timm.layers.DiffAttention


def with_attention(kind: type[nn.Module], options: dict[str, Any], **others: Any) -> Any:
    """A micro-model whose attention, all else being equal, is of this kind."""
    module = micro(**others)
    for layer, block in enumerate(module.blocks):
        block.attn = kind(2 * WIDTH, HEADS, qkv_bias=True, norm_layer=timm.layers.LayerNorm, **options)
        if kind is DiffAttention:
            block.attn.set_lambda_init(layer)
    return finished(module)


def gated(**others: Any) -> Any:
    return with_attention(Attention, {"gated": True}, **others)


def gated_together(**others: Any) -> Any:
    """Gates behind a norm across heads."""
    return with_attention(Attention, {"gated": True, "scale_norm": True}, **others)


def differential(**options: Any) -> Any:
    return with_attention(DiffAttention, options)


def hooked_gates(module: Any) -> HookedModule:
    """Where a gated `VisionTransformer` keeps its nodes."""
    plain = hooked(module)
    gates = {
        f"a{layer}.h{head}<g>": Receiver(
            block.norm1, block.attn.gate, slice(head * WIDTH, (head + 1) * WIDTH)
        )
        for layer, block in enumerate(module.blocks)
        for head in range(HEADS)
    }
    return HookedModule(plain.run, plain.senders, {**plain.receivers, **gates})


@pytest.mark.parametrize("build", [gated, gated_together], ids=["alone", "normed-together"])
@pytest.mark.parametrize("options", [{}, {"init_values": 0.1, "global_pool": "avg"}], ids=["plain", "scaled"])
def test_edges_of_gated_heads_are_those_of_hooks_on_the_original(build: Any, options: dict[str, Any]) -> None:
    module = build(**options)
    model = cv.wrap(module)
    assert model.graph.receivers[6:8] == ("a0.h0<g>", "a0.h1<g>")
    prove(model, hooked_gates(module), CLEAN, CORRUPT)


@pytest.mark.parametrize(
    "options",
    [{}, {"dual_lambda": True, "qk_norm": True}, {"scale_norm": True}],
    ids=["plain", "normed", "across"],
)
def test_edges_of_differential_heads_are_those_of_hooks_on_the_original(options: dict[str, Any]) -> None:
    module = differential(**options)
    prove(cv.wrap(module), hooked(module), CLEAN, CORRUPT)


@pytest.mark.parametrize("build", [gated, differential], ids=["gated", "differential"])
def test_a_part_of_the_stage_is_a_part_of_the_whole(build: Any) -> None:
    stage = cv.wrap(build()).stages[1]
    stream = torch.randn(2, 5, 2 * WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    reads = stage.read(stream)
    whole = stage.write(reads)
    for heads, tokens in (([1], 5), ([0, 1], 1), ([1], 2)):
        part = stage.restrict(heads).leading(tokens)
        found = part.read(stream)
        assert_close(part.write(found), whole[:, heads, :tokens])
        assert_close(
            part.write(part.read_each(stream[None], [0] * len(part.nodes.receivers))), part.write(found)
        )
        known = part.read_each(
            stream[None], [*[-1] * (len(part.nodes.receivers) - 1), 0], stage.restrict(heads).pick(reads)
        )
        assert_close(part.write(known), part.write(found))
        d_reads = tuple(torch.randn_like(read) for read in found)
        pulled = part.pull_back(stream, found, d_reads).expand()
        assert_close(pulled, Stage.pull_back(part, stream, found, d_reads).expand())


@pytest.mark.parametrize(
    "build", [gated, gated_together, differential], ids=["gated", "gated-together", "differential"]
)
def test_the_pattern_times_the_values_and_the_gain_is_what_a_head_writes(build: Any) -> None:
    stage = cv.wrap(build()).stages[1]
    reads = stage.read(torch.randn(2, 5, 2 * WIDTH, dtype=torch.float64))
    pattern = stage.pattern(reads)
    assert_close(stage.attend(reads, pattern), stage.write(reads))
    factor, summand = stage.gain(reads)
    assert_close(pattern @ reads[2] * factor + summand, stage.write(reads))


def test_the_pattern_of_a_differential_head_is_the_difference() -> None:
    module = differential()
    stage, attention = cv.wrap(module).stages[1], module.blocks[0].attn
    stream = torch.randn(1, 5, 2 * WIDTH, dtype=torch.float64)
    reads = stage.read(stream)
    share = attention._compute_lambda().item()
    assert_close(stage.pattern(reads).sum(dim=-1), torch.full((1, HEADS, 5), 1 - share).double(), 1e-6)
    with pytest.raises(UnsupportedModelError, match="subtract one softmax from another"):
        stage.scores(reads)


# -- what changes between two calls, and near misses -----------------------------------------------


def test_an_edited_lambda_is_seen_by_the_next_call() -> None:
    module = differential()
    model = cv.wrap(module)
    before = scored(model, "eap")
    with torch.no_grad():
        module.blocks[0].attn.lambda_q1.add_(0.5)
    assert_close(model(CLEAN), module(CLEAN))
    again = cv.wrap(module)
    assert scored(model, "eap") == pytest.approx(scored(again, "eap"), abs=1e-12)
    assert scored(again, "eap") != pytest.approx(before, abs=1e-6)


def test_an_edited_gate_is_seen_by_the_next_call() -> None:
    module = gated()
    model = cv.wrap(module)
    scored(model, "exact")
    module.blocks[1].attn.gate.weight.data.mul_(-1)
    assert scored(model, "exact") == pytest.approx(scored(cv.wrap(module), "exact"), abs=1e-12)


class WrongShare(DiffAttention):
    """Takes off more than its lambda says."""

    def _compute_lambda(self) -> torch.Tensor:
        return 1.5 * super()._compute_lambda()


WrongShare.__name__ = "DiffAttention"


class Exchanged(DiffAttention):
    """Takes the first pattern off the second."""

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=2)
        q, k = (part.view(batch, tokens, HEADS, 2, -1).permute(3, 0, 2, 1, 4) for part in (q, k))
        v = v.view(batch, tokens, HEADS, -1).transpose(1, 2)
        first, second = ((q[i] @ k[i].mT * self.scale).softmax(dim=-1) @ v for i in range(2))
        mixed = self.sub_norm(second - self._compute_lambda() * first) * (1 - self.lambda_init)
        return self.proj(mixed.transpose(1, 2).flatten(2))


Exchanged.__name__ = "DiffAttention"


class OtherGates(Attention):
    """Each head has its neighbour's gate."""

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        own = self.gate(x).sigmoid()
        plain = (
            F.linear(x, self.qkv.weight, self.qkv.bias)
            .view(*x.shape[:2], 3, HEADS, -1)
            .permute(2, 0, 3, 1, 4)
        )
        mixed = F.scaled_dot_product_attention(*plain).transpose(1, 2).flatten(2)
        return self.proj(mixed * own.roll(WIDTH, dims=-1))


OtherGates.__name__ = "Attention"


class SoftGate(nn.Linear):
    """A gate that is no plain linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(min=-0.1)


@pytest.mark.parametrize(
    ("kind", "options"), [(Exchanged, {}), (OtherGates, {"gated": True})], ids=["exchanged", "neighbours"]
)
def test_attention_that_does_something_else_is_refused(
    kind: type[nn.Module], options: dict[str, Any]
) -> None:
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0 of VisionTransformer"):
        cv.wrap(with_attention(kind, options))


def test_another_lambda_is_the_modules_own() -> None:
    """How the share comes from the weights is the module's affair: it is asked, not derived."""
    module = with_attention(WrongShare, {})
    prove(cv.wrap(module), hooked(module), CLEAN, CORRUPT)


def test_a_gate_that_is_more_than_linear_is_refused() -> None:
    module = gated()
    gate = module.blocks[1].attn.gate
    module.blocks[1].attn.gate = SoftGate(gate.in_features, gate.out_features).double()
    with pytest.raises(UnsupportedModelError, match=r"blocks\.1"):
        cv.wrap(module)


# -- the rest of the library -----------------------------------------------------------------------


@pytest.mark.parametrize("build", [gated, differential], ids=["gated", "differential"])
@pytest.mark.parametrize("method", ["eap-ig", "local", "relp", "gim", "atp-qk"])
def test_every_method_runs_on_them(build: Any, method: str) -> None:
    scores = scored(cv.wrap(build()), method)
    assert max(map(abs, scores.values())) > 0


@pytest.mark.parametrize("build", [gated, differential], ids=["gated", "differential"])
def test_whole_and_empty_circuits_are_the_clean_and_the_corrupt_run(build: Any) -> None:
    module = build()
    model, task = cv.wrap(module), cv.Task(CLEAN, CORRUPT, METRIC)
    assert_close(cv.run(model, task, cv.Circuit.full(model.graph)), module(CLEAN))
    assert_close(cv.run(model, task, cv.Circuit.empty(model.graph)), module(CORRUPT))


@pytest.mark.parametrize("build", [gated, differential], ids=["gated", "differential"])
def test_shares_by_source_sum_to_the_shares_of_heads(build: Any) -> None:
    view = cv.views.direct_logit_attribution(cv.wrap(build()), CLEAN, 0, 1)
    assert view.by_source.sum(axis=-1) == pytest.approx(view.by_sender, rel=1e-9, abs=1e-12)


def test_weighted_patterns_are_the_lengths_of_what_is_added() -> None:
    module = gated()
    attention = module.blocks[0].attn
    view = cv.views.attention_patterns(cv.wrap(module), CLEAN, layer=0)
    normed = module.blocks[0].norm1(cv.wrap(module).embed(CLEAN))
    batch, tokens, _ = normed.shape
    value = attention.qkv(normed).view(batch, tokens, 3, HEADS, WIDTH)[:, :, 2]
    gate = attention.gate(normed).sigmoid().view(batch, tokens, HEADS, WIDTH)
    for head in range(HEADS):
        part = attention.proj.weight[:, head * WIDTH : (head + 1) * WIDTH]
        added = (gate[:, :, None, head] * value[:, None, :, head]) @ part.T
        found = torch.tensor(view.weighted[:, head]).double()
        expected = torch.tensor(view.pattern[:, head]).double() * added.norm(dim=-1).detach()
        assert_close(found, expected, 1e-5)


def test_differential_heads_have_patterns_and_no_scores_in_figures_and_on_the_page() -> None:
    model, task = cv.wrap(differential()), cv.Task(CLEAN, CORRUPT, METRIC)
    view = cv.views.attention_patterns(model, CLEAN, layer=1)
    assert np.isnan(view.scores).all()
    assert len(view.figure().axes) == 2 * HEADS
    side = maps_of(model, task).sides["clean"]
    assert not side.heads
    assert set(model.graph.senders) == set(side.writes)


@pytest.mark.parametrize("build", [gated, differential], ids=["gated", "differential"])
def test_circuits_are_drawn_and_verified(build: Any, tmp_path: Path) -> None:
    model, task = cv.wrap(build()), cv.Task(CLEAN, CORRUPT, METRIC)
    circuit = cv.attribute(model, task, progress=False).top(20)
    for name in ("circuit.html", "circuit.svg"):
        circuit.draw(tmp_path / name, model=model, task=task)
    circuit.save(tmp_path / "circuit.json")
    assert cv.Circuit.load(tmp_path / "circuit.json") == circuit

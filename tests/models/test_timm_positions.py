"""timm's models with rotary positions (`Eva`) and relative biases (`Beit`, `VisionTransformerRelPos`)."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import circuitvit as cv
from bench.models_tried import summed
from circuitvit.engine import batch_runs, capture, soft_run
from circuitvit.engine.patching import patch_pattern
from circuitvit.errors import DataError, ModelError, UnsupportedModelError
from circuitvit.views import attention_patterns, attribution_of_task, logit_lens
from tests.reference import literal_acdc
from tests.reference.hooked import HookedModule, Receiver, Sender, given, written_by_head
from tests.rightness import CLEAN, CORRUPT, METRIC, drawn_circuit, finished, formula, micro, prove, timm
from tests.strategies import assert_close

Eva = timm.models.eva.Eva
Beit = timm.models.beit.Beit
RelPos = timm.models.vision_transformer_relpos.VisionTransformerRelPos
ResPostRelPosBlock = timm.models.vision_transformer_relpos.ResPostRelPosBlock

HEADS, WIDTH = 2, 12

ROPE = {"use_rot_pos_emb": True}
EVA: dict[str, dict[str, Any]] = {
    "positions-and-average": {},
    "rotary": ROPE,
    "rotary-in-halves-with-registers": {
        **ROPE,
        "rope_type": "dinov3",
        "rope_rotate_half": True,
        "num_reg_tokens": 2,
        "use_abs_pos_emb": False,
        "dynamic_img_size": True,
        "qkv_bias": False,
        "init_values": 0.1,
        "global_pool": "token",
    },
    "rotary-mixed": {
        **ROPE,
        "rope_type": "mixed",
        "rope_grid_indexing": "xy",
        "no_embed_class": True,
        "attn_type": "rope",
        "use_fc_norm": False,
    },
    "rotary-mixed-patches-alone": {**ROPE, "rope_type": "mixed", "class_token": False, "qk_norm": True},
    "rotary-multimodal": {**ROPE, "rope_type": "mrope", "rope_mrope_section": (2, 2, 2)},
    "norm-across-heads": {
        **ROPE,
        "scale_attn_inner": True,
        "swiglu_mlp": True,
        "scale_mlp": True,
        "qkv_fused": False,
        "init_values": 0.1,
    },
    "norm-across-heads-together": {"scale_attn_inner": True, "global_pool": "token", "swiglu_mlp": True},
    "scaled-attention-alone": {"init_values": 0.1, "attn_only_layer_scale": True, "norm_layer": nn.RMSNorm},
}
BEIT: dict[str, dict[str, Any]] = {
    "table-of-each-block": {"use_rel_pos_bias": True, "use_abs_pos_emb": False, "init_values": 0.1},
    "shared-table": {"use_shared_rel_pos_bias": True, "swiglu_mlp": True, "scale_mlp": True},
    "both-tables": {"use_rel_pos_bias": True, "use_shared_rel_pos_bias": True, "global_pool": "token"},
    "no-table": {"qkv_bias": False},
}
RELPOS: dict[str, dict[str, Any]] = {
    "coordinates": {"qk_norm": True, "init_values": 0.1},
    "coordinates-shared": {"shared_rel_pos": True, "fc_norm": True},
    "coordinates-swin": {"rel_pos_type": "mlp_swin", "class_token": True},
    "table": {"rel_pos_type": "bias", "class_token": True, "global_pool": "token"},
}
ALL = {
    f"{kind.__name__}-{name}": partial(micro, kind, **options)
    for kind, table in ((Eva, EVA), (Beit, BEIT), (RelPos, RELPOS))
    for name, options in table.items()
}


# -- independent proof -----------------------------------------------------------------------------


def hooked(module: Any) -> HookedModule:
    """Where these models keep their nodes.

    Of a copy whose biases are added apart, after `qkv` as a module has run, which a hook can be put on.
    """
    module = copy.deepcopy(module)
    senders = {"input": Sender(module.blocks[0], given)}
    receivers = {"logits": Receiver(module.norm, module.norm)}
    for layer, block in enumerate(module.blocks):
        attention = block.attn
        attention.qkv_bias_separate = True
        senders[f"m{layer}"] = Sender(block.mlp, partial(scaled, gamma(block, 2)))
        receivers[f"m{layer}"] = Receiver(block.norm2, block.norm2)
        for head in range(HEADS):
            written = written_by_head(head, WIDTH, gamma(block, 1))
            senders[f"a{layer}.h{head}"] = Sender(attention.proj, written)
            for port, name in enumerate("qkv"):
                together = attention.qkv is not None
                projection = attention.qkv if together else getattr(attention, f"{name}_proj")
                first = (port * HEADS * together + head) * WIDTH
                columns = slice(first, first + WIDTH)
                receivers[f"a{layer}.h{head}<{name}>"] = Receiver(block.norm1, projection, columns)
    return HookedModule(module, senders, receivers)


def gamma(block: Any, number: int) -> Tensor | None:
    own = getattr(block, f"gamma_{number}", None)
    return own if own is not None else getattr(getattr(block, f"ls{number}", None), "gamma", None)


def scaled(factor: Tensor | None, module: nn.Module, inputs: Tensor, output: Tensor) -> Tensor:
    return output if factor is None else output * factor


@pytest.mark.parametrize("build", ALL.values(), ids=ALL)
def test_edges_are_those_of_hooks_on_the_original(build: Any) -> None:
    module = build()
    prove(cv.wrap(module), hooked(module), CLEAN, CORRUPT)


NAMES = (
    "beit_base_patch16_224",
    "beitv2_base_patch16_224",
    "eva_giant_patch14_224",
    "eva02_base_patch16_clip_224",
    "eva02_tiny_patch14_224",
    "vit_pe_core_tiny_patch16_384",
    "vit_pe_spatial_base_patch16_512",
    "vit_relpos_base_patch16_cls_224",
    "vit_relpos_small_patch16_224",
    "vit_small_patch16_dinov3",
    "vit_small_patch16_rope_ape_224",
    "vit_small_patch16_rope_mixed_224",
    "vit_srelpos_small_patch16_224",
)


@pytest.mark.parametrize("name", NAMES)
def test_timms_own_configurations_are_taken_apart(name: str) -> None:
    """All of them are tried by `python -m bench.models_tried`."""
    patch = int(name.partition("patch")[2].partition("_")[0])
    small = {"img_size": 3 * patch, "depth": 2, "embed_dim": 48, "num_heads": 2, "num_classes": 5}
    module = finished(timm.create_model(name, pretrained=False, **small))
    model = cv.wrap(module)
    images = torch.randn(2, *model.preprocessing.size, generator=torch.Generator().manual_seed(5))
    images = images.bfloat16().double()  # which a task keeps as they are
    with torch.no_grad():
        expected = module(images)
        assert_close(summed(model, images), expected)
    assert_close(cv.run(model, cv.Task(images, images, METRIC), cv.Circuit.full(model.graph)), expected)


# -- heads that are normed together ------------------------------------------------------------------


def joint(**options: Any) -> Any:
    return micro(Eva, **ROPE, scale_attn_inner=True, global_pool="token", init_values=0.3, **options)


@pytest.mark.parametrize("groups", [None, "kind"])
def test_circuits_of_heads_that_are_normed_together_run_as_whole_stages_do(groups: str | None) -> None:
    """Cutting a stage to the senders in use leaves the others' part in the norm."""
    model = cv.wrap(joint(num_reg_tokens=1))
    task = cv.Task(CLEAN, CORRUPT, METRIC, groups=groups)
    (run,) = batch_runs(task.prepare(model), len(CLEAN))
    for seed, density in enumerate((0.9, 0.6, 0.4, 0.2)):
        circuit = drawn_circuit(run.sources.graph, density, seed)
        with torch.no_grad():
            whole = soft_run(run.sources, torch.from_numpy(circuit.kept.copy()).double())
        assert_close(cv.run(model, task, circuit), whole)


def test_acdc_on_heads_that_are_normed_together_is_the_literal_one() -> None:
    model = cv.wrap(joint())
    task = cv.Task(CLEAN, CORRUPT, METRIC)
    literal = Literal(model, task)
    distance = literal_acdc.metric_difference(formula)
    kept = literal_acdc.acdc(literal, CLEAN, {}, 0.01, distance)  # type: ignore[arg-type]
    found = cv.acdc(model, task, tau=0.01, divergence="metric", progress=False)
    expected = cv.Circuit.from_edges(model.graph, [name for name, keep in kept.items() if keep])
    assert 0 < len(expected) < model.graph.n_edges
    assert set(found) == set(expected.pruned())


class Literal:
    """A model whose runs are those of whole stages, a stream for every receiver: none is cut or skipped."""

    def __init__(self, model: cv.Model, task: cv.Task) -> None:
        (run,) = batch_runs(task.prepare(model), len(CLEAN))
        self.sources, self.graph = run.sources, run.sources.graph

    def edges(self, groups: Any = None) -> list[tuple[str, str, str, str]]:
        return [("", "", "", name) for name in self.graph.edges]

    def receivers(self) -> list[str]:
        return list(self.graph.receivers)

    def senders_before(self, receiver: str) -> list[str]:
        stage = self.graph.receiver_stages[self.graph.receiver_index[receiver]]
        return list(self.graph.senders[: self.graph.sender_slices[stage].start])

    def groups_at(self, receiver: str, groups: Any = None) -> None:
        return None

    def run(self, clean: Tensor, reference: Any = None, kept: Any = None, groups: Any = None) -> Any:
        mask = torch.zeros(self.graph.shape, dtype=torch.float64)
        for name in self.graph.edges:
            mask[self.graph.edge_index(name)] = float(kept is None or kept[name])
        with torch.no_grad():
            return SimpleNamespace(logits=soft_run(self.sources, mask))


def test_a_pattern_that_is_patched_moves_the_heads_that_are_normed_with_it() -> None:
    """By hand: one head's pattern is exchanged in the module's own attention."""
    module = joint(qkv_fused=False, rope_type="cat")
    model = cv.wrap(module)
    base, other = capture(model, CLEAN), capture(model, CORRUPT)
    tokens = torch.tensor([True, False, True, False, False])
    found = patch_pattern(model, base, other, 3, 1, tokens)
    attention, seen = module.blocks[1].attn, list[Tensor]()
    with torch.no_grad():
        module.blocks[1].attn.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        stage = model.stages[3]
        module(CLEAN)
        mine, theirs = stage.read(base.stream(3)), stage.read(other.stream(3))
        looked = (stage.pattern(theirs) @ mine[2])[:, 1]
        joined = seen[0].clone()
        joined[:, tokens, WIDTH:] = looked[:, tokens]
        stream = base.stream(4) + module.blocks[1].gamma_1 * (
            attention.proj(attention.norm(joined)) - attention.proj(attention.norm(seen[0]))
        )
        expected = model.stages[-1].write(
            model.stages[-1].read(
                model.stages[4].add(stream, model.stages[4].write(model.stages[4].read(stream)))
            )
        )
    assert_close(found, expected)


@pytest.mark.parametrize("build", [joint, ALL["Beit-both-tables"]], ids=["normed-together", "biased"])
def test_views_share_out_what_heads_write(build: Any) -> None:
    model = cv.wrap(build())
    stage = model.stages[1]
    reads = stage.read(model.embed(CLEAN))
    pattern, gain = stage.pattern(reads), stage.gain(reads)
    factor, summand = (1, 0) if gain is None else gain
    assert_close(pattern @ reads[2] * factor + summand, stage.write(reads))
    shares, _ = attribution_of_task(model, cv.Task(CLEAN, CORRUPT, METRIC))
    assert np.allclose(shares.by_source.sum(axis=2), shares.by_token.sum(axis=2))
    assert np.allclose(shares.total, formula(model(CLEAN)).numpy())
    view = attention_patterns(model, CLEAN, layer=0)
    written = (
        stage.expand(stage.write(reads)).norm(dim=-1).transpose(0, 1)
    )  # no longer than its parts together
    assert np.isfinite(view.weighted).all()
    assert (view.weighted.sum(axis=-1) >= written.numpy() - 1e-5).all()
    assert logit_lens(model, CLEAN).subjects.n_prefix == 1


# -- near misses -----------------------------------------------------------------------------------


class Shifted(Eva):  # type: ignore[misc, valid-type]
    """Hands its blocks another table than `_pos_embed` gives."""

    def forward_features(self, x: Tensor, **_: Any) -> Tensor:
        x, rope = self._pos_embed(self.patch_embed(x))
        x = self.norm_pre(x)
        for block in self.blocks:
            x = block(x, rope=rope.roll(1, 0))
        return self.norm(x)  # type: ignore[no-any-return]


class Biased(Beit):  # type: ignore[misc, valid-type]
    """Adds to the scores twice what its table says."""

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x, shared_rel_pos_bias=2 * self.rel_pos_bias())
        return self.norm(x)  # type: ignore[no-any-return]


REFUSED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "another-rotation": (partial(micro, Shifted, **ROPE), ("blocks.0 of Shifted", "differs from its own")),
    "another-bias": (
        partial(micro, Biased, use_shared_rel_pos_bias=True),
        ("blocks.0 of Biased", "differs from its own"),
    ),
    "post-norm": (
        partial(micro, Eva, use_post_norm=True),
        ("blocks.0", "EvaBlockPostNorm", "use_post_norm=True", "no head has an output of its own"),
    ),
    "post-norm-relative": (
        partial(micro, RelPos, block_fn=ResPostRelPosBlock),
        ("blocks.0", "ResPostRelPosBlock", "no head has an output of its own"),
    ),
    "no-pooling": (partial(micro, Beit, global_pool=""), ("global_pool=''",)),
}


@pytest.mark.parametrize(("build", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_nearly_known_is_refused_by_name(build: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        cv.wrap(build())
    for word in words:
        assert word in str(caught.value)


TABLES: dict[str, tuple[Any, Any]] = {
    "rotary": (partial(micro, Eva, **ROPE), lambda module: module.rope.pos_embed),
    "rotary-mixed": (partial(micro, Eva, **ROPE, rope_type="mixed"), lambda module: module.rope.freqs),
    "rotary-dynamic": (partial(micro, Eva, **ROPE, dynamic_img_size=True), lambda module: module.rope.bands),
    "bias-of-queries": (partial(micro, Eva), lambda module: module.blocks[1].attn.q_bias),
    "bias-of-keys": (partial(micro, Eva, **ROPE), lambda module: module.blocks[0].attn.k_bias),
    "table": (
        partial(micro, Beit, use_rel_pos_bias=True),
        lambda module: module.blocks[1].attn.relative_position_bias_table,
    ),
    "shared-table": (
        partial(micro, Beit, use_shared_rel_pos_bias=True),
        lambda module: module.rel_pos_bias.relative_position_bias_table,
    ),
    "coordinates": (partial(micro, RelPos), lambda module: module.blocks[0].attn.rel_pos.mlp.fc2.weight),
    "coordinates-shared": (
        partial(micro, RelPos, shared_rel_pos=True),
        lambda module: module.shared_rel_pos.mlp.fc1.bias,
    ),
    "norm-across-heads": (joint, lambda module: module.blocks[0].attn.norm.weight),
}


@pytest.mark.parametrize("by_data", [False, True], ids=["in-place", "by-data"])
@pytest.mark.parametrize(("build", "tensor_of"), TABLES.values(), ids=TABLES)
def test_an_edit_of_a_table_between_two_calls_is_noticed(build: Any, tensor_of: Any, by_data: bool) -> None:
    module = build()
    model, task = cv.wrap(module), cv.Task(CLEAN, CORRUPT, METRIC)
    before = cv.attribute(model, task, "eap", progress=False).values
    tensor = tensor_of(module)
    with torch.no_grad():
        (tensor.data if by_data else tensor).mul_(0.5).add_(0.3)
    found, anew = (
        cv.attribute(each, task, "eap", progress=False).values for each in (model, cv.wrap(module))
    )
    assert np.allclose(found, anew, rtol=1e-9, atol=1e-12)
    assert not np.allclose(before, found)
    assert_close(cv.run(model, task, cv.Circuit.full(model.graph)), module(CLEAN).detach())


def test_a_table_that_was_exchanged_is_told() -> None:
    module = micro(Eva, **ROPE)
    model = cv.wrap(module)
    module.set_input_size(48)
    with pytest.raises(ModelError, match="wrap the module again"):
        cv.attribute(model, cv.Task(CLEAN, CORRUPT, METRIC), "eap", progress=False)


def test_a_copied_model_turns_by_its_own_table() -> None:
    module = micro(Eva, **ROPE, rope_type="mixed")
    model = cv.wrap(module)
    twin, read = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    expected = capture(model, CLEAN).logits
    with torch.no_grad():
        module.rope.freqs.mul_(2)
    for other in (twin, read):
        assert_close(capture(other, CLEAN).logits, expected)
    assert not torch.allclose(capture(model, CLEAN).logits, expected)


def test_rotations_are_of_one_image_size_and_learned_positions_of_any() -> None:
    images = torch.randn(2, 3, 32, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    learned = micro(Eva, dynamic_img_size=True)
    with torch.no_grad():
        assert_close(capture(cv.wrap(learned), images).logits, learned(images))
    turned = cv.wrap(micro(Eva, **ROPE, dynamic_img_size=True))
    with pytest.raises(DataError, match="32 x 32 pixels, not of 32 x 64"):
        turned.embed(images)
    with pytest.raises(DataError):
        cv.attribute(turned, cv.Task(images, images, METRIC), "eap", progress=False)
    other = micro(Eva, **ROPE, dynamic_img_size=True)
    other.set_input_size((32, 64))
    with torch.no_grad():
        assert_close(capture(cv.wrap(other), images).logits, other(images))


@pytest.mark.parametrize("build", ALL.values(), ids=ALL)
def test_half_precision_and_plain_attention_are_right(build: Any) -> None:
    module = build()
    for block in module.blocks:
        block.attn.fused_attn = False
    with torch.no_grad():
        expected = module(CLEAN)
        assert_close(capture(cv.wrap(module), CLEAN).logits, expected)
        half = module.to(torch.bfloat16)
        found = capture(cv.wrap(half), CLEAN.bfloat16()).logits
        assert_close(found.double(), half(CLEAN.bfloat16()).double(), 0.05)


@pytest.mark.parametrize("build", ALL.values(), ids=ALL)
def test_parts_of_a_stage_write_what_the_whole_stage_writes(build: Any) -> None:
    """Cut to a head, and to the first tokens: with fewer queries than the bias has rows."""
    stage = cv.wrap(build()).stages[1]
    stream = torch.randn(2, 4 + 3, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    stream = stream[:, : cv.wrap(build()).embed(CLEAN).shape[1]]
    compact = stage.write(stage.read(stream))
    whole = stage.expand(compact)
    for part, expected in (
        (stage.restrict([1]), whole[1:]),
        (stage.leading(2), whole[:, :, :2]),
        (stage.restrict([0]).leading(1), whole[:1, :, :1]),
    ):
        reads = part.read(stream)
        written = part.write(reads)
        assert_close(part.expand(written), expected)
        assert_close(part.expand(part.attend(reads, part.pattern(reads))), expected)
        (picked,) = part.pick((compact[..., : written.shape[-2], :],))
        assert_close(part.expand(picked), expected)
        if len(expected) == len(whole):
            assert_close(part.total(written), stage.total(compact)[:, : expected.shape[2]])
        else:
            assert_close(part.total(written), expected[0])

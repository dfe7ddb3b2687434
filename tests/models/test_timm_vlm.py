"""timm's vision encoders of vision-language models, and keys and values that heads share."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import circuitvit as cv
from circuitvit.errors import DataError, UnsupportedModelError
from circuitvit.models.timm_import import import_timm
from tests.models.test_hooked import HEADS, WIDTH, hooked
from tests.reference.hooked import (
    HookedModule,
    Receiver,
    packed_blocks,
)
from tests.rightness import CLEAN, CORRUPT, METRIC, MICRO, finished, prove
from tests.strategies import assert_close

timm = import_timm()
Eva = timm.models.eva.Eva
pytest.importorskip("timm.models.qwen3_vit", reason="timm has these models from 1.0.30 on")
Qwen, QwenEncoder = timm.models.qwen3_vit.Qwen3VitClassifier, timm.models.qwen3_vit.Qwen3VitEncoder
DeepSeek = timm.models.deepseek_vit.DeepseekVitClassifier

MODELS = {
    "qwen": partial(Qwen, pos_embed_grid_size=3),
    "qwen-merged": partial(Qwen, encoder_pool="merge", out_features=10, pos_embed_grid_size=2),
    "qwen-without-norm": partial(Qwen, final_norm=False),
    "deepseek": partial(DeepSeek),
    "deepseek-aligned": partial(DeepSeek, encoder_pool="align", out_features=10),
}


def built(name: str) -> Any:
    """A micro-model whose norms run in its own dtype: finite differences are lost in float32."""
    module = MODELS[name](**{**MICRO, **MODELS[name].keywords})
    for part in list(module.modules()):
        for place, norm in part.named_children():
            if isinstance(norm, timm.layers.RmsNormFp32):
                width, affine = norm.normalized_shape[0], norm.weight is not None
                setattr(part, place, timm.layers.RmsNorm(width, eps=norm.eps, affine=affine))
    return finished(module)


def hooked_encoder(module: Any) -> HookedModule:
    """Where a classifier on an encoder keeps its nodes; what follows the last block reads its output."""
    encoder = module.encoder
    ahead = torch.nn.Identity()  # stands where the readout begins, for a hook to be put on
    encoder.blocks.append(Passing(ahead))
    senders, receivers = packed_blocks(encoder.blocks[:-1], HEADS, WIDTH)
    receivers["logits"] = Receiver(ahead, ahead)
    return HookedModule(module, senders, receivers)


class Passing(torch.nn.Module):
    """A block that adds nothing."""

    def __init__(self, within: torch.nn.Module) -> None:
        super().__init__()
        self.within = within

    def forward(self, x: torch.Tensor, rope: Any = None) -> torch.Tensor:
        return self.within(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", MODELS)
def test_edges_are_those_of_hooks_on_the_original(name: str) -> None:
    model = cv.wrap(built(name))
    prove(model, hooked_encoder(built(name)), CLEAN, CORRUPT)


def test_an_encoder_alone_is_wrapped_where_it_gives_one_vector() -> None:
    options = {name: value for name, value in MICRO.items() if name != "num_classes"}
    module = finished(QwenEncoder(**options, global_pool="avg"))
    model = cv.wrap(module)
    assert not model.has_classes
    assert_close(model(CLEAN), module(CLEAN))
    with pytest.raises(UnsupportedModelError, match="global_pool='merge'"):
        cv.wrap(finished(QwenEncoder(**options, out_features=6)))


def test_what_follows_the_blocks_is_known_where_there_is_no_projector() -> None:
    for name, known in (("qwen", True), ("deepseek", True), ("qwen-merged", False)):
        assert (cv.wrap(built(name)).stages[-1].parts is not None) == known


def test_images_of_another_size_are_refused_as_their_angles_are_not_known() -> None:
    model = cv.wrap(built("deepseek"))
    assert model.grid == (2, 2)
    with pytest.raises(DataError, match="32 x 32"), torch.no_grad():
        model.embed(torch.zeros(1, 3, 64, 64, dtype=torch.float64))


# -- shared keys and values ------------------------------------------------------------------------


def grouped(**options: Any) -> Any:
    kinds = {"attn_type": "rope", "qkv_fused": False, "use_rot_pos_emb": True, "num_kv_heads": (1, 2)}
    return finished(Eva(**{**MICRO, **kinds, **options}))


def ungrouped(module: Any, **options: Any) -> Any:
    """The same model, in which each head has keys and values of its own: copies of those that it shares."""
    twin = grouped(num_kv_heads=None, **options)
    state = module.state_dict()
    for name, tensor in state.items():
        if name.startswith("blocks.0") and ("k_proj" in name or "v_proj" in name):
            state[name] = torch.cat([tensor, tensor])
    twin.load_state_dict(state)
    return twin


@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": True, "scale_attn_inner": True}], ids=["plain", "normed"]
)
def test_shared_keys_and_values_are_a_copy_for_each_head(options: dict[str, Any]) -> None:
    module = grouped(**options)
    twin = ungrouped(module, **options)
    with torch.no_grad():
        assert_close(twin(CLEAN), module(CLEAN))
    plain = hooked_apart(twin)
    prove(cv.wrap(module), plain, CLEAN, CORRUPT)


def hooked_apart(module: Any) -> HookedModule:
    """Where a model with projections apart keeps its nodes."""
    for block in module.blocks:
        block.ls1 = block.ls2 = block.mlp  # EVA has factors in place of LayerScale
        block.attn.qkv = block.attn.q_proj
    found = hooked(module)
    receivers = dict(found.receivers)
    for layer, block in enumerate(module.blocks):
        block.attn.qkv = None
        for head in range(HEADS):
            for name in "qkv":
                columns = slice(head * WIDTH, (head + 1) * WIDTH)
                projection = getattr(block.attn, f"{name}_proj")
                receivers[f"a{layer}.h{head}<{name}>"] = Receiver(block.norm1, projection, columns)
    return HookedModule(module, found.senders, receivers)


def test_an_edit_of_shared_keys_is_seen_by_all_heads() -> None:
    module = grouped()
    model, task = cv.wrap(module), cv.Task(CLEAN, CORRUPT, METRIC)
    before = cv.attribute(model, task, "eap").values
    with torch.no_grad():
        module.blocks[0].attn.k_proj.weight.mul_(-0.5)
    after = cv.attribute(model, task, "eap").values
    assert after == pytest.approx(cv.attribute(cv.wrap(module), task, "eap").values, abs=1e-12)
    assert after != pytest.approx(before, abs=1e-6)

"""timm's `NaFlexVit`, and images and patches of other shapes than squares."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import circuitvit as cv
from circuitvit.errors import DataError, UnsupportedModelError
from circuitvit.models.timm_import import import_timm
from circuitvit.models.zoo import InputSpec
from tests.models import test_pooling
from tests.models.test_hooked import HEADS, WIDTH, hooked
from tests.reference.hooked import HookedModule, Receiver, Sender, given, gives, written_by_head
from tests.rightness import CLASSES, CLEAN, CORRUPT, METRIC, MICRO, finished, micro, prove
from tests.strategies import assert_close

timm = import_timm()
NaFlexVit = timm.models.naflexvit.NaFlexVit

SIZED = {name: value for name, value in MICRO.items() if name != "img_size"}
SPEC = InputSpec((3, 32, 32), (0.5,) * 3, (0.5,) * 3)


def drawn(n: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Images, exact in the float32 that a task keeps them in."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, height, width, generator=generator).double()


def naflex(**options: Any) -> Any:
    defaults = {"pos_embed_grid_size": (3, 3), "global_pool": "avg"}
    return finished(NaFlexVit(**{**SIZED, **defaults, **options}))


@pytest.mark.parametrize(
    "options",
    [
        {"class_token": True, "reg_tokens": 2, "global_pool": "token", "init_values": 0.1},
        {"pos_embed": "factorized", "pos_embed_ar_preserving": True, "qk_norm": True},
        {"embed_proj_type": "conv", "pre_norm": True, "reg_tokens": 1, "final_norm": False},
        {"patch_size": (16, 8), "patchify_channels_last": False, "pos_embed": "none"},
    ],
    ids=["tokens", "factorised", "convolution", "oblong"],
)
def test_edges_are_those_of_hooks_on_the_original(options: dict[str, Any]) -> None:
    module = naflex(**options)
    prove(cv.wrap(module, preprocessing=SPEC), hooked(module), CLEAN, CORRUPT)


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "token"])
@pytest.mark.parametrize("include_prefix", [False, True])
def test_poolings_are_made_linear_for_direct_attribution(pool: str, include_prefix: bool) -> None:
    module = naflex(class_token=True, global_pool=pool, pool_include_prefix=include_prefix)
    model = cv.wrap(module, preprocessing=SPEC)
    assert model.stages[-1].parts is not None
    stream = model.embed(CLEAN)
    assert_close(model.stages[-1].parts(stream), module.forward_head(module.norm(stream)))


def test_tokens_have_their_kinds_and_their_grid() -> None:
    module = naflex(class_token=True, reg_tokens=2)
    model = cv.wrap(module, preprocessing=SPEC)
    assert model.prefix == ("cls", "reg", "reg")
    assert model.grid == (2, 2)
    assert model.grid_at(64, 32) == (4, 2)


def test_a_named_model_knows_its_own_size() -> None:
    module = timm.create_model("naflexvit_base_patch16_gap", depth=1, embed_dim=24, num_heads=2).eval()
    model = cv.wrap(module)
    assert model.preprocessing.size == (3, 384, 384)
    assert model.grid == (24, 24)
    assert model.name == "naflexvit_base_patch16_gap"


def test_images_of_any_shape_are_run_and_scored() -> None:
    module = naflex(class_token=True)
    model = cv.wrap(module, preprocessing=SPEC)
    clean, corrupt = drawn(1, 48, 16, seed=0), drawn(1, 48, 16, seed=1)
    task = cv.Task(clean, corrupt, METRIC)
    assert_close(cv.run(model, task, cv.Circuit.full(model.graph)), module(clean))
    assert_close(cv.run(model, task, cv.Circuit.empty(model.graph)), module(corrupt))
    own = cv.wrap(module, preprocessing=InputSpec((3, 48, 16), (0.5,) * 3, (0.5,) * 3))
    scores, same = (cv.attribute(each, task, "eap").values for each in (model, own))
    assert scores == pytest.approx(same, abs=1e-12)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_images_are_padded_where_the_module_pads_them(kind: str) -> None:
    padded = cv.wrap(naflex(dynamic_img_pad=True, embed_proj_type=kind), preprocessing=SPEC)
    assert padded.grid_at(33, 40) == (3, 3)
    plain = cv.wrap(naflex(embed_proj_type="linear"), preprocessing=SPEC)
    with pytest.raises(DataError, match="33 x 40"):
        plain.grid_at(33, 40)


@pytest.mark.parametrize("include_prefix", [False, True])
def test_edges_of_attention_pooling_are_those_of_hooks_on_the_original(include_prefix: bool) -> None:
    module = naflex(global_pool="map", reg_tokens=1, pool_include_prefix=include_prefix)
    model = cv.wrap(module, preprocessing=SPEC)
    original = copy.deepcopy(module)
    original.num_prefix_tokens *= not include_prefix  # what the hooks leave out of the pool
    prove(model, test_pooling.hooked(original), CLEAN, CORRUPT)


def test_no_pooling_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="global_pool=''"):
        cv.wrap(naflex(global_pool=""), preprocessing=SPEC)


# -- timm's VisionTransformer ----------------------------------------------------------------------


def test_oblong_images_and_patches() -> None:
    module = micro(img_size=(48, 16), patch_size=(16, 8), num_classes=CLASSES)
    model = cv.wrap(module)
    assert model.preprocessing.size == (3, 48, 16)
    assert model.grid == (3, 2)
    clean, corrupt = drawn(2, 48, 16, seed=0), drawn(2, 48, 16, seed=1)
    prove(model, hooked(module), clean, corrupt)


def test_images_that_timm_pads_have_the_grid_of_what_is_run() -> None:
    module = micro(img_size=40, dynamic_img_size=True, dynamic_img_pad=True)
    model = cv.wrap(module)
    assert model.grid == (3, 3)
    assert model.grid_at(17, 33) == (2, 3)
    clean = drawn(2, 17, 33)
    task = cv.Task(clean, metric=METRIC, ablation="zero")
    assert_close(cv.run(model, task, cv.Circuit.full(model.graph)), module(clean))


# -- what EVA's blocks bring -----------------------------------------------------------------------


def turning(**options: Any) -> Any:
    """One that knows the size of its images, as rotations ask for."""
    module = NaFlexVit(
        **{**SIZED, "pos_embed_grid_size": None, "global_pool": "avg", "rope_type": "axial", **options},
        img_size=32,
    )
    return finished(module)


@pytest.mark.parametrize(
    "options",
    [
        {"rope_type": "axial", "class_token": True, "attn_gated": True},
        {"rope_type": "mixed", "pos_embed": "none", "swiglu_mlp": True},
        {"rope_type": "dinov3", "rope_rotate_half": True, "num_kv_heads": 2, "qkv_fused": False},
    ],
    ids=["gated", "learned", "apart"],
)
def test_rotary_and_gated_edges_are_those_of_hooks_on_the_original(options: dict[str, Any]) -> None:
    module = turning(**options)
    model = cv.wrap(module)
    assert model.preprocessing.size == (3, 32, 32)
    prove(model, hooked_eva(module), CLEAN, CORRUPT)


def hooked_eva(module: Any) -> HookedModule:
    """Where EVA's blocks keep their nodes."""
    senders = {"input": Sender(module.blocks[0], given)}
    receivers = {"logits": Receiver(module.norm, module.norm)}
    for layer, block in enumerate(module.blocks):
        attention = block.attn
        senders[f"m{layer}"] = Sender(block.mlp, gives)
        receivers[f"m{layer}"] = Receiver(block.norm2, block.norm2)
        for head in range(HEADS):
            senders[f"a{layer}.h{head}"] = Sender(attention.proj, written_by_head(head, WIDTH))
            for port, name in enumerate("qkv" if attention.gate is None else "qkvg"):
                together = attention.qkv is not None and name != "g"
                projection = attention.gate if name == "g" else attention.qkv
                projection = projection or getattr(attention, f"{name}_proj")
                first = (port * HEADS * together + head) * WIDTH
                columns = slice(first, first + WIDTH)
                receivers[f"a{layer}.h{head}<{name}>"] = Receiver(block.norm1, projection, columns)
    return HookedModule(module, senders, receivers)


def test_rotations_are_of_one_size_which_the_module_has_to_say() -> None:
    with pytest.raises(UnsupportedModelError, match="pos_embed_grid_size=None"):
        cv.wrap(naflex(rope_type="axial"), preprocessing=SPEC)
    with pytest.raises(DataError, match="32 x 32 pixels, not of 48 x 48"):
        cv.wrap(turning()).embed(drawn(1, 48, 48))

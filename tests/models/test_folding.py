"""Edited models taken home: against hooks on the original module, for every family."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import circuitvit as cv
from circuitvit.errors import ModelError, UnsupportedModelError
from circuitvit.models import folding
from tests.families import FAMILIES, made
from tests.models import test_gated, test_hf_vit
from tests.rightness import CLEAN, micro
from tests.strategies import assert_close

HOOKLESS = "transformers, timesformer"
"""Whose heads no hook sees as they are: their tokens are grouped."""


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def site(model: cv.Model, kind: str, place: int = 0) -> cv.models.Site:
    return [each for each in model.all_sites if each.kind == kind][place]


def always(constant: Tensor | float, number: int | None = None) -> Callable[[Tensor], Tensor]:
    """A site exchanged, or one number of it, literally."""

    def change(value: Tensor) -> Tensor:
        changed = value.clone()
        changed[..., slice(None) if number is None else number] = constant
        return changed

    return change


@cache
def scaled() -> cv.Model:
    """A model with LayerScale, for tests that do not change it."""
    return cv.wrap(micro(init_values=0.3))


# -- equal outputs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folded_module_computes_what_hooks_on_the_original_do(name: str) -> None:
    model, original = made(name)
    head, neurons, mlp = site(model, "z"), site(model, "hidden"), site(model, "hidden", 1).node
    written = drawn(model.d_model, seed=1)
    edits: dict[str, Any] = {f"{neurons.name}[3]": 0.7, mlp: written}
    changes = {neurons.name: always(0.7, 3), mlp: always(written)}
    if name != HOOKLESS:
        edits[head.name] = mixed = drawn(head.shape[-1])
        changes[head.name] = always(mixed)
    edited, images = model.edit(edits), FAMILIES[name].images()
    module = edited.to_module()
    with torch.no_grad():
        found, before = model.family.run(module, images), model(images)
        assert_close(found, edited(images))
        assert_close(found, original.edited(changes).run(images))
    assert not torch.allclose(found, before, atol=1e-3), "the edits do something"
    assert type(module) is type(model.module)
    assert module.state_dict().keys() == model.module.state_dict().keys()


@pytest.mark.parametrize(
    "edits",
    [
        {"a1.h0": drawn(24), "a1.h1.z": drawn(12)},
        {"a1.h0.z": drawn(12), "a1.h0": drawn(24, seed=1)},
        {"a1.h0": drawn(24), "a1.h0.z": drawn(12)},
        {"a1.h0.z": drawn(12), "a1.h0[5]": 0.4, "a1.h0.z[2]": -1},
        {"m0": torch.tensor(0.5), "m0[3]": drawn(1)},
        {"m0.hidden": drawn(1, 48), "m0.hidden[7]": 2, "m0[2]": 0},
        {"a0.*.z": 0, "m*.hidden": 0},
        {"a0.h0.z@cls+patch": drawn(12)},
    ],
)
def test_edits_of_one_node_hold_in_their_order(edits: dict[str, Any]) -> None:
    edited = scaled().edit(edits)
    assert_close(edited.to_module()(CLEAN), edited(CLEAN))


def test_its_weights_load_into_another_module_of_the_library() -> None:
    edited = scaled().edit({"a0.h1.z": drawn(12), "m1.hidden": drawn(48)})
    other = micro(init_values=0.1)
    other.load_state_dict(edited.to_module().state_dict())
    assert_close(other(CLEAN), edited(CLEAN))


def test_a_projection_without_a_bias_gets_one_if_it_has_to_write_something() -> None:
    model = cv.wrap(micro(proj_bias=False))
    constant, nothing = model.edit({"a0.h1.z": drawn(12)}), model.edit({"a0.h1.z": 0})
    assert_close(constant.to_module()(CLEAN), constant(CLEAN))
    assert "blocks.0.attn.proj.bias" in constant.to_module().state_dict()
    assert "blocks.0.attn.proj.bias" not in nothing.to_module().state_dict()


def test_the_module_is_a_copy_that_can_be_trained_and_the_original_stays() -> None:
    module = micro()
    before, model = copy.deepcopy(module.state_dict()), cv.wrap(module)
    plain = model.to_module()
    assert torch.equal(plain(CLEAN), module(CLEAN))
    plain(CLEAN).sum().backward()
    assert all(parameter.grad is not None for parameter in plain.parameters())
    model.edit({"m0": 1}).to_module()
    assert all(torch.equal(now, before[name]) for name, now in module.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_are_equal_to_their_rounding(dtype: torch.dtype) -> None:
    model = cv.wrap(micro().to(dtype)).edit({"a1.h0.z": drawn(12), "m0.hidden[3]": 0.3})
    assert_close(model.to_module()(CLEAN.to(dtype)), model(CLEAN.to(dtype)), 8 * torch.finfo(dtype).eps)


def test_a_head_on_the_features_comes_along() -> None:
    model = cv.with_head(cv.wrap(micro(num_classes=0)), drawn(3, 24), drawn(3)).edit({"a1.h0.z": drawn(12)})
    module = model.to_module()
    assert_close(module(CLEAN), model(CLEAN))
    assert {name.partition(".")[0] for name in module.state_dict()} == {"body", "head"}


def test_prompts_come_along_as_a_head() -> None:
    model = cv.load("clip-tiny").with_prompts(["a cat", "a dog"]).edit({"a0.h0.z": 0.1, "m1.hidden[3]": 1})
    images = torch.randn(2, *model.preprocessing.shape, generator=torch.Generator().manual_seed(0))
    assert_close(model.to_module()(images), model(images), 1e-5)


# -- smaller ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "edits", "gone"),
    [
        (micro, {"a0.h1.z": drawn(12), "m1.hidden[3]": 0.5}, 12 * (4 * 24 + 3) + (2 * 24 + 1)),
        (test_gated.gated, {"a1.h0": drawn(24)}, 12 * (5 * 24 + 4)),
        (micro, {"a0.*.z": 0, "m0": drawn(24)}, 12 * (4 * 24 + 3) + 47 * (2 * 24 + 1)),
        (
            partial(test_hf_vit.micro, "dinov2, swiglu"),
            {"a0.h1.z": 1, "m0.hidden[3]": 1},
            12 * 99 + 24 * 3 + 2,
        ),
    ],
    ids=["timm", "gated", "all of them", "transformers, SwiGLU"],
)
def test_what_nothing_is_left_of_can_be_taken_out(module: Any, edits: dict[str, Any], gone: int) -> None:
    model = cv.wrap(module())
    edited = model.edit(edits)
    small = edited.to_module(shrink=True)
    sizes = [sum(each.numel() for each in one.parameters()) for one in (model.module, small)]
    assert sizes[0] - sizes[1] == gone
    again = cv.wrap(small)
    assert_close(again(CLEAN), edited(CLEAN))
    assert len(again.graph.nodes) <= len(model.graph.nodes)
    assert [each.shape for each in again.to_module(shrink=True).parameters()] == [
        each.shape for each in small.parameters()
    ]


@pytest.mark.parametrize(
    ("name", "edits", "why"),
    [
        ("open_clip", {"a1.h0.z": 0}, "a1.h0 cannot be taken out of attn1.*one number of heads"),
        ("timm, relative", {"a1.h0.z": 0}, "a1.h0.*one table for all heads"),
        ("timm, gated and normed together", {"a1.h0.z": 0}, "a1.h0.*normed together"),
        ("timm, norm across heads", {"m1.hidden[0]": 0}, "m1.*a norm reads all of them"),
        ("timm, parallel and fused", {"m1.hidden[0]": 0}, "m1.*hold more than neurons"),
    ],
)
def test_what_cannot_be_smaller_is_named(name: str, edits: dict[str, Any], why: str) -> None:
    with pytest.raises(UnsupportedModelError, match=why):
        made(name)[0].edit(edits).to_module(shrink=True)


# -- what is no constant ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edits", "why"),
    [
        ({"a0.h0.z": 0, "m0": lambda x: x / 2}, "m0.*is no constant, but a function"),
        ({"m1": cv.add(drawn(24))}, "m1.*Add is no constant"),
        ({"a1.h0.z@cls": 0}, "a1.h0.z.*holds at some tokens"),
        ({"m0": drawn(5, 24)}, "m0.*values for each token or image"),
        ({"a0.h1.z": drawn(2, 5, 12)}, "a0.h1.z.*values for each token or image"),
        ({"resid1": 0}, "resid1 cannot be folded"),
        ({"input": 0}, "input cannot be folded"),
        ({"a0.h0.pattern": 0.2}, "a0.h0.pattern cannot be folded"),
        ({"a0.h0<q>": 0}, "a0.h0<q> cannot be folded"),
        ({"logits": 0}, "logits cannot be folded"),
    ],
)
def test_an_edit_that_weights_cannot_hold_is_named_before_anything_is_copied(
    edits: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    edited = scaled().edit(edits)
    monkeypatch.setattr(folding.copy, "deepcopy", None)
    with pytest.raises(UnsupportedModelError, match=why):
        cv.to_module(edited)


def test_models_that_no_module_is_like_are_named() -> None:
    refined = cv.refine_nodes(made("timm")[0], {"m0": cv.neurons([1, 2])})
    with pytest.raises(UnsupportedModelError, match=r"refined.*m0"):
        refined.to_module()
    headed = cv.with_head(made("timm")[0], drawn(3, 24), tokens="mean")
    with pytest.raises(UnsupportedModelError, match="fold the edits of the model under it"):
        headed.edit({"m0": 0}).to_module()
    with pytest.raises(UnsupportedModelError, match=r"t0\.h0.*Hold t0\.h0\.z"):
        made(HOOKLESS)[0].edit({"t0.h0": 1}).to_module()


def test_a_scale_of_zero_lets_nothing_be_written() -> None:
    module = micro(init_values=0.1)
    nn.init.zeros_(module.blocks[0].ls2.gamma)
    model = cv.wrap(module)
    silent = model.edit({"m0": 0})
    assert_close(silent.to_module()(CLEAN), silent(CLEAN))
    with pytest.raises(UnsupportedModelError, match="LayerScale is 0"):
        model.edit({"m0": 1}).to_module()


def test_a_weight_that_two_blocks_share_is_found_out() -> None:
    module = micro()
    module.blocks[1].attn.proj.weight = module.blocks[0].attn.proj.weight
    with pytest.raises(UnsupportedModelError, match="used in more than one place"):
        cv.wrap(module).edit({"a0.h0.z": 0}).to_module()


def test_a_model_that_gives_no_numbers_is_said_to() -> None:
    module = micro()
    edited = cv.wrap(module).edit({"m0": 0})
    nn.init.constant_(module.head.weight, float("nan"))
    with pytest.raises(ModelError, match="NaN or infinite logits"):
        edited.to_module()

"""Silent wrong answers that were seen, each as a test: a module is taken apart rightly or refused by name.

What is right is said by `tests/reference`: `LiteralViT` writes the formulas down again, `ModuleViT` calls the
module's own parts one stream at a time. Models are micro-models in float64 with weights of order 1.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import circuitvit as cv
from circuitvit.errors import CircuitViTError, ModelError, OptionError, UnsupportedModelError
from circuitvit.models.timm_import import import_timm
from tests.reference import literal_scores
from tests.reference.literal_methods import InteractionViT, RelevanceViT
from tests.reference.literal_module import ModuleViT
from tests.reference.literal_vit import LiteralViT
from tests.rightness import (
    CLEAN,
    CORRUPT,
    MICRO,
    VisionTransformer,
    assert_right,
    assert_right_or_refused,
    assert_same_runs_and_scores,
    drawn_circuit,
    finished,
    formula,
    micro,
    scored,
    some_edges,
    task_of,
    wrapped_or_told,
)
from tests.strategies import assert_close, assert_same_scores, scramble

timm = import_timm()
Block = timm.models.vision_transformer.Block
layers = timm.layers


# -- what the readout reads ------------------------------------------------------------------------


class PoolsPatches(VisionTransformer):  # type: ignore[misc, valid-type]
    """Says `global_pool="token"` and averages the patches."""

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        return x[:, self.num_prefix_tokens :].mean(dim=1)


class PoolsOnePatch(VisionTransformer):  # type: ignore[misc, valid-type]
    """Reads one token, which is not the first."""

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        return x[:, -1]


class PoolsGeM(VisionTransformer):  # type: ignore[misc, valid-type]
    """The generalised mean of all tokens."""

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        return x.clamp_min(1e-3).pow(3).mean(dim=1).pow(1 / 3)


class HeadGeM(VisionTransformer):  # type: ignore[misc, valid-type]
    """The same, in a `forward_head` of its own."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = x[:, 1:].clamp_min(1e-3).pow(3).mean(dim=1).pow(1 / 3)
        return pooled if pre_logits else self.head(pooled)


class ClassAndMean(VisionTransformer):  # type: ignore[misc, valid-type]
    """`cat[cls, mean(patches)]`, as probes on DINOv2 have it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.head = nn.Linear(2 * self.embed_dim, self.num_classes)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        return torch.cat([x[:, 0], x[:, self.num_prefix_tokens :].mean(dim=1)], dim=-1)


class AddsMean(VisionTransformer):  # type: ignore[misc, valid-type]
    """Reads the class token, and a trace of the others."""

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        return x[:, 0] + 0.01 * x[:, 1:].mean(dim=1)


READOUTS = {
    "pool-of-patches": PoolsPatches,
    "pool-of-one-patch": PoolsOnePatch,
    "gem": PoolsGeM,
    "gem-in-forward-head": HeadGeM,
    "class-and-mean": ClassAndMean,
    "a-trace-of-the-mean": AddsMean,
}


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("family", READOUTS.values(), ids=READOUTS)
def test_what_the_readout_reads_is_found_out(family: type, registers: int) -> None:
    """These are all stages and a readout, so there is no reason to refuse them."""
    assert_right_or_refused(micro(family, reg_tokens=registers), refusable=False)


@pytest.mark.parametrize("pool", ["token", "avg", "max", "avgmax"])
def test_known_poolings_stay_right(pool: str) -> None:
    assert_right_or_refused(micro(global_pool=pool, reg_tokens=1), refusable=False)


def mixed(x: Tensor) -> Tensor:
    return x + 0.3 * x.mean(dim=1, keepdim=True)


def test_a_hook_on_the_final_norm_that_mixes_tokens_is_right_or_refused() -> None:
    module = micro()
    module.norm.register_forward_hook(lambda _module, _inputs, output: mixed(output))
    assert_right_or_refused(module, ("norm",))


class MixingNorm(nn.LayerNorm):
    """A final norm that lets tokens see each other."""

    def forward(self, x: Tensor) -> Tensor:
        return mixed(super().forward(x)) if x.ndim == 3 else super().forward(x)


@pytest.mark.parametrize("place", ["norm", "norm_pre", "blocks.0.norm2"])
def test_a_norm_that_mixes_tokens_is_right_or_refused(place: str) -> None:
    """Before the first block anything may be mixed; before an MLP a norm that does is none that is known."""
    module = micro()
    module.set_submodule(place, MixingNorm(24))
    assert_right_or_refused(finished(module), (place,))


class SoftMixture(nn.Module):
    """A soft mixture of experts: every slot is an average of tokens, every token one of slots.

    Puigcerver et al. 2023, arXiv:2308.00951.
    """

    def __init__(self, in_features: int, hidden_features: int, **_: Any) -> None:
        super().__init__()
        self.phi = nn.Linear(in_features, 4, bias=False)
        self.experts = nn.ModuleList(layers.Mlp(in_features, hidden_features) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.phi(x)
        slots = scores.softmax(dim=1).transpose(1, 2) @ x
        done = torch.cat(
            [expert(part) for expert, part in zip(self.experts, slots.chunk(2, 1), strict=True)], 1
        )
        mixture: Tensor = scores.softmax(dim=-1) @ done
        return mixture


class Mixer(nn.Module):
    """Adds to each token a hundredth of the token before it."""

    def __init__(self, in_features: int, hidden_features: int, **_: Any) -> None:
        super().__init__()
        self.inner = layers.Mlp(in_features, hidden_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + 0.01 * x.roll(1, dims=1))


@pytest.mark.parametrize("mlp", [SoftMixture, Mixer])
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_an_mlp_that_mixes_tokens_is_right_or_refused(mlp: type, pool: str) -> None:
    assert_right_or_refused(micro(mlp_layer=mlp, global_pool=pool), ("blocks.0.mlp",))


def test_an_mlp_that_mixes_images_is_refused() -> None:
    """With statistics over the batch the answer would depend on who else is in it."""

    class OverTheBatch(Mixer):
        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x - x.mean(dim=0))

    with pytest.raises(UnsupportedModelError, match=r"blocks\.0\.mlp"):
        cv.wrap(micro(mlp_layer=OverTheBatch))


# -- weights that are edited in place --------------------------------------------------------------


def scaled(name: str) -> Callable[[Any], None]:
    def edit(module: Any) -> None:
        with torch.no_grad():
            module.get_parameter(name).mul_(1.7)

    return edit


def loaded(module: Any) -> None:
    other = copy.deepcopy(module)
    scramble(other, seed=77, gain=1.0)
    module.load_state_dict(other.state_dict())


def stepped(module: Any) -> None:
    """A step of training, as a user takes it between two looks at the circuit."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    F.cross_entropy(module(CLEAN), torch.tensor([0, 1])).backward()
    optimizer.step()
    optimizer.zero_grad()


EDITED = (
    "blocks.0.attn.qkv.weight",
    "blocks.0.attn.qkv.bias",
    "blocks.0.attn.proj.weight",
    "blocks.0.attn.proj.bias",
    "blocks.0.norm1.weight",
    "blocks.0.norm1.bias",
    "blocks.0.ls1.gamma",
    "blocks.1.attn.q_norm.weight",
    "blocks.1.norm2.weight",
    "blocks.1.mlp.fc2.weight",
    "blocks.1.ls2.gamma",
    "norm.weight",
    "head.weight",
    "pos_embed",
)
EDITS: dict[str, Callable[[Any], None]] = {
    **{name: scaled(name) for name in EDITED},
    "load_state_dict": loaded,
    "a-step-of-training": stepped,
}


def answers(model: cv.Model) -> dict[str, Any]:
    """Everything that derives from weights."""
    small = drawn_circuit(model.graph, 0.25, seed=3)
    found: dict[str, Any] = {method: scored(model, method) for method in ("eap", "local", "exact")}
    return found | {"run": cv.run(model, task_of(), small), "hash": model.weights_hash}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_weights_that_are_edited_in_place_count_from_then_on(edit: Callable[[Any], None]) -> None:
    module = micro(init_values=0.5, qk_norm=True)
    model = cv.wrap(module)
    before = answers(model)
    edit(module)
    found, fresh = answers(model), answers(cv.wrap(module))
    assert float((fresh["run"] - before["run"]).abs().max()) > 1e-6  # the edit is one that shows
    assert_close(found["run"], fresh["run"])
    for method in ("eap", "local", "exact"):
        assert_same_scores(found[method], fresh[method])
    assert found["hash"] == fresh["hash"] != before["hash"]


def test_also_in_a_model_with_backward_rules_and_in_a_task_prepared_before() -> None:
    module = micro(init_values=0.5)
    model = cv.wrap(module)
    for method in ("relp", "gim", "eap-ig", "atp-qk"):
        scored(model, method)
    scaled("blocks.0.norm1.weight")(module)
    scaled("blocks.1.attn.proj.weight")(module)
    for method in ("relp", "gim", "eap-ig", "atp-qk"):
        assert_same_scores(scored(model, method), scored(cv.wrap(module), method))


# -- half precision --------------------------------------------------------------------------------


def with_massive_channels(value: float, norm: type = nn.LayerNorm) -> Any:
    """A model with two channels far above the others, as large ViTs grow them in their middle layers."""
    module = micro(norm_layer=norm, embed_dim=48, num_heads=3)
    with torch.no_grad():
        module.pos_embed[..., 5] += value
        module.pos_embed[..., 17] -= value
        module.patch_embed.proj.weight[[5, 17]] *= 10  # and what is there differs from image to image
    return module


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm], ids=["layer", "rms"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [0.0, 400.0])
def test_statistics_of_norms_do_not_overflow(value: float, dtype: torch.dtype, norm: type) -> None:
    """400 squared is beyond the largest number of float16, 65,504; to bfloat16 it is but coarse."""
    narrow = with_massive_channels(value, norm).to(dtype)
    wide = copy.deepcopy(narrow).float()
    with torch.no_grad():
        assert narrow(CLEAN.to(dtype)).isfinite().all()
    model, exact = cv.wrap(narrow), cv.wrap(wide)
    found, told = (np.array(list(scored(each, "eap").values())) for each in (model, exact))
    assert np.corrcoef(found, told)[0, 1] >= 0.95
    assert np.isfinite(list(scored(model, "local").values())).all()
    circuit = drawn_circuit(model.graph, 0.5)
    logits, told_logits = cv.run(model, task_of(), circuit), cv.run(exact, task_of(), circuit)
    assert (logits.float() - told_logits).abs().max() <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("mean", [0.0, 30.0, 1000.0])
def test_a_mean_far_above_the_deviation_costs_no_digits(mean: float) -> None:
    """The variance is not the difference of two large numbers: its square root keeps to 1e-5."""
    module = micro().float()
    with torch.no_grad():
        module.blocks[0].norm1.bias.zero_()
        module.blocks[0].attn.qkv.bias.zero_()
    stage = cv.wrap(module).stages[1]
    stream = mean + torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    n_receivers = len(stage.nodes.receivers)
    streams = stream.expand(n_receivers, *stream.shape).contiguous()
    found = torch.cat(stage.read_each(streams, range(n_receivers)), dim=1).double()
    with torch.no_grad():
        normed = copy.deepcopy(module.blocks[0].norm1).double()(stream.double())
        told = normed @ module.blocks[0].attn.qkv.weight.double().t()
    told = told.unflatten(-1, (n_receivers, -1)).transpose(1, 2)
    # Each token's scale is what fits found to told best; noise of single products does not move it far.
    scale = (found * told).sum(dim=(1, 3)) / told.square().sum(dim=(1, 3))
    assert (scale - 1).abs().max() <= (1e-5 if mean < 100 else 5e-5)  # at 1,000 the module itself has 2e-5
    assert (found - told).abs().max() <= 3e-4 * told.abs().max()


def test_a_masked_run_keeps_its_digits_where_the_mean_is_far_above_the_deviation() -> None:
    module = micro()
    with torch.no_grad():
        module.pos_embed += 1000.0
    narrow = copy.deepcopy(module).float()
    literal, model = LiteralViT(module), cv.wrap(narrow)
    reference = literal_scores.patch_reference(literal, CORRUPT)
    circuit = drawn_circuit(model.graph, 0.7)
    told = literal.run(CLEAN, reference, lambda name: name in frozenset(circuit)).logits
    with torch.no_grad():
        own = float((narrow(CLEAN.float()) - module(CLEAN)).abs().max())  # what float32 costs the module
    assert float((cv.run(model, task_of(), circuit) - told).abs().max()) <= 5 * own + 1e-5


# -- MLPs ------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    """A user's own, of timm's name and parts, with a residual connection inside."""

    def __init__(self, in_features: int, hidden_features: int, **_: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.act(self.fc1(x)))


class TwiceTheHidden(layers.Mlp):  # type: ignore[misc, name-defined]
    """A subclass of timm's with a forward of its own, called by its name."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(2 * self.act(self.fc1(x)) + 1)


TwiceTheHidden.__name__ = "Mlp"


class SquashedOutput(nn.Linear):
    """A Linear by its class, and not by what it does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


def with_squashed_output(**options: Any) -> nn.Module:
    mlp = layers.Mlp(options["in_features"], options["hidden_features"])
    mlp.fc2 = SquashedOutput(options["hidden_features"], options["in_features"])
    return mlp


@pytest.mark.parametrize("mlp", [Mlp, TwiceTheHidden, with_squashed_output])
def test_an_mlp_is_known_by_what_it_does_not_by_its_name(mlp: Any) -> None:
    assert_right_or_refused(micro(mlp_layer=mlp), ("blocks.0.mlp",))


@pytest.mark.parametrize("place", ["fc1", "act", "fc2", "drop2", ""])
def test_a_hook_inside_an_mlp_is_right_or_refused(place: str) -> None:
    module = micro()
    part = module.blocks[0].mlp.get_submodule(place)
    part.register_forward_hook(lambda _module, _inputs, output: output.tanh() + 0.5)
    assert_right_or_refused(module, (f"blocks.0.mlp.{place}".rstrip("."),))


KNOWN_GATES = {
    "glu": layers.GluMlp,
    "swiglu": lambda act_layer=None, **options: layers.SwiGLU(**options),
    "swiglu-packed": lambda act_layer=None, **options: layers.SwiGLUPacked(**options),
    "plain": layers.Mlp,
}


@pytest.mark.parametrize(("method", "family"), [("relp", RelevanceViT), ("gim", InteractionViT)])
@pytest.mark.parametrize("mlp", KNOWN_GATES.values(), ids=KNOWN_GATES)
def test_backward_rules_reach_the_gates_of_known_mlps(mlp: Any, method: str, family: type) -> None:
    module = micro(mlp_layer=mlp, act_layer=nn.Sigmoid if mlp is layers.GluMlp else None)
    reference = literal_scores.patch_reference(LiteralViT(module), CORRUPT)
    told = literal_scores.eap(family(module), CLEAN, reference, formula)
    assert_same_scores(scored(cv.wrap(module), method), told)


def unknown_gates() -> Any:
    return micro(mlp_layer=timm.models.vitamin.GeGluMlp, act_layer="gelu")


class OwnGate(nn.Module):
    """A gated MLP of the user's own."""

    def __init__(self, in_features: int, hidden_features: int, **_: Any) -> None:
        super().__init__()
        self.up = nn.Linear(in_features, hidden_features)
        self.gate = nn.Linear(in_features, hidden_features)
        self.down = nn.Linear(hidden_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("method", ["relp", "gim"])
@pytest.mark.parametrize(
    ("kind", "build"), [("GeGluMlp", unknown_gates), ("OwnGate", partial(micro, mlp_layer=OwnGate))]
)
def test_backward_rules_refuse_mlps_whose_gates_they_do_not_know(
    kind: str, build: Callable[[], Any], method: str
) -> None:
    """Without the rule for products the scores would be those of another method."""
    __import__("timm.models.vitamin")
    with pytest.raises(CircuitViTError, match=kind):
        scored(cv.wrap(build()), method)


def test_such_mlps_have_all_scores_that_need_no_rules() -> None:
    __import__("timm.models.vitamin")
    assert_right_or_refused(unknown_gates(), refusable=False)
    assert_right_or_refused(micro(mlp_layer=OwnGate), refusable=False)


# -- hooks -----------------------------------------------------------------------------------------


def halved(value: Any) -> Any:
    return tuple(halved(each) for each in value) if isinstance(value, tuple) else value / 2


def halved_in_place(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
    output.mul_(0.5)


CHANGERS: dict[str, Callable[[nn.Module], Any]] = {
    "output": lambda part: part.register_forward_hook(lambda _m, _i, output: halved(output)),
    "output-in-place": lambda part: part.register_forward_hook(halved_in_place),
    "input": lambda part: part.register_forward_pre_hook(lambda _m, inputs: halved(inputs)),
    "with-kwargs": lambda part: part.register_forward_hook(
        lambda _m, _i, _k, output: halved(output), with_kwargs=True
    ),
}
HOOKED = (
    "",
    "patch_embed",
    "patch_embed.proj",
    "pos_drop",
    "blocks",
    "blocks.0",
    "blocks.0.norm1",
    "blocks.0.attn",
    "blocks.0.attn.qkv",
    "blocks.0.attn.q_norm",
    "blocks.0.attn.proj",
    "blocks.1.ls1",
    "blocks.1.drop_path1",
    "blocks.1.norm2",
    "blocks.1.mlp",
    "blocks.1.mlp.fc2",
    "norm",
    "fc_norm",
    "head",
)


@pytest.mark.parametrize("place", HOOKED)
@pytest.mark.parametrize("change", CHANGERS.values(), ids=CHANGERS)
def test_hooks_that_change_outputs_are_refused_by_name(
    change: Callable[[nn.Module], Any], place: str
) -> None:
    module = micro(init_values=0.5)
    with torch.no_grad():
        before = module(CLEAN)
        change(module.get_submodule(place))
        assert not torch.equal(module(CLEAN), before)
    with pytest.raises(UnsupportedModelError) as caught:
        cv.wrap(module)
    assert "hook" in str(caught.value)
    assert (place or "the model") in str(caught.value)


class Recorder:
    """Looks on: as a bound method, with what it has seen at hand, as viewers of activations are written."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def after(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self.seen.append(output)

    def before(self, _module: nn.Module, _inputs: Any) -> None:
        self.seen.append(torch.zeros(1))


OBSERVED = ("", "patch_embed", "blocks.0", "blocks.0.attn", "blocks.0.attn.qkv", "blocks.0.attn.q_norm",
            "blocks.1.mlp", "blocks.1.mlp.fc2", "blocks.1.norm2", "norm", "head")  # fmt: skip


@pytest.mark.parametrize("place", OBSERVED)
def test_hooks_that_only_look_on_are_not_carried_over(place: str) -> None:
    module = micro(qk_norm=True)
    recorder, part = Recorder(), module.get_submodule(place)
    part.register_forward_hook(recorder.after)
    part.register_forward_pre_hook(recorder.before)
    module(CLEAN)  # with gradients: what the recorder holds cannot be copied
    count = len(recorder.seen)
    assert count >= 2
    model = cv.wrap(module)
    recorder.seen.clear()
    answers(model)
    model(CLEAN)
    assert not recorder.seen, "the user's hook fired in our runs"
    assert_right(model, module, ModuleViT(module))
    assert len(part._forward_hooks) == len(part._forward_pre_hooks) == 1
    recorder.seen.clear()
    module(CLEAN)
    assert len(recorder.seen) == count


def test_hooks_on_gradients_do_not_hinder() -> None:
    module, fired = micro(), []
    module.blocks[0].mlp.register_full_backward_hook(lambda *_: fired.append(1))
    module.blocks[0].attn.proj.weight.register_hook(lambda gradient: gradient)
    model = assert_right_or_refused(module, refusable=False)
    assert model is not None
    fired.clear()
    scored(model, "eap")
    assert not fired


@pytest.mark.parametrize("place", ["blocks.0.attn", "blocks.1.mlp", "blocks.1.mlp.fc2", "norm"])
def test_a_hook_that_is_switched_on_later_cannot_part_module_and_stages(place: str) -> None:
    """Idle while the model is wrapped: either it is refused, or neither side ever has it."""
    module, switch = micro(), {"on": False}
    module.get_submodule(place).register_forward_hook(
        lambda _module, _inputs, output: output * 0 if switch["on"] else output
    )
    model = wrapped_or_told(module, UnsupportedModelError)
    if isinstance(model, str):
        assert place in model
        return
    full = cv.Circuit.full(model.graph)
    before = cv.run(model, task_of(), full), scored(model, "local")
    switch["on"] = True
    assert_close(model(CLEAN), cv.run(model, task_of(), full))
    assert_close(cv.run(model, task_of(), full), before[0])
    assert_same_scores(scored(model, "local"), before[1])


def with_weight_norm(part: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(part)


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + 0.1 * weight.flip(0)


def with_own_parametrization(part: nn.Module) -> None:
    nn.utils.parametrize.register_parametrization(part, "weight", Symmetric())


@pytest.mark.parametrize(
    "place", ["blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2", "head"]
)
@pytest.mark.parametrize("change", [with_weight_norm, with_own_parametrization])
def test_a_parametrized_weight_is_right_or_refused(change: Callable[[nn.Module], None], place: str) -> None:
    module = micro()
    change(module.get_submodule(place))
    model = assert_right_or_refused(module, (place,))
    if model is None:
        return
    with torch.no_grad():  # also after an edit of what the weight is computed from
        for parameter in module.get_submodule(place).parameters():
            parameter.mul_(1.5)
    assert_right(model, module, ModuleViT(module))


def test_a_parametrized_norm_or_scale_is_right_or_refused() -> None:
    module = micro(init_values=0.5)
    nn.utils.parametrize.register_parametrization(module.blocks[0].norm1, "weight", Symmetric())
    nn.utils.parametrize.register_parametrization(module.blocks[1].ls1, "gamma", Symmetric())
    assert_right_or_refused(module, ("blocks.0.norm1", "blocks.1.ls1"))


# -- the check when wrapping -----------------------------------------------------------------------


class QuietAttention(layers.Attention):  # type: ignore[misc, name-defined]
    """Five percent less than it says."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        quiet: Tensor = 0.95 * super().forward(x, attn_mask, is_causal)
        return quiet


class QuietBlock(Block):  # type: ignore[misc, valid-type]
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        x = x + 0.95 * self.ls1(self.attn(self.norm1(x)))
        after: Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return after


class QuietHead(VisionTransformer):  # type: ignore[misc, valid-type]
    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return super().forward_head(0.95 * x, pre_logits)


QuietAttention.__name__, QuietBlock.__name__ = "Attention", "Block"


def quiet_attention(**options: Any) -> Any:
    module = VisionTransformer(**{**MICRO, **options})
    for block in module.blocks:
        block.attn = QuietAttention(24, 2, qkv_bias=True)
    return finished(module)


def quiet_block(**options: Any) -> Any:
    return micro(block_fn=QuietBlock, **options)


def zero_head(module: Any) -> Any:
    nn.init.zeros_(module.head.weight)
    nn.init.zeros_(module.head.bias)
    return module


def tiny_scales(module: Any) -> Any:
    with torch.no_grad():
        for block in module.blocks:
            block.ls1.gamma.fill_(1e-6)
            block.ls2.gamma.fill_(1e-6)
    return module


def zero_projection(module: Any) -> Any:
    """As adapters and some trainings begin: what heads write is zero, until somebody trains them."""
    for block in module.blocks:
        nn.init.zeros_(block.attn.proj.weight)
    return module


HIDDEN: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "in-plain-sight": lambda build: build(),
    "in-float32": lambda build: build().float(),
    "in-bfloat16": lambda build: build().bfloat16(),
    "in-float16": lambda build: build().half(),
    "by-a-zero-head": lambda build: zero_head(build()),
    "by-a-zero-head-in-float32": lambda build: zero_head(build()).float(),
    "by-tiny-layer-scale": lambda build: tiny_scales(build(init_values=1e-6)),
    "by-tiny-layer-scale-in-float32": lambda build: tiny_scales(build(init_values=1e-6)).float(),
    "by-tiny-layer-scale-in-bfloat16": lambda build: tiny_scales(build(init_values=1e-6)).bfloat16(),
    "by-both-in-bfloat16": lambda build: zero_head(tiny_scales(build(init_values=1e-6))).bfloat16(),
}


@pytest.mark.parametrize("hide", HIDDEN.values(), ids=HIDDEN)
@pytest.mark.parametrize("build", [quiet_attention, quiet_block], ids=["attention", "block"])
def test_a_part_that_does_less_than_it_says_is_found_wherever_it_hides(
    build: Callable[..., Any], hide: Callable[[Callable[..., Any]], Any]
) -> None:
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0"):
        cv.wrap(hide(build))


@pytest.mark.parametrize("hide", HIDDEN.values(), ids=HIDDEN)
def test_and_an_honest_one_passes_everywhere(hide: Callable[[Callable[..., Any]], Any]) -> None:
    module = hide(micro)
    with torch.no_grad():
        expected = module(CLEAN.to(module.pos_embed.dtype))
    assert cv.wrap(module)(CLEAN.to(expected.dtype)).equal(expected)


@pytest.mark.parametrize("family", [QuietHead])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_readout_of_ones_own_is_right_or_refused(family: type, dtype: torch.dtype) -> None:
    """The readout is called as it stands, so a loss there is no loss of ours."""
    if dtype == torch.float64:
        assert_right_or_refused(micro(family), refusable=False)
    else:
        cv.wrap(micro(family).to(dtype))


@pytest.mark.parametrize("where", ["blocks", "blocks.1", "blocks.0.attn", "blocks.1.mlp", "head_drop"])
def test_a_part_in_training_mode_is_refused_by_name(where: str) -> None:
    """With dropout at work the module itself is random: there is nothing to be compared with."""
    rates = {"drop_rate": 0.5, "proj_drop_rate": 0.5, "attn_drop_rate": 0.5, "drop_path_rate": 0.5}
    module = micro(**rates)
    module.get_submodule(where).train()
    with pytest.raises(ModelError) as caught:
        cv.wrap(module)
    assert where in str(caught.value)
    assert "eval()" in str(caught.value)


# -- errors that are ours --------------------------------------------------------------------------


class MAE(VisionTransformer):  # type: ignore[misc, valid-type]
    """As in MAE's own repository, `models_vit.py`: written for an older timm.

    He et al. 2021, arXiv:2111.06377.
    """

    def __init__(self, global_pool: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.global_pool = global_pool
        if self.global_pool:
            self.fc_norm = nn.LayerNorm(self.embed_dim)
            del self.norm

    def forward_features(self, x: Tensor, *_: Any) -> Tensor:
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        x = self.pos_drop(x)
        for block in self.blocks:
            x = block(x)
        if self.global_pool:
            pooled: Tensor = self.fc_norm(x[:, 1:].mean(dim=1))
            return pooled
        return self.norm(x)[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))


class Masked(VisionTransformer):  # type: ignore[misc, valid-type]
    """Its forward wants more than images, as that of a masked autoencoder does."""

    def forward(self, x: Tensor, mask_ratio: float) -> Tensor:
        return super().forward(x) * mask_ratio


class ManyOutputs(VisionTransformer):  # type: ignore[misc, valid-type]
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": super().forward(x)}


class Raises(VisionTransformer):  # type: ignore[misc, valid-type]
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("nothing of ours")


def without(name: str) -> Any:
    module = micro()
    delattr(module, name)
    return module


class Patches(nn.Module):
    """A patch embedding of the user's own, without any of timm's attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 24, 16, stride=16)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x).flatten(2).transpose(1, 2)


def with_own_patches(pretrained_size: bool) -> Any:
    module = micro()
    module.patch_embed = Patches()
    if pretrained_size:
        module.pretrained_cfg = {"input_size": (3, 32, 32), "architecture": "mine"}
    return finished(module)


def in_inference_mode() -> Any:
    with torch.inference_mode():
        return micro()


def quantized() -> Any:
    module = micro().float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)


def with_quantized_mlps() -> Any:
    module = micro().float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in module.blocks:
            block.mlp = torch.ao.quantization.quantize_dynamic(block.mlp, {nn.Linear}, dtype=torch.qint8)
    return module


AWKWARD: dict[str, Callable[[], Any]] = {
    "mae-with-token": partial(micro, MAE),
    "mae-with-pooling": partial(micro, MAE, global_pool=True),
    "more-arguments": partial(micro, Masked),
    "a-dictionary": partial(micro, ManyOutputs),
    "a-forward-that-raises": partial(micro, Raises),
    "no-global-pool": partial(without, "global_pool"),
    "no-norm": partial(without, "norm"),
    "no-fc-norm": partial(without, "fc_norm"),
    "no-patch-embed": partial(without, "patch_embed"),
    "no-blocks": partial(without, "blocks"),
    "no-prefix-tokens": partial(without, "num_prefix_tokens"),
    "own-patches": partial(with_own_patches, False),
    "own-patches-of-a-known-size": partial(with_own_patches, True),
    "built-in-inference-mode": in_inference_mode,
    "quantized": quantized,
    "quantized-mlps": with_quantized_mlps,
}


@pytest.mark.parametrize("build", AWKWARD.values(), ids=AWKWARD)
def test_awkward_modules_work_or_end_in_an_error_of_ours(build: Callable[[], Any]) -> None:
    module = build()
    model = wrapped_or_told(module)
    if isinstance(model, str):
        assert len(model) > 40  # a sentence, not a name
        return
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        expected = module(CLEAN.to(dtype))
    assert_close(
        cv.run(model, task_of(), cv.Circuit.full(model.graph)),
        expected,
        1e-10 if dtype == torch.float64 else 1e-4,
    )
    for method in ("eap", "local", "exact"):
        assert np.isfinite(list(scored(model, method).values())).all()
    cv.run(model, task_of(), drawn_circuit(model.graph, 0.3))


def test_maes_own_vit_is_right_or_refused() -> None:
    assert_right_or_refused(micro(MAE), ("global_pool", "MAE", "forward"), literal=LiteralViT(micro()))


def test_a_module_built_in_inference_mode_is_right_or_refused() -> None:
    model = wrapped_or_told(in_inference_mode())
    if isinstance(model, str):
        assert "inference" in model
        return
    assert_right(model, micro(), LiteralViT(micro()))


@contextmanager
def automatic_casts() -> Iterator[None]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield


SURROUNDINGS: dict[str, Any] = {
    "autocast": automatic_casts,
    "no-grad": torch.no_grad,
    "inference-mode": torch.inference_mode,
}


@pytest.mark.parametrize("method", ["run", "eap", "local", "exact"])
@pytest.mark.parametrize("around", SURROUNDINGS.values(), ids=SURROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_what_surrounds_a_call_does_not_change_its_numbers(
    dtype: torch.dtype, around: Any, method: str
) -> None:
    """The same numbers, or an error that says what is in the way."""
    model = cv.wrap(micro().to(dtype))
    circuit = drawn_circuit(model.graph, 0.5)

    def asked() -> Tensor:
        if method == "run":
            return cv.run(model, task_of(), circuit).double()
        return torch.tensor(list(scored(model, method).values()), dtype=torch.float64)

    told, found, refusal = asked(), None, ""
    try:
        with around():
            found = asked()
    except CircuitViTError as error:
        refusal = str(error)
    if found is None:
        assert any(word in refusal for word in ("autocast", "inference", "no_grad"))
        return
    assert_close(found, told, 1e-10 if dtype == torch.float64 else 1e-4)


def test_under_autocast_a_model_is_not_called() -> None:
    """Its logits would be bfloat16's."""
    model = cv.wrap(micro().float())
    with automatic_casts(), pytest.raises(OptionError, match=r"autocast is on.*cv\.load\(\.\.\., dtype="):
        model(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("around", SURROUNDINGS.values(), ids=SURROUNDINGS)
def test_a_model_may_be_wrapped_anywhere(around: Any) -> None:
    module = micro()
    with around():
        model = wrapped_or_told(module)
    if isinstance(model, str):
        assert "autocast" in model or "inference" in model
        return
    assert_right(model, module, ModuleViT(module))


# -- wrappers around the plain module --------------------------------------------------------------


class Holder(nn.Module):
    """Holds a module under some name and hands images on to it."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        setattr(self, name, module)
        self.inside = [module]

    def forward(self, *inputs: Any) -> Tensor:
        return self.inside[0](*inputs)


def as_class(name: str, where: str) -> type:
    return type(name, (Holder,), {"__module__": where})


def in_peft(module: nn.Module) -> nn.Module:
    """As `peft.get_peft_model` gives it: `.base_model` is a `LoraModel`, and its `.model` the module."""
    tuner = as_class("LoraModel", "peft.tuners.lora.model")("model", module)
    return as_class("PeftModel", "peft.peft_model")("base_model", tuner).eval()


WRAPPERS: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "torch.compile": (torch.compile, "_orig_mod"),
    "DataParallel": (nn.DataParallel, ".module"),
    "DistributedDataParallel": (
        lambda module: as_class("DistributedDataParallel", "torch.nn.parallel.distributed")("module", module),
        ".module",
    ),
    "PEFT": (in_peft, ".base_model.model"),
    "a-wrapper-of-ones-own": (lambda module: Holder("backbone", module), ".backbone"),
}


@pytest.mark.parametrize(("around", "attribute"), WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapper_is_unwrapped_or_the_attribute_is_named(
    around: Callable[[nn.Module], nn.Module], attribute: str
) -> None:
    plain = micro()
    wrapper = around(plain).eval()
    model = wrapped_or_told(wrapper, UnsupportedModelError)
    if isinstance(model, str):
        assert attribute in model
        assert type(wrapper).__name__ in model
        return
    runs = plain if attribute == "_orig_mod" else wrapper  # nothing is compiled here
    with torch.no_grad():
        assert_close(cv.run(model, task_of(), cv.Circuit.full(model.graph)), runs(CLEAN))


def test_a_compiled_forward_inside_is_right_or_refused() -> None:
    """`module.compile()` compiles in place: the class stays, and a call goes another way."""
    module = micro()
    module.compile(backend="eager")
    plain = micro()
    assert_right_or_refused(module, ("compile",), literal=LiteralViT(plain))


# -- subclasses of stages --------------------------------------------------------------------------


LOUDER = 1.3


def louder(stage: Any) -> Any:
    """The same stage, of a class of the user's own, whose senders write more than they did."""

    class Louder(type(stage)):  # type: ignore[misc]
        def write(self, reads: Any) -> Tensor:
            return LOUDER * super().write(reads)

    twin = copy.copy(stage)
    twin.__class__ = Louder
    return twin


class LouderViT(LiteralViT):
    """The literal model with louder heads and MLPs in some layers."""

    def __init__(self, vit: nn.Module, heads: set[int], mlps: set[int]) -> None:
        super().__init__(vit)
        self.louder = [vit.blocks[layer].attn for layer in heads] + [vit.blocks[layer].mlp for layer in mlps]

    def written(self, block: nn.Module, head: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        written = super().written(block, head, query, key, value)
        return LOUDER * written if any(block.attn is part for part in self.louder) else written

    def mlp(self, block: nn.Module, stream: Tensor) -> Tensor:
        written = super().mlp(block, stream)
        return LOUDER * written if any(block.mlp is part for part in self.louder) else written


class LouderRelevanceViT(LouderViT, RelevanceViT):
    pass


@pytest.mark.parametrize("changed", [(1,), (2,), (3,), (4,), (1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_a_subclass_of_a_stage_stays_one_in_every_run(pool: str, changed: tuple[int, ...]) -> None:
    """Also where a stage is cut to some senders, to the first tokens, or given other gradients."""
    module = micro(global_pool=pool, init_values=0.5)
    model = cv.wrap(module)
    stages = tuple(louder(stage) if place in changed else stage for place, stage in enumerate(model.stages))
    model = dataclasses.replace(model, stages=stages)
    heads, mlps = (
        {(place - 1) // 2 for place in changed if place % 2},
        {place // 2 - 1 for place in changed if place % 2 == 0},
    )
    literal = LouderViT(module, heads, mlps)
    full = cv.run(model, task_of(), cv.Circuit.full(model.graph))
    assert_close(full, literal.run(CLEAN).logits)
    assert_same_runs_and_scores(model, literal)
    ruled, reference = (
        LouderRelevanceViT(module, heads, mlps),
        literal_scores.patch_reference(literal, CORRUPT),
    )
    told = literal_scores.eap(ruled, CLEAN, reference, formula, edges=some_edges(literal))
    found = scored(model, "relp")
    assert_same_scores({edge: found[edge] for edge in told}, told)

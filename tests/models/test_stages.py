"""The stage contract, held by every stage of the timm adapter: read, write, sum, pull back, restrict."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import circuitvit as cv
from circuitvit.engine import capture, outputs
from circuitvit.models import Stage
from circuitvit.models.parts import norm_of
from circuitvit.models.timm_import import import_timm
from tests.strategies import MLPS, NORMS, Case, Recipe, assert_close, cases, recipes

layers = import_timm().layers


def stages_that_read(model: cv.Model) -> list[tuple[int, Stage]]:
    return [(index, stage) for index, stage in enumerate(model.stages) if not stage.is_source]


def random_like(tensor: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)


def residual_streams(module: Any, images: Tensor) -> list[Tensor]:
    """What every stage of the user's module reads, seen by hooks: both norms of each block, and the last."""
    seen: list[Tensor] = []
    places = [norm for block in module.blocks for norm in (block.norm1, block.norm2)] + [module.norm]
    handles = [
        place.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0])) for place in places
    ]
    with torch.no_grad():
        module(images)
    for handle in handles:
        handle.remove()
    return seen


# -- read, write, total, expand ---------------------------------------------------------------------


@given(cases())
def test_senders_and_constants_sum_to_the_models_own_residual_stream(case: Case) -> None:
    model = case.model
    captured = capture(model, case.clean)
    written = outputs(model.stages, captured.compacts)
    graph, constant = model.graph, torch.zeros(model.d_model, dtype=model.dtype)
    streams = residual_streams(case.module, case.clean)
    assert len(streams) == len(stages_that_read(model))
    for (index, stage), stream in zip(stages_that_read(model), streams, strict=True):
        assert_close(written[: graph.sender_slices[index].start].sum(dim=0) + constant, stream, 1e-12)
        assert_close(captured.stream(index), stream, 1e-12)
        constant = constant if stage.constant is None else constant + stage.constant


@given(cases())
def test_what_a_stage_adds_is_the_sum_of_its_senders_and_its_constant(case: Case) -> None:
    captured = capture(case.model, case.clean)
    for stage, compact in zip(case.model.stages, captured.compacts, strict=True):
        if not stage.is_readout:
            constant = 0.0 if stage.constant is None else stage.constant
            expanded = stage.expand(compact)
            assert len(expanded) == len(stage.nodes.senders)
            assert_close(expanded.sum(dim=0) + constant, stage.total(compact), 1e-12)


@given(cases())
def test_senders_outputs_are_those_of_the_reference(case: Case) -> None:
    written = outputs(case.model.stages, capture(case.model, case.clean).compacts)
    literal = case.literal.run(case.clean).outputs
    assert list(literal) == list(case.model.graph.senders)
    for sender, output in zip(literal, written, strict=True):
        assert_close(output, literal[sender])


def test_the_attention_bias_belongs_to_no_sender_and_mlp_biases_to_theirs() -> None:
    recipe = Recipe(depth=1, layer_scale=True)
    module = recipe.build()
    _, attention, mlp, _ = cv.wrap(module).stages
    block = module.blocks[0]
    assert_close(attention.constant, block.attn.proj.bias * block.ls1.gamma)
    assert mlp.constant is None


# -- one stream for each receiver --------------------------------------------------------------------


@given(recipes(max_depth=1), st.integers(1, 4), st.randoms(use_true_random=False))
def test_read_each_reads_each_receivers_own_stream(recipe: Recipe, n_streams: int, random: Any) -> None:
    model = cv.wrap(recipe.build())
    for _, stage in stages_that_read(model):
        streams = random_like(torch.empty(n_streams, 2, recipe.n_tokens, model.d_model, dtype=model.dtype), 0)
        source = [random.randrange(n_streams) for _ in stage.nodes.receivers]
        found = stage.read_each(streams, source)
        for receiver, stream in enumerate(source):
            whole = stage.read(streams[stream])
            assert len(found) == len(whole)
            for read, expected in zip(
                slots(stage, found)[receiver], slots(stage, whole)[receiver], strict=True
            ):
                assert_close(read, expected, 1e-12)


def slots(stage: Stage, reads: tuple[Tensor, ...]) -> list[list[Tensor]]:
    """For each receiver what it alone has read: heads' queries, then keys, then values; or everything."""
    if len(reads) == 1:
        return [[reads[0]]]
    return [[read[:, head]] for read in reads for head in range(read.shape[1])]


@given(recipes(max_depth=1, max_heads=3), st.data())
def test_a_restricted_stage_is_a_part_of_the_whole(recipe: Recipe, data: st.DataObject) -> None:
    model = cv.wrap(recipe.build())
    stage = model.stages[1]
    chosen = data.draw(st.lists(st.integers(0, recipe.heads - 1), min_size=1, unique=True))
    part = stage.restrict(chosen)
    assert part.nodes.senders == tuple(f"a0.h{head}" for head in chosen)
    assert part.nodes.receivers == tuple(f"a0.h{head}<{port}>" for port in "qkv" for head in chosen)
    stream = random_like(torch.empty(2, recipe.n_tokens, model.d_model, dtype=model.dtype), 1)
    whole = stage.expand(stage.write(stage.read(stream)))
    compact = part.write(part.read(stream))
    assert_close(part.expand(compact), whole[chosen], 1e-12)
    assert_close(
        part.expand(part.write(part.read_each(stream[None], [0] * 3 * len(chosen)))), whole[chosen], 1e-12
    )
    if len(chosen) < recipe.heads:  # the constant belongs to no sender
        assert_close(part.total(compact), whole[chosen].sum(dim=0), 1e-12)
    again = part.restrict([len(chosen) - 1])
    assert again.nodes.senders == (f"a0.h{chosen[-1]}",)
    assert_close(again.expand(again.write(again.read(stream))), whole[chosen[-1:]], 1e-12)


def test_stages_with_one_sender_are_restricted_to_it_only() -> None:
    _, _, mlp, _ = cv.wrap(Recipe(depth=1).build()).stages
    assert mlp.restrict([0]) is mlp
    with pytest.raises(NotImplementedError, match="MLPStage"):
        mlp.restrict([])


# -- gradients -----------------------------------------------------------------------------------------


def assert_pulls_back_like_autograd(model: cv.Model, n_tokens: int) -> None:
    """The adapter's closed form equals the contract's literal version, which differentiates `read_each`."""
    for index, stage in stages_that_read(model):
        stream = 2 * random_like(torch.empty(2, n_tokens, model.d_model, dtype=model.dtype), index) + 0.5
        with torch.no_grad():
            reads = stage.read(stream)
        d_reads = tuple(random_like(read, 100 + slot) for slot, read in enumerate(reads))
        found = stage.pull_back(stream, reads, d_reads).expand()
        assert found.shape == (len(stage.nodes.receivers), *stream.shape)
        assert_close(found, Stage.pull_back(stage, stream, reads, d_reads).expand(), 1e-10)


@pytest.mark.parametrize("qkv_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("norm", NORMS)
def test_closed_form_gradients_equal_autograd_for_every_norm(norm: str, qkv_bias: bool) -> None:
    recipe = Recipe(depth=1, heads=2, norm=norm, qkv_bias=qkv_bias, qk_norm=True, layer_scale=True)
    assert_pulls_back_like_autograd(cv.wrap(recipe.build()), recipe.n_tokens)


@pytest.mark.parametrize("mlp", MLPS)
def test_closed_form_gradients_equal_autograd_for_every_mlp(mlp: str) -> None:
    recipe = Recipe(depth=1, mlp=mlp)
    assert_pulls_back_like_autograd(cv.wrap(recipe.build()), recipe.n_tokens)


@given(recipes(max_depth=1))
def test_closed_form_gradients_equal_autograd(recipe: Recipe) -> None:
    assert_pulls_back_like_autograd(cv.wrap(recipe.build()), recipe.n_tokens)


NORM_MODULES = {
    "layernorm": partial(nn.LayerNorm, 6),
    "layernorm-large-eps": partial(nn.LayerNorm, 6, eps=0.7),
    "layernorm-without-bias": partial(nn.LayerNorm, 6, bias=False),
    "layernorm-without-affine": partial(nn.LayerNorm, 6, elementwise_affine=False),
    "layernorm-of-timm": partial(layers.LayerNorm, 6),
    "layernorm-of-timm-without-affine": partial(layers.LayerNorm, 6, affine=False),
    "rmsnorm": partial(nn.RMSNorm, 6),
    "rmsnorm-eps": partial(nn.RMSNorm, 6, eps=0.2),
    "rmsnorm-of-timm": partial(layers.RmsNorm, 6),
    "rmsnorm-of-timm-without-affine": partial(layers.RmsNorm, 6, affine=False),
    "identity": nn.Identity,
}


@pytest.mark.parametrize("build", NORM_MODULES.values(), ids=NORM_MODULES)
def test_every_norm_is_its_formula_and_has_its_gradient(build: Any) -> None:
    module = build().double()
    for seed, parameter in enumerate(module.parameters()):
        parameter.data = random_like(parameter, seed)
    norm = norm_of(module, "here")
    stream = (random_like(torch.empty(3, 4, 6, dtype=torch.float64), 5) + 1).requires_grad_()
    normed = norm(stream)
    x_hat, inverse = norm.standardise(stream)
    affine = x_hat if norm.weight is None else x_hat * norm.weight
    assert_close(affine if norm.bias is None else affine + norm.bias, normed, 1e-10)
    assert inverse.shape == (3, 4, 1)
    d_normed = random_like(normed, 6)
    (expected,) = torch.autograd.grad(normed, stream, d_normed)
    assert_close(norm.pull_back(stream.detach(), d_normed), expected, 1e-10)


@pytest.mark.parametrize("build", NORM_MODULES.values(), ids=NORM_MODULES)
def test_a_projection_after_a_norm_is_folded_into_one(build: Any) -> None:
    """`W norm(x) + b` is the folded weight on `x_hat`, plus the offset; centred weights ignore the mean."""
    module = build().double()
    for seed, parameter in enumerate(module.parameters()):
        parameter.data = random_like(parameter, seed)
    norm = norm_of(module, "here")
    weight, bias = (
        random_like(torch.empty(5, 6, dtype=torch.float64), 7),
        random_like(torch.empty(5).double(), 8),
    )
    stream = random_like(torch.empty(3, 6, dtype=torch.float64), 9) + 1
    x_hat, _ = norm.standardise(stream)
    expected = nn.functional.linear(norm(stream), weight, bias)
    assert_close(x_hat @ norm.fold(weight).t() + norm.offset(weight, bias), expected, 1e-10)
    if norm.centred:
        assert_close(norm.fold(weight).sum(dim=1), torch.zeros(5).double(), 1e-12)

"""`register`: a hand-written Vision Transformer is one short family away, and a wrong family is refused."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import circuitvit as cv
from circuitvit.engine import capture, outputs
from circuitvit.errors import OptionError, UnsupportedModelError
from circuitvit.models import Stage, registry
from circuitvit.models.attention import AttentionStage
from circuitvit.models.parts import Attention, Linear
from tests.rightness import VisionTransformer
from tests.strategies import assert_close

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "own_model.py"
hand: dict[str, Any] = runpy.run_path(str(EXAMPLE))
HandViT, HandFamily = hand["HandViT"], hand["HandFamily"]


@pytest.fixture(autouse=True)
def _forget_what_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "FAMILIES", dict(registry.FAMILIES))


def small(hidden: int = 12) -> Any:
    torch.manual_seed(1)
    module = HandViT(size=16, patch=8, channels=1, width=8, depth=2, heads=2, hidden=hidden, classes=3)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.6)
    return module.eval().double()


@pytest.mark.parametrize("hidden", [0, 12], ids=["attention-only", "with-mlps"])
def test_a_registered_model_is_taken_apart_exactly(hidden: int) -> None:
    module = small(hidden)
    with pytest.raises(UnsupportedModelError, match=r"HandViT cannot be decomposed.*circuitvit\.register"):
        cv.wrap(module)
    cv.register(HandViT, HandFamily())
    model = cv.wrap(module)
    images = torch.randn(2, 1, 16, 16, dtype=torch.float64)
    run = capture(model, images)
    written = outputs(model.stages, run.compacts).sum(dim=0)
    written = written + sum(stage.constant for stage in model.stages if stage.constant is not None)
    assert_close(run.logits, module(images))
    assert_close(model.stages[-1].write((written,)), module(images))
    assert model.grid == (2, 2)
    assert model.leading == 1
    assert [stage.nodes.kind for stage in model.layers] == ["attention", *["mlp"] * bool(hidden)] * 2


def test_a_subclass_is_of_its_class_family() -> None:
    cv.register(HandViT, HandFamily())
    other = type("Finer", (HandViT,), {})
    module = small()
    module.__class__ = other
    assert cv.wrap(module).name == "Finer"


class WrongScale(HandFamily):  # type: ignore[misc, valid-type]
    def block(self, module: Any, block: Any, layer: int, where: str) -> tuple[Any, ...]:
        first, *rest = super().block(module, block, layer, where)
        parts = Attention.of_packed(2, Linear.of(block.attn.qkv), Linear.of(block.attn.proj), 1.0)
        return AttentionStage(layer, first.norm, parts), *rest


class WithoutMLP(HandFamily):  # type: ignore[misc, valid-type]
    def block(self, module: Any, block: Any, layer: int, where: str) -> tuple[Any, ...]:
        return super().block(module, block, layer, where)[:1]


class WithoutNorm(HandFamily):  # type: ignore[misc, valid-type]
    def readout(self, module: Any, stream: Tensor) -> Tensor:
        return module.head(stream[:, 0])  # type: ignore[no-any-return]


class WithoutPositions(HandFamily):  # type: ignore[misc, valid-type]
    def embed(self, module: Any, images: Tensor) -> Tensor:
        return module.embed(images) - module.pos_embed  # type: ignore[no-any-return]


class Reversed(HandFamily):  # type: ignore[misc, valid-type]
    def blocks(self, module: Any) -> Any:
        return tuple(reversed(module.blocks))


@pytest.mark.parametrize(
    ("family", "where"),
    [
        (WrongScale, r"blocks\.0 of HandViT"),
        (WithoutMLP, r"blocks\.0 of HandViT"),
        (WithoutNorm, "after the last block"),
        (WithoutPositions, r"before blocks\.0"),
        (Reversed, "every block must run once, in order"),
    ],
)
def test_a_wrong_family_is_refused_with_the_first_place_that_differs(family: type, where: str) -> None:
    cv.register(HandViT, family())
    with pytest.raises(UnsupportedModelError, match=where):
        cv.wrap(small())


def test_what_is_no_family_is_refused() -> None:
    with pytest.raises(OptionError, match="a class derived from Family"):
        cv.register(HandViT, HandFamily)  # the class, and no object of it


# -- models by strangers ---------------------------------------------------------------------------


def by_a_stranger(folder: Path) -> Any:
    """An MNIST model of the development data, its weights renamed to those of the hand-written class."""
    config = json.loads((folder / "config.json").read_text())
    given = config["kwargs"]
    has_mlp = given.get("mlp", True)
    module = HandViT(
        size=given["img_size"],
        patch=given["patch_size"],
        channels=given["in_chans"],
        width=given["embed_dim"],
        depth=given["depth"],
        heads=given["num_heads"],
        hidden=int(given["embed_dim"] * given["mlp_ratio"]) if has_mlp else 0,
        classes=given["num_classes"],
    )
    renamed = {"patch_embed.proj": "patches", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"}
    state = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        state[name] = tensor
    module.load_state_dict(state)
    return module.eval(), config


@pytest.mark.parametrize("name", ["mnist_attnonly_371", "mnist_vit_455"])
def test_mnist_models_by_strangers_open_and_are_as_good_as_their_cards_say(
    name: str, shared_data: Path
) -> None:
    module, config = by_a_stranger(shared_data / "models" / name)
    cv.register(HandViT, HandFamily())
    model = cv.wrap(module)
    digits = np.load(shared_data / "mnist_t10k.npz")
    known = digits["y"] < config["kwargs"]["num_classes"]
    pixels = torch.from_numpy(digits["x"][known]).float()[:, None] / 255
    images = (pixels - config["mean"][0]) / config["std"][0]
    right = float((model(images).argmax(dim=-1).numpy() == digits["y"][known]).mean())
    assert right == pytest.approx(config["check"], abs=0.005)
    clean, corrupt = (images[torch.from_numpy(digits["y"][known] == digit)][:4] for digit in (0, 1))
    task = cv.Task(clean, corrupt, metric=cv.logit_diff(0, 1))
    scores = cv.attribute(model, task, method="exact", progress=False)
    assert 0 < len(scores.top(5)) <= 5  # one that leads nowhere is pruned
    full = cv.run(model, task, cv.Circuit.full(model.graph))
    assert_close(full, model(clean), 1e-5)


# -- what turns queries and keys, and what is added to scores ----------------------------------------


class TurnedAttention(hand["SelfAttention"]):  # type: ignore[misc, name-defined]
    """Rotary positions, one angle for each token, and a bias between tokens for each head."""

    def __init__(self, width: int, heads: int, tokens: int) -> None:
        super().__init__(width, heads)
        self.angles = nn.Parameter(torch.randn(tokens))
        self.between = nn.Parameter(torch.randn(heads, tokens, tokens))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        query, key = turned(self, query, ()), turned(self, key, ())
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + self.between
        return self.proj((scores.softmax(dim=-1) @ value).transpose(1, 2).reshape(batch, tokens, width))  # type: ignore[no-any-return]


def turned(module: Any, x: Tensor, heads: Any) -> Tensor:
    angle = module.angles[: x.shape[2], None]
    even, odd = x[..., ::2], x[..., 1::2]
    pairs = (even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos())
    return torch.stack(pairs, dim=-1).flatten(-2)


def added(module: Any, heads: Any) -> Tensor:
    return module.between[list(heads)]  # type: ignore[no-any-return]


class TurnedFamily(HandFamily):  # type: ignore[misc, valid-type]
    def block(self, module: Any, block: Any, layer: int, where: str) -> tuple[Any, ...]:
        first, *rest = super().block(module, block, layer, where)
        parts = replace(first.attention, turn=partial(turned, block.attn), added=partial(added, block.attn))
        return AttentionStage(layer, first.norm, parts), *rest


@pytest.fixture
def turned_model() -> cv.Model:
    module = small()
    for block in module.blocks:
        block.attn = TurnedAttention(8, 2, module.pos_embed.shape[1])
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.6)
    cv.register(HandViT, TurnedFamily())
    return cv.wrap(module.eval().double())


def test_answers_to_other_streams_keep_every_token_in_its_place(turned_model: cv.Model) -> None:
    """Candidates packed as more tokens would be turned by the wrong angle."""
    generator = torch.Generator().manual_seed(0)
    images, others = torch.randn(2, 2, 1, 16, 16, dtype=torch.float64, generator=generator)
    base, other = capture(turned_model, images, essential=True), capture(turned_model, others)
    for index, stage in enumerate(turned_model.essential):
        if stage.nodes.kind == "attention":
            stream = base.stream(index)
            streams = stream + torch.stack([0.3 * other.stream(index), -other.stream(index), stream])
            leaves = [read.detach().requires_grad_() for read in stage.read(stream)]
            compact = stage.write(tuple(leaves))
            d_compact = torch.randn(compact.shape, dtype=torch.float64, generator=generator)
            d_reads = torch.autograd.grad(compact, leaves, d_compact)
            given = stage.read(stream), d_reads, d_compact, stream, streams
            assert_close(stage.local_effects(*given), Stage.local_effects(stage, *given))


@pytest.mark.parametrize("method", ["exact", "eap", "local", "atp-qk"])
def test_turned_models_are_scored_as_if_cut_by_hand(turned_model: cv.Model, method: str) -> None:
    """Every edge that leaves the input, whose exact effects need no library: the run with another stream."""
    generator = torch.Generator().manual_seed(1)
    clean, corrupt = torch.randn(2, 3, 1, 16, 16, dtype=torch.float64, generator=generator)
    near = clean + 1e-4 * (corrupt - clean)  # where every estimate must be the effect
    task = cv.Task(clean, near, metric=cv.logit_diff(0, 1))
    found = cv.attribute(turned_model, task, method=method, progress=False)
    edges = [
        "input->a0.h1<q>",
        "input->a0.h0<k>",
        "a0.h1->a1.h0<v>",
        "m0->a1.h1<k>",
        "a1.h0->m1",
        "m1->logits",
    ]
    full = cv.run(turned_model, task, cv.Circuit.full(turned_model.graph))
    for name in edges:
        one = cv.Circuit.from_edges(turned_model.graph, [name])
        ablated = cv.run(turned_model, task, ablate=one)
        change = (ablated[:, 0] - ablated[:, 1]) - (full[:, 0] - full[:, 1])
        assert found[name] == pytest.approx(float(change.mean()), rel=2e-3, abs=1e-10)


def test_parts_of_a_turned_stage_are_turned_alike(turned_model: cv.Model) -> None:
    stage = turned_model.stages[1]
    stream = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    whole = stage.write(stage.read(stream))
    for part, expected in ((stage.restrict([1]), whole[:, 1:]), (stage.leading(1), whole[:, :, :1])):
        assert_close(part.write(part.read(stream)), expected)
        assert_close(part.attend(part.read(stream), part.pattern(part.read(stream))), expected)


class ApartFamily(HandFamily):  # type: ignore[misc, valid-type]
    """Says queries, keys and values as three projections, as models of other libraries keep them."""

    def block(self, module: Any, block: Any, layer: int, where: str) -> tuple[Any, ...]:
        first, *rest = super().block(module, block, layer, where)
        return AttentionStage(layer, first.norm, replace(first.attention, packed=None)), *rest


def test_projections_that_are_kept_apart_are_read_as_those_kept_together() -> None:
    module, stream = small(), torch.randn(2, 5, 8, dtype=torch.float64)
    stages = []
    for family in (HandFamily(), ApartFamily()):
        cv.register(HandViT, family)
        stages.append(cv.wrap(module).stages[1])
    together, apart = stages
    for part, other in ((together, apart), (together.restrict([1]), apart.restrict([1]))):
        for read, expected in zip(other.read(stream), part.read(stream), strict=True):
            assert_close(read, expected)


# -- circuits move between families ----------------------------------------------------------------


def test_a_circuit_moves_to_the_same_graph_of_another_family(tmp_path: Path) -> None:
    """Nodes are called the same whoever wrote the module; that weights are others is said once."""
    cv.register(HandViT, HandFamily())
    module = small()
    timm_names = {"patches": "patch_embed.proj", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2"}
    state = {}
    for name, tensor in module.state_dict().items():
        for own, other in timm_names.items():
            name = name.replace(own, other)
        state[name] = tensor
    clone = VisionTransformer(
        img_size=16, patch_size=8, in_chans=1, num_classes=3, embed_dim=8, depth=2, num_heads=2,
        mlp_ratio=1.5, norm_layer=nn.LayerNorm, qkv_bias=False, act_layer=nn.ReLU,
    )  # fmt: skip
    clone.load_state_dict(state)
    theirs, ours = cv.wrap(clone.double().eval(), name="timm's"), cv.wrap(module, name="by hand")
    assert theirs.graph == ours.graph
    clean, corrupt = torch.randn(2, 1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    task = cv.Task(clean, corrupt, metric=cv.logit_diff(0, 1))
    found = cv.attribute(theirs, task, "exact", progress=False).connected(30)
    found.save(tmp_path / "circuit.json")
    moved = cv.Circuit.load(tmp_path / "circuit.json")
    assert_close(cv.run(ours, task, moved), cv.run(theirs, task, found), 1e-10)
    assert ours.weights_hash == theirs.weights_hash
    report = cv.verify(ours, task, moved, n_random=0, progress=False)
    assert not [text for text in report.warnings if text.startswith("The circuit was found")]
    with torch.no_grad():
        module.blocks[0].attn.qkv.weight.mul_(1.01)
    report = cv.verify(ours, task, moved, n_random=0, progress=False)
    said = [text for text in report.warnings if text.startswith("The circuit was found")]
    assert len(said) == 1
    assert "found on other weights (timm's, " in said[0]
    assert "than those it was verified on (by hand, " in said[0]

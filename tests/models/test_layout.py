"""`cv.Layout`: a hand-written Vision Transformer opens by a table of places, and a wrong table is refused."""

from __future__ import annotations

import json
import math
import pickle
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import circuitvit as cv
from circuitvit.errors import OptionError, UnsupportedModelError
from circuitvit.models import registry
from circuitvit.models.zoo import InputSpec
from tests.reference.hooked import HookedModule, Receiver, Sender, given, gives, written_by_head
from tests.rightness import finished, prove
from tests.strategies import assert_close

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "own_model.py"
hand: dict[str, Any] = runpy.run_path(str(EXAMPLE))

SPEC = InputSpec((1, 16, 16), (0.5,), (0.5,))
TABLE = {"blocks": "blocks", "qkv": "attn.qkv", "out": "attn.proj", "mlp": "mlp"}
CLEAN, CORRUPT = torch.randn(2, 2, 1, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16().double()


def small(hidden: int = 12) -> Any:
    shape = {"size": 16, "patch": 8, "channels": 1, "width": 8, "depth": 2, "heads": 2, "classes": 3}
    return finished(hand["HandViT"](**shape, hidden=hidden))


def opened(module: Any, **table: Any) -> cv.Model:
    return cv.wrap(module, layout=cv.Layout(**{**TABLE, **table}), preprocessing=SPEC)


def assert_open(model: cv.Model, module: Any) -> None:
    """Embedding, stages and readout add up to the module's own forward."""
    stream = model.embed(CLEAN)
    for stage in model.layers:
        stream = stage.add(stream, stage.write(stage.read(stream)))
    assert_close(model.stages[-1].write((stream,)), module(CLEAN))


# -- what opens ------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [0, 12], ids=["attention-only", "with-mlps"])
@pytest.mark.parametrize(
    "ends", [{}, {"norm": "norm", "pool": "cls", "readout": "head"}], ids=["found", "said"]
)
def test_edges_of_a_model_by_a_table_are_those_of_hooks(hidden: int, ends: dict[str, str]) -> None:
    module = small(hidden)
    model = opened(module, mlp="mlp" if hidden else None, **ends)
    assert (model.prefix, model.grid, model.leading) == (("cls",), (2, 2), 1)
    senders, receivers = (
        {"input": Sender(module.blocks[0], given)},
        {"logits": Receiver(module.norm, module.norm)},
    )
    for layer, block in enumerate(module.blocks):
        if hidden:
            senders[f"m{layer}"] = Sender(block.mlp, gives)
            receivers[f"m{layer}"] = Receiver(block.norm2, block.norm2)
        for head in range(2):
            senders[f"a{layer}.h{head}"] = Sender(block.attn.proj, written_by_head(head, 4))
            for port, name in enumerate("qkv"):
                columns = slice((port * 2 + head) * 4, (port * 2 + head + 1) * 4)
                receivers[f"a{layer}.h{head}<{name}>"] = Receiver(block.norm1, block.attn.qkv, columns)
    prove(model, HookedModule(module, senders, receivers), CLEAN, CORRUPT)


class Apart(nn.Module):
    """Attention with three projections, heads wider than the stream, norms of queries and a scale of its
    own.
    """

    def __init__(self, width: int, heads: int, d_head: int, scale: float) -> None:
        super().__init__()
        self.n_heads, self.scale = heads, scale
        self.wq, self.wk, self.wv = (nn.Linear(width, heads * d_head, bias=False) for _ in range(3))
        self.wo, self.q_norm = nn.Linear(heads * d_head, width), nn.LayerNorm(d_head)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            each(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for each in (self.wq, self.wk, self.wv)
        )
        pattern = (self.q_norm(query) @ key.mT * self.scale).softmax(dim=-1)
        return self.wo((pattern @ value).transpose(1, 2).flatten(2))


APART = {
    "qkv": None,
    "q": "attn.wq",
    "k": "attn.wk",
    "v": "attn.wv",
    "out": "attn.wo",
    "q_norm": "attn.q_norm",
}


@pytest.mark.parametrize("scale", [3**-0.5, 8**-0.5, 1.0, 0.37])
def test_projections_apart_and_heads_wider_than_the_stream(scale: float) -> None:
    """The usual scales are found out; others are said."""
    module = small()
    for block in module.blocks:
        block.attn = Apart(8, 4, 3, scale)
    module = finished(module)
    if scale == 0.37:
        with pytest.raises(UnsupportedModelError, match=r"blocks\.0.*attn0 is the first stage that differs"):
            opened(module, **APART)
        assert_open(opened(module, **APART, scale="attn.scale"), module)
        assert_open(opened(module, **APART, scale=0.37, heads=4), module)
    else:
        assert_open(opened(module, **APART), module)


def test_a_number_of_heads_that_nobody_says_is_found_out() -> None:
    module = small()
    for block in module.blocks:
        block.attn.forward_heads = block.attn.__dict__.pop("heads")
        block.attn.__class__ = type(
            "Unnamed", (type(block.attn),), {"heads": property(lambda a: a.forward_heads)}
        )
    unsaid = {name: value for name, value in TABLE.items() if name != "heads"}
    model = cv.wrap(module, layout=cv.Layout(**unsaid), preprocessing=SPEC)
    assert len(model.stages[1].nodes.senders) == 2


class Torchs(nn.Module):
    """A model of torch's own encoder layers."""

    def __init__(self, pre_norm: bool, pool: Callable[[Tensor], Tensor], **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=pre_norm, batch_first=True, **options)
        self.patches, self.positions = nn.Conv2d(1, 8, 8, 8), nn.Parameter(torch.randn(1, 4, 8))
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8), enable_nested_tensor=False)
        self.pool, self.head = pool, nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.encoder(self.patches(images).flatten(2).transpose(1, 2) + self.positions)
        return self.head(self.pool(x))  # type: ignore[no-any-return]


TORCHS = {"blocks": "encoder.layers", "attention": "self_attn", "mlp": ("linear1", "activation", "linear2")}


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_torchs_own_encoder_layers_open(activation: str) -> None:
    module = finished(Torchs(True, lambda x: x.mean(dim=1), activation=activation))
    for ends in ({}, {"norm": "encoder.norm", "pool": "mean", "readout": "head"}):
        model = cv.wrap(module, layout=cv.Layout(**TORCHS, **ends), preprocessing=SPEC)
        assert_open(model, module)
        assert model.prefix == ()
        readout: Any = model.stages[-1]
        assert (readout.parts is not None) == bool(ends)


def test_a_registered_table_serves_all_modules_of_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "FAMILIES", dict(registry.FAMILIES))
    module = small()
    cv.register(type(module), cv.Layout(**TABLE))
    assert_open(cv.wrap(module, preprocessing=SPEC), module)
    with pytest.raises(OptionError, match="give preprocessing="):
        cv.wrap(module)


def test_edits_of_weights_are_seen_and_models_are_read_back() -> None:
    module = small()
    model = opened(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.3)
    model.refresh()
    assert_open(model, module)
    family: Any = pickle.loads(pickle.dumps(model.family))
    assert_close(
        family.readout(module, family.embed(module, CLEAN)), model.family.readout(module, model.embed(CLEAN))
    )


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"heads": 4}, r"blocks\.0 of HandViT \(Block\): attn0 is the first stage that differs"),
        ({"norms": ("norm2", "norm1")}, "attn0 is the first stage that differs"),
        ({"norms": ("norm1", "norm1")}, "differs from its own forward"),
        ({"mlp": "mlp.0"}, r"blocks\.0: mlp0, as its family says it, cannot be run"),
        ({"mlp": None}, r"blocks\.0 of HandViT \(Block\): .*differs from its own forward"),
        (
            {"mlp": "mpl"},
            r"blocks\.0 has no mpl \(mlp= of the layout\): there is no mpl in it, but mlp",
        ),
        ({"out": "mlp.2"}, "an output projection of 12, are not those of"),
        ({"qkv": "mlp.0"}, "are not those of"),
        (
            {"qkv": "norm1"},
            r"blocks\.0\.norm1 is a LayerNorm: qkv= of a layout is the place of an nn\.Linear",
        ),
        ({"blocks": "norm"}, "norm of HandViT is a LayerNorm: blocks= is the place of a list of blocks"),
        ({"pool": "mean", "norm": "norm", "readout": "head"}, "after the last block"),
        ({"readout": "head"}, "after the last block"),
        ({"norm": "norm"}, "after the last block|of shape|differs"),
    ],
)
def test_a_wrong_table_is_refused(table: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        opened(small(), **table)


@pytest.mark.parametrize(
    "table",
    [{}, {"qkv": "a"}, {"q": "a", "k": "b", "out": "d"}, {"qkv": "a", "out": "b", "attention": "c"}],
)
def test_a_table_says_attention_in_one_way(table: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="in one of three ways"):
        cv.Layout(blocks="blocks", **table)


@pytest.mark.parametrize(
    "table",
    [
        {"blocks": None}, {"blocks": 3}, {"q_norm": 3}, {"norms": None}, {"norms": "norm1"},
        {"gammas": (None,)}, {"mlp": ()}, {"mlp": 3},
        {"heads": math.nan}, {"heads": 2.5}, {"scale": math.nan}, {"tokens": "cls"},
    ],
    ids=str,
)  # fmt: skip
def test_an_entry_of_another_kind_is_refused(table: dict[str, Any]) -> None:
    (name,) = table
    with pytest.raises(OptionError, match=f"{name}=.* of a layout is no"):
        cv.Layout(**{**TABLE, **table})


def test_more_tokens_before_the_patches_than_there_are_are_refused() -> None:
    module = small()
    with pytest.raises(UnsupportedModelError, match="which are not 99 before any patches"):
        opened(finished(module), tokens=("cls",) * 99)


def test_names_that_are_none_are_refused() -> None:
    with pytest.raises(OptionError, match="pool='token'"):
        cv.Layout(**TABLE, pool="token")
    with pytest.raises(OptionError, match="norms="):
        cv.Layout(**TABLE, norms=("norm1",))


def test_post_norm_models_are_refused_with_the_reason() -> None:
    module = finished(Torchs(False, lambda x: x.mean(dim=1)))
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0 of Torchs .*no residual stream.*post-norm"):
        cv.wrap(module, layout=cv.Layout(**TORCHS), preprocessing=SPEC)
    with pytest.raises(UnsupportedModelError, match=r"post-norm, norm_first=False.*no edges to find"):
        cv.wrap(module)


def test_blocks_without_a_residual_stream_are_refused_with_the_reason() -> None:
    module = small()
    bare = type(
        "Bare", (type(module.blocks[0]),), {"forward": lambda self, x: self.mlp(self.attn(self.norm1(x)))}
    )
    for block in module.blocks:
        block.mlp[2] = nn.Linear(12, 8)
        block.__class__ = bare
    with pytest.raises(UnsupportedModelError, match="has no residual stream"):
        opened(finished(module))


# -- models by strangers ---------------------------------------------------------------------------


class TimmNamed(nn.Module):
    """The hand-written ViTs of the development data, by the names of their files: attention, and mostly an
    MLP.
    """

    def __init__(self, given: dict[str, Any], act: nn.Module, eps: float) -> None:
        super().__init__()
        width, patch, side = given["embed_dim"], given["patch_size"], given["img_size"]
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(given["in_chans"], width, patch, patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (side // patch) ** 2, width))
        self.blocks = nn.Sequential(*(TimmNamedBlock(given, act, eps) for _ in range(given["depth"])))
        self.norm, self.head = nn.LayerNorm(width, eps), nn.Linear(width, given["num_classes"])

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])  # type: ignore[no-any-return]


class TimmNamedBlock(nn.Module):
    def __init__(self, given: dict[str, Any], act: nn.Module, eps: float) -> None:
        super().__init__()
        width, hidden = given["embed_dim"], int(given["embed_dim"] * given.get("mlp_ratio", 0))
        self.heads = given["num_heads"]
        self.norm1 = nn.LayerNorm(width, eps)
        qkv = nn.Linear(width, 3 * width, bias=given.get("qkv_bias", True))
        self.attn = nn.ModuleDict({"qkv": qkv, "proj": nn.Linear(width, width)})
        if hidden:
            self.norm2, self.act = nn.LayerNorm(width, eps), act
            self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.attn["proj"](nn.functional.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2))
        if not hasattr(self, "mlp"):
            return x
        return x + self.mlp["fc2"](self.act(self.mlp["fc1"](self.norm2(x))))  # type: ignore[no-any-return]


def by_a_stranger(folder: Path) -> tuple[Any, InputSpec, dict[str, Any]]:
    config = json.loads((folder / "config.json").read_text())
    given = config["kwargs"]
    act = {"relu": nn.ReLU, "gelu": nn.GELU}[config["act"]]()
    module = TimmNamed(given, act, config["ln_eps"])
    module.load_state_dict(load_file(folder / "model.safetensors"))
    size = given["in_chans"], given["img_size"], given["img_size"]
    return module.eval(), InputSpec(size, tuple(config["mean"]), tuple(config["std"])), config


@pytest.mark.parametrize("name", ["mnist_attnonly_371", "mnist_vit_455", "mnist3_vit", "fashion_vit_prenorm"])
def test_hand_written_models_by_strangers_open_by_a_table(name: str, shared_data: Path) -> None:
    module, spec, config = by_a_stranger(shared_data / "models" / name)
    mlp = ("mlp.fc1", "act", "mlp.fc2") if hasattr(module.blocks[0], "mlp") else None
    model = cv.wrap(module, layout=cv.Layout(**{**TABLE, "mlp": mlp}), preprocessing=spec)
    assert model.prefix == ("cls",)
    assert model.leading == 1
    digits = np.load(shared_data / "mnist_t10k.npz")
    known = digits["y"] < config["kwargs"]["num_classes"]
    pixels = torch.from_numpy(digits["x"][known]).float()[:, None] / 255
    images = (pixels - config["mean"][0]) / config["std"][0]
    if name.startswith("mnist"):  # the other was trained on clothes
        right = float((model(images).argmax(dim=-1).numpy() == digits["y"][known]).mean())
        assert right == pytest.approx(config["check"], abs=0.005)
    task = cv.Task(images[:4], images[4:8], metric=cv.logit_diff(0, 1))
    assert_close(cv.run(model, task, cv.Circuit.full(model.graph)), module(images[:4]), 1e-4)
    assert cv.attribute(model, task, "exact", progress=False).values.any()


def test_a_post_norm_model_by_a_stranger_is_refused_with_the_reason(shared_data: Path) -> None:
    folder = shared_data / "models" / "cifar10_vit_postnorm_relu"
    config = json.loads((folder / "config.json").read_text())
    layer = nn.TransformerEncoderLayer(config["dim"], config["heads"], config["mlp"], batch_first=True)
    module = nn.ModuleDict({"transformer": nn.TransformerEncoder(layer, config["depth"])}).eval()
    state = load_file(folder / "model.safetensors")
    module.load_state_dict({name: tensor for name, tensor in state.items() if name.startswith("transformer")})
    with pytest.raises(
        UnsupportedModelError, match=r"transformer\.layers\.0 norms the stream after adding to it"
    ):
        cv.wrap(module)

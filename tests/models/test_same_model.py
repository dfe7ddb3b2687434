"""The same weights give the same scores and one hash, through whatever library the model came."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import circuitvit as cv
from circuitvit.graph import Provenance
from circuitvit.models.timm_import import import_timm
from circuitvit.verification.faithfulness import origin_differs
from tests.rightness import CLEAN, CORRUPT, finished, micro
from tests.strategies import assert_close

timm = import_timm()

from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT  # noqa: E402

FROM_TORCHVISION = {
    "class_token": "cls_token",
    "conv_proj": "patch_embed.proj",
    "encoder.pos_embedding": "pos_embed",
    "encoder.layers.encoder_layer_": "blocks.",
    "encoder.ln": "norm",
    "ln_1": "norm1",
    "ln_2": "norm2",
    "self_attention.in_proj_": "attn.qkv.",
    "self_attention.out_proj": "attn.proj",
    "mlp.0": "mlp.fc1",
    "mlp.3": "mlp.fc2",
    "heads.head": "head",
}
FROM_OPEN_CLIP = {
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "conv1": "patch_embed.proj",
    "transformer.resblocks": "blocks",
    "attn.in_proj_": "attn.qkv.",
    "attn.out_proj": "attn.proj",
    "attn.ln_q": "attn.q_norm",
    "attn.ln_k": "attn.k_norm",
    "attn.ln_inner": "attn.norm",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    ".ls_": ".ls",
    "ln_pre": "norm_pre",
    "ln_post": "norm",
    "ln_": "norm",
}


FROM_TRANSFORMERS = {
    "vit.embeddings.cls_token": "cls_token",
    "vit.embeddings.position_embeddings": "pos_embed",
    "vit.embeddings.patch_embeddings.projection": "patch_embed.proj",
    "vit.layers": "blocks",
    "vit.layernorm": "norm",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.o_proj": "attn.proj",
    "attention": "attn",
    "classifier": "head",
}


def renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors under timm's names."""
    found = {}
    for name, tensor in state.items():
        for old, new in names.items():
            name = name.replace(old, new)
        found[name] = tensor
    return found


def from_torchvision() -> tuple[Any, Any]:
    """A model of torchvision's, and one of timm's with its weights."""
    own = finished(TorchvisionViT(32, 16, 2, 2, 24, 48, num_classes=5))
    other = micro()
    other.load_state_dict(renamed(own.state_dict(), FROM_TORCHVISION))
    return own, other


def from_open_clip(**options: Any) -> tuple[Any, Any]:
    """The same for open_clip, whose projection is timm's classifier."""
    transformer = pytest.importorskip("open_clip.transformer")
    names = {"scale_attn_inner": "scale_attn_norm", "ls_init_value": "init_values"}
    theirs = {names.get(name, name): value for name, value in options.items()}
    own = finished(transformer.VisionTransformer(32, 16, 24, 2, 2, 2.0, output_dim=5, **options))
    other = micro(pre_norm=True, norm_layer=partial(nn.LayerNorm, eps=1e-5), **theirs)
    other.head.bias.data.zero_()
    state = renamed(own.state_dict(), FROM_OPEN_CLIP)
    head, kept = state.pop("proj").T, {"head.bias": other.head.bias}
    shaped = {name: tensor.view_as(other.state_dict()[name]) for name, tensor in state.items()}
    other.load_state_dict({**shaped, "head.weight": head, **kept})
    return own, other


def from_transformers() -> tuple[Any, Any]:
    """A model of transformers', whose queries, keys and values are kept apart."""
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.ViTConfig(**shape, image_size=32, patch_size=16, num_labels=5, layer_norm_eps=1e-6)
    own, other = finished(transformers.ViTForImageClassification(config)), micro()
    state, packed = renamed(own.state_dict(), FROM_TRANSFORMERS), {}
    for name in [name for name in state if "attn.q_proj" in name]:
        ports = [state.pop(name.replace("q_proj", f"{port}_proj")) for port in "qkv"]
        packed[name.replace("q_proj", "qkv")] = torch.cat(ports)
    other.load_state_dict({**state, **packed})
    return own, other


def by_layout() -> tuple[Any, Any]:
    """A model of torchvision's once more, opened by a table."""
    own, _ = from_torchvision()
    return own, own


LAYOUT = cv.Layout(
    blocks="encoder.layers",
    norms=("ln_1", "ln_2"),
    attention="self_attention",
    mlp="mlp",
    norm="encoder.ln",
    pool="cls",
    readout="heads.head",
)
CASES = {
    "torchvision": from_torchvision,
    "open_clip": from_open_clip,
    "open_clip-norms": lambda: from_open_clip(qk_norm=True, ls_init_value=0.4),
    "open_clip-across": lambda: from_open_clip(scale_attn_inner=True),
    "transformers": from_transformers,
    "layout": by_layout,
}


def pair(name: str) -> tuple[cv.Model, cv.Model]:
    own, other = CASES[name]()
    names = [str(number) for number in range(5)]
    one = cv.wrap(own, classes=names)
    if name == "layout":
        return one, cv.wrap(other, classes=names, layout=LAYOUT, preprocessing=one.preprocessing)
    return one, cv.wrap(other, classes=names)


@pytest.mark.parametrize("name", CASES)
def test_the_same_model_gives_the_same_answer(name: str) -> None:
    one, other = pair(name)
    assert one.graph == other.graph
    task = cv.Task(CLEAN, CORRUPT, cv.logit_diff("0", "1"))
    for method in ("eap", "local", "exact"):
        first, second = (cv.attribute(model, task, method, progress=False) for model in (one, other))
        assert_close(torch.tensor(first.values), torch.tensor(second.values), 1e-9)
    circuit = first.connected(12)
    assert_close(cv.run(one, task, circuit), cv.run(other, task, circuit), 1e-9)
    assert one.weights_hash == other.weights_hash
    assert origin_differs(circuit, other) == ""  # a circuit of the one is at home on the other


@pytest.mark.parametrize("name", ["torchvision", "open_clip-norms"])
def test_every_weight_counts(name: str) -> None:
    own, _ = CASES[name]()
    model = cv.wrap(own)
    known = {model.weights_hash}
    for parameter in own.parameters():
        with torch.no_grad():
            parameter.view(-1)[-1] += 1e-9
        known.add(model.weights_hash)
    assert len(known) == 1 + len(list(own.parameters()))


def test_weights_in_other_places_are_other_weights() -> None:
    one = micro()
    hashes = {cv.wrap(one).weights_hash}
    for swap in (
        lambda block: (block.attn.q, block.attn.k),
        lambda block: (block.norm1.weight, block.norm2.weight),
        lambda block: (block.norm1.bias, block.norm2.bias),
    ):
        other = micro()
        block = other.blocks[0]
        block.attn.q, block.attn.k = block.attn.qkv.weight[:24], block.attn.qkv.weight[24:48]
        first, second = swap(block)
        with torch.no_grad():
            kept = first.clone()
            first.copy_(second)
            second.copy_(kept)
        del block.attn.q, block.attn.k
        hashes.add(cv.wrap(other).weights_hash)
    assert len(hashes) == 4


def test_what_changes_nothing_does_not_count() -> None:
    """Biases of zeros and factors of ones are as good as none; tensors that no forward uses are none."""
    plain = micro(qkv_bias=False)
    other = micro(init_values=1.0)
    other.load_state_dict(plain.state_dict(), strict=False)
    for block in other.blocks:
        block.attn.qkv.bias.data.zero_()
        block.ls1.gamma.data.fill_(1.0)
        block.ls2.gamma.data.fill_(1.0)
    other.unused = nn.Parameter(torch.ones(3))
    assert cv.wrap(plain).weights_hash == cv.wrap(other).weights_hash
    other.blocks[0].ls1.gamma.data.fill_(2.0)
    assert cv.wrap(plain).weights_hash != cv.wrap(other).weights_hash


def test_a_flat_parameter_hides_nothing() -> None:
    """All weights views of one tensor, as some trainers keep them."""
    module = micro()
    flat = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    begin = 0
    for parameter in module.parameters():
        parameter.data = flat[begin : begin + parameter.numel()].view_as(parameter)
        begin += parameter.numel()
    model, plain = cv.wrap(module), cv.wrap(micro())
    assert model.weights_hash == plain.weights_hash
    flat[:24] += 1
    model.refresh()
    assert model.weights_hash != plain.weights_hash


# -- provenance ------------------------------------------------------------------------------------


def test_files_say_which_libraries_a_model_is_made_of(tmp_path: Path) -> None:
    own, other = from_torchvision()
    for module, library in ((own, "torchvision"), (other, "timm")):
        task = cv.Task(CLEAN, CORRUPT, cv.logit_diff(0, 1))
        circuit = cv.attribute(cv.wrap(module), task, "eap", progress=False).top(5)
        circuit.save(tmp_path / "circuit.json")
        said = cv.Circuit.load(tmp_path / "circuit.json").provenance.libraries
        assert set(said) == {"torch", library}
        assert said["torch"] == torch.__version__


def test_older_files_load(tmp_path: Path) -> None:
    task = cv.Task(CLEAN, CORRUPT, cv.logit_diff(0, 1))
    model = cv.wrap(micro())
    circuit = cv.attribute(model, task, "eap", progress=False).top(5)
    circuit.save(tmp_path / "circuit.json")
    content = json.loads((tmp_path / "circuit.json").read_text())
    del content["provenance"]["libraries"]
    content["provenance"]["weights"] = "0" * 64
    (tmp_path / "old.json").write_text(json.dumps(content))
    old = cv.Circuit.load(tmp_path / "old.json")
    assert set(old) == set(circuit)
    assert origin_differs(old, model) == ""  # nothing is known to differ


def test_hashes_of_older_files_are_not_compared_with_those_of_now() -> None:
    now = Provenance("vit", "w2-" + "1" * 64)
    old = replace(now, weights="2" * 64)
    assert not old.is_comparable(now)
    assert old.mismatch(now) == ""
    assert now.mismatch(replace(now, weights="w2-" + "3" * 64)) == "different weights of 'vit'"
    assert (
        old.mismatch(replace(old, model="deit"))
        == ""
        != old.mismatch(replace(old, model="deit", weights="4" * 64))
    )
    assert Provenance.from_dict({"model": "vit", "weights": "2" * 64}).libraries == {}

"""Files of dictionaries: ours come back as they were, those of other libraries compute what these compute."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import circuitvit as cv
from circuitvit.errors import FileError, OptionError
from tests.models.test_dictionaries import FEATURES, WIDTH, dictionary, drawn

Tensors = dict[str, Tensor]


def saelens(path: Path, tensors: Tensors, **said: Any) -> Path:
    """A folder as SAELens writes it."""
    path.mkdir(exist_ok=True)
    save_file({name: each.contiguous() for name, each in tensors.items()}, path / "sae_weights.safetensors")
    (path / "cfg.json").write_text(json.dumps({"d_in": WIDTH, "d_sae": FEATURES, **said}))
    return path


def plain(path: Path, tensors: Tensors, **metadata: str) -> Path:
    save_file({name: each.contiguous() for name, each in tensors.items()}, path, {"format": "pt", **metadata})
    return path


def standard(**others: Tensor) -> Tensors:
    """Tensors by SAELens' names."""
    own = {
        "W_enc": drawn(WIDTH, FEATURES, seed=1),
        "b_enc": drawn(FEATURES, seed=2),
        "W_dec": drawn(FEATURES, WIDTH, seed=3),
        "b_dec": drawn(WIDTH, seed=4),
    }
    return {**own, **others}


def overcomplete(**others: Tensor) -> Tensors:
    """Tensors by overcomplete's names."""
    directions = drawn(FEATURES, WIDTH, seed=3)
    own = {
        "encoder.final_block.0.weight": drawn(FEATURES, WIDTH, seed=1),
        "encoder.final_block.0.bias": drawn(FEATURES, seed=2),
        "dictionary._weights": directions / directions.norm(dim=1, keepdim=True),
        "dictionary.multiplier": torch.tensor(0.5, dtype=torch.float64),
    }
    return {**own, **others}


X = drawn(5, WIDTH, seed=9)

# -- ours ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk"])
def test_a_dictionary_comes_back_as_it_was(tmp_path: Path, kind: str) -> None:
    labels = tuple(f"feature {number}" for number in range(FEATURES))
    made = dictionary(kind, site="m8", reads="input", labels=labels, card={"l0": 2.5, "data": ["a", None]})
    found = cv.load_dictionary(made.save(tmp_path / "made.safetensors"))
    assert {name: each.tolist() for name, each in found.tensors.items()} == {
        name: each.tolist() for name, each in made.tensors.items()
    }
    for name in ("kind", "k", "reads", "site", "labels", "card"):
        assert getattr(found, name) == getattr(made, name)
    assert cv.load_dictionary(tmp_path / "made.safetensors", site="m3").site == "m3"
    with pytest.raises(OptionError, match=r"k=5 for .*made.safetensors, which is"):
        cv.load_dictionary(tmp_path / "made.safetensors", k=5)


def test_a_card_that_json_cannot_hold_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="made of what JSON can hold"):
        dictionary(card={"l0": float("nan")}).save(tmp_path / "made.safetensors")
    with pytest.raises(FileError, match="there is no folder"):
        dictionary().save(tmp_path / "nowhere" / "made.safetensors")


def said(**changed: Any) -> str:
    own = {"schema": "circuitvit.dictionary/1", "kind": "relu", "k": None, "reads": "output", "site": None}
    return json.dumps({**own, "labels": None, "card": None, **changed})


@pytest.mark.parametrize(
    ("tensors", "header", "message"),
    [
        ({}, said(schema="circuitvit.dictionary/2"), "this version of circuitvit reads"),
        ({}, "[1]", "expected a JSON object"),
        ({}, said(k="many"), "k: 'many'"),
        ({}, said(labels=[1]), "labels"),
        ({}, said(kind="topk", k=-1), "at least 1"),
        ({}, said(kind="topk", k=10**9), "cannot keep the top 1000000000"),
        (
            {},
            said(kind="jumprelu"),
            "it holds bias, decoder, encoder, offset, and such a dictionary .*threshold",
        ),
        ({}, said(labels=["fur"]), "1 labels"),
        ({"bias": drawn(WIDTH) / 0}, said(), "the bias of the dictionary holds NaN or infinite values"),
        ({"bias": drawn(WIDTH + 1)}, said(), r"the tensor bias is \(5,\), where \(4 wide\) was expected"),
        ({"encoder": drawn(3)}, said(), r"encoder is \(3,\), where \(any features, any wide\) was expected"),
        ({"offset": torch.zeros(FEATURES, dtype=torch.int64)}, said(), "not torch.int64"),
        ({"more": drawn(2)}, said(), "it holds .*more"),
    ],
)
def test_files_that_say_what_is_not_so_are_refused(
    tmp_path: Path, tensors: Tensors, header: str, message: str
) -> None:
    path = tmp_path / "made.safetensors"
    save_file({**dictionary().tensors, **tensors}, path, {"dictionary": header})
    with pytest.raises(FileError, match=f"made.safetensors.*{message}"):
        cv.load_dictionary(path)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"cannot read the dictionary .*missing.safetensors"):
        cv.load_dictionary(tmp_path / "missing.safetensors")
    with pytest.raises(FileError, match=r"a folder without sae_weights.safetensors"):
        cv.load_dictionary(tmp_path)
    path = tmp_path / "made.safetensors"
    for content in (b"", b"nonsense", (2**60).to_bytes(8, "little"), (2**20).to_bytes(8, "little") + b"{}"):
        path.write_bytes(content)
        with pytest.raises(FileError, match="is no dictionary, or a damaged one"):
            cv.load_dictionary(path)
    header = json.dumps({"W_enc": {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}})
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode())  # claims 4 TB
    with pytest.raises(FileError, match="is no dictionary, or a damaged one"):
        cv.load_dictionary(path)
    for content in (pickle.dumps({"W_enc": 1}), b"PK\x03\x04"):
        path.write_bytes(content)
        with pytest.raises(FileError, match=r"is a pickle, which could run code .*convert_prisma_sae.py"):
            cv.load_dictionary(path)


# -- SAELens, written by hand ------------------------------------------------------------------------


def check(found: cv.Dictionary, features: Tensor, rebuilt: Tensor) -> None:
    """That a dictionary, encoding X, gives these features and this reconstruction."""
    assert torch.allclose(found.encode(X), features, atol=1e-12)
    assert torch.allclose(found.decode(features), rebuilt, atol=1e-12)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated", "topk"])
def test_saelens(tmp_path: Path, architecture: str, centred: bool) -> None:
    others = {"threshold": drawn(FEATURES, seed=5)} if architecture == "jumprelu" else {}
    if architecture == "gated":
        others = {
            name: drawn(FEATURES, seed=seed) for seed, name in enumerate(("b_gate", "b_mag", "r_mag"), 5)
        }
    own = standard(**others)
    path = saelens(tmp_path / "sae", own, architecture=architecture, apply_b_dec_to_input=centred, k=3)
    raw = (X - own["b_dec"] if centred else X) @ own["W_enc"]
    features = (raw + own["b_enc"]).relu()
    if architecture == "jumprelu":
        features = features * (raw + own["b_enc"] > own["threshold"])
    elif architecture == "gated":
        magnitude = (raw * own["r_mag"].exp() + own["b_mag"]).relu()
        features = magnitude * (raw + own["b_gate"] > 0)
    elif architecture == "topk":
        kept = features.topk(3, dim=-1)
        features = torch.zeros_like(features).scatter(-1, kept.indices, kept.values)
    found = cv.load_dictionary(path)
    check(found, features, features @ own["W_dec"] + own["b_dec"])
    assert (features > 0).any()
    assert cv.load_dictionary(path / "sae_weights.safetensors").kind == found.kind


def test_a_transcoder_reads_what_its_mlp_reads(tmp_path: Path) -> None:
    own = standard()
    hook = {"hook_name": "blocks.3.ln2.hook_normalized", "hook_name_out": "blocks.3.hook_mlp_out"}
    path = saelens(tmp_path, own, architecture="transcoder", apply_b_dec_to_input=False, metadata=hook)
    found = cv.load_dictionary(path)
    features = (X @ own["W_enc"] + own["b_enc"]).relu()
    check(found, features, features @ own["W_dec"] + own["b_dec"])
    assert (found.reads, found.site) == ("input", "m3")


def test_features_scaled_by_their_directions_are_folded(tmp_path: Path) -> None:
    own = standard()
    path = saelens(tmp_path, own, architecture="topk", k=2, rescale_acts_by_decoder_norm=True)
    norms = own["W_dec"].norm(dim=1)
    kept = (((X - own["b_dec"]) @ own["W_enc"] + own["b_enc"]) * norms).topk(2, dim=-1)
    features = torch.zeros(5, FEATURES, dtype=torch.float64).scatter(-1, kept.indices, kept.values.relu())
    check(cv.load_dictionary(path), features, (features / norms) @ own["W_dec"] + own["b_dec"])


def test_configurations_from_before_version_6_are_understood(tmp_path: Path) -> None:
    old = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2}, "normalize_activations": False}
    found = cv.load_dictionary(saelens(tmp_path, standard(), hook_point="blocks.4.hook_resid_post", **old))
    assert (found.kind, found.k, found.site) == ("topk", 2, "resid5")
    assert torch.allclose(found.offset, standard()["b_enc"] - standard()["b_dec"] @ standard()["W_enc"])


@pytest.mark.parametrize(
    ("hook", "head", "site"),
    [
        ("blocks.11.hook_mlp_out", None, "m11"),
        ("blocks.0.hook_resid_pre", None, "resid0"),
        ("blocks.2.hook_resid_mid", None, "mid2"),
        ("blocks.9.attn.hook_z", 2, "a9.h2.z"),
        ("blocks.9.attn.hook_z", None, None),
        ("blocks.9.hook_attn_out", None, None),
    ],
)
def test_sites_are_named_as_here(tmp_path: Path, hook: str, head: int | None, site: str | None) -> None:
    said = {"hook_name": hook, "hook_head_index": head}
    assert cv.load_dictionary(saelens(tmp_path, standard(), metadata=said)).site == site


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({}, {"architecture": "temporal"}, "the architecture 'temporal' is no dictionary here"),
        ({}, {"activation_fn": "tanh-relu"}, "activation_fn 'tanh-relu'"),
        ({}, {"normalize_activations": "layer_norm"}, "'layer_norm' divides each activation by its own"),
        (
            {},
            {"normalize_activations": True},
            "fold them in SAELens by sae.fold_activation_norm_scaling_factor",
        ),
        ({}, {"architecture": "jumprelu"}, "there is no tensor threshold"),
        ({}, {"architecture": "topk"}, "is a whole number, not None"),
        ({}, {"d_sae": 9}, r"the tensor W_enc is \(4, 7\), where \(4 wide, 9 features\) was expected"),
        ({}, {"architecture": "transcoder", "d_out": 5}, "turns width 4 into 5"),
        ({"W_skip": drawn(WIDTH, WIDTH)}, {}, "W_skip .* is more than its features"),
        ({"W_up": drawn(WIDTH)}, {}, "the tensor W_up is not known: known are W_enc"),
        ({"scaling_factor": drawn(FEATURES)}, {}, "fold scaling_factor into W_dec"),
        ({"b_enc": drawn(FEATURES) / 0}, {}, "the offset of the dictionary holds NaN or infinite"),
    ],
)
def test_what_saelens_does_and_a_dictionary_does_not_is_refused(
    tmp_path: Path, tensors: Tensors, config: dict[str, Any], message: str
) -> None:
    path = saelens(tmp_path, standard(**tensors), **config)
    with pytest.raises(FileError, match=f"sae_weights.safetensors.*{message}"):
        cv.load_dictionary(path)


def test_what_a_plain_file_does_not_say_can_be_said(tmp_path: Path) -> None:
    own, path = standard(), tmp_path / "plain.safetensors"
    with pytest.raises(FileError, match="does not say what it is: load it with kind='relu', or with k="):
        cv.load_dictionary(plain(path, own))
    with pytest.raises(FileError, match=r"does not say whether b_dec is subtracted .*centred=True or"):
        cv.load_dictionary(path, kind="relu")
    with pytest.raises(FileError, match="true or false, not 'no'"):
        cv.load_dictionary(path, kind="relu", centred="no")  # type: ignore[arg-type]
    found = cv.load_dictionary(path, kind="relu", centred=False, site="m1")
    assert (found.kind, found.site) == ("relu", "m1")
    assert torch.equal(found.offset, own["b_enc"])
    written = {"architecture": "topk", "k": "2", "apply_b_dec_to_input": "false", "site": "m2"}
    found = cv.load_dictionary(plain(path, own, **written))
    assert (found.kind, found.k, found.site) == ("topk", 2, "m2")
    with pytest.raises(OptionError, match=r"centred=True for .*plain.safetensors, which is False"):
        cv.load_dictionary(path, centred=True)
    with pytest.raises(FileError, match="its tensors are bias, weight, and SAELens'"):
        cv.load_dictionary(plain(path, {"weight": drawn(2, 2), "bias": drawn(2)}))


# -- overcomplete, written by hand ---------------------------------------------------------------


def test_overcomplete(tmp_path: Path) -> None:
    own, path = overcomplete(), tmp_path / "sae.safetensors"
    rows = own["dictionary._weights"] * own["dictionary.multiplier"].exp()
    features = (X @ own["encoder.final_block.0.weight"].T + own["encoder.final_block.0.bias"]).relu()
    with pytest.raises(FileError, match="load it with kind='relu' for an SAE, or with k= for a TopKSAE"):
        cv.load_dictionary(plain(path, own))
    check(cv.load_dictionary(path, kind="relu"), features, features @ rows)
    kept = features.topk(2, dim=-1)
    few = torch.zeros_like(features).scatter(-1, kept.indices, kept.values)
    check(cv.load_dictionary(path, k=2), few, few @ rows)
    jumping = overcomplete(thresholds=torch.full((FEATURES,), -1.0, dtype=torch.float64))
    found = cv.load_dictionary(plain(path, jumping))
    features = features * (features >= torch.tensor(-1.0, dtype=torch.float64).exp())
    check(found, features, features @ rows)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("encoder.mlp_blocks.0.0.weight", "norms or hidden layers is not one linear map"),
        ("encoder.final_block.1.running_mean", "norms or hidden layers is not one linear map"),
        ("dictionary.Relax", "of an archetypal dictionary, save sae.get_dictionary"),
    ],
)
def test_what_overcomplete_does_and_a_dictionary_does_not_is_refused(
    tmp_path: Path, name: str, message: str
) -> None:
    path = plain(tmp_path / "sae.safetensors", overcomplete(**{name: drawn(FEATURES)}), k="2")
    with pytest.raises(FileError, match=f"the tensor {name} is not known: .*{message}"):
        cv.load_dictionary(path)


def test_directions_that_training_left_between_two_steps_are_refused(tmp_path: Path) -> None:
    moved = overcomplete(**{"dictionary._weights": drawn(FEATURES, WIDTH)})
    with pytest.raises(FileError, match=r"save sae.state_dict\(\) after sae.eval\(\)"):
        cv.load_dictionary(plain(tmp_path / "sae.safetensors", moved, k="2"))
    found = cv.load_dictionary(plain(tmp_path / "sae.safetensors", moved, k="2", normalization="identity"))
    assert torch.allclose(found.decoder, drawn(FEATURES, WIDTH) * torch.tensor(0.5).exp())

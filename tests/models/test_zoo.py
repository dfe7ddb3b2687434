"""The bundled models: as accurate as their cards say, and refused when anything was changed."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import circuitvit as cv
from circuitvit.datasets import catdog, digits, shortcuts, signs
from circuitvit.errors import DataError, FileError, ModelError, NameNotFoundError
from circuitvit.models import zoo
from circuitvit.models.zoo import Card, build_module, load_module, load_zoo_module, zoo_card, zoo_names
from circuitvit.models.zoo.card import sha256
from circuitvit.models.zoo.clip_module import ClipModule
from circuitvit.training.clip import clip_accuracy

FOLDER = Path(zoo.__file__).parent


def test_names() -> None:
    assert zoo_names() == ("catdog-shortcut", "catdog-tiny", "clip-tiny", "digits-tiny")
    with pytest.raises(NameNotFoundError, match="did you mean 'catdog-tiny'"):
        load_zoo_module("catdog_tiny")


@pytest.mark.parametrize("name", ["catdog-shortcut", "catdog-tiny", "digits-tiny"])
def test_cards_and_weights(name: str) -> None:
    card = zoo_card(name)
    assert card.name == name
    assert Card.from_dict(json.loads(json.dumps(card.to_dict()))) == card
    assert card.license == "MIT"
    assert card.recipe["steps_done"] == card.recipe["steps"]
    assert (FOLDER / f"{name}.safetensors").stat().st_size < 2_000_000
    module = load_zoo_module(name)
    assert not module.training
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in module.parameters())
    with torch.no_grad():
        assert module(torch.zeros(2, *card.input.size)).shape == (2, len(card.classes))


@torch.no_grad()
def test_catdog_tiny_is_right_on_fresh_pictures() -> None:
    assert zoo_card("catdog-tiny").classes == catdog.CLASSES
    module = load_zoo_module("catdog-tiny")
    scenes = catdog.random_scenes(2000, seed=424242)  # neither the training seed nor that of its card
    logits = module(catdog.normalise(catdog.draw_scenes(scenes)))
    right = logits.argmax(dim=1) == catdog.scene_targets(scenes).argmax(dim=1)
    assert right.float().mean() >= 0.98


@torch.no_grad()
def test_catdog_tiny_changes_its_mind_with_the_species() -> None:
    clean, corrupt = catdog.catdog_pairs(64, seed=424243)
    module = load_zoo_module("catdog-tiny")
    assert (module(clean).argmax(dim=1) == 0).float().mean() >= 0.95
    assert (module(corrupt).argmax(dim=1) == 1).float().mean() >= 0.95


@torch.no_grad()
def test_catdog_shortcut_has_the_fault_that_its_card_says() -> None:
    module, said = load_zoo_module("catdog-shortcut"), zoo_card("catdog-shortcut").accuracy
    assert said["worst_group"] == min(value for name, value in said.items() if "background" in name)
    n = 25
    for group, scenes in shortcuts.group_scenes(
        n, seed=424245
    ).items():  # neither its training's nor its card's
        right = module(signs.normalise(signs.draw_scenes(scenes))).argmax(dim=1) == shortcuts.labels(scenes)
        allowed = 4 * math.sqrt(max(said[group] * (1 - said[group]), 0.01) / n)
        assert float(right.float().mean()) == pytest.approx(said[group], abs=allowed), group
    assert said["worst_group"] < 0.5
    assert said["held_out"] > 0.98


@torch.no_grad()
def test_clip_tiny_looks_and_reads_as_its_card_says() -> None:
    module, card = load_zoo_module("clip-tiny"), zoo_card("clip-tiny")
    assert isinstance(module, ClipModule)
    assert card.tokenizer is not None
    assert card.recipe["steps_done"] == card.recipe["steps"]
    assert card.accuracy["held_out"] >= 0.95
    assert 0.3 <= card.accuracy["attack_rate"] <= 0.8
    n = 200
    found = clip_accuracy(module, card.tokenizer, n, seed=424244)  # neither its training's nor its card's
    for name in {*card.accuracy} - {"n"}:
        share = card.accuracy[name]
        allowed = 4 * math.sqrt(
            max(share * (1 - share), 0.01) / (n / 2)
        )  # as signs are in half of the scenes
        assert found[name] == pytest.approx(share, abs=allowed), name


def test_clip_tiny_opens_with_its_words() -> None:
    clip = cv.load("clip-tiny")
    assert clip.words is not None
    assert not clip.has_classes
    model = clip.with_prompts(["cat", "dog", "rabbit", "bear"], ["a photo of a {}"])
    clean, corrupt = signs.animal_pairs(16, seed=7)
    assert (model(clean).argmax(dim=1) == 0).all()
    assert (model(corrupt).argmax(dim=1) == 1).all()
    with pytest.raises(DataError, match="the nearest is 'rabbit'"):
        clip.with_prompts(["a photo of a rabit"])


@torch.no_grad()
def test_digits_tiny_is_right_on_held_out_digits() -> None:
    pytest.importorskip("sklearn")
    _, held_out = digits.digits_split()
    right = load_zoo_module("digits-tiny")(held_out.images).argmax(dim=1) == held_out.labels
    assert right.float().mean() >= 0.97


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for ending in (".json", ".safetensors"):
        shutil.copy(FOLDER / f"digits-tiny{ending}", tmp_path / f"mine{ending}")
    return tmp_path / "mine.json"


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(
        json.dumps({key: value for key, value in {**content, **changes}.items() if value is not ...})
    )


def test_changed_weights_are_refused(copy: Path) -> None:
    weights = copy.with_suffix(".safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(FileError, match="SHA-256"):
        load_module(copy)


def test_missing_weights_are_refused(copy: Path) -> None:
    copy.with_suffix(".safetensors").unlink()
    with pytest.raises(FileError, match="cannot read the weights"):
        load_module(copy)


def test_weights_of_another_shape_are_refused(copy: Path) -> None:
    weights = copy.with_suffix(".safetensors")
    save_file({k: v for k, v in load_file(weights).items() if k != "cls_token"}, weights)
    edit(copy, weights_sha256=sha256(weights.read_bytes()))
    with pytest.raises(ModelError, match="does not fit"):
        load_module(copy)


@pytest.mark.parametrize("changes", [{"depth": 10**6}, {"embed_dim": 2**20}, {"mlp_ratio": 1e6}])
def test_sizes_that_the_weights_do_not_have_are_refused_before_they_are_made(
    copy: Path, changes: dict[str, Any]
) -> None:
    """The largest of these would take minutes, or terabytes."""
    edit(copy, architecture={**json.loads(copy.read_text())["architecture"], **changes})
    with pytest.raises(ModelError, match="does not fit"):
        load_module(copy)


def test_weights_that_are_no_safetensors_are_refused(copy: Path) -> None:
    copy.with_suffix(".safetensors").write_bytes(b"hello")
    edit(copy, weights_sha256=sha256(b"hello"))
    with pytest.raises(FileError, match="not a safetensors file"):
        load_module(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": "circuitvit.card/9"}, "this version reads 'circuitvit.card/1'"),
        ({"seed": ...}, "missing seed"),
        ({"colour": "red"}, "unknown colour"),
        ({"seed": "0"}, "seed cannot be a str"),
        ({"seed": True}, "seed cannot be a bool"),
        ({"classes": ["0", "1"]}, "2 classes, but num_classes=10"),
        ({"classes": ["0"] * 10}, "different names"),
        ({"weights_sha256": "abc"}, "not a SHA-256"),
        ({"accuracy": {}}, "held_out and n"),
        ({"input": {"size": [1, 8, 8]}}, "input: missing mean"),
    ],
)
def test_malformed_cards_are_refused(copy: Path, changes: dict[str, Any], message: str) -> None:
    edit(copy, **changes)
    with pytest.raises(FileError, match=message):
        Card.load(copy)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("size", [8, 8], "channels, height, width"),
        ("mean", [0.5, 0.5], "mean needs a number for each of 1"),
        ("std", [0.0], "above 0"),
    ],
)
def test_malformed_inputs_are_refused(copy: Path, key: str, value: Any, message: str) -> None:
    edit(copy, input={**json.loads(copy.read_text())["input"], key: value})
    with pytest.raises(FileError, match=message):
        Card.load(copy)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "cannot read the card"),
        (lambda path: path.write_text("{"), "not JSON"),
        (lambda path: path.write_bytes(b"\xff\xfe\xff"), "not JSON"),
        (lambda path: path.write_text("[]"), "a card is a JSON object"),
    ],
)
def test_unreadable_cards_are_refused(copy: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(copy)
    with pytest.raises(FileError, match=message):
        Card.load(copy)


def test_building_needs_known_arguments_and_leaves_the_random_state_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    shape = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2, "num_classes": 2}
    first, again = build_module(shape, seed=1), build_module(shape, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.cls_token, again.cls_token)
    with pytest.raises(ModelError, match="'banana'"):
        build_module({"banana": 1})

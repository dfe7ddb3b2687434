"""Training: the same seed gives the same bytes, and what cannot be trained on is refused beforehand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from circuitvit.cli.models import train as train_command
from circuitvit.datasets import catdog
from circuitvit.errors import CircuitViTError, DataError, FileError, ModelError, OptionError
from circuitvit.models.zoo import Card, load_module, load_zoo_module
from circuitvit.training import (
    Labelled,
    Recipe,
    TrainingData,
    catdog_data,
    evaluate,
    shortcut_data,
    train,
    training_data,
)
from circuitvit.training.checkpoints import checkpoint_steps
from circuitvit.training.loop import head_groups, shrink

MICRO = {"embed_dim": 16, "depth": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def data() -> TrainingData:
    return catdog_data(seed=0, held_out=8)


def run(data: TrainingData, out: Path | None = None, **options: Any) -> Any:
    return train(
        data,
        out,
        architecture=MICRO,
        progress=False,
        **{"steps": 3, "batch_size": 8, "threads": 1, **options},
    )


def test_same_seed_gives_the_same_bytes(data: TrainingData, tmp_path: Path) -> None:
    files = [run(data, tmp_path / name, sparsity=0.01).weights.read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]
    assert run(data, tmp_path / "c", seed=1).weights.read_bytes() != files[0]


def test_global_state_is_left_alone(data: TrainingData) -> None:
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    result = run(data, threads=threads + 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert not result.model.training
    assert all(block.attn.fused_attn for block in result.model.blocks)


def test_saved_model_is_the_trained_one(data: TrainingData, tmp_path: Path) -> None:
    result = run(data, tmp_path / "deep" / "er" / "mine.safetensors")
    assert result.weights == tmp_path / "deep" / "er" / "mine.safetensors"
    module, card = load_module(result.weights.with_suffix(".json"))
    assert card == result.card
    assert card.name == "mine"
    assert card.classes == catdog.CLASSES
    assert card.recipe["steps_done"] == 3
    assert set(card.accuracy) == {"held_out", "n", "two_animals"}
    assert card.accuracy["held_out"] == evaluate(module, data.held_out) == result.accuracy
    with torch.no_grad():
        assert torch.equal(module(data.held_out.images), result.model(data.held_out.images))


def test_interruption_keeps_what_was_learned(data: TrainingData, tmp_path: Path) -> None:
    def interrupted(step: int, size: int) -> Labelled:
        if step == 2:
            raise KeyboardInterrupt
        return data.batch(step, size)

    result = run(replace(data, batch=interrupted), tmp_path / "cut", steps=5)
    assert result.interrupted
    assert result.card.recipe["steps_done"] == 2
    assert load_file(result.weights).keys() == result.model.state_dict().keys()


def test_checkpoints_are_of_their_steps_and_change_nothing(data: TrainingData, tmp_path: Path) -> None:
    plain = run(data, tmp_path / "plain", steps=9)
    kept = run(data, tmp_path / "kept", steps=9, checkpoints=4)
    assert kept.weights.read_bytes() == plain.weights.read_bytes()
    assert replace(kept.card, name="plain") == plain.card
    cards = [Card.load(path.with_suffix(".json")) for path in kept.checkpoints]
    assert [path.stem for path in kept.checkpoints] == [f"kept-step-{step:06d}" for step in (0, 1, 4, 9)]
    assert [card.recipe["steps_done"] for card in cards] == [0, 1, 4, 9]
    assert kept.checkpoints[-1].read_bytes() == kept.weights.read_bytes()
    assert cards[-1].accuracy == kept.card.accuracy
    stopped = replace(data, batch=lambda step, size: data.batch(step, size) if step < 4 else _stop())
    assert run(stopped, tmp_path / "cut", steps=9).weights.read_bytes() == kept.checkpoints[2].read_bytes()


def _stop() -> Labelled:
    raise KeyboardInterrupt


def test_a_folder_of_checkpoints_never_holds_two_trainings(data: TrainingData, tmp_path: Path) -> None:
    (tmp_path / "m-checkpoints").mkdir()
    (tmp_path / "m-checkpoints" / "notes.txt").write_text("mine")
    run(data, tmp_path / "m", steps=3, checkpoints=4)
    run(data, tmp_path / "m", steps=2, checkpoints=2)
    names = sorted(path.name for path in (tmp_path / "m-checkpoints").iterdir())
    assert names == [
        *(f"m-step-00000{step}.{end}" for step in (0, 2) for end in ("json", "safetensors")), "notes.txt",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("count", "out", "message"),
    [
        (4, "x", "2 steps have 3 checkpoints at most, not 4"),
        (1, "x", "the number of checkpoints must be at least 2, not 1"),
        (2, None, "checkpoints are kept beside the model: say where"),
    ],
)
def test_checkpoints_that_cannot_be_had(
    data: TrainingData, tmp_path: Path, count: int, out: str | None, message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        run(data, None if out is None else tmp_path / out, steps=2, checkpoints=count)


@given(st.integers(2, 60), st.integers(1, 10**6))
def test_steps_of_checkpoints_rise_from_the_first_to_the_last(count: int, steps: int) -> None:
    assume(count <= steps + 1)
    found = checkpoint_steps(count, steps)
    assert len(found) == count
    assert (found[0], found[-1]) == (0, steps)
    assert all(before < after for before, after in pairwise(found))


def test_loss_falls_on_a_small_fixed_set() -> None:
    images = catdog.normalise(catdog.draw_scenes(scenes := catdog.random_scenes(8, seed=0)))
    fixed = Labelled(images, catdog.scene_targets(scenes))
    data = replace(catdog_data(0, held_out=1), batch=lambda step, size: fixed, held_out=fixed, extra={})
    assert run(data, steps=60, learning_rate=5e-3).accuracy == 1.0


def test_right_means_all_present_classes_on_top() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0], [3.0, 0.0, 2.0, 1.0], [0.0, 1.0, 0.0, 0.0]])
    targets = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    assert evaluate(torch.nn.Identity(), Labelled(logits, targets)) == pytest.approx(2 / 3)


def test_a_shortcut_is_learned_on_top_of_a_bundled_model(tmp_path: Path) -> None:
    """What is not trained stays as it is to the bit; the card tells cue, share, start, and every group."""
    data = shortcut_data(seed=0, cue="word", share=0.9, held_out=4)
    result = train(data, tmp_path / "read", progress=False, steps=2, batch_size=4)
    started, trained = load_zoo_module("catdog-tiny").state_dict(), result.model.state_dict()
    changed = {name for name, value in trained.items() if not torch.equal(value, started[name])}
    assert {name.split(".")[0] for name in changed} == {"blocks", "norm", "head"}
    assert {name.split(".")[1] for name in changed if name.startswith("blocks")} == {"3"}
    assert all(weights.requires_grad for weights in result.model.parameters())
    card = load_module(tmp_path / "read.json")[1]
    assert {"shortcut": "word", "shortcut_share": 0.9, "start": "catdog-tiny"}.items() <= card.recipe.items()
    groups = {name: value for name, value in card.accuracy.items() if "word" in name}
    assert len(groups) == 8
    assert card.accuracy["worst_group"] == min(groups.values())
    again = train(data, progress=False, steps=2, batch_size=4)
    assert again.card.weights_sha256 == card.weights_sha256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "digits", "shortcut": "word"}, "catdog's scenes alone, not into digits"),
        ({"dataset": "clip", "shortcut": "word"}, "catdog's scenes alone, not into clip"),
        ({"dataset": "catdog", "shortcut_share": 0.9}, "say which"),
        ({"dataset": "catdog", "shortcut": "word", "shortcut_share": 2.0}, "between 0 and 1"),
        ({"dataset": "catdog", "shortcut": "size"}, "unknown cue 'size'"),
    ],
)
def test_senseless_shortcuts_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CircuitViTError, match=message):
        training_data(**options)


def test_group_lasso_lowers_each_head_alike(data: TrainingData) -> None:
    module = run(data).model
    written = module.blocks[0].attn.proj.weight.detach()
    whole = written.clone()
    for groups in head_groups(module):
        shrink(groups, 1e-4)
    for head in (slice(0, 8), slice(8, 16)):
        before, after = (weights[:, head].square().mean().sqrt() for weights in (whole, written))
        assert torch.isclose(before - after, torch.tensor(1e-4), atol=1e-6)
        assert torch.allclose(written[:, head] / after, whole[:, head] / before, atol=1e-5)
    for groups in head_groups(module):
        shrink(groups, 1.0)
    assert not module.blocks[0].attn.qkv.weight.any()
    assert not written.any()


def test_silent_heads_and_neurons_stay_silent_once_the_pull_is_over(data: TrainingData) -> None:
    attention = run(data, steps=10, sparsity=1e4).model.blocks[0].attn
    assert not attention.qkv.weight.any()
    assert not attention.proj.weight.any()
    mlp = run(data, steps=10, mlp_sparsity=1e4).model.blocks[0].mlp
    assert not mlp.fc1.weight.any()
    assert not mlp.fc2.weight.any()
    recipe = Recipe(steps=100)
    assert [recipe.pull(step) for step in (0, 15, 30, 59, 60, 99)] == [0.0, 0.5, 1.0, 1.0, 0.0, 0.0]


def test_rate_rises_and_falls() -> None:
    recipe = Recipe(steps=100, learning_rate=1.0, warmup=0.1)
    rates = [recipe.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.001


def test_catdog_batches_depend_on_the_step_alone(data: TrainingData) -> None:
    first, again, other = data.batch(4, 8), data.batch(4, 8), data.batch(5, 8)
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)
    assert (first.targets == 0.5).any(dim=1).sum() == 2  # a quarter with two animals


def test_digits_batches_are_the_training_digits_moved_about() -> None:
    pytest.importorskip("sklearn")
    data = training_data("digits", seed=0)
    batch = data.batch(0, 32)
    assert batch.images.shape == (32, 1, 8, 8)
    assert torch.equal(batch.images, data.batch(0, 32).images)
    assert run(data).card.input.size == (1, 8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 3}, "no such training option: epochs"),
        ({"steps": 0}, "steps is at least 1"),
        ({"learning_rate": 0.0}, "learning_rate is above 0"),
        ({"weight_decay": -1.0}, "not negative"),
        ({"warmup": 1.5}, "fractions"),
    ],
)
def test_senseless_options_are_refused(data: TrainingData, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        run(data, **options)


def test_senseless_architectures_are_refused(data: TrainingData) -> None:
    with pytest.raises(ModelError, match="'n_layers'"):
        train(data, architecture={"n_layers": 2}, progress=False)
    with pytest.raises(ModelError, match="refuses"):
        train(data, architecture={"embed_dim": 30, "num_heads": 4}, progress=False)


def test_unwritable_place_is_found_before_training(data: TrainingData, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    def never(step: int, size: int) -> Labelled:
        raise AssertionError("training began")

    with pytest.raises(FileError, match="cannot write"):
        run(replace(data, batch=never), tmp_path / "file" / "model")


def test_exploding_loss_is_an_error(data: TrainingData) -> None:
    nothing = replace(
        data, batch=lambda step, size: Labelled(torch.full((2, 3, 48, 48), torch.nan), torch.eye(4)[:2])
    )
    with pytest.raises(DataError, match="loss is nan at step 0"):
        run(nothing)


# Folders


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (20, 14)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, size=(*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(5):
        picture(tmp_path / "birds" / "wren" / f"{number}.png", number)
        picture(tmp_path / "birds" / "robin" / f"{number}.jpg", 10 + number)
    return tmp_path / "birds"


def test_folder_is_read_split_and_trained_on(folder: Path) -> None:
    data = training_data(folder, seed=0)
    assert data.classes == ("robin", "wren")
    assert data.name == "birds"
    assert len(data.held_out) == 2
    assert data.held_out.targets.sum(dim=0).tolist() == [1.0, 1.0]
    batch = data.batch(0, 6)
    assert batch.images.shape == (6, 3, 48, 48)
    assert batch.images.abs().max() <= 1
    assert torch.equal(batch.images, training_data(folder, seed=0).batch(0, 6).images)
    assert run(data).card.classes == ("robin", "wren")


def empty(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def single_class(folder: Path) -> None:
    for path in (folder / "wren").iterdir():
        path.unlink()
    (folder / "wren").rmdir()


def class_without_pictures(folder: Path) -> None:
    for path in (folder / "wren").iterdir():
        path.rename(path.with_suffix(".txt"))


def truncated(folder: Path) -> None:
    path = folder / "robin" / "3.jpg"
    path.write_bytes(path.read_bytes()[:200])


def not_an_image(folder: Path) -> None:
    (folder / "wren" / "2.png").write_text("hello")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (empty, "has no subfolders"),
        (single_class, "single class, robin"),
        (class_without_pictures, "wren has no pictures"),
        (truncated, r"cannot read the image .*3\.jpg"),
        (not_an_image, r"wren/2\.png is not an image"),
    ],
)
def test_damaged_folders_are_refused(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(DataError, match=message):
        training_data(folder)


def test_size_is_for_folders(folder: Path) -> None:
    assert training_data(folder, size=16).held_out.images.shape == (2, 3, 16, 16)
    with pytest.raises(OptionError, match="multiple of 8"):
        training_data(folder, size=20)
    with pytest.raises(OptionError, match="size is for folders"):
        training_data("catdog", size=16)


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        training_data(tmp_path / "cadtog")


# The command


def test_command_trains_and_reports(folder: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command("train")(train_command)
    size = ["--steps", "2", "--batch-size", "4", "--width", "8", "--depth", "1", "--heads", "2"]
    size += ["--checkpoints", "3"]
    result = CliRunner().invoke(app, [str(folder), "--out", str(tmp_path / "b"), "--quiet", *size])
    assert result.exit_code == 0, result.output
    assert "accuracy, held out" in result.output
    assert f"wrote 3 checkpoints to {tmp_path / 'b-checkpoints'}" in result.output.replace("\n", " ")
    card = Card.from_dict(json.loads((tmp_path / "b.json").read_text()))
    assert card.architecture["embed_dim"] == 8
    assert card.recipe["steps"] == 2

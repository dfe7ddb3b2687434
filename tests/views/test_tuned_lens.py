"""The tuned lens: it finds maps that were planted, and refuses what it cannot be trained on or read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import circuitvit as cv
from circuitvit.cli.inside import view
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.errors import DataError, FileError, ModelError, OptionError
from circuitvit.models import Model
from circuitvit.views import TunedLens, logit_lens, tuned_lens
from tests.models.test_pooling import micro as pooling
from tests.strategies import Recipe

SMALL = Recipe(depth=2, heads=2)


@pytest.fixture(scope="module")
def catdog() -> Model:
    return cv.load("catdog-tiny")


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.cat([*catdog_pairs(30, seed=0)])


@pytest.fixture(scope="module")
def lens(catdog: Model, images: Tensor) -> TunedLens:
    return tuned_lens(catdog, images, epochs=10, progress=False)


def rotated(recipe: Recipe) -> tuple[Model, Tensor]:
    """A model whose second block does nothing but to rotate the stream, and the rotation."""
    module = recipe.build(torch.float32)
    block = module.blocks[1]
    block.mlp.act = nn.Identity()
    width = block.mlp.fc1.in_features
    rotation, _ = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(3)))
    with torch.no_grad():
        for layer in (block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            layer.weight.zero_()
            layer.bias.zero_()
        block.mlp.fc1.weight[:width] = torch.eye(width)
        block.mlp.fc2.weight[:, :width] = rotation - torch.eye(width)
        module.head.weight.mul_(4.0)
    return cv.wrap(module), rotation


def test_a_planted_rotation_is_learned_and_the_logit_lens_cannot_see_through_it() -> None:
    recipe = Recipe(depth=2, norm="none", classes=6, pool="avg", class_token=False)
    model, rotation = rotated(recipe)
    lens = tuned_lens(model, recipe.images(300).float(), epochs=40, progress=False)
    before, after = (lens.held_out.kl_of(each, "layer 0").value for each in ("logit", "tuned"))
    assert before > 0.3
    assert after < 0.01 * before
    assert lens.held_out.agreement_of("logit", "layer 0").value < 0.6
    assert lens.held_out.agreement_of("tuned", "layer 0").value > 0.9  # 72 of 75
    head = model.module.head.weight  # type: ignore[union-attr]
    contrast = head - head.mean(dim=0)  # what the softmax sees of it
    stream = model.activations(recipe.images(50, seed=1).float(), "resid1", progress=False)["resid1"]
    found, planted = (
        each.mean(dim=1) @ contrast.T for each in (lens.mapped("layer 0", stream), stream @ rotation.T)
    )
    assert (found - planted).norm() < 0.25 * planted.norm()
    assert (stream.mean(dim=1) @ contrast.T - planted).norm() > 0.5 * planted.norm()
    assert torch.equal(lens.weight[2], torch.eye(6))
    assert not lens.bias[2].any()
    assert not lens.held_out.kl[:, 2].any()


def test_figures_are_those_of_a_literal_computation() -> None:
    module = SMALL.build(torch.float32)
    model, images = cv.wrap(module), SMALL.images(60).float()
    lens = tuned_lens(model, images, epochs=5, progress=False)
    rows = [int(name.removeprefix("image ")) for name in lens.held_out.images]
    acts = model.activations(images[rows], "resid*", progress=False)
    own = module(images[rows]).double().softmax(dim=-1)
    for place in range(3):
        for kind, mapped in enumerate(
            (acts[f"resid{place}"], acts[f"resid{place}"] @ lens.weight[place].T + lens.bias[place])
        ):
            with torch.no_grad():
                read = module.head(module.norm(mapped)[:, 0]).double().softmax(dim=-1)
            literal = (own * (own / read).log()).sum(dim=-1)
            np.testing.assert_allclose(lens.held_out.kl[kind, place], literal.detach(), atol=2e-5)
            assert lens.held_out.agrees[kind, place].tolist() == (read.argmax(1) == own.argmax(1)).tolist()
    gain = lens.held_out.gain("layer 0")
    assert gain.value == pytest.approx((lens.held_out.kl[0, 1] - lens.held_out.kl[1, 1]).mean())
    assert len(lens.held_out.table()) == 3


def test_it_is_applied_as_a_logit_lens(lens: TunedLens, catdog: Model, images: Tensor) -> None:
    plain, seen = logit_lens(catdog, images[:2]), lens.apply(catdog, images[:2], classes=["cat", "dog"])
    assert seen.title == "Tuned lens"
    assert seen.classes == (0, 1)
    np.testing.assert_array_equal(seen.pooled[-1], plain.pooled[-1][:, :2])
    stream = catdog.activations(images[:2], "resid1", progress=False)["resid1"]
    moved = catdog.edit({"resid4": stream @ lens.weight[1].T + lens.bias[1]})
    np.testing.assert_allclose(seen.pooled[1], moved(images[:2])[:, :2], atol=1e-4)
    assert "Tuned lens of image 0" in seen.to_html()
    with pytest.raises(OptionError, match="no map after attn0"):
        lens.apply(catdog, images[:1], detail="stage")


def test_the_seed_decides_and_memory_does_not(lens: TunedLens, catdog: Model, images: Tensor) -> None:
    again = tuned_lens(catdog, images, epochs=10, memory=1, progress=False)
    assert torch.equal(again.weight, lens.weight)
    np.testing.assert_array_equal(again.held_out.kl, lens.held_out.kl)
    other = tuned_lens(catdog, images, epochs=1, seed=1, progress=False)
    assert set(other.held_out.images) != set(lens.held_out.images)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(depth=2, heads=2, pool="avg"),
        Recipe(depth=2, heads=2, pool="max", fc_norm=True, class_token=False),
        Recipe(depth=2, heads=2, distilled=True),
        Recipe(depth=2, heads=2, registers=2),
    ],
    ids=["avg", "max", "distilled", "registers"],
)
def test_models_are_read_as_their_readout_reads_them(recipe: Recipe) -> None:
    model, images = cv.wrap(recipe.build()), recipe.images(120)
    lens = tuned_lens(model, images, epochs=20, progress=False)
    assert lens.held_out.kl[:, -1].max() < 1e-6
    assert lens.held_out.kl[1, 0].mean() < lens.held_out.kl[0, 0].mean()
    every = recipe.pool != "token"
    assert ("patch" in lens.tokens) == every
    assert every != any("trained on" in each for each in lens.caveats)
    np.testing.assert_allclose(lens.apply(model, images[:2]).pooled[-1], model(images[:2]), atol=1e-5)


def test_pools_heads_and_edits_are_part_of_what_is_read(catdog: Model, images: Tensor) -> None:
    pooled = cv.wrap(pooling(global_pool="map", class_token=True))
    noise = torch.randn(60, *pooled.preprocessing.shape, generator=torch.Generator().manual_seed(0))
    headed = cv.with_head(catdog, torch.randn(3, 64, generator=torch.Generator().manual_seed(0)))
    for model, given in ((pooled, noise), (headed, images), (catdog.edit({"m1": 0, "resid4": 1.0}), images)):
        found = tuned_lens(model, given, epochs=2, progress=False)
        assert found.held_out.kl[:, -1].max() < 1e-6
        assert found.measure(model, given[:6], progress=False).kl.shape == (2, len(found.positions), 6)


def test_a_file_gives_the_same_lens_back_and_knows_its_model(
    lens: TunedLens, catdog: Model, tmp_path: Path
) -> None:
    path = tmp_path / "lens.safetensors"
    lens.save(path)
    again = TunedLens.load(path, catdog)
    assert torch.equal(again.weight, lens.weight)
    assert (again.positions, again.strengths, again.epochs) == (lens.positions, lens.strengths, lens.epochs)
    np.testing.assert_array_equal(again.held_out.agrees, lens.held_out.agrees)
    assert repr(again) == repr(lens)
    edited = catdog.edit({"m1": 0})
    assert TunedLens.load(path, edited).apply(edited, torch.zeros(1, 3, 48, 48)).title == "Tuned lens"
    with pytest.raises(OptionError, match=r"trained on catdog-tiny .*train one for it"):
        TunedLens.load(path, cv.load("digits-tiny"))
    with pytest.raises(OptionError, match="trained on catdog-tiny"):
        logit_lens(cv.load("digits-tiny"), torch.zeros(1, 1, 28, 28), tuned=lens)


def test_files_that_are_no_tuned_lens_are_refused(lens: TunedLens, catdog: Model, tmp_path: Path) -> None:
    path = tmp_path / "lens.safetensors"
    with pytest.raises(FileError, match="no such file"):
        TunedLens.load(path, catdog)
    path.write_bytes(b"nothing")
    with pytest.raises(FileError, match="damaged"):
        TunedLens.load(path, catdog)
    lens.save(path)
    tensors = load_file(path)
    with safe_open(path, "pt") as opened:
        said = json.loads(opened.metadata()["tuned_lens"])

    def rewritten(tensors: dict[str, Tensor], **changed: object) -> None:
        save_file(tensors, path, {"tuned_lens": json.dumps({**said, **changed})})

    rewritten(tensors, schema="circuitvit.tuned_lens/9")
    with pytest.raises(FileError, match=r"reads 'circuitvit\.tuned_lens/1'"):
        TunedLens.load(path, catdog)
    rewritten({**tensors, "bias": tensors["bias"][:, :3].contiguous()})
    with pytest.raises(FileError, match="do not fit"):
        TunedLens.load(path, catdog)
    rewritten({**tensors, "bias": tensors["bias"] * torch.nan})
    with pytest.raises(FileError, match="NaN"):
        TunedLens.load(path, catdog)
    rewritten(tensors, epochs=["many"])
    with pytest.raises(FileError, match="epochs"):
        TunedLens.load(path, catdog)


def test_what_cannot_be_trained_is_refused_before_anything_runs(catdog: Model, images: Tensor) -> None:
    with pytest.raises(OptionError, match="has no classes"):
        tuned_lens(cv.with_head(catdog, None), images)
    with pytest.raises(OptionError, match="one logit"):
        tuned_lens(cv.with_head(catdog, torch.ones(1, 64)), images)
    with pytest.raises(DataError, match="20 images with 5 held out and 3 to choose by are too few"):
        tuned_lens(catdog, images[:20])
    with pytest.raises(OptionError, match="number between 0 and 1"):
        tuned_lens(catdog, images, held_out=1.0)
    with pytest.raises(OptionError, match="number of epochs"):
        tuned_lens(catdog, images, epochs=0)
    own = catdog.edit({"resid1": torch.zeros(60, 37, 64)})
    with pytest.raises(OptionError, match="a value for each of 60 images"):
        tuned_lens(own, images)


def test_logits_that_are_no_numbers_are_told_with_the_image(catdog: Model, images: Tensor) -> None:
    broken = catdog.edit({"m3": 1e38})  # whose square is infinite
    with pytest.raises(ModelError, match=r"logits of image \d+ are NaN"):
        tuned_lens(broken, images, progress=False)


def test_the_figure_is_drawn_and_the_caveats_are_said(lens: TunedLens, tmp_path: Path) -> None:
    text = lens.figure().save(tmp_path / "lens.svg").read_text(encoding="utf-8")
    assert all(word in text for word in ("logit lens", "tuned lens", "15 images", "KL"))
    drawn = [line.get_ydata() for line in lens.figure().axes[0].lines]
    for kind in (0, 1):
        assert any(
            np.size(each) == 5 and np.allclose(each, lens.held_out.kl[kind].mean(axis=1)) for each in drawn
        )
    assert "tuned lens is nearer to the output at 4 of 4 positions" in repr(lens)
    assert lens.caveats[0].startswith("the maps were trained on cls alone")


def test_the_command_trains_keeps_and_uses_a_lens(tmp_path: Path) -> None:
    for place, picture in enumerate(torch.cat([*catdog_pairs(20, seed=0, preprocessed=False)])):
        pixels = (picture * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / f"{place}.png")
    out, kept = tmp_path / "out" / "lens.svg", tmp_path / "out" / "lens.safetensors"
    common = ["--model", "catdog-tiny", str(tmp_path)]
    result = CliRunner().invoke(
        view, ["tuned-lens", *common, "--epochs", "3", "--save", str(kept), "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    assert "layer 3" in result.output
    assert "the maps were trained on cls alone" in " ".join(result.output.split())
    assert out.is_file()
    page = tmp_path / "out" / "page.html"
    result = CliRunner().invoke(view, ["lens", *common, "--tuned", str(kept), "--out", str(page)])
    assert result.exit_code == 0, result.output
    assert "Tuned lens of 0.png" in page.read_text(encoding="utf-8")
    refused = CliRunner().invoke(view, ["tuned-lens", *common, "--save", "lens.pt"])
    assert isinstance(refused.exception, OptionError)
    assert "--save ends in .safetensors" in str(refused.exception)


def test_on_photographs_it_is_nearer_to_the_output_of_a_real_vit_everywhere(shared_data: Path) -> None:
    name = "vit_tiny_patch16_224"
    model = cv.load(name, checkpoint=shared_data / "weights" / f"{name}.safetensors")
    photos = sorted((shared_data / "images" / "imagenet").iterdir())[::10]
    lens = tuned_lens(model, photos, epochs=8, progress=False)
    gains = [lens.held_out.gain(position) for position in lens.positions[:-1]]
    assert min(gain.value for gain in gains) > 0.02, "it is 0.10 nats after layer 10, the hardest"
    assert all(gain.low > 0 for gain in gains[:9])
    assert lens.held_out.kl[:, -1].max() < 1e-5

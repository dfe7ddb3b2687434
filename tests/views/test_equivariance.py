"""Equivariance: planted pairs are found and nothing else, and every number is a plain correlation."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import circuitvit as cv
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.errors import CircuitViTError
from circuitvit.models.timm_import import import_timm
from circuitvit.views import Equivariance
from circuitvit.views.symmetries import MOVES

EVERY = ("mirror", "rotate 90", "rotate 180", "shift", "recolour")


@pytest.fixture(scope="module")
def catdog() -> cv.Model:
    return cv.load("catdog-tiny")


@pytest.fixture(scope="module")
def images() -> Tensor:
    return catdog_pairs(10, seed=0).clean


def planted(
    program: str, sites: str | tuple[str, ...] = ("*.h*", "m*.hidden"), **options: bool
) -> Equivariance:
    """On images of random features, so that nothing is tied to anything."""
    found = cv.compiled(program)
    drawn = torch.rand(48, len(found.program.pixels), 3, 3, generator=torch.Generator().manual_seed(0))
    pixels = drawn.lt(0.5).float().mul(2).sub(1).repeat_interleave(2, -1).repeat_interleave(2, -2)
    return cv.equivariance(found.model, pixels, EVERY, sites, progress=False, **options)


# -- what is planted ---------------------------------------------------------------------------------


def test_mirrored_pairs_are_found_and_nothing_else() -> None:
    found = planted("mirror")
    pairs = {frozenset((pair.one, pair.other)) for pair in found.pairs("mirror")}
    assert pairs == {
        frozenset(("a0.h0", "a0.h1")),
        frozenset(("a1.h0", "a1.h1")),
        frozenset(("m0.hidden[0]", "m0.hidden[1]")),
    }
    for pair in found.pairs("mirror"):
        assert pair.match == pytest.approx(1.0)
        assert pair.back == pytest.approx(1.0)
        assert pair.control < 0.5
    rest = set(found.units) - {unit for pair in pairs for unit in pair}
    best = dict(zip(found.units, found.best_others("mirror"), strict=True))
    assert all(not best[unit] > 0.3 for unit in rest)
    assert found.pairs("shift") == found.pairs("recolour") == found.pairs("rotate 90") == []
    assert found.of("a0.h0", "shift")["equivariant"] == pytest.approx(1.0)
    assert found.of("a0.h0", "shift")["invariant"] < 0.3
    assert found.of("a0.h0", "mirror")["pooled"] == pytest.approx(1.0)


def test_models_without_a_pair_have_none() -> None:
    found = planted("factors")
    assert not any(found.pairs(name) for name in EVERY)


def test_the_bits_of_the_induction_model_are_each_others_recoloured() -> None:
    """Channels go one on, and heads 0 to 2 read one channel each."""
    found = planted("induction", "a0.*")
    assert {(pair.one, pair.other) for pair in found.pairs("recolour")} == {
        ("a0.h1", "a0.h0"),
        ("a0.h2", "a0.h1"),
    }


def test_heads_that_look_left_and_right_are_a_pair_by_place() -> None:
    found = planted("mirror", "a0.*.pattern", content=False)
    assert [(pair.one, pair.other) for pair in found.pairs("mirror")] == [("a0.h0.pattern", "a0.h1.pattern")]
    assert not planted("mirror", "a0.*.pattern").pairs("mirror")


# -- against plain correlations ----------------------------------------------------------------------


def flattened(values: Tensor, content: bool) -> np.ndarray:
    """Maps `(image, row, column)` as one series."""
    series = values.double().numpy()
    return (series - series.mean(axis=0) if content else series).ravel()


@pytest.mark.parametrize("content", [True, False])
@pytest.mark.parametrize("name", ["mirror", "flip", "rotate 90", "rotate 180", "shift"])
def test_neurons_are_correlated_plainly(catdog: cv.Model, images: Tensor, name: str, content: bool) -> None:
    turned = {
        "mirror": lambda each, step: each.flip(-1),
        "flip": lambda each, step: each.flip(-2),
        "rotate 90": lambda each, step: each.transpose(-1, -2).flip(-2),
        "rotate 180": lambda each, step: each.flip(-1, -2),
        "shift": lambda each, step: torch.cat([each[..., -step:], each[..., :-step]], dim=-1),
    }[name]

    def maps(given: Tensor) -> Tensor:
        seen = catdog.activations(given, "m1.hidden", tokens="patch", progress=False)["m1.hidden"]
        return seen.movedim(2, 1).unflatten(2, (6, 6))

    before, after = maps(images), maps(turned(images, 8))
    found = cv.equivariance(catdog, images, name, "m1.hidden", content=content, batch_size=4, progress=False)
    for one, other in ((0, 0), (3, 7), (100, 12)):
        answer = flattened(after[:, one], content)
        expected = np.corrcoef(answer, flattened(turned(before[:, other], 1), content))[0, 1]
        assert found.matches["m1.hidden"][0, one, other] == pytest.approx(expected, abs=1e-5)
        shuffled = np.corrcoef(
            flattened(after[1:, one], content), flattened(turned(before[:-1, other], 1), content)
        )[0, 1]
        assert found.others["m1.hidden"][0, one, other] == pytest.approx(shuffled, abs=1e-5)
        assert found.equivariant[0, one] == found.matches["m1.hidden"][0, one, one]
        stays = np.corrcoef(flattened(after[:, one], content), flattened(before[:, one], content))[0, 1]
        assert found.invariant[0, one] == pytest.approx(stays, abs=1e-5)
        pooled = np.corrcoef(after[:, one].mean((1, 2)), before[:, one].mean((1, 2)))[0, 1]
        assert found.pooled[0, one] == pytest.approx(pooled, abs=1e-4)


def test_heads_by_how_much_they_write_and_by_their_patterns(catdog: cv.Model, images: Tensor) -> None:
    found = cv.equivariance(catdog, images, "mirror", ["a2.*", "a2.*.pattern"], progress=False)
    assert found.units == (
        *(f"a2.h{head}" for head in range(4)),
        *(f"a2.h{head}.pattern" for head in range(4)),
    )
    names = ["a2.h1", "a2.h1.pattern"]
    before, after = (catdog.activations(each, names, progress=False) for each in (images, images.flip(-1)))
    lengths = [seen["a2.h1"][:, 1:].norm(dim=-1).unflatten(1, (6, 6)) for seen in (before, after)]
    expected = np.corrcoef(flattened(lengths[1], True), flattened(lengths[0].flip(-1), True))[0, 1]
    assert found.of("a2.h1", "mirror")["equivariant"] == pytest.approx(expected, abs=1e-5)
    patterns = [seen["a2.h1.pattern"][:, 1:, 1:].reshape(-1, 6, 6, 6, 6) for seen in (before, after)]
    expected = np.corrcoef(flattened(patterns[1], True), flattened(patterns[0].flip(2, 4), True))[0, 1]
    assert found.of("a2.h1.pattern", "mirror")["equivariant"] == pytest.approx(expected, abs=1e-5)


def test_recolouring_is_done_on_pixels(catdog: cv.Model, images: Tensor) -> None:
    recoloured = images[:, [2, 0, 1]]  # mean and deviation of this model are the same for all channels
    found = cv.equivariance(catdog, images, "recolour", "m1.hidden", progress=False)
    maps = [
        catdog.activations(each, "m1.hidden", tokens="patch", progress=False)["m1.hidden"][:, :, 9]
        for each in (images, recoloured)
    ]
    expected = np.corrcoef(flattened(maps[1], True), flattened(maps[0], True))[0, 1]
    assert found.equivariant[0, 9] == pytest.approx(expected, abs=1e-5)
    assert found.invariant[0, 9] == pytest.approx(expected, abs=1e-5)


def test_edits_count_and_units_that_do_nothing_have_no_correlation(catdog: cv.Model, images: Tensor) -> None:
    edited = catdog.edit({"m1.hidden": lambda each, at: each * (torch.arange(each.shape[-1]) != 5)})
    found = cv.equivariance(edited, images, "mirror", "m1.hidden", progress=False)
    assert np.isnan(found.equivariant[0, 5])
    assert np.isnan(found.best_others("mirror")[5])
    assert np.isfinite(found.equivariant[0, 6])


# -- how it is asked for -----------------------------------------------------------------------------


def test_what_cannot_be_asked_is_refused(catdog: cv.Model, images: Tensor) -> None:
    with pytest.raises(CircuitViTError, match="give at least 8"):
        cv.equivariance(catdog, images[:7])
    with pytest.raises(CircuitViTError, match="did you mean 'mirror'"):
        cv.equivariance(catdog, images, "miror")
    with pytest.raises(CircuitViTError, match="no transformation is named"):
        cv.equivariance(catdog, images, [])
    with pytest.raises(CircuitViTError, match="none of it has a map over patches"):
        cv.equivariance(catdog, images, "mirror", "logits")
    with pytest.raises(CircuitViTError, match=r"a9\.h9"):
        cv.equivariance(catdog, images, "mirror", "a9.h9")
    with pytest.raises(CircuitViTError, match="batch_size"):
        cv.equivariance(catdog, images, "mirror", batch_size=0)
    found = cv.equivariance(catdog, images, "mirror", progress=False)
    with pytest.raises(CircuitViTError, match="unknown transformation 'shift'"):
        found.pairs("shift")
    with pytest.raises(CircuitViTError, match="unknown unit 'm0'"):
        found.of("m0", "mirror")


def test_images_that_cannot_be_turned_or_recoloured_are_refused() -> None:
    torch.manual_seed(0)
    sizes = {"img_size": (8, 24), "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    module = import_timm().models.vision_transformer.VisionTransformer(in_chans=1, num_classes=3, **sizes)
    model = cv.wrap(module.eval())
    images = torch.randn(8, 1, 8, 24)
    with pytest.raises(CircuitViTError, match="leave 'rotate 90' out"):
        cv.equivariance(model, images, "rotate 90")
    with pytest.raises(CircuitViTError, match="leave 'recolour' out"):
        cv.equivariance(model, images, "recolour")
    assert cv.equivariance(model, images, ["mirror", "rotate 180"], progress=False).units == (
        "a0.h0",
        "a0.h1",
    )


def test_too_many_units_are_refused_before_anything_runs(
    catdog: cv.Model, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["circuitvit.views.symmetries"], "LARGEST", 1000)
    with pytest.raises(CircuitViTError, match="name fewer sites"):
        cv.equivariance(catdog, images, "mirror", "m1.hidden")


def test_moves_of_images_and_of_patches_are_the_same() -> None:
    drawn = torch.randn(2, 3, 12, 12)
    for name, move in MOVES.items():
        pooled = torch.nn.functional.avg_pool2d(drawn, 4)
        after = torch.nn.functional.avg_pool2d(move(drawn, (4, 4)), 4)
        assert torch.allclose(move(pooled, (1, 1)), after, atol=1e-6), name


def test_the_figure_names_pairs(tmp_path: Path) -> None:
    found = planted("mirror")
    text = found.figure().save(tmp_path / "mirror.svg").read_text()
    assert "mirror: 3 pairs" in text
    assert "shift: 0 pairs" in text
    assert "a0.h0, a0.h1" in text
    assert "mirror 3 pairs" in repr(found)


def test_a_real_model_has_a_pair_of_heads_and_mirrored_neurons(shared_data: Path) -> None:
    """Heads 0 and 2 of layer 1 look left and right; neurons 103 and 640 of the first MLP are a pair."""
    weights = shared_data / "weights/vit_tiny_patch16_224.safetensors"
    model = cv.load("vit_tiny_patch16_224", checkpoint=weights)
    photos = sorted((shared_data / "images/imagenet").rglob("*.jp*g"))[::80][:10]
    found = cv.equivariance(model, photos, "mirror", ["a1.*", "m0.hidden"], progress=False)
    pairs = {(pair.one, pair.other): pair for pair in found.pairs("mirror")}
    assert pairs["a1.h0", "a1.h2"].match > 0.9
    assert pairs["m0.hidden[103]", "m0.hidden[640]"].match > 0.95
    assert 50 < len(pairs) < 250

"""Which nodes carry which factor: models whose answer is known, exact shares, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ortho_group

import circuitvit as cv
from circuitvit.datasets.catdog import draw_scenes
from circuitvit.datasets.factors import LEVELS, factorial_scenes
from circuitvit.errors import DataError, NameNotFoundError, OptionError
from circuitvit.models.timm_import import import_timm
from circuitvit.views import Disentanglement, disentanglement

COLOURS = ("red", "green", "blue")


def linear_model(weight: torch.Tensor, depth: int = 1) -> cv.Model:
    """A model whose input writes, at its only patch, `weight` times the image's mean colour."""
    family = import_timm().models.vision_transformer.VisionTransformer
    module = family(img_size=4, patch_size=4, embed_dim=8, depth=depth, num_heads=2, num_classes=2)
    with torch.no_grad():
        patches = module.patch_embed.proj
        patches.weight.zero_()
        patches.bias.zero_()
        patches.weight[: len(weight)] = weight[:, :, None, None].expand(-1, -1, 4, 4) / 16
        module.pos_embed.zero_()
    return cv.wrap(module.eval(), name="linear")


def coloured(levels: int = 3, copies: int = 4) -> tuple[torch.Tensor, dict[str, np.ndarray[Any, Any]]]:
    """Plain images of every colour, each some times, and their red, green and blue."""
    steps = torch.linspace(-1, 1, levels)
    colours = torch.cartesian_prod(steps, steps, steps).repeat(copies, 1)
    factors = {name: colours[:, place].numpy() for place, name in enumerate(COLOURS)}
    return colours[:, :, None, None].expand(-1, -1, 4, 4).clone(), factors


def of_units(weight: torch.Tensor, **options: Any) -> Disentanglement:
    """What the units of the input carry of red, green and blue."""
    images, factors = coloured()
    found = disentanglement(
        linear_model(weight), images, factors, "input@patch", each="unit", progress=False, **options
    )
    assert found.nodes[:2] == ("input[0]", "input[1]")
    return found


# -- known answers -------------------------------------------------------------------------------


def test_a_copy_of_a_factor_carries_it_and_nothing_else() -> None:
    found = of_units(torch.eye(3))
    np.testing.assert_allclose(found.shares[:3], np.eye(3), atol=1e-6)
    assert (found.shares[3:] == 0).all()  # units that are always 0
    assert found.carriers("green") == [("input[1]", pytest.approx(1))]
    assert found.disentanglement[:3].min() > 0.9
    assert found.completeness.min() > 0.9
    assert found.informativeness.min() > 0.9
    assert found.score > 0.9


def test_a_rotation_of_the_factors_is_entangled_by_as_much_as_it_mixes() -> None:
    rotation = torch.tensor(ortho_group.rvs(3, random_state=1), dtype=torch.float32)
    found = of_units(rotation)
    np.testing.assert_allclose(found.shares[:3], rotation.numpy() ** 2, atol=1e-6)
    assert found.score < 0.5
    assert found.score < of_units(torch.eye(3)).score - 0.4


def test_noise_carries_nothing() -> None:
    images, _ = coloured(copies=8)
    rng = np.random.default_rng(0)
    chance = {name: rng.integers(3, size=len(images)) for name in ("one", "other")}
    found = disentanglement(linear_model(torch.eye(3)), images, chance, "input@patch", progress=False)
    assert found.shares.max() < 0.05
    assert found.carriers("one") == found.carriers("other") == []
    assert found.informativeness.tolist() == [0, 0]
    assert found.score == 0


@pytest.fixture(scope="module")
def bundled() -> Disentanglement:
    return disentanglement(cv.load("catdog-tiny"), trees=0, progress=False, seed=1)


def test_shares_are_those_of_a_literal_analysis_of_variance(bundled: Disentanglement) -> None:
    model = cv.load("catdog-tiny")
    scenes, factors = factorial_scenes(seed=1)
    images = 2 * draw_scenes(scenes) - 1
    for node in ("a1.h1", "m3"):
        written = model.activations(images, f"{node}@cls")[f"{node}@cls"][:, 0].double()
        total = (written - written.mean(dim=0)).square().sum()
        for place, (name, levels) in enumerate(factors.items()):
            between = torch.zeros((), dtype=torch.float64)
            for level in np.unique(levels):
                own = written[torch.tensor(levels == level)]
                between += len(own) * (own.mean(dim=0) - written.mean(dim=0)).square().sum()
            share = bundled.shares[bundled.nodes.index(node), place]
            assert share == pytest.approx(float(between / total), abs=1e-6), name
    assert (bundled.shares.sum(axis=1) < 1 + 1e-6).all()
    assert bundled.caveats == ()


def test_the_bundled_models_last_layer_is_about_the_species(bundled: Disentanglement) -> None:
    assert {node for node, _ in bundled.carriers("species", 3)} == {"a2.h3", "a3.h2", "m3"}
    assert bundled.shares[bundled.nodes.index("m3"), 0] > 0.5
    assert bundled.carriers("background") == []


@pytest.mark.parametrize("seed", [0, 1])
def test_each_planted_factor_is_found_in_its_head_and_nowhere_else(seed: int) -> None:
    planted = cv.compiled("factors", seed=seed)
    images, factors = planted.factors(200, seed=seed)
    found = disentanglement(planted.model, images, factors, "a*.h*", trees=30, progress=False)
    for head, factor in {"a0.h0": "colour", "a0.h1": "shape"}.items():
        assert [node for node, _ in found.carriers(factor)] == [head]
        assert found.shares[found.nodes.index(head), found.factors.index(factor)] > 0.9
    assert found.disentanglement[:2].min() > 0.8


# -- tables of one's own, tokens, repeatability ----------------------------------------------------


def test_factors_that_go_together_are_said_to_and_numbers_are_cut() -> None:
    images, factors = coloured(copies=2)
    fine = np.random.default_rng(0).random(len(images))
    mixed = {"red": factors["red"], "again": factors["red"] > 0, "fine": torch.tensor(fine)}
    found = disentanglement(linear_model(torch.eye(3)), images, mixed, "input@patch", trees=0, progress=False)
    assert len(found.caveats) == 1
    assert "red and again go together" in found.caveats[0]
    assert [len(levels) for levels in found.levels] == [3, 2, 5]
    assert found.levels[2][0].startswith(f"{fine.min():.3g} to ")


def test_a_few_images_say_little_and_that_is_said() -> None:
    images = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    found = disentanglement(
        linear_model(torch.eye(3)), images, {"half": [0, 0, 0, 1, 1, 1]}, trees=0, progress=False
    )
    assert "give more images" in found.caveats[0]


def test_it_is_the_same_whatever_the_batch_and_honours_edits() -> None:
    model = cv.load("catdog-tiny")
    levels = {"species": ("cat", "dog"), "radius": (0.22, 0.28), "fur": LEVELS["fur"]}
    scenes, factors = factorial_scenes(levels)
    images, options = 2 * draw_scenes(scenes) - 1, {"trees": 30, "progress": False}
    one = disentanglement(model, images, factors, batch_size=8, **options)
    other = disentanglement(model, images, factors, batch_size=3, **options)
    np.testing.assert_allclose(one.shares, other.shares, atol=1e-4)
    again = disentanglement(model, images, factors, batch_size=8, **options)
    assert one.shares.tobytes() == again.shares.tobytes()
    assert one.importance.tobytes() == again.importance.tobytes()
    edited = disentanglement(model.edit({"a1.h1": 0}), images, factors, batch_size=8, **options)
    head, mlp = one.nodes.index("a1.h1"), one.nodes.index("m1")
    assert (edited.shares[head] == 0).all()
    assert abs(edited.shares[mlp] - one.shares[mlp]).max() > 0.01


def test_sites_are_read_where_they_are_asked_for() -> None:
    images, factors = coloured()
    model = linear_model(torch.eye(3))
    names = ["resid*", "a0.h0<q>", "m0.hidden", "a0.h0.pattern", "logits", "input@0", "input@patch"]
    found = disentanglement(model, images, factors, names, trees=0, progress=False)
    assert found.nodes == (
        "resid0@cls", "resid1@cls", "a0.h0<q>@cls", "m0.hidden@cls", "a0.h0.pattern@cls", "logits", "input@0",
        "input@patch",
    )  # fmt: skip
    assert found.shares[-2].sum() == 0
    assert found.shares[-1] == pytest.approx(1 / 3, abs=1e-6)
    pooled = disentanglement(model, images, factors, "input", tokens="all", trees=0, progress=False)
    assert pooled.shares[0] == pytest.approx(1 / 3, abs=1e-6)


@pytest.mark.parametrize("class_token", [True, False])
def test_models_with_a_pool_or_without_a_class_token_are_read(class_token: bool) -> None:
    family = import_timm().models.vision_transformer.VisionTransformer
    module = family(
        img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=3, global_pool="map",
        class_token=class_token,
    )  # fmt: skip
    levels = {"species": ("cat", "dog"), "fur": LEVELS["fur"], "background": LEVELS["background"]}
    scenes, factors = factorial_scenes(levels)
    pooled = cv.wrap(module.eval(), name="pooled")
    found = disentanglement(pooled, draw_scenes(scenes, 16), factors, trees=0, progress=False)
    assert found.nodes == ("a0.h0", "a0.h1", "m0", "pool.h0", "pool.h1", "pool.mlp")
    assert found.shares.max(axis=1).min() > 0.1


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    found = of_units(torch.eye(3), trees=30)
    path = found.figure(most=3).save(tmp_path / "matrix.svg")
    assert path.read_bytes() == found.figure(most=3).save(tmp_path / "again.svg").read_bytes()
    text = path.read_text(encoding="utf-8")
    assert all(word in text for word in (*COLOURS, "input[0]", "input[2]", "1.00"))
    assert "input[3]" not in text
    np.testing.assert_array_equal(found.figure(most=3).axes[0].images[0].get_array(), found.shares[:3])


# -- scenes --------------------------------------------------------------------------------------


def test_scenes_are_all_combinations_and_differ_in_their_factors_alone() -> None:
    scenes, factors = factorial_scenes()
    rows = list(zip(*(column.tolist() for column in factors.values()), strict=True))
    assert len(rows) == len(set(rows)) == len(scenes) == 576
    assert list(factors) == list(LEVELS)
    assert len({(scene.noise_seed, scene.texture, scene.animals[0].turn) for scene in scenes}) == 1
    drawn = draw_scenes(scenes[:2])  # the last factor is the background
    face = (drawn[0] == drawn[1]).all(dim=0)
    assert 0.05 < face.float().mean() < 0.6
    with pytest.raises(NameNotFoundError, match="did you mean 'tilt'"):
        factorial_scenes({"tilts": (0, 1)})
    with pytest.raises(OptionError, match="'x' has 1 level"):
        factorial_scenes({"x": (0.5,)})
    with pytest.raises(OptionError, match="no factors"):
        factorial_scenes({})


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"red": [0, 1]}, "has the shape"),
        ({"red": [1] * 108}, "is 1 in all images"),
        ({"red": [float("nan")] * 108}, "NaN"),
        ({"red": [str(each) for each in range(108)]}, "108 levels in 108 images"),
        ({}, "no factors"),
    ],
)
def test_factors_that_are_none_are_refused(factors: dict[str, Any], message: str) -> None:
    images, _ = coloured()
    with pytest.raises(DataError, match=message):
        disentanglement(linear_model(torch.eye(3)), images, factors, progress=False)


def test_other_bad_input_is_refused_before_anything_runs() -> None:
    model, (images, factors) = linear_model(torch.eye(3)), coloured()
    for options, message in (
        ({"images": images}, "images without factors"),
        ({"factors": factors}, "factors without their images"),
        ({"images": images, "factors": factors, "each": "head"}, "each='node'"),
        ({"images": images, "factors": factors, "trees": 2}, "at least 30 trees"),
        ({"images": images, "factors": factors, "shuffles": 0}, "shuffles must be at least 1"),
    ):
        with pytest.raises(OptionError, match=message):
            disentanglement(model, progress=False, **options)
    with pytest.raises(NameNotFoundError, match=r"a0\.h1"):
        disentanglement(model, images, factors, "a0.h7", progress=False)
    with pytest.raises(NameNotFoundError, match="did you mean 'red'"):
        of_units(torch.eye(3), trees=0).carriers("reds")
    with pytest.raises(DataError, match="square colour images"):
        disentanglement(cv.load("digits-tiny"), progress=False)

"""Linear probes: they find a label where it is, not where it cannot be, and their normals steer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import circuitvit as cv
from circuitvit.cli.inside import view
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.errors import DataError, FileError, NameNotFoundError, OptionError
from circuitvit.views import LinearProbes
from circuitvit.views import probes as module
from tests.strategies import Recipe

IMAGES = 60


def probed(model: cv.Model, images: Any, labels: Any = None, *args: Any, **options: Any) -> LinearProbes:
    return cv.linear_probes(model, images, labels, *args, progress=False, **options)


@pytest.fixture(scope="module")
def model() -> cv.Model:
    return cv.wrap(Recipe(depth=2, heads=2, width=8, grid=(2, 3)).build())


@pytest.fixture(scope="module")
def images() -> Tensor:
    return Recipe(grid=(2, 3)).images(IMAGES)


@pytest.fixture(scope="module")
def labels() -> list[str]:
    return np.random.default_rng(3).permutation(["no", "yes"] * (IMAGES // 2)).tolist()


def planted(model: cv.Model, labels: list[str], place: int, scale: float = 50.0) -> cv.Model:
    """The model with the label along one direction of one token of `resid1`: of as many images at once."""
    signs = torch.tensor([1.0 if label == "yes" else -1.0 for label in labels])
    width = model.sites("resid1")[0].shape
    added = torch.zeros(len(labels), *width)
    added[:, place, 2] = scale * signs
    return model.edit({"resid1": cv.add(added)})


def test_a_planted_label_is_read_there_and_nowhere_that_cannot_know(
    model: cv.Model, images: Tensor, labels: list[str]
) -> None:
    edited = planted(model, labels, place=4)
    found = probed(
        edited, images, labels, ["resid0", "resid1"], tokens="cls+patch", reads="each", strength=0.1
    )
    assert found.places == ("cls", *(f"patch ({row}, {column})" for row in range(2) for column in range(3)))
    assert found.mean("resid1", "patch (1, 0)").value == 1
    assert found.mean("resid1", "patch (1, 0)").low == pytest.approx(0.94, abs=0.01)
    elsewhere = [("resid0", name) for name in found.places] + [
        ("resid1", name) for name in found.places if name != "patch (1, 0)"
    ]
    values = [found.mean(*each) for each in elsewhere]
    assert 0.4 < np.mean([each.value for each in values]) < 0.6
    assert all(each.low < 0.5 for each in values)  # of 13 probes the best is right on 35 of 60 images
    assert found.on_grid("resid1")[1, 0] == 1
    assert np.abs(found.selectivity[1, 4]) > 0.3
    normal = found.direction("resid1", "yes", "patch (1, 0)")
    seen = edited.activations(images, "resid1", tokens="patch(1,0)", progress=False)["resid1"][:, 0]
    assert int((normal.abs() * seen.std(dim=0)).argmax()) == 2  # what it goes by: the normal is per unit
    assert normal[2] > 0


def test_labels_without_a_meaning_are_at_chance_and_the_control_always(
    model: cv.Model, images: Tensor, labels: list[str]
) -> None:
    found = probed(planted(model, labels, 0), images, labels, tokens=["cls", "patch"])
    shuffled = probed(model, images, labels, tokens=["cls", "patch"])
    assert found.right.shape == found.control.shape == (3, 2, IMAGES)
    assert found.mean("resid1").value == 1
    for values in (found.control, shuffled.right, shuffled.control):
        assert 0.38 < values.mean() < 0.62
    np.testing.assert_allclose(found.majority, 0.5)
    assert found.accuracy.shape == (3, 2, 5)
    np.testing.assert_allclose(found.accuracy.mean(axis=-1), found.right.mean(axis=-1), atol=0.01)


def test_a_constant_feature_says_nothing(model: cv.Model, images: Tensor, labels: list[str]) -> None:
    """The class token before the first block is the same for every image, but for rounding."""
    uneven = ["yes" if place < 20 else "no" for place in range(IMAGES)]
    noisy = torch.zeros(IMAGES, *model.sites("resid0")[0].shape)
    noisy[:20] = 1e-7  # which the images of one class share, as those of one batch may
    for each in (model, model.edit({"resid0": cv.add(noisy)})):
        found = probed(each, images, uneven, "resid0", batch_size=IMAGES)
        assert found.mean("resid0").value == pytest.approx(found.majority[0]) == pytest.approx(2 / 3)
        with pytest.raises(DataError, match="no direction"):
            found.direction("resid0")


def test_it_is_scikit_learns_regression_by_hand(model: cv.Model, images: Tensor) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    labels = [("a", "b", "c")[place % 3] for place in range(IMAGES)]
    found = probed(model, images, labels, ["m1", "a0.h1<q>"], tokens="patch", strength=0.3)
    seen = model.activations(images, list(found.sites), tokens="patch", progress=False)
    for row, site in enumerate(found.sites):
        features = seen[site].double().mean(dim=1).numpy()
        right = np.empty(IMAGES)
        for fold in range(5):
            out = found.fold == fold
            literal = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=10_000))
            literal.fit(features[~out], np.array(labels)[~out])
            right[out] = literal.predict(features[out]) == np.array(labels)[out]
        assert np.abs(right - found.right[row, 0]).sum() <= 1  # float32 may turn a tie
        literal.fit(features, labels)
        own = np.einsum("nw,cw->nc", features, found.weights[site][0]) + found.biases[row, 0]
        probabilities = np.exp(own) / np.exp(own).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(probabilities, literal.predict_proba(features), atol=2e-3)


@pytest.mark.parametrize("reads", ["any", "each"])
def test_patches_are_told_apart_by_what_lies_on_them(reads: Any) -> None:
    """Labels by patch: bright ones are the object. One probe of all patches, or one for each, finds it."""
    recipe = Recipe(depth=1, grid=(2, 3))
    model, images = cv.wrap(recipe.build()), 0.1 * recipe.images(IMAGES)
    truth = torch.from_numpy(np.random.default_rng(0).integers(0, 2, (IMAGES, 2, 3)))
    images += 3.0 * truth.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]
    options: dict[str, Any] = {"tokens": "patch", "reads": reads, "classes": ["ground", "object"]}
    found = probed(model, images, truth.flatten(1), "resid0", **options)
    assert found.classes == ("ground", "object")
    assert np.nanmean(found.right) > 0.99
    assert 0.4 < np.nanmean(found.control) < 0.6
    scores = found.apply(model, images[:4], progress=False)
    said = scores.log_odds("object")[0][:, 1:] > 0
    np.testing.assert_array_equal(said, truth[:4].flatten(1).numpy() == 1)
    assert np.isnan(scores.log_odds("object")[:, :, 0]).all()
    masks = truth.repeat_interleave(2, 1).repeat_interleave(2, 2) == 1
    groups = cv.TokenGroups.from_masks(model, {"object": masks})
    again = probed(model, images, groups, "resid0", tokens="patch", reads=reads)
    assert again.classes == ("object", "patch")
    assert np.nanmean(again.right) > 0.99


def test_the_control_of_patches_knows_where_an_object_usually_is(model: cv.Model, images: Tensor) -> None:
    always = torch.tensor([[1, 0, 0, 0, 0, 0]] * IMAGES)
    found = probed(model, 0.01 * images, always, "resid1", tokens="patch", reads="any", samples=6)
    assert found.mean("resid1").value > 0.95
    assert abs(found.selectivity[0, 0]) < 0.05  # of other images' objects it is as sure
    assert any("the place alone tells" in note for note in found.notes)
    nowhere = probed(model, images, [*"ab"] * 30, "resid1", tokens="patch", reads="any")
    assert not any("the place alone tells" in note for note in nowhere.notes)


def test_twins_do_not_judge_each_other() -> None:
    """Cat and dog on one background: background patches are equal, so that one tells the other's class
    wrongly.
    """
    pairs, model = catdog_pairs(15, seed=0), cv.load("catdog-tiny")
    shown = {"cat": pairs.clean, "dog": pairs.corrupt}
    options: dict[str, Any] = {"sites": "resid0", "tokens": "patch(0,0)", "reads": "each", "folds": 5}
    apart = probed(model, shown, **options)
    together = probed(model, shown, clusters=[*range(15)] * 2, **options)
    assert apart.mean("resid0").value < 0.3
    assert together.mean("resid0").value == pytest.approx(0.5, abs=0.2)
    assert all(len(set(together.fold[together.clusters == each])) == 1 for each in range(15))


def test_steering_along_the_normal_raises_the_class_by_the_dose(model: cv.Model, images: Tensor) -> None:
    labels = [("a", "b", "c")[place % 3] for place in range(IMAGES)]
    for options in ({"tokens": "patch"}, {"tokens": "patch", "reads": "any"}, {"tokens": "cls"}):
        found = probed(model, images, labels, ["resid1", "resid2"], **options)
        plain = found.apply(model, images[:5], progress=False).logits
        tokens = options["tokens"]
        edited = model.edit({"resid1": cv.add(found.direction("resid1", "b"), scale=3.0, tokens=tokens)})
        moved = found.apply(edited, images[:5], progress=False).logits - plain
        rise = moved[0][..., 1] - moved[0][..., [0, 2]].mean(axis=-1)
        asked = np.isfinite(rise)
        assert asked.sum() == (5 if tokens == "cls" else 30)
        np.testing.assert_allclose(rise[asked], 3.0, atol=1e-3)
        held = model.edit({"resid1": cv.clamp(found.direction("resid1", "b"), low=1e3, tokens=tokens)})
        odds = found.apply(held, images[:5], progress=False).probability("b")[0]
        assert (odds[np.isfinite(odds)] > 0.5).all()


def test_a_probe_of_a_mean_says_shares(model: cv.Model, images: Tensor, labels: list[str]) -> None:
    found = probed(model, images, labels, "resid2", tokens="patch")
    scores = found.apply(model, images[:3], progress=False)
    mean = model.activations(images[:3], "resid2", tokens="patch", progress=False)["resid2"].mean(dim=1)
    whole = mean.numpy() @ found.weights["resid2"][0].T + found.biases[0, 0]
    np.testing.assert_allclose(np.nanmean(scores.logits[0], axis=1), whole, atol=1e-4)


def test_batches_chunks_and_seeds_do_not_matter_but_to_what_is_drawn(
    model: cv.Model, images: Tensor, labels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        "tokens": "patch",
        "reads": "any",
        "samples": 3,
        "sites": ["resid*", "m0.hidden"],
    }
    first = probed(model, images, labels, **options)
    monkeypatch.setattr(module, "MOST_BYTES", 1)
    again = probed(model, images, labels, batch_size=7, **options)
    assert np.abs(first.right - again.right).mean() < 0.01  # rounding may turn a tie
    np.testing.assert_array_equal(first.fold, again.fold)
    assert (probed(model, images, labels, seed=1, **options).fold != first.fold).any()
    assert first.weights["m0.hidden"].shape[-1] != first.weights["resid0"].shape[-1]


def test_probes_are_written_and_read(
    model: cv.Model, images: Tensor, labels: list[str], tmp_path: Path
) -> None:
    found = probed(model, images, labels, tokens="cls+patch", reads="each", sites=["resid0", "m1"])
    path = tmp_path / "probes.safetensors"
    found.save(path)
    again = LinearProbes.load(path)
    assert repr(again) == repr(found)
    assert (again.kinds, again.grid, again.classes) == (found.kinds, found.grid, found.classes)
    for name in ("right", "control", "fold", "biases", "tokens"):
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))
    np.testing.assert_array_equal(
        again.apply(model, images[:2], progress=False).logits,
        found.apply(model, images[:2], progress=False).logits,
    )
    found.save(tmp_path / "twice.safetensors")
    assert path.read_bytes() == (tmp_path / "twice.safetensors").read_bytes()
    tensors = load_file(path)
    del tensors["fold"]
    for damage, said in (
        (lambda: path.write_bytes(b"no"), "damaged"),
        (lambda: save_file(tensors, path), "holds no probes"),
        (lambda: save_file(tensors, path, {"probes": '{"schema": "circuitvit.probes/9"}'}), "probes/9"),
        (path.unlink, "no such file"),
    ):
        damage()
        with pytest.raises(FileError, match=said):
            LinearProbes.load(path)


def test_a_file_whose_tensors_do_not_fit_is_refused(
    model: cv.Model, images: Tensor, labels: list[str], tmp_path: Path
) -> None:
    from safetensors import safe_open

    path = tmp_path / "probes.safetensors"
    probed(model, images, labels, "resid0").save(path)
    with safe_open(path, "np") as opened:
        header = opened.metadata()
    whole = load_file(path)
    for name, value in (
        ("fold", whole["fold"][:-1]),
        ("right", whole["right"] + np.inf),
        ("more", whole["fold"]),
    ):
        save_file({**whole, name: value}, path, header)
        with pytest.raises(FileError, match=name):
            LinearProbes.load(path)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "site": ({"sites": "resid9"}, NameNotFoundError, "resid"),
    "no sites": ({"sites": []}, OptionError, "no sites"),
    "site with tokens": ({"sites": "resid1@cls"}, OptionError, "tokens="),
    "pattern": ({"sites": "a0.h0.pattern"}, OptionError, "query"),
    "logits": ({"sites": "logits"}, OptionError, "class"),
    "tokens": ({"tokens": "cow"}, OptionError, "cow"),
    "no tokens": ({"tokens": []}, OptionError, "at least one"),
    "tokens twice": ({"tokens": ["cls", "cls"]}, OptionError, "once"),
    "mask": ({"tokens": torch.zeros(7, dtype=torch.bool)}, OptionError, "no such tokens"),
    "reads": ({"reads": "all"}, NameNotFoundError, "each"),
    "folds": ({"folds": 1}, OptionError, "two folds"),
    "samples": ({"samples": 0}, OptionError, "samples"),
    "seed": ({"seed": -1}, OptionError, "seed"),
    "batch size": ({"batch_size": 0}, OptionError, "batch_size"),
    "strength": ({"strength": 0}, OptionError, "strength"),
    "clusters": ({"clusters": [0, 1]}, DataError, "clusters"),
    "few clusters": ({"clusters": [0, 1] * 30}, DataError, "fewer"),
    "one class": ({"labels": ["a"] * IMAGES}, DataError, "nothing to tell apart"),
    "rare class": ({"labels": ["a", *"b" * (IMAGES - 1)]}, DataError, "'a' is in 1 image"),
    "labels": ({"labels": ["a", "b"]}, DataError, "2 labels for 60"),
    "none": ({"labels": None}, DataError, "give labels"),
    "classes": ({"labels": [0, 1] * 30, "classes": ["a"]}, OptionError, "classes="),
    "mean of patches": ({"labels": torch.zeros(IMAGES, 6, dtype=torch.int64)}, OptionError, "reads='any'"),
    "patches": ({"labels": torch.zeros(IMAGES, 5, dtype=torch.int64)}, DataError, "patch"),
    "one patch class": (
        {"labels": torch.zeros(IMAGES, 6, dtype=torch.int64), "reads": "any", "tokens": "patch"},
        DataError,
        "all are '0'",
    ),
    "always the same patches": (
        {"labels": torch.eye(6, dtype=torch.int64)[[0] * IMAGES], "reads": "each", "tokens": "patch"},
        DataError,
        "at no place",
    ),
    "no patch label": (
        {"labels": torch.zeros(IMAGES, 6, dtype=torch.int64), "reads": "any", "tokens": "cls"},
        DataError,
        "none of the tokens",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_makes_no_sense_is_refused_before_anything_is_run(
    name: str, model: cv.Model, images: Tensor, labels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_features", None)
    options, kind, said = BAD[name]
    with pytest.raises(kind, match=said):
        probed(model, images, **{"labels": labels, **options})


def test_scikit_learn_is_asked_for_by_its_extra(
    model: cv.Model, images: Tensor, labels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(DataError, match=r"circuitvit\[probes\]"):
        probed(model, images, labels)


def test_questions_that_have_no_answer_are_refused(
    model: cv.Model, images: Tensor, labels: list[str]
) -> None:
    found = probed(model, images, labels, "resid1", tokens=["cls", "patch"])
    with pytest.raises(OptionError, match="no map"):
        found.on_grid("resid1")
    with pytest.raises(NameNotFoundError, match="resid1"):
        found.mean("resid2")
    with pytest.raises(NameNotFoundError, match="place"):
        found.mean("resid1", "dog")
    with pytest.raises(OptionError, match="no place 2"):
        found.mean("resid1", 2)
    with pytest.raises(NameNotFoundError, match="class"):
        found.direction("resid1", "maybe")
    other = cv.wrap(Recipe(depth=2, heads=2, width=4, grid=(2, 3)).build())
    with pytest.raises(OptionError, match="8 wide"):
        found.apply(other, images[:1], progress=False)
    larger = Recipe(depth=2, heads=2, width=8, grid=(3, 3))
    with pytest.raises(OptionError, match="7 tokens, and these images have 10"):
        found.apply(cv.wrap(larger.build()), larger.images(1), progress=False)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(class_token=False, pool="avg", grid=(2, 2)),
        Recipe(registers=2, grid=(2, 2)),
    ],
    ids=["no class token", "registers"],
)
def test_other_layouts(recipe: Recipe) -> None:
    model, images = cv.wrap(recipe.build()), recipe.images(20)
    labels = [0, 1] * 10
    found = probed(model, images, labels, "resid*", classes=["even", "odd"])
    assert found.places == (("cls",) if recipe.class_token else ("patch",))
    assert found.classes == ("even", "odd")
    every = probed(model, images, labels, "resid1", tokens="all", reads="each")
    assert len(every.places) == recipe.n_tokens
    assert every.on_grid("resid1").shape == (2, 2)


def test_tokens_may_differ_between_images(model: cv.Model, images: Tensor, labels: list[str]) -> None:
    """The label lies at another token of each image; a probe of that token finds it."""
    where = np.random.default_rng(1).integers(1, 7, IMAGES)
    mask = torch.zeros(IMAGES, 7, dtype=torch.bool)
    mask[torch.arange(IMAGES), torch.from_numpy(where)] = True
    added = torch.zeros(IMAGES, 7, 16)
    signs = torch.tensor([1.0 if label == "yes" else -1.0 for label in labels])
    added[torch.arange(IMAGES), torch.from_numpy(where), 2] = 50 * signs
    edited = model.edit({"resid1": cv.add(added)})
    for reads in ("mean", "any"):
        found = probed(edited, images, labels, "resid1", tokens=mask, reads=reads)
        assert found.mean("resid1").value == 1
    with pytest.raises(OptionError, match="reads='any'"):
        probed(edited, images, labels, "resid1", tokens=mask, reads="each")


def test_figures_are_drawn(model: cv.Model, images: Tensor, labels: list[str], tmp_path: Path) -> None:
    lines = probed(model, images, labels, tokens=["cls", "patch"])
    maps = probed(cv.load("catdog-tiny"), torch.cat([*catdog_pairs(6)]), [*"a" * 6, *"b" * 6], "resid4",
                  tokens="cls+patch", reads="each", folds=2)  # fmt: skip
    scores = lines.apply(model, images[:2], place="patch", tokens="cls+patch", progress=False)
    for figure, words in (
        (lines.figure(sites=["resid0", "resid2"]), ("resid2", "cls", "patch", "control", "no or yes")),
        (maps.figure(), ("resid4", "cls", "accuracy, from chance to 1")),
        (scores.figure("yes", 1), ("resid0", "cls", "log-odds of yes", "image 1")),
        (scores.figure(0, sites=["resid1"], picture=False), ("resid1", "log-odds of no", "image 0")),
    ):
        text = figure.save(tmp_path / "figure.svg").read_text(encoding="utf-8")
        assert [word for word in words if word not in text] == []
    assert "resid0" not in text
    (drawn,) = [image.get_array() for image in maps.figure().axes[0].images]
    assert set(np.ravel(drawn)) == set(maps.on_grid("resid4").ravel())


def test_the_command_fits_keeps_and_asks(tmp_path: Path) -> None:
    from PIL import Image

    for label, pictures in zip(("cat", "dog"), catdog_pairs(8, seed=0, preprocessed=False), strict=True):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for place, picture in enumerate(pictures):
            pixels = (picture * 255).byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(tmp_path / "photos" / label / f"{place}.png")
    kept, model = tmp_path / "p.safetensors", ["--model", "catdog-tiny"]
    first = [
        "probes",
        *model,
        str(tmp_path / "photos"),
        "--sites",
        "resid4",
        "--tokens",
        "patch",
        "--folds",
        "2",
    ]
    result = CliRunner().invoke(view, [*first, "--keep", str(kept), "--out", str(tmp_path / "a.png")])
    assert result.exit_code == 0, result.output
    assert "resid4" in result.output
    asked = str(tmp_path / "photos" / "cat" / "0.png")
    second = ["probes", *model, "--use", str(kept), "--ask", asked, "--about", "cat"]
    assert CliRunner().invoke(view, [*second, "--out", str(tmp_path / "b.png")]).exit_code == 0
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    neither = CliRunner().invoke(view, ["probes", *model])
    assert isinstance(neither.exception, OptionError)


def test_the_corners_of_a_photograph_know_the_animal(shared_data: Path) -> None:
    """In ViT-Ti's late layers each corner tells cats from dogs, far better than the patch beside it, and on
    the photograph of both it answers to either being blacked out.
    """
    name, photos = "vit_tiny_patch16_224", shared_data / "images"
    model = cv.load(name, checkpoint=shared_data / "weights" / f"{name}.safetensors")
    shown = {each: sorted((photos / "cats_vs_dogs" / f"{each}s").iterdir())[:40] for each in ("cat", "dog")}
    corners = [f"patch({row},{column})" for row in (0, 13) for column in (0, 13)]
    options: dict[str, Any] = {"tokens": [*corners, "patch(0,1)"], "reads": "each", "strength": 0.01}
    found = probed(model, shown, sites="resid11", **options)
    beside = found.places.index("patch (0, 1)")
    right = found.right.mean(axis=-1)[0]
    assert np.delete(right, beside).min() > 0.8  # it is 0.89, and beside the corner 0.58
    assert np.delete(right, beside).min() > right[beside] + 0.15
    assert abs(found.control.mean() - 0.5) < 0.1
    pair = ("prisma_cat_dog.jpeg", "prisma_cat_crop.jpeg", "prisma_crop_dog.jpeg")
    scores = found.apply(model, [photos / "catdog" / each for each in pair], progress=False)
    both, without_cat, without_dog = scores.subjects.on_grid(scores.log_odds("cat")[0])[:, ::13, ::13]
    assert (without_cat < both).all()
    assert (both < without_dog).all()

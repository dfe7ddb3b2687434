"""Fitted heads: a probe's accuracy that can be believed, and a model whose logits are the probe's."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import circuitvit as cv
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.engine import Evaluator
from circuitvit.errors import DataError, OptionError
from circuitvit.models.zoo import load_zoo_module

CAT_DOG = ["cat"] * 16 + ["dog"] * 16


@pytest.fixture(scope="module")
def features() -> cv.Model:
    """The bundled model without its classifier."""
    module: Any = load_zoo_module("catdog-tiny")
    module.reset_classifier(0)
    return cv.wrap(module, preprocessing=cv.load("catdog-tiny").preprocessing)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.cat([*catdog_pairs(16, seed=0)])


def fitted(model: cv.Model, images: Any, labels: Any = CAT_DOG, **options: Any) -> Any:
    return cv.fit_head(model, images, labels, progress=False, **options)


def test_a_head_reads_the_labels_and_has_a_circuit(features: cv.Model, images: Tensor) -> None:
    found = fitted(features, images)
    assert found.accuracy == pytest.approx(np.mean(found.folds), abs=0.02)
    assert found.accuracy > 0.9
    assert found.model.classes == ("cat", "dog")
    logits = found.model(torch.cat([*catdog_pairs(16, seed=1)]))
    assert float((logits.argmax(dim=-1) == torch.arange(2).repeat_interleave(16)).float().mean()) > 0.9
    torch.testing.assert_close(logits[:, 0], -logits[:, 1], atol=1e-4, rtol=0)
    task, others = (cv.Task(*catdog_pairs(8, seed=seed), cv.logit_diff("cat", "dog")) for seed in (2, 3))
    circuit = cv.attribute(found.model, task, "eap", progress=False).connected(120)
    report = cv.verify(found.model, task, circuit, held_out=others, n_random=0, progress=False)
    assert 0.8 < report.headline.faithfulness.value < 1.2


@pytest.mark.parametrize("tokens", ["pooled", "cls", "mean"])
def test_it_is_scikit_learns_regression_on_those_features(
    features: cv.Model, images: Tensor, tokens: Any
) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    normed = features.module.forward_features(images)  # type: ignore[operator]
    read = normed[:, 1:].mean(dim=1) if tokens == "mean" else normed[:, 0]
    labels = [*("cat", "dog", "fox", "owl")] * 8  # of which the images say nothing: the fit is not separable
    expected = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=10_000))
    expected.fit(read.double().numpy(), labels)
    found = fitted(features, images, labels, tokens=tokens, strength=0.1, folds=2)
    assert found.model.classes == tuple(expected.classes_)
    np.testing.assert_allclose(
        found.model(images).softmax(dim=-1), expected.predict_proba(read.double().numpy()), atol=1e-3
    )


def test_labels_without_a_meaning_are_not_read_off(features: cv.Model, images: Tensor) -> None:
    """Fitted and judged on the same images, 64 features would tell 32 of them apart whatever their labels."""
    labels = np.random.default_rng(0).permutation(CAT_DOG)
    assert fitted(features, images, labels).accuracy < 0.75


def test_the_batch_size_and_the_seed_change_no_more_than_they_should(
    features: cv.Model, images: Tensor
) -> None:
    one, two = (fitted(features, images, batch_size=size) for size in (1, 32))
    torch.testing.assert_close(one.model(images), two.model(images), atol=1e-3, rtol=1e-3)
    assert one.folds == two.folds
    again = fitted(features, images, seed=1)
    torch.testing.assert_close(again.model(images), two.model(images))


def test_images_in_folders(features: cv.Model, tmp_path: Path) -> None:
    sides = catdog_pairs(6, seed=0, preprocessed=False)
    for name, pictures in zip(("a cat", "dog"), sides, strict=True):
        (tmp_path / name).mkdir()
        for number, picture in enumerate(pictures):
            pixels = (picture * 255).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    (tmp_path / ".hidden").mkdir()
    whole = fitted(features, tmp_path, None, folds=3)
    assert whole.model.classes == ("a cat", "dog")
    files = [*sorted(tmp_path.glob("dog/*")), *sorted(tmp_path.glob("a cat/*"))]
    listed = fitted(features, files, None, folds=3)
    images = torch.cat([*catdog_pairs(6, seed=0)])
    torch.testing.assert_close(listed.model(images), whole.model(images), atol=1e-3, rtol=1e-3)
    with pytest.raises(DataError, match="no subfolders to name the classes"):
        fitted(features, tmp_path / "dog", None)
    (tmp_path / "dog" / "0.png").write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"0\.png is not an image"):
        fitted(features, tmp_path, None)


def test_it_replaces_a_classifier_of_the_models_own(images: Tensor) -> None:
    model = cv.load("catdog-tiny")
    found = fitted(model, images, [0] * 16 + [7] * 16)
    assert (model.n_logits, found.model.n_logits, found.model.classes) == (4, 2, ("0", "7"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": CAT_DOG[:-1]}, "31 labels for 32 images"),
        ({"labels": ["cat"] * 32}, "all images are 'cat'"),
        ({"labels": ["cat"] * 30 + ["dog"] * 2}, "'dog' has 2 images, fewer than the 5 folds"),
        ({"labels": ["cat"] * 16 + [1.5] * 16}, "all names or all whole numbers, not float, str"),
        ({"labels": None}, "tensors have no folders"),
        ({"images": torch.zeros(32, 3, 8, 8)}, "images of shape"),
        ({"folds": 1}, "at least two folds"),
        ({"folds": 2.5}, "folds must be a whole number"),
        ({"strength": 0}, "above 0"),
        ({"strength": "strong"}, "a number above 0, not 'strong'"),
    ],
)
def test_what_cannot_be_fitted(
    features: cv.Model, images: Tensor, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((DataError, OptionError), match=message):
        fitted(features, **{"images": images, **changes})


def test_a_plain_module_is_no_model(images: Tensor) -> None:
    with pytest.raises(OptionError, match=r"wrap it with cv\.wrap first"):
        cv.fit_head(cv.load("catdog-tiny").module, images, CAT_DOG, progress=False)  # type: ignore[arg-type]


def test_without_scikit_learn(features: cv.Model, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(DataError, match=r"pip install circuitvit\[heads\]"):
        fitted(features, images)


def test_a_real_model_without_its_classifier(shared_data: Path) -> None:
    """ViT-Ti's features tell photographs of cats from dogs, and what 800 edges carry of that is needed."""
    name = "vit_tiny_patch16_224"
    weights = shared_data / "weights" / f"{name}.safetensors"
    features = cv.load(name, checkpoint=weights, num_classes=0)
    assert not features.has_classes
    cats, dogs = (
        sorted((shared_data / "images" / "cats_vs_dogs" / each).iterdir())[:40] for each in ("cats", "dogs")
    )
    found = cv.fit_head(features, [*cats[:25], *dogs[:25]], progress=False)
    assert found.accuracy >= 0.9
    metric = cv.logit_diff("cats", "dogs")
    task, others = (cv.Task(cats[part], dogs[part], metric) for part in (slice(4), slice(25, 31)))
    assert Evaluator(others.prepare(found.model)).effect.min() > 0  # each cat is more of one than its dog
    circuit = cv.attribute(found.model, task, "eap", progress=False).connected(800)
    report = cv.verify(found.model, task, circuit, held_out=others, n_random=0, progress=False)
    assert report.headline.images == "held-out"
    assert report.headline.necessity.value > 0.5

"""Scikit-learn's digits: a fixed split, ready for a model."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch

import circuitvit as cv
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.datasets.digits import CLASSES, digits_pairs, digits_split
from circuitvit.errors import DataError, NameNotFoundError, OptionError

load_digits = pytest.importorskip("sklearn.datasets").load_digits


def test_split_is_fixed_disjoint_and_in_proportion() -> None:
    train, held_out = digits_split()
    assert train.images.shape == (1438, 1, 8, 8)
    assert held_out.images.shape == (359, 1, 8, 8)
    assert set(train.indices.tolist()).isdisjoint(held_out.indices.tolist())
    assert len({*train.indices.tolist(), *held_out.indices.tolist()}) == 1797
    assert held_out.labels.bincount(minlength=10).min() >= 34
    assert len(CLASSES) == 10
    again, _ = digits_split()
    assert torch.equal(train.images, again.images)
    other, _ = digits_split(seed=1)
    assert not torch.equal(train.indices, other.indices)


def test_images_are_normalised() -> None:
    train, _ = digits_split()
    assert train.images.dtype == torch.float32
    assert train.images.min() == -1
    assert train.images.max() == 1


def test_pairs_show_the_two_digits() -> None:
    pairs = digits_pairs(12, 4, 3, 8)
    clean, corrupt = pairs
    assert len(pairs) == 12
    assert clean.shape == corrupt.shape == (12, 1, 8, 8)
    _, held_out = digits_split()
    for images, digit in ((clean, 3), (corrupt, 8)):
        known = held_out.of(digit).images
        assert all((image == known).flatten(1).all(dim=1).any() for image in images)
    assert torch.equal(digits_pairs(5, seed=4, clean="3", corrupt="8").clean, clean[:5])
    whole = load_digits()
    for images, indices, digit in ((clean, pairs.clean_indices, 3), (corrupt, pairs.corrupt_indices, 8)):
        assert (whole.target[indices] == digit).all()
        assert torch.equal(images[:, 0], torch.from_numpy(whole.images[indices]).float() / 8 - 1)
    assert torch.equal(digits_pairs(12, 4, preprocessed=False).corrupt, (corrupt + 1) / 2)


def test_pairs_are_asked_for_as_those_of_drawn_animals_are() -> None:
    """The same names in the same order, so that one call is changed into the other by its name."""
    digits, animals = (inspect.signature(each).parameters for each in (digits_pairs, catdog_pairs))
    assert [each for each in animals if each not in ("animals", "size")] == list(digits)
    assert all(digits[name].kind == animals[name].kind for name in digits)
    task = cv.Task(*digits_pairs(2), metric=cv.logit_diff("3", "8"))
    assert len(task.prepare(cv.load("digits-tiny"))) == 2


def test_missing_extra_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"pip install circuitvit\[digits\]"):
        digits_split()


def test_senseless_arguments_are_refused() -> None:
    with pytest.raises(OptionError, match="between 0 and 1"):
        digits_split(held_out=1.0)
    with pytest.raises(NameNotFoundError, match="unknown digit 10"):
        digits_pairs(1, clean=10)
    with pytest.raises(OptionError, match="both 3"):
        digits_pairs(1, corrupt=3)
    with pytest.raises(DataError, match="number of held-out pictures"):
        digits_pairs(1000)
    with pytest.raises(OptionError, match="at least 1"):
        digits_pairs(0)

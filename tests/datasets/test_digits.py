"""Scikit-learn's digits: a fixed split, ready for a model."""

from __future__ import annotations

import sys

import pytest
import torch

from circuitvit.datasets.digits import CLASSES, digits_pairs, digits_split
from circuitvit.errors import DataError, OptionError

pytest.importorskip("sklearn")


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
    clean, corrupt = digits_pairs(12, 3, 8, seed=4)
    assert clean.shape == corrupt.shape == (12, 1, 8, 8)
    _, held_out = digits_split()
    for images, digit in ((clean, 3), (corrupt, 8)):
        known = held_out.of(digit).images
        assert all((image == known).flatten(1).all(dim=1).any() for image in images)
    assert torch.equal(digits_pairs(12, 3, 8, seed=4)[0], clean)


def test_missing_extra_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"pip install circuitvit\[digits\]"):
        digits_split()


def test_senseless_arguments_are_refused() -> None:
    with pytest.raises(OptionError, match="between 0 and 1"):
        digits_split(held_out=1.0)
    with pytest.raises(OptionError, match="0 to 9"):
        digits_pairs(1, 10, 3)
    with pytest.raises(OptionError, match="both 3"):
        digits_pairs(1, 3, 3)
    with pytest.raises(DataError, match="number of held-out pictures"):
        digits_pairs(1000, 1, 7)

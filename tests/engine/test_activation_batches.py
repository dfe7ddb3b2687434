"""Activations of one neuron, and batch by batch."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

import circuitvit as cv
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.engine import activation_batches
from circuitvit.errors import NameNotFoundError, OptionError


@cache
def catdog() -> cv.Model:
    return cv.load("catdog-tiny")


@cache
def animals() -> torch.Tensor:
    return catdog_pairs(5, seed=0).clean


def test_a_number_in_brackets_reads_one_neuron_coordinate_or_class(tmp_path: Path) -> None:
    names = ["m1.hidden[17]", "resid2[3]@cls", "a2.h3[5]", "logits[1]"]
    whole = catdog().activations(animals(), ["m1.hidden", "resid2@cls", "a2.h3", "logits"])
    one = catdog().activations(animals(), names)
    assert list(one) == names
    for name, other, number in zip(names, whole, (17, 3, 5, 1), strict=True):
        assert torch.equal(one[name], whole[other][..., number : number + 1])
    stored = catdog().activations(animals(), names, out=tmp_path / "acts.safetensors", batch_size=2)
    for name in names:
        torch.testing.assert_close(stored[name], one[name])
    read = catdog().activations(animals(), "m*.hidden[0]")
    assert list(read) == [f"m{layer}.hidden[0]" for layer in range(4)]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("m1.hidden[128]", r"no m1\.hidden\[128\]: there are 128"),
        ("a0.h1.pattern[0]", "entries are named"),
        ("logits[9]", r"no logits\[9\]: there are"),
    ],
)
def test_numbers_that_are_not_there_are_refused(name: str, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        catdog().activations(animals(), name)


def test_batches_are_the_whole_cut_up() -> None:
    whole = catdog().activations(animals(), ["resid1", "m0.hidden[2]"])
    batches = list(activation_batches(catdog(), animals(), ["resid1", "m0.hidden[2]"], batch_size=2))
    assert [first for first, _ in batches] == [0, 2, 4]
    for name, values in whole.items():
        torch.testing.assert_close(torch.cat([read[name] for _, read in batches]), values)


def test_what_can_be_refused_is_before_the_first_run() -> None:
    with pytest.raises(NameNotFoundError):
        activation_batches(catdog(), animals(), "resid9")

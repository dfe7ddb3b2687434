"""Planted programs: each head is exactly what it is said to be."""

from __future__ import annotations

import pytest
import torch

import circuitvit as cv
from circuitvit.groundtruth import PLANTED


@pytest.mark.parametrize("name", PLANTED)
def test_clean_images_are_yes_and_corrupt_ones_no(name: str) -> None:
    found = cv.compiled(name)
    for change in (None, *found.changes):
        clean, corrupt = found.pairs(24, change=change)
        assert (found.model(clean).argmax(dim=1) == 0).all()
        assert (found.model(corrupt).argmax(dim=1) == 1).all()


@pytest.mark.parametrize("name", PLANTED)
def test_no_parts_are_added_to_them(name: str) -> None:
    with pytest.raises(cv.CircuitViTError, match=f"'{name}' has no circuit to hide"):
        cv.compiled(name, parts="norm")


def test_each_factor_is_all_that_its_head_says_and_is_nowhere_else() -> None:
    found = cv.compiled("factors")
    images, factors = found.factors(64, seed=1)
    nodes = found.model.activations(images, ["input", "a0.h*", "m0"], tokens="cls", progress=False)
    homes = {"colour": "a0.h0", "shape": "a0.h1", "bait": "a0.h2"}
    assert list(factors) == list(homes)
    for factor, home in homes.items():
        on, off = (nodes[home][factors[factor] == made, 0] for made in (True, False))
        assert float((on - on[0]).abs().max()) < 1e-4
        assert float((off - off[0]).abs().max()) < 1e-4
        assert float((on[0] - off[0]).norm()) > 0.5
    assert float((nodes["input"] - nodes["input"][0]).abs().max()) < 1e-5


def test_factors_are_drawn_apart_and_again_alike() -> None:
    found = cv.compiled("factors")
    images, factors = found.factors(400)
    fewer, few = found.factors(9)
    assert torch.equal(images[:9], fewer)
    assert all(torch.equal(factors[name][:9], few[name]) for name in factors)
    table = torch.stack(list(factors.values())).double()
    assert float((torch.corrcoef(table) - torch.eye(3)).abs().max()) < 0.15
    with pytest.raises(cv.CircuitViTError, match="number of images"):
        found.factors(0)

"""Models that give no numbers are refused by every look inside, and not described."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import circuitvit as cv
from circuitvit.errors import ModelError

IMAGES = torch.rand(8, 3, 48, 48, generator=torch.Generator().manual_seed(0))

LOOKS: dict[str, Callable[[cv.Model], Any]] = {
    "heads": lambda model: cv.head_kinds(model, IMAGES, progress=False),
    "registers": lambda model: cv.registers(model, IMAGES, ways=(), progress=False),
    "attention page": lambda model: cv.attention_page(model, IMAGES, progress=False),
    "lens": lambda model: cv.logit_lens(model, IMAGES),
}


@pytest.mark.parametrize("look", LOOKS)
def test_nan_is_refused(look: str) -> None:
    broken = cv.load("catdog-tiny").edit({"m1": 1e38})  # whose square is infinite
    with pytest.raises(ModelError, match="NaN"):
        LOOKS[look](broken)

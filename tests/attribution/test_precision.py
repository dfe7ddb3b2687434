"""Half precision, which is used on request only: how much it changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import circuitvit as cv
from circuitvit.datasets.catdog import catdog_pairs


def scores(method: str, dtype: torch.dtype) -> cv.EdgeScores:
    task = cv.Task(*catdog_pairs(16, seed=0), metric=cv.logit_diff("cat", "dog"))
    return cv.attribute(cv.load("catdog-tiny", dtype=dtype), task, method, progress=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["eap", "eap-ig", "exact"])
def test_scores_in_half_precision_are_those_in_full_to_a_hundredth(method: str, dtype: torch.dtype) -> None:
    """The error of one score, in units of the largest: 8 bits of a mantissa and some thousand additions."""
    whole, half = scores(method, torch.float32).values, scores(method, dtype).values
    error = np.abs(whole - half).max() / np.abs(whole).max()
    assert 0 < error < 0.02

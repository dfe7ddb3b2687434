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
@pytest.mark.parametrize("method", ["eap", "eap-ig", "local", "exact"])
def test_scores_in_half_precision_are_those_in_full_to_a_hundredth(method: str, dtype: torch.dtype) -> None:
    """The error of one score, in units of the largest: 8 bits of a mantissa and some thousand additions."""
    whole, half = scores(method, torch.float32).values, scores(method, dtype).values
    error = np.abs(whole - half).max() / np.abs(whole).max()
    assert 0 < error < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_metrics_of_half_precision_logits_lose_nothing_more(dtype: torch.dtype) -> None:
    """Where 8 bits of a mantissa are left, log-probabilities near -31 would be whole eighths."""
    task = cv.Task(*catdog_pairs(2, seed=0), metric="log_probability").prepare(cv.load("catdog-tiny"))
    logits = torch.tensor([[-30.0, 1.0, 2.0, 0.0], [-31.0, 1.5, 0.5, 0.0]]).to(dtype)
    rows = torch.arange(2)
    found, exact = task.metric(logits, logits, rows), task.metric(logits.double(), logits.double(), rows)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=1e-6)

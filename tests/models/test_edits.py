"""Edits: what is refused, what is kept, and how they go together with everything else."""

from __future__ import annotations

import torch

import circuitvit as cv
from tests.rightness import CLEAN, micro
from tests.strategies import assert_close


def test_sites_behind_an_edited_stream_are_read_where_they_are() -> None:
    """A changed stream is a stage of its own, which no site stands for."""
    model = cv.wrap(micro())
    edited = model.edit({"resid1": lambda x: 2 * x})
    before, after = (
        each.activations(CLEAN, ["resid1", "m1", "logits"], progress=False) for each in (model, edited)
    )
    assert_close(after["resid1"], 2 * before["resid1"])
    assert_close(after["logits"], edited(CLEAN))
    assert not torch.allclose(after["m1"], before["m1"])
    assert_close(
        model.edit({"m1": after["m1"], "mid1": edited.activations(CLEAN, "mid1")["mid1"]})(CLEAN),
        edited(CLEAN),
    )

"""Models in which there are no edges to find, or not by this library: each is refused with one sentence."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import circuitvit as cv
from circuitvit.errors import UnsupportedModelError
from circuitvit.models.timm_import import import_timm

timm = import_timm()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("swin_tiny_patch4_window7_224", "merged on the way"),
        ("swinv2_cr_tiny_224", "merged on the way"),
        ("pit_ti_224", "merged on the way"),
        ("xcit_nano_12_p16_224", "from channel to channel"),
        ("cait_xxs24_224", "talking heads.*class attention"),
    ],
)
def test_architectures_without_edges_say_why(name: str, reason: str) -> None:
    with torch.device("meta"):
        module = timm.create_model(name).eval()
    with pytest.raises(UnsupportedModelError, match=rf"cannot be decomposed: .*{reason}"):
        cv.wrap(module)


def test_encoders_of_torch_that_norm_afterwards_say_why() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 2).eval()
    with pytest.raises(
        UnsupportedModelError, match=r"layers\.0 norms the stream after adding to it \(post-norm"
    ):
        cv.wrap(nn.Sequential(encoder).eval())


def test_scripted_and_traced_modules_are_sent_back() -> None:
    for made in (torch.jit.script(nn.Linear(2, 2)), torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))):
        with pytest.raises(UnsupportedModelError, match="wrap the module that was scripted"):
            cv.wrap(made.eval())

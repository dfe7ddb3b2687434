"""timm's `VisionTransformer` against hooks on the original module: the pattern for every family."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import circuitvit as cv
from tests.reference.hooked import (
    HookedModule,
    Receiver,
    packed_blocks,
)
from tests.rightness import CLEAN, CORRUPT, micro, prove

HEADS, WIDTH = 2, 12


def hooked(module: Any) -> HookedModule:
    """Where timm's `VisionTransformer` keeps its nodes."""
    senders, receivers = packed_blocks(
        module.blocks, HEADS, WIDTH, lambda block: block.ls2, lambda block: getattr(block.ls1, "gamma", None)
    )
    receivers["logits"] = Receiver(module.norm, module.norm)
    return HookedModule(module, senders, receivers)


@pytest.mark.parametrize(
    "options",
    [{}, {"init_values": 0.1, "qk_norm": True}, {"reg_tokens": 2, "norm_layer": nn.RMSNorm}],
    ids=["plain", "scaled", "registers"],
)
def test_edges_are_those_of_hooks_on_the_original(options: dict[str, Any]) -> None:
    module = micro(**options)
    prove(cv.wrap(module), hooked(module), CLEAN, CORRUPT)

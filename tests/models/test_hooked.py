"""timm's `VisionTransformer` against hooks on the original module: the pattern for every family."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import circuitvit as cv
from tests.reference.hooked import HookedModule, Receiver, Sender, given, gives, written_by_head
from tests.rightness import CLEAN, CORRUPT, micro, prove

HEADS, WIDTH = 2, 12


def hooked(module: Any) -> HookedModule:
    """Where timm's `VisionTransformer` keeps its nodes."""
    senders = {"input": Sender(module.blocks[0], given)}
    receivers = {"logits": Receiver(module.norm, module.norm)}
    for layer, block in enumerate(module.blocks):
        senders[f"m{layer}"] = Sender(block.ls2, gives)
        receivers[f"m{layer}"] = Receiver(block.norm2, block.norm2)
        for head in range(HEADS):
            written = written_by_head(head, WIDTH, getattr(block.ls1, "gamma", None))
            senders[f"a{layer}.h{head}"] = Sender(block.attn.proj, written)
            for port, name in enumerate("qkv"):
                first = (port * HEADS + head) * WIDTH
                columns = slice(first, first + WIDTH)
                receivers[f"a{layer}.h{head}<{name}>"] = Receiver(block.norm1, block.attn.qkv, columns)
    return HookedModule(module, senders, receivers)


@pytest.mark.parametrize(
    "options",
    [{}, {"init_values": 0.1, "qk_norm": True}, {"reg_tokens": 2, "norm_layer": nn.RMSNorm}],
    ids=["plain", "scaled", "registers"],
)
def test_edges_are_those_of_hooks_on_the_original(options: dict[str, Any]) -> None:
    module = micro(**options)
    prove(cv.wrap(module), hooked(module), CLEAN, CORRUPT)

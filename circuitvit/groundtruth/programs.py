"""The five programs: one for each way in which one component of a transformer can depend on another.

Each is a function of a `Size`. Attention is soft: what a head looks for gets most of the attention but not
all (86 % with the usual gap), so that its logits have a gradient. As it is known exactly how much, the levels
of what is written are exact all the same: on drawn images every feature is on or off, never between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

from circuitvit.groundtruth.language import Head, Layer, Match, Program, Size, Unit, look_for, shares
from circuitvit.groundtruth.scenes import N_PATCHES, Scene


def relay(size: Size) -> Program:
    """Value composition: one head gives the cue's colour to all tokens, a second averages what they got."""
    takes = Head(look_for(size, "cue"), "colour", "seen", shares(size, 3))
    passes = Head((), "seen", "answer", (0.0, 1.0))
    return Program(
        claim="the cue patch is coloured",
        size=size,
        scenes=(
            Scene(
                {"cue": (0,), "colour": (0, 2, 3)},
                {"colour": {"colour": (1, 2, 3)}, "cue": {"cue": (1,)}},
            ),
        ),
        layers=(Layer((takes,)), Layer((passes,))),
        readout={"answer": 1.0},
        carrier=(1, passes),
    )


def key(size: Size) -> Program:
    """Key composition: an MLP marks the red square, and a head looks for its mark."""
    marks = Unit("all", ("red", "square"), "target")
    looks = Head(look_for(size, "target"), "spotted", "answer", shares(size, 3))
    return Program(
        claim="the red square is spotted",
        size=size,
        scenes=(
            Scene(
                {"red": (0, 2), "square": (0, 3), "spotted": (0, 4, 5)},
                {"target": {"red": (1, 2), "square": (1, 3)}, "spots": {"spotted": (1, 4, 5)}},
            ),
        ),
        layers=(Layer(units=(marks,)), Layer((looks,))),
        readout={"answer": 1.0},
        carrier=(1, looks),
    )


def query(size: Size) -> Program:
    """Query composition: one head reads which shape the cue asks for, a second looks for that shape."""
    asks = Head(look_for(size, "cue"), "asks-round", "wants-round", shares(size, 2))
    matches = (
        Match("wants-round", "round", size.gap / 2),
        Match("wants-round", "square", -size.gap / 2),
    )
    # The shape wanted has logit gap, the other -gap, everything else 0; one patch without shape is coloured.
    hit, miss = math.exp(size.gap), math.exp(-size.gap)
    total = hit + miss + size.tokens - 2
    looks = Head(matches, "colour", "answer", ((miss + 1) / total, (hit + 1) / total))
    return Program(
        claim="the shape that the cue asks for is coloured",
        size=size,
        scenes=(
            Scene(
                {"cue": (0,), "asks-round": (0, 3), "round": (1,), "square": (2,), "colour": (1, 4)},
                {
                    "question": {"asks-round": (5, 3)},
                    "cue": {"cue": (5,)},
                    "shapes": {"round": (2,), "square": (1,)},
                    "colour": {"colour": (2, 4)},
                },
            ),
        ),
        layers=(Layer((asks,)), Layer((looks,))),
        readout={"answer": 1.0},
        carrier=(1, looks),
    )


def hop(size: Size) -> Program:
    """A positional hop: every patch reads the next one's colour, then the class token reads the cue's."""
    prefix = size.tokens - N_PATCHES
    places = {f"place{token}": (token,) for token in range(size.tokens)}
    after = {token: token + 1 for token in range(prefix, size.tokens - 1)} | {size.tokens - 1: prefix}
    after |= {token: token for token in range(prefix)}  # tokens that are no patches look at themselves
    matches = tuple(Match(f"place{one}", f"place{two}", size.gap / 4) for one, two in after.items())
    hops = Head(matches, "colour", "next-coloured", shares(size, 3))
    looks = Head(look_for(size, "cue"), "next-coloured", "answer", shares(size, 3))
    return Program(
        claim="the patch after the cue, in reading order, is coloured",
        size=size,
        scenes=(
            Scene(
                {"cue": (0,), "colour": (1, 5, 7)},
                {"colour": {"colour": (3, 5, 7)}, "cue": {"cue": (2,)}},
                in_order=True,
            ),
        ),
        places=places,
        layers=(Layer((hops,)), Layer((looks,))),
        readout={"answer": 1.0},
        carrier=(1, looks),
    )


def count(size: Size) -> Program:
    """Counting by uniform attention; an MLP compares the count with a half."""
    counts = Head((), "colour", "many", (3 / size.tokens, 6 / size.tokens))
    return Program(
        claim="more than half of the patches are coloured",
        size=size,
        scenes=(Scene({"colour": (0, 1, 2, 3, 4, 5)}, {"colour": {"colour": (0, 1, 2)}}),),
        layers=(Layer((counts,)), Layer(units=(Unit("all", ("many",), "answer"),))),
        readout={"answer": 1.0},
        carrier=(0, counts),
    )


PROGRAMS: Mapping[str, Callable[[Size], Program]] = MappingProxyType(
    {"relay": relay, "key": key, "query": query, "hop": hop, "count": count}
)

"""Programs with something to be found by looking inside: a factor in one head of its own.

The programs of `programs` are there for circuits: which edges carry an answer. In these each head is known for
what it is, so that a tool that looks at single components can be held against them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from circuitvit.groundtruth.programs import Head, Layer, Program, Scene, Size, look_for, shares


def factors(size: Size) -> Program:
    """Each factor in one head: `a0.h0` carries the colour of the cue, `a0.h1` its shape, a decoy the bait.

    What the input holds, summed over patches, is the same in all images; the MLP holds a mixture of all three.
    """
    colour = Head(look_for(size, "cue"), "colour", "cue-coloured", shares(size, 3))
    shape = Head(look_for(size, "cue"), "round", "cue-round", shares(size, 3))
    return Program(
        claim="the cue patch is coloured and round",
        size=size,
        scenes=(
            Scene(
                {"cue": (0,), "colour": (0, 2, 3), "round": (0, 4, 5)},
                {"colour": {"colour": (1, 2, 3)}, "shape": {"round": (1, 4, 5)}},
            ),
        ),
        layers=(Layer((colour, shape)),),
        readout={"cue-coloured": 1.0, "cue-round": 1.0},
        carrier=(0, colour),
        bias=-1.0,
    )


PLANTED: Mapping[str, Callable[[Size], Program]] = MappingProxyType({"factors": factors})

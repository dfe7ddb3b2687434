"""Programs with something to be found by looking inside: factors, matches, mirrored pairs, each in its place.

The programs of `programs` are there for circuits: which edges carry an answer. In these each head is known
for what it is, so that a tool that looks at single components can be held against them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType

from circuitvit.groundtruth.programs import (
    GRID,
    N_PATCHES,
    SATURATED,
    Head,
    Layer,
    Match,
    Program,
    Scene,
    Size,
    Unit,
    look_for,
    shares,
)

BITS = ("bit1", "bit2", "bit3")
"""What a patch looks like, for heads that look for what is alike."""


def factors(size: Size) -> Program:
    """Each factor in one head: `a0.h0` carries the colour of the cue, `a0.h1` its shape, a decoy the bait.

    What the input holds, summed over patches, is the same in all images; the MLP holds a mixture of all.
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


def duplicate(size: Size) -> Program:
    """A head that looks at the other patch that looks the same, `a0.h0`; `a1.h0` looks for the cue."""
    size = replace(size, gap=SATURATED)
    alike = Head((*_alike(BITS, BITS), *_never(size, lambda token: token)), "colour", "twin-coloured", SURE)
    looks = Head(look_for(size, "cue"), "twin-coloured", "answer", SURE)
    same = {"bit1": (0, 1, 2, 3), "bit2": (0, 1, 4, 5), "bit3": (0, 1, 6, 7)}
    other = {"bit1": (0, 8, 2, 3), "bit2": (0, 8, 4, 5), "bit3": (0, 8, 6, 7)}
    return Program(
        claim="the other patch that looks like the cue is coloured",
        size=size,
        scenes=(
            Scene(
                {"cue": (0,), "colour": (1, 2, 4), **same}, {"colour": {"colour": (8, 2, 4)}, "twin": other}
            ),
        ),
        places=_places(size),
        layers=(Layer((alike,)), Layer((looks,))),
        readout={"answer": 1.0},
        carrier=(1, looks),
    )


def induction(size: Size) -> Program:
    """An induction head: `a0.h0` to `a0.h2` say how the previous patch looks, one bit each, and `a1.h0` looks
    where that is how its own patch looks: at what follows the patch that looks the same.
    """
    size = replace(size, gap=SATURATED)
    first, last = size.tokens - N_PATCHES, size.tokens - 1

    def previous(token: int) -> int:
        return token if token < first else last if token == first else token - 1

    def following(token: int) -> int:
        return token if token < first else first if token == last else token + 1

    before = tuple(f"previous-{bit}" for bit in BITS)
    tells = tuple(
        Head(_always(size, previous), bit, name, SURE) for bit, name in zip(BITS, before, strict=True)
    )
    follows = Head((*_alike(BITS, before), *_never(size, following)), "colour", "follower-coloured", SURE)
    looks = Head(look_for(size, "cue"), "follower-coloured", "answer", SURE)
    same = {"bit1": (0, 4, 1, 2), "bit2": (0, 4, 3, 5), "bit3": (0, 4, 6, 7)}
    other = {"bit1": (6, 4, 1, 2), "bit2": (6, 4, 3, 5), "bit3": (6, 4, 0, 7)}
    return Program(
        claim="the patch after the one that looks like the cue is coloured, in reading order",
        size=size,
        scenes=(
            Scene(
                {"cue": (4,), "colour": (1, 3, 5), **same},
                {"colour": {"colour": (2, 3, 5)}, "twin": other},
                in_order=True,
            ),
        ),
        places=_places(size),
        layers=(Layer(tells), Layer((follows,)), Layer((looks,))),
        readout={"answer": 1.0},
        carrier=(2, looks),
    )


def mirror(size: Size) -> Program:
    """Two pairs of heads that are each other's mirror, `a0.h0` and `a0.h1`, `a1.h0` and `a1.h1`, and one of
    neurons, 0 and 1 of `m0`: one looks right where the other looks left, round the end of the row.
    """
    size = replace(size, gap=SATURATED)
    first = size.tokens - N_PATCHES

    def beside(token: int, step: int) -> int:
        row, column = divmod(token - first, GRID)
        return first + row * GRID + (column + step) % GRID if token >= first else token

    sides = {"right": 1, "left": -1}
    heads = tuple(
        Head(_always(size, partial(beside, step=step)), "colour", f"{side}-coloured", SURE)
        for side, step in sides.items()
    )
    units = tuple(Unit("all", ("colour", f"{side}-coloured"), f"both-{side}") for side in sides)
    looks = tuple(Head(look_for(size, "cue"), f"both-{side}", f"answer-{side}", SURE) for side in sides)
    return Program(
        claim="the cue patch is coloured, and so are those left and right of it",
        size=size,
        scenes=(
            Scene(
                {"cue": (1,), "colour": (0, 1, 2)},
                {"right": {"colour": (0, 1, 4)}, "left": {"colour": (1, 2, 4)}},
                in_order=True,
                first=(0, 3, 6),
            ),
        ),
        places=_places(size),
        layers=(Layer(heads, units), Layer(looks)),
        readout={f"answer-{side}": 1.0 for side in sides},
        carrier=(1, looks[0]),
        bias=-1.0,
    )


SURE = (0.0, 1.0)
"""The levels of a head whose attention is 1 and 0."""


def _places(size: Size) -> dict[str, tuple[int, ...]]:
    return {f"place{token}": (token,) for token in range(size.tokens)}


def _always(size: Size, target: Callable[[int], int]) -> tuple[Match, ...]:
    """Every token looks at its target, no two of them at the same one."""
    return tuple(
        Match(f"place{token}", f"place{target(token)}", size.gap / 4) for token in range(size.tokens)
    )


def _never(size: Size, target: Callable[[int], int]) -> tuple[Match, ...]:
    """No token looks at its target, however much it looks like what is wanted."""
    return tuple(
        Match(f"place{token}", f"place{target(token)}", -size.gap / 2) for token in range(size.tokens)
    )


def _alike(queries: tuple[str, ...], keys: tuple[str, ...]) -> tuple[Match, ...]:
    """Tokens look where features are as their own: with each that differs, a quarter of the gap is lost."""
    return tuple(Match(query, key, SATURATED / 4) for query, key in zip(queries, keys, strict=True))


PLANTED: Mapping[str, Callable[[Size], Program]] = MappingProxyType(
    {"factors": factors, "duplicate": duplicate, "induction": induction, "mirror": mirror}
)

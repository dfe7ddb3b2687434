"""Programs with something to be found by looking inside: factors, matches, mirrored pairs, each in its place;
one neuron, features in superposition, a path from patch to class token.

The programs of `programs` are there for circuits: which edges carry an answer. In these each head, neuron or
feature is known for what it is, so that a tool that looks at single components can be held against them.
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


def neuron(size: Size) -> Program:
    """One neuron that carries the answer, `m1.n7`, among others that are as active.

    Nobody reads what neurons 0 to 4, 8 and 9 write. Neurons 5 and 6 are read with opposite signs: each alone
    has half the effect of neuron 7, and together they have none.
    """
    reads = ("cue-coloured", "cue-round")
    heads = tuple(
        Head(look_for(size, "cue"), value, into, shares(size, 3))
        for value, into in zip(("colour", "round"), reads, strict=True)
    )
    unread = [Unit("all", reads[number % 2 :], f"unread{number}") for number in range(7)]
    pair = [Unit("all", reads, name) for name in ("plus", "minus")]
    return Program(
        claim="the cue patch is coloured and round",
        size=size,
        scenes=(
            Scene(
                {"cue": (0,), "colour": (0, 2, 3), "round": (0, 4, 5)},
                {
                    "colour": {"colour": (1, 2, 3)},
                    "shape": {"round": (1, 4, 5)},
                    "cue": {"cue": (1,)},
                },
            ),
        ),
        layers=(Layer(heads), Layer(units=(*unread[:5], *pair, Unit("all", reads, "answer"), *unread[5:]))),
        readout={"answer": 1.0, "plus": 0.5, "minus": -0.5},
        carrier=(0, heads[0]),
    )


TEXTURES = ("dots", "stripes", "rings", "waves", "checks")
"""What patches show, at most one each."""


def superposition(size: Size) -> Program:
    """Five features in three dimensions: `m0` writes the texture of each patch, `m1` reads one of them.

    The cosine of any two is 1/sqrt(5) or its negative; a patch has at most one texture, so this interference
    never reaches the margin of the neuron that reads. Elhage et al. 2022, "Toy models of superposition",
    arXiv:2209.10652.
    """
    kinds = tuple(f"has-{texture}" for texture in TEXTURES)
    writes = tuple(Unit("all", (texture,), kind) for texture, kind in zip(TEXTURES, kinds, strict=True))
    looks = Head(look_for(size, "cue"), "dotted", "answer", shares(size, 1))
    others = {"stripes": (3,), "rings": (5,), "waves": (7,)}  # where nothing was: never two at a patch
    return Program(
        claim="the cue patch has dots",
        size=size,
        scenes=(
            Scene(
                {"cue": (0,), "dots": (0,), "stripes": (2,), "rings": (4,), "waves": (6,), "checks": (8,)},
                {"texture": {"dots": (1,), **others}, "cue": {"cue": (1,), **others}},
            ),
        ),
        layers=(
            Layer(units=writes),
            Layer(units=(Unit("all", kinds[:1], "dotted", margin=1.2),)),
            Layer((looks,)),
        ),
        readout={"answer": 1.0},
        carrier=(2, looks),
        superposed=kinds,
    )


PATH = {"A": 2, "B": 4, "C": 6}
"""The patches of the program "path", in reading order from 0."""


def path(size: Size) -> Program:
    """Two paths from patches to the class token: `a0.h0` takes the colour from A to B, and `a1.h0` from there
    to the class token; `a0.h1` takes the shape from C to the class token at once.

    Other patches are coloured and round too, heads take this from and to each, and nobody reads it there.
    """
    size = replace(size, gap=SATURATED)
    a, b, c = (size.tokens - N_PATCHES + patch for patch in PATH.values())

    def swaps(one: int, other: int) -> tuple[Match, ...]:
        swapped = {one: other, other: one}
        return _always(size, lambda token: swapped.get(token, token))

    crosses = Head(swaps(a, b), "colour", "coloured-there", SURE)
    shape = Head(swaps(0, c), "round", "answer-round", SURE)
    colour = Head(swaps(0, b), "coloured-there", "answer-coloured", SURE)
    return Program(
        claim="patch A is coloured and patch C is round",
        size=size,
        scenes=(
            Scene(
                {"colour": (0, 3, 4), "round": (2, 5, 6)},
                {"colour": {"colour": (1, 5, 6)}, "shape": {"round": (0, 3, 4)}},
                fixed=tuple(PATH.values()),
            ),
        ),
        places=_places(size),
        layers=(Layer((crosses, shape)), Layer((colour,))),
        readout={"answer-coloured": 1.0, "answer-round": 1.0},
        carrier=(1, colour),
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
    {
        "factors": factors,
        "duplicate": duplicate,
        "induction": induction,
        "mirror": mirror,
        "neuron": neuron,
        "superposition": superposition,
        "path": path,
    }
)

"""What compiled models look at, compute, and are made harder by: scenes, a little language, programs, parts.

A *feature* is on or off at every token. Pixels and positions set some; every other feature starts off and has
exactly one writer. Nothing else flows through the stream, so who is wired to whom can be read off a program:
sender `u` and receiver `v` are joined when `v` reads a feature that `u` writes. The style is that of RASP and
Tracr: Weiss, Goldberg and Yahav 2021, "Thinking like transformers", arXiv:2106.06981; Lindner et al. 2023,
"Tracr: compiled transformers as a laboratory for interpretability", arXiv:2301.05062.

Attention is soft: what a head looks for gets most of the attention but not all (86 % with the usual gap), so
that its logits have a gradient. As it is known exactly how much, the levels of what is written are exact all
the same: on drawn images every feature is on or off, never between.

Adversarial parts can be added to any program, so that some way of scoring edges fails on it. The failures are
known from the literature: redundancy and backup heads (Wang et al. 2023, arXiv:2211.00593; McGrath et al.
2023, "The hydra effect", arXiv:2307.15771), saturated attention and cancellation (Kramar et al. 2024, "AtP*",
arXiv:2403.00745), registers (Darcet et al. 2024, arXiv:2309.16588).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

# -- scenes: a few patches, each with some binary features ----------------------------------------
#
# A scene speaks of *roles*: role 0 may be the cue, role 1 a patch that it could have been. Which patch plays
# which role is drawn for every image, so nothing but the features themselves gives the answer away. Clean and
# corrupt images share the roles and differ in the features that one *change* moves. Changes move features and
# seldom add any: where the number of patches with a feature is the same, so is what soft attention leaks.

GRID = 3
"""Rows and columns of patches."""

N_PATCHES = GRID * GRID
PATCH = 2
"""Side of a patch in pixels."""

SIDE = GRID * PATCH
"""Side of an image in pixels."""

Roles = Mapping[str, tuple[int, ...]]
"""For pixel features, the roles at whose patches they are on."""


@dataclass(frozen=True)
class Scene:
    """A clean picture and the ways to corrupt it.

    Attributes:
        clean: where each pixel feature is on.
        changes: by name, the features that are elsewhere in the corrupt picture.
        in_order: roles are played by neighbours, from a patch drawn at random on, in reading order and round
            the end; otherwise the order is random.
        first: the patches from which the order may begin.
        fixed: the patches of the first roles, where these are not drawn.
    """

    clean: Roles
    changes: Mapping[str, Roles] = field(default_factory=dict)
    in_order: bool = False
    first: tuple[int, ...] = tuple(range(N_PATCHES))
    fixed: tuple[int, ...] = ()

    def corrupt(self, change: str) -> Roles:
        """The corrupt picture; a scene that does not know the change makes its own first one."""
        first = next(iter(self.changes))
        return {**self.clean, **self.changes[change if change in self.changes else first]}

    def places(self, rng: np.random.Generator) -> NDArray[np.intp]:
        """The patch of each role `(role,)`."""
        if self.in_order:
            return (np.arange(N_PATCHES) + self.first[rng.integers(len(self.first))]) % N_PATCHES
        drawn = rng.permutation(N_PATCHES)
        return np.concatenate([self.fixed, drawn[~np.isin(drawn, self.fixed)]]).astype(np.intp)


def draw(
    scenes: tuple[Scene, ...], change: str | None, n: int, seed: int
) -> tuple[Bool[Tensor, "image feature patch"], Bool[Tensor, "image feature patch"]]:
    """The clean and the corrupt features of `n` pairs; the first pairs do not depend on `n`.

    Args:
        scenes: the first is the program's own.
        change: one of its changes, or None for all of them in turn.
        n: how many pairs.
        seed: of the roles.
    """
    changes = (change,) if change is not None else tuple(scenes[0].changes)
    clean, corrupt = [], []
    for image in range(n):
        rng = np.random.default_rng([seed, image])
        for scene in scenes:
            places = scene.places(rng)
            clean.append(_marked(scene.clean, places))
            corrupt.append(_marked(scene.corrupt(changes[image % len(changes)]), places))
    return _stacked(clean, n), _stacked(corrupt, n)


def vary(
    scenes: tuple[Scene, ...], n: int, seed: int
) -> tuple[Bool[Tensor, "image feature patch"], dict[str, Bool[Tensor, " image"]]]:
    """The features of `n` images, each change of each scene being made or not by the toss of a coin.

    Returns:
        The features, and by the name of each change whether it was made, `(image,)`.
    """
    names = [change for scene in scenes for change in scene.changes]
    grids, tossed = [], np.zeros((n, len(names)), dtype=bool)
    for image in range(n):
        rng = np.random.default_rng([seed, image])
        tossed[image] = rng.random(len(names)) < 0.5
        made = {name for name, each in zip(names, tossed[image], strict=True) if each}
        for scene in scenes:
            roles = dict(scene.clean)
            for change, moved in scene.changes.items():
                roles.update(moved if change in made else {})
            grids.append(_marked(roles, scene.places(rng)))
    return _stacked(grids, n), {name: torch.from_numpy(tossed[:, at]) for at, name in enumerate(names)}


def images_of(grids: Bool[Tensor, "image feature patch"]) -> Float[Tensor, "image channel height width"]:
    """Images that show these features: channel `i` is +1 in the patches where feature `i` is on, else -1."""
    signs = (2 * grids.float() - 1).view(*grids.shape[:-1], GRID, GRID)
    return signs.repeat_interleave(PATCH, dim=-2).repeat_interleave(PATCH, dim=-1)


def _marked(roles: Roles, places: NDArray[np.intp]) -> NDArray[np.bool_]:
    """`(feature, patch)`: whether the feature is on."""
    grid = np.zeros((len(roles), N_PATCHES), dtype=bool)
    for row, marked in enumerate(roles.values()):
        grid[row, places[list(marked)]] = True
    return grid


def _stacked(grids: list[NDArray[np.bool_]], n: int) -> Bool[Tensor, "image feature patch"]:
    return torch.from_numpy(np.concatenate(grids)).view(n, -1, N_PATCHES)


# -- the language: what heads, MLPs and the classifier read and write -----------------------------


class Match(NamedTuple):
    """One term of a head's attention logits: `weight` times query feature times key feature, each +1 or -1.

    The query None stands for a constant 1: every token looks for the same.
    """

    query: str | None
    key: str
    weight: float


@dataclass(frozen=True)
class Head:
    """An attention head that looks for one thing, reads one feature there and writes one.

    What it reads is a share: the attention that it pays to tokens where `value` is on.

    Attributes:
        matches: terms of the attention logits; without any the attention is uniform.
        value: the feature read where it attends.
        into: the feature written, at every token.
        levels: the shares that are written as off and as on; what lies between is written in proportion.
    """

    matches: tuple[Match, ...]
    value: str
    into: str
    levels: tuple[float, float]


@dataclass(frozen=True)
class Unit:
    """A few neurons of an MLP that compute one feature of others at the same token.

    Attributes:
        rule: "all" writes `into` where all of `reads` are on, "any" where at least one is.
        reads: the features read.
        into: the feature written.
        margin: of "all", by how much the sum of the values read must exceed that with one of them off: more
            than what interference adds, where a feature is in superposition.
    """

    rule: Literal["all", "any"]
    reads: tuple[str, ...]
    into: str
    margin: float = 0.5


@dataclass(frozen=True)
class Layer:
    """The heads of one block, and the units of its MLP."""

    heads: tuple[Head, ...] = ()
    units: tuple[Unit, ...] = ()


@dataclass(frozen=True)
class Size:
    """What programs depend on besides their own logic.

    Attributes:
        gap: by how much the attention logit of what a head looks for exceeds the others.
        registers: number of register tokens.
        ballast: share of the stream's variance that is constant and holds no feature, 0 to below 1.
    """

    gap: float
    registers: int = 0
    ballast: float = 0.0

    @property
    def tokens(self) -> int:
        """Class token, registers and patches."""
        return 1 + self.registers + N_PATCHES


def look_for(size: Size, key: str) -> tuple[Match, ...]:
    """The matches of a head with which every token attends where `key` is on."""
    return (Match(None, key, size.gap / 2),)


def shares(size: Size, marked: int) -> tuple[float, float]:
    """The levels of a head that looks for one token, when `marked` tokens have the feature that it reads.

    Returns:
        The share of attention on them when the token it looks for is none of them, and when it is one.
    """
    total = math.exp(size.gap) + size.tokens - 1
    return marked / total, (math.exp(size.gap) + marked - 1) / total


@dataclass(frozen=True)
class Program:
    """A model before it is compiled.

    Attributes:
        claim: in words, when the answer is "yes".
        size: that it was written for.
        scenes: what is drawn; each has patches and pixel features of its own.
        layers: from the first to the last.
        readout: weight of each feature, read at the class token, in the evidence for "yes".
        carrier: the head whose output carries the answer on, and its layer; what adversarial parts
            copy.
        bias: constant evidence for "yes".
        places: features set by position, and the tokens where they are on.
        superposed: features that share three dimensions; at most one of them is on at a token.
    """

    claim: str
    size: Size
    scenes: tuple[Scene, ...]
    layers: tuple[Layer, ...]
    readout: Mapping[str, float]
    carrier: tuple[int, Head]
    bias: float = 0.0
    places: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    superposed: tuple[str, ...] = ()

    @property
    def pixels(self) -> tuple[str, ...]:
        """Features that pixels set; each has an image channel."""
        return tuple(feature for scene in self.scenes for feature in scene.clean)

    @property
    def written(self) -> tuple[str, ...]:
        """Features that heads and units write, in running order."""
        names: list[str] = []
        for layer in self.layers:
            names += [head.into for head in layer.heads]
            names += [unit.into for unit in layer.units]
        return tuple(names)

    @property
    def features(self) -> tuple[str, ...]:
        """All features: of pixels, of positions, written."""
        return (*self.pixels, *self.places, *self.written)


# -- the five programs: one for each way in which a component can depend on another ---------------


def relay(size: Size) -> Program:
    """Value composition: one head gives the cue's colour to all tokens, a second averages what they got."""
    takes = Head(look_for(size, "cue"), "colour", "seen", shares(size, 3))
    passes = Head((), "seen", "answer", (0.0, 1.0))
    return Program(
        claim="the cue patch is coloured",
        size=size,
        scenes=(
            Scene(
                {"cue": (0,), "colour": (0, 2, 3)}, {"colour": {"colour": (1, 2, 3)}, "cue": {"cue": (1,)}}
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
    matches = (Match("wants-round", "round", size.gap / 2), Match("wants-round", "square", -size.gap / 2))
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


# -- adversarial parts, and decoys ----------------------------------------------------------------

SOFT = 4.0
"""The usual gap between attention logits: 86 % of the attention for one of ten tokens."""

SATURATED = 40.0
"""A gap at which float32 attention is 1 and 0, and its gradient nothing."""


BALLAST = 0.9
"""The usual share of the stream's variance that is constant."""


@dataclass(frozen=True)
class Part:
    """An adversarial part.

    Attributes:
        summary: one line.
        add: gives the program with the part.
        gap: between attention logits, where the part changes it.
        registers: how many register tokens it needs.
        ballast: share of the stream's variance that is constant, where the part changes it.
    """

    summary: str
    add: Callable[[Program], Program] = lambda program: program
    gap: float = SOFT
    registers: int = 0
    ballast: float = BALLAST


def _joined(rule: Literal["all", "any"]) -> Callable[[Program], Program]:
    """Split the carrier into two equal heads whose outputs the MLP of their layer joins."""

    def add(program: Program) -> Program:
        place, carrier = program.carrier
        names = (f"{carrier.into}.1", f"{carrier.into}.2")
        layer = program.layers[place]
        twins = tuple(replace(carrier, into=name) for name in names)
        heads = tuple(head for head in layer.heads if head != carrier)
        return _with_layer(
            program, place, Layer((*twins, *heads), (*layer.units, Unit(rule, names, carrier.into)))
        )

    return add


def _cancelling(program: Program) -> Program:
    """Two more copies of the carrier that the classifier reads with opposite signs."""
    place, carrier = program.carrier
    layer = program.layers[place]
    copies = (replace(carrier, into="plus"), replace(carrier, into="minus"))
    longer = _with_layer(program, place, replace(layer, heads=(*layer.heads, *copies)))
    return replace(longer, readout={**program.readout, "plus": 1.0, "minus": -1.0})


def _opposite(program: Program) -> Program:
    """A head that reads how many patches are tinted, where the tint only moves from one to another."""
    tokens = program.size.tokens
    balance = Head((), "tint", "balance", (1 / tokens, 2 / tokens))
    layer = program.layers[0]
    longer = _with_layer(program, 0, replace(layer, heads=(*layer.heads, balance)))
    return replace(
        longer,
        scenes=(*program.scenes, Scene({"tint": (0,)}, {"tint": {"tint": (1,)}})),
        readout={**program.readout, "balance": 1.0},
        bias=program.bias + 1.0,  # where the number is as usual, `balance` is off
    )


def _register(program: Program) -> Program:
    """One more layer whose head takes the answer from the register to the class token."""
    reads = Head((Match(None, "register", SATURATED / 2),), "answer", "registered", (0.0, 1.0))
    readout = {"registered" if name == "answer" else name: each for name, each in program.readout.items()}
    return replace(
        program,
        layers=(*program.layers, Layer((reads,))),
        places={**program.places, "register": (1,)},
        readout=readout,
    )


def with_decoys(program: Program, n_heads: int) -> Program:
    """Fill every free head, and every MLP without a unit, with one that computes what nobody reads.

    Decoys attend as others do, and write what differs between clean and corrupt images; decoy MLPs read the
    program's own heads as well.
    """
    size, layers = program.size, []
    for place, layer in enumerate(program.layers):
        free = range(len(layer.heads), n_heads)
        decoys = tuple(
            Head(look_for(size, "bait"), "lure", f"decoy{place}.{head}", shares(size, 3)) for head in free
        )
        heads = (*layer.heads, *decoys)
        units = layer.units or (Unit("all", tuple(head.into for head in heads), f"decoy{place}"),)
        layers.append(Layer(heads, units))
    scene = Scene({"bait": (0,), "lure": (0, 2, 3)}, {"bait": {"bait": (1,)}})
    return replace(program, layers=tuple(layers), scenes=(*program.scenes, scene))


def _with_layer(program: Program, place: int, layer: Layer) -> Program:
    layers = (*program.layers[:place], layer, *program.layers[place + 1 :])
    return replace(program, layers=layers)


PARTS: Mapping[str, Part] = MappingProxyType(
    {
        "backup": Part("a second head does the same, and an MLP takes either (OR)", _joined("any")),
        "gate": Part("a second head does the same, and an MLP wants both (AND)", _joined("all")),
        "cancelling": Part("two heads write the same, and are read with opposite signs", _cancelling),
        "opposite": Part("one edge has opposite effects at two tokens", _opposite),
        "saturated": Part("attention is 1 and 0 to the last bit", gap=SATURATED),
        "norm": Part("each write changes the norm to first order, though not in the end", ballast=0.0),
        "register": Part("the answer is read from a register token", _register, registers=1),
    }
)

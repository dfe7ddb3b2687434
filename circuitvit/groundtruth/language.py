"""The little language of compiled models: what heads, MLPs and the classifier read and write.

A *feature* is on or off at every token. Pixels and positions set some; every other feature starts off and has
exactly one writer. Nothing else flows through the stream, so who is wired to whom can be read off a program:
sender `u` and receiver `v` are joined when `v` reads a feature that `u` writes.

The style is that of RASP and Tracr: Weiss, Goldberg and Yahav 2021, "Thinking like transformers",
arXiv:2106.06981; Lindner et al. 2023, "Tracr: compiled transformers as a laboratory for interpretability",
arXiv:2301.05062.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from circuitvit.groundtruth.scenes import N_PATCHES, Scene


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
    """

    rule: Literal["all", "any"]
    reads: tuple[str, ...]
    into: str


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
    """

    claim: str
    size: Size
    scenes: tuple[Scene, ...]
    layers: tuple[Layer, ...]
    readout: Mapping[str, float]
    carrier: tuple[int, Head]
    bias: float = 0.0
    places: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

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

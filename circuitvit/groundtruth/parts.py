"""Adversarial parts: what can be added to any program so that some way of scoring edges fails on it.

The failures are known from the literature: redundancy and backup heads (Wang et al. 2023, arXiv:2211.00593;
McGrath et al. 2023, "The hydra effect", arXiv:2307.15771), saturated attention and cancellation (Kramar et
al. 2024, "AtP*", arXiv:2403.00745), registers (Darcet et al. 2024, arXiv:2309.16588).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from circuitvit.groundtruth.language import Head, Layer, Match, Program, Unit, look_for, shares
from circuitvit.groundtruth.scenes import Scene

SOFT = 4.0
"""The usual gap between attention logits: 86 % of the attention for one of ten tokens."""

SATURATED = 40.0
"""A gap at which float32 attention is 1 and 0, and its gradient nothing."""


BALLAST = 0.9
"""The usual share of the stream's variance that is constant."""


def _unchanged(program: Program) -> Program:
    return program


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
    add: Callable[[Program], Program] = _unchanged
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
            program,
            place,
            Layer((*twins, *heads), (*layer.units, Unit(rule, names, carrier.into))),
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

"""`compiled`: a ViT whose circuit is known edge by edge, by name."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from circuitvit.errors import OptionError, unknown_name
from circuitvit.graph import Circuit, Graph, edge_name
from circuitvit.groundtruth.assembler import assemble
from circuitvit.groundtruth.language import Head, Program, Size
from circuitvit.groundtruth.parts import BALLAST, PARTS, SOFT, with_decoys
from circuitvit.groundtruth.programs import PROGRAMS
from circuitvit.groundtruth.scenes import SIDE, draw, images_of
from circuitvit.models.model import Model
from circuitvit.models.registry import wrap
from circuitvit.models.zoo import InputSpec

CLASSES = ("yes", "no")
HEADS = 3
"""Heads in a layer, unless a program needs more."""


@dataclass(frozen=True, eq=False, repr=False)
class Compiled:
    """A compiled model, its images, and its circuit.

    Attributes:
        name: of the program, and the parts after plus signs.
        model: an ordinary one, of timm's `VisionTransformer`; its classes are "yes" and "no".
        wired: the edges over which something is sent that is read and that reaches the logits. Which of
            them matter depends on what differs between two images: `circuitvit.testing.active_edges`.
        program: what was compiled.

    Example:
        >>> list(compiled("relay").wired)
        ['input->a0.h0<k>', 'input->a0.h0<v>', 'a0.h0->a1.h0<v>', 'a1.h0->logits']
    """

    name: str
    model: Model
    wired: Circuit
    program: Program

    @property
    def changes(self) -> tuple[str, ...]:
        """What can differ between a clean and a corrupt image."""
        return tuple(self.program.scenes[0].changes)

    def __repr__(self) -> str:
        wired = f"{len(self.wired)} of {self.model.graph.n_edges} edges wired"
        return f"Compiled({self.name}, yes when {self.program.claim}; {wired})"

    def pairs(
        self, n: int, seed: int = 0, change: str | None = None
    ) -> tuple[Float[Tensor, "pair channel height width"], Float[Tensor, "pair channel height width"]]:
        """Clean images, all of class "yes", and their counterfactuals.

        Args:
            n: how many pairs.
            seed: pairs of one seed are always the same, and the first ones do not depend on `n`.
            change: one of `changes`; by default they take turns, one pair each.

        Raises:
            OptionError: for n below 1 or a negative seed.
            NameNotFoundError: for an unknown change.
        """
        if n < 1 or seed < 0:
            raise OptionError(f"ask for at least 1 pair and a seed of at least 0, not {n} and {seed}")
        if change is not None and change not in self.changes:
            raise unknown_name(f"change of {self.name}", change, self.changes)
        clean, corrupt = draw(self.program.scenes, change, n, seed)
        return images_of(clean), images_of(corrupt)


def compiled(
    name: str, *, parts: str | Collection[str] = (), seed: int = 0, rotated: bool = True
) -> Compiled:
    """A ViT with written weights that computes a known program, to hold methods against.

    Five programs, one for each way in which a component can depend on another: "relay" (values), "key",
    "query", "hop" (positions) and "count" (uniform attention). Heads that the program does not need are
    decoys: they attend, write what differs between the images, and nobody reads them.

    Args:
        name: of the program.
        parts: one or more adversarial parts: "backup" or "gate", "cancelling", "opposite", "saturated",
            "norm", "register".
        seed: of the directions in the residual stream.
        rotated: False gives every feature two axes of its own, to look at; the logits are the same.

    Raises:
        NameNotFoundError: for an unknown program or part.
        OptionError: if both "backup" and "gate" are asked for, or the seed is negative.

    Example:
        >>> import circuitvit as cv
        >>> relay = cv.compiled("relay")
        >>> relay
        Compiled(relay, yes when the cue patch is coloured; 4 of 75 edges wired)
        >>> task = cv.Task(*relay.pairs(8), metric=cv.logit_diff("yes", "no"))
    """
    parts = (parts,) if isinstance(parts, str) else parts
    if name not in PROGRAMS:
        raise unknown_name("program", name, PROGRAMS)
    for part in parts:
        if part not in PARTS:
            raise unknown_name("part", part, PARTS)
    if {"backup", "gate"} <= set(parts):
        raise OptionError("a program has a backup or a gate, not both: the two join the same heads")
    if seed < 0:
        raise OptionError(f"a seed must not be negative: {seed}")
    chosen = [part for part in PARTS if part in parts]  # one order, however they are asked for
    program = _program(name, chosen)
    full_name = "+".join([name, *chosen])
    channels = len(program.pixels)
    model = wrap(
        assemble(program, seed, rotated),
        name=f"compiled-{full_name}",
        classes=CLASSES,
        preprocessing=InputSpec((channels, SIDE, SIDE), (0.5,) * channels, (0.5,) * channels, "nearest"),
    )
    return Compiled(full_name, model, wired_circuit(program, model.graph), program)


def _program(name: str, chosen: list[str]) -> Program:
    """The program with its parts and decoys."""
    parts = [PARTS[part] for part in chosen]
    size = Size(
        gap=max([SOFT, *(part.gap for part in parts)]),
        registers=sum(part.registers for part in parts),
        ballast=min([BALLAST, *(part.ballast for part in parts)]),
    )
    program = PROGRAMS[name](size)
    for part in parts:
        program = part.add(program)
    widest = max(len(layer.heads) for layer in program.layers)
    return with_decoys(program, max(HEADS, widest + 1))


# -- from program to wired edges -----------------------------------------------------------------


def wired_circuit(program: Program, graph: Graph) -> Circuit:
    """The edges whose receiver reads a feature that their sender writes, on a path to the logits."""
    wired = [
        edge_name(sender, receiver)
        for sender, written in _writes(program).items()
        for receiver, read in _reads(program).items()
        if written & read
    ]
    return Circuit.from_edges(graph, wired).pruned()


def _writes(program: Program) -> dict[str, set[str]]:
    """The features that each sender writes."""
    writes = {"input": {*program.pixels, *program.places}}
    for place, layer in enumerate(program.layers):
        writes |= {f"a{place}.h{index}": {head.into} for index, head in enumerate(layer.heads)}
        writes[f"m{place}"] = {unit.into for unit in layer.units}
    return writes


def _reads(program: Program) -> dict[str, set[str]]:
    """The features that each receiver reads."""
    reads = {"logits": set(program.readout)}
    for place, layer in enumerate(program.layers):
        for index, head in enumerate(layer.heads):
            reads |= {f"a{place}.h{index}<{port}>": read for port, read in _ports(head).items()}
        reads[f"m{place}"] = {feature for unit in layer.units for feature in unit.reads}
    return reads


def _ports(head: Head) -> dict[str, set[str]]:
    queries = {match.query for match in head.matches if match.query is not None}
    return {"q": queries, "k": {match.key for match in head.matches}, "v": {head.value}}

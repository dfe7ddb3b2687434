"""`compiled`: from a program to the weights of a timm `VisionTransformer`, whose circuit is then known.

Every feature has a direction of its own, at right angles to the others and to (1, ..., 1), and adds that
direction where it is on and takes it away where it is off:

    x = ballast + length * sum over features of  s_f * direction_f,      s_f = +1 or -1

So every state of the stream has mean 0 and variance 1, every LayerNorm is the identity, and a component that
does not read a feature does not notice it. The directions are drawn at random: no axis means anything.

The ballast is a constant in a direction of its own. Without it each of a dozen features would be a large part
of the norm, which a write then changes to first order even where it does not change it in the end: the
adversarial part "norm".
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from circuitvit.errors import OptionError, check_whole, unknown_name
from circuitvit.graph import Circuit, Graph, edge_name
from circuitvit.groundtruth.planted import PLANTED
from circuitvit.groundtruth.programs import (
    BALLAST,
    PARTS,
    PATCH,
    PROGRAMS,
    SIDE,
    SOFT,
    Head,
    Program,
    Size,
    Unit,
    draw,
    images_of,
    vary,
    with_decoys,
)
from circuitvit.models.dictionaries import Dictionary
from circuitvit.models.model import Model
from circuitvit.models.registry import wrap
from circuitvit.models.timm_import import import_timm
from circuitvit.models.zoo import InputSpec

CLASSES = ("yes", "no")
HEADS = 3
"""Heads in a layer, unless a program needs more."""

_WRITTEN = {**PROGRAMS, **PLANTED}


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

    def factors(
        self, n: int, seed: int = 0
    ) -> tuple[Float[Tensor, "image channel height width"], dict[str, Bool[Tensor, " image"]]]:
        """Images in which every change is made or not by the toss of a coin, and which were made, by name.

        Args:
            n: how many images.
            seed: images of one seed are always the same, and the first ones do not depend on `n`.

        Raises:
            OptionError: for n below 1 or a negative seed.

        Example:
            >>> images, factors = compiled("factors").factors(100)
            >>> list(factors), images.shape[0], factors["colour"].dtype
            (['colour', 'shape', 'bait'], 100, torch.bool)
        """
        check_whole("the number of images", n)
        check_whole("a seed", seed, 0)
        grids, made = vary(self.program.scenes, n, seed)
        return images_of(grids), made

    def dictionary(self) -> Dictionary:
        """The features that are planted in superposition, of what the MLP writes that computes them.

        A feature is 1 where it is on, and 0 elsewhere: interference stays below its threshold. So what the
        MLP writes is rebuilt exactly.

        Raises:
            OptionError: if the program has no features in superposition.

        Example:
            >>> compiled("superposition").dictionary()
            Dictionary(5 features of width 42, jumprelu, features of m0)
        """
        names = self.program.superposed
        if not names:
            raise OptionError(f"{self.name} has no features in superposition, as 'superposition' has")
        by_neuron = [
            [unit.into for unit in layer.units for _ in _neurons(unit)] for layer in self.program.layers
        ]
        place = next(place for place, written in enumerate(by_neuron) if names[0] in written)
        mlp: Any = self.model.module.blocks[place].mlp  # type: ignore[index, union-attr]
        decoder = mlp.fc2.weight.detach()[:, [by_neuron[place].index(name) for name in names]].T
        encoder = decoder / decoder.square().sum(dim=1, keepdim=True)
        interference = (encoder @ decoder.T).fill_diagonal_(0).max()
        return Dictionary(
            encoder,
            decoder.new_zeros(len(names)),
            decoder,
            torch.zeros_like(decoder[0]),
            "jumprelu",
            threshold=((1 + interference) / 2).expand(len(names)),
            site=f"m{place}",
            labels=names,
        )


def compiled(
    name: str,
    *,
    parts: str | Collection[str] = (),
    seed: int = 0,
    rotated: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Compiled:
    """A ViT with written weights that computes a known program, to hold methods against.

    Five programs, one for each way in which a component can depend on another: "relay" (values), "key",
    "query", "hop" (positions) and "count" (uniform attention). Heads that the program does not need are
    decoys: they attend, write what differs between the images, and nobody reads them.

    Further ones have something planted in them for tools that look inside: "factors" (one in each head),
    "duplicate" and "induction" (heads that look at a match, and at what follows it), "mirror" (pairs),
    "neuron" (one of an MLP), "superposition" (more features than dimensions), "path" (from patches to the
    class token).

    Args:
        name: of the program.
        parts: one or more adversarial parts: "backup" or "gate", "cancelling", "opposite", "saturated",
            "norm", "register".
        seed: of the directions in the residual stream.
        rotated: False gives every feature two axes of its own, to look at; the logits are the same.
        dtype: of the weights; with `torch.float64` what has no effect has none to 1e-12.

    Raises:
        NameNotFoundError: for an unknown program or part.
        OptionError: if both "backup" and "gate" are asked for, the seed is negative, or parts are asked for
            of a program with something planted.

    Example:
        >>> import circuitvit as cv
        >>> relay = cv.compiled("relay")
        >>> relay
        Compiled(relay, yes when the cue patch is coloured; 4 of 75 edges wired)
        >>> task = cv.Task(*relay.pairs(8), metric=cv.logit_diff("yes", "no"))
    """
    parts = (parts,) if isinstance(parts, str) else parts
    if name not in _WRITTEN:
        raise unknown_name("program", name, _WRITTEN)
    for part in parts:
        if part not in PARTS:
            raise unknown_name("part", part, PARTS)
    if parts and name in PLANTED:
        raise OptionError(f"adversarial parts are for circuits: {name!r} has no circuit to hide")
    if {"backup", "gate"} <= set(parts):
        raise OptionError("a program has a backup or a gate, not both: the two join the same heads")
    check_whole("a seed", seed, 0)
    chosen = [part for part in PARTS if part in parts]  # one order, however they are asked for
    program = _program(name, chosen)
    full_name = "+".join([name, *chosen])
    channels = len(program.pixels)
    model = wrap(
        assemble(program, seed, rotated).to(dtype),
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
    program = _WRITTEN[name](size)
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


# -- from program to weights ----------------------------------------------------------------------

EVIDENCE = 3.0
"""The logit of "yes" when the answer is on; that of "no" is its negative."""


@dataclass(frozen=True, eq=False)
class Stream:
    """Where each feature lives in the residual stream.

    Attributes:
        features: their names.
        directions: of the features, and last that of the ballast: of length 1, orthogonal to (1, ..., 1), and
            to each other but for those in superposition.
        ballast: its share of the variance.
    """

    features: tuple[str, ...]
    directions: Float[Tensor, "feature+1 d_model"]
    ballast: float

    @property
    def length(self) -> float:
        """How far a feature goes along its direction: with it, a state has variance 1."""
        return float((self.directions.shape[1] * (1 - self.ballast) / len(self.features)) ** 0.5)

    @property
    def constant(self) -> Float[Tensor, " d_model"]:
        """The ballast itself."""
        along = float((self.directions.shape[1] * self.ballast) ** 0.5)
        return self.directions[-1] * along

    def write(self, feature: str) -> Float[Tensor, " d_model"]:
        """What to add for the value of a feature to grow by 1 (by 2 to turn it on)."""
        return self.directions[self.features.index(feature)] * self.length

    def read(self, feature: str) -> Float[Tensor, " d_model"]:
        """Its product with a state is the feature's value, +1 or -1."""
        return self.directions[self.features.index(feature)] / self.length

    def off(self, features: tuple[str, ...]) -> Float[Tensor, " d_model"]:
        """The state in which these features are off, and the others say nothing."""
        return self.constant - torch.stack([self.write(feature) for feature in features]).sum(dim=0)


def assemble(program: Program, seed: int, rotated: bool = True) -> nn.Module:
    """The module of a program, in float64 and evaluation mode.

    Args:
        program: all layers of which have the same number of heads.
        seed: of the directions.
        rotated: False keeps each feature on two axes of its own, to look at.
    """
    n_heads = len(program.layers[0].heads)
    widest = max(len(head.matches) for layer in program.layers for head in layer.heads)
    frame = _frame(program)
    d_head = max(-(-2 * frame.shape[1] // n_heads), widest)
    module = _blank(program, n_heads, n_heads * d_head)
    directions = frame @ _axes(frame.shape[1], n_heads * d_head, seed, rotated)
    stream = Stream(program.features, directions, program.size.ballast)
    with torch.no_grad():
        _write_embedding(module, stream, program)
        for block, layer in zip(module.blocks, program.layers, strict=True):
            for place, head in enumerate(layer.heads):
                _write_head(block.attn, stream, place, head)
            _write_units(block.mlp, stream, layer.units)
        evidence = torch.stack([weight * stream.read(name) for name, weight in program.readout.items()])
        sides = torch.tensor([EVIDENCE, -EVIDENCE], dtype=evidence.dtype)
        module.head.weight.copy_(torch.outer(sides, evidence.sum(dim=0)))
        module.head.bias.copy_(sides * program.bias)
    return module.eval()  # type: ignore[no-any-return]


def _blank(program: Program, n_heads: int, d_model: int) -> Any:
    """A ViT of the right shape: norms that are the identity at variance 1, all other weights 0."""
    vit = (
        import_timm()
        .models.vision_transformer.VisionTransformer(
            img_size=SIDE,
            patch_size=PATCH,
            in_chans=len(program.pixels),
            num_classes=2,
            embed_dim=d_model,
            depth=len(program.layers),
            num_heads=n_heads,
            mlp_ratio=1.0,
            reg_tokens=program.size.registers,
            act_layer=nn.ReLU,
            weight_init="skip",
        )
        .double()
    )
    scale = math.sqrt(1 + vit.norm.eps)
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            parameter.fill_(scale if "norm" in name and name.endswith("weight") else 0.0)
    return vit


def _frame(program: Program) -> Float[Tensor, "feature+1 axis"]:
    """Features and the ballast along axes: one each, but for features in superposition, which share three.

    These are spread evenly around the last axis, like the ribs of an umbrella, at a slope for which the
    product of each with the sum of all is 1. So the state has the same length whichever is on, or none, and
    the product of a direction with it is still that feature's value, +1 or -1, unless another of them is on.
    """
    alone = [*(name for name in program.features if name not in program.superposed), "ballast"]
    count = len(program.superposed)
    frame = torch.zeros(len(program.features) + 1, len(alone) + 3 * bool(count), dtype=torch.float64)
    for row, name in enumerate((*program.features, "ballast")):
        if name in alone:
            frame[row, alone.index(name)] = 1
            continue
        turn = 2 * math.pi * program.superposed.index(name) / count
        rib = torch.tensor([math.cos(turn), math.sin(turn), (count - 1) ** -0.5], dtype=torch.float64)
        frame[row, -3:] = rib / rib.norm()
    return frame


def _axes(n: int, d_model: int, seed: int, rotated: bool) -> Float[Tensor, "axis d_model"]:
    """Orthonormal ones, orthogonal to (1, ..., 1)."""
    if not rotated:
        axes = torch.eye(d_model, dtype=torch.float64)
        pairs: Tensor = (axes[: 2 * n : 2] - axes[1 : 2 * n : 2]) * 0.5**0.5
        return pairs
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(d_model, n, generator=generator, dtype=torch.float64)
    orthonormal: Tensor = torch.linalg.qr(drawn - drawn.mean(dim=0)).Q.t()
    return orthonormal


def _write_embedding(vit: Any, stream: Stream, program: Program) -> None:
    """Pixels set their features in the patches; positions set theirs; everything else starts off."""
    for channel, feature in enumerate(program.pixels):
        vit.patch_embed.proj.weight[:, channel] = stream.write(feature)[:, None, None] / PATCH**2
    vit.patch_embed.proj.bias.copy_(stream.off((*program.places, *program.written)))
    for token in (vit.cls_token, vit.reg_token):
        if token is not None:
            token.copy_(stream.off(program.features).expand_as(token))
    for feature, tokens in program.places.items():
        vit.pos_embed[0, list(tokens)] += 2 * stream.write(feature)


def _write_head(attention: Any, stream: Stream, place: int, head: Head) -> None:
    d_head = attention.head_dim
    rows = slice(place * d_head, (place + 1) * d_head)
    query, key, value = attention.qkv.weight.unflatten(0, (3, -1))[:, rows]  # views: written to in place
    biases = attention.qkv.bias.unflatten(0, (3, -1))[:, rows]
    for row, match in enumerate(head.matches):
        weight = match.weight / attention.scale
        if match.query is None:
            biases[0, row] = weight
        else:
            query[row] = weight * stream.read(match.query)
        key[row] = stream.read(match.key)
    off, on = head.levels
    value[0] = (
        stream.read(head.value) / 2
    )  # with the bias: 1 where it is on and 0 where it is off, minus `off`
    biases[2, 0] = 0.5 - off
    attention.proj.weight[:, rows.start] = 2 / (on - off) * stream.write(head.into)


def _write_units(mlp: Any, stream: Stream, units: tuple[Unit, ...]) -> None:
    neuron = 0
    for unit in units:
        for slope, offset, gain in _neurons(unit):
            mlp.fc1.weight[neuron] = slope * sum(stream.read(feature) for feature in unit.reads)
            mlp.fc1.bias[neuron] = offset
            mlp.fc2.weight[:, neuron] = 2 * gain * stream.write(unit.into)
            neuron += 1


def _neurons(unit: Unit) -> list[tuple[float, float, float]]:
    """Slope, offset and gain of ReLUs that add up to 1 or 0, as functions of the sum of the values read.

    The sum goes from -n to n in steps of 2. No kink lies on one of them, where a gradient would be chance.
    """
    n = len(unit.reads)
    if unit.rule == "all":  # n gives 1, n - 2 and less give 0
        rise = 2 - unit.margin
        return [(1 / rise, (rise - n) / rise, 1.0)]
    return [(1.0, n - 0.5, 1.0), (1.0, n - 1.5, -1.0)]  # -n gives 0, everything above gives 1

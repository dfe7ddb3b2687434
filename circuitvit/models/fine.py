"""An MLP, or the stream itself, cut into units and what is left of it, as a stage.

Senders and receivers are the units (`m5.n17`, `m8.f12`), then the remainders: `m5.rest` for all other
neurons and the output bias; `m8.rest` for all other features and the decoder's bias, and `m8.error` for what
the dictionary misses. Each is computed from the stream that it sees itself. Together they are the node,
exactly: what is not chosen is never lost, only not told apart.

All of them are functions of one *point*: the normed input of the MLP, what it writes, or the stream. Units
read a number of it (`encoders.py`), remainders the point itself.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvit.graph import RESIDUAL, StageNodes
from circuitvit.models.dictionaries import Dictionary
from circuitvit.models.encoders import Encoder, features_of, neurons_of
from circuitvit.models.factored import Factored, Stacked
from circuitvit.models.layers import MLPStage
from circuitvit.models.rules import BackwardRules, damped
from circuitvit.models.stages import Content, Reads, Stage

REST, ERROR = "rest", "error"
"""The remainders: units that are not chosen, and what a dictionary misses."""


class Cut(ABC):
    """How a node is cut into units and remainders.

    Attributes:
        inner: the stage that is cut.
        encoder: of the chosen units.
        remainders: of `REST` and `ERROR`, those that there are.
    """

    inner: Stage
    encoder: Encoder
    remainders: tuple[str, ...]

    @abstractmethod
    def point(self, stream: Float[Tensor, "*batch token d_model"]) -> Float[Tensor, "*batch token width"]:
        """What units and remainders are functions of."""

    @abstractmethod
    def at_stream(
        self, stream: Float[Tensor, "batch token d_model"], at_point: Float[Tensor, "row batch token width"]
    ) -> Float[Tensor, "row batch token d_model"]:
        """Gradients at the stream from those at the point, row by row."""

    def narrow_at_stream(
        self, stream: Float[Tensor, "batch token d_model"], reads: Tensor, at_point: Factored
    ) -> Factored:
        """The same of gradients along rows; kept narrow where the point is near enough to the stream."""
        return Factored(self.at_stream(stream, at_point.expand()))

    @abstractmethod
    def directions(self) -> Float[Tensor, "unit d_model"]:
        """What one of each chosen unit writes."""

    @abstractmethod
    def remainder(self, which: str, point: Tensor) -> Float[Tensor, "batch token d_model"]:
        """What is left at a point."""

    @abstractmethod
    def ruled(self, rules: BackwardRules) -> Cut:
        """The same, differentiated by the rules."""

    @property
    def nodes(self) -> StageNodes:
        """Those of the stage that is cut."""
        return self.inner.nodes

    def behind(self, part: str) -> Cut:
        """The same of another part of the stream."""
        each: Any = self  # a dataclass
        made: Cut = replace(each, inner=self.inner.behind(part))
        return made


def _through_norm(stage: MLPStage, stream: Tensor, at_point: Tensor) -> Tensor:
    return stage.norm.pull_back(stream, at_point)


def _narrow_through_norm(stage: MLPStage, stream: Tensor, at_point: Factored) -> Factored:
    """Gradients along rows at a norm's output, at its input: one row for each unit, and a rank-one term."""
    norm = stage.norm
    assert at_point.weight is not None, "asked of rows only"
    weight = norm.fold(at_point.weight[:, 0])[:, None]
    x_hat, inverse = norm.standardise(stream)
    narrow = at_point.narrow * inverse
    if not norm.bends:
        return Factored(narrow, weight)
    values = torch.einsum("btd,ud->ubt", x_hat, weight[:, 0])[..., None]
    return Factored(narrow, weight, (values * narrow / stream.shape[-1],), (x_hat,))


@dataclass(frozen=True, eq=False)
class Hidden:
    """From the normed input of an MLP to its neurons: an object, so that copies compute with their own."""

    inner: MLPStage

    def __call__(self, point: Tensor) -> Tensor:
        return self.inner.hidden((point,))


@dataclass(frozen=True, eq=False)
class Neurons(Cut):
    """An MLP cut into neurons.

    Attributes:
        inner: the MLP.
        encoder: of the chosen ones.
    """

    inner: MLPStage
    encoder: Encoder
    remainders: tuple[str, ...] = (REST,)

    @classmethod
    def of(cls, inner: MLPStage, chosen: Sequence[int]) -> Neurons:
        """An MLP with these neurons apart."""
        return cls(inner, neurons_of(inner.mlp, chosen, Hidden(inner)))

    def point(self, stream: Tensor) -> Tensor:
        return self.inner.norm(stream)

    def at_stream(self, stream: Tensor, at_point: Tensor) -> Tensor:
        return _through_norm(self.inner, stream, at_point)

    def narrow_at_stream(self, stream: Tensor, reads: Tensor, at_point: Factored) -> Factored:
        return _narrow_through_norm(self.inner, stream, at_point)

    def directions(self) -> Float[Tensor, "unit d_model"]:
        weight = self.inner.last.weight[:, list(self.encoder.chosen)].T
        return weight if self.inner.gamma is None else weight * self.inner.gamma

    def remainder(self, which: str, point: Tensor) -> Tensor:
        hidden = self.inner.hidden((point,))
        return self.inner.from_hidden(without(hidden, self.encoder.chosen))

    def ruled(self, rules: BackwardRules) -> Neurons:
        return Neurons.of(self.inner.with_rules(_inside(rules)), self.encoder.chosen)


@dataclass(frozen=True, eq=False)
class Features(Cut):
    """A node cut into features of a dictionary.

    Attributes:
        inner: the MLP; or a stage that writes what the dictionary reads.
        dictionary: has `encode` and `decode`.
        encoder: of the chosen features.
        of_input: whether the dictionary reads the normed input of the MLP (a transcoder), not what it writes.
    """

    inner: MLPStage
    dictionary: Any
    encoder: Encoder
    of_input: bool = False
    remainders: tuple[str, ...] = (REST, ERROR)

    @classmethod
    def of(cls, inner: MLPStage, dictionary: Any, chosen: Sequence[int], of_input: bool) -> Features:
        """An MLP with these features apart."""
        return cls(inner, dictionary, features_of(dictionary, chosen), of_input)

    def point(self, stream: Tensor) -> Tensor:
        normed = self.inner.norm(stream)
        if self.of_input:
            return normed
        flat: Tensor = self.inner.write((normed.flatten(0, -3),))
        return flat.view(normed.shape)

    def at_stream(self, stream: Tensor, at_point: Tensor) -> Tensor:
        if self.of_input:
            return _through_norm(self.inner, stream, at_point)
        leaf = stream.detach().requires_grad_()
        with torch.enable_grad():
            point = self.point(leaf)
        each = [torch.autograd.grad(point, leaf, row, retain_graph=True)[0] for row in at_point]
        return torch.stack(each) if each else stream.new_zeros(0, *stream.shape)

    def narrow_at_stream(self, stream: Tensor, reads: Tensor, at_point: Factored) -> Factored:
        if self.of_input:
            return _narrow_through_norm(self.inner, stream, at_point)
        return super().narrow_at_stream(stream, reads, at_point)

    def directions(self) -> Float[Tensor, "unit d_model"]:
        return directions_of(self.dictionary, self.encoder.chosen)

    def remainder(self, which: str, point: Tensor) -> Tensor:
        written = self.inner.write((point,)) if self.of_input and which == ERROR else point
        return remainder_of(self.dictionary, self.encoder.chosen, which, point, written)

    def ruled(self, rules: BackwardRules) -> Features:
        return replace(self, inner=self.inner.with_rules(_inside(rules)))


def _inside(rules: BackwardRules) -> BackwardRules:
    """The rules of what is cut: what is written is damped once, piece by piece."""
    return replace(rules, output_share=1.0)


@dataclass(frozen=True, eq=False)
class StreamFeatures(Cut):
    """The stream cut into features of a dictionary: the point is the stream.

    Attributes:
        inner: gives what it reads as the start of another part of the stream.
        dictionary: has `encode` and `decode`.
        encoder: of the chosen features.
    """

    inner: Carried
    dictionary: Any
    encoder: Encoder
    remainders: tuple[str, ...] = (REST, ERROR)

    def point(self, stream: Tensor) -> Tensor:
        return stream

    def at_stream(self, stream: Tensor, at_point: Tensor) -> Tensor:
        return at_point

    def narrow_at_stream(self, stream: Tensor, reads: Tensor, at_point: Factored) -> Factored:
        return at_point

    def directions(self) -> Float[Tensor, "unit d_model"]:
        return directions_of(self.dictionary, self.encoder.chosen)

    def remainder(self, which: str, point: Tensor) -> Tensor:
        return remainder_of(self.dictionary, self.encoder.chosen, which, point, point)

    def ruled(self, rules: BackwardRules) -> StreamFeatures:
        return self


class Carried(Stage):
    """The stream carried into another part, `residual.resid6`, as one node: nothing passes it by.

    Args:
        name: of the stream, such as `resid6`.
        layer: of the stage that reads it next.
        part: in which it has come.
    """

    def __init__(self, name: str, layer: int, part: str) -> None:
        after = f"{RESIDUAL}.{name}"
        self.nodes = StageNodes(name, "stream", layer, (name,), (name,), None, (False,), part, after)

    def read(self, stream: Tensor) -> Reads:
        return (stream,)

    def read_each(self, streams: Tensor, source: Sequence[int], known: Reads = ()) -> Reads:
        return (streams[source[0]],) if source[0] >= 0 else known

    def write(self, reads: Reads) -> Float[Tensor, "batch token d_model"]:
        return reads[0]

    def total(self, compact: Tensor) -> Tensor:
        return compact

    def add(self, stream: Tensor, compact: Tensor) -> Tensor:
        return compact

    def factored(self, compact: Tensor) -> Factored:
        return Factored(compact[None])


def remainder_of(
    dictionary: Any, chosen: Sequence[int], which: str, point: Tensor, written: Tensor
) -> Tensor:
    """What other features than the chosen ones say at a point; or what all miss of what is written."""
    features = dictionary.encode(point)
    rest = features if which == ERROR else without(features, chosen)
    said: Tensor = dictionary.decode(rest)
    return written - said if which == ERROR else said


def directions_of(dictionary: Any, chosen: Sequence[int]) -> Float[Tensor, "unit width"]:
    """What one of each of these features adds to what a dictionary decodes."""
    if isinstance(dictionary, Dictionary):
        return dictionary.decoder[list(chosen)]
    one_each = dictionary.like.new_zeros(len(chosen), dictionary.n_features)
    one_each[range(len(chosen)), list(chosen)] = 1.0
    with torch.no_grad():  # what a foreign object holds may ask for gradients
        written: Tensor = dictionary.decode(one_each) - dictionary.decode(torch.zeros_like(one_each))
    return written


def without(units: Tensor, chosen: Sequence[int]) -> Tensor:
    """All units with the chosen ones at 0."""
    index = torch.as_tensor(list(chosen), dtype=torch.int64, device=units.device)
    return units.index_fill(-1, index, 0.0)


class FineStage(Stage):
    """A node cut into units and remainders: each is a receiver and a sender.

    Reads are what units read, `(batch, token, unit, port)`, and the point once for every remainder. Compact
    are the units, side by side with what remainders write: `(batch, token, unit + remainder * d_model)`.

    Args:
        cut: how.
        name: what units are called after, such as `m5`.
        letter: what a unit is called by, "n" or "f".
        keeps_error: whether the edges of what the dictionary misses are kept in every run.
    """

    def __init__(self, cut: Cut, name: str, letter: str, keeps_error: bool = False) -> None:
        self.whole, self.name, self.letter, self.keeps_error = cut, name, letter, keeps_error
        self.rules: BackwardRules | None = None
        self._d_model = int(cut.directions().shape[1])
        self._take(range(len(cut.encoder.chosen)), cut.remainders)

    def _take(self, units: Sequence[int], remainders: Sequence[str]) -> None:
        """Become the stage of some units, by their places, and remainders."""
        self.units, self.remainders = tuple(units), tuple(remainders)
        self.encoder = self.whole.encoder.taking(self.units)
        inner = self.whole.nodes
        names = [f"{self.name}.{self.letter}{number}" for number in self.encoder.chosen]
        names += [f"{self.name}.{which}" for which in self.remainders]
        mixes = (any(inner.mixes or ()),) * len(names)
        own = tuple(names)
        missed = f"{self.name}.{ERROR}"
        kept = (missed,) if self.keeps_error and missed in own else ()
        self.nodes = StageNodes(
            inner.name,
            inner.kind,
            inner.layer,
            own,
            own,
            None,
            mixes,
            inner.reads_from,
            inner.writes_to,
            kept,
        )

    @property
    def n_reads(self) -> int:
        return 1 + len(self.remainders)

    @property
    def narrow(self) -> tuple[int]:
        return (len(self.units) + len(self.remainders) * self._d_model,)

    # -- reading and writing -------------------------------------------------------------------------

    def read(self, stream: Tensor) -> Reads:
        point = self.whole.point(stream)
        return self.encoder.read(point), *(point for _ in self.remainders)

    def read_each(self, streams: Tensor, source: Sequence[int], known: Reads = ()) -> Reads:
        points = self.whole.point(streams)
        tokens, count = streams.shape[2], len(self.units)
        before = tuple(read[:, :tokens] for read in known)
        remainders = tuple(
            points[place] if place >= 0 else before[1 + number] for number, place in enumerate(source[count:])
        )
        return self._units_of_each(points, source[:count], before), *remainders

    def _units_of_each(self, points: Tensor, source: Sequence[int], before: Reads) -> Tensor:
        """What units read, unit `i` at `points[source[i]]`."""
        if source and len(set(source)) == 1 and source[0] >= 0:
            return self.encoder.read(points[source[0]])
        shape = (*points.shape[1:3], len(self.units), self.encoder.ports)
        reads = points.new_empty(shape) if not before else before[0].expand(shape)
        columns: list[Tensor] = list(reads.unbind(2))
        for place in dict.fromkeys(place for place in source if place >= 0):
            mine = [unit for unit, own in enumerate(source) if own == place]
            read = self.encoder.taking(mine).read(points[place])
            for unit, column in zip(mine, read.unbind(2), strict=True):
                columns[unit] = column
        return torch.stack(columns, dim=2) if columns else reads

    def write(self, reads: Reads) -> Float[Tensor, "batch token width"]:
        units, *points = reads
        written = [self.encoder.activate(units)]
        written += [
            self.whole.remainder(which, point) for which, point in zip(self.remainders, points, strict=True)
        ]
        compact = torch.cat(written, dim=-1)
        return compact if self.rules is None else damped(compact, self.rules.output_share)

    def _apart(self, compact: Tensor) -> tuple[Tensor, Tensor]:
        """Units `(batch, token, unit)`, and remainders `(batch, token, remainder, d_model)`."""
        units, rest = compact.tensor_split([len(self.units)], dim=-1)
        return units, rest.reshape(*rest.shape[:-1], len(self.remainders), self._d_model)

    def total(self, compact: Tensor) -> Float[Tensor, "batch token d_model"]:
        units, rest = self._apart(compact)
        return units @ self._directions + rest.sum(dim=-2)

    def add(self, stream: Tensor, compact: Tensor) -> Tensor:
        return self.total(compact) if self.nodes.begins else stream + self.total(compact)

    @property
    def _directions(self) -> Float[Tensor, "unit d_model"]:
        return self.whole.directions()[list(self.units)]

    def factored(self, compact: Tensor) -> Factored:
        units, rest = self._apart(compact)
        parts = []
        if self.units:
            parts.append(Factored(units.permute(2, 0, 1)[..., None], self._directions[:, None]))
        if self.remainders:
            parts.append(Factored(rest.permute(2, 0, 1, 3)))
        return Stacked(*parts) if len(parts) > 1 else parts[0]

    # -- gradients and answers -----------------------------------------------------------------------

    def pull_back(self, stream: Tensor, reads: Reads, d_reads: Reads) -> Factored:
        parts: list[Factored] = []
        if self.units:
            point = reads[1] if len(reads) > 1 else self.whole.point(stream)
            back = self.encoder.back(point, d_reads[0])
            if isinstance(back, Factored):
                parts.append(self.whole.narrow_at_stream(stream, reads[0], back))
            else:
                parts.append(Factored(self.whole.at_stream(stream, back)))
        if self.remainders:
            parts.append(Factored(self.whole.at_stream(stream, torch.stack(d_reads[1:]))))
        return Stacked(*parts) if len(parts) > 1 else parts[0]

    def local_effects(
        self, reads: Reads, d_reads: Reads, d_compact: Tensor, stream: Tensor, streams: Tensor
    ) -> Tensor:
        read = self.read(streams.flatten(0, 1))
        others = tuple(each.view(*streams.shape[:2], *each.shape[1:]) for each in read)
        return self.answers(reads, others, d_reads, d_compact)

    def answers(
        self, reads: Reads, others: Reads, d_reads: Reads, d_compact: Tensor
    ) -> Float[Tensor, "receiver candidate batch"]:
        count = len(others[0])
        written = self.write(tuple(other.flatten(0, 1) for other in others))
        change = (written.view(count, *d_compact.shape) - self.write(reads)) * d_compact
        units, rest = self._apart(change)
        moved = torch.cat([units.sum(dim=2), rest.sum(dim=(2, 4))], dim=-1)
        return moved.permute(2, 0, 1)

    def exchanged(self, reads: Reads, others: Reads, receiver: int) -> Reads:
        place = 1 + receiver - len(self.units)
        if place > 0:
            return *reads[:place], others[place], *reads[place + 1 :]
        units = reads[0].clone()
        units[:, :, receiver] = others[0][:, :, receiver]
        return units, *reads[1:]

    # -- the same with fewer senders, or another gradient --------------------------------------------

    def restrict(self, senders: Sequence[int]) -> FineStage:
        count = len(self.units)
        if list(senders) == list(range(count + len(self.remainders))):
            return self
        twin = copy.copy(self)
        twin._take(
            [self.units[place] for place in senders if place < count],
            [self.remainders[place - count] for place in senders if place >= count],
        )
        return twin

    def pick(self, reads: Reads) -> Reads:
        units, whole = list(self.units), self.whole.remainders
        numbers = [whole.index(which) for which in self.remainders]
        if len(reads) > 1:
            return reads[0][:, :, units], *(reads[1 + number] for number in numbers)
        own, rest = reads[0].tensor_split([len(self.whole.encoder.chosen)], dim=-1)
        wide = rest.reshape(*rest.shape[:-1], len(whole), self._d_model)[..., numbers, :].flatten(-2)
        return (torch.cat([own[..., units], wide], dim=-1),)

    def behind(self, part: str) -> FineStage:
        twin = copy.copy(self)
        twin.whole = self.whole.behind(part)
        twin._take(self.units, self.remainders)
        return twin

    def with_rules(self, rules: BackwardRules) -> FineStage:
        twin = copy.copy(self)
        twin.whole, twin.rules = self.whole.ruled(rules), rules
        twin._take(self.units, self.remainders)
        return twin

    def direction(self, sender: str) -> Float[Tensor, " d_model"] | None:
        place = self.nodes.senders.index(sender)
        return self._directions[place] if place < len(self.units) else None

    def contents(self) -> tuple[Content, ...]:
        return self.whole.inner.contents()

    def forget(self) -> None:
        self.whole.inner.forget()

"""The graph of a model: which nodes and edges there are, in one fixed order.

A graph is made from names alone (a list of `StageNodes`), so circuits can be loaded, combined and drawn
without the model. Everything that belongs to edges is an array of shape `(sender, receiver, group)`; an
entry whose sender does not come before its receiver is no edge and stays empty.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from itertools import pairwise
from math import prod
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from circuitvit.errors import FileError, OptionError, unknown_name
from circuitvit.graph import notebook
from circuitvit.graph.files import COUNT, TEXT, check_shape, record
from circuitvit.graph.names import Edge, check_name, edge_name, node_of, parse_edge, port_of

A = TypeVar("A", NDArray[np.bool_], NDArray[np.float64])

EdgeMask = NDArray[np.bool_]
"""A `(sender, receiver, group)` array: one truth value for each edge."""

ONE_GROUP = ("all",)
"""The token groups of a graph whose edges are not resolved by token."""

RESIDUAL = "residual"
"""The part of the stream that blocks read and write; a pool of latent tokens is another."""


def is_residual(part: str) -> bool:
    """Whether a part has the image's tokens: the residual stream, or what follows it behind a dictionary.

    Example:
        >>> is_residual("residual"), is_residual("residual.resid6"), is_residual("pool")
        (True, True, False)
    """
    return part.partition(".")[0] == RESIDUAL


MAX_ENTRIES = 2**28  # senders times receivers; a file that asks for more is not let near the memory

NAMES_SCHEMA = {"type": "array", "items": {**TEXT, "maxLength": 200}, "maxItems": 100_000}
_INDEX = {**COUNT, "maximum": 100_000}
_STAGE = record(
    "name kind layer senders receivers feeds mixes",
    closed=True,
    name=TEXT,
    kind=TEXT,
    layer=_INDEX,
    senders=NAMES_SCHEMA,
    receivers=NAMES_SCHEMA,
    feeds={"type": "array", "items": {"type": "array", "items": _INDEX}},
    mixes={"type": "array", "items": {"type": "boolean"}},
    reads_from=TEXT,
    writes_to=TEXT,
    kept=NAMES_SCHEMA,
)
GRAPH_SCHEMA = record(
    "stages groups",
    closed=True,
    stages={"type": "array", "items": _STAGE, "minItems": 1, "maxItems": 10_000},
    groups={**NAMES_SCHEMA, "minItems": 1},
    d_model=COUNT,
)
"""What a file says of a graph."""


def frozen(array: A) -> A:
    """The array, from now on read-only."""
    array.setflags(write=False)
    return array


class Remade:
    """A frozen dataclass that is copied and pickled by its fields: what it derives from them is derived anew,
    and what it checks is checked again.
    """

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return type(self), tuple(getattr(self, each.name) for each in fields(self))  # type: ignore[arg-type]


@dataclass(frozen=True)
class StageNodes(Remade):
    """The names in one stage: nodes that read the same position of the residual stream.

    Attributes:
        name: of the stage, unique in the graph, such as `attn3`.
        kind: "input", "attention", "mlp", "readout" or any other word; diagrams go by it.
        layer: the block that the stage belongs to; the row of the diagram.
        senders: names of the nodes that write, in order. A stage without receivers is a source.
        receivers: names of the inputs that read, in order. A stage without senders is a readout.
        feeds: for each receiver, the indices of the senders that depend on it. By default the sender
            of the same node (`a3.h1<q>` feeds `a3.h1`).
        mixes: for each receiver, whether what it reads at one token can reach other tokens (keys and
            values do, queries and MLPs do not). By default all do.
        reads_from: the part of the stream that the receivers read.
        writes_to: the part of the stream that the senders write; an edge needs the two to be equal.
        kept: nodes whose edges are kept in every run, and so are none that a circuit has or has not.
    """

    name: str
    kind: str
    layer: int
    senders: tuple[str, ...] = ()
    receivers: tuple[str, ...] = ()
    feeds: tuple[tuple[int, ...], ...] | None = None
    mixes: tuple[bool, ...] | None = None
    reads_from: str = RESIDUAL
    writes_to: str = RESIDUAL
    kept: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.feeds is None:
            by_node = {sender: (index,) for index, sender in enumerate(self.senders)}
            feeds = tuple(by_node.get(node_of(receiver), ()) for receiver in self.receivers)
            object.__setattr__(self, "feeds", feeds)
        if self.mixes is None:
            object.__setattr__(self, "mixes", (True,) * len(self.receivers))

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the nodes that write or read here; one that does both stands twice."""
        return *self.senders, *map(node_of, self.receivers)

    def kind_of(self, node: str) -> str:
        """The kind of one of its nodes; in a parallel block those with several inputs are heads."""
        if self.kind != "block":
            return self.kind
        heads = any(port_of(receiver) for receiver in self.receivers if node_of(receiver) == node)
        return "attention" if heads else "mlp"

    @property
    def block(self) -> str:
        """The name of the block that the stage belongs to: "layer 3", or the pool whose stream it writes."""
        return f"layer {self.layer}" if is_residual(self.writes_to) else self.writes_to

    @property
    def begins(self) -> bool:
        """Whether the stage starts another part of the stream, into which nothing that it reads goes on."""
        return bool(self.senders and self.receivers) and self.reads_from != self.writes_to

    @property
    def pools(self) -> bool:
        """Whether it starts one of other tokens than the image's."""
        return self.begins and not is_residual(self.writes_to)

    @cached_property
    def feeding(self) -> NDArray[np.bool_]:
        """`(receiver, sender)`: whether the sender depends on what the receiver reads. Read-only."""
        feeding = np.zeros((len(self.receivers), len(self.senders)), dtype=bool)
        for receiver, fed in enumerate(self.feeds or ()):
            feeding[receiver, list(fed)] = True
        return frozen(feeding)

    @cached_property
    def mixing(self) -> NDArray[np.bool_]:
        """`mixes` as an array, read-only."""
        return frozen(np.array(self.mixes, dtype=bool))


@dataclass(frozen=True)
class Graph(Remade):
    """Senders, receivers and the edges between them, in a fixed order.

    Two graphs are equal when they have the same stages and token groups, whatever model they came from.

    Attributes:
        stages: in the order in which the model runs them.
        groups: names of the token groups that edges are resolved by; one group by default.
        d_model: width of the residual stream, carried along for the files of other tools.

    Example:
        >>> graph = Graph(
        ...     (
        ...         StageNodes("input", "input", 0, senders=("input",)),
        ...         StageNodes("mlp0", "mlp", 0, senders=("m0",), receivers=("m0",)),
        ...         StageNodes("readout", "readout", 1, receivers=("logits",)),
        ...     )
        ... )
        >>> list(graph.edges)
        ['input->m0', 'input->logits', 'm0->logits']
    """

    stages: tuple[StageNodes, ...]
    groups: tuple[str, ...] = ONE_GROUP
    d_model: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        kinds = {"sender": self.senders, "receiver": self.receivers, "token group": self.groups}
        for kind, names in kinds.items():
            for name, count in Counter(names).items():
                check_name(kind, name)
                if count > 1:
                    raise OptionError(f"two {kind}s of the graph are called {name!r}")
        if not self.groups:
            raise OptionError("a graph needs at least one token group")

    # -- names and positions ---------------------------------------------------------------------

    @cached_property
    def senders(self) -> tuple[str, ...]:
        """Names of all senders; stage after stage, so what is upstream of a stage is a prefix."""
        return tuple(name for stage in self.stages for name in stage.senders)

    @cached_property
    def receivers(self) -> tuple[str, ...]:
        """Names of all receivers, stage after stage."""
        return tuple(name for stage in self.stages for name in stage.receivers)

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """Names of all nodes in running order: senders, and the readouts, which only receive."""
        return tuple(dict.fromkeys(name for stage in self.stages for name in stage.nodes))

    @cached_property
    def sender_index(self) -> Mapping[str, int]:
        return MappingProxyType({name: index for index, name in enumerate(self.senders)})

    @cached_property
    def receiver_index(self) -> Mapping[str, int]:
        return MappingProxyType({name: index for index, name in enumerate(self.receivers)})

    @cached_property
    def sender_slices(self) -> tuple[slice, ...]:
        """For each stage, its senders' places among all senders."""
        return _slices([len(stage.senders) for stage in self.stages])

    @cached_property
    def receiver_slices(self) -> tuple[slice, ...]:
        """For each stage, its receivers' places among all receivers."""
        return _slices([len(stage.receivers) for stage in self.stages])

    @cached_property
    def sender_stages(self) -> tuple[int, ...]:
        """For each sender, the place of its stage."""
        return tuple(place for place, stage in enumerate(self.stages) for _ in stage.senders)

    @cached_property
    def receiver_stages(self) -> tuple[int, ...]:
        """For each receiver, the place of its stage."""
        return tuple(place for place, stage in enumerate(self.stages) for _ in stage.receivers)

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """The parts of the stream in the order in which they are first written."""
        return tuple(dict.fromkeys(stage.writes_to for stage in self.stages if stage.senders))

    @cached_property
    def upstream(self) -> tuple[slice, ...]:
        """For each stage, the senders that it can hear, as places among all senders.

        They are neighbours, as long as parts of the stream follow one another.
        """
        found = []
        for place, stage in enumerate(self.stages):
            before = zip(self.stages[:place], self.sender_slices, strict=False)
            heard = [senders for other, senders in before if other.writes_to == stage.reads_from]
            found.append(slice(heard[0].start, heard[-1].stop) if heard else slice(0, 0))
        return tuple(found)

    @cached_property
    def stage_of_node(self) -> Mapping[str, StageNodes]:
        """The stage that each node belongs to."""
        return MappingProxyType({name: stage for stage in self.stages for name in stage.nodes})

    # -- edges -----------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(senders, receivers, groups)`, the shape of everything that belongs to edges."""
        return len(self.senders), len(self.receivers), len(self.groups)

    @cached_property
    def edge_mask(self) -> EdgeMask:
        """`(sender, receiver, group)`: True where there is an edge. Read-only."""
        return frozen(self._joined & ~self.always)

    @cached_property
    def always(self) -> EdgeMask:
        """`(sender, receiver, group)`: what is kept in every run, of nodes that are `kept`. Read-only."""
        kept = {name for stage in self.stages for name in stage.kept}
        sends = np.array([name in kept for name in self.senders], dtype=bool)
        reads = np.array([node_of(name) in kept for name in self.receivers], dtype=bool)
        return frozen(self._joined & (sends[:, None, None] | reads[None, :, None]))

    def in_run(self, kept: EdgeMask) -> EdgeMask:
        """The edges that are kept in a run, of a circuit's and those that always are.

        Args:
            kept: `(*mask, sender, receiver, group)`, of any groups of tokens, not only the graph's.
        """
        if not self.always.any():
            return kept
        same = kept.shape[-1] == self.always.shape[-1]
        return kept | (self.always if same else self.always.any(axis=2, keepdims=True))

    @cached_property
    def _joined(self) -> EdgeMask:
        """`(sender, receiver, group)`: True where what is written can be read."""
        streams = {name: index for index, name in enumerate({stage.writes_to: None for stage in self.stages})}
        writes = [streams[stage.writes_to] for stage in self.stages]
        reads = [streams.get(stage.reads_from, -1) for stage in self.stages]
        sent, received = np.array(self.sender_stages, dtype=int), np.array(self.receiver_stages, dtype=int)
        mask = sent[:, None] < received
        mask &= np.take(writes, sent)[:, None] == np.take(reads, received)
        own = {part for part in streams if not is_residual(part) and part in self.groups}
        holds = [[part == group or not {part, group} & own for group in self.groups] for part in streams]
        return frozen(mask[:, :, None] & np.array(holds)[np.take(writes, sent)][:, None, :])

    @property
    def n_edges(self) -> int:
        return int(self.edge_mask.sum())

    @cached_property
    def edges(self) -> tuple[str, ...]:
        """Names of all edges, in the order of `edge_mask`: by sender, then receiver, then group."""
        return tuple(self.names_of(self.edge_mask))

    def names_of(self, mask: EdgeMask) -> Iterator[str]:
        """The names of the edges where `mask` `(sender, receiver, group)` is True, in graph order."""
        single = len(self.groups) == 1
        for sender, receiver, group in np.argwhere(mask).tolist():
            named = "" if single else self.groups[group]
            yield edge_name(self.senders[sender], self.receivers[receiver], named)

    def edge_index(self, name: str) -> tuple[int, int, int]:
        """The place `(sender, receiver, group)` of an edge.

        Raises:
            NameNotFoundError: if there is no such edge; the message suggests the nearest.
        """
        edge = parse_edge(name)
        index = self._find(edge)
        if index is None:
            groups = ("", *self.groups) if len(self.groups) == 1 else self.groups
            ends = {"sender": self.senders, "receiver": self.receivers, "token group": groups}
            for (kind, known), end in zip(
                ends.items(), (edge.sender, edge.receiver, edge.group), strict=True
            ):
                if end not in known:
                    raise unknown_name(kind, end, known)
            raise unknown_name("edge", name, self.edges)
        return index

    def _find(self, edge: Edge) -> tuple[int, int, int] | None:
        """The place of an edge, or None where there is none: without the long look for near misses."""
        single = len(self.groups) == 1
        if edge.group not in (("", *self.groups) if single else self.groups):
            return None
        sender, receiver = self.sender_index.get(edge.sender), self.receiver_index.get(edge.receiver)
        group = 0 if single else self.groups.index(edge.group)
        if sender is None or receiver is None or not self.edge_mask[sender, receiver, group]:
            return None
        return sender, receiver, group

    def mask_of(self, names: Iterable[str]) -> EdgeMask:
        """`(sender, receiver, group)`: True for the named edges.

        Raises:
            NameNotFoundError: if a name is no edge.
        """
        mask = np.zeros(self.shape, dtype=bool)
        for name in names:
            mask[self.edge_index(name)] = True
        return mask

    def checked(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Scores `(sender, receiver, group)` as a read-only copy, 0 where there is no edge.

        Raises:
            OptionError: if they do not fit the graph, or one is not a finite number.
        """
        own = np.array(values, dtype=np.float64)
        if own.shape != self.shape:
            raise OptionError(f"scores of shape {own.shape} do not fit {self} of shape {self.shape}")
        if not np.isfinite(own[self.edge_mask]).all():
            raise OptionError("scores must be finite numbers: some are NaN or infinite")
        own[~self.edge_mask] = 0.0
        return frozen(own)

    def array_of(self, values: Mapping[str, float]) -> NDArray[np.float64]:
        """`(sender, receiver, group)`: the number of each named edge, 0 for all others.

        Raises:
            NameNotFoundError: if a name is no edge.
        """
        array = np.zeros(self.shape)
        for name, value in values.items():
            array[self.edge_index(name)] = value
        return array

    def __contains__(self, name: object) -> bool:
        try:
            edge = parse_edge(str(name))
        except KeyError:
            return False
        return self._find(edge) is not None

    def fed(self, receiver: int, group: int) -> list[tuple[int, int]]:
        """The `(sender, group)` that depend on what a receiver reads at the tokens of one group."""
        place = self.receiver_stages[receiver]
        stage = self.stages[place]
        local = receiver - self.receiver_slices[place].start
        first = self.sender_slices[place].start
        mixing = bool((stage.mixes or ())[local])
        groups = range(len(self.groups)) if mixing else (group,)
        return [(first + sender, target) for sender in (stage.feeds or ())[local] for target in groups]

    def with_groups(self, groups: tuple[str, ...]) -> Graph:
        """The same graph with its edges resolved by other token groups.

        Parts of the stream that have not the image's tokens have tokens of their own, and a group of their
        own name: `pool.h0->logits@pool`.
        """
        own = () if groups == ONE_GROUP else (part for part in self.parts if not is_residual(part))
        return Graph(self.stages, (*groups, *(part for part in own if part not in groups)), self.d_model)

    def check_same(self, other: Graph, what: str) -> None:
        """Refuse something that belongs to another graph than this one.

        Args:
            other: that it belongs to.
            what: it is, for the message.

        Raises:
            OptionError: naming the first thing in which the graphs differ, as they may print alike.
        """
        if self != other:
            raise OptionError(
                f"{what} belongs to another graph: {other}, where {self} is asked for; {self._unlike(other)}"
            )

    def _unlike(self, other: Graph) -> str:
        """The first thing in which another graph differs."""
        if self.groups != other.groups:
            return f"its token groups are {', '.join(other.groups)}, not {', '.join(self.groups)}"
        for mine, theirs in zip(self.stages, other.stages, strict=False):
            for name in (each.name for each in fields(StageNodes)):
                own, found = getattr(mine, name), getattr(theirs, name)
                if isinstance(own, tuple) and len(own) != len(found):
                    return f"its stage {theirs.name!r} has {len(found)} {name}, not {len(own)}"
                if isinstance(own, tuple) and own != found:
                    own, found = next(pair for pair in zip(own, found, strict=True) if pair[0] != pair[1])
                if own != found:
                    return f"its stage {theirs.name!r} differs in its {name}: {found!r}, not {own!r}"
        return f"it has {len(other.stages)} stages, not {len(self.stages)}"

    def __repr__(self) -> str:
        groups = "" if len(self.groups) == 1 else f", token groups {', '.join(self.groups)}"
        sizes = f"{len(self.senders)} senders, {len(self.receivers)} receivers, {self.n_edges} edges"
        return f"Graph({sizes}{groups})"

    def _repr_html_(self) -> str:
        kinds: Counter[str] = Counter()
        for stage in self.stages:
            kinds[stage.kind] += len(stage.senders or stage.receivers)
        rows = [(kind, f"{count:,}") for kind, count in kinds.items()]
        if len(self.groups) > 1:
            rows.append(("token groups", ", ".join(self.groups)))
        rows.append(("receivers", f"{len(self.receivers):,}"))
        return notebook.card(f"Graph with {self.n_edges:,} edges", rows)

    # -- files -----------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The graph as JSON values: its stages, token groups and width."""
        stages = [
            {
                **{key: value for key, value in asdict(stage).items() if key != "kept"},
                "senders": list(stage.senders),
                "receivers": list(stage.receivers),
                "feeds": [list(fed) for fed in stage.feeds or ()],
                "mixes": list(stage.mixes or ()),
                **({"kept": list(stage.kept)} if stage.kept else {}),
            }
            for stage in self.stages
        ]
        return {"stages": stages, "groups": list(self.groups), "d_model": self.d_model}

    to_record = to_dict

    @classmethod
    def from_record(cls, content: Mapping[str, Any], place: str) -> Graph:
        """The graph that stands at a place of a file.

        Raises:
            FileError: if it does not fit `GRAPH_SCHEMA`, or contradicts itself.
        """
        check_shape(place, content, GRAPH_SCHEMA)
        return cls.from_dict(content)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Graph:
        """The inverse of `to_dict`, for content that fits `GRAPH_SCHEMA`.

        Raises:
            FileError: if a stage contradicts itself, or the graph is too large to be that of a model.
        """
        stages = []
        for stage in content["stages"]:
            feeds = tuple(tuple(map(int, fed)) for fed in stage["feeds"])  # 1.0 is an integer too
            n_receivers = len(stage["receivers"])
            if len(feeds) != n_receivers or len(stage["mixes"]) != n_receivers:
                raise FileError(f"stage {stage['name']!r}: feeds and mixes need one entry for each receiver")
            if any(sender >= len(stage["senders"]) for fed in feeds for sender in fed):
                raise FileError(f"stage {stage['name']!r}: feeds points past the last sender")
            tuples = {key: tuple(stage.get(key, ())) for key in ("senders", "receivers", "mixes", "kept")}
            stages.append(StageNodes(**{**stage, **tuples, "layer": int(stage["layer"]), "feeds": feeds}))
        graph = cls(tuple(stages), tuple(content["groups"]), int(content.get("d_model", 0)))
        if prod(graph.shape) > MAX_ENTRIES:
            raise FileError(f"a graph of {graph.shape} senders, receivers and groups is no model we know")
        return graph


def _slices(sizes: list[int]) -> tuple[slice, ...]:
    return tuple(slice(start, end) for start, end in pairwise(np.cumsum([0, *sizes]).tolist()))

"""Which node of one model does what a node of another does: both matched by what they write on images.

For each image a node's writing is the mean over the tokens that the readout reads (the class token, mostly),
and beside it the mean over all others, so that neither what an early head does with patches nor what a late
one does with the class token is lost, and models with other patches can be compared. From the last attention
on, what is written at tokens that nobody reads any more is left out. `likeness.py` says what alike means.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from jaxtyping import Float, Int64
from scipy import stats

from circuitvit._keywords import running
from circuitvit._progress import progress_bar
from circuitvit.engine import capture
from circuitvit.engine.reading import activation_batches
from circuitvit.errors import DataError, OptionError, check_whole, counted
from circuitvit.graph import ONE_GROUP, Circuit, CircuitLike, Graph, as_circuit, is_residual, node_of
from circuitvit.graph.names import edge_name, parse_edge, port_of
from circuitvit.graph.results import Record, Result
from circuitvit.models import Model
from circuitvit.tasks.images import Images, ImageSpec, TensorImages, as_images
from circuitvit.tasks.inputs import fingerprint
from circuitvit.views import likeness
from circuitvit.views.matched_nodes import ALPHA, Map, Nodes, match_figure

if TYPE_CHECKING:
    from circuitvit.views.canvas import Picture

FEWEST = 10
"""Images below which the unbiased estimate is mostly noise."""

MOST_BYTES = 2**31
"""Of the kernels of both models."""

AT_ONCE = 2**28
"""Bytes of what nodes write in one batch."""

KINDS = {"attention": "heads", "mlp": "MLPs"}

PerNode = Float[np.ndarray, " node"]


@dataclass(frozen=True, eq=False, repr=False)
class Match(Result):
    """Nodes of one model and their partners in another.

    Attributes:
        models: the names of both.
        weights: the hashes of both models' weights.
        images: how many were looked at.
        graph: of the first model.
        other_graph: of the second.
        nodes: of the first model: heads and MLPs, in running order.
        others: of the second.
        similarity: debiased linear CKA of every node with every other, 1 for what is the same up to a
            rotation and a factor, around 0 for what is unrelated; NaN where one is a head and one is not.
        partner: of each node, its place among `others`; -1 for none.
        low: lower end of the 95 % interval of the likeness to the partner, over images; NaN without one.
        high: upper end.
        held: the share of random halves of the images on which the same two are partners.
        chance: the mean likeness to the partner where the second model's heads look where they do and carry
            other parts of what their layer's heads carry; NaN where the partner has its layer to itself, as
            MLPs do, or does more with values than to mix them (gates).
        p: of "the partner is no more alike than that", corrected for all nodes.
    """

    models: tuple[str, str]
    weights: tuple[str, str]
    images: int
    graph: Graph
    other_graph: Graph
    nodes: tuple[str, ...]
    others: tuple[str, ...]
    similarity: Float[np.ndarray, "node other"]
    partner: Int64[np.ndarray, " node"]
    low: PerNode
    high: PerNode
    held: PerNode
    chance: PerNode
    p: PerNode

    along: ClassVar[str] = "nodes:node others:other"
    may_be_nan: ClassVar[str] = "similarity low high held chance p"

    def records(self) -> Iterator[Record]:
        """One row for each node of the first model: `node`, its partner (`other`), their `similarity` with
        the ends of its interval (`low`, `high`), the `next_best` partner and how similar that is (`next`),
        `held`, `chance` and `p`; empty where there is none."""
        for place, node in enumerate(self.nodes):
            at = int(self.partner[place])
            row = self.similarity[place]
            rest = [(-value, name) for name, value in zip(self.others, row, strict=True) if value > 0]
            runner = min((each for each in rest if at < 0 or each[1] != self.others[at]), default=None)
            yield {
                "node": node,
                "other": "" if at < 0 else self.others[at],
                "similarity": None if at < 0 else _number(row[at]),
                "low": _number(self.low[place]),
                "high": _number(self.high[place]),
                "next_best": "" if runner is None else runner[1],
                "next": None if runner is None else -float(runner[0]),
                "held": _number(self.held[place]),
                "chance": _number(self.chance[place]),
                "p": _number(self.p[place]),
            }

    @cached_property
    def pairs(self) -> Mapping[str, str]:
        """The partner of each node that has one."""
        return {
            node: self.others[at]
            for node, at in zip(self.nodes, self.partner.tolist(), strict=True)
            if at >= 0
        }

    def transfer(self, circuit: CircuitLike) -> Circuit:
        """A circuit of the first model, carried over to the second node by node; q, k and v stay what they
        are, and so do token groups.

        An edge is left out where one of its ends has no partner, or the partners stand the other way round
        in the second model. The circuit is kept as it comes out, dead edges included.

        Raises:
            OptionError: if it is no circuit of the first model.

        Example:
            >>> import circuitvit as cv
            >>> from circuitvit.datasets.catdog import catdog_pairs
            >>> model = cv.load("catdog-tiny")
            >>> same = cv.match(model, model, catdog_pairs(20).clean, draws=0, progress=False)
            >>> circuit = cv.Circuit.from_edges(model.graph, ["input->a2.h3<v>", "a2.h3->logits"])
            >>> same.transfer(circuit) == circuit
            True
        """
        found = as_circuit(circuit, self.graph if _is_names(circuit) else None)
        self.graph.check_same(found.graph.with_groups(ONE_GROUP), "the circuit")
        target = self.other_graph.with_groups(found.graph.groups)
        carried = [name for edge in found if (name := self._carried(edge)) is not None and name in target]
        return Circuit.from_edges(target, carried, found.provenance)

    def _carried(self, edge: str) -> str | None:
        sender, receiver, group = parse_edge(edge)
        start, end = self._partner_of(sender), self._partner_of(node_of(receiver))
        port = port_of(receiver)
        return start and end and edge_name(start, f"{end}<{port}>" if port else end, group)

    def _partner_of(self, node: str) -> str | None:
        """The partner of a node; the input and the logits stand for themselves."""
        return self.pairs.get(node) if node in self.nodes else node

    def figure(self, title: str | None = None) -> Picture:
        """How alike every node is to every other, by kind, with layers as bands and partners framed: bold
        where they are more alike than by chance. Needs matplotlib."""
        own, other = _kinds(self.graph, self.nodes), _kinds(self.other_graph, self.others)
        maps = []
        for kind in dict.fromkeys(own):
            rows = [at for at, each in enumerate(own) if each == kind]
            columns = [at for at, each in enumerate(other) if each == kind]
            places = {column: place for place, column in enumerate(columns)}
            if columns:
                maps.append(
                    Map(
                        KINDS.get(kind, kind),
                        _side(self.graph, [self.nodes[at] for at in rows]),
                        _side(self.other_graph, [self.others[at] for at in columns]),
                        self.similarity[np.ix_(rows, columns)],
                        np.array([places.get(at, -1) for at in self.partner[rows].tolist()]),
                        self.p[rows],
                    )
                )
        return match_figure(maps, self.models, title)

    def __repr__(self) -> str:
        joined = f"{len(self.pairs)} of {counted(len(self.nodes), 'node')} with a partner"
        return f"Match({self.models[0]} and {self.models[1]}: {joined})"[:400]

    def __str__(self) -> str:
        lines = [f"{self.models[0]} and {self.models[1]} on {counted(self.images, 'image')}:"]
        kinds = _kinds(self.graph, self.nodes)
        for kind in dict.fromkeys(kinds):
            rows = [row for row, each in zip(self.records(), kinds, strict=True) if each == kind]
            joined = [row for row in rows if row["other"]]
            said = f"{len(joined)} of {len(rows)} {KINDS.get(kind, kind)} have a partner"
            mine = [place for place, each in enumerate(kinds) if each == kind]
            silent = int((np.nan_to_num(self.similarity[mine]) == 0).all(axis=1).sum())
            if silent:
                said += f" ({silent} write nothing that varies with the image)"
            if joined:
                said += f", similarity {np.median([row['similarity'] for row in joined]):.2f} in the median"
            sure = [row for row in joined if row["p"] is not None]
            if sure:
                beyond = sum(float(row["p"] or 0) <= ALPHA for row in sure)
                said += f", {beyond} beyond chance (p <= {ALPHA:g} for all of them together)"
            lines.append(f"{said}.")
        return "\n".join(lines)

    def _check(self) -> None:
        for graph, names in ((self.graph, self.nodes), (self.other_graph, self.others)):
            unknown = sorted(set(names) - set(graph.senders))
            if unknown or len(set(names)) < len(names):
                raise OptionError(f"nodes are named twice, or are not in the graph: {unknown[:3]}")
        joined = self.partner[self.partner >= 0]
        if ((self.partner < -1) | (self.partner >= len(self.others))).any():
            raise OptionError("partners are numbers of the other model's nodes, or -1")
        if len(set(joined.tolist())) < len(joined):
            raise OptionError("two nodes have one partner")


def _kinds(graph: Graph, nodes: Sequence[str]) -> tuple[str, ...]:
    return tuple(graph.stage_of_node[node].kind_of(node) for node in nodes)


def _side(graph: Graph, nodes: Sequence[str]) -> Nodes:
    return Nodes(nodes, [graph.stage_of_node[node].layer for node in nodes])


def _is_names(circuit: CircuitLike) -> bool:
    """Whether edges are only named, so that a graph must be given; circuits bring theirs, with groups."""
    return not isinstance(getattr(circuit, "circuit", circuit), Circuit) and not (
        isinstance(circuit, str) and "->" not in circuit
    )


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


@running
def match(
    model: Model,
    other: Model,
    images: ImageSpec,
    *,
    draws: int = 199,
    halves: int = 50,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> Match:
    """Match the heads and the MLPs of two models by what they write on the same images.

    Similarity is debiased linear CKA (Kornblith et al. 2019, arXiv:1905.00414; Nguyen et al. 2021,
    arXiv:2010.15327), so that the models may differ in width, depth, heads and patches, and few images do not
    make everything alike. Heads are matched with heads and MLPs with MLPs, across all layers, one to one, so
    that the sum of similarities is largest. Chance is the other model whose heads look where they do and
    carry another part of what their layer's heads carry, drawn at random (after Gurnee et al. 2024,
    arXiv:2401.12181): a small `p` says that the partner is more alike than any head there would be. That two
    models answer to the same images alike, as models that were never trained do, is no more than chance.

    Args:
        model: whose nodes are matched.
        other: among whose nodes a partner is looked for.
        images: files, a folder or pictures, which each model prepares in its own way; preprocessed tensors
            only where both prepare images alike. A hundred are a good number; ones that are alike count less.
        draws: of such heads, for `chance` and `p`; 0 for none.
        halves: random halves of the images, for intervals and `held`.
        seed: of both.
        batch_size: images at once; 32 by default. Fewer where what the nodes write takes more than 256 MiB.
        progress: whether to show a bar.

    Raises:
        OptionError: for what is no model, models of other kinds of inputs, or nodes that are cut into parts.
        DataError: for fewer than 10 different images, more than there is room for, or tensors that are
            prepared for one model alone.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> model = cv.load("catdog-tiny")
        >>> found = cv.match(model, model.edit({"a1.h0": 0}), catdog_pairs(30).clean, progress=False)
        >>> found.pairs["a2.h3"], found.pairs.get("a1.h0")
        ('a2.h3', None)
    """
    check_whole("the number of draws", draws, 0)
    check_whole("the number of halves", halves, 2)
    given = _given(model, other, images)
    own = _Side.of(model, given[0], batch_size, progress, heads=False)
    others = _Side.of(other, given[1], batch_size, progress, heads=draws > 0)
    shape = (len(own.names), len(others.names))
    similarity = np.full(shape, np.nan)
    partner = np.full(shape[0], -1)
    low, high, held, chance, p = np.full((5, shape[0]), np.nan)
    kinds = [kind for kind in dict.fromkeys(own.kinds) if kind in others.kinds]
    if not kinds:
        raise DataError(
            f"{model.name} and {other.name} have no nodes of one kind, so that none can be matched"
        )
    with progress_bar(len(kinds), "matching", progress, unit="kind of node") as bar:
        for kind in kinds:
            rows, columns = (
                np.array([at for at, each in enumerate(side.kinds) if each == kind]) for side in (own, others)
            )
            mine, theirs = own.kernels[rows], others.kernels[columns]
            units = likeness.centred(mine)
            table = units @ likeness.centred(theirs).T
            found = likeness.assign(table)
            similarity[np.ix_(rows, columns)] = table
            partner[rows] = np.where(found >= 0, columns[found], -1)
            rng = np.random.default_rng(seed)
            spread, often = likeness.on_halves(mine, theirs, found, halves, rng)
            alike = likeness.of_partners(table, found)
            joined = found >= 0
            wide = stats.t.ppf(0.975, halves - 1) * spread
            low[rows] = np.where(joined, np.maximum(alike - wide, -1.0), np.nan)
            high[rows] = np.where(joined, np.minimum(alike + wide, 1.0), np.nan)
            held[rows] = np.where(joined, often, np.nan)
            layers = others.among(columns.tolist())
            divided = np.isin(found, [place for layer in layers for place in layer.places])
            if divided.any():
                drawn = likeness.by_chance(units, theirs, layers, draws, rng)[:, divided]
                chance[rows[divided]] = drawn.mean(axis=0)
                p[rows[divided]] = likeness.beyond_chance(alike[divided], drawn)
            bar.update()
    return Match(
        models=(model.name, other.name),
        weights=(model.weights_hash, other.weights_hash),
        images=len(given[0]),
        graph=model.graph,
        other_graph=other.graph,
        nodes=own.names,
        others=others.names,
        similarity=similarity,
        partner=partner,
        low=low,
        high=high,
        held=held,
        chance=chance,
        p=p,
    )


# -- what is given -----------------------------------------------------------------------------------


def _given(model: Model, other: Model, images: ImageSpec) -> tuple[Images, Images]:
    """The same images for both models, and refuse what would not be."""
    for each in (model, other):
        if not isinstance(each, Model):
            raise OptionError(f"{type(each).__name__} is no model of circuitvit: wrap it with cv.wrap first")
        if each.refinements:
            raise OptionError(
                f"{each.name} has nodes that are cut into parts: match the model that was cut, whose heads "
                "and MLPs are whole (model.coarse)"
            )
        each.refresh()
    seen = [each.preprocessing.what for each in (model, other)]
    if seen[0] != seen[1]:
        raise OptionError(
            f"{model.name} sees {seen[0]}s and {other.name} sees {seen[1]}s: no inputs are for both"
        )
    found = as_images(images, model.preprocessing), as_images(images, other.preprocessing)
    bound = isinstance(images, Images) or isinstance(found[0], TensorImages)
    if bound and model.preprocessing != other.preprocessing:
        raise DataError(
            f"{model.name} and {other.name} prepare {seen[0]}s differently, and these are prepared already: "
            "give files, a folder or pictures"
        )
    count, nodes = len(found[0]), sum(len(_names(each)) for each in (model, other))
    most = int((MOST_BYTES / 8 / nodes) ** 0.5)
    if not FEWEST <= count <= most:
        raise DataError(
            f"{counted(count, seen[0])} to match nodes on: give {FEWEST} or more, and at most {most:,}, "
            "for which there is room"
        )
    seen_once: set[bytes] = set()
    for row in range(count):  # of files no more are read than it takes
        seen_once.add(fingerprint(found[0].take(row, row + 1)))
        if len(seen_once) >= FEWEST:
            return found
    raise DataError(
        f"of {counted(count, seen[0])} only {len(seen_once)} differ: give {FEWEST} different ones or more, "
        "as nodes are compared by what they make of differences"
    )


def _names(model: Model) -> tuple[str, ...]:
    """Heads and MLPs; what an edit put into the stream is neither."""
    known = {site.node for site in model.all_sites if site.kind == "output"}
    return tuple(
        name for stage in model.graph.stages if stage.receivers for name in stage.senders if name in known
    )


@dataclass(frozen=True, eq=False)
class _Side:
    """What the nodes of one model wrote.

    Attributes:
        names: of the nodes.
        kinds: of each.
        kernels: one for each node.
        layers: its layers of heads, by the numbers of the nodes; none where nobody asked for them.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    kernels: likeness.Kernels
    layers: tuple[likeness.Layer, ...]

    @classmethod
    def of(cls, model: Model, images: Images, batch_size: int | None, progress: bool, heads: bool) -> _Side:
        graph, names, (read, last) = model.graph, _names(model), _read(model)
        layers = _layers(model, names) if heads else []
        inside = [f"{head}{part}" for layer in layers for head in layer for part in (".pattern", "<v>")]
        tokens = model.n_tokens
        each = tokens * (len(names) * model.d_model + len(inside) * max(tokens, model.d_model))
        size = batch_size or min(max(1, AT_ONCE // (4 * each)), 32)
        written: dict[str, list[likeness.Values]] = {name: [] for name in names}
        mixed: dict[tuple[str, str], list[likeness.Values]] = {}
        for _, batch in activation_batches(
            model, images, [*names, *inside], batch_size=size, progress=progress
        ):
            for name in names:
                late = graph.sender_stages[graph.sender_index[name]] >= last
                written[name].append(_means(batch[name].double().numpy(), read, late))
            for layer in layers:
                late = graph.sender_stages[graph.sender_index[layer[0]]] >= last
                for head in layer:
                    looks = _means(batch[f"{head}.pattern"].double().numpy(), read, late)
                    for other in layer:
                        values = looks @ batch[f"{other}<v>"].double().numpy()
                        mixed.setdefault((head, other), []).append(values)
        values = {name: np.concatenate(parts) for name, parts in written.items()}
        kernels = np.stack([likeness.kernel(values[name]) for name in names])
        heard = np.asarray(likeness.centred(kernels).any(axis=1))
        outputs = _outputs(model) if layers else {}
        found = []
        for layer in layers:
            loud = [head for head in layer if heard[names.index(head)] and head in outputs]
            made = likeness.Layer.of(
                [names.index(head) for head in loud],
                [[np.concatenate(mixed[head, other]) for other in loud] for head in loud],
                [outputs[head] for head in loud],
                [values[head] for head in loud],
            )
            found += [made] if made is not None else []
        return cls(names, _kinds(graph, names), kernels, tuple(found))

    def among(self, columns: Sequence[int]) -> list[likeness.Layer]:
        """The layers with nodes numbered as some nodes are, to which they belong."""
        at = {column: place for place, column in enumerate(columns)}
        kept = [layer for layer in self.layers if set(layer.places) <= set(at)]
        return [replace(layer, places=tuple(at[place] for place in layer.places)) for layer in kept]


def _layers(model: Model, names: Sequence[str]) -> list[list[str]]:
    """The heads of each layer that have a pattern and values, where there are several."""
    known, found = set(model.all_sites.names), dict[int, list[str]]()
    for name in names:
        if {f"{name}.pattern", f"{name}<v>"} <= known:
            found.setdefault(model.graph.sender_stages[model.graph.sender_index[name]], []).append(name)
    return [layer for layer in found.values() if len(layer) > 1]


def _outputs(model: Model) -> dict[str, Float[np.ndarray, "value d_model"]]:
    """By which each head writes its values, as far as it is known."""
    found: dict[str, Float[np.ndarray, "value d_model"]] = {}
    bare = model.bare or model  # edits may be of as many images as there are
    blank = bare.blank().to(bare.device, bare.dtype)
    for stage, compact in zip(bare.stages[:-1], capture(bare, blank).compacts, strict=False):
        for part, own in zip(stage.branches, stage.split(compact), strict=True):
            weight = part.factored(own).weight
            if weight is not None:
                written = weight.detach().cpu().double().numpy()
                found.update(zip(part.nodes.senders, written, strict=True))
    return found


def _read(model: Model) -> tuple[int, int]:
    """How many first tokens the readout reads (0 where it reads others or all), and the first stage from
    which on no others are read."""
    stages = model.graph.stages
    if model.leading is None or not all(is_residual(stage.reads_from) for stage in stages if stage.receivers):
        return 0, len(stages)
    mixing = [
        at for at, stage in enumerate(stages) if any(stage.mixes or ()) and stage.senders and stage.receivers
    ]
    return model.leading, max(mixing, default=0)


def _means(written: Float[np.ndarray, "image token width"], read: int, late: bool) -> likeness.Values:
    """Means over the tokens that the readout reads, and over the others where somebody reads them."""
    if not read or read >= written.shape[1]:
        return np.asarray(written.mean(axis=1, keepdims=True))
    first = written[:, :read].mean(axis=1, keepdims=True)
    if late:
        return np.asarray(first)
    return np.concatenate([first, written[:, read:].mean(axis=1, keepdims=True)], axis=1)

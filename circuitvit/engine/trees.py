"""A circuit written out as a tree, and runs in which every edge of it is read from an image of its own.

The tree begins at the logits. A reader, which is a node at one place of the tree, is about one image. Each
edge of the circuit into it leads to another reader, one step further from the logits, about an image that is
chosen for this place. All that the reader hears over edges outside of the circuit comes from one more image,
as a plain run of that left it. So a node that two others read is there twice, and may be about two images.

A node has as many places as there are paths from it to the logits, which can be more than anybody can run. Of
each node at most so many *copies* are run; where it has more places they share these in turn. What a copy
writes is computed for every image of a data set at once, whichever of them is asked for, so that a run costs
what its copies cost. An image is chosen for every edge into every copy; only below two places of one copy
that happen to be about the same image are the same images chosen.

Chan et al. 2022, "Causal scrubbing", treat the circuit so ("treeified").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from circuitvit.engine.contraction import members_at
from circuitvit.engine.runs import Capture, capture, check_logits
from circuitvit.errors import DataError, counted
from circuitvit.graph import EdgeMask, Graph
from circuitvit.models import Model, Stage
from circuitvit.tasks import PreparedTask

READOUT = -1
"""The node of the reader that gives the logits."""

Rows = Int64[np.ndarray, " image"]
"""For each image, the number of another."""


# -- the tree ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heard:
    """An edge of the circuit into a reader.

    Attributes:
        sender: its place in the graph.
        receiver: likewise.
        group: number of its token group.
        copy: which copy of the sender is read.
        choice: number of the choice of an image for it; no two edges of a tree share one.
    """

    sender: int
    receiver: int
    group: int
    copy: int
    choice: int


@dataclass(frozen=True)
class Reader:
    """A copy of a node.

    Attributes:
        node: place of its sender in the graph; `READOUT` for the logits.
        copy: its number among those of the node.
        stage: number of its stage.
        choice: number of the choice of an image for all that comes from outside of the circuit.
        heard: the edges of the circuit into it.
    """

    node: int
    copy: int
    stage: int
    choice: int
    heard: tuple[Heard, ...]


@dataclass(frozen=True)
class Tree:
    """A circuit written out from the logits.

    Attributes:
        readers: in the order in which they run; the last one gives the logits.
        places: how many readers the whole tree has.
        choices: how many images are chosen in a run.
    """

    readers: tuple[Reader, ...]
    places: int
    choices: int

    @property
    def is_whole(self) -> bool:
        """Whether every place has a copy of its own."""
        return len(self.readers) == self.places


def written_out(graph: Graph, kept: EdgeMask, copies: int) -> Tree:
    """The tree of a circuit in which every edge is on a path to the logits.

    A source reads nothing, so that one copy of it is as good as many.

    Args:
        graph: of the circuit.
        kept: its edges, `(sender, receiver, group)`.
        copies: of each node at most.
    """
    places = dict.fromkeys([READOUT], 1)  # of each node in the whole tree
    asked = dict.fromkeys([READOUT], 1)  # of each node by the copies that are run
    found: list[Reader] = []
    for stage in reversed(range(len(graph.stages))):
        if not graph.stages[stage].receivers:
            continue
        for node, receivers in reversed(list(_nodes(graph, stage))):
            if node not in asked:
                continue
            edges = [(u, v, g) for v in receivers for u, g in np.argwhere(kept[:, v]).tolist()]
            for sender, _, _ in edges:
                places[sender] = places.get(sender, 0) + places[node]
            for copy in range(min(asked[node], copies)):
                heard = []
                for sender, receiver, group in edges:
                    heard.append((sender, receiver, group, asked.get(sender, 0)))
                    asked[sender] = asked.get(sender, 0) + 1
                found.append(Reader(node, copy, stage, 0, tuple(Heard(*each, 0) for each in heard)))
    return _numbered(graph, found, places, {node: min(count, copies) for node, count in asked.items()})


def _nodes(graph: Graph, stage: int) -> Iterator[tuple[int, list[int]]]:
    """The nodes of a stage, and the places of the receivers that feed each."""
    nodes, first = graph.stages[stage], graph.receiver_slices[stage].start
    if not nodes.senders:
        yield READOUT, list(range(first, first + len(nodes.receivers)))
    for place in range(len(nodes.senders)):
        fed = np.flatnonzero(nodes.feeding[:, place])
        yield graph.sender_slices[stage].start + place, (first + fed).tolist()


def _numbered(graph: Graph, found: list[Reader], places: Mapping[int, int], run: Mapping[int, int]) -> Tree:
    """The readers in running order, with numbered choices; places of a node are shared out to its copies."""
    readers, choice = [], 0
    sources = {u for u, stage in enumerate(graph.sender_stages) if not graph.stages[stage].receivers}
    for reader in reversed(found):
        heard = tuple(
            Heard(
                each.sender,
                each.receiver,
                each.group,
                0 if each.sender in sources else each.copy % run[each.sender],
                choice + 1 + number,
            )
            for number, each in enumerate(reader.heard)
        )
        readers.append(Reader(reader.node, reader.copy, reader.stage, choice, heard))
        choice += 1 + len(heard)
    count = sum(count for node, count in places.items() if node not in sources)
    return Tree(tuple(readers), count, choice)


# -- what is chosen ------------------------------------------------------------------------------


class Choices(Protocol):
    """Which image each place of a tree is about, given the image that its reader is about."""

    def outside(self, reader: Reader) -> Rows | None:
        """Where everything outside of the circuit is from; None for the reader's own image."""

    def inside(self, heard: Heard) -> Rows | None:
        """Where what is heard over an edge of the circuit is from; None for the reader's own image."""


# -- runs ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TreeRuns:
    """Plain runs of all images of a task, clean ones and then corrupt ones, and what trees make of them.

    Attributes:
        model: that is run.
        graph: with the token groups.
        plain: the runs.
        members: token group of each token, `(token,)`; None for one group.
        batch_size: images at once.
    """

    model: Model
    graph: Graph
    plain: Capture
    members: Tensor | None
    batch_size: int
    _parts: dict[int, Stage] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, prepared: PreparedTask, tree: Tree, batch_size: int, limit: int) -> TreeRuns:
        """Run every image of a task, and keep what was read and written.

        Args:
            prepared: the task.
            tree: that will be run.
            batch_size: images at once.
            limit: bytes that may be kept.

        Raises:
            DataError: if more would have to be kept; the message says how many images fit.
            ModelError: if a run gives NaN or infinite logits.
        """
        sides: tuple[list[Capture], list[Capture]] = ([], [])
        for batch in prepared.batches(batch_size):
            for images, runs in zip((batch.base, batch.reference), sides, strict=True):
                if images is not None:
                    runs.append(capture(prepared.model, images))
                    check_logits(runs[-1].logits, batch)
            if len(sides[0]) == 1:
                _check_room(prepared, tree, sides[0][0], limit)
        plain = _joined([*sides[0], *sides[1]])
        return cls(prepared.model, prepared.graph, plain, prepared.batch(range(1)).members, batch_size)

    def __len__(self) -> int:
        return len(self.plain.logits)

    @torch.no_grad()
    def logits(self, tree: Tree, choices: Choices, images: int) -> Float[Tensor, "image class"]:
        """The logits at the first images, each of them being what the root of the tree is about.

        Args:
            tree: of the circuit.
            choices: of the images for its places.
            images: how many.
        """
        written: dict[tuple[int, int], Tensor] = {}  # without what is as in the plain run
        for reader in tree.readers:
            outside = self._rows(choices.outside(reader))
            inside = {each: self._rows(choices.inside(each)) for each in reader.heard}
            as_ever = not any((each.sender, each.copy) in written for each in reader.heard)
            if outside is None and as_ever and not any(rows is not None for rows in inside.values()):
                continue
            count = images if reader.node == READOUT else len(self)
            found = [
                self._written(reader, torch.arange(start, min(start + self.batch_size, count)), outside,
                              inside, written)
                for start in range(0, count, self.batch_size)
            ]  # fmt: skip
            written[reader.node, reader.copy] = torch.cat(found)
        return written.get((READOUT, 0), self.plain.logits[:images])

    def _written(
        self,
        reader: Reader,
        rows: Tensor,
        outside: Tensor | None,
        inside: Mapping[Heard, Tensor | None],
        written: Mapping[tuple[int, int], Tensor],
    ) -> Tensor:
        """What a reader writes when it is about some images, in compact form; the readout's are logits."""
        part, rows = self._part(reader.node), rows.to(self.plain.logits.device)
        apart = rows if outside is None else outside[rows]
        streams, source = [self.plain.stream(reader.stage)[apart]], []
        members = members_at(self.graph, reader.stage, self.members, streams[0].shape[1])
        for name in part.nodes.receivers:
            receiver, stream = self.graph.receiver_index[name], streams[0]
            for each in (each for each in reader.heard if each.receiver == receiver):
                rows_of = inside[each]
                about, made = rows if rows_of is None else rows_of[rows], (each.sender, each.copy)
                now = written[made][about] if made in written else self._plain(each.sender, about)
                (added,) = self._part(each.sender).expand(now - self._plain(each.sender, apart))
                stream = stream + (added if members is None else added * (members == each.group)[:, None])
            source.append(0 if stream is streams[0] else len(streams))
            streams += [] if stream is streams[0] else [stream]
        return part.write(part.read_each(torch.stack(streams), source))

    def _plain(self, sender: int, rows: Tensor) -> Tensor:
        """What a sender wrote in the plain runs of some images, in compact form."""
        (own,) = self._part(sender).pick((self.plain.compacts[self.graph.sender_stages[sender]][rows],))
        return own

    def _part(self, node: int) -> Stage:
        """The stage of a node, cut to it."""
        if node == READOUT:
            return self.model.stages[-1]
        if node not in self._parts:
            stage = self.graph.sender_stages[node]
            place = node - self.graph.sender_slices[stage].start
            self._parts[node] = self.model.stages[stage].restrict([place])
        return self._parts[node]

    def _rows(self, chosen: Rows | None) -> Tensor | None:
        return None if chosen is None else torch.from_numpy(chosen).to(self.plain.logits.device)


def _joined(runs: list[Capture]) -> Capture:
    streams = zip(*(run.streams for run in runs), strict=True)
    compacts = zip(*(run.compacts for run in runs), strict=True)
    return Capture(
        tuple(None if each[0] is None else torch.cat(each) for each in streams),
        tuple(torch.cat(each) for each in compacts),
    )


def _check_room(prepared: PreparedTask, tree: Tree, run: Capture, limit: int) -> None:
    """Refuse more images than there is room for, from what the first few of them take."""
    sizes = [each.numel() * each.element_size() / len(run.logits) for each in run.compacts]
    kept = sum(
        each.numel() * each.element_size() / len(run.logits) for each in run.streams if each is not None
    )
    for reader in tree.readers:
        kept += sizes[reader.stage] / max(1, len(prepared.graph.stages[reader.stage].senders))
    images, each = len(prepared) * (1 if prepared.reference is None else 2), kept + sum(sizes)
    if each * images > limit:
        raise DataError(
            f"{counted(images, 'image')} would take {each * images / 2**30:.2g} GiB, as any of them may be "
            f"read in place of another, and the budget is {limit / 2**30:.2g} GiB: give at most "
            f"{max(1, int(limit / each))} images in all, fewer copies, or raise memory="
        )

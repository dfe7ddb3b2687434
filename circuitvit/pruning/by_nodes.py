"""A circuit of nodes: the smallest set of nodes, with all edges among them, that carries the behaviour.

Where nodes are fine (neurons, features, heads by source), which of them matter is the question, and an edge
is only ever as interesting as its ends. The search begins with all nodes and takes away those that would be
missed least, a few per cent at a time. What would be missed is asked anew each time, of the circuit as it
then is: scores that were taken in the whole model say little about a circuit that has lost most of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from circuitvit._keywords import running
from circuitvit.attribution import attribute_nodes
from circuitvit.attribution.scoring import provenance_of, require_gradient
from circuitvit.engine import BatchRun, Evaluator, progress_bar
from circuitvit.engine.node_runs import node_losses, node_run
from circuitvit.errors import DataError, OptionError, check_whole
from circuitvit.graph import Circuit, EdgeMask, Graph, NodeScores
from circuitvit.graph.names import named
from circuitvit.models import Model
from circuitvit.pruning.aims import Band, check_band, figures
from circuitvit.pruning.refine import Refinement, minimise, noising_evaluator
from circuitvit.tasks import PreparedTask, Task, prepare

SHARE = 0.05
"""Of the nodes that are left, how many are taken away at once."""

MISSES = 10
"""After how many nodes in a row that cannot go no more are taken away."""

TIMES = 10
"""How much larger than the smallest result another start may be that is gone into."""


@running
def find_nodes(
    model: Model,
    task: Task | PreparedTask,
    *,
    scores: NodeScores | None = None,
    last: str | Sequence[str] = (),
    band: Band = (0.9, 1.1),
    max_runs: int | None = None,
    batch_size: int | None = None,
    memory: int | str | None = None,
    progress: bool = True,
) -> Refinement:
    """Find nodes that carry a behaviour together, none of which can be spared.

    The circuit has every edge among them and the input. From all nodes, those that would be missed least are
    taken away, to first order in the circuit that is left (`circuitvit.engine.node_runs.node_losses`) and
    confirmed by a run; then nodes are removed by delta debugging (see `ddmin`), and at last one by one until
    a whole pass removes none. Where that takes few runs it is done a second time from the strongest nodes, as
    many as faithfulness asks for, and the smaller circuit is the answer. With scores that are given, and
    with noise for ablation, this is the only start.

    Args:
        model: from `load`, `wrap`, `refine_nodes` or `split_sources`.
        task: in the noising direction.
        scores: of the nodes, to begin with the strongest of them.
        last: names of nodes, with `*`, that are taken last and removed first, whatever their scores, such as
            `"*.rest"`: then single units are preferred to what is not told apart.
        band: faithfulness that the result must keep.
        max_runs: stop removing after so many runs; the result then is not minimal.
        batch_size: pairs at once; by default what `memory` allows.
        memory: bytes that a batch, and what is kept between runs, may take.
        progress: whether to show a bar.

    Raises:
        NameNotFoundError: if no node is called as `last` says.
        OptionError: if the band is empty, the task is denoising, or scores are of another graph.
        DataError: if nothing that is tried lies in the band, or the metric does not differ between clean and
            ablated runs.

    Example:
        >>> import circuitvit as cv  # doctest: +SKIP
        >>> fine = cv.refine_nodes(model, {"m*": cv.neurons()}, top=500, task=task)  # doctest: +SKIP
        >>> found = cv.find_nodes(fine, task)  # doctest: +SKIP
        >>> [node for node in found.circuit.nodes if ".n" in node]  # doctest: +SKIP
    """
    check_band(band)
    if not band[0] < band[1]:
        raise OptionError(f"the band must go from low to high, not {band}")
    if max_runs is not None:
        check_whole("max_runs", max_runs)
    prepared = prepare(model, task, progress)
    evaluator = noising_evaluator(prepared, batch_size, memory)
    if scores is not None and not isinstance(scores, NodeScores):
        raise OptionError(f"scores are of nodes, by attribute_nodes, not {type(scores).__name__}")
    if scores is not None and scores.graph.senders != prepared.graph.senders:
        raise OptionError("the scores are of another graph: score this model and task")
    spared = set(named("node", last, prepared.graph.senders))
    search = _NodeSearch(evaluator, band, max_runs)
    starts = []
    if scores is None:
        require_gradient(prepared, "find_nodes without scores")
        starts += search.thinned(spared, progress)
    ranked = search.ranked(
        scores
        or attribute_nodes(model, prepared, "atp", batch_size=batch_size, memory=memory, progress=progress),
        spared,
    )
    starts += search.grown(ranked, needed=not starts)
    left, minimal = search.smallest(starts, progress)
    kept = search.mask(left)
    provenance = provenance_of(prepared, "nodes") if scores is None else scores.provenance
    provenance = provenance.with_parameters(nodes=len(left), minimal_over="nodes", band=list(band))
    circuit = Circuit(prepared.graph, kept, None, provenance)
    found = figures(evaluator, kept)
    return Refinement(circuit, found.faithfulness, minimal, search.runs, found.agreement, found.kl)


class _NodeSearch:
    """A search over sets of nodes.

    Args:
        evaluator: of the task.
        band: of faithfulness.
        max_runs: how many runs there may be.
    """

    def __init__(self, evaluator: Evaluator, band: Band, max_runs: int | None) -> None:
        self.evaluator, self.band, self.max_runs = evaluator, band, max_runs
        self.runs = 0
        self._known: dict[bytes, float] = {}
        graph = evaluator.graph
        self.always = {name for stage in graph.stages if not stage.receivers for name in stage.senders}
        self.nodes = [name for name in graph.senders if name not in self.always]

    def mask(self, nodes: Collection[str]) -> EdgeMask:
        return edges_among(self.evaluator.graph, {*nodes, *self.always})

    def faithfulness(self, nodes: Collection[str]) -> float:
        """That of the circuit of some nodes: by a run of nodes, where there is one, which costs a forward."""
        kept = self._kept(nodes)
        key = kept.tobytes()
        if key not in self._known:
            found = [self._values(run, kept) for run in self.evaluator.batches()]
            values = [each for each in found if each is not None]
            if len(values) < len(found):
                self._known[key] = self.evaluator.faithfulness(self.mask(nodes))
            else:
                gained = np.concatenate(values) - self.evaluator.nothing
                self._known[key] = float(gained.mean() / self.evaluator.effect.mean())
            self.runs += 1
        return self._known[key]

    @staticmethod
    def _values(run: BatchRun, kept: NDArray[np.bool_]) -> NDArray[np.float64] | None:
        logits = node_run(run.sources, kept)
        return None if logits is None else run.metric(logits).double().cpu().numpy()

    def losses(self, nodes: Collection[str]) -> dict[str, float] | None:
        """What faithfulness would lose without each node, to first order in the circuit of these nodes."""
        kept, total = self._kept(nodes), np.zeros(len(self.evaluator.graph.senders))
        for run in self.evaluator.batches():
            found = node_losses(run.sources, kept, run.metric)
            if found is None:
                return None
            total += found
        self.runs += 1
        shares = total / self.evaluator.effect.sum()
        return dict(zip(self.evaluator.graph.senders, shares.tolist(), strict=True))

    def _kept(self, nodes: Collection[str]) -> NDArray[np.bool_]:
        chosen = {*nodes, *self.always}
        return np.array([name in chosen for name in self.evaluator.graph.senders])

    def holds(self, nodes: Sequence[str]) -> bool:
        return self.band[0] <= self.faithfulness(nodes) <= self.band[1]

    def spent(self) -> bool:
        return self.max_runs is not None and self.runs >= self.max_runs

    def thinned(self, spared: Collection[str], progress: bool) -> list[list[str]]:
        """All nodes without those that are missed least, the weakest first.

        Below 1 those go first without which faithfulness would rise most, above it those that do least.

        Returns:
            Nothing where all nodes do not lie in the band, or nodes cannot be run alone.
        """
        left = list(self.nodes)
        known = self.losses(left) if self.holds(left) else None
        if known is None:
            return []
        losses: Mapping[str, float] = known
        refused: set[str] = set()
        misses = 0
        with progress_bar(len(left), "nodes taken away", progress) as bar:
            while not self.spent() and misses < MISSES:
                size = abs if self.faithfulness(left) >= 1 else float
                open_to = [node for node in left if node not in refused]
                first = sorted(open_to, key=lambda node: (node not in spared, size(losses[node])))
                rest = self._without(left, first)
                if rest is None:  # not even the first alone can go: it is tried once more at the end
                    refused.update(first[:1])
                    misses += 1 if not first else first[0] not in spared
                    continue
                bar.update(len(left) - len(rest))
                left, misses = rest, 0
                losses = self.losses(left) or losses
        return [sorted(left, key=lambda node: (node not in spared, losses[node]))]

    def _without(self, nodes: Sequence[str], first: Sequence[str]) -> list[str] | None:
        """The nodes without the first few: a twentieth, or half as many, ... or one; None if none can go."""
        count = min(len(first), max(1, round(SHARE * len(nodes))))
        while count and not self.spent():
            gone = set(first[:count])
            rest = [node for node in nodes if node not in gone]
            if self.holds(rest):
                return rest
            count //= 2
        return None

    def ranked(self, scores: NodeScores, spared: Collection[str]) -> list[str]:
        """Nodes by the size of their scores, the strongest first and those that are to be spared last."""
        sizes = np.abs(scores.values).sum(axis=1)
        ranked = [scores.graph.senders[place] for place in np.argsort(-sizes, kind="stable")]
        return sorted((node for node in ranked if node in self.nodes), key=lambda node: node in spared)

    def grown(self, ranked: Sequence[str], needed: bool) -> list[list[str]]:
        """So many of the strongest nodes that they lie in the band, the weakest first; nothing if none do.

        Raises:
            DataError: if none do and they are needed.
        """
        tried = []
        for count in _counts(len(ranked)):
            tried.append((count, self.faithfulness(ranked[:count])))
            if self.band[0] <= tried[-1][1] <= self.band[1]:
                return [list(reversed(ranked[:count]))]
        if not needed:
            return []
        said = ", ".join(f"{count}: {found:.2f}" for count, found in tried)
        raise DataError(
            f"no number of the strongest nodes has a faithfulness of {self.band[0]:g} to {self.band[1]:g} "
            f"({said}): give other scores, or a wider band"
        )

    def smallest(self, starts: Sequence[list[str]], progress: bool) -> tuple[list[str], bool]:
        """What is left of the start of which least is left, and whether no single node can be removed.

        Starts that are many times larger than what is left of another are not gone into: trying to remove
        nodes takes runs with the square of their number.
        """
        found: list[tuple[list[str], bool]] = []
        for start in sorted(starts, key=len):
            if found and (self.spent() or len(start) > TIMES * len(found[0][0])):
                break
            with progress_bar(len(start), "nodes", progress) as bar:
                found.append(self.shrunk(start, bar.update))
        return min(found, key=lambda each: (not each[1], len(each[0])))

    def shrunk(self, nodes: list[str], removed: Callable[[int], object]) -> tuple[list[str], bool]:
        """What is left when nothing can be removed, and whether no single node can be.

        Args:
            nodes: that lie in the band.
            removed: told how many more have gone.
        """
        count = len(nodes)

        def advance(some: Sequence[str]) -> None:
            nonlocal count
            removed(count - len(some))
            count = len(some)

        left = minimise(nodes, lambda some: not self.spent() and self.holds(some), advance)
        dropped = True
        while dropped and not self.spent():  # delta debugging may end before every single one was tried
            dropped = False
            for node in list(left):
                rest = [other for other in left if other != node]
                if not self.spent() and self.holds(rest):
                    left, dropped = rest, True
                    advance(left)
        return left, not self.spent()


def edges_among(graph: Graph, nodes: Collection[str]) -> EdgeMask:
    """`(sender, receiver, group)`: the edges from some nodes to each other and to the logits.

    Receivers that several senders share, as those of a head in pieces, count with any of them.
    """
    sends = np.array([sender in nodes for sender in graph.senders])
    reads = np.zeros(len(graph.receivers), dtype=bool)
    for stage, senders, receivers in zip(
        graph.stages, graph.sender_slices, graph.receiver_slices, strict=True
    ):
        reads[receivers] = True if not stage.senders else (stage.feeding & sends[senders]).any(axis=1)
    mask: EdgeMask = graph.edge_mask & sends[:, None, None] & reads[None, :, None]
    return mask


def _counts(most: int) -> Iterator[int]:
    """Ever larger numbers, at last all: a quarter more each time."""
    count = 1
    while count < most:
        yield count
        count = max(count + 1, round(1.25 * count))
    yield most

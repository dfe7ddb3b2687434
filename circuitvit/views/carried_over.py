"""Universality: how much of one model's circuit stands in another, whose nodes it was carried over to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from circuitvit._keywords import running
from circuitvit.engine import Evaluator
from circuitvit.errors import DataError, OptionError, check_whole, counted
from circuitvit.graph import Circuit, CircuitLike, as_circuit
from circuitvit.graph.results import Record, Result
from circuitvit.models import Model
from circuitvit.tasks import PreparedTask, Task, prepare
from circuitvit.verification.null import connected_circuits
from circuitvit.verification.statistics import (
    Bootstrap,
    Estimate,
    estimated,
    rank_p,
    ratio_interval,
    share_interval,
)
from circuitvit.views.matching import Match


@dataclass(frozen=True, eq=False, repr=False)
class Universality(Result):
    """One model's circuit in another model.

    Attributes:
        models: the names of the model that the circuit is from, and of the other.
        n: how many pairs of the other model's task.
        edges: of the circuit in its own model.
        carried: the circuit in the other model, its dead edges left out.
        own: the other model's own circuit.
        universality: the share of what its own circuit has beyond random ones that the carried one has as
            well: 1 where it does as well, 0 where it does as random circuits of its shape do; None where the
            own circuit is not shown to beat these.
        faithfulness: of the carried circuit in the other model.
        faithfulness_own: of the other model's own circuit.
        random: the faithfulness of random connected circuits with as many edges into each stage as the
            carried one.
        p: of "the carried circuit is one of these".
        edges_shared: edges in both circuits, carried and own, as a share of those in either; over receiving
            nodes as the units that are resampled.
        nodes_shared: nodes likewise, without input and logits.
        edges_shared_random: the same share of edges for the random circuits, on average.
    """

    models: tuple[str, str]
    n: int
    edges: int
    carried: Circuit
    own: Circuit
    universality: Estimate | None
    faithfulness: Estimate
    faithfulness_own: Estimate
    random: Float[np.ndarray, " circuit"]
    p: float | None
    edges_shared: Estimate
    nodes_shared: Estimate
    edges_shared_random: float | None

    along: ClassVar[str] = ""

    def records(self) -> Iterator[Record]:
        """One row for each circuit in the other model: "carried over", "own" and "random 1", ...
        (`circuit`), its number of `edges`, and its `faithfulness` with the ends of its interval."""
        yield {
            "circuit": "carried over",
            "edges": len(self.carried),
            **estimated("faithfulness", self.faithfulness),
        }
        yield {"circuit": "own", "edges": len(self.own), **estimated("faithfulness", self.faithfulness_own)}
        for number, value in enumerate(self.random.tolist(), 1):
            drawn = estimated("faithfulness", Estimate(value))
            yield {"circuit": f"random {number}", "edges": len(self.carried), **drawn}

    def __repr__(self) -> str:
        stand = f"{len(self.carried):,} of {counted(self.edges, 'edge')} carried over"
        return f"Universality({'unknown' if self.universality is None else self.universality}; {stand})"

    def __str__(self) -> str:
        first, second = self.models
        lines = [
            f"Of {counted(self.edges, 'edge')} of the circuit of {first}, {len(self.carried):,} stand in "
            f"{second}, on a path from input to logits.",
            f"On {counted(self.n, 'pair')} their faithfulness is {self.faithfulness} there; its own circuit "
            f"of {counted(len(self.own), 'edge')} has {self.faithfulness_own}.",
        ]
        if len(self.random):
            lines.append(
                f"Random circuits of their shape have {self.random.mean():.3f} on average and at most "
                f"{self.random.max():.3f} (p = {self.p:.2g})."
            )
        lines.append(
            f"Shared with its own circuit: {self.edges_shared} of the edges"
            + ("" if self.edges_shared_random is None else f" ({self.edges_shared_random:.3f} by chance)")
            + f", {self.nodes_shared} of the nodes."
        )
        if self.universality is None:
            lines.append("Universality: unknown, as its own circuit is not shown to beat random ones.")
        else:
            lines.append(f"Universality: {self.universality}.")
        return "\n".join(lines)

    def _check(self) -> None:
        self.carried.graph.check_same(self.own.graph, "the model's own circuit")


@running
def universality(
    found: Match,
    circuit: CircuitLike,
    model: Model,
    task: Task | PreparedTask,
    own: CircuitLike,
    *,
    n_random: int = 20,
    n_bootstrap: int = 1000,
    seed: int = 0,
    batch_size: int | None = None,
    memory: int | str | None = None,
    progress: bool = True,
) -> Universality:
    """How much of one model's circuit stands in another?

    The circuit is carried over by `Match.transfer` and run in the other model, beside that model's own
    circuit and random ones of the carried one's shape. The number is

        (carried - random) / (own - random)

    in the metric, over pairs, with a bootstrap interval of the pairs; the match itself is taken as it is.

    Args:
        found: by `match`, from the circuit's model to this one.
        circuit: of the first model.
        model: the other one.
        task: the behaviour in the other model, on pairs that its own circuit was not found on.
        own: its own circuit, best of about as many edges and found in the same way.
        n_random: how many random circuits.
        n_bootstrap: how often the pairs are resampled for intervals.
        seed: of both.
        batch_size: pairs at once; by default what `memory` allows.
        memory: bytes that a batch, and what is kept between runs, may take.
        progress: whether to show a bar.

    Raises:
        OptionError: if the circuits or the model are not those of the match.
        DataError: if the model shows no behaviour on the pairs.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> model, pairs = cv.load("catdog-tiny"), catdog_pairs(20)
        >>> task = cv.Task(*pairs, metric=cv.logit_diff("cat", "dog"))
        >>> circuit = cv.attribute(model, task, "eap-ig", progress=False).connected(40)
        >>> found = cv.match(model, model, pairs.clean, draws=0, progress=False)
        >>> round(cv.universality(found, circuit, model, task, circuit, progress=False).universality.value, 3)
        1.0
    """
    check_whole("the number of random circuits", n_random, 0)
    given: tuple[object, object] = found, model
    if not (isinstance(given[0], Match) and isinstance(given[1], Model)):
        raise OptionError(
            "universality takes what match(...) found, the circuit, and the other model after it"
        )
    first = as_circuit(circuit, found.graph) if not isinstance(circuit, Circuit) else circuit
    found.other_graph.check_same(model.graph, f"the model {model.name}")
    if model.weights_hash != found.weights[1]:
        raise OptionError(
            f"{model.name} has other weights than the model that was matched, {found.models[1]}: match them "
            "anew"
        )
    prepared = prepare(model, task, progress)
    carried = found.transfer(first).pruned()
    prepared.graph.check_same(carried.graph, "the carried circuit")
    mine = as_circuit(own, prepared.graph).pruned()
    evaluator = Evaluator(prepared, batch_size=batch_size, memory=memory, progress=progress)
    evaluator.check_effect()
    drawn = connected_circuits(carried, n_random, seed)
    runs = evaluator.many([carried.kept, mine.kept, *(each.kept for each in drawn)]) - evaluator.nothing
    settings = Bootstrap(n_resamples=n_bootstrap, seed=seed)
    here, there, random = runs[0], runs[1], runs[2:]
    floor = random.mean(axis=0) if n_random else np.zeros_like(here)
    try:
        share = ratio_interval(here - floor, there - floor, settings)
    except DataError:  # its own circuit is no better than random ones
        share = None
    by_chance = random.mean(axis=1) / evaluator.effect.mean()
    faithfulness, faithfulness_own = (
        ratio_interval(each, evaluator.effect, settings) for each in (here, there)
    )
    return Universality(
        models=found.models,
        n=len(prepared),
        edges=len(first),
        carried=carried,
        own=mine,
        universality=share,
        faithfulness=faithfulness,
        faithfulness_own=faithfulness_own,
        random=by_chance,
        p=rank_p(faithfulness.value, by_chance) if n_random else None,
        edges_shared=_edges_shared(carried, mine, settings),
        nodes_shared=_nodes_shared(carried, mine, settings),
        edges_shared_random=float(np.mean([each.jaccard(mine) for each in drawn])) if n_random else None,
    )


def _edges_shared(carried: Circuit, own: Circuit, settings: Bootstrap) -> Estimate:
    """The Jaccard index of edges; those into one receiver hang together, so receivers are resampled."""
    both, either = ((carried & own).kept, (carried | own).kept)
    shared, all_of_them = (each.sum(axis=(0, 2), dtype=np.float64) for each in (both, either))
    heard = all_of_them > 0
    if not heard.any():
        return Estimate(1.0)
    return ratio_interval(shared[heard], all_of_them[heard], settings)


def _nodes_shared(carried: Circuit, own: Circuit, settings: Bootstrap) -> Estimate:
    inner = {
        node for stage in own.graph.stages if stage.senders and stage.receivers for node in stage.senders
    }
    sides = [inner & set(each.nodes) for each in (carried, own)]
    either = sorted(sides[0] | sides[1])
    if not either:
        return Estimate(1.0)
    return share_interval([node in sides[0] and node in sides[1] for node in either], settings)

"""Learned masks: find the edges to keep by gradient descent on a relaxed mask of all edges at once.

Every edge (or node, or both) has a gate in [0, 1]: a random number whose odds are learned. The gates are
trained so that the masked model predicts what the full model does,

    KL(full || masked) + 10 ((m - m_all) / (m_all - m_none))^2

(the second term alone where the model has no classes, the first alone where the prediction is to be kept
whatever becomes of the behaviour), under a Lagrangian that brings the expected share of
kept edges down along a schedule, geometrically to the target. What is handed on is a discrete circuit, the
edges that are more open than not; only that is ever evaluated.

The order of the gates is no ranking to extend: a mask trained for 100 edges does not contain the best 200.
But the training passes through 200 on its way, so that one that rests there gives both.

Edge pruning: Bhaskar et al. 2024, "Finding transformer circuits with edge pruning", arXiv:2406.16778.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from circuitvit._keywords import running
from circuitvit.attribution.scoring import provenance_of
from circuitvit.engine import (
    BatchRun,
    Evaluator,
    Saved,
    agreed,
    own_part,
    place_in_group,
    progress_bar,
    refuse_inference_mode,
    soft_run,
    summed,
)
from circuitvit.errors import OptionError, check_number, check_whole
from circuitvit.graph import Circuit, EdgeMask, EdgeScores, Graph, node_of
from circuitvit.graph.results import Record, Result
from circuitvit.models import Model
from circuitvit.pruning.aims import Keep, check_keep, check_predicts, check_sizes
from circuitvit.pruning.refine import require_noising, without_dead
from circuitvit.tasks import PreparedTask, Task, divergence, prepare

SamplerName = Literal["hard-concrete", "ugs"]
"""How gates are sampled in training."""

Over = Literal["edges", "nodes", "both"]
"""What has a gate."""

INITIAL = 2.0
"""Log-odds that every gate starts with, unless scores are given."""

WARM = (-1.0, 4.0)
"""Log-odds that the weakest and the strongest edge start with when scores are given; the rest by rank."""

BEHAVIOUR_WEIGHT = 10.0

STRETCH = (-0.1, 1.1)
"""The interval that a hard-concrete gate's sigmoid is stretched to before it is clipped to [0, 1]."""

TEMPERATURE = 2 / 3


@dataclass(frozen=True)
class MaskSettings:
    """How a mask is trained.

    Attributes:
        steps: of Adam.
        learning_rate: of the gates.
        multiplier_rate: of the Lagrange multipliers, which climb.
        ramp: share of the steps over which the target density comes down.
        batch_size: pairs at each step.
        seed: of the gates' noise and the order of the pairs.
        sampler: "hard-concrete", or "ugs" for uniform gradient sampling.
        over: what has a gate: "edges", "nodes", or "both".
        checkpoint: recompute each stage in the backward pass, for less memory and a third more time.
        keep: "behaviour", or "prediction" for the prediction over all classes alone.
    """

    steps: int = 600
    learning_rate: float = 0.1
    multiplier_rate: float = 5.0
    ramp: float = 0.9
    batch_size: int = 4
    seed: int = 0
    sampler: SamplerName = "hard-concrete"
    over: Over = "edges"
    checkpoint: bool = False
    keep: Keep = "behaviour"

    def __post_init__(self) -> None:
        for name, least in {"steps": 1, "batch_size": 1, "seed": 0}.items():
            check_whole(name, getattr(self, name), least)
        for name in ("learning_rate", "multiplier_rate"):
            check_number(name, getattr(self, name))
        if self.ramp != 1:  # with which the schedule comes down until the very end
            check_number("ramp", self.ramp, 0, 1)
        if self.sampler not in SAMPLERS:
            raise OptionError(f"the sampler is 'hard-concrete' or 'ugs', not {self.sampler!r}")
        if self.over not in ("edges", "nodes", "both"):
            raise OptionError(f"masks are learned over 'edges', 'nodes' or 'both', not {self.over!r}")
        check_keep(self.keep)


@dataclass
class Trace:
    """What happened at each step of training; lists of equal length.

    Attributes:
        distance: from the full model's prediction and behaviour.
        density: expected share of kept edges.
        target: the share that the schedule asked for.
    """

    distance: list[float] = field(default_factory=list)
    density: list[float] = field(default_factory=list)
    target: list[float] = field(default_factory=list)


@dataclass(frozen=True, eq=False, repr=False)
class LearnedMask(Result):
    """A trained mask.

    Attributes:
        circuit: the edges that are more open than not, dead ones pruned.
        openness: log-odds of every edge's least open gate, `(sender, receiver, group)`; `-inf` for no edge.
        trace: of the training.
    """

    circuit: Circuit
    openness: Float[NDArray[np.float64], "sender receiver group"]
    trace: Trace

    may_be_nan = "openness"

    def records(self) -> Iterator[Record]:
        """One row for each edge of the graph: `edge`, its `openness` (log-odds), and whether it is
        `kept`."""
        graph = self.circuit.graph
        for edge in graph.edges:
            yield {
                "edge": edge,
                "openness": float(self.openness[graph.edge_index(edge)]),
                "kept": edge in self.circuit,
            }

    def __repr__(self) -> str:
        return f"LearnedMask({self.circuit!r}, trained for {len(self.trace.distance)} steps)"

    def _check(self) -> None:
        if self.openness.shape != self.circuit.graph.shape:
            raise OptionError("the openness is of another graph than the circuit")

    def at_most(self, edges: int) -> Circuit:
        """The circuit, cut to its most open edges where training ended with more than were wanted.

        There is no way to more edges: the gates past the circuit are in no order of use.
        """
        kept = np.flatnonzero(self.circuit.kept)
        if len(kept) <= edges:
            return self.circuit
        most_open = kept[np.argsort(-self.openness.flat[kept], kind="stable")[:edges]]
        cut = np.zeros_like(self.circuit.kept)
        cut.flat[most_open] = True
        return Circuit(self.circuit.graph, cut, provenance=self.circuit.provenance).pruned()


@running
def learn_mask(
    model: Model,
    task: Task | PreparedTask,
    edges: int,
    settings: MaskSettings | None = None,
    *,
    warm_start: EdgeScores | None = None,
    processes: bool = False,
    progress: bool = True,
) -> LearnedMask:
    """Train a mask of about `edges` edges.

    Args:
        model: from `load` or `wrap`.
        task: in the noising direction.
        edges: how many should be kept at the end.
        settings: of the training.
        warm_start: scores by whose ranks the gates start more or less open.
        processes: share the pairs of every step among the processes of `torch.distributed`, which must all
            make this call.
        progress: whether to show a bar.

    Raises:
        OptionError: if `edges` is not between 1 and the number of edges, the task is denoising, neither
            classes nor the metric give a gradient, or a model without classes is to keep its prediction.

    Example:
        >>> import circuitvit as cv  # doctest: +SKIP
        >>> circuit = cv.learn_mask(model, task, edges=100).circuit  # doctest: +SKIP
    """
    one = learn_masks(
        model, task, [edges], settings, warm_start=warm_start, processes=processes, progress=progress
    )
    return one[0]


@running
def learn_masks(
    model: Model,
    task: Task | PreparedTask,
    edges: Sequence[int],
    settings: MaskSettings | None = None,
    *,
    warm_start: EdgeScores | None = None,
    processes: bool = False,
    progress: bool = True,
) -> list[LearnedMask]:
    """Train one mask down to several sizes, and hand on what it is at each.

    The schedule rests at each size for as long as it does at the last one, `1 - ramp` of the steps; so each
    size but the smallest costs that many steps, where a training of its own costs all.

    Args:
        model: from `load` or `wrap`.
        task: in the noising direction.
        edges: how many should be kept, for each mask.
        settings: of the training; its steps are those down to the smallest size.
        warm_start: scores by whose ranks the gates start more or less open.
        processes: share the pairs of every step among the processes of `torch.distributed`, which must all
            make this call.
        progress: whether to show a bar.

    Returns:
        A mask for each size asked for, the largest first.

    Raises:
        OptionError: as `learn_mask`.

    Example:
        >>> import circuitvit as cv  # doctest: +SKIP
        >>> masks = cv.learn_masks(model, task, [200, 100, 50])  # doctest: +SKIP
        >>> curve = cv.circuit_curve(model, task, [mask.circuit for mask in masks], "masks")  # doctest: +SKIP
    """
    settings = settings or MaskSettings()
    prepared = prepare(model, task, progress, processes)
    sizes = check_sizes(edges, prepared.graph)
    trainer = MaskTrainer(prepared, sizes[-1], settings, warm_start, rests=sizes[:-1])
    provenance = provenance_of(prepared, "learned-mask", settings.seed).with_parameters(**asdict(settings))
    learned = []
    with progress_bar(trainer.ends[-1], f"mask of {sizes[-1]} edges", progress) as bar:
        for size, end in zip(sizes, trainer.ends, strict=True):
            while len(trainer.trace.distance) < end:
                trainer.step()
                bar.set_postfix_str(trainer.status, refresh=False)
                bar.update()
            kept = without_dead(prepared, trainer.open_edges())
            circuit = Circuit(prepared.graph, kept, provenance=provenance.with_parameters(edges=size))
            learned.append(LearnedMask(circuit, trainer.openness(), deepcopy(trainer.trace)))
    return learned


class MaskTrainer:
    """The gates of one task and their training, step by step.

    Args:
        prepared: the task, in the noising direction.
        edges: how many should be kept at the end of the schedule.
        settings: of the training.
        warm_start: scores by whose ranks the gates start.
        rests: larger numbers of edges that the schedule rests at, the largest first.

    Attributes:
        trace: of the training.
        ends: the steps after which the rest at each size is over, the last one being the end.
    """

    def __init__(
        self,
        prepared: PreparedTask,
        edges: int,
        settings: MaskSettings,
        warm_start: EdgeScores | None = None,
        rests: Sequence[int] = (),
    ) -> None:
        refuse_inference_mode()
        graph = prepared.graph
        sizes = check_sizes([*rests, edges], graph)
        require_noising(prepared)
        metric = prepared.metric.metric
        if settings.keep == "prediction":
            check_predicts(prepared.model)
        if not prepared.model.chooses and not metric.differentiable:
            raise OptionError(
                f"without classes a mask is learned by the metric's gradient alone, and {metric.name!r} has "
                "none: choose another metric, or find(..., start='whole')"
            )
        self.prepared, self.settings, self.trace = prepared, settings, Trace()
        self.units = gated_units(graph, settings.over)
        self.sampler = SAMPLERS[settings.sampler]
        self._phi = _initial(self.units, settings.over, warm_start).to(prepared.model.device).requires_grad_()
        self._multipliers = torch.zeros(2, device=prepared.model.device, requires_grad=True)
        self._optimisers = {
            "descend": torch.optim.Adam([self._phi], lr=settings.learning_rate),
            "climb": torch.optim.Adam([self._multipliers], lr=settings.multiplier_rate, maximize=True),
        }
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._from = 1.0 if warm_start is None else self._density().item()
        self._sizes = [size / graph.n_edges for size in sizes]
        self._ramp = settings.ramp * settings.steps
        self._rest = max(0, settings.steps - math.ceil(self._ramp))
        arrivals = [math.ceil(self._arrival(size)) for size in self._sizes[:-1]]
        self.ends = [arrived + self._rest * (place + 1) for place, arrived in enumerate(arrivals)]
        self.ends.append(settings.steps + self._rest * len(rests))
        self._pairs = Evaluator(prepared, batch_size=min(settings.batch_size, len(prepared)))
        self._rows = prepared.row_ranges(self._pairs.batch_size)
        self._parts = place_in_group(prepared.processes)[1]  # of a minibatch; a run that goes on keeps them
        self._pairs.check_effect(level=0)
        # one scale for all pairs, as in faithfulness: a pair that hardly differs must not weigh most
        self._scale = max(abs(float(self._pairs.effect.mean())), 1e-9)
        self._queue: list[int] = []  # the batches that are left of this round, the next one last

    @torch.enable_grad()
    def step(self) -> None:
        """One step of Adam on one minibatch."""
        if not self._queue:
            order = torch.randperm(len(self._rows), generator=self._generator)
            self._queue = order.flip(0).tolist()
        mask = self.units.mask(self.sampler.sample(self._phi, self._generator))
        distance, slope = self._slope(self._rows[self._queue.pop()], mask)
        density = self._density()
        excess = density - self._wanted()
        price = self._multipliers[0] * excess + self._multipliers[1] * excess.square()
        for optimiser in self._optimisers.values():
            optimiser.zero_grad()
        price.backward()  # type: ignore[no-untyped-call]
        assert self._phi.grad is not None, "the density depends on every gate"
        self._phi.grad += slope
        for optimiser in self._optimisers.values():
            optimiser.step()
        self.trace.target.append(self._wanted())
        self.trace.distance.append(distance.item())
        self.trace.density.append(density.item())

    def _slope(self, rows: range, mask: Tensor) -> tuple[Float[Tensor, ""], Float[Tensor, " gate"]]:
        """The mean distance over some pairs, and its gradient by the gates' log-odds. Where processes share
        the pairs, each differentiates its part of them, and all add the parts up in one order."""
        ends = [len(rows) * n // self._parts for n in range(self._parts + 1)]
        parts = [rows[first:last] for first, last in pairwise(ends)]
        own = [n for n in range(self._parts)[own_part(self._parts, self.prepared.processes)] if parts[n]]
        # a gate that is shut has no gradient either, so that leaving it out of the run changes nothing
        possible = (mask.detach() > 0).cpu().numpy()
        mask = mask.to(self.prepared.model.dtype)
        found = torch.zeros(self._parts, 1 + len(self._phi), dtype=torch.float64, device=self._phi.device)
        for n in own:
            run = self._pairs.pairs(parts[n])
            logits = soft_run(run.sources, mask, self.settings.checkpoint, possible)
            distance = self._distance(run, logits) * (len(parts[n]) / len(rows))
            (slope,) = torch.autograd.grad(distance, self._phi, retain_graph=n != own[-1])
            found[n, 0], found[n, 1:] = distance.detach(), slope
        if self.prepared.processes:
            found = torch.from_numpy(summed(found.cpu().numpy())).to(found.device)
        total = found.sum(dim=0)
        return total[0], total[1:].to(self._phi.dtype)

    def state(self) -> Saved:
        """Everything that the training needs to go on, copied."""
        optimisers = {
            f"{name}.{key}": value.clone()
            for name, optimiser in self._optimisers.items()
            for key, value in optimiser.state_dict()["state"].get(0, {}).items()
        }
        tensors = {
            "phi": self._phi.detach().clone(),
            "multipliers": self._multipliers.detach().clone(),
            "generator": self._generator.get_state(),
            "trace": torch.tensor(
                [self.trace.distance, self.trace.density, self.trace.target], dtype=torch.float64
            ),
            **optimisers,
        }
        return Saved(tensors, {"queue": list(self._queue), "parts": self._parts})

    def restore(self, saved: Saved) -> None:
        """Go on where another trainer of the same task and settings was."""
        with torch.no_grad():
            self._phi.copy_(saved.tensors["phi"])
            self._multipliers.copy_(saved.tensors["multipliers"])
        for name, optimiser in self._optimisers.items():
            found = {
                key.removeprefix(f"{name}."): value
                for key, value in saved.tensors.items()
                if key.startswith(f"{name}.")
            }
            optimiser.load_state_dict({**optimiser.state_dict(), "state": {0: found} if found else {}})
        self._generator.set_state(saved.tensors["generator"])
        self.trace = Trace(*(row.tolist() for row in saved.tensors["trace"]))
        self._queue, self._parts = list(saved.numbers["queue"]), int(saved.numbers["parts"])

    def open_edges(self) -> EdgeMask:
        """The edges that are more open than not, `(sender, receiver, group)`."""
        return agreed(self.units.kept(self._phi), self.prepared.processes)

    def openness(self) -> NDArray[np.float64]:
        """Log-odds of every edge's least open gate, `(sender, receiver, group)`; `-inf` for no edge."""
        always = torch.cat([self._phi.detach().cpu(), torch.tensor([torch.inf])])
        values = np.full(self.prepared.graph.shape, -np.inf)
        values[self.prepared.graph.edge_mask] = always[self.units.factors].amin(dim=1).double().numpy()
        return agreed(values, self.prepared.processes)

    def _density(self) -> Float[Tensor, ""]:
        """The expected share of kept edges."""
        probabilities = self.units.mask(self.sampler.open_probability(self._phi))
        return probabilities.sum() / self.prepared.graph.n_edges

    @property
    def status(self) -> str:
        """A few words for the progress bar."""
        return f"distance {self.trace.distance[-1]:.3f}, {self.trace.density[-1]:.1%} of the edges"

    def _wanted(self) -> float:
        """The density that the schedule asks for now, falling in equal ratios but where it rests."""
        step = float(len(self.trace.distance))
        for size in self._sizes[:-1]:
            arrived = self._arrival(size)
            if step < arrived:
                break
            if step < arrived + self._rest:
                return size
            step -= self._rest
        done = min(1.0, step / self._ramp)
        return float(self._from ** (1 - done) * self._sizes[-1] ** done)

    def _arrival(self, size: float) -> float:
        """The step at which a schedule without rests falls to a density."""
        whole = math.log(self._from / self._sizes[-1])
        return self._ramp * min(1.0, max(0.0, math.log(self._from / size) / whole)) if whole > 0 else 0.0

    def _distance(self, run: BatchRun, logits: Tensor) -> Tensor:
        """How far the masked run is from the full one: of the whole prediction, and of the behaviour unless
        the prediction alone is to be kept."""
        distance = logits.new_zeros(len(logits))
        if self.settings.keep == "behaviour":
            behaviour = (run.metric(logits) - run.metric(run.base.logits)) / self._scale
            distance = distance + BEHAVIOUR_WEIGHT * behaviour.square()
        if self.prepared.model.chooses:
            distance = distance + divergence(run.clean_logits, logits)
        return distance.mean()


def _initial(units: GatedUnits, over: Over, scores: EdgeScores | None) -> Float[Tensor, " gate"]:
    """The log-odds that the gates start with; those of edges by rank where scores are given."""
    phi = torch.full((units.n_gates,), INITIAL)
    if scores is None:
        return phi
    if scores.graph != units.graph or over == "nodes":
        raise OptionError("a warm start needs scores of the task's own graph, and gates over edges")
    magnitudes = np.abs(scores.values[units.graph.edge_mask])
    ranks = np.argsort(np.argsort(magnitudes, kind="stable"), kind="stable") / max(1, len(magnitudes) - 1)
    low, high = WARM
    phi[: len(ranks)] = torch.from_numpy(low + (high - low) * ranks).float()
    return phi


# -- gates ---------------------------------------------------------------------------------------
# Both kinds have one parameter for each gate, its log-odds `phi` (log alpha for the hard concrete): a gate
# with `phi > 0` is more open than not. They differ in how a training step samples them.
#
# Hard concrete: a stretched and clipped logistic sample, differentiable in `phi`; often exactly 0 or 1.
# Louizos, Welling and Kingma 2018, arXiv:1712.01312.
#
# Uniform gradient sampling (UGS): with probability `w = theta (1 - theta)` a gate is uniform in [0, 1],
# otherwise it is open or shut by chance, such that its mean is `theta`. Only uniform gates get a gradient,
# that of the loss with respect to the gate; in `phi` it needs no weight, as `d theta / d phi = w`.
# Li and Janson 2024, "Optimal ablation for interpretability", arXiv:2409.09951.


@dataclass(frozen=True)
class Sampler:
    """How gates are sampled, and how likely they are to be open.

    Attributes:
        sample: from `phi` and a generator to gates in [0, 1], differentiable.
        open_probability: from `phi` to the probability that a gate is not shut, differentiable.
    """

    sample: Callable[[Float[Tensor, " gate"], torch.Generator], Float[Tensor, " gate"]]
    open_probability: Callable[[Float[Tensor, " gate"]], Float[Tensor, " gate"]]


def _uniform(phi: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform noise like `phi`, drawn on the CPU so that every device sees the same."""
    return torch.rand(phi.shape, generator=generator).to(phi)


def _hard_concrete(phi: Tensor, generator: torch.Generator) -> Tensor:
    noise = _uniform(phi, generator).clamp(1e-6, 1 - 1e-6)
    logits = (noise.log() - (1 - noise).log() + phi) / TEMPERATURE
    low, high = STRETCH
    return (torch.sigmoid(logits) * (high - low) + low).clamp(0, 1)


def _hard_concrete_open(phi: Tensor) -> Tensor:
    low, high = STRETCH
    return torch.sigmoid(phi - TEMPERATURE * math.log(-low / high))


def _ugs(phi: Tensor, generator: torch.Generator) -> Tensor:
    theta = torch.sigmoid(phi.detach())
    weight = theta * (1 - theta)
    choice, level = _uniform(phi, generator), _uniform(phi, generator)
    is_uniform = choice < weight
    # of the rest, `theta - weight / 2` is open, so that the gate's mean is theta
    is_open = (choice >= weight) & (choice < weight + theta - weight / 2)
    gates = torch.where(is_uniform, level, is_open.to(phi))
    return gates + (phi - phi.detach()) * is_uniform


SAMPLERS: dict[SamplerName, Sampler] = {
    "hard-concrete": Sampler(_hard_concrete, _hard_concrete_open),
    "ugs": Sampler(_ugs, torch.sigmoid),
}


# -- what a gate opens ---------------------------------------------------------------------------
# An edge, a node with all its edges, or both at once. Gates over nodes give circuits in which every edge
# between kept nodes is kept. With both, an edge is as open as the product of its own gate and those of the
# two nodes that it joins, so whole nodes can go at once. Sources and readouts are always in.


@dataclass(frozen=True, eq=False)
class GatedUnits:
    """Which gates an edge goes through.

    Attributes:
        graph: whose edges.
        factors: `(edge, factor)`: places of the gates whose product opens an edge. The last place of all is
            a gate that is always open.
        n_gates: number of gates that are learned.
    """

    graph: Graph
    factors: Int64[Tensor, "edge factor"]
    n_gates: int

    def mask(self, gates: Float[Tensor, " gate"]) -> Float[Tensor, "sender receiver group"]:
        """The mask of all edges from the learned gates; 0 where there is no edge."""
        places = torch.from_numpy(np.flatnonzero(self.graph.edge_mask)).to(gates.device)
        always = torch.cat([gates, gates.new_ones(1)])
        opened = always[self.factors.to(gates.device)].prod(dim=1)
        blank = torch.zeros(int(np.prod(self.graph.shape)), dtype=gates.dtype, device=gates.device)
        return blank.scatter(0, places, opened).view(self.graph.shape)

    def kept(self, phi: Float[Tensor, " gate"]) -> EdgeMask:
        """The edges all of whose gates are more open than not."""
        kept: EdgeMask = self.mask((phi.detach() > 0).float()).cpu().numpy() > 0.5
        return kept


def gated_units(graph: Graph, over: Over) -> GatedUnits:
    """The gates of a graph.

    Args:
        graph: whose edges or nodes are gated.
        over: "edges", "nodes" or "both".
    """
    n_edges = graph.n_edges
    own = np.arange(n_edges)[:, None]
    if over == "edges":
        return GatedUnits(graph, torch.from_numpy(own), n_edges)
    inner = [
        node
        for node in graph.nodes
        if graph.stage_of_node[node].senders and graph.stage_of_node[node].receivers
    ]
    first = 0 if over == "nodes" else n_edges
    place = {node: first + index for index, node in enumerate(inner)}
    n_gates = first + len(inner)
    ends = np.array(
        [
            [
                place.get(graph.senders[sender], n_gates),
                place.get(node_of(graph.receivers[receiver]), n_gates),
            ]
            for sender, receiver, _ in np.argwhere(graph.edge_mask)
        ]
    )
    factors = ends if over == "nodes" else np.concatenate([own, ends], axis=1)
    return GatedUnits(graph, torch.from_numpy(factors), n_gates)

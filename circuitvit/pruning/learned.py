"""Learned masks: find the edges to keep by gradient descent on a relaxed mask of all edges at once.

Every edge has a hard-concrete gate in [0, 1]. The gates are trained so that the masked model predicts what
the full model does, KL(full || masked) + 10 ((m - m_all) / (m_all - m_none))^2, under a Lagrangian that
brings the expected share of open gates down along a schedule, geometrically from all edges to the target.
What is handed on is a discrete circuit, the gates that are more open than not; only that is evaluated.

The order of the gates is no ranking to extend: a mask trained for 100 edges does not contain the best 200.

Hard concrete: Louizos, Welling and Kingma 2018, arXiv:1712.01312. Edge pruning: Bhaskar et al. 2024,
"Finding transformer circuits with edge pruning", arXiv:2406.16778.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from circuitvit.attribution import provenance_of
from circuitvit.engine import BatchRun, batch_runs, evaluate, progress_bar, soft_run
from circuitvit.errors import OptionError
from circuitvit.graph import Circuit, EdgeMask
from circuitvit.graph.liveness import live_edges
from circuitvit.models import Model
from circuitvit.pruning.divergence import kl
from circuitvit.tasks import PreparedTask, Task

__all__ = ["LearnedMask", "MaskSettings", "MaskTrainer", "Trace", "learn_mask"]

STRETCH = (-0.1, 1.1)
"""The interval that a gate's sigmoid is stretched to before it is clipped to [0, 1]."""

TEMPERATURE = 2 / 3
INITIAL_LOG_ALPHA = 2.0
BEHAVIOUR_WEIGHT = 10.0


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
    """

    steps: int = 600
    learning_rate: float = 0.1
    multiplier_rate: float = 5.0
    ramp: float = 0.9
    batch_size: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "learning_rate", "multiplier_rate", "ramp", "batch_size"):
            if not getattr(self, name) > 0:
                raise OptionError(f"{name} must be positive, not {getattr(self, name)!r}")


@dataclass
class Trace:
    """What happened at each step of training; lists of equal length.

    Attributes:
        distance: from the full model's prediction and behaviour.
        density: expected share of open gates.
        target: the share that the schedule asked for.
    """

    distance: list[float] = field(default_factory=list)
    density: list[float] = field(default_factory=list)
    target: list[float] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class LearnedMask:
    """A trained mask.

    Attributes:
        circuit: the edges whose gates are more open than not, dead ones pruned.
        log_alpha: of every edge's gate, `(sender, receiver, group)`; `-inf` where there is no edge.
        trace: of the training.
    """

    circuit: Circuit
    log_alpha: NDArray[np.float64]
    trace: Trace


def learn_mask(
    model: Model,
    task: Task | PreparedTask,
    edges: int,
    settings: MaskSettings | None = None,
    *,
    progress: bool = True,
) -> LearnedMask:
    """Train a mask of about `edges` edges.

    Args:
        model: from `load` or `wrap`.
        task: in the noising direction.
        edges: how many gates should be open at the end.
        settings: of the training.
        progress: whether to show a bar.

    Raises:
        OptionError: if `edges` is not between 1 and the number of edges, or the task is denoising.

    Example:
        >>> import circuitvit as cv  # doctest: +SKIP
        >>> circuit = cv.learn_mask(model, task, edges=100).circuit  # doctest: +SKIP
    """
    settings = settings or MaskSettings()
    prepared = task if isinstance(task, PreparedTask) else task.prepare(model)
    trainer = MaskTrainer(prepared, edges, settings)
    with progress_bar(settings.steps, f"mask of {edges} edges", progress) as bar:
        for _ in range(settings.steps):
            trainer.step()
            bar.set_postfix_str(trainer.status, refresh=False)
            bar.update()
    parameters = {"edges": edges, "steps": settings.steps, "batch_size": settings.batch_size}
    provenance = provenance_of(prepared, "learned-mask", settings.seed).with_parameters(**parameters)
    kept = live_edges(prepared.graph, trainer.open_edges())
    return LearnedMask(
        Circuit(prepared.graph, kept, provenance=provenance), trainer.log_alpha(), trainer.trace
    )


class MaskTrainer:
    """The gates of one task and their training, step by step.

    Args:
        prepared: the task, in the noising direction.
        edges: how many gates should be open at the end of the schedule.
        settings: of the training.
    """

    def __init__(self, prepared: PreparedTask, edges: int, settings: MaskSettings) -> None:
        graph = prepared.graph
        if not 1 <= edges <= graph.n_edges:
            raise OptionError(f"asked for {edges} edges of a graph that has {graph.n_edges}")
        if prepared.denoising:
            raise OptionError("masks are learned in the clean run: give the task direction='noising'")
        self.prepared, self.settings, self.trace = prepared, settings, Trace()
        self.target = edges / graph.n_edges
        device = prepared.model.device
        self._places = torch.from_numpy(np.flatnonzero(graph.edge_mask)).to(device)
        self._gates = torch.full((graph.n_edges,), INITIAL_LOG_ALPHA, device=device, requires_grad=True)
        self._multipliers = torch.zeros(2, device=device, requires_grad=True)
        self._descend = torch.optim.Adam([self._gates], lr=settings.learning_rate)
        self._climb = torch.optim.Adam([self._multipliers], lr=settings.multiplier_rate, maximize=True)
        self._generator = torch.Generator().manual_seed(settings.seed)
        ends = evaluate(prepared, [], batch_size=settings.batch_size)
        # one scale for all pairs, as in faithfulness: a pair that hardly differs must not weigh most
        self._scale = max(abs(float((ends.all_values - ends.none_values).double().mean())), 1e-9)
        self._batches = _minibatches(prepared, settings.batch_size, self._generator)

    def step(self) -> None:
        """One step of Adam on one minibatch."""
        run = next(self._batches)
        graph = self.prepared.graph
        noise = torch.rand(len(self._gates), generator=self._generator).to(self._gates)
        mask = torch.zeros(graph.shape, device=self._gates.device).flatten()
        mask = mask.scatter(0, self._places, _sample(self._gates, noise)).view(graph.shape)
        distance = self._distance(run, soft_run(run.sources, mask.to(self.prepared.model.dtype)))
        density = _open_probability(self._gates).mean()
        excess = density - self._wanted()
        loss = distance + self._multipliers[0] * excess + self._multipliers[1] * excess.square()
        self._descend.zero_grad()
        self._climb.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._descend.step()
        self._climb.step()
        self.trace.target.append(self._wanted())
        self.trace.distance.append(distance.item())
        self.trace.density.append(density.item())

    def open_edges(self) -> EdgeMask:
        """The edges whose gates are more open than not, `(sender, receiver, group)`."""
        return self.log_alpha() > 0

    def log_alpha(self) -> NDArray[np.float64]:
        """Log alpha of every gate, `(sender, receiver, group)`; `-inf` where there is no edge."""
        values = np.full(self.prepared.graph.shape, -np.inf)
        values[self.prepared.graph.edge_mask] = self._gates.detach().double().cpu().numpy()
        return values

    @property
    def status(self) -> str:
        """A few words for the progress bar."""
        return f"distance {self.trace.distance[-1]:.3f}, {self.trace.density[-1]:.1%} of the edges"

    def _wanted(self) -> float:
        """The density that the schedule asks for now: from 1 to the target in equal ratios."""
        done = min(1.0, len(self.trace.distance) / (self.settings.ramp * self.settings.steps))
        return math.exp(math.log(self.target) * done)

    def _distance(self, run: BatchRun, logits: Tensor) -> Tensor:
        """How far the masked run is from the full one: of the whole prediction, and of the behaviour."""
        behaviour = (run.metric(logits) - run.metric(run.base.logits)) / self._scale
        return (kl(run.clean_logits, logits) + BEHAVIOUR_WEIGHT * behaviour.square()).mean()


def _sample(log_alpha: Float[Tensor, " edge"], noise: Float[Tensor, " edge"]) -> Float[Tensor, " edge"]:
    """A sample of the hard-concrete gates from uniform noise."""
    noise = noise.clamp(1e-6, 1 - 1e-6)
    logits = (noise.log() - (1 - noise).log() + log_alpha) / TEMPERATURE
    low, high = STRETCH
    return (torch.sigmoid(logits) * (high - low) + low).clamp(0, 1)


def _open_probability(log_alpha: Float[Tensor, " edge"]) -> Float[Tensor, " edge"]:
    """The probability that a gate is not 0."""
    low, high = STRETCH
    return torch.sigmoid(log_alpha - TEMPERATURE * math.log(-low / high))


def _minibatches(prepared: PreparedTask, size: int, generator: torch.Generator) -> Iterator[BatchRun]:
    """Batches of pairs without end, in a new random order each round; their references are computed once."""
    runs = list(batch_runs(prepared, min(size, len(prepared))))
    while True:
        for index in torch.randperm(len(runs), generator=generator).tolist():
            yield runs[index]

"""Thinning: from the whole model to ever smaller circuits, each a step from the one before.

Round after round the circuit of the moment is run on some of the pairs, forward and back. One backward pass
says of every edge that is left what the behaviour would lose without it, to first order in this very circuit,
and a few per cent of the edges go: those without which least is lost. What would be lost is asked anew each
round, as scores that were taken in the whole model say little about a circuit that has lost most of it; a
running mean over rounds steadies what single batches of pairs say.

Nothing is relaxed, so that every circuit on the way is a real one, and one thinning gives a circuit of every
size. What is followed is the mean over pairs, as in faithfulness: single pairs, and classes that the metric
does not look at, may be lost on the way. To keep the prediction, the log-odds of the model's own top class
are followed instead.

To first order an edge's loss is its attribution at the circuit (Syed et al. 2023, arXiv:2310.10348). Nodes
are thinned in the same way by `find_nodes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from circuitvit._keywords import running
from circuitvit.attribution.scoring import provenance_of, without_gradient
from circuitvit.engine import (
    BatchRun,
    Evaluator,
    Saved,
    StateFile,
    progress_bar,
    refuse_inference_mode,
    soft_run,
)
from circuitvit.errors import OptionError, check_number, check_whole
from circuitvit.graph import Circuit, EdgeMask
from circuitvit.graph.results import Record, Result
from circuitvit.models import Model
from circuitvit.pruning.aims import Aim, Band, Keep, check_keep, check_predicts, check_sizes
from circuitvit.pruning.refine import require_noising, without_dead
from circuitvit.tasks import PreparedTask, Task, prepare

ENOUGH = 1.05
"""The share of the behaviour from which on edges go that change it least, whichever way."""


LOWEST = 0.5
"""The gates of all edges that are left stand together between this and 1 when slopes are taken: where two
edges stand in for each other, neither has a slope with both open."""

TRUST = 1.5
"""A round may lose so many times what the slopes promise."""


TRIES = 8
"""Edges that are tried one by one where not even the first can go; if none can, the best of them does."""


@dataclass(frozen=True)
class ThinSettings:
    """How edges are taken away.

    Attributes:
        rate: share of the edges left that go in a round.
        pairs: that a round looks at.
        momentum: what the losses of a round still weigh in the next, between 0 and 1.
        batch_size: pairs at once.
        seed: of the order of the pairs.
        keep: "behaviour", or "prediction" for the model's own top class.
        tolerance: the share of what is followed that a round may lose beyond what the slopes promise.
    """

    rate: float = 0.1
    pairs: int = 16
    momentum: float = 0.5
    batch_size: int = 4
    seed: int = 0
    keep: Keep = "behaviour"
    tolerance: float = 0.03

    def __post_init__(self) -> None:
        for name, least in {"pairs": 1, "batch_size": 1, "seed": 0}.items():
            check_whole(name, getattr(self, name), least)
        check_number("rate", self.rate, 0, 1)
        check_number("momentum", self.momentum, 0, 1)
        check_number("tolerance", self.tolerance, 0, 1)
        check_keep(self.keep)


@dataclass(frozen=True, eq=False, repr=False)
class Thinned(Result):
    """Circuits of falling size, each within the one before.

    Attributes:
        circuits: one for each size asked for, the largest first, dead edges pruned.
        faithfulness: of each, on the pairs that they were found on; verify them on others.
        agreement: share of these pairs whose top class is the model's; None for a model without classes.
    """

    circuits: tuple[Circuit, ...]
    faithfulness: tuple[float, ...]
    agreement: tuple[float, ...] | None = None

    def records(self) -> Iterator[Record]:
        """One row for each circuit: its number of `edges`, their share of all edges (`density`), its
        `faithfulness` and its `agreement`."""
        for place, circuit in enumerate(self.circuits):
            yield {
                "edges": len(circuit),
                "density": circuit.density,
                "faithfulness": self.faithfulness[place],
                "agreement": None if self.agreement is None else self.agreement[place],
            }

    def _check(self) -> None:
        counts = {len(self.circuits), len(self.faithfulness)}
        if len(counts | ({len(self.agreement)} if self.agreement is not None else set())) > 1:
            raise OptionError("there is not one figure for each circuit")

    def __repr__(self) -> str:
        figures = zip(self.circuits, self.faithfulness, strict=True)
        return f"Thinned({', '.join(f'{len(each):,} edges: {value:.3f}' for each, value in figures)})"

    def smallest(self, band: Band = (0.9, 1.1)) -> Circuit | None:
        """The smallest circuit with a faithfulness in the band, on the pairs that it was found on; None if
        none has."""
        inside = [
            circuit
            for circuit, value in zip(self.circuits, self.faithfulness, strict=True)
            if band[0] <= value <= band[1]
        ]
        return min(inside, key=len, default=None)


@running
def thin(
    model: Model,
    task: Task | PreparedTask,
    edges: int | Sequence[int],
    settings: ThinSettings | None = None,
    *,
    state: str | Path | None = None,
    progress: bool = True,
) -> Thinned:
    """Take edges away from the whole model, a few per cent at a time, down to one or several sizes.

    Args:
        model: from `load` or `wrap`.
        task: in the noising direction.
        edges: how many may be left; several sizes cost no more than the smallest of them.
        settings: of the rounds.
        state: a file in which the rounds done are kept: given again after an interruption, with the same
            model, task and settings, it goes on where it was and finds the identical circuits. Deleted at
            the end.
        progress: whether to show a bar.

    Raises:
        OptionError: if a size is not between 1 and the number of edges, the task is denoising, a model
            without classes is to keep its prediction, or the metric has no slope at the whole model.
        DataError: if the metric does not differ between clean and ablated runs.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> model = cv.load("catdog-tiny")
        >>> task = cv.Task(*catdog_pairs(4), metric=cv.logit_diff("cat", "dog"))
        >>> thinned = cv.thin(model, task, [100, 50], progress=False)
        >>> [len(circuit) <= size for circuit, size in zip(thinned.circuits, [100, 50])]
        [True, True]
    """
    settings = settings or ThinSettings()
    prepared = replace(prepare(model, task, progress), processes=False)  # each of them does all of it
    sizes = check_sizes([edges] if isinstance(edges, Integral) else edges, prepared.graph)
    with StateFile(state, prepared, f"thin to {sizes}, {settings}") as kept_in:
        thinner = Thinner(prepared, settings)
        if kept_in.saved is not None:
            thinner.restore(kept_in.saved)
        with progress_bar(prepared.graph.n_edges - sizes[-1], "edges taken away", progress) as bar:
            while len(thinner.passed) < len(sizes):
                bar.update(thinner.step(sizes[len(thinner.passed)]))
                bar.set_postfix_str(f"{thinner.share:.2f} of the behaviour", refresh=False)
                kept_in.keep(partial(replace, thinner.state()))
        return _measured(thinner, sizes)


def _measured(thinner: Thinner, sizes: Sequence[int]) -> Thinned:
    """The circuits that were passed, run on all pairs."""
    prepared, settings, measured = thinner.prepared, thinner.settings, thinner.evaluator
    provenance = provenance_of(prepared, "thin", settings.seed).with_parameters(**asdict(settings))
    circuits = tuple(
        Circuit(prepared.graph, kept, provenance=provenance.with_parameters(edges=size))
        for kept, size in zip(thinner.passed, sizes, strict=True)
    )
    return Thinned(
        circuits,
        tuple(measured.faithfulness(each) for each in circuits),
        tuple(measured.agreement(each) for each in circuits) if prepared.model.chooses else None,
    )


class Thinner:
    """The rounds of a thinning.

    Args:
        prepared: the task, in the noising direction.
        settings: of the rounds.
        evaluator: of the same task, so that what it has run is not run again.

    Raises:
        OptionError: for what `thin` refuses.
        DataError: likewise.

    Attributes:
        kept: the edges that are left, `(sender, receiver, group)`.
        share: of the behaviour that was kept before the last round, on its pairs.
        passed: what was left at each of the sizes reached.
    """

    def __init__(
        self, prepared: PreparedTask, settings: ThinSettings, evaluator: Evaluator | None = None
    ) -> None:
        refuse_inference_mode()
        require_noising(prepared)
        _check_slope(prepared, settings.keep)
        self.prepared, self.settings = prepared, settings
        size = min(settings.batch_size, len(prepared))
        self.evaluator = evaluator or Evaluator(prepared, batch_size=size)
        self._rows = prepared.row_ranges(size)
        if settings.keep == "behaviour":
            self.evaluator.check_effect(level=0)
        Aim(settings.keep).check(self.evaluator)
        self._effect = 1.0
        nothing = np.zeros(prepared.graph.shape, dtype=bool)
        self._effect = 1 - self._share(self.evaluator.at(self._rows), nothing)
        self.share = 1.0
        self.kept: EdgeMask = without_dead(prepared, prepared.graph.edge_mask)
        self.passed: list[EdgeMask] = []
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._queue: list[int] = []  # the batches that are left of this turn, the next one last
        self._losses, self._weight = np.zeros(self.kept.shape), 0.0

    def step(self, least: int) -> int:
        """One round, unless so few edges are left already; what is left then has been passed.

        Returns:
            How many edges went.
        """
        before = int(self.kept.sum())
        if before > least:
            runs = self._next()
            self._look(runs)
            self.share = self._share(runs, self.kept)
            self.kept = self._cut(runs, min(max(1, round(self.settings.rate * before)), before - least))
        if self.kept.sum() <= least:
            self.passed.append(self.kept)
        return before - int(self.kept.sum())

    def _next(self) -> list[BatchRun]:
        """The next pairs in turn, batch by batch."""
        wanted = min(-(-self.settings.pairs // len(self._rows[0])), len(self._rows))
        parts: list[range] = []
        while len(parts) < wanted:
            if not self._queue:
                self._queue = torch.randperm(len(self._rows), generator=self._generator).tolist()
            parts.append(self._rows[self._queue.pop()])
        return list(self.evaluator.at(parts))

    def _cut(self, runs: list[BatchRun], count: int) -> EdgeMask:
        """The circuit without the edges that would be missed least, fewer of them as long as more is lost
        than they promise: of two that stand in for each other, none is missed before the other has gone."""
        losses = self._losses / self._weight
        missed = np.abs(losses) if self.share >= ENOUGH else losses
        order = np.argsort(np.where(self.kept, missed, np.inf), axis=None, kind="stable")
        while count > 1:
            rest = self._without(order[:count])
            if self._may_go(runs, rest, losses.flat[order[:count]].sum())[0]:
                return rest
            count //= 2
        tried: list[tuple[float, EdgeMask]] = []
        for place in order[: min(TRIES, int(self.kept.sum()))]:
            rest = self._without([place])
            holds, share = self._may_go(runs, rest, losses.flat[place])
            if holds:
                return rest
            tried.append((share, rest))
        return max(tried, key=lambda each: each[0])[1]

    def _without(self, places: Sequence[int] | NDArray[np.intp]) -> EdgeMask:
        """The circuit without some edges, and without those that do nothing then."""
        rest = self.kept.copy()
        rest.flat[places] = False
        return without_dead(self.prepared, rest)

    def _may_go(self, runs: list[BatchRun], rest: EdgeMask, promised: float) -> tuple[bool, float]:
        """Whether a cut loses no more than it may, and the share that it leaves."""
        share = self._share(runs, rest)
        return min(self.share, 1.0) - share <= self.settings.tolerance + TRUST * max(0.0, promised), share

    def _look(self, runs: list[BatchRun]) -> None:
        """Run the circuit on some pairs, forward and back, for what it would lose without each edge."""
        found, pairs = np.zeros(self.kept.shape), 0
        for run in runs:
            found += self._slopes(run)
            pairs += len(run.base.logits)
        momentum = self.settings.momentum
        self._losses = momentum * self._losses + found / pairs
        self._weight = momentum * self._weight + 1

    @torch.enable_grad()
    def _slopes(self, run: BatchRun) -> Float[np.ndarray, "sender receiver group"]:
        """What is lost without each edge, summed over a batch, where all gates stand at one random height."""
        height = LOWEST + (1 - LOWEST) * float(torch.rand((), generator=self._generator))
        dtype = self.prepared.model.dtype
        mask = torch.from_numpy(height * self.kept).to(self.prepared.model.device, dtype).requires_grad_()
        value = self._values(run, soft_run(run.sources, mask, possible=self.kept)).sum()
        (slopes,) = torch.autograd.grad(value, mask)
        found: NDArray[np.float64] = slopes.double().cpu().numpy()
        return found

    def _share(self, runs: Iterable[BatchRun], kept: EdgeMask) -> float:
        """How much a circuit keeps on some pairs; 1 is as much as the whole model."""
        return 1 + float(torch.cat([self._values(run, run.logits(kept)) for run in runs]).mean())

    def _values(self, run: BatchRun, logits: Tensor) -> Float[Tensor, " batch"]:
        """What is followed, less that of the whole model, in units of the whole effect."""
        return (self._followed(run, logits) - self._followed(run, run.base.logits)) / self._effect

    def _followed(self, run: BatchRun, logits: Tensor) -> Float[Tensor, " batch"]:
        """The metric, or the log-odds of the model's own top class, which do not level off as odds rise."""
        if self.settings.keep == "behaviour":
            return run.metric(logits)
        chosen = run.clean_logits.argmax(dim=-1, keepdim=True)
        others = logits.scatter(-1, chosen, -torch.inf).logsumexp(dim=-1)
        return logits.gather(-1, chosen)[:, 0] - others

    def state(self) -> Saved:
        """Everything that the next round needs, copied."""
        tensors = {
            "passed": torch.from_numpy(np.array([self.kept, *self.passed]).astype(np.uint8)),
            "losses": torch.from_numpy(self._losses.copy()),
            "generator": self._generator.get_state(),
        }
        numbers = {"queue": list(self._queue), "weight": self._weight}
        return Saved(tensors, numbers)

    def restore(self, saved: Saved) -> None:
        """Go on where another thinner of the same task and settings was."""
        self.kept, *self.passed = saved.tensors["passed"].numpy().astype(bool)
        self._losses = saved.tensors["losses"].numpy().copy()
        self._generator.set_state(saved.tensors["generator"])
        self._queue = list(saved.numbers["queue"])
        self._weight = saved.numbers["weight"]


def _check_slope(prepared: PreparedTask, keep: Keep) -> None:
    """Refuse what has no slope to go by.

    Raises:
        OptionError: saying what to do.
    """
    if keep == "prediction":
        check_predicts(prepared.model)
        return
    if why := without_gradient(prepared):
        others = ", keep='prediction'" if prepared.model.chooses else ""
        raise OptionError(
            f"thinning begins at the clean run and goes by the metric's slope, and {why}: choose another "
            f"metric{others}, or learn_mask"
        )

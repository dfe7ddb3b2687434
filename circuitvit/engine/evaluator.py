"""The one evaluator of masked runs: what circuits make of a task's metric, each circuit run once.

Searches and tests ask for the same few runs again and again: the whole model, the circuit, the circuit
without an edge. An `Evaluator` runs a circuit the first time that anybody asks for it and remembers what was
measured. Captured batches are held in memory as far as a budget goes; past it they are captured anew for
each run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from circuitvit._keywords import running
from circuitvit._progress import progress_bar
from circuitvit.engine.batches import (
    BatchRun,
    batch_run,
    bytes_per_pair,
    choose_batch_size,
    memory_budget,
)
from circuitvit.engine.effect import ROUNDING, check_effect, same_on_average
from circuitvit.engine.many import masked_runs
from circuitvit.engine.masked import masked_run
from circuitvit.engine.processes import agreed, own_part, place_in_group, summed
from circuitvit.engine.references import References, reference_source
from circuitvit.engine.slopes import edge_slopes
from circuitvit.errors import DataError, OptionError, check_whole, counted
from circuitvit.graph import CircuitLike, EdgeMask, Graph, as_circuit
from circuitvit.models import Model
from circuitvit.tasks import Batch, PreparedTask, Task, divergence, prepare

T = TypeVar("T")

HELD_BYTES = 8 * 2**30
"""Bytes that the batches of a search may take that cannot do without any of them, unless told otherwise."""

TOGETHER, TOGETHER_BYTES = 256, 2**26
"""Circuits that are run together, and what their masks may take."""


@dataclass(frozen=True, eq=False)
class Measured:
    """What a masked run gave for each pair.

    Attributes:
        values: the metric, `(pair,)`.
        tops: the index of the top class, `(pair,)`.
        divergence: KL(clean run || masked run) of the predicted classes in nats, `(pair,)`; None where the
            model has no classes.
        change: the largest absolute change of a logit against the clean run, `(pair,)`.
    """

    values: Float[NDArray[np.float64], " pair"]
    tops: Int64[NDArray[np.int64], " pair"]
    divergence: Float[NDArray[np.float64], " pair"] | None
    change: Float[NDArray[np.float64], " pair"]


class Evaluator:
    """Masked runs of one prepared task; every circuit is run once, whoever asks.

    A circuit is given as whatever means one (see `as_circuit`) or as a boolean mask `(sender, receiver,
    group)` of the edges that are kept: in the clean run, all else ablated; for a denoising task, restored in
    the corrupt run. Where the model's weights are edited in place, what was measured is forgotten.

    Of a task that processes share, all must ask for the same in the same order: each runs whole batches, the
    same as one process would with that batch size, and all are given the values of all pairs.

    Args:
        prepared: the task.
        batch_size: pairs at once; by default what `memory` allows.
        memory: bytes that a batch, and what is kept between runs, may take.
        progress: whether to show a bar.

    Raises:
        OptionError: if the batch size or the budget is not positive.

    Attributes:
        runs: how many circuits were run; those recalled from an earlier run's table count as well.
        after_run: called whenever something new is known, so that it can be saved.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> model = cv.load("catdog-tiny")
        >>> task = cv.Task(*catdog_pairs(2), metric=cv.logit_diff("cat", "dog"))
        >>> evaluator = Evaluator(task.prepare(model))
        >>> evaluator.whole.shape, round(evaluator.faithfulness(cv.Circuit.full(model.graph)), 6)
        ((2,), 1.0)
        >>> evaluator.runs  # the whole model, and nothing of it
        2
    """

    def __init__(
        self,
        prepared: PreparedTask,
        *,
        batch_size: int | None = None,
        memory: int | str | None = None,
        progress: bool = False,
    ) -> None:
        if batch_size is not None:
            check_whole("the batch size (batch_size)", batch_size)
        self.prepared, self.progress, self.runs = prepared, progress, 0
        among = place_in_group(prepared.processes)[1]
        share = -(-len(prepared) // among)  # of the pairs; a batch is never divided
        self.batch_size = batch_size or min(choose_batch_size(prepared, memory), share)
        self.after_run: Callable[[], None] = lambda: None
        self._rows = prepared.row_ranges(self.batch_size)
        self._memory, self._given = memory_budget(prepared.model, memory), memory is not None
        self._known: dict[bytes, Measured] = {}
        self._recalled: dict[bytes, Measured] = {}
        self._alone: set[bytes] = set()  # those of runs of their own
        self._held: dict[range, BatchRun] = {}
        self._source: References | None = None
        self._checked: set[float] = set()  # levels
        self._own = slice(None) if among > self.n_batches else own_part(self.n_batches, prepared.processes)
        self._largest = 0.0  # of the clean run's logits
        self._weights = prepared.model.weights_version

    def __len__(self) -> int:
        """The number of pairs."""
        return len(self.prepared)

    @property
    def graph(self) -> Graph:
        return self.prepared.graph

    # what was measured

    def measure(self, masks: Sequence[EdgeMask | CircuitLike]) -> list[Measured]:
        """What several circuits give; those that are new are run together, batch after batch.

        What they have in common is computed once (`engine/many.py`). Numbers are those of runs one by one up
        to rounding, of which some is left by whatever runs beside; top classes, and all with every edge or
        none, do not hang on it. Where rounding could decide, ask for `settled`.

        Raises:
            DataError: if the metric is NaN or infinite, naming the pair.
            OptionError: if a circuit belongs to another graph.
        """
        self._forget_if_edited()
        kept = [self._kept(mask) for mask in masks]
        keys = [_key(mask) for mask in kept]
        new = {key: mask for key, mask in zip(keys, kept, strict=True) if key not in self._known}
        if new:
            self.runs += len(new)
            missing = {key: mask for key, mask in new.items() if key not in self._recalled}
            found = dict(zip(missing, self._run_all(list(missing.values())), strict=True)) if missing else {}
            self._known |= {key: found.get(key) or self._recalled[key] for key in new}
            self.after_run()
        return [self._known[key] for key in keys]

    def settled(self, mask: EdgeMask | CircuitLike) -> Measured:
        """What a circuit gives in a run of its own, from now on: the same whatever was run together before.

        Raises:
            DataError: if the metric is NaN or infinite, naming the pair.
            OptionError: if the circuit belongs to another graph.
        """
        self.measure([mask])
        kept = self._kept(mask)
        key = _key(kept)
        if key not in self._alone:
            (self._known[key],) = self._run_all([kept])
            self.after_run()
        return self._known[key]

    def values(self, mask: EdgeMask | CircuitLike) -> Float[NDArray[np.float64], " pair"]:
        """The metric of each pair with only a circuit kept."""
        return self.measure([mask])[0].values

    def many(self, masks: Sequence[EdgeMask | CircuitLike]) -> Float[NDArray[np.float64], "mask pair"]:
        """The metric of each pair with each of several circuits."""
        found = [each.values for each in self.measure(masks)]
        return np.stack(found) if found else np.zeros((0, len(self)))

    def tops(self, mask: EdgeMask | CircuitLike) -> Int64[NDArray[np.int64], " pair"]:
        """The top class of each pair with only a circuit kept."""
        return self.measure([mask])[0].tops

    @property
    def whole(self) -> Float[NDArray[np.float64], " pair"]:
        """The metric with every edge kept."""
        return self.values(self.graph.edge_mask)

    @property
    def nothing(self) -> Float[NDArray[np.float64], " pair"]:
        """The metric with every edge ablated."""
        return self.values(self._nothing)

    @property
    def effect(self) -> Float[NDArray[np.float64], " pair"]:
        """What there is to explain: whole minus nothing."""
        return self.whole - self.nothing

    def faithfulness(self, mask: EdgeMask | CircuitLike) -> float:
        """The share of the behaviour that a circuit keeps, a ratio of means over pairs.

        Raises:
            DataError: if there is no behaviour to explain, see `check_effect`.
        """
        self.check_effect(level=0)  # a search is about these pairs, whatever others may say
        effect = self.effect.mean()
        return float((self.values(mask) - self.nothing).mean() / effect)

    def agreement(self, mask: EdgeMask | CircuitLike) -> float:
        """The share of pairs whose top class with a circuit is that with every edge kept, 0 to 1."""
        whole, kept = self.measure([self.graph.edge_mask, mask])
        return float((whole.tops == kept.tops).mean())

    def divergence(self, mask: EdgeMask | CircuitLike) -> float:
        """KL(clean run || masked run) in nats, the mean over pairs.

        Raises:
            OptionError: if the model has no classes, whose predictions could differ.
        """
        self._require_classes()
        (kept,) = self.measure([mask])
        assert kept.divergence is not None, "there are classes"
        return float(kept.divergence.mean())

    def slopes(
        self,
        mask: EdgeMask | CircuitLike,
        *,
        of: Literal["metric", "divergence"] = "metric",
        absent: bool = False,
    ) -> Float[NDArray[np.float64], "sender receiver group"]:
        """How a mean over pairs moves with each edge's gate, from one forward and one backward of a circuit.

        The first-order answer to what the circuit would lose without an edge, or gain with one; not
        remembered.

        Args:
            mask: the circuit.
            of: the metric, or KL(clean run || masked run) in nats.
            absent: give what edges that are not in the circuit would bring, too, for which all nodes run.

        Returns:
            The derivatives by the gates of the circuit's edges; 0 for all others, unless asked for.

        Raises:
            OptionError: if the model has no classes, whose predictions could differ; or under
                `torch.inference_mode`.
        """
        if of == "divergence":
            self._require_classes()
        self._forget_if_edited()
        kept = self._kept(mask)
        total = np.zeros(self.graph.shape)
        for run in self.at(self._rows[self._own]):

            def objective(logits: Tensor, run: BatchRun = run) -> Tensor:
                return run.metric(logits) if of == "metric" else divergence(run.clean_logits, logits)

            # Denoising restores the circuit in the corrupt run, where its edges are those that are not kept.
            every = absent or self.prepared.denoising
            total += edge_slopes(run.sources, self._base_mask(kept), objective, absent=every)
        total = self.agreed(summed(total, self.prepared.processes and len(self.own) < self.n_batches))
        total /= -len(self) if self.prepared.denoising else len(self)
        return total if absent else np.where(kept, total, 0.0)

    def check_effect(self, level: float = 0.95) -> None:
        """Refuse a task in which ablating every edge need not change anything.

        Args:
            level: of the interval that must not hold 0; with 0, only differences within rounding are refused.

        Raises:
            DataError: if the logits are the same, or as `check_effect` of this module.
        """
        self._forget_if_edited()
        if level in self._checked:
            return
        metric, names = self.prepared.metric.label, self.prepared.clean.names
        try:
            check_effect(self.whole, self.nothing, label=metric, names=names, level=level)
        except DataError as error:
            raise DataError(f"{error}{same_on_average(self.prepared)}") from error
        (none,) = self.measure([self._nothing])
        if self._largest and none.change.max() <= ROUNDING * self._largest:
            # some metrics magnify rounding: on equal images a divergence is 0 with every edge, 1e-8 with none
            pairs = counted(len(self), "pair")
            raise DataError(
                f"the logits are the same with and without the behaviour, on all of {pairs}: are the clean "
                "and the corrupt images the same?"
            )
        self._checked.add(level)

    def agreed(self, value: T) -> T:
        """The first process's value where several share the work, such as a number that a clock gave."""
        return agreed(value, self.prepared.processes)

    # what is run

    @torch.no_grad()
    def logits(self, mask: EdgeMask | CircuitLike) -> Float[Tensor, "pair class"]:
        """The logits with only a circuit kept, on the CPU; run every time, as they are not remembered."""
        base = self._base_mask(self._kept(mask))
        with progress_bar(len(self), "masked runs", self.progress) as bar:
            found = []
            for run in self.batches():
                found.append(masked_run(run.sources, base).cpu())
                bar.update(len(run.batch.rows))
        return torch.cat(found)

    @property
    def n_batches(self) -> int:
        return len(self._rows)

    def batches(self) -> Iterator[BatchRun]:
        """All batches in order: those that are held, and the others captured anew."""
        return self.at(self._rows)

    def at(self, parts: Sequence[range]) -> Iterator[BatchRun]:
        """The batches of some rows each; files of the next are decoded while one is worked on."""
        self._forget_if_edited()
        held = [self._held.get(rows) for rows in parts]
        missing = [rows for rows, known in zip(parts, held, strict=True) if known is None]
        read = self.prepared.batches_at(missing)
        for rows, known in zip(parts, held, strict=True):
            yield known or self._captured(rows, next(read))

    def batch(self, number: int) -> BatchRun:
        """One batch; it is held from now on if it fits the budget.

        Raises:
            ModelError: if a run gives NaN or infinite logits.
        """
        return self.pairs(self._rows[number])

    def pairs(self, rows: range) -> BatchRun:
        """Some pairs in a row as a batch, held likewise."""
        self._forget_if_edited()
        return self._held.get(rows) or self._captured(rows, self.prepared.batch(rows))

    def _captured(self, rows: range, batch: Batch) -> BatchRun:
        run = batch_run(self.prepared, batch, self._references())
        if run.sources.nbytes + sum(each.sources.nbytes for each in self._held.values()) <= self._memory:
            self._held[rows] = run
        return run

    @property
    def own(self) -> range:
        """Numbers of the batches that this process runs; all, where there are fewer than processes."""
        return range(self.n_batches)[self._own]

    def own_batches(self) -> list[BatchRun]:
        """These at once, for searches whose own state is as large as what is held.

        Raises:
            DataError: if they would take more than the budget given, or 8 GiB; the message says how many
                pairs fit.
        """
        limit = self._memory if self._given else HELD_BYTES
        each = bytes_per_pair(self.prepared)
        count = sum(len(self._rows[number]) for number in self.own)
        total = count * each
        if total > limit:
            raise DataError(
                f"{count} pairs would take {total / 2**30:.2g} GiB of memory during the search, and the "
                f"budget is {limit / 2**30:.2g} GiB: give at most {max(1, limit // each)} pairs to search on "
                "and verify on the others, or raise memory="
            )
        return list(self.at(self._rows[self._own]))

    # state files

    def table(self) -> dict[str, Tensor]:
        """Everything measured so far, for `recall`: `masks` `(run, byte)`, packed, and what they gave."""
        known = {
            **self._known,
            **{key: each for key, each in self._recalled.items() if key not in self._known},
        }
        width = len(np.packbits(self.graph.edge_mask))
        masks = np.frombuffer(b"".join(known), dtype=np.uint8).reshape(len(known), width).copy()
        columns = {"values": np.float64, "tops": np.int64, "divergence": np.float64, "change": np.float64}
        found: dict[str, Tensor] = {"masks": torch.from_numpy(masks)}
        for name, kind in columns.items():
            rows = [getattr(each, name) for each in known.values()]
            if not any(row is None for row in rows):
                found[name] = torch.from_numpy(np.array(rows, dtype=kind).reshape(len(rows), len(self)))
        return found

    def recall(self, table: Mapping[str, Tensor], runs: int = 0) -> None:
        """Take what an earlier run measured instead of measuring; it counts as runs all the same, so that a
        search repeated on it takes the same way.

        Args:
            table: of the earlier run, in the order in which things were asked for.
            runs: how many of them have been asked for by the place where the search goes on.
        """
        names = ("values", "tops", "divergence", "change")
        columns = [table[name].numpy() if name in table else [None] * len(table["masks"]) for name in names]
        rows = zip(table["masks"].numpy(), *columns, strict=True)
        self._recalled = {mask.tobytes(): Measured(*given) for mask, *given in rows}
        if runs:
            self._known, self.runs = dict(list(self._recalled.items())[:runs]), runs

    # inside

    def _forget_if_edited(self) -> None:
        now = self.prepared.model.weights_version
        if now != self._weights:
            self._weights, self._source, self._largest = now, None, 0.0
            for known in (self._known, self._recalled, self._alone, self._held, self._checked):
                known.clear()

    def _require_classes(self) -> None:
        if not self.prepared.model.chooses:
            name = self.prepared.model.name
            raise OptionError(f"the outputs of {name} are no classes, so there is no KL of predictions")

    def _references(self) -> References:
        """Data-set statistics that references need are computed once."""
        if self._source is None:
            self._source = reference_source(self.prepared, self.batch_size)
        return self._source

    @cached_property
    def _nothing(self) -> EdgeMask:
        return np.zeros(self.graph.shape, dtype=bool)

    def _kept(self, mask: EdgeMask | CircuitLike) -> EdgeMask:
        if not isinstance(mask, np.ndarray):
            mask = as_circuit(mask, self.graph).kept
        if mask.shape != self.graph.shape:
            raise OptionError(f"a mask of shape {mask.shape} for a graph of shape {self.graph.shape}")
        return mask & self.graph.edge_mask

    def _base_mask(self, kept: EdgeMask) -> EdgeMask:
        """The edges that keep the outputs of the run that is intervened on.

        Noising keeps the circuit and ablates the rest of the clean run. Denoising restores the circuit in the
        corrupt run: its edges get the reference (clean) outputs, so what is kept is its complement.
        """
        return self.graph.edge_mask & ~kept if self.prepared.denoising else kept

    def _run_all(self, masks: list[EdgeMask]) -> list[Measured]:
        """What masks give on all pairs; all edges, and none, are run alone, as everything is held against
        them.

        Each process runs its batches, or its masks where these are too few; whatever is measured is measured
        by one of them, and all know it.
        """
        coarse, whole = torch.finfo(self.prepared.model.dtype).eps > ROUNDING, self.graph.edge_mask
        alone = [coarse or len(masks) == 1 or not mask.any() or np.array_equal(mask, whole) for mask in masks]
        self._alone |= {_key(mask) for mask, own in zip(masks, alone, strict=True) if own}
        if not self.prepared.processes:
            return [self._finite(each) for each in self._run(masks, alone)]
        pairs = slice(self._rows[self.own[0]].start, self._rows[self.own[-1]].stop)
        mine = own_part(len(masks)) if len(self.own) == self.n_batches else slice(None)
        found = np.zeros((5, len(masks), len(self)))
        for place, each in zip(range(len(masks))[mine], self._run(masks[mine], alone[mine]), strict=True):
            columns = each.values, each.tops, each.change, each.divergence, self._largest
            for row, column in zip(found, columns, strict=True):
                row[place, pairs] = 0.0 if column is None else column
        values, tops, change, divergence, largest = summed(found, self.prepared.processes)
        self._largest = max(self._largest, float(largest.max()))
        rows = zip(
            values, tops.astype(np.int64), divergence if self.prepared.model.chooses else [None] * len(masks),
            change, strict=True,
        )  # fmt: skip
        return [self._finite(Measured(*row)) for row in rows]

    @torch.no_grad()
    def _run(self, masks: list[EdgeMask], alone: list[bool]) -> list[Measured]:
        """What masks give on this process's own pairs, some of them in runs of their own."""
        fitting = max(1, min(TOGETHER, TOGETHER_BYTES // self.graph.edge_mask.nbytes))
        found: list[list[tuple[Tensor, ...]]] = [[] for _ in range(0, len(masks), fitting)]
        with progress_bar(len(masks) * len(self), "masked runs", self.progress) as bar:
            for run in self.at(self._rows[self._own] if masks else []):
                self._largest = max(self._largest, float(run.clean_logits.abs().max()))
                for place, few in enumerate(found):
                    own = slice(place * fitting, (place + 1) * fitting)
                    few.append(self._judged(run, self._logits(run, masks[own], alone[own])))
                    bar.update(len(masks[own]) * len(run.batch.rows))
        return [each for few in found for each in _joined(few)]

    def _logits(
        self, run: BatchRun, masks: list[EdgeMask], alone: list[bool]
    ) -> Float[Tensor, "mask batch class"]:
        """The logits of a batch under each mask, some of which are run alone, and so are those under which
        rounding could decide what the top class is."""
        bases = [self._base_mask(mask) for mask in masks]
        joint = [place for place, own in enumerate(alone) if not own]
        found: dict[int, Tensor] = {}
        if len(joint) > 1:
            logits = masked_runs(run.sources, np.stack([bases[place] for place in joint]))
            clear = zip(joint, logits, _is_clear(logits).tolist(), strict=True)
            found = {place: own for place, own, is_clear in clear if is_clear}
        each = enumerate(bases)
        return torch.stack([found[n] if n in found else masked_run(run.sources, base) for n, base in each])

    def _judged(self, run: BatchRun, logits: Float[Tensor, "mask batch class"]) -> tuple[Tensor, ...]:
        """The four numbers of `Measured` for each mask and pair of a batch."""
        columns = [run.metric(logits).double(), logits.argmax(dim=-1)]
        columns.append((logits - run.clean_logits).abs().amax(dim=-1).double())
        if self.prepared.model.chooses:
            columns.append(divergence(run.clean_logits.double(), logits.double()).clamp_min(0.0))
        return tuple(column.cpu() for column in columns)

    def _finite(self, measured: Measured) -> Measured:
        for column in (measured.values, measured.tops, measured.divergence, measured.change):
            if column is not None:
                column.setflags(write=False)  # everybody who asks is given the same
        bad = np.flatnonzero(~np.isfinite(measured.values))
        if len(bad):
            raise DataError(
                f"the metric {self.prepared.metric.label} is NaN or infinite for "
                f"{self.prepared.clean.names[bad[0]]} in a run with ablated edges: "
                "choose one that is finite for all logits"
            )
        return measured


# -- functions -----------------------------------------------------------------------------------


@running
def run(
    model: Model,
    task: Task | PreparedTask,
    circuit: CircuitLike | None = None,
    *,
    ablate: CircuitLike | None = None,
    batch_size: int | None = None,
    memory: int | str | None = None,
    progress: bool = True,
) -> Float[Tensor, "pair class"]:
    """The logits with everything outside `circuit` ablated, or with the edges of `ablate` ablated.

    In the denoising direction: with the circuit restored in the corrupt run (or everything but `ablate`).

    Raises:
        OptionError: if not exactly one of `circuit` and `ablate` is given.

    Example:
        >>> import circuitvit as cv  # doctest: +SKIP
        >>> logits = cv.run(
        ...     model, task, cv.Circuit.from_edges(model.graph, ["input->logits"])
        ... )  # doctest: +SKIP
    """
    if (circuit is None) == (ablate is None):
        raise OptionError("give either the circuit to keep, or ablate= with the edges to remove")
    evaluator = Evaluator(prepare(model, task), batch_size=batch_size, memory=memory, progress=progress)
    given = circuit if ablate is None else ablate
    kept = as_circuit(given, evaluator.graph)  # type: ignore[arg-type]  # one of the two is given
    return evaluator.logits(kept if ablate is None else ~kept)


def _joined(parts: list[tuple[Tensor, ...]]) -> list[Measured]:
    """What circuits give, of what they give for each batch."""
    values, tops, change, *rest = (torch.cat(column, dim=1).numpy() for column in zip(*parts, strict=True))
    kl = rest[0] if rest else [None] * len(values)
    return [Measured(*each) for each in zip(values, tops, kl, change, strict=True)]


def _key(mask: EdgeMask) -> bytes:
    """What a mask is known by."""
    return np.packbits(mask).tobytes()


def _is_clear(logits: Float[Tensor, "mask batch class"]) -> Bool[Tensor, " mask"]:
    """Under which masks the top class of every image is ahead of the next by more than rounding."""
    if logits.shape[-1] < 2:
        return torch.ones(len(logits), dtype=torch.bool)
    first, second = logits.topk(2, dim=-1).values.unbind(dim=-1)
    ahead = first - second > ROUNDING * logits.abs().amax(dim=-1)
    return ahead.all(dim=-1)

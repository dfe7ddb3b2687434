"""Running a circuit, its complement and random circuits on the pairs of a task, and what follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from circuitvit.engine import Evaluator
from circuitvit.errors import DataError
from circuitvit.graph import Circuit
from circuitvit.tasks import PreparedTask
from circuitvit.tasks.classes import class_label
from circuitvit.verification.bootstrap import (
    Bootstrap,
    mean_interval,
    ratio_interval,
    share_interval,
)
from circuitvit.verification.faithfulness import ROUNDING, faithfulness, require_effect
from circuitvit.verification.report import QUANTILES, PairFailure, PairResult, RandomBaseline, Section

WEAK = 0.1
"""A pair is weak when its metric differs by less than this share of the mean difference."""

FAR = 0.5
"""The circuit fails on a pair when its metric is off by more than this share of the mean behaviour."""

TIE = 1e-6
"""Random circuits within this of the circuit's faithfulness are as good: equals differ by rounding."""


@dataclass(frozen=True, eq=False)
class Runs:
    """Metrics in float64 and logits of every run that a section is made of.

    Attributes:
        prepared: the task.
        whole: the metric with every edge kept.
        nothing: with every edge ablated.
        circuit: with only the circuit kept.
        complement: with only the circuit ablated.
        random: with each random circuit.
        whole_logits: with every edge kept.
        nothing_logits: with every edge ablated.
        circuit_logits: with only the circuit kept.
        complement_logits: with only the circuit ablated.
    """

    prepared: PreparedTask
    whole: Float[NDArray[np.float64], " pair"]
    nothing: Float[NDArray[np.float64], " pair"]
    circuit: Float[NDArray[np.float64], " pair"]
    complement: Float[NDArray[np.float64], " pair"]
    random: Float[NDArray[np.float64], "circuit pair"]
    whole_logits: Float[Tensor, "pair class"]
    nothing_logits: Float[Tensor, "pair class"]
    circuit_logits: Float[Tensor, "pair class"]
    complement_logits: Float[Tensor, "pair class"]


def run_circuits(
    prepared: PreparedTask, circuit: Circuit, randoms: Sequence[Circuit], batch_size: int, progress: bool
) -> Runs:
    """Run a circuit, its complement and random circuits on all pairs.

    Args:
        prepared: the task.
        circuit: to verify.
        randoms: to compare with.
        batch_size: pairs at once.
        progress: whether to show a bar.

    Raises:
        OptionError: if the circuit belongs to another graph.
        DataError: if the metric is NaN or infinite.
    """
    evaluator = Evaluator(prepared, batch_size=batch_size, progress=progress)
    values = evaluator.many([circuit, ~circuit, *randoms])
    ends = (evaluator.graph.edge_mask, np.zeros(evaluator.graph.shape, dtype=bool))
    logits = [evaluator.logits(each).double() for each in (*ends, circuit, ~circuit)]
    return Runs(
        prepared,
        whole=evaluator.whole,
        nothing=evaluator.nothing,
        circuit=values[0],
        complement=values[1],
        random=values[2:],
        whole_logits=logits[0],
        nothing_logits=logits[1],
        circuit_logits=logits[2],
        complement_logits=logits[3],
    )


def section(
    images: str, runs: Runs, circuit: Circuit, randoms: Sequence[Circuit], settings: Bootstrap
) -> Section:
    """The figures of one set of pairs.

    Args:
        images: "task" or "held-out".
        runs: from `run_circuits`.
        circuit: that was run.
        randoms: that were run.
        settings: of the intervals.

    Raises:
        DataError: if the metric does not differ with and without the behaviour, see `require_effect`.
    """
    names, label = runs.prepared.clean.names, runs.prepared.metric.label
    _refuse_same_logits(runs)
    require_effect(runs.whole, runs.nothing, label=label, names=names, settings=settings)
    effect = runs.whole - runs.nothing
    weight = effect * np.sign(effect.mean())
    tops = [logits.argmax(dim=-1) for logits in (runs.whole_logits, runs.circuit_logits)]
    kl = _kl(runs.whole_logits, runs.circuit_logits)
    pairs = _pairs(runs, kl)
    return Section(
        images=images,
        task=runs.prepared.label,
        n_pairs=len(runs.whole),
        whole=mean_interval(runs.whole, settings),
        nothing=mean_interval(runs.nothing, settings),
        circuit=mean_interval(runs.circuit, settings),
        complement=mean_interval(runs.complement, settings),
        faithfulness=ratio_interval(runs.circuit - runs.nothing, effect, settings),
        complement_faithfulness=ratio_interval(runs.complement - runs.nothing, effect, settings),
        necessity=ratio_interval(runs.whole - runs.complement, effect, settings),
        agreement=share_interval((tops[0] == tops[1]).numpy(), settings),
        kl=mean_interval(kl, settings),
        weak_pairs=int((np.abs(weight) < WEAK * weight.mean()).sum()),
        opposite_pairs=int((weight < 0).sum()),
        random=_baseline(runs, circuit, randoms, settings) if randoms else None,
        pairs=pairs,
        failures=_failures(pairs, float(effect.mean())),
    )


# -- inside --------------------------------------------------------------------------------------


def _baseline(
    runs: Runs, circuit: Circuit, randoms: Sequence[Circuit], settings: Bootstrap
) -> RandomBaseline:
    effect = runs.whole - runs.nothing
    typical = runs.random.mean(axis=0)
    own, others = (
        faithfulness(values, runs.whole, runs.nothing, settings=settings)
        for values in (runs.circuit, runs.random)
    )
    as_good = int((np.abs(others - 1) <= np.abs(own - 1) + TIE).sum())
    live = circuit.pruned()
    overlaps = [len(live & each) / len(live) for each in randoms] if len(live) else [0.0]
    return RandomBaseline(
        n=len(randoms),
        faithfulness=tuple(others.tolist()),
        mean=ratio_interval(typical - runs.nothing, effect, settings),
        low=float(others.min()),
        high=float(others.max()),
        quantiles=tuple(np.quantile(others, QUANTILES).tolist()),
        advantage=ratio_interval(runs.circuit - typical, effect, settings),
        as_good=as_good,
        p_value=(as_good + 1) / (len(randoms) + 1),
        live_edges=float(np.mean([len(each.pruned()) for each in randoms])),
        shared=float(np.mean(overlaps)),
    )


def _pairs(runs: Runs, kl: NDArray[np.float64]) -> tuple[PairResult, ...]:
    prepared = runs.prepared
    corrupt = prepared.corrupt.names if prepared.corrupt is not None else (None,) * len(prepared)
    tops = [
        _labels(prepared, logits)
        for logits in (runs.whole_logits, runs.circuit_logits, runs.complement_logits)
    ]
    metrics = [values.tolist() for values in (runs.whole, runs.nothing, runs.circuit, runs.complement)]
    rows = zip(prepared.clean.names, corrupt, *metrics, *tops, kl.tolist(), strict=True)
    return tuple(PairResult(*row) for row in rows)


def _failures(pairs: Sequence[PairResult], behaviour: float) -> tuple[PairFailure, ...]:
    """The pairs that the circuit fails on, the worst first.

    Args:
        pairs: all of them.
        behaviour: mean metric with every edge kept minus that with none. A pair's own would not do: where it
            is near 0, any circuit is infinitely far off.
    """
    found = [
        PairFailure(pair.clean, pair.corrupt, off, pair.top_whole, pair.top_circuit)
        for pair in pairs
        if abs(off := (pair.circuit - pair.whole) / behaviour) > FAR or pair.top_circuit != pair.top_whole
    ]
    return tuple(sorted(found, key=lambda failure: -abs(failure.off)))


def _labels(prepared: PreparedTask, logits: Float[Tensor, "pair class"]) -> list[str]:
    """The name of each pair's top class; each class is looked up once, as that is slow among 1000 names."""
    tops = logits.argmax(dim=-1).tolist()
    names = {index: class_label(prepared.model, index) for index in set(tops)}
    return [names[index] for index in tops]


def _kl(full: Float[Tensor, "pair class"], circuit: Float[Tensor, "pair class"]) -> NDArray[np.float64]:
    """KL(full || circuit) of each pair in nats; rounding below 0 is cut off."""
    log_full, log_circuit = F.log_softmax(full, dim=-1), F.log_softmax(circuit, dim=-1)
    divergence = (log_full.exp() * (log_full - log_circuit)).sum(dim=-1)
    return np.asarray(divergence.clamp_min(0.0).numpy(), dtype=np.float64)


def _refuse_same_logits(runs: Runs) -> None:
    """Some metrics magnify rounding: on equal images a divergence is 0 with every edge and 1e-8 with none."""
    change = (runs.whole_logits - runs.nothing_logits).abs().max()
    if change <= ROUNDING * runs.whole_logits.abs().max():
        raise DataError(
            f"the logits are the same with and without the behaviour on all {len(runs.whole)} pair(s): "
            "are the clean and the corrupt images the same?"
        )

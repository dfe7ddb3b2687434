"""What is measured of each model on a sheet that compares models, so that numbers can stand side by side.

Models differ in the scale of their logits, in depth and in the number of their edges. So an ability is the
share of pairs that are told apart, depth is relative, and the parts of a circuit are shares of its graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from circuitvit.attribution import attribute
from circuitvit.attribution.calibration import pearson, sign_agreement, spearman
from circuitvit.attribution.exact import edge_effects
from circuitvit.attribution.scoring import Running
from circuitvit.engine import capture, choose_batch_size, progress_bar, run_from
from circuitvit.errors import CircuitViTError, DataError, OptionError, UnsupportedModelError
from circuitvit.graph import Circuit, Graph
from circuitvit.graph.names import node_of, port_of
from circuitvit.tasks import PreparedTask
from circuitvit.verification.statistics import (
    ROUNDING,
    Bootstrap,
    Estimate,
    mean_interval,
    ratio_interval,
    share_interval,
)
from circuitvit.views.lens import positions_of

Values = Float[np.ndarray, "position pair"]


# -- what the model can do, and where along its depth -----------------------------------------------


@dataclass(frozen=True)
class Ability:
    """How well a model shows the behaviour, whole.

    Attributes:
        n_pairs: that it was asked.
        told_apart: share of the pairs on which the metric is larger for the clean image than for its
            counterfactual, whatever the scale; a tie counts as one half, and so does chance. None without
            counterfactuals, and for divergences.
        clean_right: share of the clean images on which the metric is above 0, so that the target goes before
            the foil; None for a metric without a foil.
        corrupt_right: share of the counterfactuals on which it is below 0; None likewise.
        gap: mean metric on the clean image minus that on its counterfactual, in the model's own units.
    """

    n_pairs: int
    told_apart: Estimate | None
    clean_right: Estimate | None
    corrupt_right: Estimate | None
    gap: Estimate


@dataclass(frozen=True)
class Depth:
    """What the readout makes of the stream at one position: the logit lens, as far as it is about the task.

    Attributes:
        position: its name, such as "embedding" or "layer 3".
        depth: 0 for the embedding, 1 for the end of the last layer.
        told_apart: as in `Ability`.
        gap: the gap there as a share of that at the end; None where there is none at the end.
    """

    position: str
    depth: float
    told_apart: Estimate | None
    gap: Estimate | None


def depth_values(prepared: PreparedTask, batch_size: int | None, progress: bool) -> tuple[Values, Values]:
    """The metric at every position of the stream, on the clean images and on their counterfactuals.

    Without counterfactuals the second is all 0.
    """
    clean, other = zip(*_depths(prepared, batch_size, progress), strict=True)
    return np.concatenate(clean, axis=1), np.concatenate(other, axis=1)


@torch.no_grad()
def _depths(
    prepared: PreparedTask, batch_size: int | None, progress: bool
) -> Iterator[tuple[Values, Values]]:
    model, corrupt = prepared.model, prepared.corrupt
    size = model.batch_of(len(prepared), batch_size or choose_batch_size(prepared))
    with progress_bar(len(prepared), "lens", progress, unit="pair") as bar:
        for rows in prepared.row_ranges(size):
            images = [each.take(rows.start, rows.stop) for each in (prepared.clean, corrupt) if each]
            streams = [_streams(prepared, each.to(model.device, model.dtype)) for each in images]
            ends, places = streams[0][-1], torch.arange(rows.start, rows.stop)
            found = [
                np.stack([prepared.metric(logits, ends, places).cpu().double().numpy() for logits in each])
                for each in streams
            ]
            yield found[0], found[1] if corrupt else np.zeros_like(found[0])
            bar.update(len(rows))


def _streams(prepared: PreparedTask, images: Tensor) -> list[Tensor]:
    """The readout's logits at every position, `(batch, class)` each; the last are the model's own."""
    model = prepared.model
    run = capture(model, images)
    return [run_from(model, model.reading, run.stream(place)) for place in positions_of(model, "layer")]


def ability_of(prepared: PreparedTask, clean: Values, corrupt: Values, settings: Bootstrap) -> Ability:
    """The ability, from the metric at the last position."""
    foil = prepared.metric.metric.uses_foil
    return Ability(
        n_pairs=clean.shape[1],
        told_apart=_told_apart(prepared, clean[-1], corrupt[-1], settings),
        clean_right=share_interval(clean[-1] > 0, settings) if foil else None,
        corrupt_right=share_interval(corrupt[-1] < 0, settings) if foil and prepared.corrupt else None,
        gap=mean_interval(clean[-1] - corrupt[-1], settings),
    )


def curve_of(
    prepared: PreparedTask, clean: Values, corrupt: Values, settings: Bootstrap
) -> tuple[Depth, ...]:
    """The ability along the depth."""
    names = tuple(positions_of(prepared.model, "layer").values())
    gaps = clean - corrupt
    return tuple(
        Depth(
            name,
            place / max(1, len(names) - 1),
            _told_apart(prepared, clean[place], corrupt[place], settings),
            _share(gaps[place], gaps[-1], settings),
        )
        for place, name in enumerate(names)
    )


def _told_apart(
    prepared: PreparedTask, clean: NDArray[np.float64], corrupt: NDArray[np.float64], settings: Bootstrap
) -> Estimate | None:
    if prepared.corrupt is None or prepared.metric.flat_at_clean:
        return None
    ties = np.isclose(clean, corrupt, rtol=ROUNDING, atol=0)
    if ties.any():
        return mean_interval(np.where(ties, 0.5, clean > corrupt), settings)
    return share_interval(clean > corrupt, settings)


def _share(here: NDArray[np.float64], end: NDArray[np.float64], settings: Bootstrap) -> Estimate | None:
    try:
        return ratio_interval(here, end, settings)
    except DataError:  # there is no gap at the end that anything could be a share of
        return None


# -- what the circuit is made of --------------------------------------------------------------------


@dataclass(frozen=True)
class Use:
    """How much of one kind of part a circuit uses.

    Attributes:
        among: what is counted: "nodes" of a kind, "inputs" (edges by what they enter), or "layers" (the heads
            and MLPs of one).
        part: which, such as "heads", "values", "layer 3".
        used: how many are in the circuit.
        total: how many there are.
    """

    among: Literal["nodes", "inputs", "layers"]
    part: str
    used: int
    total: int

    @property
    def share(self) -> float:
        """The share of these parts that the circuit uses, 0 to 1."""
        return self.used / self.total if self.total else 0.0


_NODES = {"attention": "heads", "mlp": "MLPs", "input": "inputs", "readout": "readouts"}
_PORTS = {"q": "queries", "k": "keys", "v": "values"}


def uses_of(circuit: Circuit) -> tuple[Use, ...]:
    """What a circuit is made of, in the order of its graph."""
    graph, kept = circuit.graph, circuit.kept
    inside = set(circuit.nodes)
    between = [name for name in graph.senders if graph.stage_of_node[name].receivers]
    kinds = [(_kind(graph, name), name) for name in between]
    layers = [(graph.stage_of_node[name].block, name) for name in between]
    arriving, existing = kept.sum(axis=(0, 2)), graph.edge_mask.sum(axis=(0, 2))
    inputs = [_input(graph, receiver) for receiver in graph.receivers]
    used, total = Counter[str](), Counter[str]()
    for name, here, all_ in zip(inputs, arriving, existing, strict=True):
        used[name] += int(here)
        total[name] += int(all_)
    return (
        *_counted("nodes", kinds, inside),
        *(Use("inputs", name, used[name], total[name]) for name in total),
        *_counted("layers", layers, inside),
    )


def _counted(
    among: Literal["nodes", "layers"], named: Sequence[tuple[str, str]], inside: set[str]
) -> Iterator[Use]:
    total = Counter(part for part, _ in named)
    used = Counter(part for part, name in named if name in inside)
    return (Use(among, part, used[part], count) for part, count in total.items())


def _kind(graph: Graph, node: str) -> str:
    kind = graph.stage_of_node[node].kind_of(node)
    return _NODES.get(kind, kind)


def _input(graph: Graph, receiver: str) -> str:
    """What an edge enters: queries, keys or values of heads, MLPs, or the readout."""
    port = port_of(receiver)
    return _PORTS.get(port, port) if port else _kind(graph, node_of(receiver))


# -- how right estimates are ------------------------------------------------------------------------


@dataclass(frozen=True)
class Rightness:
    """How well a method's scores agree with exact effects, on edges that were drawn at random.

    Attributes:
        method: that scored.
        measured: how many edges were drawn.
        spearman: rank correlation of magnitudes, with an interval from resampling the edges; None where
            one side is constant.
        pearson: correlation, likewise.
        signs: share of edges whose sign is right.
        seconds: that scoring all edges took.
        why_not: why the method has no scores; "" where it has.
    """

    method: str
    measured: int
    spearman: Estimate | None
    pearson: Estimate | None
    signs: Estimate | None
    seconds: float
    why_not: str = ""


def draw_edges(graph: Graph, count: int, seed: int) -> NDArray[np.bool_]:
    """A mask `(sender, receiver, group)` of edges drawn at random, each with the same chance."""
    places = np.argwhere(graph.edge_mask)
    chosen = np.random.default_rng(seed).permutation(len(places))[:count]
    mask = np.zeros(graph.shape, dtype=bool)
    mask[tuple(places[chosen].T)] = True
    return mask


def exact_effects(prepared: PreparedTask, wanted: NDArray[np.bool_], how: Running) -> NDArray[np.float64]:
    """The mean effects of these edges, in the order of the mask."""
    effects: NDArray[np.float64] = edge_effects(prepared, wanted, how)[wanted] / len(prepared)
    return effects


def rightness_of(
    prepared: PreparedTask,
    method: str,
    wanted: NDArray[np.bool_],
    effects: NDArray[np.float64],
    how: Running,
    settings: Bootstrap,
    clock: Callable[[], float],
) -> Rightness:
    """A method's scores held against effects; one that cannot score this task says why."""
    begin, edges = clock(), len(effects)
    try:
        scores = attribute(prepared.model, prepared, method, batch_size=how.batch_size, progress=how.progress)
    except (OptionError, DataError, UnsupportedModelError) as error:
        return Rightness(method, edges, None, None, None, 0.0, _said(error))
    found, seconds = scores.values[wanted], clock() - begin
    rank, linear, signs = (
        _resampled(figure, found, effects, settings) for figure in (spearman, pearson, sign_agreement)
    )
    return Rightness(method, edges, rank, linear, signs, seconds)


def _resampled(
    figure: Callable[..., float | None],
    scores: NDArray[np.float64],
    effects: NDArray[np.float64],
    settings: Bootstrap,
) -> Estimate | None:
    """A figure of a sample of edges, with its percentile interval: an edge that is drawn twice weighs 2."""
    n = len(scores)
    value = figure(scores, effects, np.ones(n))
    if value is None or not np.isfinite(value):
        return None
    counts = np.random.default_rng(settings.seed).multinomial(n, np.full(n, 1 / n), settings.n_resamples)
    drawn = [
        each for weights in counts if (each := figure(scores, effects, weights.astype(float))) is not None
    ]
    tail = (1 - settings.level) / 2
    low, high = np.quantile(drawn, (tail, 1 - tail))
    return Estimate(float(value), float(low), float(high))


def _said(error: CircuitViTError) -> str:
    return str(error).partition(":")[0]

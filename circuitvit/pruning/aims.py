"""What a search keeps: the behaviour, which is the metric's mean, or the prediction, image by image.

A circuit of many pairs that keeps nine tenths of a metric's mean may still see another class than the model
does on most of the images: the mean says nothing of single pairs, nor of classes that the metric leaves out.
To keep the *prediction* is to keep each image's top class on a share of the pairs, its *agreement* with the
whole model; where that is too coarse to tell two circuits apart, KL(whole || circuit) over all classes does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal, NamedTuple, get_args

import numpy as np

from circuitvit.engine import Evaluator
from circuitvit.errors import DataError, OptionError, check_whole
from circuitvit.graph import EdgeMask, Graph
from circuitvit.models import Model

Keep = Literal["behaviour", "prediction"]
"""What a circuit is to keep: the task's metric, or the model's top class."""

Band = tuple[float, float]
"""The faithfulness, or agreement, that a result must keep, lowest and highest."""


CLOSE = 1e-4
"""How near to an end of the band rounding could decide."""


class Figures(NamedTuple):
    """How near a circuit is to the whole model, on the pairs of a search.

    Attributes:
        faithfulness: of the behaviour.
        agreement: share of pairs whose top class is the model's; None for a model without classes.
        kl: mean KL(model || circuit) in nats; None likewise.
    """

    faithfulness: float
    agreement: float | None
    kl: float | None


def figures(evaluator: Evaluator, kept: EdgeMask) -> Figures:
    """What a circuit keeps of behaviour and prediction."""
    chooses = evaluator.prepared.model.chooses
    prediction = (evaluator.agreement(kept), evaluator.divergence(kept)) if chooses else (None, None)
    return Figures(evaluator.faithfulness(kept), *prediction)


@dataclass(frozen=True)
class Aim:
    """What a search goes by.

    Attributes:
        keep: "behaviour" or "prediction".
        band: of faithfulness, or of agreement.

    Raises:
        OptionError: if it is neither, or the band is empty.
    """

    keep: Keep = "behaviour"
    band: Band = (0.9, 1.1)

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_band(self.band)
        low, high = self.band
        empty = not low < high if self.keep == "behaviour" else not 0 < low <= min(1, high)
        if empty:
            ends = "low to high" if self.keep == "behaviour" else "above 0 to 1, as agreement does"
            raise OptionError(f"the band must go from {ends}, not {self.band}")

    @property
    def name(self) -> str:
        """What the band is of."""
        return "faithfulness" if self.keep == "behaviour" else "agreement"

    def value(self, evaluator: Evaluator, kept: EdgeMask) -> float:
        """The faithfulness or the agreement of a circuit."""
        return (evaluator.faithfulness if self.keep == "behaviour" else evaluator.agreement)(kept)

    def holds(self, evaluator: Evaluator, kept: EdgeMask) -> bool:
        """Whether a circuit lies in the band; near its ends, by a run of its own.

        Circuits that are run together leave their faithfulness some rounding, which must not decide.
        """
        value = self.value(evaluator, kept)
        if self.keep == "behaviour" and min(abs(value - end) for end in self.band) < CLOSE:
            evaluator.settled(kept)
            value = self.value(evaluator, kept)
        return self.band[0] <= value <= self.band[1]

    def distance(self, evaluator: Evaluator, kept: EdgeMask) -> float:
        """How far a circuit is from the whole model, for circuits that do not lie in the band."""
        if self.keep == "behaviour":
            return abs(evaluator.faithfulness(kept) - 1)
        return evaluator.divergence(kept)

    def check(self, evaluator: Evaluator) -> None:
        """Refuse a task whose predictions stay with every edge ablated.

        Raises:
            OptionError: if the model predicts no classes.
            DataError: saying on how many pairs.
        """
        if self.keep == "behaviour":
            return
        check_predicts(evaluator.prepared.model)
        alike = evaluator.agreement(np.zeros(evaluator.graph.shape, dtype=bool))
        if alike >= self.band[0]:
            raise DataError(
                f"with every edge ablated the top class is still the model's on {alike:.0%} of the "
                f"{len(evaluator)} pairs, so there is no prediction for a circuit to keep: choose images "
                "that the model takes for other classes than the corrupt ones, another ablation, or "
                "keep='behaviour'"
            )


def check_keep(keep: object) -> None:
    """Refuse what no circuit can be asked to keep.

    Raises:
        OptionError: saying what can.
    """
    if keep not in get_args(Keep):
        raise OptionError(f"a search is to keep the 'behaviour' or the 'prediction', not {keep!r}")


def check_band(band: object) -> None:
    """Refuse what is no pair of numbers.

    Raises:
        OptionError: saying what a band is.
    """
    ends = band if isinstance(band, (tuple, list)) else ()
    if len(ends) != 2 or not all(isinstance(end, Real) for end in ends):
        raise OptionError(f"a band is two numbers, such as (0.9, 1.1), not {band!r}")


def check_sizes(edges: object, graph: Graph) -> list[int]:
    """The numbers of edges that circuits are asked for, each once, the largest first.

    Raises:
        OptionError: if there is none, or one is not between 1 and the graph's number of edges.
    """
    if not isinstance(edges, Sequence) or isinstance(edges, str) or not edges:
        raise OptionError(f"edges must be numbers of edges to search for, not {edges!r}")
    for size in edges:
        check_whole("edges", size)
        if size > graph.n_edges:
            raise OptionError(f"asked for {size} edges of a graph that has {graph.n_edges}")
    return sorted({int(size) for size in edges}, reverse=True)  # numpy's numbers are taken, and not kept


def check_predicts(model: Model) -> None:
    """Refuse a model whose outputs do not choose between classes.

    Raises:
        OptionError: naming it.
    """
    if not model.chooses:
        raise OptionError(
            f"the outputs of {model.name} are no classes, so there is no top class to keep: leave out "
            "keep='prediction', which keeps the metric"
        )

"""`attribute`, the one way to score edges whatever the method, and what all methods share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from circuitvit._keywords import running
from circuitvit.attribution.methods import DEFAULT, check_keywords, find_method
from circuitvit.engine import agreed, choose_batch_size, own_share, summed
from circuitvit.errors import DataError, OptionError
from circuitvit.graph import EdgeMask, EdgeScores, Provenance
from circuitvit.models import Model
from circuitvit.tasks import PreparedTask, Task, prepare


@running
def attribute(
    model: Model,
    task: Task | PreparedTask,
    method: str = DEFAULT,
    *,
    processes: bool = False,
    batch_size: int | None = None,
    memory: int | str | None = None,
    progress: bool = True,
    **keywords: Any,
) -> EdgeScores:
    """Score every edge of a model for a task.

    The scores are the sum over pairs divided by the number of pairs, so they do not depend on the batch size.

    Args:
        model: from `load` or `wrap`.
        task: images, metric and ablation.
        method: one of `METHODS`: "local", the best of those that are cheap; "eap", "exact" and others.
        processes: share the work among the processes of `torch.distributed`, which must all make this call;
            each gets the scores over all pairs. Edges are shared for "exact" and "hybrid", pairs for the
            others, but for "atp-star" and "random", which gain nothing.
        **keywords: the method's own, such as `steps=10, rule="gauss-legendre"` for "eap-ig", `budget="60s"`
            for "hybrid" and "auto", `seed=1` for "random", `state="scores.state"` for "exact".
            `cv.METHODS[method].keywords` lists them.
        batch_size: pairs at once; by default what `memory` allows.
        memory: bytes that a batch, and what is kept between runs, may take.
        progress: whether to show a bar.

    Raises:
        NameNotFoundError: for an unknown method.
        OptionError: for a keyword that the method does not take, values that make no sense, or a metric that
            the method cannot use.
        DataError: if the images cannot be used, or the metric is flat.

    Example:
        >>> import circuitvit as cv  # doctest: +SKIP
        >>> scores = cv.attribute(model, task, "eap-ig", steps=10)  # doctest: +SKIP
    """
    chosen = find_method(method)
    check_keywords(method, keywords)
    prepared = prepare(model, task, progress, processes)
    how = Running(batch_size or choose_batch_size(prepared, memory), progress)
    by_pair = prepared.processes and chosen.by_pair and not chosen.by_edge
    score = partial(_by_share, chosen.score) if by_pair else chosen.score
    found = score(prepared, how, **keywords)
    found = found if isinstance(found, Scored) else Scored(found)
    name = found.method or method
    settings = {each: parameter.default for each, parameter in chosen.keywords.items()} | keywords
    provenance = provenance_of(prepared, name, settings.pop("seed", None)).with_parameters(
        **{each: _plain(value) for each, value in settings.items() if each != "state"}, **found.parameters
    )
    provenance = provenance.with_shares_of(chosen.shares_of)
    measured = prepared.graph.edge_mask if name == "exact" else found.measured
    values = agreed(found.values, prepared.processes) / len(prepared)
    return EdgeScores(prepared.graph, values, name, prepared.direction, provenance, measured)


def provenance_of(prepared: PreparedTask, method: str, seed: int | None = None) -> Provenance:
    """The origin of a result computed on a prepared task; a random ablation's seed stands in for none."""
    model = prepared.model
    seed = getattr(prepared.ablation, "seed", None) if seed is None else seed
    paired = {"pairing": prepared.pairing} if prepared.pairing else {}
    return Provenance(
        model.name, model.weights_hash, prepared.label, method, paired, seed, libraries=model.libraries,
        prompts=model.prompts, templates=model.templates,
    )  # fmt: skip


def _plain(value: Any) -> Any:
    """A keyword's value as JSON."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _by_share(
    score: Callable[..., Any], prepared: PreparedTask, how: Running, **keywords: Any
) -> NDArray[np.float64]:
    """The scores that are sums over pairs, of which each process has some."""
    values = summed(score(own_share(prepared), how, **keywords), prepared.processes)
    check_effects(prepared, values)
    return values


# -- what methods are given and give -------------------------------------------------------------


@dataclass(frozen=True)
class Running:
    """How a method runs, whichever it is.

    Attributes:
        batch_size: pairs at once; by default what `memory` allows.
        progress: whether to show a bar.
    """

    batch_size: int
    progress: bool = False


@dataclass(frozen=True, eq=False)
class Scored:
    """What a method found, where that is more than numbers.

    Attributes:
        values: the scores `(sender, receiver, group)` of all edges, summed over pairs.
        measured: where the score is the exact effect itself; None where no score is.
        parameters: what the method chose by itself, JSON values, for the scores' provenance.
        method: the method that it came down to, if not the one asked for.
    """

    values: NDArray[np.float64]
    measured: EdgeMask | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    method: str | None = None


# -- what methods refuse -------------------------------------------------------------------------


def without_gradient(prepared: PreparedTask) -> str | None:
    """Why the metric has no gradient at the base run; None where it has one."""
    metric = prepared.metric.metric
    if not metric.differentiable:
        return f"{metric.name} has no gradient"
    flat = prepared.metric.flat_at_clean and not prepared.denoising
    return f"{metric.name} is flat at the clean run" if flat else None


def require_gradient(prepared: PreparedTask, method: str) -> None:
    """Refuse a metric without a gradient before anything runs.

    Raises:
        OptionError: naming metrics that work.
    """
    if not prepared.metric.metric.differentiable:
        raise OptionError(
            f"{method} needs the metric's gradient, and {prepared.metric.metric.name!r} has none: "
            "use logit_diff or log_probability, or method='exact'"
        )


def require_slope(prepared: PreparedTask, method: str) -> None:
    """Refuse also a divergence from the clean run where the gradient is taken at that very run.

    There it is at its minimum, so that scores would be the noise of rounding.

    Raises:
        OptionError: naming the way out.
    """
    require_gradient(prepared, method)
    if without_gradient(prepared):
        metric = prepared.metric.metric
        other = "logit_diff or log_probability" if metric.of_classes else "similarity to something else (to=)"
        raise OptionError(
            f"{metric.name} is flat at the clean run, where {method} takes its gradient: every score would "
            f"be 0. Use {other}, or method='eap-ig' or 'exact'"
        )


def check_gradient(prepared: PreparedTask, total: Tensor) -> None:
    """Refuse scores that are 0 everywhere: the metric is flat where its gradient was taken.

    The share of one process may be 0 everywhere, as where its images are equal: the sum of all is checked.

    Raises:
        DataError: naming the way out.
    """
    if prepared.is_whole and not total.any():
        raise DataError(
            f"the gradient of {prepared.metric.label} is 0 everywhere at the base run, so every score is 0. "
            "A divergence from the clean run is flat there, and equal images have no difference to score: "
            "use method='exact' or 'eap-ig', another metric, or other images"
        )


def check_effects(prepared: PreparedTask, total: NDArray[np.float64]) -> None:
    """Refuse effects that are 0 everywhere; not those of one process's share, whose sum with others counts.

    Raises:
        DataError: naming the way out.
    """
    if prepared.is_whole and not total.any():
        raise DataError(
            f"no edge has any effect on {prepared.metric.label}: ablated runs give the same metric. Equal "
            "clean and corrupt images have no difference to explain: use other images, metric or ablation"
        )

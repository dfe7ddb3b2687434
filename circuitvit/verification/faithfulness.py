"""Faithfulness: how much of the behaviour a circuit keeps, as a ratio of means over pairs.

    f(C) = (m(C) - m(none)) / (m(all) - m(none))

with `m` the mean of the metric over pairs: 0 when the circuit does no better than nothing kept, 1 when it
does what the whole model does, above 1 when it overshoots (edges that work against the behaviour are left
out). It is not clipped.

Whether a circuit does what the model does is asked by Wang et al. 2023 ("Interpretability in the wild",
arXiv:2211.00593); the normalised form is that of Hanna et al. 2024 ("Have faith in faithfulness",
arXiv:2403.17806) and MIB (Mueller et al. 2025, arXiv:2504.13151). A mean of the pairs' own ratios would let
the one pair whose metric hardly differs decide the answer, so it is never used.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from circuitvit.errors import DataError
from circuitvit.graph import Circuit
from circuitvit.models import Model
from circuitvit.verification.statistics import Bootstrap, mean_range

ROUNDING = 1e-5
"""Relative to the size of what is compared: differences below it are float32 arithmetic, not behaviour."""


def faithfulness(
    values: ArrayLike,
    whole: ArrayLike,
    nothing: ArrayLike,
    *,
    label: str = "the metric",
    settings: Bootstrap | None = None,
) -> NDArray[np.float64]:
    """The faithfulness of one or several circuits from the metric of each pair.

    Args:
        values: the metric with the circuit, `(..., pair)`; leading dimensions are circuits.
        whole: with every edge kept, `(pair,)`.
        nothing: with every edge ablated, `(pair,)`.
        label: of the metric, for the error.
        settings: of the interval by which the denominator is judged.

    Returns:
        `(...)`, one number for each circuit.

    Raises:
        DataError: if the denominator is not distinguishable from 0, see `require_effect`.

    Example:
        >>> float(faithfulness([3.0, 6.0], whole=[4.0, 8.0], nothing=[0.0, 0.0]))
        0.75
    """
    whole, nothing = np.asarray(whole, dtype=np.float64), np.asarray(nothing, dtype=np.float64)
    require_effect(whole, nothing, label=label, settings=settings)
    kept = np.asarray(values, dtype=np.float64) - nothing
    return np.asarray(kept.sum(axis=-1) / (whole - nothing).sum())


def require_effect(
    whole: ArrayLike,
    nothing: ArrayLike,
    *,
    label: str = "the metric",
    names: Sequence[str] | None = None,
    settings: Bootstrap | None = None,
) -> None:
    """Refuse pairs on which faithfulness means nothing, because the metric need not differ at all.

    Three things are refused: a mean difference within rounding; with 5 pairs or more, a mean difference whose
    bootstrap interval holds 0; with 2 to 4 pairs, too few for an interval, pairs that disagree in sign. One
    pair is a fact about that pair, so there only rounding is asked about.

    Args:
        whole: the metric with every edge kept, `(pair,)`.
        nothing: with every edge ablated, `(pair,)`.
        label: of the metric.
        names: of the pairs.
        settings: of the interval.

    Raises:
        DataError: giving the means, and the pairs that differ least.

    Example:
        >>> require_effect([4.0, 5.0], [0.0, 0.0])
        >>> require_effect([4.0, -5.0], [0.0, 0.0])
        Traceback (most recent call last):
        ...
        circuitvit.errors.DataError: the metric is -0.5 with the behaviour and 0 without, over 2 pairs, ...
    """
    whole, nothing = np.asarray(whole, dtype=np.float64), np.asarray(nothing, dtype=np.float64)
    difference = whole - nothing
    scale = max(float(np.abs(whole).max()), float(np.abs(nothing).max()), 1e-6)
    if abs(difference.mean()) > ROUNDING * scale:
        low, high = mean_range(difference, settings or Bootstrap())
        if not low <= 0 <= high:
            return
        found = f"and that difference is not distinguishable from 0 (it may be from {low:.4g} to {high:.4g})"
    else:
        found = "which is the same within rounding"
    raise DataError(
        f"{label} is {whole.mean():.4g} with the behaviour and {nothing.mean():.4g} without, "
        f"over {len(whole)} pair{'s' if len(whole) > 1 else ''}, {found}: there is nothing for a circuit to "
        f"explain.{_least(difference, names)} Choose pairs that differ in the metric, more of them, or "
        "another target and foil"
    )


def origin_differs(circuit: Circuit, model: Model) -> str:
    """A sentence for reports where the circuit was found on another model; empty where it was not, or where
    it does not say where it came from. Weights decide, and the name where no weights are known."""
    found = circuit.provenance
    if found.weights and found.weights != model.weights_hash:
        return (
            f"The circuit was found on other weights ({found.model or 'unnamed'}, {found.weights[:12]}) than "
            f"those it was verified on ({model.name}, {model.weights_hash[:12]})."
        )
    if not found.weights and found.model and found.model != model.name:
        return (
            f"The circuit was found on another model ({found.model}) than it was verified on ({model.name})."
        )
    return ""


def _least(difference: NDArray[np.float64], names: Sequence[str] | None, show: int = 3) -> str:
    """A sentence that names the pairs which speak least for the behaviour."""
    if len(difference) == 1:
        return ""
    towards = difference * (np.sign(difference.mean()) or 1.0)
    order = np.argsort(towards, kind="stable")[:show]
    listed = ", ".join(f"{names[row] if names else f'pair {row}'} ({difference[row]:+.3g})" for row in order)
    return f" The pairs that differ least or the other way: {listed}."

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

from circuitvit.engine import check_effect
from circuitvit.verification.bootstrap import Bootstrap

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
    draws = settings or Bootstrap()
    check_effect(
        whole, nothing, label=label, names=names,
        level=draws.level, n_resamples=draws.n_resamples, seed=draws.seed,
    )  # fmt: skip

"""Whether there is a behaviour to explain: what ablating every edge changes, beyond rounding and chance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray

from circuitvit.errors import DataError, counted
from circuitvit.tasks import Mean, PreparedTask, Resample

ROUNDING = 1e-5
"""Relative to the size of what is compared: differences below it are float32 arithmetic, not behaviour."""

ENOUGH_PAIRS = 5
"""Pairs from which on a bootstrap interval says something."""

DRAWN_AT_ONCE = 2**20
"""How many numbers, one for each pair and resample, are drawn together."""


def check_effect(
    whole: ArrayLike,
    nothing: ArrayLike,
    *,
    label: str = "the metric",
    names: Sequence[str] | None = None,
    level: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
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
        level: of the interval; 0 asks about rounding alone.
        n_resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        DataError: giving the means, and the pairs that differ least.

    Example:
        >>> check_effect([4.0, 5.0], [0.0, 0.0])
        >>> check_effect([4.0, -5.0], [0.0, 0.0])
        Traceback (most recent call last):
        ...
        circuitvit.errors.DataError: the metric is -0.5 with the behaviour and 0 without, over 2 pairs, ...
    """
    whole, nothing = np.asarray(whole, dtype=np.float64), np.asarray(nothing, dtype=np.float64)
    difference = whole - nothing
    scale = max(float(np.abs(whole).max()), float(np.abs(nothing).max()), 1e-6)
    if abs(difference.mean()) > ROUNDING * scale:
        low, high = _mean_range(difference, level, n_resamples, seed)
        if level == 0 or not low <= 0 <= high:
            return
        found = f"and that difference is not distinguishable from 0 (it may be from {low:.4g} to {high:.4g})"
    else:
        found = "which is the same within rounding"
    raise DataError(
        f"{label} is {whole.mean():.4g} with the behaviour and {nothing.mean():.4g} without, "
        f"over {counted(len(whole), 'pair')}, {found}: there is nothing for a circuit to "
        f"explain.{_least(difference, names)} Choose pairs that differ in the metric, more of them, or "
        "another target and foil"
    )


def same_on_average(prepared: PreparedTask) -> str:
    """Why some ablations leave the mean of a metric as it is, which other pairs would not help."""
    if isinstance(prepared.ablation, Resample):
        return (
            ". With resample ablation every image gets what the parts wrote on another image of the task, "
            "so that with everything ablated images are only exchanged, and their mean stays: use "
            "ablation='patch' or 'mean', or classes that differ from pair to pair"
        )
    if isinstance(prepared.ablation, Mean) and len(prepared) == 1 and prepared.corrupt is None:
        return ". The mean over one image is that image: give more images to average, Mean(images=...)"
    return ""


def resampled_sums(
    columns: Sequence[Float[NDArray[np.float64], " pair"]], n_resamples: int, seed: int
) -> list[Float[NDArray[np.float64], " resample"]]:
    """The sums of columns over pairs that are drawn anew with replacement, the same pairs for each column.

    How often each pair is in a resample is drawn: that is a multinomial. Of many pairs, some resamples are
    drawn at a time, so that memory does not grow with the pairs.

    Args:
        columns: a number for each pair.
        n_resamples: how often pairs are drawn.
        seed: of the draws.

    Example:
        >>> resampled_sums([np.ones(3), np.array([0.0, 3.0, 3.0])], n_resamples=2, seed=0)
        [array([3., 3.]), array([6., 3.])]
    """
    n, rng = len(columns[0]), np.random.default_rng(seed)
    share, at_once = np.full(n, 1 / n), max(1, DRAWN_AT_ONCE // n)
    found = [np.empty(n_resamples) for _ in columns]
    for start in range(0, n_resamples, at_once):
        counts = rng.multinomial(n, share, size=min(at_once, n_resamples - start)).astype(np.float64)
        for column, sums in zip(columns, found, strict=True):
            sums[start : start + at_once] = counts @ column
    return found


def _mean_range(
    difference: NDArray[np.float64], level: float, n_resamples: int, seed: int
) -> tuple[float, float]:
    """Where the mean may lie: its bootstrap percentiles, or with too few pairs the range of the data."""
    count = len(difference)
    if count < ENOUGH_PAIRS:
        return float(difference.min()), float(difference.max())
    (sums,) = resampled_sums([difference], n_resamples, seed)
    low, high = np.quantile(sums / count, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _least(difference: NDArray[np.float64], names: Sequence[str] | None) -> str:
    """A sentence that names the pairs which speak least for the behaviour."""
    if len(difference) == 1:
        return ""
    towards = difference * (np.sign(difference.mean()) or 1.0)
    order = np.argsort(towards, kind="stable")[:3]
    listed = ", ".join(f"{names[row] if names else f'pair {row}'} ({difference[row]:+.3g})" for row in order)
    return f" The pairs that differ least or the other way: {listed}."

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

import numpy as np
from numpy.typing import ArrayLike, NDArray

from circuitvit.engine import check_effect
from circuitvit.graph import Circuit, Provenance
from circuitvit.models import Model
from circuitvit.verification.statistics import Bootstrap


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
        DataError: if the denominator is not distinguishable from 0, see `check_effect`.

    Example:
        >>> float(faithfulness([3.0, 6.0], whole=[4.0, 8.0], nothing=[0.0, 0.0]))
        0.75
    """
    whole, nothing = np.asarray(whole, dtype=np.float64), np.asarray(nothing, dtype=np.float64)
    draws = settings or Bootstrap()
    check_effect(
        whole, nothing, label=label, level=draws.level, n_resamples=draws.n_resamples, seed=draws.seed
    )
    kept = np.asarray(values, dtype=np.float64) - nothing
    return np.asarray(kept.sum(axis=-1) / (whole - nothing).sum())


def origin_differs(circuit: Circuit, model: Model) -> str:
    """A sentence for reports where the circuit was found on another model; empty where it was not, or where
    it does not say where it came from."""
    found = circuit.provenance
    here = Provenance(model.name, model.weights_hash, prompts=model.prompts, templates=model.templates)
    if not found.mismatch(here):
        return ""
    if found.about() != here.about() and found.prompts and here.prompts:
        return f"The circuit was found with other prompts ({found.about()}) than these ({here.about()})."
    if not found.is_comparable(here):
        return f"The circuit was found on another model ({found.model}) than this one ({model.name})."
    return (
        f"The circuit was found on other weights ({found.model or 'unnamed'}, {found.weights[:12]}) than "
        f"those it was verified on ({model.name}, {model.weights_hash[:12]})."
    )

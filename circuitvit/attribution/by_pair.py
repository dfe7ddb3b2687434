"""Scores of every pair by itself, for whoever resamples pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

from circuitvit.attribution.exact import pair_effects
from circuitvit.attribution.methods import find_method
from circuitvit.attribution.scoring import Running, Scored
from circuitvit.engine import progress_bar
from circuitvit.graph import EdgeMask
from circuitvit.tasks import PreparedTask


def scores_by_pair(
    prepared: PreparedTask, method: str, wanted: EdgeMask, how: Running, **keywords: Any
) -> Float[np.ndarray, "pair edge"]:
    """The scores of the edges marked in `wanted` on every pair, in the order of `graph.names_of`.

    Means over images that ablations put in place stay those of the whole task.

    Args:
        prepared: the task.
        method: one whose scores are sums over pairs (`METHODS[method].by_pair`).
        wanted: `(sender, receiver, group)`.
        how: the batch size is that of exact effects; other methods see pair by pair.
        **keywords: the method's own.
    """
    wanted = wanted & prepared.graph.edge_mask
    if method == "exact" and not keywords:
        return pair_effects(prepared, wanted, how)
    rows, score = [], find_method(method).score
    with progress_bar(len(prepared), "scores by pair", how.progress, unit="pair") as bar:
        for number in range(len(prepared)):
            found = score(prepared.share(number, len(prepared)), Running(1), **keywords)
            rows.append((found.values if isinstance(found, Scored) else found)[wanted])
            bar.update()
    return np.stack(rows)

"""Random scores: what a method must beat.

    s(u->v) ~ N(0, 1), from a seed

Cost: nothing is run. Blind to: everything; that is its use.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from circuitvit.attribution.method import Settings
from circuitvit.tasks import PreparedTask


def random(prepared: PreparedTask, settings: Settings) -> NDArray[np.float64]:
    """Standard normal scores `(sender, receiver, group)`, the same for every number of pairs."""
    drawn = np.random.default_rng(settings.seed).standard_normal(prepared.graph.shape)
    return np.where(prepared.graph.edge_mask, drawn, 0.0) * len(prepared)

"""For now: the evaluator as tests call it."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from circuitvit.engine import Evaluator
from circuitvit.graph import EdgeMask


class PairMeter(Evaluator):
    """Calls give the metric of each pair. To become `Evaluator.values` where it is used."""

    def __call__(self, kept: EdgeMask) -> Float[NDArray[np.float64], " pair"]:
        return self.values(kept)

"""Gradient interaction modifications: EAP with gradients that attention cannot repair away.

    s(u->v) = sum over tokens of (r_u - x_u) . c_v

with `c_v` what the backward pass brings to `v` when the scale of every norm is a constant, the softmax has
the Jacobian that it has at temperature 2, and products share their gradient among their factors: values get
half of it, queries and keys a quarter, and each factor of a gated MLP half.

Cost: 2 forwards and 1 backward, attention without its fused kernel. Blind to: what EAP is blind to in MLPs
and beyond first order; the sizes of scores are not those of effects, as shares are given away.

Edin et al. 2025, "GIM: Improved interpretability for large language models", arXiv:2505.17630.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from circuitvit.attribution.eap import first_order
from circuitvit.attribution.method import Settings
from circuitvit.models import BackwardRules
from circuitvit.tasks import PreparedTask

GIM = BackwardRules(
    frozen_norms=True, softmax_temperature=2.0, query_key_share=0.25, value_share=0.5, gate_share=0.5
)


def gim(prepared: PreparedTask, settings: Settings) -> NDArray[np.float64]:
    """GIM scores `(sender, receiver, group)`, summed over pairs."""
    return first_order(prepared, settings, "gim", GIM)

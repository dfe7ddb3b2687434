"""Relevance patching: EAP with coefficients of layer-wise relevance propagation instead of gradients.

    s(u->v) = sum over tokens of (r_u - x_u) . c_v

with `c_v` what the backward pass brings to `v` when the scale of every norm is a constant (LN-rule), an
activation is a multiplication by the constant `act(x) / x` (identity rule), and each factor of a gated MLP
gets half (half rule). Attention keeps its gradient, so that queries and keys are scored too.

Cost: 2 forwards and 1 backward. Blind to: what EAP is blind to in attention and beyond first order; and what
a norm takes away again when its input grows.

Jafari, Eberle, Khakzar and Nanda 2025, "RelP: Faithful and efficient circuit discovery via relevance
patching", arXiv:2508.21258.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from circuitvit.attribution.eap import first_order
from circuitvit.attribution.method import Settings
from circuitvit.models import BackwardRules
from circuitvit.tasks import PreparedTask

RELP = BackwardRules(frozen_norms=True, identity_activation=True, gate_share=0.5)


def relp(prepared: PreparedTask, settings: Settings) -> NDArray[np.float64]:
    """RelP scores `(sender, receiver, group)`, summed over pairs."""
    return first_order(prepared, settings, "relp", RELP)

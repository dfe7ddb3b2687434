"""How far a prediction has moved."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def kl(
    clean: Float[Tensor, "batch class"], current: Float[Tensor, "*candidates batch class"]
) -> Float[Tensor, "*candidates batch"]:
    """KL(clean || current) of each image, in nats: a sum over classes, of log-softmaxes."""
    log_clean = F.log_softmax(clean, dim=-1)
    return (log_clean.exp() * (log_clean - F.log_softmax(current, dim=-1))).sum(dim=-1)

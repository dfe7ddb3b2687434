"""How alike two nodes are, by plain loops in float64: the unbiased HSIC as Song et al. 2012 write it.

Nothing here comes from `circuitvit`. For each image what a node writes is averaged over the tokens that the
readout reads and, beside it, over the others; two images are as alike as the inner product of both says.

    HSIC(K, L) = ( tr(K L) + 1'K1 1'L1 / ((n - 1)(n - 2)) - 2 / (n - 2) 1'K L1 ) / (n (n - 3)),  diagonals 0
    likeness   = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def likeness(one: Tensor, other: Tensor) -> float:
    """Of two nodes, from what they write, `(image, number)`; the numbers may differ in number."""
    return hsic(one, other) / math.sqrt(hsic(one, one) * hsic(other, other))


def hsic(one: Tensor, other: Tensor) -> float:
    count = len(one)
    k = [[float(one[i] @ one[j]) if i != j else 0.0 for j in range(count)] for i in range(count)]
    l = [[float(other[i] @ other[j]) if i != j else 0.0 for j in range(count)] for i in range(count)]  # noqa: E741
    every = range(count)
    trace = sum(k[i][j] * l[j][i] for i in every for j in every)
    k_rows, l_rows = ([sum(row) for row in each] for each in (k, l))
    both = sum(k_rows) * sum(l_rows) / ((count - 1) * (count - 2))
    crossed = 2 / (count - 2) * sum(k_rows[i] * l_rows[i] for i in every)
    return (trace + both - crossed) / (count * (count - 3))


def by_image(written: Tensor, read: list[int], others: list[int]) -> Tensor:
    """What a node writes, `(image, token, width)`, as numbers for each image."""
    parts = [torch.stack([written[:, token] for token in read]).mean(dim=0)]
    if others:
        parts.append(torch.stack([written[:, token] for token in others]).mean(dim=0))
    numbers = torch.cat(parts, dim=1)
    return numbers - numbers.mean(dim=0)  # which changes nothing but rounding

"""What receivers answer when they read other streams: attention and MLPs computed anew, with work shared.

Each function gives `d_compact . (compact with one receiver's read replaced - compact)` for many replaced
streams at once; `Stage.local_effects` is the contract, and its literal default what these are held against.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from circuitvit.models.stages import Reads


def attention_answers(
    write: Callable[[Reads], Tensor], reads: Reads, others: Reads, d_value: Tensor, d_compact: Tensor
) -> Float[Tensor, "receiver candidate batch"]:
    """The answers of heads: first to other queries, then to other keys, then to other values.

    The queries of all candidates attend to the same keys, as more tokens of one sequence. A head is linear
    in its values, so that these need no attention at all.

    Args:
        write: queries, keys and values to heads' outputs, `(batch, head, token, d_head)` all.
        reads: of the base run.
        others: `(candidate, batch, head, token, d_head)` each.
        d_value: the gradient at the values.
        d_compact: the gradient at the heads' outputs.
    """
    asked, offered, carried = others
    query, key, value = reads
    base = (write(reads) * d_compact).sum(dim=(2, 3)).t()[:, None]  # (head, 1, batch)
    looked = write((rearrange(asked, "c b head t k -> b head (c t) k"), key, value))
    looked = rearrange(looked, "b head (c t) k -> b head c t k", c=len(asked))
    by_query = torch.einsum("bhctk,bhtk->hcb", looked, d_compact)
    every = [part.expand(len(asked), *part.shape).flatten(0, 1) for part in (query, value)]
    shown = write((every[0], offered.flatten(0, 1), every[1]))
    shown = rearrange(shown, "(c b) head t k -> c b head t k", c=len(offered))
    by_key = torch.einsum("cbhtk,bhtk->hcb", shown, d_compact)
    by_value = torch.einsum("cbhtk,bhtk->hcb", carried - value, d_value)
    return torch.cat([by_query - base, by_key - base, by_value])


def mlp_answers(
    mlp: nn.Module, normed: Tensor, others: Tensor, d_output: Float[Tensor, "batch token d_model"]
) -> Float[Tensor, "1 candidate batch"]:
    """The answer of an MLP to other normed inputs `(candidate, batch, token, d_model)`.

    Where the MLP ends in a plain linear layer, the gradient is taken through that layer once, which saves
    every candidate half of its work.
    """
    slope = d_output
    hidden = _hidden(mlp)
    answer = mlp if hidden is None else hidden
    if hidden is not None:
        slope = slope @ mlp.fc2.weight  # type: ignore[operator, union-attr]
    base = (answer(normed) * slope).sum(dim=(1, 2))
    return (torch.einsum("cbth,bth->cb", answer(others), slope) - base)[None]


def _hidden(mlp: Any) -> Callable[[Tensor], Tensor] | None:
    """The hidden activations of a plain MLP as a function; None for MLPs of other kinds."""
    names = {name for name, part in mlp.named_children() if not isinstance(part, (nn.Identity, nn.Dropout))}
    plain = type(mlp).__name__ == "Mlp" and names == {"fc1", "act", "fc2"}
    if not plain or type(mlp.fc1) is not nn.Linear or type(mlp.fc2) is not nn.Linear:
        return None
    return lambda normed: mlp.act(F.linear(normed, mlp.fc1.weight, mlp.fc1.bias))

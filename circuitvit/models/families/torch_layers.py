"""Layers of torch itself that several families are built of."""

from __future__ import annotations

from typing import Any

from torch import nn

from circuitvit.errors import UnsupportedModelError
from circuitvit.models.parts import Attention, Linear


def multihead(module: Any, where: str) -> Attention:
    """The parts of torch's `nn.MultiheadAttention`, used as self-attention without a mask.

    In which order it takes batch and tokens, and whether torch runs it by its fast path, changes nothing of
    its parts; nor does `need_weights`.

    Args:
        module: the layer.
        where: its place, for messages.

    Raises:
        UnsupportedModelError: if it is another class, or keeps or adds what self-attention has not.
    """
    _refuse(module, where)
    if module.in_proj_weight is None:
        raise UnsupportedModelError(
            f"{where} keeps q_proj_weight, k_proj_weight and v_proj_weight apart (kdim={module.kdim}, "
            f"vdim={module.vdim}): it attends to something else than the stream that it writes to"
        )
    packed = Linear(module.in_proj_weight, module.in_proj_bias)
    out = Linear.of(module.out_proj)
    return Attention.of_packed(module.num_heads, packed, out, module.head_dim**-0.5)


def cross_attention(module: Any, where: str) -> tuple[Linear, Attention]:
    """The projection of queries, and the parts of an `nn.MultiheadAttention` whose queries are no tokens.

    Raises:
        UnsupportedModelError: as `multihead`.
    """
    _refuse(module, where)
    if module.in_proj_weight is not None:
        packed = Linear(module.in_proj_weight, module.in_proj_bias)
        query, key, value = (packed.part(number, 3) for number in range(3))
    else:
        width, bias = module.embed_dim, module.in_proj_bias
        weights = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
        query, key, value = (
            Linear(weight, bias, bias_rows=(port * width, (port + 1) * width))
            for port, weight in enumerate(weights)
        )
    out, scale = Linear.of(module.out_proj), module.head_dim**-0.5
    return query, Attention(module.num_heads, None, key, value, out, scale)


def _refuse(module: Any, where: str) -> None:
    """Refuse what is no attention of torch's, or adds something to it."""
    if not isinstance(module, nn.MultiheadAttention):
        raise UnsupportedModelError(
            f"{where} is a {type(module).__name__}: only torch's nn.MultiheadAttention is known there"
        )
    if module.bias_k is not None or module.bias_v is not None:
        raise UnsupportedModelError(
            f"{where} adds a learned key and value to those of the tokens (add_bias_kv=True): these "
            "belong to no token, so that no edge could carry them; this is not supported"
        )
    if module.add_zero_attn:
        raise UnsupportedModelError(
            f"{where} adds a key and a value of zeros to those of the tokens (add_zero_attn=True), "
            "which is not supported"
        )
    if not isinstance(module.out_proj, nn.Linear):
        raise UnsupportedModelError(
            f"{where}.out_proj is a {type(module.out_proj).__name__}: only a plain nn.Linear can be "
            "told apart by head"
        )

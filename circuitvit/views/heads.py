"""What a stage of attention heads does inside: its pattern, its scores, and how much each token says.

Only the contract of stages is used where it is enough. A head's output is a weighted sum of values, so values
that are rows of the identity give the weights themselves, whatever way the model computes them.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvit.errors import OptionError, UnsupportedModelError
from circuitvit.models import Model, Stage
from circuitvit.models.stages import Reads


def attention_places(model: Model) -> list[int]:
    """The places among the model's stages of those whose senders are attention heads."""
    return [place for place, stage in enumerate(model.stages) if stage.nodes.kind == "attention"]


def attention_stage(model: Model, layer: int) -> int:
    """The place of a layer's attention stage; negative layers count from the last.

    Raises:
        OptionError: if there is no such layer.
    """
    places = attention_places(model)
    layers = [model.stages[place].nodes.layer for place in places]
    wanted = layers[layer] if -len(layers) <= layer < 0 else layer
    if wanted not in layers:
        raise OptionError(f"no attention in layer {layer}: {model.name} has it in layers {layers}")
    return places[layers.index(wanted)]


def pattern_of(stage: Stage, reads: Reads) -> Float[Tensor, "image head query key"]:
    """The attention pattern; each row sums to 1."""
    query, key, value = reads
    each = torch.eye(value.shape[-2], dtype=value.dtype, device=value.device)
    return stage.write((query, key, each.expand(*value.shape[:-1], -1)))


def scores_of(stage: Stage, reads: Reads) -> Float[Tensor, "image head query key"]:
    """What the softmax is taken of: scaled products of queries and keys, in nats.

    Raises:
        UnsupportedModelError: if the stage does not say how it computes them.
    """
    attention: Any = getattr(stage, "attention", None)
    if not all(hasattr(attention, part) for part in ("q_norm", "k_norm", "scale")):
        raise UnsupportedModelError(f"{type(stage).__name__} does not give its scores before the softmax")
    query, key = attention.q_norm(reads[0]), attention.k_norm(reads[1])
    product: Tensor = query @ key.transpose(-2, -1) * attention.scale
    return product


def spoken_of(stage: Stage, reads: Reads) -> Float[Tensor, "image head query key"]:
    """The length of what each key's value adds to the stream at each query: `|| pattern . v W_O ||`.

    A pattern alone misleads where values are short: heads rest on tokens that say nothing (Kobayashi et al.
    2020, "Attention is Not Only a Weight", arXiv:2004.10102).
    """
    alone = stage.expand(reads[2]).norm(dim=-1)  # (head, image, key)
    weighted: Tensor = pattern_of(stage, reads) * alone.transpose(0, 1)[:, :, None, :]
    return weighted

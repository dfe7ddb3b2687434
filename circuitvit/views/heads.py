"""Where a model's attention heads are, and how much each token says through them."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from circuitvit.errors import OptionError
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


def spoken_of(stage: Stage, reads: Reads) -> Float[Tensor, "image head query key"]:
    """The length of what each key's value adds to the stream at each query: `|| pattern . v W_O ||`.

    A pattern alone misleads where values are short: heads rest on tokens that say nothing (Kobayashi et al.
    2020, "Attention is Not Only a Weight", arXiv:2004.10102).
    """
    alone = stage.expand(reads[2]).norm(dim=-1)  # (head, image, key)
    weighted: Tensor = stage.pattern(reads) * alone.transpose(0, 1)[:, :, None, :]
    return weighted

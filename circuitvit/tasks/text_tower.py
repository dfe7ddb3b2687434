"""The text tower of a model of images and texts as a model, whose inputs are sentences.

Its stages are those of any model, under a causal mask; its features are what the end of the text reads, and
its logits the similarity to images that stay as they are.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from circuitvit.errors import DataError, ModelError, OptionError, UnsupportedModelError, check_whole
from circuitvit.models.edits import edited
from circuitvit.models.heads import Head, with_head
from circuitvit.models.layers import ReadoutStage
from circuitvit.models.registry import wrapped
from circuitvit.models.sentences import TextSpec
from circuitvit.tasks.images import Images, ImageSpec, as_images
from circuitvit.tasks.task import check_size

if TYPE_CHECKING:
    from circuitvit.models import Model

EXACT = (torch.float32, torch.float64)
"""What holds the numbers of tokens exactly."""


def text_tower(model: Model, images: ImageSpec | None = None, tokens: int | None = None) -> Model:
    """The text tower as a model: sentences in, similarity to fixed images out.

    A sentence is an image of one line, `(1, 1, token)`, that ends with the end of the text, which is what is
    read; so its place depends on the sentence. The logits are the model's own: scale times cosine, plus bias.

    Args:
        model: the image tower of a model of images and texts.
        images: what sentences are compared with: files, a folder, pictures or tensors. They go through the
            image tower once, now. Without them the logits are features.
        tokens: how many its sentences have, start and end among them: only edits at places, and what is read
            of a blank sentence, depend on it. By default as many as it takes.

    Raises:
        OptionError: if the model knows no words, or has a head of its own; or for that many tokens.
        UnsupportedModelError: if the text tower cannot be decomposed, or is in half precision.
        DataError: if images cannot be read, or two have the same name.
    """
    words = model.words
    if words is None:
        raise OptionError(
            f"{model.name} knows no words, so it has no text tower: that is for models of images and texts, "
            "such as CLIP: open_clip:MODEL/TAG, hf:NAME, or a module and its tokenizer, "
            "cv.wrap(clip, tokenizer=...)"
        )
    if model.dtype not in EXACT:
        kind = str(model.dtype).removeprefix("torch.")
        raise UnsupportedModelError(
            f"{model.name} is in {kind}, in which the numbers of tokens would be rounded: load it with "
            "dtype=torch.float32 for its text tower"
        )
    seen = model if images is None else _image_tower(model)
    whole, most = words.family.whole(words.module), words.family.context(words.module)
    if tokens is not None:
        check_whole("the number of tokens (tokens)", tokens, 2)
        if tokens > most or (whole and tokens < most):
            few = "" if whole else "at most "
            raise OptionError(f"sentences of {model.name} have {few}{most} tokens, not {tokens}")
    spec = TextSpec.of(words.tokenizer, most, whole)
    name = f"text of {seen.name if images is not None else model.name}"
    tower = wrapped(words.module, words.family, name, None, spec, None)
    tower = replace(tower, preprocessing=spec.with_tokens(tokens or most))
    if images is None:
        return tower
    found = as_images(images, seen.preprocessing)
    scale, bias = words.scale, words.bias
    biases = None if bias is None else bias.expand(len(found)).clone()
    return with_head(tower, Head(_directions(seen, found), biases, _names(found), scale=scale))


def _image_tower(model: Model) -> Model:
    """The model whose logits are the features that are compared with sentences."""
    if model.head is None:
        return model
    if model.head.scale is None or model.under is None:
        raise OptionError(
            f"{model.name} has a head of its own, whose logits are not compared with sentences: give the "
            "model that it was put on"
        )
    if not isinstance(model.stages[-1], ReadoutStage):
        raise UnsupportedModelError(
            f"the logits of {model.name} are edited, and images are compared by their features: edit what "
            "comes before them"
        )
    return edited(model.under, model.edits, model.rules) if model.edits else model.under


def _names(images: Images) -> tuple[str, ...]:
    twice = [name for name, count in Counter(images.names).items() if count > 1]
    if twice:
        raise DataError(
            f"two images are called {twice[0]}, and classes are told apart by their names: rename one of them"
        )
    return images.names


@torch.no_grad()
def _directions(model: Model, images: Images) -> Float[Tensor, "image width"]:
    """Images as directions of length 1."""
    images.check(progress=False)
    check_size(images, model)
    found = torch.cat(
        [model(images.take(row, row + 1).to(model.device, model.dtype)) for row in range(len(images))]
    )
    if not found.isfinite().all():
        raise ModelError(f"{model.name} gives NaN or infinite features for an image")
    return F.normalize(found, dim=-1)

"""A readout with its norms held at the scales of a run: an affine map from the stream to what it gives.

`Readout.affine` asks for one weighted sum of the logits, and goes from there back to the stream. Here parts
of the stream are carried forward to the whole output, such as an image embedding, one vector for each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitvit.errors import UnsupportedModelError
from circuitvit.models.heads import features_of, refuse_edited_features
from circuitvit.models.layers import ReadoutStage
from circuitvit.models.model import Model
from circuitvit.models.parts import Chain, Cosine, Linear, Norm, Readout
from circuitvit.models.stages import through


def embedding_readout(model: Model) -> ReadoutStage:
    """The readout of a model's features: without its classifier, or the head that was put on it.

    Raises:
        UnsupportedModelError: if it is not known, or there are several.
    """
    base = model.bare or model
    own = base.stages[-1]
    assert isinstance(own, ReadoutStage), "the last stage of a model is its readout"
    refuse_edited_features(model)
    if base.head is None and own.parts is not None and len(own.parts.heads) > 1:
        raise UnsupportedModelError(
            f"{model.name} has {len(own.parts.heads)} classifiers ({', '.join(own.parts.names)}), which read "
            "different tokens, so it has no one embedding: choose output='logits'"
        )
    return features_of(base)


def logits_readout(model: Model) -> ReadoutStage:
    """The readout of a model's logits.

    Raises:
        UnsupportedModelError: if they are edited.
    """
    own = model.stages[-1]
    if not isinstance(own, ReadoutStage):
        raise UnsupportedModelError("the logits are edited: the readout cannot be made linear")
    return own


@dataclass(frozen=True, eq=False)
class Held:
    """The readout of a run, made affine.

    Attributes:
        readout: its parts.
        normed: what it pooled in that run, `(image, token, d_model)`.
        scale: what the norm multiplied each token with, `(image, token, 1)`.
        after: what the norm of the pooled vectors did, `(image, classifier, 1)`.
        read: what the classifiers read, `(image, classifier, width)`.
    """

    readout: Readout
    normed: Float[Tensor, "image token d_model"]
    scale: Float[Tensor, "image token 1"]
    after: Float[Tensor, "image classifier 1"]
    read: Float[Tensor, "image classifier width"]

    @classmethod
    def at(cls, stage: ReadoutStage, stream: Float[Tensor, "image token d_model"]) -> Held:
        """That of a run whose readout has read this.

        Raises:
            UnsupportedModelError: if the readout is not made of known parts.
        """
        readout = stage.known_parts("none that can be made linear")
        normed = readout.norm(stream)
        pooled = readout.pool(normed)
        scale, after = readout.norm.standardise(stream)[1], readout.after.standardise(pooled)[1]
        return cls(readout, normed, scale, after, readout.after(pooled))

    def push(self, parts: Float[Tensor, "part image token d_model"]) -> Float[Tensor, "part image width"]:
        """What each part of the stream adds to the output.

        Raises:
            UnsupportedModelError: if a classifier is not linear.
        """
        return self._from_normed(_scaled(self.readout.norm, parts, self.scale))

    def output(self) -> Float[Tensor, "image width"]:
        """What the readout gave in that run."""
        heads = enumerate(self.readout.heads)
        return torch.stack([head(self.read[:, place]) for place, head in heads]).mean(dim=0)

    def constants(self) -> dict[str, Float[Tensor, "image width"]]:
        """What the stream has no part in, by name."""
        readout, found = self.readout, dict[str, Tensor]()
        if readout.norm.bias is not None:
            found["norm.bias"] = self._from_normed(readout.norm.bias.expand_as(self.normed)[None])[0]
        if readout.after.bias is not None:
            found["fc_norm.bias"] = self._from_read(readout.after.bias.expand_as(self.read)[None])[0]
        biases = [self._from_read(torch.zeros_like(self.read)[None], biased=True)[0]]
        if bool(biases[0].any()):
            found["head.bias"] = biases[0]
        return found

    def _from_normed(self, parts: Tensor) -> Tensor:
        """Token, average and maximum pooling are linear at a run: the maximum is taken where it was then."""

        def pooled(part: Tensor) -> Tensor:
            found: Tensor = torch.func.jvp(self.readout.pool, (self.normed.to(part),), (part,))[1]
            return found

        each: Tensor = torch.func.vmap(pooled)(parts)
        return self._from_read(_scaled(self.readout.after, each, self.after))

    def _from_read(self, parts: Tensor, biased: bool = False) -> Tensor:
        heads = zip(self.readout.heads, self.readout.names, strict=True)
        each = [
            _through(head, name, parts[:, :, place], self.read[:, place], biased)
            for place, (head, name) in enumerate(heads)
        ]
        return torch.stack(each).mean(dim=0)


def _scaled(norm: Norm, parts: Tensor, scale: Tensor) -> Tensor:
    """Parts of what a norm is given, `(part, ..., width)`, at the scale of the run and without its bias."""
    centred = parts - parts.mean(dim=-1, keepdim=True) if norm.centred else parts
    return centred * scale if norm.weight is None else centred * scale * norm.weight


def _through(
    head: nn.Module | Linear | Chain, name: str, parts: Tensor, read: Tensor, biased: bool
) -> Float[Tensor, "part image width"]:
    """What a classifier makes of parts of what it has `read`; its biases are added where asked for."""
    if isinstance(head, nn.Identity):
        return parts
    if isinstance(head, (nn.Sequential, Chain)):
        for place, each in enumerate(head):
            parts, read = _through(each, f"{name}.{place}", parts, read, biased), each(read)
        return parts
    if not isinstance(head, (nn.Linear, Linear, Cosine)):
        raise UnsupportedModelError(f"{name} is a {type(head).__name__}: only a linear classifier has parts")
    found = parts @ head.weight.t().to(parts)
    if isinstance(head, Cosine):
        found = found * head.scale / head.length(read)
    return found + head.bias if biased and head.bias is not None else found


# -- the classifier ------------------------------------------------------------------------------


def classifier_of(model: Model) -> nn.Module | Linear | Chain:
    """What makes logits of the features that `embedding_readout` gives.

    Raises:
        UnsupportedModelError: if the model has no classes, or the classifier is not known.
    """
    base = model.bare or model
    if base.head is not None and base.head.weight is not None:
        return base.head.like(base).module()
    own = base.stages[-1]
    assert isinstance(own, ReadoutStage), "the last stage of a model is its readout"
    if not base.has_classes:
        raise UnsupportedModelError(
            f"{model.name} gives features, and no logits of classes: put a head on it (cv.with_head), or "
            "prompts (model.with_prompts)"
        )
    parts = own.known_parts("none whose classifier is known")
    if len(parts.heads) > 1:
        raise UnsupportedModelError(
            f"{model.name} has {len(parts.heads)} classifiers ({', '.join(parts.names)}), which read "
            "different tokens"
        )
    return parts.heads[0]


@torch.no_grad()
def class_directions(model: Model) -> Float[Tensor, "class width"]:
    """The direction of each class in the space of the features.

    Raises:
        UnsupportedModelError: if the classifier is not known or not linear.
    """
    classifier = classifier_of(model)
    blank = torch.zeros(1, *model.preprocessing.shape, device=model.device, dtype=model.dtype)
    features = through((*model.stages[1:-1], embedding_readout(model)), model.embed(blank))
    basis = torch.eye(features.shape[1], dtype=features.dtype, device=features.device)
    return _through(classifier, "head", basis[None], torch.ones_like(basis[:1]), False)[0].t()

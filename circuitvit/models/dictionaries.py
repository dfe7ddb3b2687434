"""Dictionaries of features: sparse autoencoders and transcoders, whoever trained them.

A dictionary writes an activation as a sum of a few of its many directions:

    features = act(x encoder' + offset),    x ~ features decoder + bias

Whatever is subtracted from x before it is read, and whatever scales it, is folded into encoder and offset, so
that one formula serves all that people train.

Bricken et al. 2023, "Towards Monosemanticity: Decomposing Language Models With Dictionary Learning"; Gao et
al. 2024, "Scaling and evaluating sparse autoencoders", arXiv:2406.04093 (top-k); Rajamanoharan et al. 2024,
"Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU Sparse Autoencoders", arXiv:2407.14435;
Dunefsky et al. 2024, "Transcoders Find Interpretable LLM Feature Circuits", arXiv:2406.11944.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from circuitvit.errors import ModelError, OptionError, check_whole, unknown_name
from circuitvit.graph.files import TEXT, record, write_bytes
from circuitvit.models.decompose import frozen_twin

if TYPE_CHECKING:
    from circuitvit.models.model import Model

DictionaryKind = Literal["relu", "jumprelu", "topk"]
"""What becomes of a feature's pre-activation: its positive part; itself where it is above a threshold, or 0;
its positive part if it is among the k largest of its token, or 0."""

DictionaryReads = Literal["output", "input"]
"""What a dictionary is shown: the activation that it rebuilds, or, of a transcoder, what the MLP that it
stands in for is given."""

DICTIONARY_SCHEMA = "circuitvit.dictionary/1"

DICTIONARY_FILE = record(
    "schema kind k reads site labels card",
    schema={"const": DICTIONARY_SCHEMA},
    kind={"enum": list(get_args(DictionaryKind))},
    k={"type": ["integer", "null"]},
    reads={"enum": list(get_args(DictionaryReads))},
    site={"type": ["string", "null"]},
    labels={"anyOf": [{"type": "null"}, {"type": "array", "items": TEXT}]},
    card={"type": ["object", "null"]},
)
"""What stands in the header of a file."""


@dataclass(frozen=True, eq=False, repr=False)
class Dictionary:
    """Directions of an activation, and how strongly each of them is there.

    Attributes:
        encoder: `(feature, width)`.
        offset: `(feature,)`, added before the activation function.
        decoder: `(feature, width)`: the direction that each feature writes.
        bias: `(width,)`, added to what the features write.
        kind: of the activation function, see `DictionaryKind`.
        threshold: `(feature,)` of a "jumprelu", else None.
        k: of a "topk", else None.
        reads: "output", or "input" for a transcoder, see `DictionaryReads`.
        site: name of the activation that it was trained on, such as "m8", or None where that is not known.
        labels: a name for each feature, or None.
        card: what is known of it, such as how it was trained, as JSON can hold it; or None.

    Raises:
        OptionError: for shapes, kinds of numbers and names that do not fit each other.
        ModelError: for numbers that are NaN or infinite.

    Example:
        >>> signs = torch.cat([torch.eye(3), -torch.eye(3)])  # the positive and negative part of each number
        >>> dictionary = Dictionary(signs, torch.zeros(6), signs, torch.zeros(3), "relu")
        >>> dictionary.decode(dictionary.encode(torch.tensor([1.0, -2.0, 0.5])))
        tensor([ 1.0000, -2.0000,  0.5000])
        >>> dictionary
        Dictionary(6 features of width 3, relu)
    """

    encoder: Float[Tensor, "feature width"]
    offset: Float[Tensor, " feature"]
    decoder: Float[Tensor, "feature width"]
    bias: Float[Tensor, " width"]
    kind: DictionaryKind
    threshold: Float[Tensor, " feature"] | None = None
    k: int | None = None
    reads: DictionaryReads = "output"
    site: str | None = None
    labels: tuple[str, ...] | None = None
    card: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(DictionaryKind):
            raise unknown_name("kind of dictionary", self.kind, get_args(DictionaryKind))
        if self.reads not in get_args(DictionaryReads):
            raise unknown_name("thing for a dictionary to read", self.reads, get_args(DictionaryReads))
        self._check_tensors()
        if (self.threshold is not None) != (self.kind == "jumprelu"):
            raise OptionError("a jumprelu dictionary has a threshold for each feature, and no other kind has")
        if (self.k is not None) != (self.kind == "topk"):
            raise OptionError("a topk dictionary says its k, and no other kind does")
        if self.k is not None:
            check_whole("the k of a topk dictionary", self.k)
            if self.k > self.n_features:
                raise OptionError(f"a dictionary of {self.n_features} features cannot keep the top {self.k}")
            object.__setattr__(self, "k", int(self.k))  # as JSON can hold it
        self._check_words()

    def _check_words(self) -> None:
        """Refuse what no file could hold."""
        site, labels, card = (getattr(self, name) for name in ("site", "labels", "card"))
        if site is not None and not (site and isinstance(site, str)):
            raise OptionError(f"the site of a dictionary is a name such as 'm8', or None, not {site!r}")
        if card is not None and not isinstance(card, Mapping):
            raise OptionError(f"the card of a dictionary is a mapping, or None, not {type(card).__name__}")
        if labels is None:
            return
        if not isinstance(labels, (list, tuple)) or not all(isinstance(each, str) for each in labels):
            raise OptionError("the labels of a dictionary are texts, one for each feature, or None")
        if len(labels) != self.n_features:
            raise OptionError(f"{len(labels)} labels for a dictionary of {self.n_features} features")
        object.__setattr__(self, "labels", tuple(labels))

    def _check_tensors(self) -> None:
        """Refuse tensors that do not fit each other, or with which nothing can be computed."""
        given: dict[str, object] = {**self.tensors}
        for name, each in given.items():
            if not isinstance(each, Tensor) or not each.is_floating_point():
                what = each.dtype if isinstance(each, Tensor) else type(each).__name__
                raise OptionError(f"the {name} of a dictionary is a tensor of real numbers, not {what}")
            if each.is_meta or each.layout != torch.strided:
                raise OptionError(f"the {name} of a dictionary is a meta or sparse tensor: give its numbers")
        shape = tuple(self.encoder.shape)
        if len(shape) != 2 or 0 in shape:
            raise OptionError(f"the encoder of a dictionary is (feature, width), not {shape}")
        fitting = {"encoder": shape, "decoder": shape, "bias": shape[1:]}
        for name, tensor in self.tensors.items():
            wanted = fitting.get(name, shape[:1])
            if tuple(tensor.shape) != wanted:
                raise OptionError(
                    f"the {name} of a dictionary of {shape[0]} features of width {shape[1]} is {wanted}, "
                    f"not {tuple(tensor.shape)}"
                )
            if (tensor.dtype, tensor.device) != (self.encoder.dtype, self.encoder.device):
                raise OptionError(
                    f"the {name} is {tensor.dtype} on {tensor.device}, and the encoder {self.encoder.dtype} "
                    f"on {self.encoder.device}: a dictionary is of one kind of numbers, in one place"
                )
            if not tensor.isfinite().all():
                raise ModelError(f"the {name} of the dictionary holds NaN or infinite values")

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name, those that it has."""
        names = ("encoder", "offset", "decoder", "bias", "threshold")
        each = {name: getattr(self, name) for name in names}
        return {name: tensor for name, tensor in each.items() if tensor is not None}

    @property
    def n_features(self) -> int:
        """How many features there are."""
        return self.encoder.shape[0]

    @property
    def width(self) -> int:
        """How many numbers an activation has."""
        return self.encoder.shape[1]

    def encode(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch feature"]:
        """How strongly each feature is there; of gradients, those of features that are.

        Raises:
            OptionError: for activations of another width or kind of numbers.
        """
        if x.shape[-1:] != (self.width,):
            raise OptionError(f"activations of shape {tuple(x.shape)} for a dictionary of width {self.width}")
        if x.dtype != self.encoder.dtype:
            raise OptionError(
                f"{x.dtype} for a dictionary of {self.encoder.dtype}: use dictionary.to(dtype={x.dtype})"
            )
        raw = functional.linear(x, self.encoder, self.offset)
        if self.threshold is not None:
            return torch.where(raw > self.threshold, raw, 0.0)
        if self.k is not None:
            largest, places = raw.topk(self.k, dim=-1)
            return torch.zeros_like(raw).scatter(-1, places, largest.relu())
        return raw.relu()

    def decode(self, features: Float[Tensor, "*batch feature"]) -> Float[Tensor, "*batch width"]:
        """The activation that features stand for, as far as the dictionary can say it.

        Raises:
            OptionError: for another number of features or kind of numbers.
        """
        if features.shape[-1:] != (self.n_features,) or features.dtype != self.decoder.dtype:
            raise OptionError(
                f"features of shape {tuple(features.shape)} in {features.dtype} for a dictionary of "
                f"{self.n_features} features in {self.decoder.dtype}"
            )
        return features @ self.decoder + self.bias

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Dictionary:
        """The dictionary elsewhere, or of other numbers, and without gradients of its own."""
        plain = {name: each.clone() if each.is_inference() else each for name, each in self.tensors.items()}
        moved: dict[str, Any] = {name: each.detach().to(device, dtype) for name, each in plain.items()}
        return replace(self, **moved)

    def save(self, path: str | Path) -> Path:
        """Write the dictionary as one safetensors file, which `load_dictionary` reads.

        Raises:
            FileError: if it cannot be written.
            OptionError: if its card holds what JSON cannot.
        """
        said: dict[str, Any] = {
            "schema": DICTIONARY_SCHEMA,
            "kind": self.kind,
            "k": self.k,
            "reads": self.reads,
        }
        said |= {"site": self.site, "labels": self.labels, "card": self.card}
        try:
            text = json.dumps(said, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise OptionError(f"the card of a dictionary is made of what JSON can hold: {error}") from error
        tensors = {name: each.detach().cpu().contiguous() for name, each in self.tensors.items()}
        return write_bytes(path, save(tensors, {"dictionary": text}))

    def __repr__(self) -> str:
        kind = self.kind if self.k is None else f"top {self.k}"
        what = "transcoder" if self.reads == "input" else "features"
        place = "" if self.site is None else f", {what} of {self.site}"
        return f"Dictionary({self.n_features} features of width {self.width}, {kind}{place})"


# -- dictionaries that are not ours --------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Foreign:
    """An object with `encode` and `decode`, of which nothing more is known.

    Attributes:
        given: the object.
        n_features: how many features it has.
        like: a tensor of the dtype and on the device that it works in.
    """

    given: Any
    n_features: int
    like: Tensor

    def encode(self, x: Tensor) -> Tensor:
        """How active each feature is, `(..., feature)`."""
        features: Tensor = self.given.encode(x)
        return features

    def decode(self, active: Tensor) -> Tensor:
        """What features say, `(..., width)`."""
        said: Tensor = self.given.decode(active)
        return said


@torch.inference_mode(False)  # tensors made within it could not be used outside of it
@torch.no_grad()
def fitted(dictionary: Any, node: str, width: int, model: Model) -> Any:
    """A dictionary as the model needs it: of this width, in its dtype and on its device.

    Raises:
        OptionError: if it is of another site or width; or, of one that is not ours, is not applied token by
            token, has no gradient, or decodes by something that is not affine.
    """
    like = next(model.module.parameters())
    if isinstance(dictionary, Dictionary):
        if dictionary.site is not None and dictionary.site.removesuffix(".z") != node.removesuffix(".z"):
            raise OptionError(
                f"the dictionary is of {dictionary.site}, not of {node}; if it is meant for {node} all the "
                "same: dataclasses.replace(dictionary, site=None)"
            )
        if dictionary.width != width:
            raise OptionError(f"a dictionary of width {dictionary.width}, and {node} has {width}")
        return dictionary.to(like.device, like.dtype)
    if isinstance(dictionary, nn.Module):
        dictionary = frozen_twin(dictionary)  # its parameters get no gradients, and its mode stays what it is
    noise = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(0)).to(like)
    kind, shape = type(dictionary).__name__, tuple(noise.shape)
    try:
        with torch.enable_grad():
            active = dictionary.encode(noise.clone().requires_grad_())
            said = dictionary.decode(active)
    except Exception as error:  # whatever a foreign object raises
        raise OptionError(
            f"{kind}.encode and decode cannot be run on activations of {node}, {shape} in {like.dtype}: "
            f"{error}"
        ) from error
    if not isinstance(active, Tensor) or active.shape[:2] != shape[:2] or active.ndim != 3:
        raise OptionError(f"{kind}.encode gives no tensor (..., feature) for activations (..., {width})")
    if not isinstance(said, Tensor) or said.shape != shape:
        got = tuple(said.shape) if isinstance(said, Tensor) else type(said).__name__
        raise OptionError(f"{kind}.decode gives {got} for activations {shape}")
    for name, each in (("encode", active), ("decode", said)):
        if each.dtype != like.dtype:
            raise OptionError(f"{kind}.{name} gives {each.dtype} for activations in {like.dtype}: convert it")
        if not each.requires_grad:
            raise OptionError(f"{kind}.{name} gives what has no gradient: it must not detach its input")
        if not each.numel() or not each.isfinite().all():
            raise OptionError(f"{kind}.{name} gives no numbers, or NaN or infinite ones")
    _check_forms(dictionary, noise, active.detach(), kind)
    return Foreign(dictionary, active.shape[-1], like)


def _check_forms(dictionary: Any, noise: Tensor, active: Tensor, kind: str) -> None:
    tolerance = 1e3 * torch.finfo(noise.dtype).eps
    alone = dictionary.encode(noise[1:, 2:3])
    same = alone.shape[-1] == active.shape[-1]
    if not same or float((alone - active[1:, 2:3]).abs().max()) > tolerance * (1 + float(active.abs().max())):
        raise OptionError(
            f"{kind}.encode gives a token something else when other tokens or images are there, or each time "
            "that it is asked: a dictionary is a function of the activation of one token"
        )
    other, none = active.flip(1), torch.zeros_like(active)
    parts = dictionary.decode(active) + dictionary.decode(other) - dictionary.decode(none)
    whole = dictionary.decode(active + other)
    if float((parts - whole).abs().max()) > tolerance * (1 + float(whole.abs().max())):
        raise OptionError(f"{kind}.decode is not affine: features have no directions of their own")

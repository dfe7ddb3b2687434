"""A linear classifier put on the features of a model: on one without classes, or in place of its own.

The head reads what the model's own classifier would, after the same pooling and norms, or one kind of tokens
instead. All other stages stay as they were checked when the model was wrapped, and the new readout is made
of the same parts; so every method works on it as on a model that came with this classifier.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from circuitvit.errors import (
    FileError,
    ModelError,
    OptionError,
    UnsupportedModelError,
    counted,
    unknown_name,
)
from circuitvit.graph.files import TEXT, check_version, record, write_bytes
from circuitvit.models.edits import edited
from circuitvit.models.layers import ReadoutStage
from circuitvit.models.parts import Chain, Cosine, Linear, Readout
from circuitvit.models.refined import refined

if TYPE_CHECKING:
    from circuitvit.models.model import Model

HEAD_SCHEMA = "circuitvit.head/1"

HeadTokens = Literal["pooled", "cls", "mean"]
"""What a head reads: the model's own pooled features, the class token, or the mean of the patches."""

_FILE = record(
    "schema tokens classes",
    schema={"const": HEAD_SCHEMA},
    tokens={"enum": list(get_args(HeadTokens))},
    classes={"anyOf": [{"type": "null"}, {"type": "array", "items": TEXT}]},
    templates={"type": "array", "items": TEXT},
)


@dataclass(frozen=True, eq=False, repr=False)
class Head:
    """A linear classifier, and what it reads.

    Attributes:
        weight: `(class, width)`; None for the features themselves.
        bias: `(class,)` or None.
        classes: names of the logits, or None.
        tokens: what the features are of, see `HeadTokens`.
        scale: `()`, what the cosines of features and directions are multiplied with, where the logits are
            cosines; the rows of the weight are of length 1 then. None where they are products.
        templates: where the classes are prompts, the sentences that they were put in; None where they are
            not.

    Raises:
        OptionError: for shapes and names that do not fit each other, unknown tokens, directions that are not
            of length 1.
        ModelError: for weights that are NaN or infinite.

    Example:
        >>> Head(torch.zeros(2, 64), classes=("cat", "dog"))
        Head(2 classes on 64 pooled features)
    """

    weight: Float[Tensor, "class width"] | None
    bias: Float[Tensor, " class"] | None = None
    classes: tuple[str, ...] | None = None
    tokens: HeadTokens = "pooled"
    scale: Float[Tensor, ""] | None = None
    templates: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.tokens not in get_args(HeadTokens):
            raise unknown_name("kind of features", str(self.tokens), get_args(HeadTokens))
        if self.weight is None:
            if self.bias is not None or self.classes is not None or self.scale is not None:
                raise OptionError("features without a weight have no bias, no scale and no classes")
            return
        shape = tuple(self.weight.shape)
        if len(shape) != 2 or 0 in shape:
            raise OptionError(
                f"the weight of a head is (class, width), not {shape}; for one logit it is weight[None]"
            )
        if self.bias is not None and tuple(self.bias.shape) != shape[:1]:
            raise OptionError(f"a bias of shape {tuple(self.bias.shape)} for {shape[0]} logits")
        if self.classes is not None and len(self.classes) != shape[0]:
            raise OptionError(f"{len(self.classes)} class names for a head with {shape[0]} logits")
        for name, tensor in self.tensors.items():
            if not tensor.is_floating_point():
                raise OptionError(f"the {name} of a head is made of real numbers, not of {tensor.dtype}")
            if not tensor.isfinite().all():
                raise ModelError(f"the {name} of the head holds NaN or infinite values")
        if self.scale is not None:
            self._check_cosines(self.scale, self.weight)

    @staticmethod
    def _check_cosines(scale: Tensor, weight: Tensor) -> None:
        if scale.ndim or not scale > 0:
            raise OptionError(f"the scale of cosines is one positive number, not {scale!r:.60}")
        off = (weight.double().norm(dim=1) - 1).abs().max()
        if off > 1e-2:
            raise OptionError(
                f"cosines are taken with directions of length 1, and one of these is off by {off:.2g}: "
                "divide each row by its length"
            )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Weight, bias and scale by name, where they are."""
        each = {"weight": self.weight, "bias": self.bias, "scale": self.scale}
        return {name: tensor for name, tensor in each.items() if tensor is not None}

    def like(self, model: Model) -> Head:
        """The head in the dtype and on the device of a model; its memory is shared where it is so already."""
        moved = {}
        for name, each in self.tensors.items():
            plain = each.clone() if each.is_inference() else each.detach()
            alike = plain.to(model.device, model.dtype).contiguous()
            moved[name] = nn.Parameter(alike, requires_grad=False)
        return replace(self, weight=moved.get("weight"), bias=moved.get("bias"), scale=moved.get("scale"))

    def module(self) -> nn.Module:
        """The classifier as a module, of the very parameters that `like` made."""
        if self.weight is None:
            return nn.Identity()
        width, count = self.weight.shape[1], len(self.weight)
        if self.scale is not None:
            weight, scale, bias = (self.tensors.get(name) for name in ("weight", "scale", "bias"))
            return Cosine(weight, scale, bias).eval()  # type: ignore[arg-type]  # they are parameters by now
        linear = nn.Linear(width, count, bias=self.bias is not None, device="meta")
        for name, tensor in self.tensors.items():
            setattr(linear, name, tensor)
        return linear.eval()

    def save(self, path: str | Path) -> None:
        """Write the head as one safetensors file, with its classes and tokens as JSON in the header.

        Raises:
            FileError: if it cannot be written.
            OptionError: if there is no weight.
        """
        if self.weight is None:
            raise OptionError("features without a weight are no head to be saved")
        said = {"schema": HEAD_SCHEMA, "tokens": self.tokens, "classes": self.classes}
        if self.templates is not None:
            said["templates"] = self.templates
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        write_bytes(path, save(tensors, {"head": json.dumps(said)}))

    @classmethod
    def load(cls, path: str | Path) -> Head:
        """Read what `save` wrote.

        Raises:
            FileError: if the file is missing, damaged, or no head.
        """
        path = Path(path)
        if not path.is_file():
            raise FileError(f"cannot read the head {path}: there is no such file")
        try:
            with safe_open(path, "pt") as opened:
                said = json.loads((opened.metadata() or {}).get("head", "null"))
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise FileError(f"{path} is no head, or a damaged one: {error}") from error
        if not isinstance(said, dict) or not {"weight"} <= set(tensors) <= {"weight", "bias", "scale"}:
            raise FileError(f"{path} is no head that model.head.save wrote")
        check_version(path, said, _FILE, HEAD_SCHEMA)
        names = said["classes"]
        try:
            classes = None if names is None else tuple(names)
            templates = tuple(said["templates"]) if "templates" in said else None
            return cls(**tensors, classes=classes, tokens=said["tokens"], templates=templates)
        except (OptionError, ModelError) as error:
            raise FileError(f"{path}: {error}") from error

    def __repr__(self) -> str:
        if self.weight is None:
            return f"Head({self.tokens} features)"
        count, width = self.weight.shape
        compared = "on" if self.scale is None else "by cosine with"
        return f"Head({count} classes {compared} {width} {self.tokens} features)"


def with_head(
    model: Model,
    weight: Head | Float[Tensor, "class width"] | NDArray[np.floating] | str | Path | None,
    bias: Float[Tensor, " class"] | NDArray[np.floating] | None = None,
    *,
    classes: Sequence[str] | None = None,
    tokens: HeadTokens = "pooled",
) -> Model:
    """The same model with this linear classifier on its features, in place of its own if it has one.

    Tensors in the model's own dtype and on its device are shared: an edit in place is an edit of the head.

    Args:
        model: from `load` or `wrap`; it stays as it is.
        weight: `(class, width)`; or a `Head`, or the file of one, which say the rest themselves; or None for
            the features alone, for metrics such as `similarity`.
        bias: `(class,)`, or None.
        classes: names of the logits, in order.
        tokens: what the head reads: "pooled", what the model's own classifier reads or the features that it
            gives; "cls", the class token; "mean", the mean of the patches. All after the model's own norms,
            and the last two before a projection of its own.

    Raises:
        OptionError: if shapes or names do not fit, the model has no such tokens, or it has a head put on it
            already.
        ModelError: if weights are NaN or infinite.
        FileError: if the file cannot be read.
        UnsupportedModelError: if the parts of the model's readout are not known.

    Example:
        >>> import circuitvit as cv
        >>> model = with_head(cv.load("catdog-tiny"), torch.randn(2, 64), classes=["wild", "tame"])
        >>> model.n_logits, model.head
        (2, Head(2 classes on 64 pooled features))
    """
    if isinstance(weight, (Head, str, Path)):
        if bias is not None or classes is not None or tokens != "pooled":
            raise OptionError("a Head says its bias, classes and tokens itself: leave them out")
        head = weight if isinstance(weight, Head) else Head.load(weight)
    else:
        names = None if classes is None else tuple(classes)
        head = Head(_tensor(weight, "weight"), _tensor(bias, "bias"), names, tokens)
    if model.bare is not None:
        refuse_edited_features(model)
        return edited(with_head(model.bare, head), model.edits, model.rules)
    if model.coarse is not None:
        return refined(with_head(model.coarse, head), model.refinements, model.rules)
    if model.head is not None:
        raise OptionError(f"{model.name} has a head put on already: give the model that it was put on")
    features = _features(model, head.tokens)
    width = _width(model, features)
    if head.weight is not None and head.weight.shape[1] != width:
        raise OptionError(
            f"a head on {head.weight.shape[1]} features, and {model.name} has {width} ({head.tokens})"
        )
    with torch.inference_mode(False):  # it outlives the caller's mode
        head = head.like(model)
        readout = _headed(features, head.module())
        readout = readout if model.rules is None else readout.with_rules(model.rules)
    put_on = "features" if head.weight is None else f"a head of {len(head.weight)}"
    if head.scale is not None and head.weight is not None:
        of_images = model.preprocessing.what == "sentence"
        put_on = counted(len(head.weight), "image" if of_images else "prompt")
    made = replace(
        model,
        name=f"{model.name} with {put_on}" + ("" if head.tokens == "pooled" else f" on {head.tokens}"),
        stages=(*model.stages[:-1], readout),
        n_logits=width if head.weight is None else len(head.weight),
        classes=head.classes,
        synsets=None,
        has_classes=head.weight is not None,
        card=None,
        head=head,
        under=model,
        origin=model.origin.afresh(),
    )
    made.refresh()
    return made


def refuse_edited_features(model: Model) -> None:
    """Refuse a model whose logits are features, and are edited: what reads them would not see the edit.

    Raises:
        UnsupportedModelError: for such a model.
    """
    bare = model.bare or model
    if not bare.has_classes and model.stages[-1] is not bare.stages[-1]:
        raise UnsupportedModelError(
            f"the logits of {model.name}, which are the features, are edited: edit what comes before them"
        )


def features_of(model: Model) -> ReadoutStage:
    """The readout of a model's features: what its classifier reads, or the head that was put on it.

    Raises:
        UnsupportedModelError: if they are not known, or there are several.
    """
    if model.head is not None and model.under is not None:
        return _features(model.under, model.head.tokens)
    return _features(model, "pooled")


# -- inside --------------------------------------------------------------------------------------


def _tensor(given: object, name: str) -> Tensor | None:
    if given is None or isinstance(given, Tensor):
        return given
    try:
        return torch.tensor(np.asarray(given))
    except (TypeError, ValueError) as error:
        raise OptionError(f"the {name} of a head is an array of numbers, not {given!r:.60}") from error


def _features(model: Model, tokens: HeadTokens) -> ReadoutStage:
    """The readout of a model without its classifier, on other tokens if they are asked for."""
    own = model.stages[-1]
    assert isinstance(own, ReadoutStage), "the last stage of a model is its readout"
    if tokens == "pooled" and not model.has_classes:
        return own
    parts = own.parts
    if parts is None:
        raise UnsupportedModelError(
            f"the readout of {model.name} is not known to be norms, a pooling and a linear classifier, so "
            "what a head could read is not known either: load the model without its classifier (timm: "
            "num_classes=0) and put the head on its pooled features"
        )
    pool, read = parts.pool, own.tokens
    if tokens == "pooled":
        if len(parts.heads) > 1:
            raise UnsupportedModelError(
                f"{model.name} has {len(parts.heads)} classifiers ({', '.join(parts.names)}), which read "
                "different tokens: put the head on one kind, tokens='cls' or 'mean'"
            )
    elif model.family.pool(model.module):
        raise UnsupportedModelError(
            f"{model.name} pools by stages of its own, after which there is one vector: leave out "
            f"tokens={tokens!r}"
        )
    elif tokens == "cls":
        if model.prefix[:1] != ("cls",):
            raise OptionError(f"{model.name} has no class token: choose tokens='mean' or 'pooled'")
        pool, read = _first, 1
    else:
        pool, read = partial(_mean_after, len(model.prefix)), None
    bare = replace(parts, pool=pool, heads=(nn.Identity(),), names=("head",))
    return _like(own, bare, bare, read)


def _headed(features: ReadoutStage, head: nn.Module) -> ReadoutStage:
    """A readout whose logits are the head's, on these features."""
    parts: Readout | None = None
    if features.parts is not None:
        heads = tuple(_then(each, head) for each in features.parts.heads)
        parts = replace(features.parts, heads=heads)
    return _like(features, parts or partial(_on, head, features.own), parts, features.tokens)


def _like(
    stage: ReadoutStage, own: Callable[[Tensor], Tensor], parts: Readout | None, tokens: int | None
) -> ReadoutStage:
    """A readout in the place of another, by this way of its own and reading these tokens."""
    made = ReadoutStage(stage.nodes.layer, own, parts)
    made.nodes, made.tokens = stage.nodes, tokens
    return made


def _then(before: nn.Module | Linear | Chain, head: nn.Module) -> nn.Module | Chain:
    """What there is already, such as a projection, and the head after it."""
    if isinstance(before, nn.Identity):
        return head
    return Chain((*(before.maps if isinstance(before, Chain) else (before,)), head))


def _on(head: nn.Module, own: Callable[[Tensor], Tensor], stream: Tensor) -> Tensor:
    logits: Tensor = head(own(stream))
    return logits


def _first(normed: Tensor) -> Float[Tensor, "batch 1 d_model"]:
    return normed[:, :1]


def _mean_after(prefix: int, normed: Tensor) -> Float[Tensor, "batch 1 d_model"]:
    """The mean of all tokens after the first few, which are no patches."""
    return normed[:, prefix:].mean(dim=1, keepdim=True)


@torch.no_grad()
def _width(model: Model, features: ReadoutStage) -> int:
    return int(features.write((model.embed(model.blank()),)).shape[-1])

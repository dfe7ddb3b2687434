"""A card: the JSON file next to a model's weights that says what they are and how they came to be.

The card holds all that is needed to rebuild the module (the keyword arguments of timm's
`VisionTransformer`), to prepare its images, to name its classes, to train it again, and to notice
that the weights beside it are not the ones it speaks of.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from torch import Tensor, nn

from circuitvit.errors import FileError, ModelError, counted
from circuitvit.graph.files import write_bytes
from circuitvit.models.timm_import import import_timm
from circuitvit.models.zoo.clip_module import ClipModule
from circuitvit.models.zoo.text_tower import END, MARKS, TextTower, WordTokenizer

SCHEMA = "circuitvit.card/1"


@dataclass(frozen=True)
class InputSpec:
    """How pictures become the model's input.

    Attributes:
        size: (channels, height, width).
        mean: subtracted from pixels in [0, 1], one number per channel.
        std: what they are then divided by.
        interpolation: how a picture of another size is resized.
        crop_pct: fraction of the resized picture that is kept, in the middle.
        crop_mode: "center", or "squash" for a picture that is resized without regard to its sides' ratio.
    """

    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"

    what: ClassVar[str] = "image"
    axes: ClassVar[tuple[str, ...]] = ("channel", "height", "width")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input, by its axes."""
        return self.size


@dataclass(frozen=True)
class ClipSpec(InputSpec):
    """How video files become the input of a model that sees clips `(time, channel, height, width)`.

    Attributes:
        frames: how many the model takes.
        stride: frames of the file from one that is taken to the next, out of its middle; None to spread them
            evenly over the whole file.
        repeat: whether a file with too few frames is stretched, some being taken several times; else it is
            refused.

    Example:
        >>> ClipSpec((3, 112, 112), (0.5,) * 3, (0.5,) * 3, frames=16).shape
        (16, 3, 112, 112)
    """

    frames: int = 16
    stride: int | None = None
    repeat: bool = False

    what: ClassVar[str] = "clip"
    axes: ClassVar[tuple[str, ...]] = ("time", "channel", "height", "width")

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.frames, *self.size)


@dataclass(frozen=True)
class Card:
    """What a bundled or self-trained model is; :meth:`load` and :meth:`save` are its JSON form.

    Attributes:
        name: of the model, such as "catdog-tiny".
        architecture: keyword arguments of `timm.models.vision_transformer.VisionTransformer`.
        input: how to prepare pictures.
        classes: names of the logits, in order.
        data: in words, what it was trained on.
        recipe: the training options, enough to train it again.
        seed: of initialisation and data.
        accuracy: at least "held_out" (fraction right) and "n" (of how many).
        weights_sha256: hash of the safetensors file.
        license: of the weights.
        library_version: of circuitvit, when it was trained.
        text: of a CLIP, keyword arguments of its text tower; its logits are features, and `classes` is empty.
        vocabulary: of a CLIP, the words that its sentences are made of.
    """

    name: str
    architecture: Mapping[str, Any]
    input: InputSpec
    classes: tuple[str, ...]
    data: str
    recipe: Mapping[str, Any]
    seed: int
    accuracy: Mapping[str, float]
    weights_sha256: str
    license: str
    library_version: str
    text: Mapping[str, Any] | None = None
    vocabulary: tuple[str, ...] | None = None
    schema: str = field(default=SCHEMA)

    @property
    def tokenizer(self) -> WordTokenizer | None:
        """That of a CLIP's text tower, None for other models."""
        if self.text is None or self.vocabulary is None:
            return None
        return WordTokenizer(self.vocabulary, self.text["context"])

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, ready for JSON; "schema" comes first."""
        content = asdict(self)
        del content["input"]["crop_mode"]  # always the same for models that are trained here
        if self.text is None:
            del content["text"], content["vocabulary"]
        return {"schema": content.pop("schema"), **content}

    @classmethod
    def from_dict(cls, content: object, source: str = "card") -> Card:
        """The card that `content` (parsed JSON) describes.

        Args:
            content: as :meth:`to_dict` gives it.
            source: what to call it in an error, usually the file's path.

        Raises:
            FileError: when something is missing, unknown, or of the wrong kind.
        """
        if not isinstance(content, dict):
            raise FileError(f"{source}: a card is a JSON object, not {type(content).__name__}")
        if content.get("schema") != SCHEMA:
            raise FileError(f"{source}: schema is {content.get('schema')!r}, this version reads {SCHEMA!r}")
        kinds = {**_CARD_KINDS, **(_CLIP_KINDS if "text" in content else {})}
        _check_fields(content, kinds, source)
        _check_fields(content["input"], _INPUT_KINDS, f"{source}: input")
        spec = content["input"]
        _check_values(content, spec, source)
        size = tuple(spec["size"])
        return cls(
            **{key: content[key] for key in kinds if key not in ("input", "classes", "vocabulary")},
            input=InputSpec(
                (size[0], size[1], size[2]), tuple(map(float, spec["mean"])), tuple(map(float, spec["std"])),
                spec["interpolation"], float(spec["crop_pct"]),
            ),
            classes=tuple(content["classes"]),
            vocabulary=tuple(content["vocabulary"]) if "text" in content else None,
        )  # fmt: skip

    @classmethod
    def load(cls, path: str | Path) -> Card:
        """Reads a card from a JSON file.

        Raises:
            FileError: when the file is missing, not JSON, or not a card.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
            content = json.loads(text)
        except OSError as error:
            raise FileError(f"cannot read the card {path}: {error.strerror}") from error
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError alike
            raise FileError(f"{path} is not JSON: {error}") from error
        return cls.from_dict(content, str(path))

    def save(self, path: str | Path) -> None:
        """Writes the card as JSON, whole or not at all.

        Raises:
            FileError: when the file cannot be written.
        """
        write_bytes(path, (json.dumps(self.to_dict(), indent=2) + "\n").encode())


_Kinds = Mapping[str, type | tuple[type, ...]]
_CARD_KINDS: _Kinds = {
    "name": str, "architecture": dict, "input": dict, "classes": list, "data": str, "recipe": dict,
    "seed": int, "accuracy": dict, "weights_sha256": str, "license": str, "library_version": str,
}  # fmt: skip
_CLIP_KINDS: _Kinds = {"text": dict, "vocabulary": list}
_INPUT_KINDS: _Kinds = {
    "size": list, "mean": list, "std": list, "interpolation": str, "crop_pct": (int, float)
}  # fmt: skip


def _check_fields(content: Mapping[str, Any], kinds: _Kinds, source: str) -> None:
    missing = [key for key in kinds if key not in content]
    unknown = [key for key in content if key not in kinds and key != "schema"]
    if missing:
        raise FileError(f"{source}: missing {', '.join(missing)}")
    if unknown:
        raise FileError(f"{source}: unknown {', '.join(unknown)}")
    for key, kind in kinds.items():
        if not isinstance(content[key], kind) or isinstance(content[key], bool):
            raise FileError(f"{source}: {key} cannot be a {type(content[key]).__name__}")


def _check_values(content: Mapping[str, Any], spec: Mapping[str, Any], source: str) -> None:
    if len(spec["size"]) != 3 or not all(isinstance(n, int) and n > 0 for n in spec["size"]):
        raise FileError(f"{source}: input size is [channels, height, width], not {spec['size']}")
    for key in ("mean", "std"):
        if len(spec[key]) != spec["size"][0] or not all(isinstance(v, (int, float)) for v in spec[key]):
            raise FileError(f"{source}: input {key} needs a number for each of {spec['size'][0]} channels")
    if not all(value > 0 for value in spec["std"]):
        raise FileError(f"{source}: input std must be above 0, not {spec['std']}")
    classes = content["classes"]
    if not all(isinstance(name, str) for name in classes) or len(set(classes)) != len(classes):
        raise FileError(f"{source}: classes must be different names")
    logits = content["architecture"].get("num_classes")
    if "text" in content:
        _check_text(content, source)
    elif logits != len(classes):
        raise FileError(f"{source}: {len(classes)} classes, but num_classes={logits}")
    digest = content["weights_sha256"]
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise FileError(f"{source}: weights_sha256 is not a SHA-256 in lower-case hexadecimal")
    if not {"held_out", "n"} <= set(content["accuracy"]):
        raise FileError(f"{source}: accuracy needs held_out and n")


def _check_text(content: Mapping[str, Any], source: str) -> None:
    text, words = content["text"], content["vocabulary"]
    if content["classes"]:
        raise FileError(f"{source}: with a text tower the classes are sentences, so classes is empty")
    if not all(isinstance(word, str) and word for word in words) or len(set(words)) != len(words):
        raise FileError(f"{source}: vocabulary must be different words")
    if not isinstance(text.get("context"), int) or text["context"] < 3:
        raise FileError(f"{source}: text needs a context of at least 3 tokens, not {text.get('context')!r}")
    if text.get("end", END) != END:
        raise FileError(f"{source}: sentences end with token {END}, not {text['end']!r}")
    if not all(isinstance(text.get(name, True), bool) for name in ("causal", "final_norm")):
        raise FileError(f"{source}: causal and final_norm of text are true or false")
    if text.get("vocabulary") != len(words) + len(MARKS):
        raise FileError(
            f"{source}: {len(words)} words and {len(MARKS)} marks, but text has vocabulary="
            f"{text.get('vocabulary')}"
        )
    if text.get("features") != content["architecture"].get("num_classes"):
        raise FileError(f"{source}: the towers give features of different widths")


def sha256(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def build_module(architecture: Mapping[str, Any], seed: int = 0) -> nn.Module:
    """A freshly initialised timm `VisionTransformer` in eval mode.

    Args:
        architecture: the constructor's keyword arguments.
        seed: of the initial weights; the global random state is left as it was.

    Raises:
        ModelError: for an argument that the constructor does not know or refuses.
    """
    import_timm()
    from timm.models.vision_transformer import VisionTransformer

    known = inspect.signature(VisionTransformer.__init__).parameters
    unknown = [key for key in architecture if key not in known or key == "self"]
    if unknown:
        raise ModelError(f"timm's VisionTransformer takes no argument {', '.join(map(repr, unknown))}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            module = VisionTransformer(**architecture)
        except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise ModelError(f"timm's VisionTransformer refuses {dict(architecture)}: {error}") from error
    assert isinstance(module, nn.Module)
    return module.eval()


def build_clip(architecture: Mapping[str, Any], text: Mapping[str, Any], seed: int = 0) -> ClipModule:
    """A freshly initialised CLIP in eval mode: :func:`build_module` and a text tower.

    Args:
        architecture: of the image tower.
        text: keyword arguments of :class:`~circuitvit.models.zoo.text_tower.TextTower`.
        seed: of the initial weights; the global random state is left as it was.

    Raises:
        ModelError: for an argument that one of the constructors does not know or refuses.
    """
    visual = build_module(architecture, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            tower = TextTower(**text)
        except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise ModelError(f"the text tower refuses {dict(text)}: {error}") from error
    return ClipModule(visual, tower).eval()


def load_module(card_path: str | Path) -> tuple[nn.Module, Card]:
    """The model of a card, with the weights from the `.safetensors` file next to it.

    Args:
        card_path: such as "out/birds.json", as `circuitvit train` writes it; the weights are then read
            from "out/birds.safetensors".

    Returns:
        The module in eval mode, on the CPU, in float32; and its card.

    Raises:
        FileError: when card or weights are missing, unreadable, or not those of each other.
        ModelError: when the weights do not fit the architecture.
    """
    card = Card.load(card_path)
    weights = Path(card_path).with_suffix(".safetensors")
    try:
        data = weights.read_bytes()
    except OSError as error:
        raise FileError(f"cannot read the weights {weights}: {error.strerror}") from error
    if sha256(data) != card.weights_sha256:
        raise FileError(
            f"{weights} is not the file that {card_path} describes: its SHA-256 is {sha256(data)}, "
            f"the card says {card.weights_sha256}"
        )
    try:
        state = parse_safetensors(data)
    except SafetensorError as error:
        raise FileError(f"{weights} is not a safetensors file: {error}") from error
    misfit = f"{weights} does not fit the architecture of {card_path}"
    _check_depth(card, state, misfit)
    with torch.device("meta"):  # shapes alone: a card's sizes take memory only once the file has them too
        _load(_built(card), {name: value.to("meta") for name, value in state.items()}, misfit)
    module = _built(card)
    _load(module, state, misfit)
    return module.eval(), card


# -- inside --------------------------------------------------------------------------------------


def _check_depth(card: Card, state: Mapping[str, Tensor], misfit: str) -> None:
    """A million blocks take minutes to make, even without their weights."""
    towers = (
        {"": card.architecture} if card.text is None else {"visual.": card.architecture, "text.": card.text}
    )
    for name, sizes in towers.items():
        start = f"{name}blocks."
        depth = len({key[len(start) :].split(".")[0] for key in state if key.startswith(start)})
        if isinstance(sizes.get("depth"), int) and sizes["depth"] != depth:
            raise ModelError(f"{misfit}: {counted(depth, 'block')}, and the card says depth={sizes['depth']}")


def _built(card: Card) -> nn.Module:
    return build_module(card.architecture) if card.text is None else build_clip(card.architecture, card.text)


def _load(module: nn.Module, state: Mapping[str, Tensor], misfit: str) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(f"{misfit}: {error}") from error

"""Models of transformers by name or folder, with their own preprocessing and class names.

Weights are read from safetensors alone, in the dtype asked for, tensor by tensor; code from the hub never
runs. Of a model of images and texts both towers are loaded where its tokenizer is there, and else its image
tower alone.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from circuitvit.errors import (
    CircuitViTError,
    FileError,
    ModelError,
    OptionError,
    UnsupportedModelError,
    unknown_name,
)
from circuitvit.models import checkpoints
from circuitvit.models.families.family import Loaded
from circuitvit.models.processor import MODES, ProcessorClips, ProcessorSpec
from circuitvit.models.timm_import import import_timm

TOWERS = {
    "BeitForMaskedImageModeling": "BeitModel",
    "CLIPModel": "CLIPVisionModelWithProjection",
    "SiglipModel": "SiglipVisionModel",
    "Siglip2Model": "Siglip2VisionModel",
    "ViTForMaskedImageModeling": "ViTModel",
    "DeiTForMaskedImageModeling": "DeiTModel",
    "ViTMAEForPreTraining": "ViTMAEModel",
}
"""The part of a whole model that sees images and gives one vector for each."""

OPTIONS = ("revision", "subfolder", "token", "cache_dir", "local_files_only")
"""Of `from_pretrained`, on where the files are."""

NUMBER = re.compile(r"\b\d+\b")

RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""Pillow's numbers, which image processors keep."""


def import_transformers() -> ModuleType:
    """The module `transformers`.

    Raises:
        ModelError: if it is not installed, or cannot be imported.
    """
    import_timm()  # after which torchvision can be imported, which transformers would trip over
    try:
        return import_module("transformers")
    except ImportError as error:
        raise ModelError(
            f"transformers cannot be imported ({error}): pip install 'circuitvit[transformers]'"
        ) from error


def load_hf(
    name: str, *, checkpoint: str | Path | None = None, dtype: torch.dtype | None = None, **options: Any
) -> Loaded:
    """A model of transformers.

    Args:
        name: on the hub, such as "google/vit-base-patch16-224", or a folder that `save_pretrained` wrote.
        checkpoint: must be None: a folder holds its own weights.
        dtype: of the weights; float32 by default.
        **options: `OPTIONS`.

    Raises:
        OptionError: for any other option.
        FileError: if a folder is missing or holds no configuration.
        ModelError: if transformers is not installed, or the files cannot be had or do not fit.
        UnsupportedModelError: if the architecture is none that can be taken apart.
    """
    if checkpoint is not None:
        raise OptionError(f"hf:{name} comes with its own weights: leave out checkpoint")
    unknown = [option for option in options if option not in OPTIONS]
    if unknown:
        raise OptionError(str(unknown_name("option of hf:", unknown[0], OPTIONS)))
    transformers = import_transformers()
    with _told(name):
        _refuse_absent(name, options)
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **options)
        whole = _speaking(transformers, config)
        tokenizer = None if whole is None else _tokenizer(transformers, name, options)
        kind = whole if whole and tokenizer else _kind(transformers, config, name)
        if hasattr(config, "mask_ratio"):
            config.mask_ratio = 0.0  # what an encoder sees after training
        # How clips are prepared, the family knows.
        clips = _sees_clips(config)
        spec = None if clips else _preprocessing(transformers, name, _channels(config), options)
        with _quiet(transformers):
            module = _filled(kind, name, config, dtype or torch.float32, options)
    wordless = "" if whole is None else f"there is no tokenizer beside its weights, in {name}"
    return Loaded(module.eval(), spec, tokenizer=tokenizer, wordless="" if tokenizer else wordless)


def _speaking(transformers: ModuleType, config: Any) -> type[nn.Module] | None:
    """The class of a whole model of images and texts whose text side is known; None for any other."""
    registry = import_module("circuitvit.models.registry")
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    return kind if isinstance(kind, type) and registry.knows_words(kind) else None


def _tokenizer(transformers: ModuleType, name: str, options: dict[str, Any]) -> Any:
    """The tokenizer beside the weights; None where there is none, for which transformers makes one up."""
    where = {key: value for key, value in options.items() if key != "subfolder"}
    files = ("tokenizer.json", "vocab.json", "spiece.model")
    quiet = {"_raise_exceptions_for_missing_entries": False, "subfolder": options.get("subfolder", "")}
    if not any(transformers.utils.cached_file(name, file, **where, **quiet) for file in files):
        return None
    with _quiet(transformers):
        return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)


def _sees_clips(config: Any) -> bool:
    return hasattr(config, "num_frames") or hasattr(config, "frames_per_clip")


def _kind(transformers: ModuleType, config: Any, name: str) -> type[nn.Module]:
    """The class to load: what the configuration names, or the tower in it."""
    named = (config.architectures or [""])[0]
    if not named:
        base = transformers.AutoModel._model_mapping.get(type(config), None)
        named = "" if base is None else base.__name__
    registry = import_module("circuitvit.models.registry")
    kind = getattr(transformers, TOWERS.get(named, named), None)
    if kind is None or not registry.is_known(kind):
        raise UnsupportedModelError(
            f"hf:{name} is a {named or config.model_type}, whose parts are not known. Where it holds a tower "
            "of a known class, load it with transformers and wrap that (of a LLaVA: model.model.vision_tower)"
        )
    found: type[nn.Module] = kind
    return found


def _filled(kind: Any, name: str, config: Any, dtype: torch.dtype, options: dict[str, Any]) -> nn.Module:
    """The model with its weights; without a pooler that the checkpoint has no weights for.

    Raises:
        ModelError: if other weights are missing or do not fit, which transformers would draw at random; or
            if there are weights for more blocks than the configuration has.
    """
    own = config
    if hasattr(config, "vision_config") and not issubclass(kind.config_class, type(config)):
        own = config.vision_config
        own.name_or_path = name
        if hasattr(config, "projection_dim"):
            own.projection_dim = config.projection_dim
    read = partial(
        kind.from_pretrained, name, config=own, dtype=dtype, use_safetensors=True, trust_remote_code=False,
        ignore_mismatched_sizes=True, output_loading_info=True, **options,
    )  # fmt: skip
    module, told = read()
    if told["missing_keys"] and all("pooler." in key for key in told["missing_keys"]):
        module, told = read(add_pooling_layer=False)
    for key in sorted(told["missing_keys"]):
        raise ModelError(f"hf:{name} has no weights for {key}, and maybe others, of {kind.__name__}")
    for key, saved, wanted in told["mismatched_keys"]:
        raise ModelError(f"hf:{name}: {key} is {tuple(saved)} in the file and {tuple(wanted)} in the model")
    found: nn.Module = module
    for key in _more_blocks(found, told["unexpected_keys"]):
        raise ModelError(
            f"hf:{name} has weights for {key}, and maybe others, of which its configuration has fewer"
        )
    return found


def _more_blocks(module: Any, unexpected: Iterable[str]) -> list[str]:
    """Of names of tensors that found no place, those that differ from one that did in a number alone."""
    own = {NUMBER.sub("#", name) for name in module.state_dict()}
    own |= {f"{prefix}.{name}" for name in own for prefix in (module.base_model_prefix, "vision_model")}
    return sorted(key for key in unexpected if NUMBER.search(key) and NUMBER.sub("#", key) in own)


# -- what can go wrong ---------------------------------------------------------------------------


def _refuse_absent(name: str, options: dict[str, Any]) -> None:
    """Refuse a folder without a model, and a name that would be waited for offline."""
    folder = Path(name) / options.get("subfolder", "")
    if name and Path(name).is_dir():
        if not (folder / "config.json").is_file():
            raise FileError(
                f"the folder {folder} holds no config.json: it is none that save_pretrained wrote"
            )
        return
    if name and Path(name).exists():
        raise FileError(f"{name} is a file, where a folder or the name of a model was expected")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        raise FileError(f"there is no folder {name or 'without a name'}")
    checkpoints.refuse_unreachable(
        f"hf:{name}", name, "config.json", "or give a folder that save_pretrained wrote"
    )


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Say what transformers says in one line."""
    try:
        yield
    except CircuitViTError:
        raise
    except Exception as error:  # configurations may hold anything, and files may be cut off
        reason = " ".join(str(error).split())
        raise ModelError(f"hf:{name} cannot be loaded: {reason[:300]}") from error


@contextmanager
def _quiet(transformers: ModuleType) -> Iterator[None]:
    """Without reports of the text tower's weights, which nobody asked for."""
    logging = transformers.utils.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


# -- preprocessing -------------------------------------------------------------------------------


def _preprocessing(
    transformers: ModuleType, name: str, channels: int, options: dict[str, Any]
) -> ProcessorSpec | None:
    """What the image processor beside the weights does; None, with a warning, where there is none."""
    auto = transformers.AutoImageProcessor
    try:
        with _quiet(transformers):
            processor = auto.from_pretrained(name, trust_remote_code=False, backend="torchvision", **options)
    except OSError:
        warnings.warn(
            f"hf:{name} comes without an image processor: image files are prepared as is usual for its "
            "architecture, see model.preprocessing",
            stacklevel=4,
        )
        return None
    return input_spec(processor, channels)


def spec_beside(config: Any) -> ProcessorSpec | None:
    """How images become inputs of the model with this configuration, if its files are on this machine.

    Raises:
        UnsupportedModelError: if they say something that cannot be expressed.
    """
    processor = _beside(config, "AutoImageProcessor", backend="torchvision")
    return None if processor is None else input_spec(processor, _channels(config))


def clips_beside(config: Any, frames: int) -> ProcessorClips | None:
    """The same for clips; which frames of a file are taken no processor says.

    Raises:
        UnsupportedModelError: if they say something that cannot be expressed.
    """
    processor = _beside(config, "AutoVideoProcessor")
    if processor is None:
        return None
    spec = input_spec(processor, _channels(config))
    return ProcessorClips(
        spec.size, spec.mean, spec.std, spec.interpolation, resize=spec.resize, frames=frames
    )


def _beside(config: Any, kind: str, **options: Any) -> Any:
    """The processor beside the configuration; None where there is none on this machine."""
    name = config.name_or_path
    if not name:
        return None
    transformers = import_transformers()
    try:
        with _quiet(transformers):
            return getattr(transformers, kind).from_pretrained(
                name, local_files_only=True, trust_remote_code=False, **options
            )
    except Exception:  # whatever is not there, or belongs to something else
        return None


def input_spec(processor: Any, channels: int = 3) -> ProcessorSpec:
    """What an image processor of transformers does, to the last bit.

    SigLIP 2's own keeps the proportions of a picture in as many patches as fit; as a circuit has one number
    of tokens, pictures are squeezed to a square here, which changes nothing of square ones.

    Args:
        processor: of the model.
        channels: of the model's images, where the processor does not say it.

    Raises:
        UnsupportedModelError: for inputs whose size depends on the picture, or for what is unknown here.
    """
    resize, interpolation = _resize(processor), "bicubic"
    if resize:
        interpolation = RESAMPLING.get(2 if processor.resample is None else int(processor.resample), "")
    size = resize
    if getattr(processor, "do_center_crop", False):
        size = processor.crop_size["height"], processor.crop_size["width"]
    if len(size) != 2 or not all(size) or interpolation not in MODES or getattr(processor, "do_pad", False):
        said = {name: getattr(processor, name, None) for name in ("size", "crop_size", "resample", "do_pad")}
        raise UnsupportedModelError(
            f"{type(processor).__name__} ({said}) makes inputs whose size depends on the picture, or in a "
            "way that is not known here: give tensors, and wrap the module with preprocessing=InputSpec(...)"
        )
    scale = 255 * processor.rescale_factor if processor.do_rescale else 255.0
    colours = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
    means, stds = (_by_channel(each, channels) for each in colours)
    kind = type(processor).__name__
    shift = 1.0 if kind.startswith("Vivit") and processor.do_rescale else 0.0  # it takes 1 off first
    mean, std = tuple((each + shift) / scale for each in means), tuple(each / scale for each in stds)
    floats = kind.startswith("DINOv3")
    return ProcessorSpec((len(mean), *size), mean, std, interpolation, resize=resize, floats=floats)


def _channels(config: Any) -> int:
    found: int = getattr(getattr(config, "vision_config", config), "num_channels", 3)
    return found


def _by_channel(values: Any, channels: int) -> tuple[float, ...]:
    found = (values,) if isinstance(values, (int, float)) else tuple(values)
    return found * channels if len(found) == 1 else found


def _resize(processor: Any) -> tuple[int, ...]:
    """Height and width; or the short side; or nothing, where pictures are taken as they are."""
    if hasattr(processor, "max_num_patches"):
        return (int(processor.max_num_patches**0.5) * processor.patch_size,) * 2
    asked = {name: value for name, value in dict(processor.size or {}).items() if value}
    if not processor.do_resize or set(asked) not in ({"height", "width"}, {"shortest_edge"}):
        return ()
    return tuple(asked[name] for name in ("height", "width", "shortest_edge") if name in asked)

"""open_clip's models by name: `"open_clip:ViT-B-32/laion2b_s34b_b79k"`; with the text tower where its kind is
known, its weights are in the file and its tokenizer can be had, and else the image tower alone.

Files are read by this library, tensors only, and never by open_clip.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from circuitvit.errors import FileError, ModelError, OptionError, unknown_name
from circuitvit.models import checkpoints
from circuitvit.models.families.family import Loaded
from circuitvit.models.timm_import import import_timm

INSTEAD = "or give open_clip:MODEL/FILE with weights that you have"

TOKENIZER = "or wrap the module with a tokenizer that you have, cv.wrap(clip, tokenizer=...)"

SAID = ("input_resolution", "context_length", "vocab_size")
"""Settings that stand among the tensors of OpenAI's files."""

NUMBERS = ("logit_scale", "logit_bias")
"""What some files have with a dimension, and some without."""


def load_open_clip(
    name: str, *, checkpoint: str | Path | None = None, dtype: torch.dtype | None = None, **architecture: Any
) -> Loaded:
    """One of open_clip's models, or its image tower.

    Args:
        name: "MODEL/TAG" with a tag of open_clip's pretrained weights, or "MODEL/FILE".
        checkpoint: weights of the whole model, `.safetensors`, or a torch file that holds tensors only.
        dtype: of the weights; `circuitvit.load` sees to it.
        **architecture: entries of the model's `vision_cfg` to replace, such as `image_size=384`.

    Raises:
        NameNotFoundError: if the model or the tag is unknown; the message suggests the nearest.
        FileError: if the file is missing or unreadable.
        ModelError: if open_clip is not installed, or the weights do not fit, or cannot be downloaded.
        OptionError: if there are no weights, or two.
    """
    library = _import_open_clip()
    model, weights = _parted(name, library.list_models())
    tags = library.list_pretrained_tags_by_model(model)
    if checkpoint is not None:
        if weights:
            raise OptionError(f"open_clip:{name} names its weights already: leave out checkpoint")
        weights = str(checkpoint)
    if not weights:
        known = f": give open_clip:{model}/TAG, such as {tags[0]}, or" if tags else ": give"
        raise OptionError(f"open_clip:{model} has no weights yet{known} checkpoint=FILE")
    tag = library.get_pretrained_cfg(model, weights) or {}
    if not tag and Path(weights).suffix not in {".safetensors", ".pt", ".pth", ".bin"}:
        raise unknown_name(f"weights of {model}", weights, tags)
    state = _plain(checkpoints.read(_downloaded(library, name, tag) if tag else weights), weights)
    tokenizer, wordless = _tokenizer(library, model, state)
    module = _built(library, model, architecture, bool(tag.get("quick_gelu")), whole=tokenizer is not None)
    checkpoints.fill(module, _tower(state) if tokenizer is None else _both(module, state), weights)
    transform, size = import_module("open_clip.transform"), getattr(module, "visual", module).image_size
    config = transform.merge_preprocess_dict(transform.PreprocessCfg(), tag)
    import_module("open_clip.model").set_model_preprocess_cfg(module, {**config, "size": size})
    return Loaded(module, tokenizer=tokenizer, wordless=wordless)


def _import_open_clip() -> Any:
    import_timm()  # after which torchvision, which open_clip needs, can be imported
    try:
        return import_module("open_clip")
    except ImportError as error:
        raise ModelError(
            f"open_clip cannot be imported ({error}): pip install circuitvit[open-clip]"
        ) from error


def _parted(name: str, models: list[str]) -> tuple[str, str]:
    """A model's name, and what comes after its slash; names may be written with slashes, as ViT-B/32.

    Raises:
        NameNotFoundError: if no part before a slash is a model.
    """
    words = name.split("/")
    for count in range(1, len(words) + 1):
        if (model := "-".join(words[:count])) in models:
            return model, "/".join(words[count:])
    raise unknown_name("model of open_clip", words[0], models)


def _downloaded(library: Any, name: str, tag: Mapping[str, Any]) -> str:
    """The file of a tag, downloaded once.

    Raises:
        ModelError: if there is no connection.
    """
    hub_id, _, file = str(tag.get("hf_hub", "")).rpartition("/")
    file = file or "open_clip_model.safetensors"
    checkpoints.refuse_unreachable(f"open_clip:{name}", hub_id or None, file, INSTEAD)
    try:
        return str(library.download_pretrained(tag))
    except Exception as error:  # whatever the hub's client raises
        raise checkpoints.offline_error(f"open_clip:{name}", error, INSTEAD) from error


def _plain(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The tensors by their own names.

    Raises:
        FileError: if there is no image tower among them.
    """
    plain = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if not any(name.startswith("visual.") for name in plain):
        raise FileError(
            f"{source} holds no image tower: none of its tensors is named visual.…, as open_clip does"
        )
    return plain


def _tower(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the image tower."""
    visual = "visual."
    return {name.removeprefix(visual): each for name, each in state.items() if name.startswith(visual)}


def _both(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of both towers as the module names them: open_clip has names and shapes of several ages."""
    found = {name: each for name, each in state.items() if name not in SAID}
    if hasattr(module, "text"):
        found = dict(import_module("open_clip.model").convert_to_custom_text_state_dict(found))
    own = module.state_dict()
    return {
        name: each.reshape(own[name].shape) if name in NUMBERS and name in own else each
        for name, each in found.items()
    }


def _tokenizer(library: Any, model: str, state: Mapping[str, Tensor]) -> tuple[Any, str]:
    """The tokenizer of a model whose text side can be had; else None and the reason."""
    config = library.get_model_config(model)
    text = config["text_cfg"]
    if text.get("hf_model_name") or config.get("multimodal_cfg"):
        kind = text.get("hf_model_name") or "CoCa's, which writes captions too"
        return None, f"its text tower ({kind}) is of a kind that is not known"
    if not any(name.removeprefix("text.") == "token_embedding.weight" for name in state):
        return None, "the file holds the weights of its image tower alone"
    if "logit_scale" not in state:
        return None, "the file has no logit_scale, with which similarities are multiplied"
    try:
        if hub_id := text.get("hf_tokenizer_name"):
            checkpoints.refuse_unreachable(f"the tokenizer {hub_id}", hub_id, "tokenizer.json", TOKENIZER)
        return library.get_tokenizer(model), ""
    except Exception as error:  # whatever the hub's client and transformers raise
        return None, f"its tokenizer cannot be had ({error})"


def _built(
    library: Any, model: str, architecture: Mapping[str, Any], quick_gelu: bool, whole: bool
) -> nn.Module:
    """The model without weights.

    Args:
        library: open_clip.
        model: its name.
        architecture: entries of `vision_cfg` to replace.
        quick_gelu: whether the weights were trained with the sigmoid for a GELU; some tags of a model were.
        whole: whether with the text tower.

    Raises:
        ModelError: if open_clip cannot build it.
    """
    config = library.get_model_config(model)
    width, vision = config["embed_dim"], {**config["vision_cfg"], **architecture}
    gelu = quick_gelu or config.get("quick_gelu", False)
    modules = import_module("open_clip.model")
    try:
        if not whole:
            tower: nn.Module = modules._build_vision_tower(width, vision, gelu)
            return tower
        kind = modules.CustomTextCLIP if config.get("custom_text") else modules.CLIP
        more = {name: config[name] for name in ("init_logit_bias", "nonscalar_logit_scale") if name in config}
        both: nn.Module = kind(width, vision, config["text_cfg"], quick_gelu=gelu, **more)
        return both
    except Exception as error:  # constructors raise whatever an odd argument makes them raise
        raise ModelError(f"open_clip cannot build {model}: {type(error).__name__}: {error}") from error

"""open_clip's models by name: `"open_clip:ViT-B-32/laion2b_s34b_b79k"`; only the image tower is built.

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


def load_open_clip(
    name: str, *, checkpoint: str | Path | None = None, dtype: torch.dtype | None = None, **architecture: Any
) -> Loaded:
    """The image tower of one of open_clip's models.

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
    state = _tower(checkpoints.read(_downloaded(library, name, tag) if tag else weights), weights)
    module = _built(library, model, architecture, bool(tag.get("quick_gelu")))
    checkpoints.fill(module, state, weights)
    transform = import_module("open_clip.transform")
    config = transform.merge_preprocess_dict(transform.PreprocessCfg(), tag)
    import_module("open_clip.model").set_model_preprocess_cfg(module, {**config, "size": module.image_size})
    return Loaded(module)


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


def _tower(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The tensors of the image tower.

    Raises:
        FileError: if there are none.
    """
    names = {name.removeprefix("module."): name for name in state}
    tower = {
        name.removeprefix("visual."): state[own] for name, own in names.items() if name.startswith("visual.")
    }
    if not tower:
        raise FileError(
            f"{source} holds no image tower: none of its tensors is named visual.…, as open_clip does"
        )
    return tower


def _built(library: Any, model: str, architecture: Mapping[str, Any], quick_gelu: bool) -> nn.Module:
    """The image tower without weights.

    Args:
        library: open_clip.
        model: its name.
        architecture: entries of `vision_cfg` to replace.
        quick_gelu: whether the weights were trained with the sigmoid for a GELU; some tags of a model were.

    Raises:
        ModelError: if open_clip cannot build it.
    """
    config = library.get_model_config(model)
    vision = {**config["vision_cfg"], **architecture}
    build = import_module("open_clip.model")._build_vision_tower
    try:
        tower: nn.Module = build(config["embed_dim"], vision, quick_gelu or config.get("quick_gelu", False))
    except Exception as error:  # constructors raise whatever an odd argument makes them raise
        raise ModelError(f"open_clip cannot build {model}: {type(error).__name__}: {error}") from error
    return tower

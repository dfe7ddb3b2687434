"""Reading weights from files, without ever running code from them."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlparse

import huggingface_hub
import safetensors.torch
import torch
from torch import Tensor, nn

from circuitvit.errors import FileError, ModelError, OptionError
from circuitvit.models.timm_import import import_timm

OWN_WEIGHTS = "or give checkpoint=FILE with weights that you have"
SAMPLES = 3  # how many of the offending names a message shows


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint: `.safetensors`, or a torch file that holds tensors only.

    Raises:
        FileError: if the file is missing, damaged, or holds anything but tensors.
    """
    if not isinstance(path, (str, Path)):
        raise OptionError(f"a checkpoint is the path of a file, not {path!r}")
    path = Path(path)
    if not path.is_file():
        what = "it is a folder, give the file in it" if path.is_dir() else "there is no such file"
        raise FileError(f"cannot read the checkpoint {path}: {what}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can make the readers raise nearly anything
        if "TorchScript" in str(error):
            raise FileError(
                f"{path} is a TorchScript archive, as OpenAI's own files are, and holds code: save "
                f"its state_dict as "
                ".safetensors where you trust it, and give that"
            ) from error
        raise FileError(f"{path} is not a readable checkpoint of tensors: {_why(error)}") from error
    for key in ("state_dict", "model", "module"):  # common wrappers around the weights
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise FileError(f"{path} does not hold a mapping of names to tensors")
    return dict(content)


def fill(module: nn.Module, state: Mapping[str, Tensor], source: object) -> None:
    """Put the tensors into a freshly built module; every name and shape must fit.

    A prefix that all names share, such as the "module." of training on several GPUs, is dropped.

    Raises:
        ModelError: if names are missing or left over, or a shape differs; the message shows which.
    """
    own = module.state_dict()
    state = _without_wrapper(state, own)
    problems = []
    missing, left_over = (
        [name for name in own if name not in state],
        [name for name in state if name not in own],
    )
    shapes = [
        f"{name} is {tuple(state[name].shape)} in the file and {tuple(own[name].shape)} in the model"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if missing:
        problems.append(f"{len(missing)} tensors are missing ({_some(missing)})")
    if left_over:
        problems.append(f"{len(left_over)} are left over ({_some(left_over)})")
    if shapes:
        problems.append(f"{len(shapes)} have another shape ({_some(shapes)})")
    if problems:
        advice = "Check the model's name, and options such as num_classes=, img_size= or reg_tokens="
        if set(own) == set(state) and (classes := _classes_of(module, state)):
            advice = f"It has {classes} classes: give num_classes={classes}, and their names by classes=[...]"
        raise ModelError(f"{source} does not fit the model: {'; '.join(problems)}. {advice}")
    module.load_state_dict(dict(state))


def refuse_offline(timm_name: str) -> None:
    """Refuse to start a download that cannot work, since the client would retry for most of a minute.

    Raises:
        ModelError: if the weights are not in the local cache and the model hub's name cannot be resolved.
    """
    timm = import_timm()
    hub_id = getattr(timm.models.get_pretrained_cfg(timm_name), "hf_hub_id", None)
    refuse_unreachable(timm_name, hub_id, "model.safetensors")


def refuse_unreachable(name: str, hub_id: str | None, file: str, instead: str = OWN_WEIGHTS) -> None:
    """Refuse a model whose file is not in the local cache while the hub cannot be reached.

    Args:
        name: for the message.
        hub_id: of the model, or None where it has none.
        file: that is looked for.
        instead: what else can be done.

    Raises:
        ModelError: if so.
    """
    cached = hub_id and isinstance(huggingface_hub.try_to_load_from_cache(hub_id, file), str)
    host = urlparse(huggingface_hub.constants.ENDPOINT).hostname
    if cached or host is None:
        return
    try:
        socket.getaddrinfo(host, 443)
    except OSError as error:
        raise offline_error(name, error, instead) from error


def offline_error(name: str, cause: BaseException, instead: str = OWN_WEIGHTS) -> ModelError:
    """The error for weights that cannot be downloaded."""
    return ModelError(
        f"the weights of {name} could not be downloaded: {cause}. Check the connection, {instead}"
    )


def is_offline(error: BaseException) -> bool:
    """Whether a failed download looks like a missing connection, not like a wrong name."""
    seen: BaseException | None = error
    while seen is not None:
        text = f"{type(seen).__name__} {seen}".lower()
        if any(
            word in text
            for word in ("connect", "offline", "resolve", "timeout", "cached", "network", "urlopen")
        ):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _without_wrapper(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors without what all of their names begin with, where the model knows none of these names."""
    while state and not any(name in own for name in state):
        first = {name.partition(".")[0] for name in state}
        if len(first) > 1 or not all("." in name for name in state):
            break
        state = {name.partition(".")[2]: tensor for name, tensor in state.items()}
    return state


def _classes_of(module: nn.Module, state: Mapping[str, Tensor]) -> int | None:
    """How many classes a checkpoint has, where nothing but that keeps it from fitting; None otherwise."""
    asked = getattr(module, "num_classes", None)
    own = module.state_dict()
    differ = [name for name in own if state[name].shape != own[name].shape]
    found = {len(state[name]) for name in differ if state[name].ndim}
    only_that = all(
        len(own[name]) == asked and state[name].shape[1:] == own[name].shape[1:]
        for name in differ
        if own[name].ndim
    )
    return found.pop() if len(found) == 1 and only_that else None


def _why(error: Exception) -> str:
    """Why a file could not be read, without torch's advice to trust it."""
    text = str(error)
    code = re.search(r"GLOBAL ([\w.]+)", text)
    if code is not None:
        return (
            f"it holds {code[1]}, which is code and is not loaded. Where you trust it, save the "
            "weights alone by safetensors.torch.save_file(model.state_dict(), 'FILE.safetensors')"
        )
    cause = text.rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
    return cause.splitlines()[0][:300]


def _some(names: list[str]) -> str:
    return ", ".join(names[:SAMPLES]) + (", ..." if len(names) > SAMPLES else "")

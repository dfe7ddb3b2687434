"""What makes a module unfit to be taken apart, told before anything is run: by its name, with the way out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._pytree import tree_leaves, tree_map

from circuitvit.errors import ModelError, UnsupportedModelError
from circuitvit.models.families import Family

QUANTIZED = frozenset(
    {"auto_gptq", "awq", "bitsandbytes", "gptqmodel", "hqq", "quanto", "quantized", "torchao"}
)
"""Packages, of torch and of others, whose layers hold numbers of few bits."""

RECORDERS = "transformers.utils.output_capturing"
"""Whose hooks note what passes when hidden states are asked for, and change nothing."""


SANDWICH = (
    "it norms what attention and MLP write before it is added (post-norm): what its heads write passes one "
    "norm together, so that no head has an output of its own from which an edge could lead"
)
PYRAMID = (
    "its tokens are merged on the way, so that no stream of one length and width leads from the first block "
    "to the last, along which an edge could go"
)
PYRAMIDS = (
    *("coat", "davit", "gcvit", "hiera", "levit", "maxxvit", "mvitv2", "nest", "pit", "pvt_v2"),
    *("swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr", "tiny_vit", "twins"),
)
NO_EDGES = {
    "timm.models.cait": "its heads are mixed before and after the softmax (talking heads), so that none has "
    "a pattern or an output of its own, and its class token joins the others after most blocks (class "
    "attention)",
    "timm.models.convit": "its class token joins the others after most blocks, so that no one stream leads "
    "from the first block to the last",
    "timm.models.crossvit": "it has two streams, of small and of large patches, which read each other",
    "timm.models.gemma4_vit": SANDWICH,
    "timm.models.tnt": "it has two streams, of patches and of the pixels in each, of which one is added to "
    "the other in every block",
    "timm.models.vision_transformer_sam": "it attends within windows, padded where they do not fit, adds "
    "what depends on the query to its scores, and ends in convolutions: no stage says that yet",
    "timm.models.volo": "its first blocks attend to what lies around a token by weights that are no products "
    "of queries and keys, and its tokens are merged on the way",
    "timm.models.xcit": "its heads attend from channel to channel, of all tokens at once "
    "(cross-covariance), so that no edge leads to a query, key or value of a token",
    **{f"timm.models.{name}": PYRAMID for name in PYRAMIDS},
    **{
        f"transformers.models.{name}.modeling_{name}": PYRAMID for name in ("pvt", "pvt_v2", "swin", "swinv2")
    },
    "torchvision.models.swin_transformer": PYRAMID,
}
"""Why models of these files have no graph of heads and edges, by the file's name in its library."""


def refuse_unknown(module: nn.Module) -> None:
    """Refuse a module of no known family, where it can be said why no family would help.

    Raises:
        UnsupportedModelError: with the reason.
    """
    _refuse_script(module)
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    for each in type(module).__mro__:
        if (reason := NO_EDGES.get(each.__module__)) is not None:
            raise UnsupportedModelError(f"{kind} cannot be decomposed: {reason}")
    for place, part in module.named_modules():
        if isinstance(part, nn.TransformerEncoderLayer) and not part.norm_first:
            raise UnsupportedModelError(
                f"{kind} cannot be decomposed: {place or 'it'} norms the stream after adding to it "
                "(post-norm, norm_first=False), so that what a part writes is rescaled by every later norm, "
                "later parts read no sum of what earlier ones wrote, and there are no edges to find"
            )


def _refuse_script(module: nn.Module) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise UnsupportedModelError(
            "a scripted module cannot be taken apart: wrap the module that was scripted"
        )


def refuse_unsound(module: nn.Module) -> None:
    """Refuse a module whose forward is not what its class says, or is random, or whose weights are unusable.

    Raises:
        UnsupportedModelError: naming the part and the way out.
        ModelError: for parts in training mode, and for weights that are NaN, infinite or not there.
    """
    _refuse_script(module)
    for name, part in module.named_modules():
        where = name or "the model"
        if part.training and (not name or _heeds_training(part)):
            raise ModelError(
                f"{where} is in training mode, where dropout makes every run different: "
                "call model.eval() first"
            )
        kind = type(part).__module__
        if "_hf_hook" in vars(part):
            raise UnsupportedModelError(
                f"{where} has a hook of accelerate (device_map), which moves weights at every run: "
                "load the model without device_map, or call accelerate.hooks.remove_hook_from_module(model, "
                "recurse=True)"
            )
        if "forward" in vars(part):
            raise UnsupportedModelError(
                f"the forward of {where} has been replaced on the object itself, so that its class no longer "
                "says what it does: restore it, or write a class"
            )
        if "parametrizations" in dict(part.named_children()) or _is_computed(part, "weight"):
            raise UnsupportedModelError(
                f"{where} computes its weights anew in every forward: make them plain with "
                "torch.nn.utils.parametrize.remove_parametrizations, or remove_weight_norm"
            )
        if kind.partition(".")[0] == "peft":
            raise UnsupportedModelError(
                f"{where} is a {type(part).__name__} of an adapter (PEFT), with weights beside the layer's: "
                "merge them first, with merge_and_unload of the PeftModel"
            )
        own = part.parameters(recurse=False)
        if QUANTIZED & set(kind.split(".")) or not all(each.is_floating_point() for each in own):
            raise UnsupportedModelError(
                f"{where} is a quantized {type(part).__name__}: it has no gradients and no weights that "
                "could be taken apart; wrap the model before it was quantized"
            )
    if any(tensor.is_inference() for tensor in (*module.parameters(), *module.buffers())):
        raise ModelError(
            "the model was built under torch.inference_mode, so its weights can take no part in gradients: "
            "build or load it outside"
        )
    _refuse_bad_weights(module)


def _is_computed(part: nn.Module, name: str) -> bool:
    """Whether a tensor of a part is neither a parameter nor a buffer, as with the old kind of weight norm."""
    return isinstance(vars(part).get(name), Tensor)


def _heeds_training(part: nn.Module) -> bool:
    """Whether training mode changes what a part does; a head put on after `eval()` is in that mode too."""
    if isinstance(part, nn.modules.dropout._DropoutNd):
        return part.p > 0
    if isinstance(part, (nn.modules.batchnorm._NormBase, nn.RReLU, nn.MultiheadAttention)):
        return True
    plain = isinstance(part, (nn.Linear, nn.LayerNorm, nn.Identity))
    return not plain and not type(part).__module__.startswith("torch.nn.modules")


def _refuse_bad_weights(module: nn.Module) -> None:
    tensors = [*module.named_parameters(), *module.named_buffers()]
    if any(tensor.is_meta for _, tensor in tensors):
        raise ModelError("the model's weights are on the meta device: load them before wrapping")
    masks = {id(buffer) for buffer in module.buffers()}  # where minus infinity is no accident
    bad = [
        name
        for name, tensor in tensors
        if tensor.is_floating_point()
        and not (tensor.isfinite() | ((tensor == -math.inf) & (id(tensor) in masks))).all()
    ]
    if bad:
        raise ModelError(f"{len(bad)} of the model's tensors hold NaN or infinite values, such as {bad[0]}")


# -- hooks ---------------------------------------------------------------------------------------


def look_at_hooks(module: nn.Module, family: Family, twin: nn.Module, images: Tensor) -> None:
    """Refuse hooks that change what a module computes; warn that others will not run here.

    Each hook is called once, with what its module would be given.

    Args:
        module: of the user's, with its hooks.
        family: of the module.
        twin: its copy without hooks.
        images: to run the twin on.

    Raises:
        UnsupportedModelError: naming the module that the hook is on.
    """
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        raise UnsupportedModelError(
            "there are forward hooks for all modules (register_module_forward_hook), which would also run "
            "in the middle of this library's own runs: remove them"
        )
    hooked = [name for name, part in module.named_modules() if any(hooks_of(part))]
    if not hooked:
        return
    for name, call in _calls(twin, family, images, hooked):
        try:
            changed = _is_changed_by_hooks(module.get_submodule(name), *call)
        except Exception as error:  # a hook is somebody else's code
            raise UnsupportedModelError(
                f"a forward hook on {name or type(module).__name__} fails: {type(error).__name__}: {error}. "
                "Remove it before wrapping"
            ) from error
        if changed:
            raise UnsupportedModelError(
                f"a forward hook on {name or type(module).__name__} changes what it computes, which no "
                "part of the model shows: remove the hook, or make it a module"
            )
    shown = ", ".join(name or "the model" for name in hooked[:3])
    warnings.warn(
        f"the forward hooks of {shown} are not carried over: a model of circuitvit runs without hooks, "
        "whatever they do later",
        stacklevel=4,
    )


def hooks_of(part: nn.Module) -> Iterator[Any]:
    """The forward hooks that somebody has put on a module, other than those that only note what passes."""
    for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values()):
        if getattr(hook, "__module__", None) != RECORDERS:
            yield hook


def _calls(
    twin: nn.Module, family: Family, images: Tensor, names: Sequence[str]
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """What the parts of these names are given and give when the module runs."""
    seen: list[tuple[str, tuple[Any, ...]]] = []
    handles = []
    for name in names:

        def note(part: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            seen.append((name, (args, kwargs, output)))

        handles.append(twin.get_submodule(name).register_forward_hook(note, with_kwargs=True))
    try:
        with torch.no_grad():
            family.run(twin, images)
    except Exception:  # said better when the module is taken apart
        seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    yield from seen


@torch.no_grad()
def _is_changed_by_hooks(hooked: nn.Module, args: Any, kwargs: Any, output: Any) -> bool:
    """Whether the hooks of a module of the user's make other inputs or another output of what it has."""
    given, found = tree_map(_copied, (args, kwargs)), tree_map(_copied, output)
    for number, before in hooked._forward_pre_hooks.items():
        if number in hooked._forward_pre_hooks_with_kwargs:
            given = before(hooked, *given) or given
        else:
            made = before(hooked, given[0])
            given = given if made is None else (made if isinstance(made, tuple) else (made,), given[1])
    for number, after in hooked._forward_hooks.items():
        with_kwargs = number in hooked._forward_hooks_with_kwargs
        made = after(hooked, *given, found) if with_kwargs else after(hooked, given[0], found)
        found = found if made is None else made
    ours, own = tree_leaves((given, found)), tree_leaves(((args, kwargs), output))
    return len(ours) != len(own) or not all(
        torch.equal(mine, its) if isinstance(mine, Tensor) and isinstance(its, Tensor) else mine is its
        for mine, its in zip(ours, own, strict=True)
    )


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value

"""How a user gets a model: `load` by name, or `wrap` a module at hand. Both check before they return."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from circuitvit.errors import ModelError, OptionError, UnsupportedModelError, unknown_name
from circuitvit.models import checkpoints, timm_vit
from circuitvit.models.model import Model
from circuitvit.models.timm_import import import_timm
from circuitvit.models.zoo import Card, InputSpec, load_module, load_zoo_module, zoo_card, zoo_names

IMAGENET_CLASSES = 1000
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""How far the decomposed logits may be from the model's own, relative to their size."""


def load(
    name: str,
    *,
    checkpoint: str | Path | None = None,
    pretrained: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    classes: Sequence[str] | None = None,
    **architecture: Any,
) -> Model:
    """A model by name: a bundled one, one of timm's, or one trained by `circuitvit train`.

    Args:
        name: "catdog-tiny" or "digits-tiny"; any name of timm's plain Vision Transformers, such as
            "vit_tiny_patch16_224"; or the path of what `circuitvit train` wrote.
        checkpoint: weights in timm's layout, `.safetensors`, or `.pt`/`.pth` holding tensors only.
        pretrained: download timm's own weights; needs a connection the first time.
        device: where the model runs.
        dtype: of the weights; float32 by default.
        classes: names of the logits; taken from the card, or from ImageNet where there are 1000.
        **architecture: passed on to timm, such as `img_size=384` or `num_classes=37`.

    Raises:
        NameNotFoundError: if the name is unknown; the message suggests the nearest.
        FileError: if the checkpoint is missing or unreadable.
        ModelError: if the checkpoint does not fit, holds NaN, or cannot be downloaded.
        UnsupportedModelError: if the model cannot be decomposed; the message says what is in the way.
        OptionError: if the device cannot be used, or options clash.

    Example:
        >>> load("catdog-tiny").classes[:2]
        ('cat', 'dog')
    """
    _refuse_bad_device(device)
    path = Path(name)
    card: Card | None = None
    if name in zoo_names():
        _refuse_options(name, checkpoint, pretrained, architecture)
        module, card = load_zoo_module(name), zoo_card(name)
    elif path.suffix in {".safetensors", ".json"}:
        _refuse_options(name, checkpoint, pretrained, architecture)
        module, card = load_module(path.with_suffix(".json"))
    else:
        module = _timm_module(name, checkpoint, pretrained, architecture)
    module = module.to(device=device, dtype=dtype) if dtype is not None else module.to(device)
    if card is not None:
        return wrap(
            module.eval(),
            name=card.name,
            classes=classes or card.classes,
            preprocessing=card.input,
            card=card,
        )
    return wrap(module.eval(), name=name, classes=classes)


def wrap(
    module: nn.Module,
    *,
    name: str | None = None,
    classes: Sequence[str] | None = None,
    preprocessing: InputSpec | None = None,
    card: Card | None = None,
) -> Model:
    """A module at hand, seen as stages. The module is not changed, and not run in training mode either.

    The decomposition is compared with the module's own forward on a small input.

    Args:
        module: a timm `VisionTransformer` in evaluation mode.
        name: for files and messages.
        classes: names of the logits, in order.
        preprocessing: how image files become inputs; by default what timm's config of the module says.
        card: how the model was trained, for bundled and own models.

    Raises:
        UnsupportedModelError: if a part cannot be decomposed; the message names the module and the switch.
        ModelError: if the module is in training mode, or its weights or logits are NaN or infinite.
        OptionError: if the number of class names is not the number of logits.

    Example:
        >>> import circuitvit as cv, timm  # doctest: +SKIP
        >>> model = cv.wrap(timm.create_model("deit3_small_patch16_224").eval())  # doctest: +SKIP
    """
    timm = import_timm()
    _refuse_other_families(timm, module)
    if module.training:
        raise ModelError(
            "the model is in training mode, where dropout makes every run different: call model.eval() first"
        )
    _refuse_bad_weights(module)
    twin = timm_vit.frozen_twin(module)
    stages = timm_vit.stages_of(twin)
    spec = preprocessing or _input_of(timm, module)
    logits = _check_decomposition(twin, stages, spec)
    if classes is not None and len(classes) != logits.shape[-1]:
        raise OptionError(f"{len(classes)} class names for a model with {logits.shape[-1]} logits")
    synsets = None
    if classes is None and logits.shape[-1] == IMAGENET_CLASSES:
        classes, synsets = _imagenet(timm)
    return Model(
        name=name or _name_of(module),
        stages=stages,
        module=twin,
        preprocessing=spec,
        n_logits=logits.shape[-1],
        prefix=timm_vit.prefix_of(twin),
        classes=None if classes is None else tuple(classes),
        synsets=synsets,
        card=card,
    )


def _refuse_other_families(timm: Any, module: nn.Module) -> None:
    if not isinstance(module, timm.models.vision_transformer.VisionTransformer):
        raise UnsupportedModelError(
            f"{type(module).__module__}.{type(module).__name__} cannot be decomposed: "
            "this version knows timm's VisionTransformer (ViT, DeiT, DeiT-3, CLIP, DINO and AugReg weights)"
        )


def _refuse_bad_device(device: str | torch.device) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise OptionError(f"the device {device!r} cannot be used: {reason}") from error


def _refuse_options(name: str, checkpoint: object, pretrained: bool, architecture: dict[str, Any]) -> None:
    given = [*(["checkpoint"] if checkpoint else []), *(["pretrained"] if pretrained else []), *architecture]
    if given:
        raise OptionError(f"{name} comes with its own weights and architecture: leave out {', '.join(given)}")


def _timm_module(
    name: str, checkpoint: str | Path | None, pretrained: bool, architecture: dict[str, Any]
) -> nn.Module:
    timm = import_timm()
    base = name.partition(".")[0]
    if not timm.is_model(base):
        plain = timm.list_models(module="vision_transformer") + timm.list_models(module="deit")
        raise unknown_name("model", name, [*zoo_names(), *plain])
    if checkpoint is None and not pretrained:
        raise OptionError(
            f"{name} has no weights yet: give checkpoint=FILE, or pretrained=True to download timm's"
        )
    if pretrained:
        checkpoints.refuse_offline(name)
    state = (
        None if checkpoint is None else checkpoints.read(checkpoint)
    )  # before the model is built: fail early
    try:
        module: nn.Module = timm.create_model(name, pretrained=pretrained, **architecture)
    except Exception as error:  # timm's constructors raise whatever an odd argument makes them raise
        if pretrained and checkpoints.is_offline(error):
            raise checkpoints.offline_error(name, error) from error
        raise ModelError(f"timm cannot build {name}: {type(error).__name__}: {error}") from error
    _refuse_other_families(timm, module)
    if state is not None:
        checkpoints.fill(module, state, checkpoint)
    return module


def _refuse_bad_weights(module: nn.Module) -> None:
    tensors = [*module.named_parameters(), *module.named_buffers()]
    if any(tensor.is_meta for _, tensor in tensors):
        raise ModelError("the model's weights are on the meta device: load them before wrapping")
    bad = [name for name, tensor in tensors if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        raise ModelError(f"{len(bad)} of the model's tensors hold NaN or infinite values, such as {bad[0]}")


def _check_decomposition(twin: nn.Module, stages: tuple[Any, ...], spec: InputSpec) -> Tensor:
    """Compare the stages with the module's own forward on noise; give the logits."""
    like = next(twin.parameters())
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, *spec.size, generator=generator, dtype=torch.float32).to(like.device, like.dtype)
    with torch.no_grad():
        try:
            expected = twin(images)
        except (RuntimeError, AssertionError, ValueError) as error:
            raise ModelError(
                f"the model fails on an input of shape {tuple(images.shape)}: {error}"
            ) from error
        if not isinstance(expected, Tensor) or expected.ndim != 2:
            raise UnsupportedModelError("the model must give logits of shape (batch, class)")
        stream = stages[0].total(stages[0].write(stages[0].read(images)))
        for stage in stages[1:-1]:
            stream = stream + stage.total(stage.write(stage.read(stream)))
        found = stages[-1].write(stages[-1].read(stream))
    if not expected.isfinite().all():
        raise ModelError(
            "the model's logits are NaN or infinite on an ordinary input: its weights are unusable"
        )
    difference = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
    if difference > TOLERANCE.get(like.dtype, 1e-4):
        raise UnsupportedModelError(
            f"{type(twin).__name__}: the sum of its parts differs from its own forward by {difference:.1e} "
            "(relative): it does something this library does not know of"
        )
    return expected


def _input_of(timm: Any, module: nn.Module) -> InputSpec:
    config = timm.data.resolve_model_data_config(module)
    patch_embed: Any = module.patch_embed
    # The first convolution, wherever it is: a hybrid's own projection reads feature maps, not images.
    first = next((weight for weight in patch_embed.parameters() if weight.ndim == 4), None)
    channels = config["input_size"][0] if first is None else first.shape[1]
    height, width = patch_embed.img_size or config["input_size"][1:]
    mean, std = tuple(config["mean"]), tuple(config["std"])
    if len(mean) != channels:
        mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
    return InputSpec((channels, height, width), mean, std, config["interpolation"], config["crop_pct"])


def _imagenet(timm: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    info = timm.data.ImageNetInfo()
    indices = range(IMAGENET_CLASSES)
    return (
        tuple(info.index_to_description(index) for index in indices),
        tuple(info.index_to_label_name(index) for index in indices),
    )


def _name_of(module: nn.Module) -> str:
    config = getattr(module, "pretrained_cfg", None) or {}
    return str(config.get("architecture") or type(module).__name__)

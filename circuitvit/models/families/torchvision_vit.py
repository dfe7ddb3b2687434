"""torchvision's `VisionTransformer`: `vit_b_16` and the like, with a patch or a convolutional stem.

Dosovitskiy et al. 2021, "An image is worth 16x16 words", arXiv:2010.11929.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from circuitvit.errors import ModelError, OptionError, UnsupportedModelError, unknown_name
from circuitvit.models import checkpoints
from circuitvit.models.attention import AttentionStage
from circuitvit.models.families.family import Family, Grid, Loaded
from circuitvit.models.families.torch_layers import multihead
from circuitvit.models.layers import MLPStage
from circuitvit.models.parts import MLP, Readout, norm_of
from circuitvit.models.stages import Stage
from circuitvit.models.timm_import import import_timm
from circuitvit.models.zoo import InputSpec

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP = 224 / 256
"""Of the weights named IMAGENET1K_V1; those named SWAG are resized by bicubic interpolation and not
cropped.
"""


class TorchvisionViT(Family):
    """torchvision's `VisionTransformer` with plain `EncoderBlock`."""

    def embed(self, module: Any, images: Tensor) -> Tensor:
        patches = module._process_input(images)
        stream = torch.cat([module.class_token.expand(len(patches), -1, -1), patches], dim=1)
        return module.encoder.dropout(stream + module.encoder.pos_embedding)  # type: ignore[no-any-return]

    def blocks(self, module: Any) -> Sequence[nn.Module]:
        return tuple(module.encoder.layers)

    def block(self, module: Any, block: Any, layer: int, where: str) -> tuple[Stage, ...]:
        kinds = {base.__name__ for base in type(block).__mro__}
        if "EncoderBlock" not in kinds:
            raise UnsupportedModelError(
                f"{where} is a {type(block).__name__}: only torchvision's plain EncoderBlock is supported"
            )
        attention = multihead(block.self_attention, f"{where}.self_attention")
        mlp = MLP(block.mlp)
        if isinstance(block.mlp, nn.Sequential) and len(block.mlp) == 5:
            mlp = MLP(block.mlp, known=True, act="1", out="3")
        return (
            AttentionStage(layer, norm_of(block.ln_1, f"{where}.ln_1"), attention),
            MLPStage(layer, norm_of(block.ln_2, f"{where}.ln_2"), mlp),
        )

    def readout(self, module: Any, stream: Tensor) -> Tensor:
        return module.heads(module.encoder.ln(stream)[:, 0])  # type: ignore[no-any-return]

    def readout_parts(self, module: Any) -> Readout:
        none = norm_of(nn.Identity(), "none")
        head = module.heads
        if isinstance(head, nn.Sequential):  # what users put in its place is often a layer alone
            head = head[0] if len(head) == 1 else head if len(head) else nn.Identity()
        return Readout(norm_of(module.encoder.ln, "encoder.ln"), _class_token, none, (head,), ("heads",))

    def refuse(self, module: Any) -> None:
        if not len(module.encoder.layers):
            raise UnsupportedModelError("the model has no blocks, so there is no circuit to look for")

    def classifies(self, module: Any) -> bool:
        return any(True for _ in module.heads.parameters())

    def grid(self, module: Any, height: int, width: int) -> Grid:
        return height // module.patch_size, width // module.patch_size

    def preprocessing(self, module: Any) -> InputSpec:
        size = (3, module.image_size, module.image_size)
        return InputSpec(size, MEAN, STD, "bilinear", CROP)


FAMILY = TorchvisionViT()


def load_torchvision(
    name: str, *, checkpoint: str | Path | None = None, dtype: torch.dtype | None = None, **architecture: Any
) -> Loaded:
    """One of torchvision's models by name, such as `"torchvision:vit_b_16"`.

    Args:
        name: as torchvision calls it.
        checkpoint: weights in torchvision's layout, tensors only.
        dtype: of the weights; `circuitvit.load` sees to it.
        **architecture: passed on to torchvision, such as `image_size=384`.

    Raises:
        NameNotFoundError: if the name is unknown; the message suggests the nearest.
        FileError: if the file is missing or unreadable.
        ModelError: if the weights do not fit, or torchvision cannot build the model.
        OptionError: if there are no weights.
    """
    import_timm()  # after which torchvision can be imported
    models = import_module("torchvision.models")
    known = models.list_models(module=models, include="vit_*")
    if name not in known:
        raise unknown_name("model of torchvision", name, known)
    if checkpoint is None:
        raise OptionError(f"torchvision:{name} has no weights yet: give checkpoint=FILE")
    state = checkpoints.read(checkpoint)
    state = {
        key.replace("linear_1", "0").replace("linear_2", "3"): state[key] for key in state
    }  # of older files
    try:
        module = models.get_model(name, weights=None, **architecture)
    except Exception as error:  # constructors raise whatever an odd argument makes them raise
        raise ModelError(f"torchvision cannot build {name}: {type(error).__name__}: {error}") from error
    checkpoints.fill(module, state, checkpoint)
    return Loaded(module)


def _class_token(normed: Tensor) -> Tensor:
    return normed[:, :1]

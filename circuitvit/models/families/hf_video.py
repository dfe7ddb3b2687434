"""Models of transformers that see clips: ViViT with joint attention, VideoMAE and V-JEPA 2, with a classifier or
without.

All take clips `(clip, time, channel, height, width)`, and tokens run through time slowest. Without a classifier
the logits are features: ViViT's pooler or class token, and else the mean of the normed tokens. What a model does
between its last block and its logits is the readout, such as the attentive pooler of V-JEPA 2, which has layers
of its own but reads what was normed before and so no stream.

Arnab et al. 2021, "ViViT", arXiv:2103.15691; Tong et al. 2022, "VideoMAE", arXiv:2203.12602; Assran et al.
2025, "V-JEPA 2", arXiv:2506.09985; Bertasius et al. 2021, "TimeSformer", arXiv:2102.05095.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from circuitvit.errors import UnsupportedModelError
from circuitvit.models.attention import AttentionStage
from circuitvit.models.families.family import Family, Grid
from circuitvit.models.layers import MLPStage
from circuitvit.models.parts import MLP, Attention, Linear, Norm, Readout, norm_of
from circuitvit.models.stages import Stage
from circuitvit.models.zoo import ClipSpec

HALF = (0.5,) * 3
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class _Clips(Family):
    """What the families of this file have in common: a tower, and perhaps a classifier around it.

    Attributes:
        inside: the name of the tower in a model with a classifier.
        colours: mean and standard deviation of the library's own processor for these models.
    """

    inside: str
    colours: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET

    def tower(self, module: Any) -> Any:
        """The model without its classifier."""
        return getattr(module, self.inside, module)

    @abstractmethod
    def tubelet(self, config: Any) -> tuple[int, int, int]:
        """Frames, rows and columns that a token covers."""

    def size(self, config: Any) -> tuple[int, int, int]:
        """Frames, height and width of a clip."""
        side = config.image_size
        height, width = (side, side) if isinstance(side, int) else side
        return config.num_frames, height, width

    def channels(self, config: Any) -> int:
        found: int = config.num_channels
        return found

    def refuse(self, module: Any) -> None:
        if not len(self.blocks(module)):
            raise UnsupportedModelError("the model has no blocks, so there is no circuit to look for")

    def prefix(self, module: Any) -> tuple[str, ...]:
        return ()

    def grid(self, module: Any, height: int, width: int) -> Grid | None:
        frames, *_ = self.size(module.config)
        time, rows, columns = self.tubelet(module.config)
        return frames // time, height // rows, width // columns

    def classifies(self, module: Any) -> bool:
        return getattr(module, "classifier", None) is not None and module.config.num_labels > 0

    def preprocessing(self, module: Any) -> ClipSpec:
        frames, height, width = self.size(module.config)
        channels = self.channels(module.config)
        mean, std = self.colours if channels == 3 else (HALF[:1] * channels, HALF[:1] * channels)
        return ClipSpec((channels, height, width), mean, std, "bilinear", frames=frames)


class _Vivit(_Clips):
    """ViViT, model 1: a class token and all tubelets attend to each other."""

    inside, colours = "vivit", (HALF, HALF)

    def tubelet(self, config: Any) -> tuple[int, int, int]:
        time, rows, columns = config.tubelet_size
        return time, rows, columns

    def prefix(self, module: Any) -> tuple[str, ...]:
        return ("cls",)

    def embed(self, module: Any, images: Tensor) -> Tensor:
        return self.tower(module).embeddings(images)  # type: ignore[no-any-return]

    def blocks(self, module: Any) -> Sequence[nn.Module]:
        return tuple(self.tower(module).layers)

    def block(self, module: Any, block: Any, layer: int, where: str) -> tuple[Stage, ...]:
        own, mlp = block.attention, MLP(block.mlp, True, "activation_fn", (), None, "fc2")
        attention = _attention(
            own.num_attention_heads, own.scaling, own.q_proj, own.k_proj, own.v_proj, own.o_proj
        )
        return _stages(layer, where, block, ("layernorm_before", "layernorm_after"), attention, mlp)

    def readout(self, module: Any, stream: Tensor) -> Tensor:
        tower = self.tower(module)
        normed = tower.layernorm(stream)
        if self.classifies(module):
            return module.classifier(normed[:, 0])  # type: ignore[no-any-return]
        return normed[:, 0] if tower.pooler is None else tower.pooler(normed)

    def readout_parts(self, module: Any) -> Readout | None:
        tower = self.tower(module)
        if tower.pooler is not None and tower is module:
            return None
        head = module.classifier if self.classifies(module) else nn.Identity()
        return Readout(norm_of(tower.layernorm, "layernorm"), _first, _NONE, (head,), ("classifier",))

    def run(self, module: Any, images: Tensor) -> Tensor:
        given = module(images)
        if self.tower(module) is not module:
            return given.logits  # type: ignore[no-any-return]
        return given.last_hidden_state[:, 0] if module.pooler is None else given.pooler_output


class _VideoMAE(_Clips):
    """VideoMAE's encoder: no class token; all tubelets attend to each other."""

    inside = "videomae"

    def tubelet(self, config: Any) -> tuple[int, int, int]:
        side = config.patch_size
        rows, columns = (side, side) if isinstance(side, int) else side
        return config.tubelet_size, rows, columns

    def embed(self, module: Any, images: Tensor) -> Tensor:
        return self.tower(module).embeddings(images, None)  # type: ignore[no-any-return]

    def blocks(self, module: Any) -> Sequence[nn.Module]:
        return tuple(self.tower(module).encoder.layer)

    def block(self, module: Any, block: Any, layer: int, where: str) -> tuple[Stage, ...]:
        own, out = block.attention.attention, block.attention.output.dense
        attention = _attention(own.num_attention_heads, own.scaling, own.query, own.key, own.value, out)
        first = block.intermediate
        mlp = nn.Sequential(first.dense, first.intermediate_act_fn, block.output.dense)
        known = MLP(mlp, True, "1", (), None, "2")
        return _stages(layer, where, block, ("layernorm_before", "layernorm_after"), attention, known)

    def readout(self, module: Any, stream: Tensor) -> Tensor:
        norm, last = self.tower(module).layernorm, getattr(module, "fc_norm", None)
        normed = stream if norm is None else norm(stream)
        if self.tower(module) is module:
            return normed.mean(dim=1)  # type: ignore[no-any-return]
        pooled = normed[:, 0] if last is None else last(normed.mean(dim=1))
        return module.classifier(pooled)  # type: ignore[no-any-return]

    def readout_parts(self, module: Any) -> Readout | None:
        norm, last = self.tower(module).layernorm, getattr(module, "fc_norm", None)
        first = _NONE if norm is None else norm_of(norm, "layernorm")
        if self.tower(module) is module:
            return Readout(first, _mean, _NONE, (nn.Identity(),))
        pool, after = (_first, _NONE) if last is None else (_mean, norm_of(last, "fc_norm"))
        return Readout(first, pool, after, (module.classifier,), ("classifier",))

    def run(self, module: Any, images: Tensor) -> Tensor:
        given = module(images)
        whole = self.tower(module) is not module
        return given.logits if whole else given.last_hidden_state.mean(dim=1)  # type: ignore[no-any-return]


class _VJEPA2(_Clips):
    """V-JEPA 2's encoder: queries and keys are turned by time, row and column, a third of each head's width."""

    inside = "vjepa2"

    def tubelet(self, config: Any) -> tuple[int, int, int]:
        return config.tubelet_size, config.patch_size, config.patch_size

    def size(self, config: Any) -> tuple[int, int, int]:
        return config.frames_per_clip, config.crop_size, config.crop_size

    def channels(self, config: Any) -> int:
        found: int = config.in_chans
        return found

    def embed(self, module: Any, images: Tensor) -> Tensor:
        return self.tower(module).encoder.embeddings(images)  # type: ignore[no-any-return]

    def blocks(self, module: Any) -> Sequence[nn.Module]:
        return tuple(self.tower(module).encoder.layer)

    def block(self, module: Any, block: Any, layer: int, where: str) -> tuple[Stage, ...]:
        own, mlp = block.attention, MLP(block.mlp, True, "activation", (), None, "fc2")

        def turn(x: Tensor, heads: Sequence[int]) -> Tensor:
            turned: Tensor = own.apply_rotary_embeddings(x, own.get_position_ids(x[:, 0]))
            return turned

        attention = _attention(
            own.num_attention_heads, own.scaling, own.query, own.key, own.value, own.proj, turn=turn
        )
        return _stages(layer, where, block, ("norm1", "norm2"), attention, mlp)

    def readout(self, module: Any, stream: Tensor) -> Tensor:
        normed = self.tower(module).encoder.layernorm(stream)
        if self.tower(module) is module:
            return normed.mean(dim=1)  # type: ignore[no-any-return]
        return module.classifier(module.pooler(normed))  # type: ignore[no-any-return]

    def readout_parts(self, module: Any) -> Readout | None:
        if self.tower(module) is not module:
            return None  # the pooler attends
        return Readout(norm_of(module.encoder.layernorm, "layernorm"), _mean, _NONE, (nn.Identity(),))

    def run(self, module: Any, images: Tensor) -> Tensor:
        if self.tower(module) is module:
            return module.get_vision_features(images).mean(dim=1)  # type: ignore[no-any-return]
        return module(images).logits  # type: ignore[no-any-return]


class _TimeSformer(_Clips):
    """TimeSformer, which is refused, with the reason."""

    inside = "timesformer"

    def tubelet(self, config: Any) -> tuple[int, int, int]:
        return 1, config.patch_size, config.patch_size

    def refuse(self, module: Any) -> None:
        raise UnsupportedModelError(
            f"{type(module).__name__} (attention_type={module.config.attention_type!r}): TimeSformer's class token "
            "attends in every frame apart, by a softmax of its own, and takes the mean, and its tokens run "
            "through time fastest: neither can be said with one attention over one grid yet. ViViT, VideoMAE and "
            "V-JEPA 2 are known"
        )

    def embed(self, module: Any, images: Tensor) -> Tensor:
        return self.tower(module).embeddings(images)  # type: ignore[no-any-return]

    def blocks(self, module: Any) -> Sequence[nn.Module]:
        return tuple(self.tower(module).encoder.layer)

    def block(self, module: Any, block: Any, layer: int, where: str) -> tuple[Stage, ...]:
        raise NotImplementedError

    def readout(self, module: Any, stream: Tensor) -> Tensor:
        raise NotImplementedError


VIVIT, VIDEOMAE, VJEPA2, TIMESFORMER = _Vivit(), _VideoMAE(), _VJEPA2(), _TimeSformer()


# -- parts ---------------------------------------------------------------------------------------

_NONE = Norm(nn.Identity(), centred=False, scaled=False)


def _attention(
    heads: int, scale: float, query: Any, key: Any, value: Any, out: Any, **others: Any
) -> Attention:
    query, key, value, out = (Linear.of(each) for each in (query, key, value, out))
    return Attention(heads, query, key, value, out, scale, **others)


def _stages(
    layer: int, where: str, block: Any, norms: tuple[str, str], attention: Attention, mlp: MLP
) -> tuple[Stage, ...]:
    first, second = (norm_of(getattr(block, name), f"{where}.{name}") for name in norms)
    return AttentionStage(layer, first, attention), MLPStage(layer, second, mlp)


def _first(normed: Tensor) -> Tensor:
    return normed[:, :1]


def _mean(normed: Tensor) -> Tensor:
    return normed.mean(dim=1, keepdim=True)

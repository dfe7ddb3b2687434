"""transformers' models that see clips: ViViT, VideoMAE, V-JEPA 2 and TimeSformer, classifying or not.

All take clips `(clip, time, channel, height, width)`, and tokens run through time slowest, but for
TimeSformer's. Without a classifier the logits are features: ViViT's pooler, the class token after the last
norm, or the mean of all tokens where there is none.
What a model does between its last block and its logits is the readout. V-JEPA 2's attentive pooler is part of
it: it has layers of its own, but they read what was normed before, and so no stream that heads write to.

Arnab et al. 2021, "ViViT", arXiv:2103.15691; Tong et al. 2022, "VideoMAE", arXiv:2203.12602; Assran et al.
2025, "V-JEPA 2", arXiv:2506.09985; Bertasius et al. 2021, "TimeSformer", arXiv:2102.05095.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from circuitvit.errors import UnsupportedModelError
from circuitvit.models.attention import AttentionStage
from circuitvit.models.divided import SpaceAttention, TimeAttention, Twice
from circuitvit.models.families.family import Grid
from circuitvit.models.families.hf_load import clips_beside
from circuitvit.models.families.hf_vit import HALF, IMAGENET, ViT, linear, mlp_of, pair
from circuitvit.models.layers import MLPStage
from circuitvit.models.parts import MLP, Attention, Readout, norm_of
from circuitvit.models.processor import ProcessorClips
from circuitvit.models.stages import Stage


class Clips(ViT):
    """What the families of this file have in common.

    Attributes:
        larger: by how much the short side of a frame is usually larger than what is cropped out of it.
    """

    larger = 1.0
    colours = IMAGENET

    @abstractmethod
    def tubelet(self, config: Any) -> tuple[int, int, int]:
        """Frames, rows and columns that a token covers."""

    def clip(self, config: Any) -> tuple[int, int, int, int]:
        """Frames, channels, height and width of what the model sees."""
        return config.num_frames, config.num_channels, *pair(config.image_size)

    def prefix(self, module: Any) -> tuple[str, ...]:
        return ()

    def grid(self, module: Any, height: int, width: int) -> Grid:
        frames, *_ = self.clip(module.config)
        time, rows, columns = self.tubelet(module.config)
        return frames // time, height // rows, width // columns

    def preprocessing(self, module: Any) -> ProcessorClips:
        frames, channels, height, width = self.clip(module.config)
        beside = clips_beside(module.config, frames)
        if beside is not None and beside.size == (channels, height, width):
            return beside
        mean, std = self.colours if channels == 3 else (HALF[0][:1] * channels,) * 2
        resize = (int(self.larger * min(height, width)),)
        size = channels, height, width
        return ProcessorClips(size, mean, std, "bilinear", resize=resize, frames=frames)


class Vivit(Clips):
    """ViViT, model 1: a class token and all tubelets attend to each other."""

    inner, larger = "vivit", 256 / 224
    colours = ((0.75,) * 3, (0.25,) * 3)  # its processor takes 0.5 off what lies between -1 and 1 already

    def tubelet(self, config: Any) -> tuple[int, int, int]:
        time, rows, columns = config.tubelet_size
        return time, rows, columns

    def prefix(self, module: Any) -> tuple[str, ...]:
        return ("cls",)


class VideoMAE(Clips):
    """VideoMAE's encoder: no class token; all tubelets attend to each other."""

    inner, layers = "videomae", "encoder.layer"

    def tubelet(self, config: Any) -> tuple[int, int, int]:
        return config.tubelet_size, *pair(config.patch_size)

    def embed(self, module: Any, images: Tensor) -> Tensor:
        return self.tower(module).embeddings(images, None)  # type: ignore[no-any-return]

    def block(self, module: Any, block: Any, layer: int, where: str) -> tuple[Stage, ...]:
        own, place = block.attention.attention, f"{where}.attention"
        names = "query", "key", "value"
        query, key, value = (linear(getattr(own, name), f"{place}.attention.{name}") for name in names)
        out = linear(block.attention.output.dense, f"{place}.output.dense")
        attention = Attention(own.num_attention_heads, query, key, value, out, own.scaling)
        norm1, norm2 = (norm_of(getattr(block, name), f"{where}.{name}") for name in self.norms)
        return AttentionStage(layer, norm1, attention), MLPStage(layer, norm2, _mlp(block))

    def readout_parts(self, module: Any) -> Readout:
        tower, none = self.tower(module), norm_of(nn.Identity(), "none")
        norm = none if tower.layernorm is None else norm_of(tower.layernorm, "layernorm")
        if tower is module:
            return Readout(norm, _mean, none, (nn.Identity(),))
        if module.fc_norm is None:
            return Readout(norm, _first, none, (module.classifier,), ("classifier",))
        return Readout(norm, _mean, norm_of(module.fc_norm, "fc_norm"), (module.classifier,), ("classifier",))

    def featured(self, normed: Tensor) -> Float[Tensor, "batch 1 d_model"]:
        return _mean(normed)


class VJEPA2Encoder(Clips):
    """V-JEPA 2's encoder: queries and keys are turned by time, row and column, a third of a head each."""

    inner, layers, larger, norms = "vjepa2", "encoder.layer", 256 / 224, ("norm1", "norm2")

    def tubelet(self, config: Any) -> tuple[int, int, int]:
        return config.tubelet_size, *pair(config.patch_size)

    def clip(self, config: Any) -> tuple[int, int, int, int]:
        return config.frames_per_clip, config.in_chans, *pair(config.crop_size)

    def embed(self, module: Any, images: Tensor) -> Tensor:
        return self.tower(module).encoder.embeddings(images)  # type: ignore[no-any-return]

    def block(self, module: Any, block: Any, layer: int, where: str) -> tuple[Stage, ...]:
        own, place = block.attention, f"{where}.attention"
        names = ("query", "key", "value", "proj")
        query, key, value, out = (linear(getattr(own, name), f"{place}.{name}") for name in names)

        def turn(x: Tensor, heads: Sequence[int]) -> Tensor:
            turned: Tensor = own.apply_rotary_embeddings(x, own.get_position_ids(x[:, 0]))
            return turned

        heads = own.num_attention_heads
        attention = Attention(heads, query, key, value, out, own.scaling, turn=turn)
        norm1, norm2 = (norm_of(getattr(block, name), f"{where}.{name}") for name in self.norms)
        return AttentionStage(layer, norm1, attention), MLPStage(layer, norm2, mlp_of(block))

    def readout(self, module: Any, stream: Tensor) -> Tensor:
        normed = self.tower(module).encoder.layernorm(stream)
        if self.tower(module) is module:
            return _mean(normed)[:, 0]
        return module.classifier(module.pooler(normed))  # type: ignore[no-any-return]

    def readout_parts(self, module: Any) -> Readout | None:
        if self.tower(module) is not module:
            return None  # the pooler attends
        norm, none = norm_of(module.encoder.layernorm, "layernorm"), norm_of(nn.Identity(), "none")
        return Readout(norm, _mean, none, (nn.Identity(),))

    def run(self, module: Any, images: Tensor) -> Tensor:
        if self.tower(module) is module:  # what predicts hidden tokens takes no part
            return module.get_vision_features(images).mean(dim=1)  # type: ignore[no-any-return]
        return super().run(module, images)


class TimeSformer(Clips):
    """TimeSformer with divided attention: along time (`t0.h0`), then in each frame (`a0.h0`).

    Its tokens run through time fastest, so that they form no grid with time first: views and groups by frame
    are refused.
    """

    inner, layers = "timesformer", "encoder.layer"
    colours = ((0.45,) * 3, (0.225,) * 3)

    def tubelet(self, config: Any) -> tuple[int, int, int]:
        return 1, *pair(config.patch_size)

    def prefix(self, module: Any) -> tuple[str, ...]:
        return ("cls",)

    def grid(self, module: Any, height: int, width: int) -> None:  # type: ignore[override]
        return None

    def refuse(self, module: Any) -> None:
        super().refuse(module)
        kind = module.config.attention_type
        if kind != "divided_space_time":
            raise UnsupportedModelError(
                f"{type(module).__name__} has attention_type={kind!r}: only 'divided_space_time' is known"
            )

    def block(self, module: Any, block: Any, layer: int, where: str) -> tuple[Stage, ...]:
        frames, _, height, width = self.clip(module.config)
        _, rows, columns = self.tubelet(module.config)
        grid = (height // rows) * (width // columns), frames
        first, then = (
            _divided(block.temporal_attention, f"{where}.temporal_attention"),
            f"{where}.temporal_dense",
        )
        last = linear(block.temporal_dense, then)
        out = Twice(first.out.full_weight, first.out.full_bias, then=last)
        names = "temporal_layernorm", "layernorm_before", "layernorm_after"
        norms = [norm_of(getattr(block, name), f"{where}.{name}") for name in names]
        second = _divided(block.attention, f"{where}.attention")
        return (
            TimeAttention(layer, norms[0], replace(first, out=out), grid),
            SpaceAttention(layer, norms[1], second, grid),
            MLPStage(layer, norms[2], _mlp(block)),
        )


VIVIT, VIDEOMAE, VJEPA2, TIMESFORMER = Vivit(), VideoMAE(), VJEPA2Encoder(), TimeSformer()


# -- parts ---------------------------------------------------------------------------------------


def _mlp(block: Any) -> MLP:
    """That of blocks that keep its two halves apart."""
    first = block.intermediate
    mlp = nn.Sequential(first.dense, first.intermediate_act_fn, block.output.dense)
    return MLP(mlp, True, "1", (), None, "2")


def _divided(module: Any, where: str) -> Attention:
    """One of TimeSformer's two attentions."""
    own = module.attention
    packed = linear(own.qkv, f"{where}.attention.qkv")
    out = linear(module.output.dense, f"{where}.output.dense")
    return Attention.of_packed(own.num_heads, packed, out, own.scale)


def _first(normed: Tensor) -> Float[Tensor, "batch 1 d_model"]:
    return normed[:, :1]


def _mean(normed: Tensor) -> Float[Tensor, "batch 1 d_model"]:
    return normed.mean(dim=1, keepdim=True)

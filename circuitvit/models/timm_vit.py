"""timm's `VisionTransformer` with plain `Block` and `Attention`, as stages.

Known: class token or none, registers, the distillation token of DeiT, `no_embed_class`, `dynamic_img_size`,
`norm_pre`, LayerScale, `qkv_bias`, `qk_norm`, LayerNorm or RMSNorm with any eps, any MLP, `attn_head_dim`,
token and average pooling with `fc_norm` or `norm`, `num_classes=0`. Everything else is refused by name.

Dosovitskiy et al. 2021, "An image is worth 16x16 words", arXiv:2010.11929.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from circuitvit.errors import UnsupportedModelError
from circuitvit.graph import StageNodes
from circuitvit.models.answers import mlp_answers
from circuitvit.models.attention import AttentionStage
from circuitvit.models.factored import Factored
from circuitvit.models.norms import Norm, norm_of, ruled_norm, ruled_part
from circuitvit.models.rules import BackwardRules, damped, ruled_mlp, with_children
from circuitvit.models.stages import Reads, Stage
from circuitvit.models.timm_switches import gamma_of, refuse_unknown_block, refuse_unknown_outside


class EmbeddingStage(Stage):
    """Everything before block 0: patches, positions, class token, registers, and CLIP's norm after them."""

    def __init__(self, vit: Any) -> None:
        self.vit = vit
        self.nodes = StageNodes("input", "input", 0, senders=("input",))

    def read(self, stream: Tensor) -> Reads:
        return (stream,)

    def read_each(self, streams: Tensor, source: Sequence[int], known: Reads = ()) -> Reads:
        raise NotImplementedError("the embedding has no receivers")

    def write(self, reads: Reads) -> Float[Tensor, "batch token d_model"]:
        embedded = self.vit._pos_embed(self.vit.patch_embed(reads[0]))
        return self.vit.norm_pre(self.vit.patch_drop(embedded))  # type: ignore[no-any-return]

    def total(self, compact: Tensor) -> Tensor:
        return compact

    def factored(self, compact: Tensor) -> Factored:
        return Factored(compact[None])

    def with_rules(self, rules: BackwardRules) -> EmbeddingStage:
        return self  # no gradient passes it


class MLPStage(Stage):
    """An MLP behind its norm: one receiver, one sender; its biases belong to the sender."""

    def __init__(
        self,
        layer: int,
        norm: Norm,
        mlp: nn.Module,
        gamma: Tensor | None,
        rules: BackwardRules | None = None,
    ) -> None:
        self.layer, self.norm, self.mlp, self.gamma, self.rules = layer, norm, mlp, gamma, rules
        name = (f"m{layer}",)
        self.nodes = StageNodes(f"mlp{layer}", "mlp", layer, name, name, mixes=(False,))

    def read(self, stream: Tensor) -> Reads:
        return (self.norm(stream),)

    def read_each(self, streams: Tensor, source: Sequence[int], known: Reads = ()) -> Reads:
        return (self.norm(streams[source[0]]),) if source[0] >= 0 else known

    def write(self, reads: Reads) -> Float[Tensor, "batch token d_model"]:
        output: Tensor = self.mlp(reads[0])
        output = output if self.rules is None else damped(output, self.rules.output_share)
        return output if self.gamma is None else output * self.gamma

    def total(self, compact: Tensor) -> Tensor:
        return compact

    def factored(self, compact: Tensor) -> Factored:
        return Factored(compact[None])

    def pull_back(self, stream: Tensor, reads: Reads, d_reads: Reads) -> Factored:
        return Factored(self.norm.pull_back(stream, d_reads[0])[None])

    def local_effects(
        self, reads: Reads, d_reads: Reads, d_compact: Tensor, stream: Tensor, streams: Tensor
    ) -> Tensor:
        d_output = d_compact if self.gamma is None else d_compact * self.gamma
        return mlp_answers(self.mlp, reads[0], self.norm(streams), d_output)

    def with_rules(self, rules: BackwardRules) -> MLPStage:
        mlp = ruled_mlp(self.mlp, rules)
        if isinstance(getattr(mlp, "norm", None), nn.Module):
            mlp = with_children(mlp, norm=ruled_part(mlp.norm, rules))
        return MLPStage(self.layer, ruled_norm(self.norm, rules), mlp, self.gamma, rules)


class ReadoutStage(Stage):
    """Final norm, pooling and classifier: one receiver, the logits."""

    def __init__(self, vit: Any, layer: int) -> None:
        self.vit = vit
        self.nodes = StageNodes("readout", "readout", layer, receivers=("logits",))

    @property
    def tokens(self) -> int | None:
        """How many of the first tokens are read; None if all are."""
        if self.vit.global_pool != "token" and not hasattr(self.vit, "head_dist"):
            return None
        return 2 if hasattr(self.vit, "head_dist") else 1

    def read(self, stream: Tensor) -> Reads:
        return (stream,)

    def read_each(self, streams: Tensor, source: Sequence[int], known: Reads = ()) -> Reads:
        return (streams[source[0]],) if source[0] >= 0 else known

    def write(self, reads: Reads) -> Float[Tensor, "batch classes"]:
        return self.vit.forward_head(self.vit.norm(reads[0]))  # type: ignore[no-any-return]

    def with_rules(self, rules: BackwardRules) -> ReadoutStage:
        parts = {name: ruled_part(getattr(self.vit, name), rules) for name in ("norm", "fc_norm")}
        return ReadoutStage(with_children(self.vit, **parts), self.nodes.layer)

    def total(self, compact: Tensor) -> Tensor:
        raise NotImplementedError("the readout adds nothing to the stream")

    def factored(self, compact: Tensor) -> Factored:
        raise NotImplementedError("the readout has no senders")

    def pull_back(self, stream: Tensor, reads: Reads, d_reads: Reads) -> Factored:
        return Factored(d_reads[0][None])


# -- from module to stages -----------------------------------------------------------------------


def frozen_twin(module: nn.Module) -> nn.Module:
    """A copy of a module's structure in evaluation mode, whose tensors share memory with the original.

    The original keeps its mode, its gradients and its `requires_grad` flags; the twin has none of them, so
    no gradient of a weight is ever computed.

    Raises:
        UnsupportedModelError: if a part cannot be copied.
    """
    shared: dict[int, Any] = {}
    for parameter in module.parameters():
        shared[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    for buffer in module.buffers():
        shared[id(buffer)] = buffer.detach()
    try:
        return copy.deepcopy(module, shared).eval()
    except Exception as error:  # parts may refuse to be copied in any way they like
        raise UnsupportedModelError(
            f"{type(module).__name__} cannot be copied: {error}. Weights that every forward computes anew, "
            "as torch.nn.utils.weight_norm does, have to be made plain first (remove_weight_norm)"
        ) from error


def stages_of(vit: Any) -> tuple[Stage, ...]:
    """The stages of a timm `VisionTransformer`, which must be a frozen twin.

    Raises:
        UnsupportedModelError: if a part is not one we know; the message names the module and the switch.
    """
    refuse_unknown_outside(vit)
    stages: list[Stage] = [EmbeddingStage(vit)]
    for layer, block in enumerate(vit.blocks):
        where = f"blocks.{layer}"
        refuse_unknown_block(block, where)
        norm = norm_of(block.norm1, f"{where}.norm1")
        stages.append(AttentionStage(layer, norm, block.attn, gamma_of(block.ls1, f"{where}.ls1")))
        norm = norm_of(block.norm2, f"{where}.norm2")
        stages.append(MLPStage(layer, norm, block.mlp, gamma_of(block.ls2, f"{where}.ls2")))
    stages.append(ReadoutStage(vit, len(vit.blocks)))
    return tuple(stages)


def prefix_of(vit: Any) -> tuple[str, ...]:
    """The kinds of the tokens before the patches."""
    kinds: list[str] = ["cls"] if vit.cls_token is not None else []
    kinds += ["dist"] if getattr(vit, "dist_token", None) is not None else []
    kinds += ["reg"] * (vit.num_prefix_tokens - len(kinds))
    return tuple(kinds)

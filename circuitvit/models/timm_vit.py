"""timm's `VisionTransformer` with plain `Block` and `Attention`, as stages.

Known: class token or none, registers, the distillation token of DeiT, `no_embed_class`, `dynamic_img_size`,
`norm_pre`, LayerScale, `qkv_bias`, `qk_norm`, LayerNorm or RMSNorm with any eps, any MLP, `attn_head_dim`,
token and average pooling with `fc_norm` or `norm`, `num_classes=0`. Everything else is refused by name.

Dosovitskiy et al. 2021, "An image is worth 16x16 words", arXiv:2010.11929.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from circuitvit.errors import UnsupportedModelError
from circuitvit.graph import StageNodes
from circuitvit.models.answers import attention_answers, mlp_answers
from circuitvit.models.factored import Factored
from circuitvit.models.norms import Norm, norm_of, ruled_norm, ruled_part
from circuitvit.models.rules import BackwardRules, damped, ruled_attention, ruled_mlp, with_children
from circuitvit.models.stages import Reads, Stage
from circuitvit.models.timm_switches import gamma_of, refuse_unknown_block, refuse_unknown_outside

__all__ = [
    "AttentionStage",
    "EmbeddingStage",
    "MLPStage",
    "ReadoutStage",
    "frozen_twin",
    "prefix_of",
    "stages_of",
]


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


class AttentionStage(Stage):
    """Multi-head self-attention: receivers are the heads' queries, then keys, then values; senders the heads.

    Reads are the raw queries, keys and values `(batch, head, token, d_head)` before `qk_norm`, so that norm
    and projection are all that lies between a receiver's stream and its read. With `queries` set only the
    first that many tokens have a query and are written.
    """

    def __init__(
        self,
        layer: int,
        norm: Norm,
        attention: Any,
        gamma: Tensor | None,
        heads: Sequence[int],
        queries: int | None = None,
        rules: BackwardRules | None = None,
    ) -> None:
        self.layer, self.norm, self.attention, self.gamma = layer, norm, attention, gamma
        self.heads, self.queries, self.rules = tuple(heads), queries, rules
        self.whole = self.heads == tuple(range(attention.num_heads))
        names = tuple(f"a{layer}.h{head}" for head in self.heads)
        ports = tuple(f"{name}<{port}>" for port in "qkv" for name in names)
        mixes = tuple(port != "q" for port in "qkv" for _ in names)
        self.nodes = StageNodes(f"attn{layer}", "attention", layer, names, ports, mixes=mixes)

    # The weights are views of the module's own, `(receiver, d_head, d_model)` and `(head, d_head, d_model)`.

    @cached_property
    def _qkv_weight(self) -> Float[Tensor, "receiver d_head d_model"]:
        heads = self.attention.num_heads
        weight: Tensor = rearrange(
            self.attention.qkv.weight, "(port head k) d -> port head k d", port=3, head=heads
        )
        return self._cut(weight).flatten(0, 1)

    @cached_property
    def _qkv_bias(self) -> Float[Tensor, "receiver d_head"] | None:
        bias = self.attention.qkv.bias
        return None if bias is None else self._cut(bias.view(3, self.attention.num_heads, -1)).flatten(0, 1)

    @cached_property
    def _out_weight(self) -> Float[Tensor, "head d_head d_model"]:
        weight: Tensor = self.attention.proj.weight
        if self.gamma is not None:
            weight = weight * self.gamma[:, None]
        by_head: Tensor = rearrange(weight, "d (head k) -> head k d", head=self.attention.num_heads)
        return by_head if self.whole else by_head[list(self.heads)]

    @cached_property
    def _folded(self) -> tuple[Float[Tensor, "receiver d_head d_model"], Float[Tensor, "receiver d_head"]]:
        weight = self._qkv_weight.flatten(0, 1)
        bias = None if self._qkv_bias is None else self._qkv_bias.flatten()
        folded = self.norm.fold(weight).view_as(self._qkv_weight)
        return folded, self.norm.offset(weight, bias).view(folded.shape[:2])

    def _cut(self, by_head: Tensor) -> Tensor:
        return by_head if self.whole else by_head[:, list(self.heads)]

    @property
    def constant(self) -> Tensor | None:
        bias: Tensor | None = self.attention.proj.bias
        return bias if bias is None or self.gamma is None else bias * self.gamma

    def read(self, stream: Tensor) -> Reads:
        weight = self._qkv_weight.flatten(0, 1)
        bias = None if self._qkv_bias is None else self._qkv_bias.flatten()
        qkv = F.linear(self.norm(stream), weight, bias)
        split: Tensor = rearrange(qkv, "b t (port head k) -> port b head t k", port=3, head=len(self.heads))
        return self._asked(split.unbind(0))

    def read_each(self, streams: Tensor, source: Sequence[int], known: Reads = ()) -> Reads:
        seeing = [place for place, stream in enumerate(source) if stream >= 0]
        if len(streams) == 1 and len(seeing) == len(source):
            return self.read(streams[0])
        weight, offset = self._folded
        inverse = self.norm.inverse(streams)
        seen = [source[place] for place in seeing]
        if seen != list(range(len(streams))):
            streams, inverse = streams[seen], inverse[seen]
        if len(seeing) < len(source):
            weight, offset = weight[seeing], offset[seeing]
        # The norm comes after the projection, where the stream is d_head wide: nothing normed is written.
        projected = _project(streams, weight.transpose(1, 2))
        projected = torch.addcmul(offset[:, None, None, :], projected, inverse)
        if len(seeing) < len(source):
            projected = self._by_receiver(known, streams.shape[2]).index_copy(
                0, torch.tensor(seeing, device=streams.device), projected
            )
        split: Tensor = rearrange(projected, "(port head) b t k -> port b head t k", port=3)
        return self._asked(split.unbind(0))

    def pick(self, reads: Reads) -> Reads:
        return reads if self.whole else tuple(read[:, list(self.heads)] for read in reads)

    def _asked(self, reads: Reads) -> Reads:
        """The reads with only the queries that are asked for."""
        query, *rest = reads
        return (query if self.queries is None else query[:, :, : self.queries], *rest)

    def write(self, reads: Reads) -> Float[Tensor, "batch head token d_head"]:
        query, key, value = reads
        query, key = self.attention.q_norm(query), self.attention.k_norm(key)
        if self.rules is not None:
            return ruled_attention(query, key, value, self.attention.scale, self.rules)
        return F.scaled_dot_product_attention(query, key, value, scale=self.attention.scale)

    def total(self, compact: Tensor) -> Tensor:
        joined: Tensor = rearrange(compact, "b head t k -> b t (head k)")
        if not self.whole:
            return F.linear(joined, self._out_weight.flatten(0, 1).t())
        added = F.linear(joined, self.attention.proj.weight, self.attention.proj.bias)
        return added if self.gamma is None else added * self.gamma

    @property
    def cut(self) -> int | None:
        return self.queries

    def add(self, stream: Tensor, compact: Tensor) -> Tensor:
        return stream[:, : self.queries] + self.total(compact)

    def factored(self, compact: Tensor) -> Factored:
        return Factored(compact.transpose(0, 1), self._out_weight)

    def pull_back(self, stream: Tensor, reads: Reads, d_reads: Reads) -> Factored:
        weight, offset = self._folded
        x_hat, inverse = self.norm.standardise(stream)
        tokens = stream.shape[1]
        narrow = self._by_receiver(d_reads, tokens).mul_(inverse)
        if not self.norm.bends:
            return Factored(narrow, weight)
        values = self._by_receiver(reads, tokens).sub_(offset[:, None, None, :])
        along = values.mul_(narrow).sum(dim=-1, keepdim=True) / stream.shape[-1]
        return Factored(narrow, weight, (along,), (x_hat,))

    def _by_receiver(self, reads: Reads, tokens: int) -> Float[Tensor, "receiver batch token d_head"]:
        """The reads stacked, in memory of their own; queries that were not asked for are 0."""
        query, key, value = reads
        query = F.pad(query, (0, 0, 0, tokens - query.shape[2]))
        return torch.stack((query, key, value)).transpose(1, 2).flatten(0, 1)

    def local_effects(
        self, reads: Reads, d_reads: Reads, d_compact: Tensor, stream: Tensor, streams: Tensor
    ) -> Tensor:
        others = tuple(
            read.view(*streams.shape[:2], *read.shape[1:]) for read in self.read(streams.flatten(0, 1))
        )
        return attention_answers(self.write, reads, others, d_reads[2], d_compact)

    def restrict(self, senders: Sequence[int]) -> AttentionStage:
        if list(senders) == list(range(len(self.heads))):
            return self
        heads = [self.heads[sender] for sender in senders]
        return self._with(heads=heads)

    def leading(self, tokens: int) -> AttentionStage:
        return self._with(queries=tokens)

    def with_rules(self, rules: BackwardRules) -> AttentionStage:
        parts = {name: ruled_part(getattr(self.attention, name), rules) for name in ("q_norm", "k_norm")}
        attention = with_children(self.attention, **parts)
        return self._with(norm=ruled_norm(self.norm, rules), attention=attention, rules=rules)

    def _with(self, **changes: Any) -> AttentionStage:
        """The stage with some of the arguments that it was made from replaced."""
        names = ("layer", "norm", "attention", "gamma", "heads", "queries", "rules")
        return AttentionStage(**{**{name: getattr(self, name) for name in names}, **changes})


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


def _project(
    streams: Float[Tensor, "receiver batch token d_model"], weight: Float[Tensor, "receiver d_model d_head"]
) -> Float[Tensor, "receiver batch token d_head"]:
    """Each receiver's stream times its own weight; image by image where the streams lie so in memory."""
    if streams.is_contiguous():
        return torch.bmm(streams.flatten(1, 2), weight).view(*streams.shape[:3], -1)
    return torch.stack([torch.bmm(image, weight) for image in streams.unbind(1)], dim=1)


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
        heads = range(block.attn.num_heads)
        stages.append(AttentionStage(layer, norm, block.attn, gamma_of(block.ls1, f"{where}.ls1"), heads))
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

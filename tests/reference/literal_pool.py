"""The literal split model with attention pooling: timm's `AttentionPoolLatent`, by its formula.

    head of the pool      x = softmax( q(latent) k(N X_k)^T * scale ) v(N X_v) W_O,  at the latents alone
    MLP of the pool       x = MLP( N' X_m )
    logits                W N'' pool( X ) + b

What the pool's MLP and the logits read is a stream of latents, in which nothing of the blocks is: they hear
the pool's heads (and its MLP) and the constant `c`, the bias of the pool's output projection.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.reference.literal_vit import Groups, Hear, LiteralViT, Run


class PooledViT(LiteralViT):
    """The split model of a timm `VisionTransformer` with `global_pool="map"`."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__(vit)
        self.pool: Any = vit.attn_pool
        self.pool_heads = [f"pool.h{head}" for head in range(self.pool.num_heads)]

    # -- names -----------------------------------------------------------------------------------

    def stages(self) -> list[tuple[list[str], list[str]]]:
        *blocks, readout = super().stages()
        ports = [f"{head}<{port}>" for port in "kv" for head in self.pool_heads]
        mlp = [(["pool.mlp"], ["pool.mlp"])] if self.pool.mlp is not None else []
        return [*blocks, (self.pool_heads, ports), *mlp, readout]

    def senders_before(self, receiver: str) -> list[str]:
        before = super().senders_before(receiver)
        return (
            [name for name in before if name.startswith("pool")] if self.hears_latents(receiver) else before
        )

    def hears_latents(self, receiver: str) -> bool:
        return receiver in ("pool.mlp", "logits")

    def groups_at(self, receiver: str, groups: Groups | None) -> Groups | None:
        if groups is None or not self.hears_latents(receiver):
            return groups
        return Groups(("pool",), torch.zeros(self.pool.latent_len, dtype=torch.int64))

    # -- the parts -------------------------------------------------------------------------------

    def end(self, run: Run, hear: Hear, constant: Tensor) -> Tensor:
        for head, name in enumerate(self.pool_heads):
            run.outputs[name] = self.pool_head(head, *(hear(f"{name}<{port}>", constant) for port in "kv"))
        latents = run.outputs["pool.h0"]
        bias = getattr(self.pool.proj, "bias", None)
        constant = torch.zeros_like(latents) + (0.0 if bias is None else self.tensor(bias))
        if self.pool.mlp is not None:
            run.outputs["pool.mlp"] = self.pool_mlp(hear("pool.mlp", constant))
        return self.readout(hear("logits", constant))

    def pool_head(self, head: int, key: Tensor, value: Tensor) -> Tensor:
        pool, width = self.pool, self.pool.head_dim
        latent = self.tensor(pool.latent).expand(len(key), -1, -1)
        query = self.linear(pool.q, latent)[..., head * width : (head + 1) * width]
        keys, values = (self.pooled_tokens(stream) for stream in (key, value))
        first, second = head * width, pool.kv.weight.shape[0] // 2 + head * width
        weight, bias = self.tensor(pool.kv.weight), pool.kv.bias
        read = []
        for tokens, start in ((keys, first), (values, second)):
            rows = slice(start, start + width)
            read.append(tokens @ weight[rows].t() + (0.0 if bias is None else self.tensor(bias)[rows]))
        asked, offered = self.norm(pool.q_norm, query), self.norm(pool.k_norm, read[0])
        mixed = self.pattern(asked @ offered.transpose(1, 2) * width**-0.5) @ read[1]
        if isinstance(pool.proj, nn.Identity):
            return torch.cat([mixed if each == head else 0 * mixed for each in range(pool.num_heads)], dim=-1)
        return mixed @ self.tensor(pool.proj.weight)[:, head * width : (head + 1) * width].t()

    def pooled_tokens(self, stream: Tensor) -> Tensor:
        """The tokens that are pooled, as keys and values are made of them."""
        tokens = self.norm(self.vit.norm, stream)
        tokens = tokens if self.vit.pool_include_prefix else tokens[:, self.vit.num_prefix_tokens :]
        return tokens if self.pool.pos_embed is None else tokens + self.tensor(self.pool.pos_embed)

    def pool_mlp(self, stream: Tensor) -> Tensor:
        mlp = self.pool.mlp
        hidden = self.linear(mlp.fc1, self.norm(self.pool.norm, stream))
        return self.linear(mlp.fc2, self.activation(mlp.act, hidden))

    def node(self, name: str, inputs: Mapping[str, Tensor]) -> Tensor:
        if name == "pool.mlp":
            return self.pool_mlp(inputs[name])
        if name in self.pool_heads:
            return self.pool_head(self.pool_heads.index(name), *(inputs[f"{name}<{port}>"] for port in "kv"))
        return super().node(name, inputs)

    def readout(self, stream: Tensor) -> Tensor:
        pooled = stream[:, 0] if self.pool.pool == "token" else stream.mean(dim=1)
        return self.linear(self.vit.head, self.norm(self.vit.fc_norm, pooled))

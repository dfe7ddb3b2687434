"""The split model again, from the module's own parts instead of formulas: for modules that no formula knows.

`LiteralViT` writes every formula down anew, so it says nothing about a pooling, an MLP or a hook of the
user's own. Here every part is the module's own, called as it stands, and only what has to be told apart is
told apart: each receiver has its own stream, each head its own columns of the output projection. What the
parts do is not looked at, so whatever they do is done here too.
"""

from __future__ import annotations

from torch import Tensor, nn

from tests.reference.literal_vit import LiteralViT


class ModuleViT(LiteralViT):
    """The split model of any module with the attributes of timm's `VisionTransformer`.

    Args:
        vit: the module, in float64 and in evaluation mode. It is not copied: its weights are read anew, and
            its hooks fire, in every run.
    """

    def embed(self, images: Tensor) -> Tensor:
        vit = self.vit
        return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images.to(self.dtype)))))

    def read(self, block: nn.Module, head: int, port: int, stream: Tensor) -> Tensor:
        attention = block.attn
        first = (port * attention.num_heads + head) * attention.head_dim
        return attention.qkv(block.norm1(stream))[..., first : first + attention.head_dim]

    def written(self, block: nn.Module, head: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attention = block.attn
        asked, offered = attention.q_norm(query), attention.k_norm(key)
        carried = self.pattern(asked @ offered.transpose(1, 2) * attention.scale) @ value
        heads = carried.new_zeros(*carried.shape[:2], attention.num_heads, attention.head_dim)
        before = block.ls1(attention.proj(heads.flatten(2)))
        heads[:, :, head] = carried
        return block.ls1(attention.proj(heads.flatten(2))) - before

    def constant(self, block: nn.Module) -> Tensor | float:
        attention = block.attn
        nothing = next(block.parameters()).new_zeros(1, 1, attention.num_heads * attention.head_dim)
        return block.ls1(attention.proj(nothing))

    def mlp(self, block: nn.Module, stream: Tensor) -> Tensor:
        return block.ls2(block.mlp(block.norm2(stream)))

    def readout(self, stream: Tensor) -> Tensor:
        return self.vit.forward_head(self.vit.norm(stream))

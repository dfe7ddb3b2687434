"""A Vision Transformer run node by node, by plain loops, from nothing but the raw timm module's weights.

Nothing here is fast, and nothing here comes from `circuitvit`: every formula is written down again from the
mathematics, in float64, so that a mistake in the library's engine cannot hide in what it is held against.

    input of receiver v   X_v = c + sum over senders u before v's stage of ( x_u if kept else r_u )
    head                  x = gamma * ( softmax( q(N X_q) k(N X_k)^T * scale ) v(N X_v) W_O )
    MLP                   x = gamma * MLP( N X_m )

Every receiver sums its own input, edge by edge and token group by token group. Sender outputs are kept in a
dictionary by name. `c` holds the attention output biases (times LayerScale), which belong to no sender.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kept = Callable[[str], bool]
"""Whether the edge of a name is kept."""

Hear = Callable[[str, Tensor], Tensor]
"""What a receiver reads, by its name and the constant of its stream."""


@dataclass(frozen=True)
class Groups:
    """Token groups: their names, and the number of the group that each token of each image is in."""

    names: tuple[str, ...]
    members: Tensor  # (token,) or (batch, token)

    def inside(self, group: int, batch: int) -> Tensor:
        """`(batch, token, 1)`: 1 where a token is in the group, else 0."""
        members = self.members if self.members.ndim == 2 else self.members[None].expand(batch, -1)
        return (members == group).double()[..., None]


@dataclass
class Run:
    """What a run left behind: the logits, every sender's output and every receiver's input, by name."""

    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    outputs: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)


class LiteralViT:
    """The split model.

    Args:
        vit: a timm `VisionTransformer`; only its weights and switches are read, its `forward` never runs.
    """

    dtype = torch.float64

    def __init__(self, vit: nn.Module) -> None:
        self.vit = vit
        self.depth = len(vit.blocks)
        self.heads = [block.attn.num_heads for block in vit.blocks]

    def tensor(self, parameter: Tensor) -> Tensor:
        return parameter.detach().to(self.dtype)

    # -- names -----------------------------------------------------------------------------------

    def stages(self) -> list[tuple[list[str], list[str]]]:
        """Senders and receivers of every stage, in running order."""
        stages: list[tuple[list[str], list[str]]] = [(["input"], [])]
        for layer in range(self.depth):
            heads = [f"a{layer}.h{head}" for head in range(self.heads[layer])]
            stages.append((heads, [f"{head}<{port}>" for port in "qkv" for head in heads]))
            stages.append(([f"m{layer}"], [f"m{layer}"]))
        stages.append(([], ["logits"]))
        return stages

    def senders(self) -> list[str]:
        return [sender for senders, _ in self.stages() for sender in senders]

    def receivers(self) -> list[str]:
        return [receiver for _, receivers in self.stages() for receiver in receivers]

    def senders_before(self, receiver: str) -> list[str]:
        """The senders of all stages before the receiver's, in order."""
        before: list[str] = []
        for senders, receivers in self.stages():
            if receiver in receivers:
                return before
            before += senders
        raise KeyError(receiver)

    def edges(self, groups: Groups | None = None) -> list[tuple[str, str, int, str]]:
        """Every edge as (sender, receiver, group number, name), ordered by sender, receiver, group."""
        found = []
        for sender in self.senders():
            for receiver in self.receivers():
                if sender in self.senders_before(receiver):
                    mine = self.groups_at(receiver, groups)
                    for group in range(1 if mine is None else len(mine.names)):
                        found.append((sender, receiver, group, edge(sender, receiver, group, mine)))
        return found

    def groups_at(self, receiver: str, groups: Groups | None) -> Groups | None:
        """The token groups of the stream that a receiver reads."""
        return groups

    # -- the run ---------------------------------------------------------------------------------

    def run(
        self,
        images: Tensor,
        reference: Mapping[str, Tensor] | None = None,
        kept: Kept | Mapping[str, bool] | None = None,
        groups: Groups | None = None,
        *,
        embedded: Tensor | None = None,
        taps: Mapping[str, Tensor] | None = None,
    ) -> Run:
        """Run the split model.

        Args:
            images: `(batch, channel, height, width)`.
            reference: for each sender, the output that replaces its own on ablated edges.
            kept: edge names to whether they are kept; every edge by default.
            groups: token groups that edges are resolved by.
            embedded: what the sender `input` writes, instead of the images' embedding.
            taps: for some receivers, what is added to the input of that receiver alone.
        """
        run = Run()
        run.outputs["input"] = self.embed(images) if embedded is None else embedded
        batch = len(images)
        constant = torch.zeros_like(run.outputs["input"])

        def hear(receiver: str, constant: Tensor) -> Tensor:
            total, mine = constant, self.groups_at(receiver, groups)
            for sender in self.senders_before(receiver):
                own = run.outputs[sender]
                if kept is None:
                    total = total + own
                    continue
                assert reference is not None
                names = [
                    edge(sender, receiver, n, mine) for n in range(1 if mine is None else len(mine.names))
                ]
                keeps = [bool(kept(name) if callable(kept) else kept[name]) for name in names]
                if len(set(keeps)) == 1:  # every token is in one group, so that all of them hear the same
                    total = total + (own if keeps[0] else reference[sender])
                    continue
                assert mine is not None
                for group, keep in enumerate(keeps):
                    total = total + (own if keep else reference[sender]) * mine.inside(group, batch)
            if taps is not None and receiver in taps:
                total = total + taps[receiver]
            run.inputs[receiver] = total
            return total

        for layer, block in enumerate(self.vit.blocks):
            for head in range(self.heads[layer]):
                name = f"a{layer}.h{head}"
                query, key, value = (hear(f"{name}<{port}>", constant) for port in "qkv")
                run.outputs.update(self.by_head(name, query, key, value))
            constant = constant + self.constant(block)
            run.outputs.update(self.by_mlp(f"m{layer}", partial(hear, constant=constant)))
        run.logits = self.end(run, hear, constant)
        return run

    def by_head(self, name: str, query: Tensor, key: Tensor, value: Tensor) -> dict[str, Tensor]:
        """What the senders of a head write, from the three streams that it reads."""
        return {name: self.head(*self.place(name), query, key, value)}

    def by_mlp(self, name: str, hear: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """What the senders of an MLP write, from what its receivers hear."""
        return {name: self.mlp(self.vit.blocks[int(name[1:])], hear(name))}

    def fed(self, receiver: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the senders of a receiver's node write, from what its receivers read, by name."""
        node = receiver.partition("<")[0]
        return {node: self.node(node, inputs)}

    def place(self, head: str) -> tuple[nn.Module, int]:
        """The block and the number of a head."""
        layer, _, number = head[1:].partition(".h")
        return self.vit.blocks[int(layer)], int(number)

    def end(self, run: Run, hear: Hear, constant: Tensor) -> Tensor:
        """The logits, after the blocks."""
        return self.readout(hear("logits", constant))

    # -- the parts -------------------------------------------------------------------------------

    def embed(self, images: Tensor) -> Tensor:
        """Patches, class token, registers and positions, and CLIP's norm after them."""
        vit, images = self.vit, images.to(self.dtype)
        patches = self.patches(images)
        grid = (
            images.shape[2] // vit.patch_embed.patch_size[0],
            images.shape[3] // vit.patch_embed.patch_size[1],
        )
        prefix = [vit.cls_token, getattr(vit, "dist_token", None), getattr(vit, "reg_token", None)]
        tokens = [self.tensor(token).expand(len(images), -1, -1) for token in prefix if token is not None]
        n_prefix = sum(token.shape[1] for token in tokens)
        if vit.pos_embed is None:
            stream = torch.cat([*tokens, patches], dim=1)
        elif vit.no_embed_class:
            stream = torch.cat([*tokens, patches + self.positions(grid, 0)], dim=1)
        else:
            stream = torch.cat([*tokens, patches], dim=1) + self.positions(grid, n_prefix)
        return self.norm(vit.norm_pre, stream)

    def patches(self, images: Tensor) -> Tensor:
        embed = self.vit.patch_embed
        weight = self.tensor(embed.proj.weight).flatten(1)
        bias = 0.0 if embed.proj.bias is None else self.tensor(embed.proj.bias)
        high, wide = embed.patch_size
        tokens = []
        for row in range(images.shape[2] // high):
            for column in range(images.shape[3] // wide):
                patch = images[:, :, row * high : (row + 1) * high, column * wide : (column + 1) * wide]
                tokens.append(patch.flatten(1) @ weight.t() + bias)
        return self.norm(embed.norm, torch.stack(tokens, dim=1))

    def positions(self, grid: tuple[int, int], n_prefix: int) -> Tensor:
        """Position embeddings, resized to another grid as timm does it (bicubic, in float32)."""
        positions = self.vit.pos_embed.detach()
        trained = tuple(self.vit.patch_embed.grid_size)
        if grid != trained:
            prefix, rest = positions[:, :n_prefix], positions[:, n_prefix:]
            square = rest.float().reshape(1, *trained, -1).permute(0, 3, 1, 2)
            resized = F.interpolate(square, size=grid, mode="bicubic", antialias=True)
            rest = resized.permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], -1).to(positions.dtype)
            positions = torch.cat([prefix, rest], dim=1)
        return positions.to(self.dtype)

    def norm(self, module: nn.Module, stream: Tensor) -> Tensor:
        if isinstance(module, nn.Identity):
            return stream
        eps = torch.finfo(self.dtype).eps if module.eps is None else module.eps
        if isinstance(module, nn.LayerNorm):
            stream = stream - stream.mean(dim=-1, keepdim=True)
        normed = stream / (stream.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt()
        if module.weight is not None:
            normed = normed * self.tensor(module.weight)
        if getattr(module, "bias", None) is not None:
            normed = normed + self.tensor(module.bias)
        return normed

    def gamma(self, scale: nn.Module) -> Tensor | float:
        return 1.0 if isinstance(scale, nn.Identity) else self.tensor(scale.gamma)

    def head(self, block: nn.Module, head: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One head's output `(batch, token, d_model)` from the three streams that it reads."""
        read = [self.read(block, head, port, stream) for port, stream in enumerate((query, key, value))]
        return self.written(block, head, *read)

    def constant(self, block: nn.Module) -> Tensor | float:
        """What attention adds to every token that belongs to no head."""
        bias = block.attn.proj.bias
        return 0.0 if bias is None else self.tensor(bias) * self.gamma(block.ls1)

    def read(self, block: nn.Module, head: int, port: int, stream: Tensor) -> Tensor:
        """What a head's query (port 0), key (1) or value (2) makes of a stream, before its own norm."""
        attention = block.attn
        first = (port * attention.num_heads + head) * attention.head_dim
        rows = slice(first, first + attention.head_dim)
        projected = self.norm(block.norm1, stream) @ self.tensor(attention.qkv.weight[rows]).t()
        return projected if attention.qkv.bias is None else projected + self.tensor(attention.qkv.bias[rows])

    def written(self, block: nn.Module, head: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """A head's output from what it has read."""
        return self.sent(block, head, self.mixed(block, query, key, value))

    def mixed(self, block: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """A head's z: its values, mixed by its pattern."""
        attention = block.attn
        asked, offered = self.norm(attention.q_norm, query), self.norm(attention.k_norm, key)
        pattern = self.pattern(asked @ offered.transpose(1, 2) / math.sqrt(attention.head_dim))
        return pattern @ value

    def sent(self, block: nn.Module, head: int, mixed: Tensor) -> Tensor:
        """A head's output from its z."""
        width = block.attn.head_dim
        columns = slice(head * width, (head + 1) * width)
        return (mixed @ self.tensor(block.attn.proj.weight[:, columns]).t()) * self.gamma(block.ls1)

    def pattern(self, scores: Tensor) -> Tensor:
        """Attention scores to weights."""
        return softmax(scores)

    def node(self, name: str, inputs: Mapping[str, Tensor]) -> Tensor:
        """What a head or MLP writes, from what its receivers read, by name."""
        if name.startswith("m"):
            return self.mlp(self.vit.blocks[int(name[1:])], inputs[name])
        return self.head(*self.place(name), *(inputs[f"{name}<{port}>"] for port in "qkv"))

    def mlp(self, block: nn.Module, stream: Tensor) -> Tensor:
        """The MLP's output."""
        return self.linear(block.mlp.fc2, self.hidden(block, stream)) * self.gamma(block.ls2)

    def hidden(self, block: nn.Module, stream: Tensor) -> Tensor:
        """The MLP's neurons; its kind is told by the names of its parts."""
        mlp, normed = block.mlp, self.norm(block.norm2, stream)
        if hasattr(mlp, "fc1_g"):  # SwiGLU with two matrices
            hidden = self.activation(mlp.act, self.linear(mlp.fc1_g, normed)) * self.linear(mlp.fc1_x, normed)
        elif hasattr(mlp, "gate_last"):  # a gated linear unit with one matrix
            first, second = self.linear(mlp.fc1, normed).chunk(2, dim=-1)
            if mlp.gate_last:
                hidden = first * self.activation(mlp.act, second)
            else:
                hidden = self.activation(mlp.act, first) * second
        else:
            hidden = self.activation(mlp.act, self.linear(mlp.fc1, normed))
        return self.norm(mlp.norm, hidden)

    def readout(self, stream: Tensor) -> Tensor:
        """Final norm, pooling, classifier."""
        vit, normed = self.vit, self.norm(self.vit.norm, stream)
        if hasattr(vit, "head_dist"):
            return (self.linear(vit.head, normed[:, 0]) + self.linear(vit.head_dist, normed[:, 1])) / 2
        if vit.global_pool == "token":
            pooled = normed[:, 0]
        else:
            tokens = normed if vit.pool_include_prefix else normed[:, vit.num_prefix_tokens :]
            kinds = {
                "avg": lambda: tokens.mean(dim=1),
                "max": lambda: tokens.amax(dim=1),
                "avgmax": lambda: (tokens.amax(dim=1) + tokens.mean(dim=1)) / 2,
            }
            pooled = kinds[vit.global_pool]()
        return self.linear(vit.head, self.norm(vit.fc_norm, pooled))

    def linear(self, module: nn.Module, x: Tensor) -> Tensor:
        if isinstance(module, nn.Identity):
            return x
        product = x @ self.tensor(module.weight).t()
        return product if module.bias is None else product + self.tensor(module.bias)

    def activation(self, module: nn.Module, x: Tensor) -> Tensor:
        formulas: dict[str, Callable[[Tensor], Tensor]] = {
            "GELU": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
            "QuickGELU": lambda x: x / (1 + torch.exp(-1.702 * x)),
            "SiLU": lambda x: x / (1 + torch.exp(-x)),
            "Sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
            "ReLU": lambda x: x.clamp(min=0),
        }
        return formulas[type(module).__name__](x)


def softmax(scores: Tensor) -> Tensor:
    powers = torch.exp(scores - scores.amax(dim=-1, keepdim=True).detach())
    return powers / powers.sum(dim=-1, keepdim=True)


def edge(sender: str, receiver: str, group: int = 0, groups: Groups | None = None) -> str:
    """An edge's name."""
    return f"{sender}->{receiver}" + ("" if groups is None else f"@{groups.names[group]}")


def by_sender(names: Sequence[str], outputs: Tensor) -> dict[str, Tensor]:
    """Outputs stacked in the order of names `(sender, batch, token, d_model)`, as a dictionary."""
    return dict(zip(names, outputs.double(), strict=True))

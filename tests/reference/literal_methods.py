"""Further scoring methods by their definitions, one edge at a time, on the literal split model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tests.reference.literal_scores import MetricFunction, References, gradients
from tests.reference.literal_vit import Groups, LiteralViT, softmax

Scores = dict[str, float]


# -- models with other derivatives ---------------------------------------------------------------


class RelevanceViT(LiteralViT):
    """RelP: norms with a constant scale, activations that multiply by a constant, halved gates."""

    def norm(self, module: nn.Module, stream: Tensor) -> Tensor:
        if isinstance(module, nn.Identity):
            return stream
        eps = torch.finfo(self.dtype).eps if module.eps is None else module.eps
        if isinstance(module, nn.LayerNorm):
            stream = stream - stream.mean(dim=-1, keepdim=True)
        normed = stream / (stream.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt().detach()
        normed = normed if module.weight is None else normed * self.tensor(module.weight)
        bias = getattr(module, "bias", None)
        return normed if bias is None else normed + self.tensor(bias)

    def activation(self, module: nn.Module, x: Tensor) -> Tensor:
        return x * (super().activation(module, x) / x).detach()

    def linear(self, module: nn.Module, x: Tensor) -> Tensor:
        value = super().linear(module, x)
        return (value + value.detach()) / 2 if module in self.gates() else value

    def gates(self) -> list[nn.Module]:
        """The layers whose outputs a gated MLP multiplies."""
        found = []
        for block in self.vit.blocks:
            parts = dict(block.mlp.named_children())
            found += [parts[name] for name in ("fc1_g", "fc1_x") if name in parts]
            found += [parts["fc1"]] if hasattr(block.mlp, "gate_last") else []
        return found


class InteractionViT(RelevanceViT):
    """GIM: as RelP but for activations, with a softer softmax and shared products."""

    def activation(self, module: nn.Module, x: Tensor) -> Tensor:
        return LiteralViT.activation(self, module, x)

    def mixed(self, block: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attention = block.attn
        query, key = self.norm(attention.q_norm, query), self.norm(attention.k_norm, key)
        shared = query / 4 + query.detach() * 3 / 4, key / 4 + key.detach() * 3 / 4
        value = value / 2 + value.detach() / 2
        pattern = SofterSoftmax.apply(shared[0] @ shared[1].transpose(1, 2) / attention.head_dim**0.5)
        return pattern @ value


class SofterSoftmax(torch.autograd.Function):
    """Softmax whose Jacobian is that of temperature 2."""

    @staticmethod
    def forward(ctx: object, scores: Tensor) -> Tensor:
        ctx.save_for_backward(scores)  # type: ignore[attr-defined]
        return softmax(scores)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        (scores,) = ctx.saved_tensors  # type: ignore[attr-defined]
        soft = softmax(scores / 2)
        return soft * (gradient - (gradient * soft).sum(dim=-1, keepdim=True))


# -- scores --------------------------------------------------------------------------------------


def ceap(
    model: LiteralViT,
    base: Tensor,
    reference: References,
    metric: MetricFunction,
    steps: int,
    groups: Groups | None = None,
) -> Scores:
    """Conductance: the senders' changes along the path, met with gradients at the middles of its steps."""
    start, end = model.run(base).outputs["input"], reference["input"]

    def at(place: float) -> Tensor:
        return (1 - place) * start + place * end

    scores = dict.fromkeys((name for *_, name in model.edges(groups)), 0.0)
    for step in range(steps):
        ends = [model.run(base, embedded=at((step + side) / steps)).outputs for side in (0, 1)]
        middle = at((step + 0.5) / steps)
        slopes = gradients(model, base, metric, set(model.receivers()), embedded=middle)
        for sender, receiver, group, name in model.edges(groups):
            change = ends[1][sender] - ends[0][sender]
            change = change if groups is None else change * groups.inside(group, len(base))
            scores[name] += float((change * slopes[receiver]).sum()) / len(base)
    return scores


def ifr(model: LiteralViT, base: Tensor, groups: Groups | None = None) -> Scores:
    """Shares of what each token of each receiver reads, averaged over tokens and images."""
    run = model.run(base)
    scores = {}
    for sender, receiver, group, name in model.edges(groups):
        stream = run.inputs[receiver]

        def near(other: str, stream: Tensor = stream) -> Tensor:
            size = stream.abs().sum(dim=-1) - (stream - run.outputs[other]).abs().sum(dim=-1)
            return size.clamp(min=0.0)

        total = sum(near(other) for other in model.senders_before(receiver))
        assert isinstance(total, Tensor)
        share = torch.where(total > 0, near(sender) / total, torch.zeros_like(total))
        inside = 1.0 if groups is None else groups.inside(group, len(base))[..., 0]
        scores[name] = float((share * inside).mean(dim=1).sum()) / len(base)
    return scores


def atp_qk(
    model: LiteralViT,
    base: Tensor,
    reference: References,
    metric: MetricFunction,
    groups: Groups | None = None,
    dropped: int | None = None,
) -> Scores:
    """EAP, but queries and keys take a step along their tangent and the pattern is computed anew.

    Args:
        model: the split model.
        base: images.
        reference: of every sender.
        metric: of logits.
        groups: of tokens.
        dropped: number of the layer through which no gradient flows.
    """
    outputs, inputs = model.run(base).outputs, model.run(base).inputs
    slopes, at_outputs = _slopes(model, base, metric, dropped)
    scores = {}
    for sender, receiver, group, name in model.edges(groups):
        change = reference[sender] - outputs[sender]
        change = (change if groups is None else change * groups.inside(group, len(base))).detach()
        node, _, port = receiver.partition("<")
        if port[:1] not in ("q", "k") or not port:
            scores[name] = float((change * slopes[receiver]).sum()) / len(base)
            continue
        layer, _, head = node[1:].partition(".h")
        block = model.vit.blocks[int(layer)]
        read = [model.read(block, int(head), i, inputs[f"{node}<{each}>"]) for i, each in enumerate("qkv")]
        place = "qk".index(port[0])

        def reader(stream: Tensor, block: nn.Module = block, head: int = int(head), i: int = place) -> Tensor:
            return model.read(block, head, i, stream)

        step = torch.autograd.functional.jvp(reader, inputs[receiver], change)[1]
        read[place] = read[place] + step
        answer = model.written(block, int(head), *read) - outputs[node]
        scores[name] = float((answer * at_outputs[node]).sum()) / len(base)
    return scores


def _slopes(
    model: LiteralViT, base: Tensor, metric: MetricFunction, dropped: int | None
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Gradients at what every receiver alone reads, and at what every node writes."""
    silent = model if dropped is None else SilentViT(model.vit, dropped)
    slopes = gradients(silent, base, metric, set(silent.receivers()))
    embedded = model.run(base).outputs["input"].requires_grad_()
    run = silent.run(base, embedded=embedded)
    names = list(run.outputs)
    found = torch.autograd.grad(
        metric(run.logits).sum(), [run.outputs[name] for name in names], materialize_grads=True
    )
    return slopes, dict(zip(names, found, strict=True))


class SilentViT(LiteralViT):
    """The same model, through one of whose layers no gradient flows."""

    def __init__(self, vit: nn.Module, dropped: int) -> None:
        super().__init__(vit)
        self.dropped = vit.blocks[dropped]

    def head(self, block: nn.Module, head: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        written = super().head(block, head, query, key, value)
        return written.detach().requires_grad_() if block is self.dropped else written

    def mlp(self, block: nn.Module, stream: Tensor) -> Tensor:
        written = super().mlp(block, stream)
        return written.detach().requires_grad_() if block is self.dropped else written

"""Edge scores by their definitions, one edge at a time, on the literal split model.

    EAP       sum over tokens of (r_u - x_u) . g_v,  g_v = d metric / d (what v alone reads), at the base run
    EAP-IG    the same with g_v averaged over points between the reference and the base input embedding
    exact     metric(this edge ablated) - metric(nothing ablated)

All are sums over images divided by the number of images. In the noising direction the base run is the clean
one; in the denoising direction it is the corrupt one and the reference outputs are the clean run's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from scipy.special import roots_legendre
from torch import Tensor

from tests.reference.literal_vit import Groups, Kept, LiteralViT

MetricFunction = Callable[[Tensor], Tensor]
"""Logits `(batch, class)` to one number for each image `(batch,)`."""

References = Mapping[str, Tensor]
"""For each sender, the output that replaces its own on ablated edges, `(batch, token, d_model)`."""


# -- references ----------------------------------------------------------------------------------


def patch_reference(model: LiteralViT, images: Tensor) -> dict[str, Tensor]:
    """The senders' outputs on the paired images."""
    return model.run(images).outputs


def zero_reference(model: LiteralViT, images: Tensor) -> dict[str, Tensor]:
    return {name: torch.zeros_like(output) for name, output in model.run(images).outputs.items()}


def mean_reference(
    model: LiteralViT, images: Tensor, averaged: Tensor, per_token: bool = True
) -> dict[str, Tensor]:
    """The mean output over the images `averaged`, one of them after the other, for each image of `images`."""
    sums: dict[str, Tensor] = {}
    for image in averaged:
        for name, output in model.run(image[None]).outputs.items():
            sums[name] = sums.get(name, 0.0) + output[0]
    means = {name: total / len(averaged) for name, total in sums.items()}
    if not per_token:
        means = {name: mean.mean(dim=0, keepdim=True).expand_as(mean) for name, mean in means.items()}
    return {name: mean.expand(len(images), -1, -1) for name, mean in means.items()}


# -- scores --------------------------------------------------------------------------------------


def eap(
    model: LiteralViT,
    base: Tensor,
    reference: References,
    metric: MetricFunction,
    groups: Groups | None = None,
    edges: Iterable[str] | None = None,
) -> dict[str, float]:
    """EAP scores by edge name."""
    outputs = model.run(base).outputs
    wanted = _chosen(model, groups, edges)
    slopes = gradients(model, base, metric, {receiver for _, receiver, _, _ in wanted})
    return {
        name: _product(
            reference[sender] - outputs[sender], slopes[receiver], model.groups_at(receiver, groups), group
        )
        / len(base)
        for sender, receiver, group, name in wanted
    }


def eap_ig(
    model: LiteralViT,
    base: Tensor,
    reference: References,
    metric: MetricFunction,
    steps: int,
    rule: str,
    groups: Groups | None = None,
) -> dict[str, float]:
    """EAP-IG scores by edge name; the rule is "midpoint", "gauss-legendre" or "left"."""
    outputs = model.run(base).outputs
    edges = model.edges(groups)
    scores = dict.fromkeys((name for _, _, _, name in edges), 0.0)
    for place, weight in path(steps, rule):
        between = (1 - place) * reference["input"] + place * outputs["input"]
        slopes = gradients(model, base, metric, set(model.receivers()), embedded=between)
        for sender, receiver, group, name in edges:
            product = _product(
                reference[sender] - outputs[sender],
                slopes[receiver],
                model.groups_at(receiver, groups),
                group,
            )
            scores[name] += weight * product / len(base)
    return scores


def exact(
    model: LiteralViT,
    base: Tensor,
    reference: References,
    metric: MetricFunction,
    groups: Groups | None = None,
    edges: Iterable[str] | None = None,
) -> dict[str, float]:
    """Exact effects by edge name, from a full run for each edge."""
    scores = {}
    with torch.no_grad():
        run = model.run(base)
        whole, embedded = metric(run.logits), run.outputs["input"]
        for _, _, _, name in _chosen(model, groups, edges):
            without = model.run(
                base, reference, lambda other, name=name: other != name, groups, embedded=embedded
            )
            scores[name] = float((metric(without.logits) - whole).sum()) / len(base)
    return scores


def local(
    model: LiteralViT,
    base: Tensor,
    reference: References,
    metric: MetricFunction,
    groups: Groups | None = None,
    edges: Iterable[str] | None = None,
) -> dict[str, float]:
    """Locally exact scores by edge name: the receiver's node runs anew, its change meets its gradient."""
    embedded = model.run(base).outputs["input"].requires_grad_()
    run = model.run(base, embedded=embedded)
    whole = metric(run.logits)
    nodes = list(run.outputs)
    found = torch.autograd.grad(whole.sum(), [run.outputs[node] for node in nodes], materialize_grads=True)
    slopes = dict(zip(nodes, found, strict=True))
    scores = {}
    with torch.no_grad():
        for sender, receiver, group, name in _chosen(model, groups, edges):
            difference = reference[sender] - run.outputs[sender]
            mine = model.groups_at(receiver, groups)
            if mine is not None:
                difference = difference * mine.inside(group, len(base))
            inputs = run.inputs | {receiver: run.inputs[receiver] + difference}
            if receiver == "logits":
                effect = metric(model.readout(inputs["logits"])) - whole
            else:
                answers = model.fed(receiver, inputs)
                effect = sum(((own - run.outputs[u]) * slopes[u]).sum() for u, own in answers.items())
            scores[name] = float(torch.as_tensor(effect).sum()) / len(base)
    return scores


# -- parts ---------------------------------------------------------------------------------------


def gradients(
    model: LiteralViT,
    base: Tensor,
    metric: MetricFunction,
    receivers: set[str],
    embedded: Tensor | None = None,
) -> dict[str, Tensor]:
    """How the metric answers to a push on what one receiver alone reads, `(batch, token, d_model)` by name.

    Each receiver gets a leaf of its own, zero, that is added to its input and to nobody else's.
    """
    inputs = model.run(base).inputs
    names = [receiver for receiver in model.receivers() if receiver in receivers]
    taps = {name: torch.zeros_like(inputs[name], requires_grad=True) for name in names}
    logits = model.run(base, embedded=embedded, taps=taps).logits
    found = torch.autograd.grad(metric(logits).sum(), list(taps.values()), materialize_grads=True)
    return dict(zip(names, found, strict=True))


def slopes(
    model: LiteralViT,
    base: Tensor,
    reference: References,
    metric: MetricFunction,
    kept: Kept,
    groups: Groups | None = None,
) -> dict[str, float]:
    """By edge name, how the metric moves with the edge's gate in a run in which some edges are kept."""
    run = model.run(base, reference, kept, groups)
    taps = {name: torch.zeros_like(heard).requires_grad_() for name, heard in run.inputs.items()}
    value = metric(model.run(base, reference, kept, groups, taps=taps).logits).sum()
    found = torch.autograd.grad(value, list(taps.values()), materialize_grads=True)
    by_receiver = dict(zip(taps, found, strict=True))
    return {
        name: _product(
            run.outputs[sender] - reference[sender],
            by_receiver[receiver],
            model.groups_at(receiver, groups),
            group,
        )
        / len(base)
        for sender, receiver, group, name in model.edges(groups)
    }


def path(steps: int, rule: str) -> list[tuple[float, float]]:
    """Places between the reference (0) and the base (1) input embedding, and their weights."""
    if rule == "midpoint":
        return [((step + 0.5) / steps, 1 / steps) for step in range(steps)]
    if rule == "left":
        return [(step / steps, 1 / steps) for step in range(steps)]
    if rule == "gauss-legendre":
        return [((point + 1) / 2, weight / 2) for point, weight in zip(*roots_legendre(steps), strict=True)]
    raise ValueError(rule)


def _product(difference: Tensor, slope: Tensor, groups: Groups | None, group: int) -> float:
    if groups is not None:
        difference = difference * groups.inside(group, len(difference))
    total = 0.0
    for image in range(len(difference)):
        total += float((difference[image] * slope[image]).sum())
    return total


def _chosen(
    model: LiteralViT, groups: Groups | None, edges: Iterable[str] | None
) -> list[tuple[str, str, int, str]]:
    wanted = None if edges is None else set(edges)
    return [each for each in model.edges(groups) if wanted is None or each[3] in wanted]

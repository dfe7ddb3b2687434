"""ACDC as it is described, without a shortcut: every test is a full run of the literal split model.

Start with every edge. Take receivers from the last to the first; for each, its senders from the last to the
first; for each, its token groups from the last to the first. Ablate the edge: if the divergence from the
clean run rises by less than tau, it stays ablated and the divergence is now that; else it comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tests.reference.literal_vit import Groups, LiteralViT, edge

Divergence = Callable[[Tensor, Tensor], Tensor]
"""Clean and current logits `(batch, class)` to one number for each image `(batch,)`."""


def kl(clean: Tensor, current: Tensor) -> Tensor:
    """KL(clean || current), in nats, summed class by class."""
    log_clean = clean - torch.logsumexp(clean, dim=-1, keepdim=True)
    log_current = current - torch.logsumexp(current, dim=-1, keepdim=True)
    total = torch.zeros(len(clean), dtype=clean.dtype)
    for label in range(clean.shape[1]):
        total = total + torch.exp(log_clean[:, label]) * (log_clean[:, label] - log_current[:, label])
    return total


def metric_difference(metric: Callable[[Tensor], Tensor]) -> Divergence:
    """The absolute difference of a metric."""
    return lambda clean, current: (metric(current) - metric(clean)).abs()


def acdc(
    model: LiteralViT,
    clean: Tensor,
    reference: Mapping[str, Tensor],
    tau: float,
    divergence: Divergence,
    groups: Groups | None = None,
) -> dict[str, bool]:
    """Every edge's name and whether it is kept, before dead edges are pruned."""
    kept = {name: True for _, _, _, name in model.edges(groups)}
    whole = model.run(clean).logits
    current = 0.0
    for receiver in reversed(model.receivers()):
        for sender in reversed(model.senders_before(receiver)):
            mine = model.groups_at(receiver, groups)
            for group in reversed(range(1 if mine is None else len(mine.names))):
                name = edge(sender, receiver, group, mine)
                kept[name] = False
                logits = model.run(clean, reference, kept, groups).logits
                distance = float(divergence(whole, logits).sum()) / len(clean)
                if distance - current < tau:
                    current = distance
                else:
                    kept[name] = True
    return kept


def pruned(
    model: LiteralViT, kept: Mapping[str, bool], groups: Groups | None = None, deaf_is_inert: bool = True
) -> set[str]:
    """The kept edges that do something: on a path from the input to the logits, found by walking both ways.

    With `deaf_is_inert` false, edges of senders that hear nothing of the input count too: under ablations
    whose references come from no run such senders do not write their reference.

    A state is a sender at the tokens of one group. An edge leads from the sender's state to the receiver's
    node: at the same group if the receiver is a query or an MLP, which keep tokens apart, and at every group
    if it is a key or a value. The logits hear every group.
    """
    count = 1 if groups is None else len(groups.names)
    steps: list[tuple[str, tuple[str, int], list[tuple[str, int]]]] = []
    for sender, receiver, group, name in model.edges(groups):
        if kept[name]:
            node = receiver.partition("<")[0]
            mixes = receiver.endswith(("<k>", "<v>"))
            steps.append((name, (sender, group), [(node, to) for to in (range(count) if mixes else [group])]))
    heard = _closure({("input", group) for group in range(count)}, [(a, b) for _, a, b in steps])
    backwards = [(b, [a]) for _, a, targets in steps for b in targets]
    leads = _closure({("logits", group) for group in range(count)}, backwards)
    return {
        name
        for name, source, targets in steps
        if (source in heard or not deaf_is_inert) and leads & set(targets)
    }


def _closure(
    start: set[tuple[str, int]], steps: list[tuple[tuple[str, int], list[tuple[str, int]]]]
) -> set[tuple[str, int]]:
    """Everything that steps lead to from the start."""
    reached, grown = set(start), True
    while grown:
        before = len(reached)
        for source, targets in steps:
            if source in reached:
                reached.update(targets)
        grown = len(reached) > before
    return reached

"""Every sender's change times every receiver's gradient, summed over images and tokens.

Both sides come as narrow factors. A few tokens at a time are expanded, few enough for all to stay in the
processor's cache, and contracted at once: neither the changes nor the gradients ever exist as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from torch import Tensor

from circuitvit.graph import Graph, is_residual
from circuitvit.models import Factored

ROW = 3 * 2**14
"""Entries of a row that are expanded together: enough to feed a matrix product, few enough for a cache."""

TOGETHER = 2
"""Layers whose receivers make one matrix product: more are wider, but meet senders that come after them."""


def add_products(
    total: Tensor,
    graph: Graph,
    changes: Sequence[Factored],
    slopes: Sequence[Factored],
    members: Tensor | None,
) -> None:
    """Add `sum over images and tokens of change_u . g_v` to `total` `(sender, receiver, group)`, in place.

    Pairs that are no edges are given something as well, which is to be left out.

    Args:
        total: in float64.
        graph: with the token groups.
        changes: of the senders, for every stage but the readout.
        slopes: the gradients at the receivers, for every stage but the source.
        members: token group of each token, `(token,)` or `(batch, token)`; None for one group.
    """
    for blocks in _same_tokens(graph, slopes):
        first, last = blocks[0][0], blocks[-1][-1]
        _, batch, tokens, _ = slopes[first - 1].shape
        writing = [
            stage for stage in range(last) if graph.stages[stage].writes_to == graph.stages[first].reads_from
        ]
        inside = members_at(graph, first, members, tokens)
        for group, places in _by_group(len(graph.groups), inside, batch, tokens):
            written = [changes[stage].at(tokens, places) for stage in writing]
            read = [[slopes[stage - 1].at(tokens, places) for stage in block] for block in blocks]
            _add(total[..., group], graph, blocks, written, read)


def members_at(graph: Graph, stage: int, members: Tensor | None, tokens: int) -> Tensor | None:
    """The token group of each token that a stage reads.

    Args:
        graph: with the token groups.
        stage: its number.
        members: of the tokens of the residual stream, `(token,)` or `(batch, token)`; None for one group.
        tokens: how many of the first tokens are meant.
    """
    part = graph.stages[stage].reads_from
    if members is None or is_residual(part):
        return members if members is None else members[..., :tokens]
    return members.new_full((tokens,), graph.groups.index(part))


def _add(
    total: Tensor,
    graph: Graph,
    blocks: Sequence[range],
    written: Sequence[Factored],
    read: Sequence[Sequence[Factored]],
) -> None:
    """The products at one list of places."""
    count, width = written[0].shape[1:]
    senders, widest = _rows(written), max(map(_rows, read))
    like = written[0].narrow
    size = count if like.is_cuda else min(count, max(1, ROW // width))
    rooms = like.new_empty(senders * size * width), like.new_empty(widest * size * width)
    for start in range(0, count, size):
        end = min(start + size, count)
        change = _expanded(written, start, end, rooms[0])
        for block, parts in zip(blocks, read, strict=True):
            upstream = graph.upstream[block[-1]]
            first, last = graph.receiver_slices[block[0]], graph.receiver_slices[block[-1]]
            slope = _expanded(parts, start, end, rooms[1])
            heard = change[: upstream.stop - upstream.start]
            total[upstream, first.start : last.stop] += (slope @ heard.t()).t()


def _rows(parts: Sequence[Factored]) -> int:
    return sum(part.shape[0] for part in parts)


def _expanded(parts: Sequence[Factored], start: int, end: int, room: Tensor) -> Tensor:
    """All rows of the parts at some places, `(row, place * d_model)`."""
    count, size = _rows(parts), (end - start) * parts[0].shape[-1]
    out, done = room[: count * size].view(count, end - start, -1), 0
    for part in parts:
        part.between(start, end).expand(out[done : done + part.shape[0]])
        done += part.shape[0]
    return out.flatten(1)


def _same_tokens(graph: Graph, slopes: Sequence[Factored]) -> Iterator[list[range]]:
    """Consecutive stages that read one part of the stream, in one shape, in blocks of a few layers."""
    numbers = range(1, len(slopes) + 1)

    def read(stage: int) -> tuple[object, ...]:
        return graph.stages[stage].reads_from, slopes[stage - 1].shape[1:]

    for _, stages in groupby(numbers, key=read):
        layers = groupby(stages, key=lambda stage: graph.stages[stage].layer // TOGETHER)
        found = [list(layer) for _, layer in layers]
        yield [range(block[0], block[-1] + 1) for block in found]


def _by_group(
    count: int, members: Tensor | None, batch: int, tokens: int
) -> Iterator[tuple[int, Tensor | None]]:
    """Each token group that has any token, and its places in the list of all images' first tokens."""
    if members is None:
        yield 0, None
        return
    listed = members.expand(batch, tokens).flatten()
    for group in range(count):
        places = (listed == group).nonzero().flatten()
        if len(places):
            yield group, places

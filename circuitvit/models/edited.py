"""Stages with changes: one around a stage, and one for the stream itself."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitvit.errors import UnsupportedModelError
from circuitvit.graph import StageNodes
from circuitvit.models.changes import Change
from circuitvit.models.factored import Factored
from circuitvit.models.rules import BackwardRules
from circuitvit.models.sites import LOOKS, heads_of
from circuitvit.models.stages import Content, Reads, Stage


class EditedStage(Stage):
    """A stage some of whose sites are changed, and after which something may be added to the stream.

    Reads are those of the stage as it is. Where an output is changed, all outputs of the stage are written as
    wide as the stream, `(batch, sender, token, d_model)`.

    Args:
        inner: the stage.
        changes: of its sites, in order.
        added: what is added to the stream after it, whatever is there: changes with a `constant`.
    """

    def __init__(self, inner: Stage, changes: Sequence[Change], added: Sequence[Change] = ()) -> None:
        self.inner, self.changes, self.added = inner, tuple(changes), tuple(added)
        self.is_wide = any(change.site.kind == "output" for change in self.changes)
        self._sent, self._is_whole = list(range(len(inner.nodes.senders))), True
        self._left: int | None = None  # tokens in the stream, where an earlier stage has cut it

    @property
    def nodes(self) -> StageNodes:  # type: ignore[override]
        return self.inner.nodes

    def _of(self, *kinds: str) -> list[Change]:
        return [change for change in self.changes if change.site.kind in kinds]

    @property
    def n_reads(self) -> int:
        return self.inner.n_reads

    # -- reading and writing -------------------------------------------------------------------------

    def read(self, stream: Tensor) -> Reads:
        return self.inner.read(stream)

    def read_each(self, streams: Tensor, source: Sequence[int], known: Reads = ()) -> Reads:
        return self.inner.read_each(streams, source, known)

    def pull_back(self, stream: Tensor, reads: Reads, d_reads: Reads) -> Factored:
        return self.inner.pull_back(stream, reads, d_reads)

    def write(self, reads: Reads) -> Tensor:
        pieces = zip(self.inner.branches, self.inner.split_reads(reads), strict=True)
        compact = self.inner.join([self._written(part, own) for part, own in pieces])
        if self.is_readout:
            for change in self._of("logits"):
                compact = change(compact)
            return compact
        return self._widened(compact)

    def _written(self, part: Stage, reads: Reads) -> Tensor:
        """What an attention or an MLP writes, in its own form, with what is changed inside of it."""
        mine, reads = self._inside(part), self._seen(part, reads)
        if any(change.site.kind in LOOKS for change in mine):
            written = part.attend(reads, self._pattern(part, reads))
        elif hidden := [change for change in mine if change.site.kind == "hidden"]:
            written = part.from_hidden(_changed(part.hidden(reads), hidden))
        else:
            written = part.write(reads)
        return self._remixed(part, written)

    def _inside(self, part: Stage) -> list[Change]:
        """The changes of this attention or MLP, other than of outputs."""
        nodes = {*part.nodes.senders, *heads_of(part)}
        return [
            change for change in self.changes if change.site.node in nodes and change.site.kind != "output"
        ]

    def _seen(self, part: Stage, reads: Reads) -> Reads:
        """What the receivers are taken to have read."""
        changes = [change for change in self._inside(part) if change.site.kind == "read"]
        if not changes:
            return reads
        receivers, heads = part.nodes.receivers, len(part.nodes.receivers) // len(reads)
        found = [list(read.unbind(1)) for read in reads]
        for change in changes:
            port, head = divmod(receivers.index(change.site.name), heads)
            found[port][head] = change(found[port][head])
        return tuple(torch.stack(each, dim=1) for each in found)

    def _scores(self, part: Stage, reads: Reads) -> Tensor:
        changes = [change for change in self._inside(part) if change.site.kind == "scores"]
        scores = part.scores(reads)
        unseen = scores == -torch.inf  # as what a pool skips
        return _by_head(part, scores, changes).masked_fill(unseen, -torch.inf)

    def _pattern(self, part: Stage, reads: Reads) -> Tensor:
        mine = self._inside(part)
        if any(change.site.kind == "scores" for change in mine):
            scores = self._scores(part, reads)
            nowhere = (scores == -torch.inf).all(dim=-1, keepdim=True)
            pattern = scores.masked_fill(nowhere, 0.0).softmax(dim=-1).masked_fill(nowhere, 0.0)
        else:
            pattern = part.pattern(reads)
        return _by_head(part, pattern, [change for change in mine if change.site.kind == "pattern"])

    def _remixed(self, part: Stage, written: Tensor) -> Tensor:
        """What is written, with the changes of z."""
        changes = [change for change in self._inside(part) if change.site.kind == "z"]
        if not changes:
            return written
        senders = list(part.nodes.senders)  # of heads in pieces others than those that it computes with
        return _by_name(senders if len(senders) == written.shape[1] else heads_of(part), written, changes)

    def _widened(self, compact: Tensor) -> Tensor:
        """What is written, with the changes of outputs."""
        if not self.is_wide:
            return compact
        outputs = list(self.inner.expand(compact).unbind(0))
        for change in self._of("output"):
            if change.site.node in self.nodes.senders:
                place = self.nodes.senders.index(change.site.node)
                outputs[place] = change(outputs[place])
        return torch.stack(outputs, dim=1)

    @property
    def constant(self) -> Tensor | None:
        own, added = self.inner.constant, self._cut_added
        if own is None or added is None:
            return own if added is None else added
        return own + added

    @property
    def _cut_added(self) -> Tensor | None:
        """What is added after the stage, at the tokens that it leaves in the stream."""
        found = None  # made anew, as directions may be learned
        for change in self.added:
            own = change.constant
            assert own is not None, "said by whoever made it"
            own = own if own.ndim == 1 else own[: self.cut or self._left]
            found = own if found is None else found + own.to(found)
        return found

    def total(self, compact: Tensor) -> Tensor:
        total = self._own_total(compact)
        added = self._cut_added
        return total if added is None else total + added.to(total)

    def _own_total(self, compact: Tensor) -> Tensor:
        if not self.is_wide:
            return self.inner.total(compact)
        total, constant = compact.sum(dim=1), self.inner.constant if self._is_whole else None
        return total if constant is None else total + constant

    def add(self, stream: Tensor, compact: Tensor) -> Tensor:
        if self.is_wide:
            own = self._own_total(compact)
            after = own if self.nodes.begins else stream[:, : self.cut] + own
        else:
            after = self.inner.add(stream, compact)
        added = self._cut_added
        return after if added is None else after + added.to(after)

    def factored(self, compact: Tensor) -> Factored:
        return Factored(compact.transpose(0, 1)) if self.is_wide else self.inner.factored(compact)

    # -- looking inside ------------------------------------------------------------------------------

    @property
    def branches(self) -> tuple[Stage, ...]:
        parts = self.inner.branches
        if len(parts) == 1:
            return (self,)
        return tuple(self._around(part) for part in parts)

    def _around(self, part: Stage) -> EditedStage:
        """A branch, as wide as the whole."""
        edited = EditedStage(part, self.changes)
        edited.is_wide = self.is_wide
        return edited

    def split(self, compact: Tensor) -> tuple[Tensor, ...]:
        if len(self.inner.branches) == 1:
            return (compact,)
        if not self.is_wide:
            return self.inner.split(compact)
        return torch.split(compact, [len(part.nodes.senders) for part in self.inner.branches], dim=1)

    def split_reads(self, reads: Reads) -> tuple[Reads, ...]:
        return self.inner.split_reads(reads)

    def join(self, written: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(written), dim=1) if self.is_wide else self.inner.join(written)

    def seen(self, reads: Reads) -> Reads:
        return self._seen(self.inner, reads)

    def scores(self, reads: Reads) -> Float[Tensor, "batch head query key"]:
        return self._scores(self.inner, self.seen(reads))

    def pattern(self, reads: Reads) -> Float[Tensor, "batch head query key"]:
        return self._pattern(self.inner, self.seen(reads))

    def attend(self, reads: Reads, pattern: Tensor) -> Tensor:
        return self._widened(self._remixed(self.inner, self.inner.attend(self.seen(reads), pattern)))

    def gain(self, reads: Reads) -> tuple[Tensor, Tensor] | None:
        if any(change.site.kind in ("z", "output") for change in self.changes):
            raise UnsupportedModelError(
                f"what heads of {self.nodes.name} write is edited: it is no sum over what they attend to"
            )
        return self.inner.gain(self.seen(reads))

    def carried(self, reads: Reads) -> Tensor:
        alone = self.inner.carried(self.seen(reads))
        return self.inner.expand(alone).transpose(0, 1) if self.is_wide else alone

    def direction(self, sender: str) -> Float[Tensor, " d_model"] | None:
        return self.inner.direction(sender)

    def sources(self, sender: str) -> Bool[Tensor, " token"] | Bool[Tensor, "image token"] | None:
        return self.inner.sources(sender)

    def mixed(self, reads: Reads, compact: Tensor) -> Tensor:
        return self.inner.mixed(reads, self._written(self.inner, reads) if self.is_wide else compact)

    def hidden(self, reads: Reads) -> Tensor:
        changes = [change for change in self.changes if change.site.kind == "hidden"]
        return _changed(self.inner.hidden(self.seen(reads)), changes)

    def affine(self, stream: Tensor, of: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if self._of("logits"):
            raise UnsupportedModelError("the logits are edited: the readout cannot be made linear")
        return self.inner.affine(stream, of)

    # -- the same, but for something -----------------------------------------------------------------

    def _like(self, inner: Stage, *, added: Sequence[Change]) -> EditedStage:
        twin = copy.copy(self)
        twin.inner, twin.added = inner, tuple(added)
        return twin

    def restrict(self, senders: Sequence[int]) -> EditedStage:
        if list(senders) == list(range(len(self.nodes.senders))):
            return self
        twin = self._like(self.inner.restrict(senders), added=())
        twin._sent, twin._is_whole = [self._sent[sender] for sender in senders], False
        return twin

    def pick(self, reads: Reads) -> Reads:
        if self.is_wide and len(reads) == 1:  # what was written; an MLP's read is its own in any case
            return (reads[0][:, self._sent],) if reads[0].ndim == 4 else reads
        return self.inner.pick(reads)

    def leading(self, tokens: int) -> Stage:
        cut = self.inner.leading(tokens)
        if cut is self.inner and not self.added:
            return self
        twin = self._like(cut, added=self.added)
        twin._left = None if any(self.nodes.mixes or ()) else tokens  # it reads what was left before
        return twin

    @property
    def cut(self) -> int | None:
        return self.inner.cut

    @property
    def tokens(self) -> int | None:
        """Of a readout, how many of the first tokens it reads."""
        tokens: int | None = getattr(self.inner, "tokens", None)
        return tokens

    def with_rules(self, rules: BackwardRules) -> EditedStage:
        if self._of(*LOOKS, "hidden"):
            raise UnsupportedModelError(
                f"{self.nodes.name} has edited scores, patterns or neurons, for which no backward rules are "
                "known: use a method without, such as 'eap' or 'local'"
            )
        return self._like(self.inner.with_rules(rules), added=self.added)

    def answers(
        self, reads: Reads, others: Reads, d_reads: Reads, d_compact: Tensor
    ) -> Float[Tensor, "receiver candidate batch"]:
        """The literal ones: the whole stage is run for each receiver."""
        if len(self.nodes.receivers) == 1:
            return super().answers(reads, others, d_reads, d_compact)
        count, base, found = len(others[0]), self.write(reads), []
        same = [read.expand(count, *read.shape).flatten(0, 1) for read in reads]
        moved = tuple(other.flatten(0, 1) for other in others)
        for receiver in range(len(self.nodes.receivers)):
            given = self.exchanged(tuple(same), moved, receiver)
            written = self.write(given).view(count, *base.shape)
            found.append(((written - base) * d_compact).flatten(2).sum(dim=-1))
        return torch.stack(found)

    def exchanged(self, reads: Reads, others: Reads, receiver: int) -> Reads:
        return self.inner.exchanged(reads, others, receiver)

    def contents(self) -> tuple[Content, ...]:
        return self.inner.contents()

    def forget(self) -> None:
        self.inner.forget()


def _changed(x: Tensor, changes: Iterable[Change]) -> Tensor:
    for change in changes:
        x = change(x)
    return x


def _by_head(part: Stage, values: Tensor, changes: Sequence[Change]) -> Tensor:
    """Values `(image, head, ...)` with the changes of some heads."""
    return _by_name(heads_of(part), values, changes) if changes else values


def _by_name(heads: Sequence[str], values: Tensor, changes: Sequence[Change]) -> Tensor:
    each = list(values.unbind(1))
    for change in changes:
        if change.site.node in heads:
            place = heads.index(change.site.node)
            each[place] = change(each[place])
    return torch.stack(each, dim=1)


class StreamEdit(Stage):
    """A change of the stream itself, as a node that reads it and writes what changes.

    Args:
        changes: of one stream, in order.
        like: the nodes of the stage that reads the stream next.
    """

    def __init__(self, changes: Sequence[Change], like: StageNodes) -> None:
        self.changes = tuple(changes)
        name, part = f"{changes[0].site.name}.edit", like.reads_from
        self.nodes = StageNodes(name, "edit", like.layer, (name,), (name,), reads_from=part, writes_to=part)

    def read(self, stream: Tensor) -> Reads:
        return (stream,)

    def read_each(self, streams: Tensor, source: Sequence[int], known: Reads = ()) -> Reads:
        return (streams[source[0]],) if source[0] >= 0 else known

    def write(self, reads: Reads) -> Float[Tensor, "batch token d_model"]:
        return _changed(reads[0], self.changes) - reads[0]

    def total(self, compact: Tensor) -> Tensor:
        return compact

    def factored(self, compact: Tensor) -> Factored:
        return Factored(compact[None])

    def pull_back(self, stream: Tensor, reads: Reads, d_reads: Reads) -> Factored:
        return Factored(d_reads[0][None])

    def with_rules(self, rules: BackwardRules) -> StreamEdit:
        return self

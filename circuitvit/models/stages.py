"""The stage: the one contract between a model family and everything else in this library.

A Vision Transformer is a list of stages. Each stage reads the residual stream `(batch, token, d_model)`
at one position and adds to it. Inside a stage there are *receivers*, which read (the query input of a head,
an MLP), and *senders*, which write (a head, an MLP). The graph's edges, the engine that runs masked models,
every scoring method, ablation and diagram follow from the list of stages alone; an adapter for a new model
family only has to say what its stages are. `docs/architecture.md` shows how unusual parts are said with it.

A stage's work is cut in three so that the fast paths stay open:

    read(stream) -> reads            norm and projections; `reads` are what gradients are tapped at
    write(reads) -> compact          attention or MLP; `compact` is the cheapest form of the senders' outputs
    total(compact) -> stream-shaped  what the stage adds to the stream

`stream + total(write(read(stream)))` is the model's own layer. `read_each` is `read` with a separate stream
for each receiver (the masked run), `expand` tells the senders' outputs apart, and `pull_back` turns gradients
at the reads into gradients at each receiver's stream (attribution).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from circuitvit.errors import UnsupportedModelError
from circuitvit.graph import StageNodes
from circuitvit.models.factored import Factored
from circuitvit.models.parts import Linear, Norm
from circuitvit.models.rules import BackwardRules

Reads = tuple[Tensor, ...]
"""What a stage's receivers have read: raw queries, keys and values, or the normed input of an MLP.

Each tensor has the batch as its first dimension.
"""


Content = Norm | Linear | nn.Module | Tensor | None
"""What holds weights: a tensor is a factor."""


def repeated(reads: Reads, count: int) -> Reads:
    """The reads of the same images `count` times over, for as many candidates."""
    return tuple(  # of a single image no copies are made
        read.expand(count, *read.shape[1:]) if len(read) == 1 else read.repeat(count, *(1,) * (read.ndim - 1))
        for read in reads
    )


def places(numbers: Sequence[int]) -> slice | list[int]:
    """Places to index with: a slice, which copies nothing, where they follow each other."""
    first, last = numbers[0], numbers[-1]
    follow = list(numbers) == list(range(first, last + 1))
    return slice(first, last + 1) if follow else list(numbers)


def through(stages: Sequence[Stage], stream: Tensor) -> Tensor:
    """The stream `(batch, token, d_model)` after these stages, run plainly; of a readout the logits."""
    for stage in stages:
        written = stage.write(stage.read(stream))
        stream = written if stage.is_readout else stage.add(stream, written)
    return stream


class Stage(ABC):
    """Receivers that read the residual stream at one position, and senders that add to it there.

    A source (the embedding) has senders only: its `read` takes images. A readout has receivers only: its
    `write` gives the logits.

    Attributes:
        nodes: the names of the senders and receivers, in the order of every stacked tensor here.
    """

    nodes: StageNodes

    @property
    def constant(self) -> Float[Tensor, " d_model"] | Float[Tensor, "token d_model"] | None:
        """What the stage adds that no sender owns, such as the attention output bias: to every token, or to
        each its own.
        """
        return None

    @abstractmethod
    def read(self, stream: Float[Tensor, "batch token d_model"]) -> Reads:
        """What all receivers read from one shared stream: the model's own norm and projections."""

    @abstractmethod
    def read_each(
        self,
        streams: Float[Tensor, "stream batch token d_model"],
        source: Sequence[int],
        known: Reads = (),
    ) -> Reads:
        """What the receivers read when receiver `i` sees `streams[source[i]]`.

        Args:
            streams: what is seen.
            source: for each receiver the number of its stream; -1 for one that reads what is `known`.
            known: reads of all receivers, looked at where the source is -1; without it, what is given for
                those means nothing.
        """

    @abstractmethod
    def write(self, reads: Reads) -> Tensor:
        """The senders' outputs in their narrowest form: heads before `W_O`, the MLP's output, logits."""

    @abstractmethod
    def total(self, compact: Tensor) -> Float[Tensor, "batch token d_model"]:
        """What the stage adds to the stream: the sum of all senders' outputs, and the constant."""

    def add(self, stream: Float[Tensor, "batch token d_model"], compact: Tensor) -> Tensor:
        """The stream after the stage, `(batch, token, d_model)`: what the next one reads."""
        return stream + self.total(compact)

    @abstractmethod
    def factored(self, compact: Tensor) -> Factored:
        """Each sender's own output, linear in `compact`; with the constant they sum to `total(compact)`."""

    def expand(
        self, compact: Tensor, out: Tensor | None = None
    ) -> Float[Tensor, "sender batch token d_model"]:
        """Each sender's own output.

        Args:
            compact: from `write`.
            out: room for the result, which is then written there and returned.
        """
        return self.factored(compact).expand(out)

    def pull_back(
        self, stream: Float[Tensor, "batch token d_model"], reads: Reads, d_reads: Reads
    ) -> Factored:
        """The gradient at each receiver's own input, from the gradient at the reads.

        This literal version differentiates `read_each` with a copy of the stream for every receiver;
        adapters override it with the closed form of their norm and projections.

        Args:
            stream: what all receivers read.
            reads: `read(stream)`.
            d_reads: gradients of a scalar with respect to `reads`.
        """
        n_receivers = len(self.nodes.receivers)
        streams = stream.detach().expand(n_receivers, *stream.shape).clone().requires_grad_()
        with torch.enable_grad():
            each = self.read_each(streams, range(n_receivers))
        (gradient,) = torch.autograd.grad(each, streams, d_reads)
        return Factored(gradient)

    def local_effects(
        self,
        reads: Reads,
        d_reads: Reads,
        d_compact: Tensor,
        stream: Float[Tensor, "batch token d_model"],
        streams: Float[Tensor, "candidate batch token d_model"],
    ) -> Float[Tensor, "receiver candidate batch"]:
        """How far the stage's output moves along a gradient when one receiver alone reads another stream.

        For receiver `v` and candidate `c` that is `d_compact . (write(reads with v's own from streams[c]) -
        write(reads))`, nothing linearised: norm, softmax and activation are computed anew. This literal
        version runs the whole stage for each receiver; adapters override it to share what does not change.

        Args:
            reads: `read(stream)`.
            d_reads: the gradient at `reads`, for parts that are linear in what they read.
            d_compact: the gradient at `write(reads)`.
            stream: what all receivers read.
            streams: what one of them reads instead.
        """
        base, n_receivers = self.write(reads), len(self.nodes.receivers)
        both = torch.stack([stream.expand_as(streams).flatten(0, 1), streams.flatten(0, 1)])
        effects = []
        for receiver in range(n_receivers):
            source = [int(other == receiver) for other in range(n_receivers)]
            compact = self.write(self.read_each(both, source))
            change = compact.view(*streams.shape[:2], *compact.shape[1:]) - base
            effects.append((change * d_compact).flatten(2).sum(dim=-1))
        return torch.stack(effects)

    def answers(
        self, reads: Reads, others: Reads, d_reads: Reads, d_compact: Tensor
    ) -> Float[Tensor, "receiver candidate batch"]:
        """How far the output moves along a gradient when one of the reads alone is replaced, head by head.

        This literal version is for stages with one receiver.

        Args:
            reads: of the base run.
            others: what is read instead, each with a first dimension for the candidates.
            d_reads: the gradient at `reads`.
            d_compact: the gradient at `write(reads)`.
        """
        if len(self.nodes.receivers) != 1:
            raise NotImplementedError(f"{type(self).__name__} does not tell its receivers' answers apart")
        written = self.write(tuple(other.flatten(0, 1) for other in others))
        change = written.view(len(others[0]), *d_compact.shape) - self.write(reads)
        return (change * d_compact).flatten(2).sum(dim=-1)[None]

    def exchanged(self, reads: Reads, others: Reads, receiver: int) -> Reads:
        """The reads when one receiver, by its number, alone reads what is in others.

        This version is for stages with one receiver.
        """
        return others

    def scores(self, reads: Reads) -> Float[Tensor, "batch head query key"]:
        """What the softmax is taken of, in nats: scaled products of queries and keys, and what is added to
        them.

        Raises:
            UnsupportedModelError: if the stage is not attention.
        """
        raise UnsupportedModelError(f"{self.nodes.name} is not attention: it has no scores and no pattern")

    def pattern(self, reads: Reads) -> Float[Tensor, "batch head query key"]:
        """Where each head attends, for each query; rows sum to 1.

        Raises:
            UnsupportedModelError: if the stage is not attention.
        """
        return self.scores(reads).softmax(dim=-1)

    def attend(self, reads: Reads, pattern: Float[Tensor, "batch head query key"]) -> Tensor:
        """What the heads would write if they attended by this pattern, in the form of `write`.

        Raises:
            UnsupportedModelError: if the stage is not attention.
        """
        raise UnsupportedModelError(f"{self.nodes.name} is not attention: it has no scores and no pattern")

    def gain(self, reads: Reads) -> tuple[Tensor, Tensor] | None:
        """What multiplies the values that a head has mixed, before its output projection, and what is added
        then, both `(batch, head, token, d_head)`; None for nothing.

        Of attention: a gate, or a norm at the scale and centre that it has in this run. With it, what a head
        writes at one token is a sum over the tokens that it attends to.

        Raises:
            UnsupportedModelError: if it is no such sum.
        """
        return None

    def carried(self, reads: Reads) -> Tensor:
        """What each token has the heads write that attend to it alone, in the form of `write`.

        Raises:
            UnsupportedModelError: if the stage is not attention.
        """
        raise UnsupportedModelError(f"{self.nodes.name} is not attention: it has no scores and no pattern")

    def seen(self, reads: Reads) -> Reads:
        """What the receivers are taken to have read: `reads` themselves, but where they are edited."""
        return reads

    def mixed(self, reads: Reads, compact: Tensor) -> Float[Tensor, "batch head token d_head"]:
        """What each head had before its output projection.

        Args:
            reads: of the stage.
            compact: what it wrote.

        Raises:
            UnsupportedModelError: if the stage is not attention.
        """
        raise UnsupportedModelError(f"{self.nodes.name} is not attention: it mixes no values")

    def hidden(self, reads: Reads) -> Float[Tensor, "batch token hidden"]:
        """Of an MLP, its neurons: what its last linear layer reads.

        Raises:
            UnsupportedModelError: if the stage is no MLP, or one whose last layer is not known.
        """
        raise UnsupportedModelError(f"{self.nodes.name} is no MLP whose neurons are known")

    def from_hidden(self, hidden: Float[Tensor, "batch token hidden"]) -> Tensor:
        """What an MLP writes with these neurons, in the form of `write`.

        Raises:
            UnsupportedModelError: as `hidden`.
        """
        raise UnsupportedModelError(f"{self.nodes.name} is no MLP whose neurons are known")

    def columns(self) -> tuple[Float[Tensor, "hidden d_model"], Float[Tensor, " d_model"]]:
        """Of an MLP, what each neuron writes at an activation of 1, and what is written when all are 0.

        `from_hidden(hidden)` is `hidden @ columns + rest`.

        Raises:
            UnsupportedModelError: as `hidden`.
        """
        raise UnsupportedModelError(f"{self.nodes.name} is no MLP whose neurons are known")

    def affine(
        self, stream: Float[Tensor, "image token d_model"], of: Float[Tensor, "image class"]
    ) -> tuple[Float[Tensor, "image token d_model"], dict[str, Float[Tensor, " image"]]]:
        """A readout made linear, see `circuitvit.models.parts.Readout.affine`.

        Raises:
            UnsupportedModelError: if the stage is no readout, or none that can be made linear.
        """
        raise UnsupportedModelError(f"{self.nodes.name} is no readout that can be made linear")

    def direction(self, sender: str) -> Float[Tensor, " d_model"] | None:
        """What one of a unit writes, a neuron or a feature; None of a sender that is no unit."""
        return None

    def sources(self, sender: str) -> Bool[Tensor, " token"] | Bool[Tensor, "image token"] | None:
        """The tokens that a piece of a head takes its values from; None of one that takes them from all."""
        return None

    def contents(self) -> tuple[Content, ...]:
        """What holds its weights, in an order that does not depend on how a module keeps them.

        For the hash of a model's weights, where those that are not in it count in the order of their use.
        """
        return ()

    def forget(self) -> None:  # noqa: B027 - most stages keep nothing
        """Drop what was computed from weights, which have changed."""

    def restrict(self, senders: Sequence[int]) -> Stage:
        """The stage with only these of its senders, and only the receivers that feed them.

        The constant belongs to no sender and is left out. The default only knows the whole stage.
        """
        if list(senders) != list(range(len(self.nodes.senders))):
            raise NotImplementedError(f"{type(self).__name__} cannot be cut to some of its senders")
        return self

    def with_rules(self, rules: BackwardRules) -> Stage:
        """The stage with the same outputs, differentiated by the rules.

        Raises:
            UnsupportedModelError: if it is of a kind that the rules do not know.
        """
        raise UnsupportedModelError(
            f"{type(self).__name__} knows no backward rules: use a method without, such as 'eap' or 'local'"
        )

    def leading(self, tokens: int) -> Stage:
        """The stage writing at the first `tokens` tokens alone, for a model whose readout reads no others.

        It reads the whole stream and its `add` gives a stream of that many tokens. The default leaves
        nothing out, which is always right.
        """
        return self

    def pick(self, reads: Reads) -> Reads:
        """Out of the reads of the stage that this one was cut from by `restrict`, its own.

        The same for what the stage wrote, in compact form.
        """
        return reads

    def behind(self, part: str) -> Stage:
        """The stage reading another part of the stream, of the same tokens, and writing it unless it begins
        one itself: what it is behind a dictionary of the stream.
        """
        twin, writes = copy.copy(self), self.nodes.writes_to if self.nodes.begins else part
        twin.nodes = replace(self.nodes, reads_from=part, writes_to=writes)
        return twin

    @property
    def n_reads(self) -> int:
        """How many tensors it reads."""
        return 1

    @property
    def narrow(self) -> tuple[int, ...] | None:
        """How wide it writes at a token: of heads their number and width; None for as wide as the stream."""
        return None

    @property
    def branches(self) -> tuple[Stage, ...]:
        """The stages that are side by side in it; most are alone."""
        return (self,)

    def split(self, compact: Tensor) -> tuple[Tensor, ...]:
        """Of what the stage wrote, that of each of its branches."""
        return (compact,)

    def split_reads(self, reads: Reads) -> tuple[Reads, ...]:
        """Of what the stage read, that of each of its branches."""
        return (reads,)

    def join(self, written: Sequence[Tensor]) -> Tensor:
        """What the branches wrote, in the form of `write`."""
        return written[0]

    @property
    def cut(self) -> int | None:
        """The number of tokens that `leading` has left of the stream after the stage; None for all."""
        return None

    @property
    def is_source(self) -> bool:
        """Whether the stage reads images, not the stream."""
        return not self.nodes.receivers

    @property
    def is_readout(self) -> bool:
        """Whether the stage gives the logits and adds nothing to the stream."""
        return not self.nodes.senders

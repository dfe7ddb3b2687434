"""Embedding, MLP and readout, as stages."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvit.errors import UnsupportedModelError
from circuitvit.graph import RESIDUAL, StageNodes
from circuitvit.models.factored import Factored
from circuitvit.models.parts import MLP, Linear, Norm, Readout
from circuitvit.models.rules import BackwardRules, damped
from circuitvit.models.stages import Content, Reads, Stage


class EmbeddingStage(Stage):
    """Everything before the first block: patches, positions, class token, registers, and a norm after them.

    Args:
        embed: the module's own way from images to the stream.
    """

    def __init__(self, embed: Callable[[Tensor], Tensor]) -> None:
        self.embed = embed
        self.nodes = StageNodes("input", "input", 0, senders=("input",))

    def read(self, stream: Tensor) -> Reads:
        return (stream,)

    def read_each(self, streams: Tensor, source: Sequence[int], known: Reads = ()) -> Reads:
        raise NotImplementedError("the embedding has no receivers")

    def write(self, reads: Reads) -> Float[Tensor, "batch token d_model"]:
        return self.embed(reads[0])

    def total(self, compact: Tensor) -> Tensor:
        return compact

    def factored(self, compact: Tensor) -> Factored:
        return Factored(compact[None])

    def with_rules(self, rules: BackwardRules) -> EmbeddingStage:
        return self  # no gradient passes it


class MLPStage(Stage):
    """An MLP behind its norm: one receiver, one sender; its biases belong to the sender.

    Args:
        layer: number of the block, for the names.
        norm: before the MLP.
        mlp: the part.
        gamma: LayerScale's factor `(d_model,)`, or None.
        mixes: whether it may carry something from one token to another; `wrap` finds out.
        part: of the stream that is read and written; the MLP of another than the residual one is called
            after it, such as `pool.mlp`.
        number: of the MLP, where a block has several side by side: `m3`, `m3.1`.
    """

    def __init__(
        self,
        layer: int,
        norm: Norm,
        mlp: MLP,
        gamma: Tensor | None = None,
        *,
        mixes: bool = True,
        part: str = RESIDUAL,
        number: int = 0,
    ) -> None:
        self.number = number
        self.layer, self.norm, self.mlp, self.gamma, self.part = layer, norm, mlp, gamma, part
        self.rules: BackwardRules | None = None
        self.set_mixing(mixes)

    def set_mixing(self, mixes: bool) -> None:
        """Note whether it carries something from one token to another."""
        own, stage = f"m{self.layer}", f"mlp{self.layer}"
        if self.number:
            own, stage = f"{own}.{self.number}", f"{stage}.{self.number}"
        if self.part != RESIDUAL:
            own = stage = f"{self.part}.mlp"
        self.nodes = StageNodes(
            stage,
            "mlp",
            self.layer,
            (own,),
            (own,),
            mixes=(mixes,),
            reads_from=self.part,
            writes_to=self.part,
        )

    def read(self, stream: Tensor) -> Reads:
        return (self.norm(stream),)

    def read_each(self, streams: Tensor, source: Sequence[int], known: Reads = ()) -> Reads:
        return (self.norm(streams[source[0]]),) if source[0] >= 0 else known

    def write(self, reads: Reads) -> Float[Tensor, "batch token d_model"]:
        output = self.mlp(reads[0])
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
        others = self.norm(streams.flatten(0, 1)).view(streams.shape)
        return self.answers(reads, (others,), d_reads, d_compact)

    def answers(
        self, reads: Reads, others: Reads, d_reads: Reads, d_compact: Tensor
    ) -> Float[Tensor, "receiver candidate batch"]:
        hidden = self.mlp.hidden() if type(self).write is MLPStage.write else None
        if hidden is None:
            return super().answers(reads, others, d_reads, d_compact)
        # Through the last linear layer the gradient goes once, and no candidate does.
        before, last = hidden
        slope = (d_compact if self.gamma is None else d_compact * self.gamma) @ last.weight
        base = (before(reads[0]) * slope).sum(dim=(1, 2))
        answered = before(others[0].flatten(0, 1)).view(len(others[0]), *slope.shape)
        return (torch.einsum("cbth,bth->cb", answered, slope) - base)[None]

    def hidden(self, reads: Reads) -> Float[Tensor, "batch token hidden"]:
        return self._ends()[0](reads[0])

    def from_hidden(self, hidden: Tensor) -> Float[Tensor, "batch token d_model"]:
        output = self._ends()[1](hidden)
        return output if self.gamma is None else output * self.gamma

    def columns(self) -> tuple[Float[Tensor, "hidden d_model"], Float[Tensor, " d_model"]]:
        weight, bias = self.last.weight.T, self.last.bias
        bias = weight.new_zeros(weight.shape[1]) if bias is None else bias
        return (weight, bias) if self.gamma is None else (weight * self.gamma, bias * self.gamma)

    @property
    def last(self) -> Linear:
        """Its last linear layer.

        Raises:
            UnsupportedModelError: if that is not known.
        """
        return self._ends()[1]

    def _ends(self) -> tuple[Callable[[Tensor], Tensor], Linear]:
        """What comes before the last linear layer, and that layer."""
        ends = self.mlp.hidden() if type(self).write is MLPStage.write else None
        if ends is None:
            raise UnsupportedModelError(
                f"{self.nodes.name} is an MLP whose last linear layer is not known, nor what its neurons are"
            )
        return ends

    def contents(self) -> tuple[Content, ...]:
        return self.norm, self.mlp.module, self.gamma

    def with_rules(self, rules: BackwardRules) -> MLPStage:
        twin = copy.copy(self)
        twin.norm, twin.mlp, twin.rules = self.norm.with_rules(rules), self.mlp.with_rules(rules), rules
        return twin


class ReadoutStage(Stage):
    """Final norm, pooling and classifier: one receiver, the logits.

    Args:
        layer: number of the last block and one, for diagrams.
        own: the module's own way from the stream to the logits.
        parts: what that is made of, where it is known: what direct attribution and backward rules need.
        part: of the stream that is read.

    Attributes:
        tokens: how many of the first tokens are read; None for all. `wrap` finds out.
    """

    def __init__(
        self,
        layer: int,
        own: Callable[[Tensor], Tensor],
        parts: Readout | None = None,
        part: str = RESIDUAL,
    ) -> None:
        self.own, self.parts = own, parts
        self.ruled: Readout | None = None
        self.tokens: int | None = None
        self.nodes = StageNodes("readout", "readout", layer, receivers=("logits",), reads_from=part)

    def read(self, stream: Tensor) -> Reads:
        return (stream,)

    def read_each(self, streams: Tensor, source: Sequence[int], known: Reads = ()) -> Reads:
        return (streams[source[0]],) if source[0] >= 0 else known

    def write(self, reads: Reads) -> Float[Tensor, "batch classes"]:
        return self.own(reads[0]) if self.ruled is None else self.ruled(reads[0])

    def total(self, compact: Tensor) -> Tensor:
        raise NotImplementedError("the readout adds nothing to the stream")

    def factored(self, compact: Tensor) -> Factored:
        raise NotImplementedError("the readout has no senders")

    def pull_back(self, stream: Tensor, reads: Reads, d_reads: Reads) -> Factored:
        return Factored(d_reads[0][None])

    def affine(
        self, stream: Float[Tensor, "image token d_model"], of: Float[Tensor, "image class"]
    ) -> tuple[Float[Tensor, "image token d_model"], dict[str, Float[Tensor, " image"]]]:
        """The readout of a run made linear, see `Readout.affine`.

        Raises:
            UnsupportedModelError: if it is not made of norm, pooling, norm and linear classifier.
        """
        return self.known_parts("none that can be made linear").affine(stream, of)

    def contents(self) -> tuple[Content, ...]:
        return () if self.parts is None else (self.parts.norm, self.parts.after, *self.parts.maps)

    def with_rules(self, rules: BackwardRules) -> ReadoutStage:
        if not rules.frozen_norms:
            return self
        twin = copy.copy(self)
        twin.ruled = self.known_parts("none that backward rules are known for").with_rules(rules)
        return twin

    def known_parts(self, what: str) -> Readout:
        """What it is made of.

        Args:
            what: it is where that is not known, for the error.

        Raises:
            UnsupportedModelError: if that is not known.
        """
        if self.parts is None:
            raise UnsupportedModelError(
                f"this readout is {what}: it does more than a norm, a pooling and a linear classifier"
            )
        return self.parts

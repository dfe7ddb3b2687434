"""What a family says of its modules: where the parts are, how images become tokens, and what tokens are.

A family describes and computes nothing of its own. That its description is right is found out when a module
is
wrapped: every block is compared, in float64, with the stages that the family makes of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from circuitvit.models.layers import EmbeddingStage, ReadoutStage
from circuitvit.models.parts import Readout
from circuitvit.models.stages import Stage
from circuitvit.models.zoo import InputSpec

Grid = tuple[int, ...]
"""Rows and columns of patches; with time first where there is time."""


@dataclass(frozen=True)
class Loaded:
    """What a loader of another library's models gives.

    Attributes:
        module: with its weights, on the CPU or where the library put it.
        preprocessing: how image files become inputs; None to ask the family.
        classes: names of the logits, or None where unknown.
        tokenizer: of a whole model of images and texts, as its library has it; None for an image tower alone.
        wordless: why there is none, where one could be expected.
    """

    module: nn.Module
    preprocessing: InputSpec | None = None
    classes: tuple[str, ...] | None = None
    tokenizer: Any = None
    wordless: str = ""


class Family(ABC):
    """A table of where things are in one kind of Vision Transformer; `circuitvit.register` adds a user's own.

    Every method takes a module of the family. The first four say what the model is made of and have to be
    written; the others have defaults.
    """

    @abstractmethod
    def embed(
        self, module: Any, images: Float[Tensor, "batch *shape"]
    ) -> Float[Tensor, "batch token d_model"]:
        """What enters the first block, by the module's own parts.

        `shape` is that of `preprocessing`: (channel, height, width), and (time, channel, height, width) for
        clips, whatever order the module itself asks for.
        """

    @abstractmethod
    def blocks(self, module: Any) -> Sequence[nn.Module]:
        """The blocks in running order; each takes the residual stream and gives it on."""

    @abstractmethod
    def block(self, module: Any, block: Any, layer: int, where: str) -> tuple[Stage, ...]:
        """The stages of one block, in running order.

        Args:
            module: that the block belongs to, for what its forward hands to every block (rotations).
            block: one of `blocks`, or a copy of it in another dtype.
            layer: its number, for the names of nodes.
            where: its place, such as "blocks.3", for messages.

        Raises:
            UnsupportedModelError: if a part is not one that is known; the message names the part and the
                switch.
        """

    @abstractmethod
    def readout(
        self, module: Any, stream: Float[Tensor, "batch token d_model"]
    ) -> Float[Tensor, "batch classes"]:
        """The logits from what the last block gives, by the module's own parts."""

    def pool(self, module: Any) -> tuple[Stage, ...]:
        """Stages between the last block and the readout, such as attention pooling and its MLP.

        The readout is then given the stream that the last of them leaves.
        """
        return ()

    def readout_parts(self, module: Any) -> Readout | None:
        """What the readout is made of, for direct attribution and backward rules; None where it is not
        known.
        """
        return None

    def run(self, module: Any, images: Tensor) -> Tensor:
        """The module's own forward, from images to logits."""
        logits: Tensor = module(images)
        return logits

    def token_first(self, module: Any) -> bool:
        """Whether its blocks take and give the stream as `(token, batch, d_model)`."""
        return False

    def unused(self, module: Any) -> Sequence[nn.Module]:
        """Parts that no image passes, such as a text tower; they are not copied in the checks."""
        return ()

    def refuse(self, module: Any) -> None:  # noqa: B027 - most families have nothing to refuse
        """Refuse a module with a part around its blocks that is not known.

        Raises:
            UnsupportedModelError: naming the part and the switch.
        """

    def settle(self, module: Any, spec: InputSpec) -> None:  # noqa: B027 - most families have nothing to settle
        """Set in the frozen copy what changes nothing of what it computes, such as its attention backend.

        Args:
            module: the copy, before it is run.
            spec: how images become its inputs, which have that size.
        """

    def prefix(self, module: Any) -> tuple[str, ...]:
        """The kinds of the tokens before the patches, such as `("cls", "reg")`."""
        return ("cls",)

    def grid(self, module: Any, height: int, width: int) -> Grid | None:
        """Rows and columns of the patches of an image of this size, in the order of the tokens; time first
        for clips. None where the module does not say.
        """
        return None

    def resizable(self, module: Any) -> bool:
        """Whether the module takes images of other sizes than its own."""
        return False

    def classifies(self, module: Any) -> bool:
        """Whether the logits are of classes, and not features."""
        return True

    def classes(self, module: Any) -> tuple[str, ...] | None:
        """Names of the logits; None where the module does not say."""
        return None

    def preprocessing(self, module: Any) -> InputSpec | None:
        """How image files become inputs; None where the module does not say."""
        return None

    def name(self, module: Any) -> str:
        """For files and messages."""
        return type(module).__name__

    def stages(self, module: Any) -> tuple[Stage, ...]:
        """All stages of a module: the embedding, those of every block and of the pool, the readout."""
        blocks = self.blocks(module)
        layers = [
            stage
            for layer, block in enumerate(blocks)
            for stage in self.block(module, block, layer, f"blocks.{layer}")
        ]
        pool, read, parts = self.pool(module), partial(self.readout, module), self.readout_parts(module)
        if pool:
            readout = ReadoutStage(len(blocks) + 1, read, parts, pool[-1].nodes.writes_to)
        else:
            readout = ReadoutStage(len(blocks), read, parts)
        return (EmbeddingStage(partial(self.embed, module)), *layers, *pool, readout)

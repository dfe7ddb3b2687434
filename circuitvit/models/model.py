"""A model as the library sees it: stages, names, and what is needed to feed it images."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from circuitvit.graph import Graph
from circuitvit.models.rules import BackwardRules
from circuitvit.models.stages import Stage
from circuitvit.models.zoo import Card, InputSpec


@dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A Vision Transformer as a list of stages: what `load` and `wrap` give and every method takes.

    The module that was wrapped is never changed. The stages hold a frozen copy of its structure in
    evaluation mode whose tensors share memory with the original.

    Attributes:
        name: for files and messages.
        stages: in running order: one source, layers, one readout.
        module: the frozen copy; calling it is the model's own forward.
        preprocessing: how image files become inputs.
        n_logits: number of logits.
        prefix: the kinds of the tokens before the patches, such as `("cls", "reg", "reg")`.
        classes: names of the logits, or None where unknown; synonyms are separated by commas.
        synsets: WordNet ids of the logits, for ImageNet models.
        card: what is known about how the model was trained, for bundled and own models.

    Example:
        >>> import circuitvit as cv
        >>> model = cv.load("catdog-tiny")
        >>> model.graph.n_edges == len(model.graph.edges)
        True
    """

    name: str
    stages: tuple[Stage, ...]
    module: nn.Module
    preprocessing: InputSpec
    n_logits: int
    prefix: tuple[str, ...] = ("cls",)
    classes: tuple[str, ...] | None = None
    synsets: tuple[str, ...] | None = None
    card: Card | None = None

    @cached_property
    def graph(self) -> Graph:
        """The model's graph, with one token group."""
        return Graph(tuple(stage.nodes for stage in self.stages), d_model=self.d_model)

    @property
    def has_classes(self) -> bool:
        """Whether the logits are classes, and not an embedding (`num_classes=0`)."""
        return getattr(self.module, "num_classes", None) != 0

    @property
    def layers(self) -> tuple[Stage, ...]:
        """The stages between the source and the readout."""
        return self.stages[1:-1]

    @cached_property
    def d_model(self) -> int:
        """Width of the residual stream."""
        size = self.preprocessing.size
        blank = torch.zeros(1, *size, device=self.device, dtype=self.dtype)
        with torch.no_grad():
            return int(self.embed(blank).shape[-1])

    @cached_property
    def essential(self) -> tuple[Stage, ...]:
        """The stages without what the logits do not depend on.

        In the last layer only the tokens that the readout reads matter: from the last stage that mixes
        tokens on, the stream is cut to them. Logits, gradients and effects are those of `stages`.
        """
        mixing = [place for place, stage in enumerate(self.layers, 1) if any(stage.nodes.mixes or ())]
        if self.leading is None or not mixing:
            return self.stages
        last = mixing[-1]
        return (*self.stages[:last], self.stages[last].leading(self.leading), *self.stages[last + 1 :])

    @property
    def leading(self) -> int | None:
        """The number of tokens that the readout reads, if those are the first ones; None if it reads all."""
        tokens: int | None = getattr(self.stages[-1], "tokens", None)
        return tokens

    def embed(self, images: Tensor) -> Tensor:
        """Images `(batch, channel, height, width)` to the first layer's stream `(batch, token, d_model)`."""
        source = self.stages[0]
        return source.total(source.write(source.read(images)))

    def __call__(self, images: Tensor) -> Tensor:
        """The model's own forward: images `(batch, channel, height, width)` to logits `(batch, class)`."""
        with torch.no_grad():
            return self.module(images)  # type: ignore[no-any-return]

    def with_rules(self, rules: BackwardRules) -> Model:
        """A model with the same outputs and other gradients; this one stays as it is.

        Raises:
            UnsupportedModelError: if a stage is of a kind that the rules do not know.
        """
        return replace(self, stages=tuple(stage.with_rules(rules) for stage in self.stages))

    def token_kinds(self, n_tokens: int) -> tuple[str, ...]:
        """The kind of each of `n_tokens` tokens: "cls", "dist", "reg" or "patch"."""
        return (*self.prefix, *("patch",) * (n_tokens - len(self.prefix)))

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    @cached_property
    def weights_hash(self) -> str:
        """SHA-256 over names, shapes and values of all parameters and buffers."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def __repr__(self) -> str:
        size = "x".join(str(side) for side in self.preprocessing.size)
        classes = f", {len(self.classes)} classes" if self.classes else ""
        edges = f"{self.graph.n_edges:,} edges"
        return f"Model({self.name}: {len(self.layers)} stages, {edges}, input {size}{classes})"

"""The other half of a CLIP: a text tower that gives sentences a place among images, and its tokenizer.

A model of the image tower holds it as `model.words`. `with_prompts` turns sentences into classes: the logits
are the model's own similarity, `scale * cosine`, and the normalisation is inside of the readout, so that
everything that is measured on logits is about the similarity itself.

Radford et al. 2021, "Learning transferable visual models from natural language supervision",
arXiv:2103.00020.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from circuitvit.errors import DataError, ModelError, OptionError, counted
from circuitvit.models.edits import edited
from circuitvit.models.families import Family
from circuitvit.models.families.family import Grid
from circuitvit.models.heads import Head, refuse_edited_features, with_head
from circuitvit.models.refined import refined

if TYPE_CHECKING:
    from circuitvit.models.model import Model

PLACE = "{}"
"""Where a template takes a name."""

AT_ONCE = 256
"""How many sentences are run together."""


class Tokenizer(Protocol):
    """What turns sentences into numbers of tokens, and says what a token stands for."""

    @property
    def context(self) -> int:
        """How many tokens a sentence may have, start and end among them."""

    def encode(self, sentence: str) -> list[int]:
        """The tokens of a sentence, with those of start and end and without padding.

        Raises:
            DataError: if it is too long, or has words that are not known; the message names them.
        """

    def words(self, tokens: Sequence[int]) -> list[str]:
        """What each token says, for people."""


class TextFamily(Family):
    """Where things are in one kind of text tower, and in the model of images and texts that it is part of.

    As a `Family` its inputs are sentences of equal length, `(batch, 1, 1, token)`. `run` gives their features
    `(batch, width)` by the module's own forward, before they are normalised.
    """

    @abstractmethod
    def scale(self, module: Any) -> Float[Tensor, ""]:
        """What cosines are multiplied with: the exponential of `logit_scale`."""

    def bias(self, module: Any) -> Float[Tensor, ""] | None:
        """What is added to them then."""
        return None

    @abstractmethod
    def context(self, module: Any) -> int:
        """How many tokens a sentence may have, start and end among them."""

    def whole(self, module: Any) -> bool:
        """Whether padding is read too, so that every sentence has as many tokens as the context."""
        return False

    def kinds(self, prefix: Sequence[str], count: int) -> tuple[str, ...]:
        return ("start", *("word",) * (count - 2), "end")[-count:]


@dataclass(frozen=True, eq=False, repr=False)
class Words:
    """The text side of a model of images and texts.

    Attributes:
        module: a frozen copy of what holds the text tower; its tensors are shared with the original's.
        family: where things are in it.
        tokenizer: its own.
    """

    module: nn.Module
    family: TextFamily
    tokenizer: Tokenizer

    @torch.no_grad()
    def embed(self, sentences: Sequence[str]) -> Float[Tensor, "sentence width"]:
        """Sentences as directions of length 1 in the space of image embeddings.

        Raises:
            DataError: if one is too long, or has unknown words.
            OptionError: if there are none.

        Example:
            >>> import circuitvit as cv
            >>> words = cv.load("clip-tiny").words  # doctest: +SKIP
            >>> words.embed(["a cat"]).norm(dim=1)  # doctest: +SKIP
            tensor([1.])
        """
        tokens = [self.tokenizer.encode(sentence) for sentence in _sentences(sentences)]
        device, features = next(self.module.parameters()).device, dict[int, Tensor]()
        for count in sorted({len(each) for each in tokens}):  # those of one length together
            alike = [place for place, each in enumerate(tokens) if len(each) == count]
            for places in (alike[start : start + AT_ONCE] for start in range(0, len(alike), AT_ONCE)):
                numbers = torch.tensor([tokens[place] for place in places], device=device)
                features.update(zip(places, self.family.run(self.module, as_inputs(numbers)), strict=True))
        found = torch.stack([features[place] for place in range(len(tokens))])
        if not found.isfinite().all():
            raise ModelError("the text tower gives NaN or infinite features: its weights are unusable")
        return F.normalize(found, dim=-1)

    @property
    def scale(self) -> Float[Tensor, ""]:
        """What cosines are multiplied with."""
        return self.family.scale(self.module).detach()

    @property
    def bias(self) -> Float[Tensor, ""] | None:
        """What is added to them then; of most models nothing."""
        bias = self.family.bias(self.module)
        return None if bias is None else bias.detach()

    def __repr__(self) -> str:
        return f"Words({type(self.module).__name__}, {counted(self.tokenizer.context, 'token')})"


def as_inputs(tokens: Int64[Tensor, "sentence token"]) -> Float[Tensor, "sentence 1 1 token"]:
    """Numbers of tokens as what a model of sentences is given: whole numbers below 2**24 are exact."""
    return tokens[:, None, None].float()


MOST_LINES = 24
"""Tokens that are drawn one below the other; of more there are several in a line."""


def lines(count: int) -> Grid:
    """How the tokens of a sentence lie on paper, in rows and columns: a list, or lines where it is long.

    Example:
        >>> lines(7), lines(64), lines(77)
        ((7, 1), (16, 4), (11, 7))
    """
    fitting = [across for across in range(1, count + 1) if count % across == 0 and count <= 4 * across**2]
    return (count, 1) if count <= MOST_LINES else (count // fitting[0], fitting[0])


def with_prompts(model: Model, prompts: Sequence[str], templates: Sequence[str] | None = None) -> Model:
    """The same model with sentences for classes: logits are the scaled cosines of image and sentences.

    Args:
        model: the image tower of a model of images and texts.
        prompts: sentences; or names, where there are templates.
        templates: sentences with `{}` in the place of a name. The directions of a name's sentences are
            averaged and normalised again.

    Raises:
        OptionError: if the model knows no words, prompts are missing or there twice, or a template has no
            place for a name.
        UnsupportedModelError: if its logits, which are the features that prompts are compared with, are
            edited.
        DataError: if a sentence is too long, or has unknown words.
    """
    words = model.words
    if words is None:
        if model.wordless:
            raise OptionError(f"{model.name} knows no words: {model.wordless}")
        raise OptionError(
            f"{model.name} knows no words: prompts are for models of images and texts, such as CLIP: "
            "open_clip:MODEL/TAG, hf:NAME, or a module and its tokenizer, cv.wrap(clip, tokenizer=...)"
        )
    refuse_edited_features(model)
    if model.bare is not None:
        return edited(with_prompts(model.bare, prompts, templates), model.edits, model.rules)
    if model.coarse is not None:
        return refined(with_prompts(model.coarse, prompts, templates), model.refinements, model.rules)
    if model.prompts and model.under is not None:
        rules, model = model.rules, model.under  # other prompts in place of those that it has
        model = model if rules is None else model.with_rules(rules)
    names = _sentences(prompts)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise OptionError(f"the prompt {twice!r} is there twice: classes are told apart by their prompts")
    filled = _templates(templates)
    directions = _directions(words, names, filled)
    scale, bias = words.scale, words.bias
    biases = None if bias is None else bias.expand(len(names)).clone()
    return with_head(model, Head(directions, biases, tuple(names), scale=scale, templates=tuple(filled)))


def _directions(words: Words, names: Sequence[str], templates: Sequence[str]) -> Float[Tensor, "name width"]:
    filled = [template.replace(PLACE, name) for name in names for template in templates]
    by_name = words.embed(filled).view(len(names), len(templates), -1)
    return by_name[:, 0] if len(templates) == 1 else F.normalize(by_name.mean(dim=1), dim=-1)


def _templates(given: Sequence[str] | None) -> list[str]:
    if given is None:
        return [PLACE]
    found = _sentences(given, "templates")
    for template in found:
        if template.count(PLACE) != 1:
            raise OptionError(f"a template has one {PLACE} in the place of the name, unlike {template!r}")
    return found


def _sentences(given: object, what: str = "prompts") -> list[str]:
    listed = list(given) if isinstance(given, Iterable) and not isinstance(given, (str, Set)) else None
    if listed is None or not all(isinstance(each, str) for each in listed):
        raise OptionError(f"the {what} are a list of texts, not {given!r:.60}")
    if not listed:
        raise OptionError(f"there are no {what}")
    if not all(each.strip() for each in listed):
        raise DataError(f"one of the {what} is empty")
    return [str(each) for each in listed]  # those of numpy are texts of another type

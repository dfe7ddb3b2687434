"""How sentences become the input of a text tower, which is a model like any other.

A sentence is an image of one line: `(1, 1, token)`, whose pixels are the numbers of its tokens. They are
whole numbers, which float32 and float64 hold exactly. So whatever takes, batches and keeps images takes
sentences, and only those who read and show them know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from circuitvit.models.words import Tokenizer
from circuitvit.models.zoo import InputSpec


@dataclass(frozen=True)
class TextSpec(InputSpec):
    """How sentences become the input of a text tower, `(1, 1, token)`.

    Attributes:
        tokenizer: of the tower.
        whole: whether every sentence has as many tokens as the tower takes, padding among them.

    Example:
        >>> from circuitvit.models.words import Tokenizer
        >>> TextSpec.of(tokenizer, 7).shape  # doctest: +SKIP
        (1, 1, 7)
    """

    tokenizer: Tokenizer = field(kw_only=True)
    whole: bool = field(default=False, kw_only=True)

    what: ClassVar[str] = "sentence"
    axes: ClassVar[tuple[str, ...]] = ("1", "1", "token")

    @classmethod
    def of(cls, tokenizer: Tokenizer, tokens: int, whole: bool = False) -> TextSpec:
        """That of sentences with this many tokens."""
        return cls((1, 1, tokens), (0.0,), (1.0,), tokenizer=tokenizer, whole=whole)

    def with_tokens(self, tokens: int) -> TextSpec:
        """The same for sentences of another number of tokens."""
        return replace(self, size=(1, 1, tokens))

    def words(self, sentence: Float[Tensor, "1 1 token"]) -> list[str]:
        """What each token of a sentence says, for people."""
        return self.tokenizer.words([int(number) for number in sentence.flatten().tolist()])

    def cut(self, sentences: Sequence[str]) -> list[list[int]]:
        """The tokens of sentences.

        Raises:
            DataError: if one is too long, or has unknown words.
        """
        return [self.tokenizer.encode(sentence) for sentence in sentences]

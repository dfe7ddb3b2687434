"""The text half of `clip-tiny`: a transformer over the words of a sentence, and its tokenizer.

Example:
    >>> tokenizer = WordTokenizer(("a", "cat", "dog"), context=8)
    >>> tokenizer.encode("a cat")
    [1, 3, 4, 2]
    >>> tower = TextTower(vocabulary=len(tokenizer), context=8, width=16, depth=2, heads=2, features=8)
    >>> tower(torch.tensor([[1, 3, 4, 2], [1, 5, 2, 0]])).shape
    torch.Size([2, 8])
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from circuitvit.errors import DataError
from circuitvit.models.timm_import import import_timm


MARKS = ("[pad]", "[start]", "[end]")
"""What tokens 0, 1 and 2 say."""


class TextTower(nn.Module):
    """Token numbers to features at the end token: timm's pre-norm blocks under a causal mask.

    Args:
        vocabulary: how many tokens there are.
        context: most tokens of a sentence.
        width: of the residual stream.
        depth: number of blocks.
        heads: of each block.
        features: width of what comes out.
        mlp_ratio: hidden width of the MLPs over `width`.
        causal: whether a token attends to earlier tokens and itself alone. What follows the end token is
            padding, which nothing attends to in either case.
        final_norm: whether a layer norm comes before the projection.
        end: number of the end token.
    """

    def __init__(
        self,
        vocabulary: int,
        context: int,
        width: int,
        depth: int,
        heads: int,
        features: int,
        *,
        mlp_ratio: float = 4.0,
        causal: bool = True,
        final_norm: bool = True,
        end: int = 2,
    ) -> None:
        super().__init__()
        import_timm()
        from timm.models.vision_transformer import Block

        self.context, self.causal, self.end = context, causal, end
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio=mlp_ratio, qkv_bias=True) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width) if final_norm else nn.Identity()
        self.projection = nn.Linear(width, features, bias=False)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)

    def forward(self, ids: Int[Tensor, "batch token"]) -> Float[Tensor, "batch feature"]:
        """Features of sentences, each with one end token and padded after it.

        Raises:
            DataError: for more tokens than `context`, or a sentence without an end token.
        """
        if ids.shape[1] > self.context:
            raise DataError(f"{ids.shape[1]} tokens, but the text tower takes {self.context} at most")
        ended = ids == self.end
        if not ended.any(dim=1).all():
            raise DataError(f"a sentence has no end token (number {self.end})")
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        mask = self.attention_mask(ended)
        for block in self.blocks:
            x = block(x, attn_mask=mask)
        last = x[torch.arange(len(ids), device=ids.device), ended.int().argmax(dim=1)]
        features: Tensor = self.projection(self.norm(last))
        return features

    def attention_mask(self, ended: Tensor) -> Float[Tensor, "batch 1 query key"]:
        """What is added to attention scores: -inf for padding and, when causal, for later tokens."""
        padding = ended.int().cumsum(dim=1) - ended.int() > 0
        hidden = padding[:, None, None, :].expand(-1, 1, ended.shape[1], -1)
        if self.causal:
            n = ended.shape[1]
            later = torch.ones(n, n, dtype=torch.bool, device=ended.device).triu(1)
            hidden = hidden | later
        like = self.positional_embedding
        return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill(hidden, -torch.inf)


class WordTokenizer:
    """One token for each word of a closed vocabulary, a start and an end token; 0 is padding.

    Args:
        vocabulary: the words; the first has number 3.
        context: most tokens of a sentence, start and end among them.
    """

    start, end = 1, 2

    def __init__(self, vocabulary: Sequence[str], context: int) -> None:
        self.vocabulary = tuple(vocabulary)
        self.context = context
        self._tokens = (*MARKS, *self.vocabulary)
        self._numbers = {word: number for number, word in enumerate(self._tokens)}

    def __len__(self) -> int:
        return len(self._tokens)

    def encode(self, sentence: str) -> list[int]:
        """Numbers of the words between those of start and end; capitals, commas and full stops do not count.

        Raises:
            DataError: for a word outside the vocabulary (with the nearest that it has), or too many words.
        """
        words = sentence.lower().replace(",", " ").replace(".", " ").split()
        for word in words:
            if word not in self.vocabulary:
                near = get_close_matches(word, self.vocabulary, n=1, cutoff=0.0)
                raise DataError(
                    f"{word!r} in {sentence!r} is none of the {len(self.vocabulary)} words that the model knows; "
                    f"the nearest is {', '.join(map(repr, near))}"
                )
        if len(words) + 2 > self.context:
            raise DataError(
                f"{sentence!r} has {len(words)} words, and with start and end the model takes {self.context} tokens"
            )
        return [self.start, *(self._numbers[word] for word in words), self.end]

    def words(self, ids: Sequence[int]) -> list[str]:
        """What each token says, for people."""
        return [self._tokens[number] for number in ids]


def padded(sentences: Sequence[Sequence[int]]) -> Int[Tensor, "batch token"]:
    """Token numbers of sentences of different lengths as one tensor, zeros after the ends."""
    longest = max(len(ids) for ids in sentences)
    return torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in sentences])

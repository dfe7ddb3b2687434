"""Tokenizers of other libraries as this one's: OpenAI's `clip`, `open_clip`, `transformers`.

What is done to a sentence before it is cut into tokens (lower case, white space) is each library's own doing.
What none of them says is said here: they cut a sentence off where it is too long, and put a placeholder where
they know no token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from circuitvit.errors import DataError, OptionError, UnsupportedModelError
from circuitvit.models.words import Tokenizer

START, END, PADDING, UNKNOWN = "[start]", "[end]", "[pad]", "[unknown]"
"""What tokens that are no words are called."""


def adapted(given: Any, context: int, whole: bool) -> Tokenizer:
    """A tokenizer of a known library for one text tower.

    Args:
        given: one of transformers', or a processor that holds it; one of open_clip's; `clip.tokenize` or
            `open_clip.tokenize`; or an object with `encode`, `words` and `context`.
        context: how many tokens a sentence of the tower may have.
        whole: whether each sentence has as many, padding among them.

    Raises:
        OptionError: if it is none of these.
        UnsupportedModelError: if it does something else in each call.
    """
    given = getattr(given, "__globals__", {}).get("_tokenizer", given)  # of functions called tokenize
    if getattr(given, "image_processor", None) is not None:
        given = getattr(given, "tokenizer", given)
    kinds = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(given).__mro__}
    if {"open_clip.HFTokenizer", "open_clip.SigLipTokenizer"} & kinds:
        return _of_open_clip(given, context, whole)
    if {"open_clip.SimpleTokenizer", "clip.SimpleTokenizer"} & kinds:
        if getattr(given, "reduction_fn", None) is not None:
            raise UnsupportedModelError(
                "the tokenizer leaves tokens out (reduction_mask), which is for training: make it without"
            )
        return BytePairs(given, context, whole)
    if "transformers.PreTrainedTokenizerBase" in kinds:
        return Transformers(given, context, whole)
    if not all(hasattr(given, name) for name in ("encode", "words", "context")):
        raise OptionError(
            f"{given!r:.80} is no tokenizer that is known: give that of transformers (or a processor), of "
            "open_clip (open_clip.get_tokenizer), clip.tokenize, or an object with encode(sentence), "
            "words(tokens) and context"
        )
    own: Tokenizer = given
    return own


@dataclass(frozen=True)
class _Adapter:
    """What they have in common.

    Attributes:
        given: the other library's.
        context: how many tokens a sentence may have.
        whole: whether it is filled up to as many.
    """

    given: Any
    context: int
    whole: bool

    def encode(self, sentence: str) -> list[int]:
        tokens = self._tokens(sentence)
        if len(tokens) > self.context:
            raise DataError(
                f"{sentence!r:.80} has {len(tokens)} tokens, start and end among them, and the model reads "
                f"{self.context}: it would be cut off"
            )
        return tokens if not self.whole else self._filled(sentence, tokens)

    def _tokens(self, sentence: str) -> list[int]:
        raise NotImplementedError

    def _filled(self, sentence: str, tokens: list[int]) -> list[int]:
        raise NotImplementedError


class BytePairs(_Adapter):
    """CLIP's own, of OpenAI's `clip` and of `open_clip`: pieces of words that are frequent together."""

    @property
    def _ends(self) -> tuple[int, int]:
        start, *_ = (name for name in self.given.encoder if name in ("<|startoftext|>", "<start_of_text>"))
        number: int = self.given.encoder[start]
        return number, number + 1

    def _tokens(self, sentence: str) -> list[int]:
        start, end = self._ends
        return [start, *self.given.encode(sentence), end]

    def _filled(self, sentence: str, tokens: list[int]) -> list[int]:
        return [*tokens, *[0] * (self.context - len(tokens))]

    def words(self, tokens: Sequence[int]) -> list[str]:
        said = dict(zip(self._ends, (START, END), strict=True))
        return [said.get(token) or self.given.decode([token]).strip() for token in tokens]


@dataclass(frozen=True)
class Transformers(_Adapter):
    """A tokenizer of transformers.

    Attributes:
        cleaned: what is done to a sentence first, where open_clip says it.
        zeroed: a token in whose place there is 0, likewise.
    """

    cleaned: Callable[[str], str] | None = None
    zeroed: int | None = None

    def _given(self, sentence: str, **options: Any) -> list[int]:
        text = sentence if self.cleaned is None else self.cleaned(sentence)
        found = self.given(text, verbose=False, **options).input_ids
        return [0 if token == self.zeroed else int(token) for token in found]

    def _tokens(self, sentence: str) -> list[int]:
        tokens = self._given(sentence)
        unknown = self.given.unk_token_id
        if unknown not in (None, self.given.eos_token_id, self.given.pad_token_id) and unknown in tokens:
            raise DataError(f"{sentence!r:.80} has letters or words that the model's tokenizer does not know")
        return tokens

    def _filled(self, sentence: str, tokens: list[int]) -> list[int]:
        return self._given(sentence, padding="max_length", max_length=self.context, truncation=True)

    def words(self, tokens: Sequence[int]) -> list[str]:
        own = self.given
        said = {
            own.unk_token_id: UNKNOWN, own.pad_token_id: PADDING, own.cls_token_id: START,
            own.bos_token_id: START, own.sep_token_id: END, own.eos_token_id: END,
        }  # fmt: skip
        said.pop(None, None)
        return [said.get(token) or self._piece(token) for token in tokens]

    def _piece(self, token: int) -> str:
        return str(self.given.decode([token])).strip() or str(self.given.convert_ids_to_tokens(token))


def _of_open_clip(given: Any, context: int, whole: bool) -> Transformers:
    """open_clip's wrapper of a tokenizer of transformers, with what it does besides."""
    if getattr(given, "tokenizer_mode", ""):
        raise UnsupportedModelError(
            f"open_clip's tokenizer has tokenizer_mode={given.tokenizer_mode!r}, which is not supported"
        )
    own = given.tokenizer
    if hasattr(given, "clean_fn"):
        zeroed = own.sep_token_id if given.strip_sep_token else None
        return Transformers(own, context, whole, given.clean_fn, zeroed)
    return Transformers(own, context, whole, _canonical)


def _canonical(sentence: str) -> str:
    """What open_clip's `SigLipTokenizer` does to a sentence first."""
    tokenizer = import_module("open_clip.tokenizer")
    found: str = tokenizer.canonicalize_text(tokenizer.basic_clean(sentence))
    return found

"""Sentences, which a text tower is given as images of one line: `(1, 1, token)`, see `TextSpec`.

The sentences of a task have equally many tokens: a counterfactual is the same sentence with a word exchanged,
so that every token has its counterpart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvit.errors import DataError, OptionError, counted
from circuitvit.models.sentences import TextSpec
from circuitvit.models.words import as_inputs
from circuitvit.models.zoo import InputSpec
from circuitvit.tasks.image_files import IMAGE_SUFFIXES, is_sentence
from circuitvit.tasks.inputs import Images

MOST_SHOWN = 8
"""Sentences that are shown token by token where their numbers of tokens differ."""


@dataclass(frozen=True, eq=False, repr=False)
class Sentences(Images):
    """Sentences of equally many tokens.

    Attributes:
        numbers: of their tokens.
        spec: the model's.
        sentences: as people write them.

    Raises:
        DataError: if they have different numbers of tokens.
    """

    numbers: Float[Tensor, "sentence 1 1 token"]
    spec: TextSpec
    sentences: tuple[str, ...]

    @classmethod
    def of(cls, sentences: Sequence[str], spec: TextSpec) -> Sentences:
        """Sentences as people write them."""
        refuse_unlike(sentences, spec)
        return cls(as_inputs(torch.tensor(spec.cut(sentences))), spec, tuple(sentences))

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, start: int, stop: int) -> Float[Tensor, "sentence 1 1 token"]:
        return self.numbers[start:stop]

    @property
    def names(self) -> tuple[str, ...]:
        return self.sentences

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.numbers.shape[1:])

    def check(self, progress: bool = True) -> None:
        """Nothing is left to find out."""

    def __repr__(self) -> str:
        return f"Sentences({counted(len(self), 'sentence')} of {counted(self.shape[-1], 'token')})"


def refuse_unlike(sentences: Sequence[str], spec: TextSpec) -> None:
    """Refuse sentences of different numbers of tokens.

    Raises:
        DataError: with how the tokenizer cuts each of them; or if one cannot be cut.
    """
    tokens = spec.cut(sentences)
    if len({len(each) for each in tokens}) == 1:
        return
    first = {len(each): place for place, each in reversed(list(enumerate(tokens)))}
    others = [place for place in range(len(tokens)) if place not in first.values()]
    chosen = sorted([*sorted(first.values())[:MOST_SHOWN], *others[: max(0, MOST_SHOWN - len(first))]])
    lines = [f"  {len(tokens[place])}: {' | '.join(spec.tokenizer.words(tokens[place]))}" for place in chosen]
    more = f"\n  and {len(tokens) - len(chosen)} more" if len(chosen) < len(tokens) else ""
    raise DataError(
        "sentences of one task have equally many tokens, so that each token has its counterpart, and these "
        "have different numbers:\n"
        + "\n".join(lines)
        + f"{more}\nExchange a word for one of as many tokens, "
        "or make a task for each number"
    )


def refuse_sentences(spec: InputSpec, what: str) -> None:
    """Refuse a text tower where something is about pixels or patches.

    Raises:
        OptionError: naming that.
    """
    if isinstance(spec, TextSpec):
        raise OptionError(f"{what}, and a text tower takes sentences: give it the image tower")


def sentences_of(source: object, spec: TextSpec) -> Sentences:
    """Whatever a user gives for sentences.

    Args:
        source: a sentence, a list of them, the path of a text file with one in each line, or numbers of
            tokens `(sentence, 1, 1, token)` or `(sentence, token)`.
        spec: of the text tower.

    Raises:
        DataError: for images, missing or empty files, and sentences that cannot be cut or differ in their
            numbers of tokens.
    """
    if isinstance(source, Tensor):
        return _of_numbers(source, spec)
    if isinstance(source, (str, Path)):
        source = [source]
    if not isinstance(source, Sequence) or not all(isinstance(each, (str, Path)) for each in source):
        raise DataError(
            f"a text tower takes sentences, not {type(source).__name__}: give texts; images are for the "
            "image tower, the model whose .text this is, or go in as .text(images=...)"
        )
    sentences = [sentence for each in source for sentence in _read(each)]
    if not sentences:
        raise DataError("no sentences: the list is empty")
    return Sentences.of(sentences, spec)


def _read(each: str | Path) -> list[str]:
    """The sentences of a text file, or what is a sentence itself."""
    path = Path(each)
    if path.suffix.lower() == ".txt":
        return _lines(path)
    if not str(each).strip():
        raise DataError("one of the sentences is empty")
    named = isinstance(each, Path) and not is_sentence(str(each))  # the command line has paths alone
    if named or path.suffix.lower() in IMAGE_SUFFIXES or _exists(path):
        kind = "a folder" if _exists(path) and path.is_dir() else "a file"
        raise DataError(
            f"{each} is {kind}, and a text tower takes sentences, or a .txt file of them: images are for the "
            "image tower, the model whose .text this is, or go in as .text(images=...)"
        )
    return [str(each)]


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # too long for a file's name
        return False


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read the sentences {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8: {error}") from error
    found = [line.strip() for line in text.splitlines() if line.strip()]
    if not found:
        raise DataError(f"{path} has no sentences: it gives one in each line")
    return found


def _of_numbers(numbers: Tensor, spec: TextSpec) -> Sentences:
    shaped = numbers[:, None, None] if numbers.ndim == 2 else numbers
    if shaped.ndim != 4 or shaped.shape[1:3] != (1, 1) or not shaped.numel():
        raise DataError(
            f"numbers of tokens are (sentence, 1, 1, token), not {tuple(numbers.shape)}: a text tower takes "
            "sentences as texts too"
        )
    whole = shaped.detach().to("cpu", torch.float32)
    if not (torch.equal(whole, whole.round()) and whole.isfinite().all()) or whole.min() < 0:
        raise DataError("tokens have whole numbers from 0: give sentences as texts")
    try:
        names = tuple(" ".join(spec.words(sentence)) for sentence in whole)
    except LookupError as error:
        raise DataError(
            "the tokenizer of the model does not have all of these tokens: give sentences as texts"
        ) from error
    return Sentences(whole, spec, names)

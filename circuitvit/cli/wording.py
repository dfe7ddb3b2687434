"""Messages in the language of the command line.

The library says what to do in Python, as `by='top'` or `give corrupt=`; here people give options, `--by top`
and `--corrupt`. Where the running command has an option of that name, the words are exchanged; where it has
none, the keyword stays, as only Python has it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType

import typer

from circuitvit.cli.processes import is_other
from circuitvit.errors import CircuitViTError

_PHRASES = (
    (r"\bmetric=cv\.(\w+)\(to=\.\.\.\) or cv\.projection\(direction\)", r"--metric \1 --to FILE"),
    (r"\bcv\.fit_head or cv\.with_head\b", "--head FILE"),
    (r"\b(?:cv\.)?logit_diff\('([^']*)', '([^']*)'\)", r"--target '\1' --foil '\2'"),
    (r"\b(?:cv\.)?logit_diff\(target, foil\)", "--metric logit_diff --target CLASS --foil CLASS"),
    (r"\bcv\.group\('([^']*)'\)", r"'group:\1'"),
    (r"\bpretrained=True", "--pretrained"),
    (r"\bmodel\.sites\(\)", "--list"),
    (r"\bmodel\.with_prompts\b", "--prompt"),
    (r"\bclasses=\[\.\.\.\]", "--classes FILE"),
)
"""What is said otherwise altogether."""

_OF_TIMM = "num_classes|img_size|reg_tokens|class_token|global_pool"
_VALUE = r"'[^']*'|\"[^\"]*\"|\([^()]*\)|\[[^\[\]]*\]|\{[^{}]*\}|[\w.+\-/]+"
_CALL = re.compile(rf"\b(?:cv\.)?\w+\(\.\.\., (\w+=(?:{_VALUE}))\)")
_KEYWORD = re.compile(rf"(?<![\w.`'\"/?&-])(?<!\w\()(\w+)=({_VALUE})?(?: or '(\w+)')?")
_BRACKETED = re.compile(r"\((\w+_\w+)\)")


_FLAGS: ContextVar[Mapping[str, str]] = ContextVar("flags", default=MappingProxyType({}))
"""The options of the command that is running."""


@contextmanager
def speaking(written: Mapping[str, str]) -> Iterator[None]:
    """Say everything within in the options of a command.

    Args:
        written: the flag of each of its parameters, by name.

    Raises:
        CircuitViTError: those of the library, in these words.
    """
    before = _FLAGS.set(flags_of(written))
    try:
        yield
    except CircuitViTError as error:
        raise type(error)(in_options(str(error))) from error
    finally:
        _FLAGS.reset(before)


def in_options(text: str) -> str:
    """A message of the library as the running command would say it; as it is where none is running."""
    return as_options(text, _FLAGS.get())


def flags_of(written: Mapping[str, str]) -> dict[str, str]:
    """The options of a command by the keywords that they stand for.

    A keyword that takes several is an option that is given several times, in the singular.

    Example:
        >>> flags_of({"keep": "--save", "layer": "--layer"})
        {'saves': '--save', 'save': '--save', 'keep': '--save', 'layers': '--layer', 'layer': '--layer'}
    """
    flags: dict[str, str] = {}
    for name, flag in written.items():
        same = flag.removeprefix("--").replace("-", "_")
        flags |= {f"{same}s": flag, same: flag, name: flag}
    return flags


def as_options(text: str, flags: Mapping[str, str]) -> str:
    """`text` with the keywords that a command has options for as these options.

    Example:
        >>> as_options("leave out layers=, or by='top'", {"layers": "--layer", "by": "--by"})
        'leave out --layer, or --by top'
    """
    text = _CALL.sub(lambda call: call[1] if call[1].split("=")[0] in flags else call[0], text)
    for said, instead in _PHRASES:
        if all(each.replace("-", "_") in flags for each in re.findall(r"--([\w-]+)", instead)):
            text = re.sub(said, instead, text)
    if "arch" in flags:
        given = rf"(?<![\w.-])(?<!--arch )({_OF_TIMM})=(?:'(\w+)'|(?=[\w,. ]|$))"
        text = re.sub(given, r"--arch \1=\2", text)
    text = _KEYWORD.sub(lambda said: _option(said[0], said[1], said[2], said[3], flags), text)
    return _BRACKETED.sub(lambda said: f"({flags[said[1]]})" if said[1] in flags else said[0], text)


def _option(whole: str, name: str, value: str | None, other: str | None, flags: Mapping[str, str]) -> str:
    """A keyword as its option; `other` is what may stand in place of its value."""
    if name not in flags:
        return whole
    if other is not None:
        return f"{_option('', name, value, None, flags)} or {flags[name]} {other}"
    if value in (None, "True"):
        return flags[name]
    if value in ("()", "None", "False"):
        return f"no {flags[name]}"
    plain = (value or "").strip("'\"")
    if plain[:1] in "([":
        plain = f" {flags[name]} ".join(each.strip(" '\"") for each in plain[1:-1].split(","))
    return f"{flags[name]} {plain}"


def remark(text: str) -> None:
    """Print something worth knowing on stderr, in the words of the command line."""
    if not is_other():
        typer.echo(f"note: {in_options(text)}", err=True)

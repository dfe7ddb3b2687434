"""Messages in the language of the command line.

The library says what to do in Python, as `by='top'` or `give corrupt=`; here people give options, `--by top`
and `--corrupt`. Where the running command has an option of that name, the words are exchanged; where it has
none, the keyword stays, as only Python has it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import click

_PHRASES = (
    (r"\bmetric=cv\.(\w+)\(to=\.\.\.\) or cv\.projection\(direction\)", r"--metric \1 --to FILE"),
    (r"\bcv\.fit_head or cv\.with_head\b", "--head FILE"),
    (r"\b(?:cv\.)?logit_diff\('([^']*)', '([^']*)'\)", r"--target '\1' --foil '\2'"),
    (r"\b(?:cv\.)?logit_diff\(target, foil\)", "--metric logit_diff --target CLASS --foil CLASS"),
    (r"\bpretrained=True", "--pretrained"),
    (r"\bclasses=\[\.\.\.\]", "--classes FILE"),
)
"""What is said otherwise altogether."""

_OF_TIMM = "num_classes|img_size|reg_tokens|class_token|global_pool"
_VALUE = r"'[^']*'|\"[^\"]*\"|\([^()]*\)|\[[^\[\]]*\]|\{[^{}]*\}|[\w.+\-/]+"
_CALL = re.compile(rf"\b(?:cv\.)?\w+\(\.\.\., (\w+=(?:{_VALUE}))\)")
_KEYWORD = re.compile(rf"(?<![\w.`'\"/?&-])(\w+)=({_VALUE})?")
_BRACKETED = re.compile(r"\((\w+_\w+)\)")


def in_options(text: str) -> str:
    """A message of the library as the running command would say it; as it is where none is running."""
    context = click.get_current_context(silent=True)
    return text if context is None else as_options(text, flags_of(context.command))


def flags_of(command: click.Command) -> dict[str, str]:
    """The options of a command by the keywords that they stand for.

    A keyword that takes several is an option that is given several times, in the singular.
    """
    flags: dict[str, str] = {}
    for parameter in command.params:
        long = [each for each in parameter.opts if each.startswith("--")]
        for flag in long:
            name = flag[2:].replace("-", "_")
            flags |= {f"{name}s": flag, name: flag}
        if long and parameter.name:
            flags[parameter.name] = long[0]
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
        text = re.sub(rf"(?<![\w.-])({_OF_TIMM})=(?=[\w,. ]|$)", r"--arch \1=", text)
    text = _KEYWORD.sub(lambda said: _option(said[0], said[1], said[2], flags), text)
    return _BRACKETED.sub(lambda said: f"({flags[said[1]]})" if said[1] in flags else said[0], text)


def _option(whole: str, name: str, value: str | None, flags: Mapping[str, str]) -> str:
    if name not in flags:
        return whole
    if value in (None, "True"):
        return flags[name]
    if value in ("()", "None", "False"):
        return f"no {flags[name]}"
    plain = (value or "").strip("'\"")
    if plain[:1] in "([":
        plain = f" {flags[name]} ".join(each.strip(" '\"") for each in plain[1:-1].split(","))
    return f"{flags[name]} {plain}"

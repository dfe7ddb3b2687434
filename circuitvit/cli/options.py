"""How the parameters of a command become options, with texts, panels, flags and metavars.

`command` makes of a function what typer takes: each parameter is an option; one that is a dataclass (see
`group`) stands for its fields, and one of `Keywords` for whatever some functions of the library take. Texts
come from the docstring of the command or the dataclass; what these do not speak of, from the places in the
library that they name.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import typer

from circuitvit.cli.library import Argument, arguments, described
from circuitvit.cli.processes import together
from circuitvit.cli.wording import speaking
from circuitvit.errors import OptionError, unknown_name

MANY = 6
"""More functions than this are called scoring methods: no others are so many."""

ELSEWHERE = ("state", "seed", "batch_size", "memory", "progress", "processes")
"""Keywords that commands give by themselves, from `--resume`, `--out` and the panel Run."""


class Given(dict[str, Any]):
    """The keywords that were given on the command line, by name; those that were not are not in it."""


@dataclass(frozen=True)
class Keywords:
    """A parameter that holds keywords of several functions: each becomes an option that says whose it is.

    Attributes:
        panel: of the help page.
        takers: what each function is called on the command line, and its keywords; "" if there is but one.
        flags: as for `command`.
    """

    panel: str
    takers: Mapping[str, Mapping[str, Argument]]
    flags: Mapping[str, str] = field(default_factory=dict)

    def who(self, name: str) -> list[str]:
        """The functions that take a keyword."""
        return [each for each, taken in self.takers.items() if name in taken]

    def argument(self, name: str) -> Argument:
        """A keyword, its text led by who takes it and ended by their default."""
        who = self.who(name)
        own = self.takers[who[0]][name]
        if who == [""]:
            return own._replace(default=None)
        defaults = {each: self.takers[each][name].default for each in who}
        known = {each: value for each, value in defaults.items() if value is not None}
        alike = len(set(defaults.values())) == 1
        told = [f"{value}{'' if alike else f' for {each}'}" for each, value in known.items()]
        default = f" [default: {', '.join(dict.fromkeys(told))}]" if told else ""
        whose = "scoring methods" if len(who) > MANY else ", ".join(who)
        others = "|".join(self.takers[who[0]])
        text = re.sub(rf"`({others})`", lambda match: f"`{_flag(match[1])}`", own.text.rstrip("."))
        return own._replace(text=f"{whose}: {text}.{default}", default=None)

    def names(self) -> list[str]:
        """All keywords that become options, in order of appearance."""
        every = dict.fromkeys(name for taken in self.takers.values() for name in taken)
        alone = set(self.takers) == {""}  # such as a recipe for training, whose batch size is its own
        return [name for name in every if alone or name not in ELSEWHERE]

    def check(self, method: str, given: Iterable[str]) -> None:
        """Refuse keywords that a function does not take.

        Raises:
            OptionError: naming those that do.
        """
        for name in given:
            if method not in (who := self.who(name)):
                users = f"{', '.join(who[:-1])} and {who[-1]}" if len(who) > 1 else who[0]
                flag = self.flags.get(name, _flag(name)).split()[0]
                raise OptionError(f"--method {method} does not use {flag}: it belongs to --method {users}")


class _Source(NamedTuple):
    """Where the options of a command, or of a dataclass, get panel, texts, flags and metavars from."""

    panel: str
    texts: Mapping[str, str]
    places: tuple[str, ...]
    flags: Mapping[str, str]


class _Option(NamedTuple):
    """An option to be: a parameter or field, what the library says of it, and where the rest is from."""

    name: str
    hint: Any
    default: Any
    library: Argument | None
    source: _Source

    @property
    def written(self) -> list[str]:
        """Its flags, and what its value is called if that is not told by the type."""
        flag = _flag(self.name)
        if _plain(self.hint) is bool and self.default is not False:
            flag += f"/--no-{flag.removeprefix('--')}"
        return self.source.flags.get(self.name, flag).split()

    def check(self, value: Any) -> None:
        """Refuse a value that is none of the choices, or a number below 1, or 0 where that means something.

        Raises:
            NameNotFoundError: naming the nearest choice.
            OptionError: naming the option.
        """
        if self.library and self.library.choices and value not in (None, *self.library.choices):
            raise unknown_name(self.library.kind, value, self.library.choices)
        least = 0 if self.name in FROM_0 else 1
        if _plain(self.hint) is int and value is not None and value < least and self.default != -1:
            raise OptionError(f"{self.written[0]} is at least {least}, not {value}")


Class = TypeVar("Class", bound=type[Any])
_GROUPS: dict[type[Any], _Source] = {}

LONGEST = 12
"""Characters of choices that may stand for an option's value: more leave too little room for the text."""

FROM_0 = ("seed", "image", "calibrate", "random", "show_edges", "trees", "controls")
"""Whole numbers that may be 0; all others count something that there must be."""

OUTPUT = ("out", "title", "show_edges", "no_picture", "max_edges")
"""Parameters that say what is written and where, whose panel is always "Output"."""


def group(panel: str, *places: str, **flags: str) -> Callable[[Class], Class]:
    """Make a dataclass a group of options, which a command takes as one argument; it inherits from groups.

    Args:
        panel: of the help page.
        places: in the library that say what its own docstring does not (see `library.arguments`).
        flags: as for `command`.
    """

    def mark(kind: Class) -> Class:
        source = _Source(panel, described(kind.__doc__ or "")[1], places, flags)
        for base in kind.__mro__[1:]:
            if base in _GROUPS:
                _, texts, more, old = _GROUPS[base]
                source = _Source(panel, {**texts, **source.texts}, (*places, *more), {**old, **flags})
        _GROUPS[kind] = source
        return kind

    return mark


def command(
    panel: str, *places: str, texts: Mapping[str, str] | None = None, shares: bool = False, **flags: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make of a function what typer makes a command of.

    Args:
        panel: of the help page, for the function's own parameters.
        places: in the library that say what its docstring does not.
        texts: of parameters that several commands share.
        shares: whether processes that `torchrun` has started share the work.
        flags: such as `model="--model -m NAME"`: the flags of a parameter, and what its value is called.

    Example:
        >>> @group("Size")
        ... @dataclass
        ... class Size:
        ...     width: int
        ...     height: int = 1
        >>> def show(size: Size, title: str) -> None: ...
        >>> list(inspect.signature(command("Show")(show)).parameters)
        ['width', 'height', 'title']
    """

    def make(function: Callable[..., None]) -> Callable[..., None]:
        summary, told = described(function.__doc__ or "")
        own = _Source(panel, {**(texts or {}), **told}, places, flags)
        # Not of the function itself: Python 3.10 makes every hint optional whose default is None.
        bare = SimpleNamespace(__annotations__=function.__annotations__)
        hints = get_type_hints(bare, function.__globals__, include_extras=True)
        parts = {
            name: _options(name, hints[name], parameter.default, own)
            for name, parameter in inspect.signature(function).parameters.items()
        }
        every = [option for part in parts.values() for option in part]
        written = {each.name: _long(each.written) for each in every if _long(each.written)}

        @functools.wraps(function)
        def flat(**values: Any) -> None:
            with speaking(written), together(shares):
                run(values)

        def run(values: Mapping[str, Any]) -> None:
            for option in every:
                option.check(values[option.name])
            whole: dict[str, Any] = {}
            for name, part in parts.items():
                given = {option.name: values[option.name] for option in part}
                if _keywords(hints[name]):
                    whole[name] = Given({each: value for each, value in given.items() if value is not None})
                else:
                    whole[name] = hints[name](**given) if hints[name] in _GROUPS else given[name]
            function(**whole)

        flat.__doc__ = summary
        parameters = [_parameter(option) for option in every]
        vars(flat)["__signature__"] = inspect.Signature(parameters)
        flat.__annotations__ = {each.name: each.annotation for each in parameters}
        return flat

    return make


def _options(name: str, hint: Any, default: Any, own: _Source) -> list[_Option]:
    """The options of one parameter of a command."""
    if keywords := _keywords(hint):
        source = _Source(keywords.panel, {}, (), keywords.flags)
        each = [keywords.argument(name) for name in keywords.names()]
        return [_Option(one.name, one.type, None, one, source) for one in each]
    if hint not in _GROUPS:
        return [_Option(name, hint, default, _library(own, name), own)]
    source = _GROUPS[hint]
    inner = get_type_hints(hint, include_extras=True)
    return [
        _Option(
            each.name,
            inner[each.name],
            inspect.Parameter.empty if each.default is MISSING else each.default,
            _library(source, each.name),
            source,
        )
        for each in fields(hint)
    ]


def _library(source: _Source, name: str) -> Argument | None:
    """What the library says of a parameter, at the first of the places that know it."""
    return next((known[name] for place in source.places if name in (known := arguments(place))), None)


def _parameter(option: _Option) -> inspect.Parameter:
    """One parameter for typer: its type, and an option with text, panel, flags and metavar."""
    name, hint, default, library, source = option
    text = source.texts.get(name) or (library.text if library else "")
    if not re.match(r"[\w-]+[:,] ", text):  # the name of a method or of a choice stays as it is written
        text = text[:1].upper() + text[1:]
    more = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    if more:
        more[0].help = more[0].help or text  # an argument, which is known by its place
    else:
        choices = library.choices if library else ()
        joined = "|".join(choices)
        usual = joined if 0 < len(joined) <= LONGEST else "NAME" if choices else _METAVARS.get(_plain(hint))
        made = typer.Option(
            *[each for each in option.written if each.startswith("-")],
            help=text,
            metavar=next((each for each in option.written if not each.startswith("-")), usual),
            rich_help_panel="Output" if name in OUTPUT else source.panel,
            autocompletion=(lambda: list(choices)) if choices else None,
        )
        optional = default is None and type(None) not in get_args(hint)
        hint = Annotated[hint | None if optional else hint, made]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


_METAVARS: dict[Any, str] = {int: "N", float: "NUMBER", Path: "PATH", str: "TEXT"}


def _keywords(hint: Any) -> Keywords | None:
    return next((each for each in get_args(hint)[1:] if isinstance(each, Keywords)), None)


def _long(written: list[str]) -> str:
    """The long flag of an option; of a switch, the one that turns it on."""
    return next((each.split("/")[0] for each in written if each.startswith("--")), "")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _plain(hint: Any) -> Any:
    """The type of an option without `| None`."""
    inner = [each for each in get_args(hint) if each is not type(None)]
    return inner[0] if type(None) in get_args(hint) and len(inner) == 1 else hint

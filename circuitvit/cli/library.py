"""What the library says of its own arguments: names, types, defaults and texts, for the options of commands.

They are read from the source of a function or a dataclass, which is parsed and never imported: help needs no
torch, and nothing is written down a second time.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from circuitvit.attribution.methods import METHODS

PACKAGE = Path(__file__).resolve().parents[1]


class Argument(NamedTuple):
    """An argument of a function, or a field of a dataclass, as its source tells it.

    Attributes:
        name: of the argument.
        type: that its value has on the command line; `str` for whatever is none of the simple types.
        choices: values of a `Literal`; empty for other types.
        kind: what such a value is called, as the alias of the `Literal` is.
        default: None also where it is no plain value.
        text: from the docstring; "" if it says nothing.
    """

    name: str
    type: Any
    choices: tuple[str, ...]
    kind: str
    default: Any
    text: str


@functools.cache
def arguments(place: str) -> dict[str, Argument]:
    """The arguments of a function or method, or the fields of a dataclass, by name.

    Args:
        place: a room and a name in it, such as "pruning.find" or "graph.EdgeScores.top"; or a file and a
            name, such as "attribution.paths:eap_ig".

    Raises:
        LookupError: if there is none.

    Example:
        >>> arguments("pruning.acdc")["divergence"].choices
        ('kl', 'metric')
    """
    room, name, *inner = place.split(".") if ":" not in place else place.split(":")
    module, node = _defined(f"circuitvit.{room}", name)
    for each in inner:
        assert isinstance(node, ast.ClassDef), f"{place}: {node} has nothing inside"
        (node,) = (part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == each)
    assert isinstance(node, (ast.FunctionDef, ast.ClassDef)), f"{place} is neither a function nor a class"
    texts = described(ast.get_docstring(node) or "")[1]
    told = (
        Argument(name, *_type(module, name, annotation), _value(default), texts.get(name, ""))
        for name, annotation, default in _annotated(node)
    )
    return {each.name: each for each in told}


def _annotated(
    node: ast.FunctionDef | ast.ClassDef,
) -> Iterator[tuple[str, ast.expr | None, ast.expr | None]]:
    """Name, annotation and default of each argument or field."""
    if isinstance(node, ast.ClassDef):
        for line in node.body:
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                yield line.target.id, line.annotation, line.value
        return
    plain, defaults = node.args.args, node.args.defaults
    every = [*[None] * (len(plain) - len(defaults)), *defaults, *node.args.kw_defaults]
    for argument, default in zip((*plain, *node.args.kwonlyargs), every, strict=True):
        yield argument.arg, argument.annotation, default


@functools.cache
def scoring_methods() -> dict[str, dict[str, Argument]]:
    """The keywords of every scoring method, by its name in `circuitvit.METHODS`."""
    found = {}
    for name, method in METHODS.items():
        known = arguments(f"attribution.{method.place}")
        found[name] = {each: known[each] for each in known if each not in ("prepared", "how")}
    return found


def described(docstring: str) -> tuple[str, dict[str, str]]:
    """A docstring without its section on arguments or attributes, and that section by name.

    Example:
        >>> described("Find it.\\n\\nArgs:\\n    seed: of the\\n        training.\\n\\nRaises:\\n    None.")
        ('Find it.', {'seed': 'of the training.'})
    """
    kept: list[str] = []
    texts: dict[str, str] = {}
    section, name = "", ""
    for line in inspect.cleandoc(docstring).splitlines():
        if line.endswith(":") and line[:-1] in ("Args", "Attributes", "Raises", "Returns", "Example"):
            section = line[:-1]
        elif line and not line.startswith(" "):
            section = ""
        if not section:
            kept.append(line)
        elif section in ("Args", "Attributes") and line.startswith("    "):
            if not line.startswith("     "):
                name, _, line = line.strip().lstrip("*").partition(":")
            texts[name] = f"{texts.get(name, '')} {line.strip()}".strip()
    return "\n".join(kept).strip(), texts


@functools.cache
def _parsed(module: str) -> ast.Module:
    path = PACKAGE.joinpath(*module.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def _defined(module: str, name: str) -> tuple[str, ast.stmt]:
    """The module that defines a name which another can import, and the statement that does."""
    body = list(_parsed(module).body)
    for node in body:
        match node:
            case ast.If():  # TYPE_CHECKING
                body += node.body
            case ast.FunctionDef() | ast.ClassDef() if node.name == name:
                return module, node
            case ast.Assign(targets=[ast.Name(id=target)]) | ast.AnnAssign(target=ast.Name(id=target)):
                if target == name:
                    return module, node
            case ast.ImportFrom(module=str(source), names=names) if source.startswith("circuitvit"):
                for alias in names:
                    if name == (alias.asname or alias.name):
                        return _defined(source, alias.name)
    raise LookupError(f"{module} has no {name}")


_TYPES: dict[str, Any] = {"bool": bool, "int": int, "float": float, "Path": Path}


def _type(module: str, name: str, node: ast.expr | None) -> tuple[Any, tuple[str, ...], str]:
    """The type that a value has on the command line, its choices, and what these are called."""
    members = [] if node is None else [each for each in _members(node) if ast.unparse(each) != "None"]
    for each in members:
        kind = name.replace("_", " ")
        if isinstance(each, ast.Name) and (alias := _alias(module, each.id)) is not None:
            kind, each = each.id.lower(), alias
        if isinstance(each, ast.Subscript) and ast.unparse(each.value) == "Literal":
            values = ast.literal_eval(each.slice)
            return str, values if isinstance(values, tuple) else (values,), kind
    names = [ast.unparse(each) for each in members]
    return (_TYPES.get(names[0], str) if len(names) == 1 else str), (), name


def _alias(module: str, name: str) -> ast.expr | None:
    """What a name of the library stands for, if it is another type's."""
    try:
        _, node = _defined(module, name)
    except LookupError:
        return None
    return node.value if isinstance(node, ast.Assign) else None


def _members(node: ast.expr) -> list[ast.expr]:
    """The parts of `A | B | C`."""
    if isinstance(node, ast.BinOp):
        return [*_members(node.left), *_members(node.right)]
    return [node]


def _value(node: ast.expr | None) -> Any:
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None

"""What edits are, for the hash of an edited model: two models that may differ are never taken for one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from circuitvit.models.changes import Add, Causal, Change, Clamp, KnockOut

MOST = 4
"""How deep to look into what a function has closed over, and calls."""

LIBRARIES = {"torch", "numpy", "circuitvit", "timm", "transformers", "open_clip", "torchvision", "sklearn"}
"""Whose functions are told by their names."""


def description(changes: Sequence[Change]) -> tuple[str, list[Tensor]]:
    """What edits are, for a hash: in words, and the tensors that are in them.

    A function is told by its code, what it has closed over, and what it reads of its module; one that
    cannot be told so, by itself.
    """
    said: list[str] = []
    tensors: list[Tensor] = []
    for change in changes:
        said.append(f"{change.name}|{change.rows.kinds}|{change.columns.kinds}")
        tensors += [each.mask for each in (change.rows, change.columns) if each.mask is not None]
        said.append(_said(change.value, tensors))
    return "||".join(said), tensors


def said_of(value: Any) -> tuple[str, list[Tensor]]:
    """What something is, for a hash: in words, and the tensors that are in it."""
    tensors: list[Tensor] = []
    return _said(value, tensors), tensors


def _said(value: Any, tensors: list[Tensor], depth: int = 0) -> str:
    inner = partial(_said, tensors=tensors, depth=depth + 1)
    match value:
        case Tensor():
            tensors.append(value.detach())
            return "tensor"
        case np.ndarray() if value.dtype.kind in "biuf":
            return inner(torch.as_tensor(value))
        case None | bool() | int() | float() | str():
            return repr(value)
        case Add() | Clamp() | Causal() | KnockOut():
            own = [_said(each, tensors) for name, each in vars(value).items() if name != "tokens"]
            return f"{type(value).__name__}({', '.join(own)})"
        case ModuleType() | type() | BuiltinFunctionType():
            return f"{getattr(value, '__module__', '')}.{value.__name__}"
    if depth > MOST:
        return f"{value!r} {id(value)}"
    match value:
        case nn.Module():
            return f"{value!r}{inner(type(value).forward)}{inner(list(value.state_dict().values()))}"
        case partial():
            return f"partial{[inner(each) for each in (value.func, value.args, value.keywords)]}"
        case list() | tuple():
            return f"{[inner(each) for each in value]}"
        case dict():
            return f"{[(inner(key), inner(each)) for key, each in value.items()]}"
        case MethodType():
            return f"{inner(value.__func__)}{inner(value.__self__)}"
        case FunctionType():
            if depth and value.__module__.partition(".")[0] in LIBRARIES:
                return f"{value.__module__}.{value.__qualname__}"
            cells = [inner(cell.cell_contents) for cell in value.__closure__ or ()]
            known = value.__globals__
            read = [inner(known[name]) for name in _names(value.__code__) if name in known]
            defaults = [inner(each) for each in (value.__defaults__, value.__kwdefaults__)]
            return f"{_written(value.__code__)}{cells}{read}{defaults}"
    if hasattr(value, "__dict__"):
        called = inner(type(value).__call__) if callable(value) else ""
        return f"{type(value)}{called}{_said(vars(value), tensors, depth + 2)}"
    return f"{value!r} {id(value)}"


def _written(code: CodeType) -> str:
    """A function's code, with that of the functions in it."""
    constants = [_written(each) if isinstance(each, CodeType) else repr(each) for each in code.co_consts]
    return f"{code.co_code.hex()}{constants}{code.co_names}"


def _names(code: CodeType) -> list[str]:
    """Names that a function, or one in it, may read from its module."""
    inside = [_names(each) for each in code.co_consts if isinstance(each, CodeType)]
    return list(dict.fromkeys([*code.co_names, *(name for names in inside for name in names)]))

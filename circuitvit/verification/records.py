"""Frozen dataclasses to JSON and back, with the JSON schema read off their type hints.

The dataclass is the only place where a field is declared, so what is written, what is accepted and what is
documented cannot drift apart. Known are text, numbers, truth values, None, tuples of one kind of item,
mappings of JSON values, and dataclasses of these.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

_PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean", types.NoneType: "null"}


def to_json(value: Any) -> Any:
    """A value as lists, dictionaries, text and numbers, ready for `json.dumps`.

    Example:
        >>> from circuitvit.verification.statistics import Estimate
        >>> to_json((Estimate(0.5), 2))
        [{'value': 0.5, 'low': None, 'high': None}, 2]
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: to_json(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    return value


def from_json(kind: Any, value: Any) -> Any:
    """The inverse of `to_json` for a value that fits `json_schema(kind)`; unknown fields are passed over.

    Example:
        >>> from circuitvit.verification.statistics import Estimate
        >>> from_json(Estimate, {"value": 0.5, "low": None, "high": None, "later": 1})
        Estimate(value=0.5, low=None, high=None)
    """
    if isinstance(kind, type) and is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{key: from_json(hint, value[key]) for key, hint in hints.items() if key in value})
    choices = _choices(kind)
    if choices:
        (inner,) = [choice for choice in choices if choice is not types.NoneType]
        return None if value is None else from_json(inner, value)
    if get_origin(kind) is tuple:
        return tuple(from_json(get_args(kind)[0], item) for item in value)
    return float(value) if kind is float else value  # JSON writes 1.0 and 1 alike in other tools


def json_schema(kind: Any) -> dict[str, Any]:
    """The JSON schema of what `to_json` gives for values of a type.

    Example:
        >>> json_schema(tuple[int, ...])
        {'type': 'array', 'items': {'type': 'integer'}}
    """
    if isinstance(kind, type) and is_dataclass(kind):
        hints = get_type_hints(kind)
        return {
            "type": "object",
            "required": [each.name for each in fields(kind) if _required(each)],
            "properties": {each.name: json_schema(hints[each.name]) for each in fields(kind)},
        }
    choices = _choices(kind)
    if choices:
        return {"anyOf": [json_schema(choice) for choice in choices]}
    if get_origin(kind) is tuple:
        return {"type": "array", "items": json_schema(get_args(kind)[0])}
    return {"type": _PLAIN[kind]} if kind in _PLAIN else {"type": "object"}


def _choices(kind: Any) -> tuple[Any, ...]:
    """The members of `X | None`, in either spelling; nothing for other types."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else ()


def _required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING

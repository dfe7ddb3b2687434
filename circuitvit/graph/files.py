"""Reading and writing files: whole or not at all, JSON only, validated on load, never executable."""

from __future__ import annotations

import contextlib
import json
import os
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np

from circuitvit.errors import CircuitViTError, FileError

TEXT = {"type": "string"}
COUNT = {"type": "integer", "minimum": 0}
MAX_BYTES = 256 * 2**20  # far above any real file; a larger one is not read into memory


def clean(text: str) -> str:
    """`text` on one line, without characters that are illegal in XML or that reorder the text around them.

    Control characters and lone surrogates have no place in XML 1.0, and bidirectional overrides can make
    a label read as something it is not. White space of every kind becomes one space.

    Example:
        >>> clean("a\\n b\\x00\\u202ec")
        'a b c'
    """
    kept = []
    for letter in text:
        category = unicodedata.category(letter)
        if category in ("Cf", "Cn", "Co"):  # format characters (joiners, overrides), unassigned, private
            continue
        kept.append(" " if category in ("Cc", "Cs", "Zl", "Zp", "Zs") else letter)
    return " ".join("".join(kept).split())


def cleaned(value: Any) -> Any:
    """A JSON value with every text in it, also a name, as `clean` leaves it."""
    if isinstance(value, Mapping):
        return {clean(str(name)): cleaned(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [cleaned(each) for each in value]
    return clean(value) if isinstance(value, str) else value


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Write a file whole or not at all: to a file beside it first, which then takes its place.

    Raises:
        FileError: if the folder is missing or cannot be written.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileError(f"cannot write {path}: there is no folder {path.parent}")
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise FileError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def write_json(path: str | Path, content: Mapping[str, Any]) -> Path:
    """Write JSON whole or not at all; numbers of numpy become plain ones.

    Raises:
        FileError: if the folder is missing or cannot be written, or a number is NaN or infinite.
    """
    try:
        text = json.dumps(content, indent=1, allow_nan=False, default=_plain)
    except ValueError as error:
        raise FileError(f"cannot write {path}: it would hold a number that is NaN or infinite") from error
    except TypeError as error:
        raise FileError(f"cannot write {path}: {error}") from error
    return write_bytes(path, f"{text}\n".encode())


def _plain(value: object) -> Any:
    """What JSON can hold instead of numpy's numbers and arrays, which reach us as settings of a method."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not a JSON value")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileError: if the file is missing, too large, not JSON, or not an object.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise FileError(f"{path}: {size / 2**20:.0f} MiB is too large for one of our files")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise FileError(f"{path} is not a JSON file: {error}") from error
    return parse_json(path, text)


def parse_json(path: str | Path, text: str) -> dict[str, Any]:
    """The JSON object that a file holds, as its text or in its header.

    Raises:
        FileError: naming the file, if the text is not JSON, or no object.
    """
    try:
        content = json.loads(text, parse_constant=_refuse, parse_float=_finite, parse_int=_moderate)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise FileError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    return value if np.isfinite(value) else _refuse(digits[:40])


def _moderate(digits: str) -> int:
    """An integer that fits a float, so that it can stand where a score is expected."""
    return int(digits) if len(digits) < 300 else int(_refuse(f"{digits[:40]}..."))


def record(required: str, closed: bool = False, **properties: Any) -> dict[str, Any]:
    """A JSON schema of an object: the names that it needs, and what each of its names holds.

    Example:
        >>> record("seed", seed={"type": "integer"})["required"]
        ['seed']
    """
    schema = {"type": "object", "required": required.split(), "properties": properties}
    return {**schema, "additionalProperties": False} if closed else schema


def check_version(
    path: str | Path, content: Mapping[str, Any], schema: Mapping[str, Any], version: str
) -> None:
    """Refuse the content of a file that names another schema, or does not fit its own.

    Raises:
        FileError: naming the file, and the place in it.
    """
    found = content.get("schema")
    if found != version:
        said = f"says {found[:80]!r}" if isinstance(found, str) else "names no schema"
        raise FileError(f"{path}: this version of circuitvit reads {version!r}, the file {said}")
    check_shape(path, content, schema)


def check_shape(path: str | Path, content: Any, schema: Mapping[str, Any]) -> None:
    """Refuse the content of a file that does not fit a JSON schema.

    Raises:
        FileError: naming the file, and the place in it.
    """
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(content))
    if error is not None:
        place = "/".join(str(part) for part in error.absolute_path) or "the file"
        raise FileError(f"{path}: {place}: {error.message[:300]}")


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Make our own errors within a `FileError` that names the file: here they are faults of the file."""
    try:
        yield
    except CircuitViTError as error:
        if isinstance(error, FileError) and str(error).startswith(str(path)):
            raise
        raise FileError(f"{path}: {error}") from error

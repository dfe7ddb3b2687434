"""What every result can do: be a table, be written to a file and read back, and be shown in short.

A result is a frozen dataclass. Files and checks are read off its type hints (see `records.py`). What
a class says for itself is its table, `records()`, and which dimension of its arrays each field runs along.

Example:
    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True, repr=False)
    ... class Sizes(Result):
    ...     names: tuple[str, ...]
    ...     edges: tuple[int, ...]
    ...
    ...     def records(self):
    ...         return cells({"name": self.names}, edges=np.array(self.edges))
    >>> Sizes(("a", "b"), (3, 5))
    Sizes(names=('a', 'b'), edges=(3, 5))
    >>> list(Sizes(("a", "b"), (3, 5)).records())
    [{'name': 'a', 'edges': 3}, {'name': 'b', 'edges': 5}]
"""

from __future__ import annotations

import csv
import io
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import chain, islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from circuitvit.errors import FileError, OptionError
from circuitvit.graph import notebook
from circuitvit.graph.files import naming, parse_json, read_json, write_bytes, write_json
from circuitvit.graph.records import from_json, to_json

if TYPE_CHECKING:
    import pandas

Cell = str | int | float | bool | None
Record = dict[str, Cell]
"""One row of a table: names of columns, and plain values."""

R = TypeVar("R", bound="Result")

ROWS_SHOWN = 10
"""Of a table in a notebook."""

OTHER_ENDINGS = (".csv", ".safetensors")
"""What a class that writes JSON in its own way leaves to `Result`."""

_NO_SUCH_NUMBERS = (TypeError, AttributeError)
"""What safetensors raises where NumPy has no such type: bfloat16, float8."""

LONGEST = 160
"""Letters of one field in a short form."""


class Result(ABC):
    """What the library gives back, as data.

    Class attributes:
        along: fields, each with the dimension that its entries run along, such as "rows:row columns:column".
        may_be_nan: the fields that may hold NaN or infinite numbers.
        version: of the file; it goes up when an older reader would misunderstand it.
        kind: what a file calls the class; by default its name in small letters.
    """

    along: ClassVar[str] = ""
    may_be_nan: ClassVar[str] = ""
    version: ClassVar[int] = 1
    kind: ClassVar[str] = ""

    @abstractmethod
    def records(self) -> Iterator[Record]:
        """The result as a long table, row by row; all rows have the same columns."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values: what a `.json` file holds."""
        return {"schema": schema_of(type(self)), **to_json(self)}

    def to_dataframe(self) -> pandas.DataFrame:
        """The table of `records` as a `pandas.DataFrame`.

        Raises:
            OptionError: if pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise OptionError(
                "to_dataframe() needs pandas: pip install pandas; records() gives the same table without it"
            ) from error
        return pandas.DataFrame(list(self.records()))

    def save(self, path: str | Path) -> Path:
        """Write the result; the ending chooses the format.

        `.json` holds everything, arrays as lists; `.safetensors` holds everything, arrays bit by bit, and is
        the one for large arrays; `.csv` is the table of `records`, which is not read back.

        Raises:
            OptionError: for another ending.
            FileError: if the file cannot be written.
        """
        path = Path(path)
        if path.suffix == ".csv":
            return write_bytes(path, as_csv(self.records()).encode())
        with naming(path):
            if path.suffix == ".json":
                return write_json(path, {"schema": schema_of(type(self)), **to_json(self)})
            if path.suffix == ".safetensors":
                arrays: dict[str, Any] = {}
                said = {"schema": schema_of(type(self)), **to_json(self, arrays)}
                return write_bytes(path, _safetensors(arrays, json.dumps(said, allow_nan=False)))
        kind = type(self).__name__
        raise OptionError(f"a {kind} is saved as .json, .safetensors or .csv, not as {path.name!r}")

    @classmethod
    def load(cls: type[R], path: str | Path) -> R:
        """Read what `save` wrote as `.json` or `.safetensors`.

        Raises:
            FileError: if the file is missing, damaged, holds another kind of result, or does not fit itself.
        """
        path = Path(path)
        if path.suffix == ".json":
            content = read_json(path)
            _check_kind(path, content, cls)
            return _read(cls, path, content)
        if path.suffix != ".safetensors":
            raise FileError(f"{path}: a {cls.__name__} is read from .json or .safetensors")
        try:
            with safe_open(path, "np") as arrays:
                content = parse_json(path, (arrays.metadata() or {}).get("result", "{}"))
                _check_kind(path, content, cls)
                return _read(cls, path, content, arrays)
        except (SafetensorError, OSError) as error:
            raise FileError(f"cannot read {path}: {error}") from error

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(_short_fields(self))})"

    def _repr_html_(self) -> str:
        title = repr(self).partition("\n")[0]
        found = list(islice(self.records(), ROWS_SHOWN + 1))
        rows: list[Sequence[object]] = [[notebook.heading(name) for name in row] for row in found[:1]]
        rows += [[_told(value) for value in row.values()] for row in found[:ROWS_SHOWN]]
        return notebook.card(title, [*rows, ["..."]] if len(found) > ROWS_SHOWN else rows)


class ToldResult(Result):
    """A result that can be told as a text as well: `.md` is one more ending of its files."""

    @abstractmethod
    def _lines(self) -> Iterator[str]:
        """The text as Markdown, line by line."""

    def to_markdown(self) -> str:
        """All of it in words: what was found, figures, tables and what to bear in mind."""
        return "\n".join(self._lines()) + "\n"

    def save(self, path: str | Path) -> Path:
        """Write the result as `.json`, `.safetensors` or `.csv`, or as a text, `.md`.

        Raises:
            OptionError: for another ending.
            FileError: if the file cannot be written.
        """
        path = Path(path)
        return write_bytes(path, self.to_markdown().encode()) if path.suffix == ".md" else super().save(path)


# -- tables --------------------------------------------------------------------------------------


def cells(axes: Mapping[str, Sequence[Any]], **arrays: NDArray[Any] | None) -> Iterator[Record]:
    """One row for every cell of arrays of one shape: where it lies along each axis, and its numbers.

    Args:
        axes: the columns that say where, in the order of the dimensions, and what stands in them.
        **arrays: the other columns; None leaves one empty.

    Example:
        >>> next(cells({"layer": (0, 1), "head": "ab"}, score=np.array([[0.5, 1.0], [0.0, 2.0]])))
        {'layer': 0, 'head': 'a', 'score': 0.5}
    """
    for place in product(*(range(len(names)) for names in axes.values())):
        where = {axis: names[at] for (axis, names), at in zip(axes.items(), place, strict=True)}
        yield where | {name: None if each is None else each[place].item() for name, each in arrays.items()}


def as_csv(rows: Iterator[Record]) -> str:
    """Rows of the same columns as CSV with a heading; nothing where there are none."""
    first = next(rows, None)
    lines = io.StringIO()
    if first is not None:
        table = csv.DictWriter(lines, list(first), lineterminator="\n")
        table.writeheader()
        table.writerows(chain([first], rows))
    return lines.getvalue()


# -- files ---------------------------------------------------------------------------------------


def schema_of(kind: type[Result]) -> str:
    """What a file of a class says it is.

    Example:
        >>> from circuitvit.graph import NodeScores
        >>> schema_of(NodeScores)
        'circuitvit.node_scores/1'
    """
    name = kind.kind or re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).lower()
    return f"circuitvit.{name}/{kind.version}"


def _safetensors(arrays: Mapping[str, Any], said: str) -> bytes:
    """The file; through torch only where there is a tensor, which numpy may have no type for."""
    if not any(hasattr(each, "detach") for each in arrays.values()):
        from safetensors.numpy import save

        return save(dict(arrays), {"result": said})
    from safetensors.torch import save as save_tensors
    from torch import from_numpy

    tensors = {
        name: from_numpy(each) if isinstance(each, np.ndarray) else each for name, each in arrays.items()
    }
    return save_tensors(tensors, {"result": said})


def _check_kind(path: Path, content: Mapping[str, Any], kind: type[Result]) -> None:
    wanted, found = schema_of(kind), content.get("schema")
    if found == wanted:
        return
    if not isinstance(found, str):
        raise FileError(f"{path} is no file of a {kind.__name__}: it names no schema ({wanted!r} is read)")
    name, own = (each.removeprefix("circuitvit.").partition("/")[0] for each in (found, wanted))
    if name == own:
        raise FileError(f"{path}: this version of circuitvit reads {wanted!r}, the file says {found[:80]!r}")
    other = "".join(word.capitalize() for word in name.split("_"))
    raise FileError(f"{path} holds a {other[:80]!r} ({found[:80]!r}), not a {kind.__name__!r} ({wanted!r})")


def _read(kind: type[R], path: Path, content: Mapping[str, Any], arrays: Any = None) -> R:
    def tensor(name: str, torch: bool) -> Any:
        if name not in arrays.keys():  # noqa: SIM118  # a file's handle, which is no mapping
            raise FileError(f"there is no tensor {name[:80]!r}")
        if not torch:
            return arrays.get_tensor(name)
        with safe_open(path, "pt") as tensors:
            return tensors.get_tensor(name)

    try:
        with naming(path):
            found: R = from_json(kind, dict(content), None if arrays is None else tensor)
            return found
    except (RecursionError, MemoryError, *_NO_SUCH_NUMBERS) as error:
        raise FileError(f"{path} does not hold what it says: {error}") from error


# -- short forms ---------------------------------------------------------------------------------


def _short_fields(value: Any) -> Iterator[str]:
    for each in fields(value):
        yield f"{each.name}={short(getattr(value, each.name))}"


def short(value: object) -> str:
    """A value in a few words: of arrays type and shape, of long tuples and texts the beginning.

    Example:
        >>> short(np.zeros((2, 3))), short(tuple(range(100))), short(2 / 3)
        ('float64 2 x 3', '(0, 1, 2, ... 100 in all)', '0.6667')
    """
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        size = " x ".join(map(str, value.shape)) or "number"
        return f"{str(value.dtype).rpartition('.')[2]} {size}"
    if isinstance(value, (tuple, list)):
        shown = [short(each) for each in value[: 3 if len(value) > 6 else 6]]
        more = f", ... {len(value)} in all" if len(value) > 6 else "," * (len(value) == 1)
        return _cut(f"({', '.join(shown)}{more})")
    if isinstance(value, Mapping) and not isinstance(value, Result):
        names = ", ".join(map(str, islice(value, 3)))
        return _cut(f"{{{names}{f', ... {len(value)} in all' if len(value) > 3 else ''}}}")
    if is_dataclass(value) and not isinstance(value, type) and type(value).__repr__ is object.__repr__:
        return _cut(f"{type(value).__name__}({', '.join(_short_fields(value))})")
    text = repr(value)
    return f"{value:.4g}" if isinstance(value, float) and len(text) > 8 else _cut(text)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 4]} ..."


def _told(value: Cell) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)

"""Dataclasses to JSON and back, checked by their type hints.

The dataclass is the only place where a field is declared, so what is written, what is accepted and what is
documented cannot drift apart. Known are text, numbers, truth values, None, paths, ranges, arrays and tensors,
tuples, mappings, choices (`Literal`, `X | Y`), and dataclasses of these. A class with `to_record` and
`from_record` has a form of its own.

Two things that a hint cannot say stand in the class: `along`, whose entries run along which dimension of its
arrays, and `may_be_nan`, the fields that may hold NaN or infinity; everywhere else numbers are finite. JSON
has no such numbers, so they are the texts "nan", "inf" and "-inf".
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from circuitvit.errors import FileError, OptionError, counted

MOST_NUMBERS = 4_000_000
"""In one array of a JSON file; a larger one makes a file that nobody wants to read."""

SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

Tensors = Callable[[str, bool], Any]
"""Gives what a file keeps beside its JSON, by name: an array, or where that is asked for a torch tensor."""

_UNREADABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_PLAIN: Mapping[type, str] = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


# -- writing -------------------------------------------------------------------------------------


def to_json(value: Any, aside: dict[str, Any] | None = None, place: str = "", nan: bool = False) -> Any:
    """A value as lists, dictionaries, text and numbers, ready for `json.dumps`.

    Args:
        value: of a kind that this module knows.
        aside: takes the arrays, by their places, where they are not to stand in the JSON.
        place: of the value, for messages.
        nan: whether it may hold NaN or infinity.

    Raises:
        FileError: for a value of another kind, or one that is not finite and should be.

    Example:
        >>> import numpy as np
        >>> to_json({"share": 0.5, "values": np.array([[1.0], [2.0]])})
        {'share': 0.5, 'values': {'dtype': 'float64', 'shape': [2, 1], 'values': [1.0, 2.0]}}
    """
    if hasattr(value, "to_record"):
        return value.to_record()
    if is_dataclass(value) and not isinstance(value, type):
        loose = getattr(value, "may_be_nan", "").split()
        named = {"class": type(value).__name__} if _has_relatives(type(value)) else {}
        return named | {
            each.name: to_json(getattr(value, each.name), aside, _in(place, each.name), each.name in loose)
            for each in fields(value)
        }
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {_readable(key): to_json(each, aside, _in(place, key), nan) for key, each in value.items()}
        return [[key, to_json(each, aside, _in(place, key), nan)] for key, each in value.items()]
    if isinstance(value, (tuple, list)):
        return [to_json(each, aside, _in(place, at), nan) for at, each in enumerate(value)]
    if isinstance(value, np.generic):
        return to_json(value.item(), aside, place, nan)
    if isinstance(value, np.ndarray) or _is_tensor(value):
        return _array_to_json(value, aside, place, nan)
    return _plain_to_json(value, place, nan)


def _plain_to_json(value: Any, place: str, nan: bool) -> Any:
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        return _readable(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        if not nan:
            raise FileError(f"{place or 'a number'} is {value}, which no file can hold there")
        return str(value)
    if isinstance(value, range):
        return [value.start, value.stop, value.step]
    if isinstance(value, Path):
        return _readable(str(value))
    raise FileError(f"{place or 'the value'} is a {type(value).__name__}, which cannot be written to a file")


def _array_to_json(array: Any, aside: dict[str, Any] | None, place: str, nan: bool) -> dict[str, Any]:
    """An array where it stands, its numbers in one row; or its name, if arrays are put aside."""
    if _is_tensor(array):
        array = array.detach().cpu().contiguous()
        floats, dtype = array.is_floating_point(), str(array.dtype).rpartition(".")[2]
        finite = not floats or bool(array.isfinite().all())
    else:
        array = np.array(array, order="C")
        floats, dtype = array.dtype.kind == "f", array.dtype.name
        finite = not floats or bool(np.isfinite(array).all())
    if not finite and not nan:
        raise FileError(f"{place or 'an array'} holds NaN or infinite numbers, which no file can hold there")
    if aside is not None:
        while place in aside:  # names with slashes in them can make two places one
            place += "_"
        aside[place] = array
        return {"tensor": place}
    shape = [int(size) for size in array.shape]
    if math.prod(shape) > MOST_NUMBERS:
        raise FileError(f"{place or 'an array'} has {math.prod(shape):,} numbers: save it as .safetensors")
    values = array.reshape(-1).tolist()
    if dtype == "bool":
        return {"dtype": dtype, "shape": shape, "values": "".join("01"[each] for each in values)}
    return {"dtype": dtype, "shape": shape, "values": values if finite else [*map(_special, values)]}


def _special(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _readable(text: str) -> str:
    """A text without characters that hide or reorder what is around them."""
    return _UNREADABLE.sub("\ufffd", text)


# -- reading -------------------------------------------------------------------------------------


def from_json(
    kind: Any, value: Any, tensors: Tensors | None = None, place: str = "", nan: bool = False
) -> Any:
    """The inverse of `to_json`, for whatever a file holds; fields that are not known are passed over.

    Args:
        kind: the type hint.
        value: parsed JSON.
        tensors: gives the arrays that stand aside.
        place: of the value, for messages.
        nan: whether NaN and infinity are allowed.

    Raises:
        FileError: naming the first place where the value does not fit the hint.

    Example:
        >>> from_json(tuple[int, ...], [1, "2"])
        Traceback (most recent call last):
        ...
        circuitvit.errors.FileError: 1: expected a whole number, found '2'
    """
    if hasattr(get_origin(kind), "__value__"):  # a name for a type, as `NDArray` is from NumPy 2.5 on
        kind = get_origin(kind).__value__[get_args(kind)]
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if kind in (None, types.NoneType):
        return None if value is None else _refuse(place, "null", value)
    if origin in (Union, types.UnionType):
        return _choice(inner, value, tensors, place, nan)
    if origin is Literal:
        known = any(type(each) is type(value) and each == value for each in inner)
        return value if known else _refuse(place, f"one of {', '.join(map(repr, inner))}", value)
    if _is_array(kind):
        return _array(kind, value, tensors, place, nan)
    if hasattr(kind, "from_record"):
        return kind.from_record(_object(value, place), place)
    if isinstance(kind, type) and is_dataclass(kind):
        return _dataclass(kind, _object(value, place), tensors, place)
    if origin is not None and issubclass(origin, Mapping):
        return _mapping(inner, value, tensors, place, nan)
    if origin is not None and issubclass(origin, Sequence):
        return _items(origin, inner, value, tensors, place, nan)
    return _plain(kind, value, place, nan)


def _plain(kind: Any, value: Any, place: str, nan: bool) -> Any:
    if kind is float and isinstance(value, str) and value in SPECIAL:
        return SPECIAL[value] if nan else _refuse(place, "a finite number", value)
    if kind is float and type(value) in (int, float):  # other tools write 1.0 and 1 alike
        return float(value)
    if kind is int and type(value) is float and value.is_integer():
        return int(value)
    if kind is range:
        ends = from_json(tuple[int, int, int], value, place=place)
        return range(*ends) if ends[2] else _refuse(place, "a step that is not 0", ends)
    if kind is Path:
        return Path(_plain(str, value, place, nan))
    if kind is str and isinstance(value, str) and (hidden := _UNREADABLE.search(value)):
        raise FileError(
            f"{place or 'the file'}: {value[:80]!r} has {hidden[0]!r} in it, which no text here has"
        )
    if kind in _PLAIN and type(value) is kind:
        return value
    return _refuse(place, _PLAIN.get(kind, str(kind)), value)


def _choice(kinds: Sequence[Any], value: Any, tensors: Tensors | None, place: str, nan: bool) -> Any:
    """A value of one of some kinds, the first that fits."""
    if value is None and types.NoneType in kinds:
        return None
    kinds = [kind for kind in kinds if kind is not types.NoneType]
    refused: FileError | None = None
    for kind in kinds:
        try:
            return from_json(kind, value, tensors, place, nan)
        except FileError as error:
            refused = error
    if refused is not None and len(kinds) == 1:
        raise refused
    return _refuse(place, "another kind of value", value)


def _items(
    origin: Any, inner: Sequence[Any], value: Any, tensors: Tensors | None, place: str, nan: bool
) -> Any:
    if not isinstance(value, list):
        return _refuse(place, "a list", value)
    fixed = origin is tuple and not (len(inner) == 2 and inner[1] is Ellipsis)
    kinds = list(inner) if fixed else [inner[0]] * len(value)
    if len(kinds) != len(value):
        raise FileError(f"{place or 'the file'}: expected {len(kinds)} values, found {len(value)}")
    if not fixed and inner[0] in (str, int) and set(map(type, value)) <= {inner[0]}:  # many, and all plain
        _plain(str, "\n".join(value) if inner[0] is str else "", place, nan)
        return value if origin is list else tuple(value)
    found = [from_json(kind, each, tensors, _in(place, at), nan)
             for at, (kind, each) in enumerate(zip(kinds, value, strict=True))]  # fmt: skip
    return found if origin is list else tuple(found)


def _mapping(inner: Sequence[Any], value: Any, tensors: Tensors | None, place: str, nan: bool) -> Any:
    """A mapping; one whose keys are not all texts is a list of pairs."""
    pairs = list(_object(value, place).items()) if not isinstance(value, list) else value
    found = {}
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            _refuse(place, "a key and a value", pair)
        key = from_json(inner[0], pair[0], None, place)
        if key in found:
            raise FileError(f"{place}: {key!r} stands there twice")
        found[key] = from_json(inner[1], pair[1], tensors, _in(place, key), nan)
    return found


def _dataclass(kind: type, value: Mapping[str, Any], tensors: Tensors | None, place: str) -> Any:
    kind = _relative(kind, value, place)
    loose, found = getattr(kind, "may_be_nan", "").split(), {}
    hints = hints_of(kind)
    for each in fields(kind):
        if each.name in value:
            inside = _in(place, each.name)
            found[each.name] = from_json(
                hints[each.name], value[each.name], tensors, inside, each.name in loose
            )
        elif _is_required(each):
            raise FileError(f"{place or 'the file'}: {each.name!r} is a required property")
    check_sizes(kind, found, place)
    try:
        made = kind(**found)
        getattr(made, "_check", lambda: None)()
        return made
    except OptionError as error:
        raise FileError(f"{place}: {error}" if place else str(error)) from error
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise FileError(f"{place or 'the file'}: its values do not fit each other ({error})") from error


@cache
def hints_of(kind: type) -> dict[str, Any]:
    """The type hints of a class's fields, as types."""
    # From NumPy 2.5 on `NDArray` is a name for a type, of which jaxtyping can give no dimensions.
    return get_type_hints(kind, localns={"NDArray": getattr(NDArray, "__value__", NDArray)})


def _relative(kind: type, value: Mapping[str, Any], place: str) -> type:
    """The class that a file names, of those that derive from the one in the hint."""
    if "class" not in value or not _has_relatives(kind):
        return kind
    known = {each.__name__: each for each in _descent(kind)}
    name = from_json(str, value["class"], place=_in(place, "class"))
    return known[name] if name in known else _refuse(_in(place, "class"), f"one of {', '.join(known)}", name)


def _descent(kind: type[Any]) -> Iterator[type[Any]]:
    yield kind
    below: list[type] = kind.__subclasses__()
    for each in below:
        yield from _descent(each)


def _has_relatives(kind: type) -> bool:
    relatives: list[type] = [*kind.__mro__[1:], *kind.__subclasses__()]
    return any(map(is_dataclass, relatives))


def _object(value: Any, place: str) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else _refuse(place, "an object", value)


def _refuse(place: str, expected: str, value: Any) -> Any:
    found = (
        "a list" if isinstance(value, list) else "an object" if isinstance(value, dict) else repr(value)[:80]
    )
    raise FileError(f"{place or 'the file'}: expected {expected}, found {found}")


def _in(place: str, name: object) -> str:
    return f"{place}/{name}" if place else str(name)


def _is_required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


# -- arrays --------------------------------------------------------------------------------------


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "detach") and hasattr(value, "is_floating_point")


def _is_array(kind: Any) -> bool:
    """Whether a hint is an array's: `NDArray[...]`, a tensor, or either with dimensions of jaxtyping."""
    return hasattr(kind, "dim_str") or get_origin(kind) is np.ndarray or _is_torch(kind)


def _is_torch(kind: Any) -> bool:
    kind = getattr(kind, "array_type", kind)
    return getattr(kind, "__name__", "") == "Tensor" and getattr(kind, "__module__", "").startswith("torch")


def _array(kind: Any, value: Any, tensors: Tensors | None, place: str, nan: bool) -> Any:
    said = _object(value, place)
    if "tensor" in said:
        name = from_json(str, said["tensor"], place=place)
        if tensors is None:
            raise FileError(f"{place}: a JSON file has no tensor {name!r} beside it")
        found = tensors(name, _is_torch(kind))
    else:
        found = _array_of_json(said, _is_torch(kind), place)
    dtype = str(found.dtype).rpartition(".")[2]
    if not _fits(kind, dtype):
        raise FileError(f"{place}: numbers of {dtype} are not what belongs there")
    dims = getattr(kind, "dim_str", None)
    if dims is not None:
        bind(dims, tuple(found.shape), {}, place)
    finite = found.isfinite() if _is_torch(kind) else np.isfinite(found)
    if not nan and not bool(finite.all()):
        raise FileError(f"{place}: holds NaN or infinite numbers")
    return found


def _fits(kind: Any, dtype: str) -> bool:
    if hasattr(kind, "dtypes"):  # of jaxtyping; any() for its patterns, which are not texts
        return not isinstance(kind.dtypes, (tuple, list)) or dtype in kind.dtypes
    if get_origin(kind) is np.ndarray:
        (wanted,) = get_args(get_args(kind)[1]) or (Any,)
        return wanted is Any or np.issubdtype(np.dtype(dtype), wanted)
    return True


def _array_of_json(said: Mapping[str, Any], torch: bool, place: str) -> Any:
    shape = from_json(tuple[int, ...], said.get("shape"), place=_in(place, "shape"))
    dtype, values = said.get("dtype"), said.get("values")
    if dtype == "bool" and isinstance(values, str) and set(values) <= {"0", "1"}:
        values = [sign == "1" for sign in values]
    elif not isinstance(values, list) or not _are_numbers(values, dtype):
        raise FileError(f"{place}: its values are no list of {dtype!r}"[:300])
    elif str in set(map(type, values)):
        values = [SPECIAL[each] if isinstance(each, str) else each for each in values]
    if min(shape, default=0) < 0 or len(shape) > 16 or math.prod(shape) != len(values):
        size = counted(len(values), "value")
        raise FileError(f"{place}: {size} do not make an array of shape {str(list(shape))[:80]}")
    try:
        if torch:
            library = import_module("torch")
            return library.tensor(values, dtype=getattr(library, str(dtype))).reshape(shape)
        array = np.array(values, dtype=str(dtype)).reshape(shape)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise FileError(f"{place}: no array of {dtype!r}: {error}"[:300]) from error
    if array.dtype.kind in "iu" and array.reshape(-1).tolist() != values:
        raise FileError(f"{place}: some numbers are too large for {dtype}")
    return array


def _are_numbers(values: Sequence[Any], dtype: Any) -> bool:
    """Whether all are numbers of the kind that a type of numbers is of."""
    kinds = set(map(type, values))
    if isinstance(dtype, str) and re.fullmatch(r"b?float\d\d", dtype):
        return kinds <= {int, float, str} and all(each in SPECIAL for each in values if isinstance(each, str))
    return isinstance(dtype, str) and bool(re.fullmatch(r"u?int\d\d?", dtype)) and kinds <= {int}


# -- dimensions ----------------------------------------------------------------------------------


def check_sizes(kind: type, values: Mapping[str, Any], place: str = "") -> None:
    """Refuse values of a class's fields whose dimensions of one name differ in length.

    Raises:
        FileError: naming the field.
    """
    sizes: dict[str, Any] = {}
    hints = hints_of(kind)
    for name, value in values.items():
        for dims, shape in _shapes(hints[name], value):
            bind(dims, shape, sizes, _in(place, name))
    for pair in getattr(kind, "along", "").split():
        name, dimension = pair.split(":")
        if values.get(name) is not None:
            bind(dimension, (len(values[name]),), sizes, _in(place, name))


def _shapes(kind: Any, value: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names of dimensions and shape of every array in a value of a kind."""
    if hasattr(kind, "dim_str"):
        yield kind.dim_str, tuple(value.shape)
    elif get_origin(kind) in (Union, types.UnionType) and value is not None:
        arrays = [each for each in get_args(kind) if hasattr(each, "dim_str")]
        if len(arrays) == 1 and hasattr(value, "shape"):
            yield from _shapes(arrays[0], value)
    elif isinstance(value, Mapping) and len(get_args(kind)) == 2:
        for each in value.values():
            yield from _shapes(get_args(kind)[1], each)


def bind(dims: str, shape: tuple[int, ...], sizes: dict[str, Any], place: str) -> None:
    """Hold a shape against names of dimensions as jaxtyping writes them, and note the sizes of the names.

    Known are names, `*names` for any number of dimensions, `name+1`, numbers; `...` and what begins with `_`
    go unchecked.

    Raises:
        FileError: if it has another number of dimensions, or other sizes than were noted.

    Example:
        >>> sizes = {"row": 3}
        >>> bind("row column", (3, 4), sizes, "values")
        >>> sizes
        {'row': 3, 'column': 4}
    """
    names = dims.split()
    many = [at for at, name in enumerate(names) if name[0] in "*."]
    if len(shape) < len(names) - len(many) or (not many and len(shape) != len(names)):
        raise FileError(f"{place}: an array of shape {list(shape)} is not of dimensions ({dims})")
    found: list[Any] = list(shape)
    for at in many:  # one at most
        end = len(shape) - (len(names) - at - 1)
        found[at:end] = [shape[at:end]]
    for name, size in zip(names, found, strict=True):
        if name[0] in "._":
            continue
        base, _, more = name.lstrip("*").partition("+")
        size = size - int(more) if more else size
        wanted = int(base) if base.isdigit() else sizes.setdefault(base, size)
        if wanted != size:
            raise FileError(f"{place}: {size} along {base!r}, where there should be {wanted}")

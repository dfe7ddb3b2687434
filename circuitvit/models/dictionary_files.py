"""Reading dictionaries from files: our own, and those of other libraries by what is in them.

Ours is one safetensors file, whose header says all but the tensors as JSON (`Dictionary.save` writes it).
What a file claims is checked in its header, before its tensors are read. Pickles are not opened.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from circuitvit.errors import FileError, OptionError
from circuitvit.graph.files import check_version, naming, parse_json, read_json
from circuitvit.models.dictionaries import DICTIONARY_FILE, DICTIONARY_SCHEMA, Dictionary, DictionaryKind
from circuitvit.models.dictionary_formats import dictionary_of, layout_of

WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"
"""What SAELens writes into a folder."""

LARGEST = 2**33
"""Numbers in a file; more are no dictionary's, and are not read."""

WORDS = {"f": "features", "w": "wide"}


def load_dictionary(
    path: str | Path,
    *,
    kind: DictionaryKind | None = None,
    k: int | None = None,
    centred: bool | None = None,
    site: str | None = None,
) -> Dictionary:
    """A dictionary of features from a file: ours, SAELens', overcomplete's, or one with such names.

    Which of them it is, is found out from its content. Keywords say what a file does not: those of SAELens
    with their `cfg.json` and ours say all. ViT-Prisma's are pickles, which `examples/convert_prisma_sae.py`
    converts.

    Args:
        path: of a safetensors file, or of a folder with `cfg.json` and `sae_weights.safetensors`.
        kind: "relu", where a file could be of several kinds.
        k: of a top-k dictionary.
        centred: whether the decoder's bias is subtracted from activations before they are encoded.
        site: the activation that it was trained on, such as "m8".

    Raises:
        FileError: naming the file, and what is missing, damaged, not said, or more than a dictionary here.
        OptionError: if a keyword contradicts the file.

    Example:
        >>> import circuitvit as cv
        >>> cv.load_dictionary("sae.safetensors", site="m8")  # doctest: +SKIP
        Dictionary(768 features of width 192, top 16, features of m8)
    """
    path = Path(path)
    if path.is_dir():
        if not (path / WEIGHTS).is_file():
            raise FileError(f"{path} is a folder without {WEIGHTS}: name the file of the dictionary")
        path = path / WEIGHTS
    beside = path.with_name(CONFIG)
    config = read_json(beside) if path.name == WEIGHTS and beside.is_file() else None
    with _opened(path) as file, naming(path):
        metadata = file.metadata() or {}
        if "dictionary" in metadata:
            said: dict[str, Any] = {"apply_b_dec_to_input": False}
            found = _own(path, file, metadata["dictionary"])
        else:
            said = _plain(metadata) if config is None else config
            given = {"kind": kind, "k": k, "apply_b_dec_to_input": centred}
            said = {**{name: each for name, each in given.items() if each is not None}, **said}
            layout = layout_of(set(file.keys()))
            found = dictionary_of(_read(file, layout, said), said)
    for name, asked, has in (
        ("kind", kind, found.kind),
        ("k", k, found.k),
        ("centred", centred, said.get("apply_b_dec_to_input")),
    ):
        if asked is not None and asked != has:
            raise OptionError(f"{name}={asked!r} for {path}, which is {has!r}: leave it out")
    return found if site is None else replace(found, site=site)


# -- inside --------------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, of which nothing but the header has been read.

    Raises:
        FileError: if there is none, or it is damaged, or a pickle.
    """
    if not path.is_file():
        raise FileError(f"cannot read the dictionary {path}: there is no such file")
    try:
        with safe_open(path, "pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        if _is_pickle(path):
            raise FileError(
                f"{path} is a pickle, which could run code when it is opened: examples/convert_prisma_sae.py "
                "converts those of ViT-Prisma; of others, save the tensors as safetensors"
            ) from error
        raise FileError(f"{path} is no dictionary, or a damaged one: {error}") from error


def _is_pickle(path: Path) -> bool:
    """Whether what is no safetensors file is a pickle, alone, in a zip archive or in gzip."""
    with suppress(OSError), path.open("rb") as file:
        start = file.read(2)
        return start[:1] == b"\x80" or start in (b"PK", b"\x1f\x8b")
    return False


def _own(path: Path, file: Any, text: str) -> Dictionary:
    """What `Dictionary.save` wrote."""
    said = parse_json(path, text)
    check_version(path, said, DICTIONARY_FILE, DICTIONARY_SCHEMA)
    layout = {"encoder": "fw", "offset": "f", "decoder": "fw", "bias": "w"}
    layout |= {"threshold": "f"} if said["kind"] == "jumprelu" else {}
    names = set(file.keys())
    if names != set(layout):
        raise FileError(f"it holds {', '.join(sorted(names))}, and such a dictionary {', '.join(layout)}")
    labels = None if said["labels"] is None else tuple(said["labels"])
    rest: dict[str, Any] = {name: said[name] for name in ("kind", "k", "reads", "site", "card")}
    tensors: dict[str, Any] = _read(file, layout, {})
    return Dictionary(**tensors, **rest, labels=labels)


def _read(file: Any, layout: Mapping[str, str], said: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file, once what its header says of them fits together.

    Args:
        file: as `_opened` gives it.
        layout: the sides of each tensor, "f" of features and "w" of an activation; the first has both.
        said: of the same sides, if anything.

    Raises:
        FileError: naming the tensor that does not fit.
    """
    found: dict[str, int] = {}
    for side, name in (("w", "d_in"), ("w", "d_out"), ("f", "d_sae")):
        if isinstance(said.get(name), int) and found.setdefault(side, said[name]) != said[name]:
            raise FileError(
                f"it turns width {found[side]} into {said[name]}: a dictionary here has one width"
            )
    for name, sides in layout.items():
        shape = tuple(file.get_slice(name).get_shape())
        fits = len(shape) == len(sides)
        fits = fits and all(found.setdefault(*each) == each[1] for each in zip(sides, shape, strict=True))
        if not fits or prod(shape) * len(layout) > LARGEST:
            wanted = ", ".join(f"{found.get(side, 'any')} {WORDS[side]}" for side in sides) or "one number"
            raise FileError(f"the tensor {name} is {shape}, where ({wanted}) was expected")
    return {name: file.get_tensor(name) for name in layout}


def _plain(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What the header of a file says, whose values are texts: numbers and truths are read as JSON."""
    said: dict[str, Any] = {}
    for name, text in metadata.items():
        try:
            said[name] = json.loads(text)
        except (ValueError, RecursionError):
            said[name] = text
    return said

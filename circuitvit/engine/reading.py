"""Activations by name: read from one plain run of a model, in memory or streamed into a file.

A run stops after the last stage that is asked for, and keeps nothing else. A file is a safetensors file: it
is laid out in full before the first image is run, each batch is written into its place, and a sidecar says
how many images are done, so that an interrupted run goes on where it was and ends with the same file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from circuitvit._keywords import check_processes, running
from circuitvit._lock import Lock
from circuitvit._progress import progress_bar
from circuitvit.engine.kept import FORMAT, Activations
from circuitvit.engine.processes import agreed, is_first, once, place_in_group, spread, summed
from circuitvit.errors import FileError, ModelError, OptionError
from circuitvit.models import Model
from circuitvit.models.sites import (
    Site,
    check_number_of,
    chosen_of,
    heads_of,
    kinds_at,
    matching,
    numbered,
    of_heads,
    parsed,
    read_of,
)
from circuitvit.models.stages import Reads, Stage
from circuitvit.models.tokens import Chosen, Groups, Mask, TokenSpec, token_name
from circuitvit.tasks.ahead import in_turn, ready
from circuitvit.tasks.images import FileImages, Images, ImageSpec, as_images
from circuitvit.tasks.task import check_size

BATCH = 32
"""Images that are run at once, unless told otherwise."""

SHORT = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""What safetensors calls the kinds of numbers."""


# -- reading -------------------------------------------------------------------------------------


@running
def activations(
    model: Model,
    images: ImageSpec,
    names: str | Sequence[str],
    *,
    tokens: TokenSpec = None,
    groups: Groups | None = None,
    out: str | Path | None = None,
    grad: bool = False,
    processes: bool = False,
    batch_size: int | None = None,
    progress: bool = True,
) -> Activations:
    """The activations of a model on images, by name.

    Args:
        model: to run.
        images: a preprocessed tensor, which is taken in float32 whatever the model's numbers are (but where
            `grad` is set), or files, read a batch at a time.
        names: of sites, see `circuitvit.models.sites`: `"resid*"`, `"a5.h2.pattern@patch->cls"`.
        tokens: for all that name none after an @: kinds ("cls+reg"), numbers, or a boolean mask `(token,)`;
            of scores and patterns the queries. All by default.
        groups: token groups whose names may stand after an @.
        out: a safetensors file to stream them into. Called again after an interruption, it goes on.
        grad: keep the graph, so that they can be differentiated; the images are a tensor then, run at once.
        processes: share the images among the processes of `torch.distributed`, which must all make this call;
            each gets all activations, and writes its own into the file, which all of them must see.
        batch_size: images at once; 32 by default.
        progress: whether to show a bar.

    Raises:
        NameNotFoundError: if there is no such site, with the nearest.
        OptionError: if there are no such tokens, or settings contradict each other.
        DataError: if the images cannot be read, or have another size than the model takes.
        ModelError: if an activation is NaN or infinite.
        FileError: if the file holds something else, or cannot be written.

    Example:
        >>> import torch
        >>> import circuitvit as cv
        >>> found = cv.load("catdog-tiny").activations(torch.zeros(2, 3, 48, 48), "m*.hidden", tokens="cls")
        >>> list(found), found["m0.hidden"].shape
        (['m0.hidden', 'm1.hidden', 'm2.hidden', 'm3.hidden'], torch.Size([2, 1, 128]))
    """
    check_processes(processes)
    if grad and (out is not None or processes or not isinstance(images, Tensor)):
        raise OptionError("grad=True takes a tensor of images, one process, and no file to write to")
    found, wanted, size = _asked(model, images, names, tokens, groups, batch_size)
    said = {each.name: each.tokens for each in wanted}
    if grad:
        assert isinstance(images, Tensor), "checked above"
        given = (images if images.ndim == len(found.shape) + 1 else images[None]).to(
            model.device, model.dtype
        )
        with torch.enable_grad():
            return Activations(read_sites(model, given, wanted), found.names, said, model.name)
    if out is None:
        runs = dict(_runs(model, found, wanted, size, 0, progress, processes))
        joined = _joined(runs, range(0, len(found), size), len(found), processes)
        return Activations(joined, found.names, said, model.name)
    return _streamed(model, found, wanted, size, Path(out), progress, processes)


@running
def activation_batches(
    model: Model,
    images: ImageSpec,
    names: str | Sequence[str],
    *,
    batch_size: int | None = None,
    progress: bool = True,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Activations of any number of images a batch at a time, of which nothing is kept: as `activations`.

    Returns:
        The number of the first image and the activations by name, for each batch; everything that can be
        refused before the first run is refused at once.
    """
    found, wanted, size = _asked(model, images, names, None, None, batch_size)
    return _runs(model, found, wanted, size, 0, progress)


def _asked(
    model: Model,
    images: ImageSpec,
    names: str | Sequence[str],
    tokens: TokenSpec,
    groups: Groups | None,
    batch_size: int | None,
) -> tuple[Images, list[_Wanted], int]:
    """The images, what is asked for of them, and how many are run at once."""
    model.refresh()
    given: Any = names
    asked = [names] if isinstance(names, str) else list(given) if isinstance(given, Iterable) else [given]
    if not all(isinstance(name, str) for name in asked):
        raise OptionError(f"activations are asked for by name, such as 'resid1', not as {names!r}")
    if not asked:
        raise OptionError("no activations are named: model.sites() lists what there is")
    found = as_images(images, model.preprocessing)
    check_size(found, model)
    wanted = _wanted(model, asked, tokens, groups, (found.shape[-2], found.shape[-1]))
    return found, wanted, model.batch_of(len(found), batch_size or BATCH)


def _runs(
    model: Model,
    images: Images,
    wanted: Sequence[_Wanted],
    size: int,
    start: int,
    progress: bool,
    processes: bool = False,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """The activations batch by batch on the CPU, with the number of the first image; processes take turns.

    Raises:
        ModelError: naming the first image that gives NaN or infinite values.
    """
    names = images.names  # of files they are made anew each time
    number, among = place_in_group(processes)
    with progress_bar(len(images), "activations", progress, unit=model.preprocessing.what) as bar:
        bar.update(start)
        firsts = range(start + number * size, len(images), among * size)
        parts = [range(first, min(first + size, len(images))) for first in firsts]
        read = in_turn(partial(ready, images, model=model), parts, [images])
        for first, taken in zip(firsts, read, strict=True):
            batch = taken.to(model.device, non_blocking=True)
            with torch.no_grad():
                values = read_sites(model, batch, wanted)
            values = {name: value.detach().cpu() for name, value in values.items()}
            for each in wanted:
                _refuse_nan(each, values[each.name], names[first : first + size])
            yield first, values
            bar.update(min(among * size, len(images) - first))


def _joined(
    runs: Mapping[int, dict[str, Tensor]], firsts: Sequence[int], count: int, processes: bool
) -> dict[str, Tensor]:
    """All batches in order, by name: those of other processes as these send them.

    Args:
        runs: those of this process, by their first images.
        firsts: the first images of all batches.
        count: of images.
        processes: whether there are others.
    """
    among = place_in_group(processes)[1]
    like = agreed(
        {name: (*value.shape[1:], value.dtype) for name, value in runs.get(0, {}).items()}, processes
    )
    joined: dict[str, list[Tensor]] = {name: [] for name in like}
    for number, (first, last) in enumerate(zip(firsts, [*firsts[1:], count], strict=True)):
        for name, (*shape, dtype) in like.items():
            own = runs[first][name] if first in runs else torch.empty(last - first, *shape, dtype=dtype)
            joined[name].append(spread(own, number % among) if processes else own)
    return {name: torch.cat(parts) for name, parts in joined.items()}


def _refuse_nan(wanted: _Wanted, values: Tensor, names: Sequence[str]) -> None:
    if wanted.site.kind == "scores":  # which are minus infinity where nothing may be looked at
        bad = values.isnan().flatten(1).any(dim=1)
    else:
        bad = ~values.isfinite().flatten(1).all(dim=1)
    if bad.any():
        name = names[int(bad.nonzero()[0])]
        raise ModelError(
            f"{wanted.name} is NaN or infinite on {name}: check the model's weights and the image"
        )


# -- a file --------------------------------------------------------------------------------------


def _streamed(
    model: Model,
    images: Images,
    wanted: Sequence[_Wanted],
    size: int,
    out: Path,
    progress: bool,
    processes: bool,
) -> Activations:
    """The activations written into a file, batch by batch. Of several processes each writes its own batches;
    the first says how far all are, after every round."""
    with torch.no_grad():
        like = read_sites(model, images.take(0, size).to(model.device, model.dtype), wanted)
    shapes = {name: (len(images), *value.shape[1:]) for name, value in like.items()}
    identity = _identity(model, images, wanted)
    header, starts = _header(model, images, wanted, shapes, identity)
    if once(lambda: _is_there(out, identity), processes):
        return Activations.load(out)
    part, sidecar = (out.with_name(f"{out.name}.{ending}") for ending in ("part", "progress.json"))
    lock = Lock(out.with_name(f"{out.name}.lock"), f"the file {out}")
    whole = len(header) + _total(shapes, model.dtype)

    def laid_out() -> int:
        """How many images an earlier run has written into the file, which is there from now on."""
        with _writing(out):
            lock.__enter__()
            done = _done(part, sidecar, identity, whole, len(images))
            with part.open("r+b" if done else "wb") as file:
                if not done:
                    file.write(header)
                    file.truncate(whole)
            return done

    def note(done: int) -> None:
        with _writing(out):
            sidecar.write_text(json.dumps({"identity": identity, "done": done}))

    def finish() -> None:
        with _writing(out):
            part.replace(out)
            sidecar.unlink(missing_ok=True)

    try:
        done = once(laid_out, processes)
        runs = _runs(model, images, wanted, size, done, progress, processes)
        at_once = size * place_in_group(processes)[1]
        with _writing(out), part.open("r+b") as file:
            for begin in range(done, len(images), at_once):
                for first, values in islice(runs, 1):
                    for name, value in values.items():
                        file.seek(len(header) + starts[name] + first * _row(shapes[name], model.dtype))
                        file.write(value.contiguous().view(torch.uint8).numpy().data)
                    file.flush()
                summed(np.zeros(1), processes)  # until all have written
                if is_first(processes):
                    note(min(begin + at_once, len(images)))
        once(finish, processes)
    finally:
        lock.__exit__()
    return Activations.load(out)


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FileError(f"cannot write {out}: {error.strerror or error}") from error


def _is_there(out: Path, identity: str) -> bool:
    """Whether the file has been written already; what else has its name is refused."""
    if out.is_dir():
        raise FileError(f"{out} is a folder: name a file in it, such as {out / 'acts.safetensors'}")
    if out.exists() and not _is_done(out, identity):
        raise FileError(f"{out} is there already and holds something else: delete it, or write elsewhere")
    return out.exists()


def _header(
    model: Model,
    images: Images,
    wanted: Sequence[_Wanted],
    shapes: Mapping[str, tuple[int, ...]],
    identity: str,
) -> tuple[bytes, dict[str, int]]:
    """What a safetensors file begins with, and where each tensor begins after it."""
    said = {
        "model": model.name,
        "images": images.names,
        "names": [each.name for each in wanted],
        "tokens": {each.name: each.tokens for each in wanted},
    }
    table: dict[str, Any] = {
        "__metadata__": {"format": FORMAT, "identity": identity, "said": json.dumps(said)}
    }
    starts, at = {}, 0
    for name, shape in shapes.items():
        starts[name] = at
        at += len(images) * _row(shape, model.dtype)
        table[name] = {"dtype": SHORT[model.dtype], "shape": shape, "data_offsets": [starts[name], at]}
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, starts


def _row(shape: Sequence[int], dtype: torch.dtype) -> int:
    """The bytes of one image's values."""
    return prod(shape[1:]) * dtype.itemsize


def _total(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    return sum(shape[0] * _row(shape, dtype) for shape in shapes.values())


def _identity(model: Model, images: Images, wanted: Sequence[_Wanted]) -> str:
    """What must be the same for a run to go on: weights and edits, images, and what is asked for."""
    digest = hashlib.sha256(f"{model.weights_hash}|{images.shape}|{model.dtype}".encode())
    for each in wanted:
        digest.update(f"|{each.name}|{each.tokens}".encode())
    if isinstance(images, FileImages):
        for path in images.paths:
            known = path.stat()
            digest.update(f"|{path.name}|{known.st_size}|{known.st_mtime_ns}".encode())
    else:
        for first in range(len(images)):
            digest.update(images.take(first, first + 1).numpy().tobytes())
    return digest.hexdigest()


def _is_done(out: Path, identity: str) -> bool:
    try:
        with safe_open(str(out), "pt") as file:
            return bool((file.metadata() or {}).get("identity") == identity)
    except (SafetensorError, OSError):
        return False


def _done(part: Path, sidecar: Path, identity: str, size: int, images: int) -> int:
    """How many images an earlier run has written; 0 where it was another, or left nothing whole."""
    try:
        said = json.loads(sidecar.read_text())
        fits = part.stat().st_size == size and said["identity"] == identity
        return int(said["done"]) if fits and 0 <= int(said["done"]) <= images else 0
    except (OSError, ValueError, TypeError, KeyError):
        return 0


# -- what is asked for ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Wanted:
    """One activation that is asked for.

    Attributes:
        name: under which it is given.
        site: of the model.
        rows: the tokens, or queries, that are kept; None for all.
        columns: the keys, or neurons, that are kept; None for all.
        tokens: names of the kept tokens.
    """

    name: str
    site: Site
    rows: Tensor | None
    columns: Tensor | None
    tokens: tuple[str, ...]

    def of(self, value: Tensor) -> Tensor:
        for axis, places in ((1, self.rows), (2, self.columns)):
            if places is not None:
                value = value.index_select(axis, places.to(value.device))
        return value


def _wanted(
    model: Model, names: Sequence[str], tokens: TokenSpec, groups: Groups | None, size: tuple[int, int]
) -> list[_Wanted]:
    """What is asked for, in order and once each.

    Args:
        model: whose.
        names: as they were given.
        tokens: for all that do not say their own.
        groups: whose names may be used.
        size: height and width of the images at hand.
    """
    count = model.n_tokens if size == model.preprocessing.shape[-2:] else model.tokens_at(*size)

    @cache
    def grid() -> tuple[int, ...]:
        return model.grid_at(*size)

    found: dict[str, _Wanted] = {}
    for key in names:
        name, at, source = parsed(key)
        name, number = numbered(name)
        for site in matching(model.all_sites, name):
            if site.kind == "logits" and at is not None:
                raise OptionError("logits have no tokens")
            kinds = kinds_at(model, site, count)
            rows_of = kinds[0]
            rows = columns = None
            if site.kind != "logits":
                both = chosen_of(site, kinds, tokens if at is None else at, source, grid, groups)
                rows, columns = (_places(each, own, site) for each, own in zip(both, kinds, strict=True))
            kept = range(len(rows_of)) if rows is None else rows.tolist()
            own = () if site.kind == "logits" else tuple(token_name(rows_of, place, grid) for place in kept)
            said = site.called(number)
            if number is not None:
                check_number_of(site, number)
                one = torch.tensor([number])
                rows, columns = (one, None) if site.kind == "logits" else (rows, one)
            said = said if at is None else f"{said}@{key.partition('@')[2].strip()}"
            found[said] = _Wanted(said, site, rows, columns, own)
    return list(found.values())


def _places(tokens: Chosen, kinds: Sequence[str], site: Site) -> Tensor | None:
    mask: Mask | None = tokens.of(kinds)
    if mask is None:
        return None
    if not bool(mask.any()):
        raise OptionError(f"{site.name}: the mask of tokens names none")
    if mask.ndim == 2 and bool((mask != mask[0]).any()):
        raise OptionError(
            f"{site.name}: the tokens differ between images, so that they cannot be one tensor: read all "
            "tokens, and take those of each image"
        )
    return (mask if mask.ndim == 1 else mask[0]).nonzero().flatten()


# -- one run -------------------------------------------------------------------------------------


def read_sites(model: Model, images: Tensor, wanted: Sequence[_Wanted]) -> dict[str, Tensor]:
    """The values of some sites on images `(image, *shape)`, from a run as far as the last of them."""
    by_stage: dict[int, list[_Wanted]] = {}
    for each in wanted:
        by_stage.setdefault(each.site.stage, []).append(each)
    found: dict[str, Tensor] = {}
    stream, last, place = images, max(by_stage), -1
    for stage in model.stages:
        if stage.nodes.kind == "edit":  # sites are those of the model without edits
            stream = stage.add(stream, stage.write(stage.read(stream)))
            continue
        place += 1
        mine = by_stage.get(place, [])
        found.update({each.name: each.of(stream) for each in mine if each.site.kind == "stream"})
        inside = [each for each in mine if each.site.kind != "stream"]
        if place == last and not inside:
            break
        reads = stage.read(stream)
        compact = stage.write(reads)
        if stage.is_readout:
            found.update({each.name: each.of(compact) for each in inside})
            break
        if inside:
            found.update(_inside(stage, reads, compact, inside))
        if place == last:
            break
        stream = stage.add(stream, compact) if place else stage.total(compact)
    return {each.name: found[each.name] for each in wanted}


def _inside(
    stage: Stage, reads: Reads, compact: Tensor, wanted: Sequence[_Wanted]
) -> Iterator[tuple[str, Tensor]]:
    """What is asked for of a stage's nodes."""
    pieces = zip(stage.branches, stage.split_reads(reads), stage.split(compact), strict=True)
    for part, own, written in pieces:
        looks: dict[str, Tensor] = {}
        seen = part.seen(own)
        nodes = {*part.nodes.senders, *heads_of(part)}  # a head in pieces reads and looks as one
        for each in wanted:
            site = each.site
            if site.node not in nodes:
                continue
            if site.kind == "output":
                yield each.name, each.of(output_of(part, written, site.node))
            elif site.kind == "read":
                yield each.name, each.of(read_of(part, seen, site.name))
            elif site.kind == "hidden":
                yield each.name, each.of(part.hidden(own))
            else:
                if site.kind not in looks:
                    looks[site.kind] = of_heads(part, site.kind, own, written)
                yield each.name, each.of(looks[site.kind][:, heads_of(part).index(site.node)])


def output_of(part: Stage, written: Tensor, node: str) -> Tensor:
    """What one node writes, of which the others are not expanded."""
    place = part.nodes.senders.index(node)
    if len(part.nodes.senders) == 1:
        return part.expand(written)[0]
    alone = part.restrict([place])
    return alone.expand(alone.pick((written,))[0])[0]

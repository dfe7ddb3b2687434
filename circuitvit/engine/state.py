"""State files: what a long run has done so far, so that it can go on after Ctrl-C or a crash.

A long function opens the file with the name of its work, keeps what it has done now and then, and finds it
again when it is called with the same model, task and settings. Nobody else's state is ever used: the file
says what it belongs to. Tensors and JSON in a safetensors file; nothing in it is executed.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from circuitvit._lock import Lock
from circuitvit._version import __version__
from circuitvit.engine.processes import agreed, is_first, once
from circuitvit.errors import CircuitViTError, DataError, FileError, OptionError, ProcessError
from circuitvit.graph.files import write_bytes
from circuitvit.tasks import PreparedTask
from circuitvit.tasks.images import Images

FORMAT = "circuitvit-state 1"

EVERY = 5.0
"""Seconds between two saves."""

IMAGES_AT_ONCE = 64

PROBES = 4
"""Pairs for which the metric is asked what it makes of random logits."""


@dataclass(frozen=True, eq=False)
class Saved:
    """What a run needs to go on: tensors by name, and anything that JSON can hold."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    numbers: Mapping[str, Any] = field(default_factory=dict)


class StateFile:
    """The state of one run, as a context manager around its work.

    Leaving by an exception, such as Ctrl-C, writes what was kept last; leaving well deletes the file. While
    work goes on the file is locked: a second run that is given the same one is told who is at work. Without
    a path nothing is ever written. Of a task that processes share, the first reads and writes for all.

    Args:
        path: of the file; None for no state.
        prepared: the task of the run.
        work: what is done, with every setting that changes its result.
        settings: what was not asked for but measured, such as a batch size from free memory: a run that goes
            on takes those of the run that it goes on from.

    Raises:
        FileError: if the file is no state file; on entering, if another process is at work with it.
        OptionError: if it belongs to another run; the message says in what they differ.

    Attributes:
        saved: what an earlier run left, or None.
        settings: those given, or the earlier run's.
    """

    def __init__(
        self,
        path: str | Path | None,
        prepared: PreparedTask,
        work: str,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = None if path is None else Path(path)
        self.settings = dict(settings or {})
        self.saved: Saved | None = None
        self._kept: Callable[[], Saved] | None = None
        self._lock: Lock | None = None
        self._stays = False
        self._written = time.monotonic()
        self._prepared = prepared
        if self.path is None:
            self.settings = agreed(self.settings, prepared.processes)
            return
        self.saved = once(lambda: self._found(work), prepared.processes)
        self.settings = agreed(self.settings, prepared.processes)
        if self.saved is not None:
            self.settings = self.saved.numbers["settings"]

    def keep(self, make: Callable[[], Saved]) -> None:
        """Note the present state, and write it if the last one written is some seconds old.

        Args:
            make: gives the state, whenever it is called before the next `keep`.
        """
        self._kept = make
        if self._writes and time.monotonic() - self._written > EVERY:
            self._write_or_warn("the run goes on, but could not be resumed")

    def stay(self) -> None:
        """Leave the file to go on from, although the work ends well: with what there is so far."""
        self._stays = True

    def __enter__(self) -> StateFile:
        if self.path is not None:
            once(self._seize, self._prepared.processes)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.path is None:
            return
        try:
            if self._lock is not None and error is None and not self._stays:
                self.path.unlink(missing_ok=True)
            elif self._lock is not None and self._kept is not None and not isinstance(error, CircuitViTError):
                self._write_or_warn("the run cannot be resumed from here")
        finally:
            if self._lock is not None:
                self._lock.__exit__()
        if isinstance(error, ProcessError):
            kept = f"{self.path} holds what has been done: the same call goes on from there"
            left = kept if self.path.exists() else "Nothing has been saved"
            raise ProcessError(f"{error}. {left}") from error

    @property
    def _writes(self) -> bool:
        """Whether there is a file, and this is the process that writes it for all."""
        return self.path is not None and is_first(self._prepared.processes)

    def _seize(self) -> None:
        assert self.path is not None, "checked by the caller"
        self._lock = Lock(self.path.with_name(f"{self.path.name}.lock"), f"the state {self.path}")
        self._lock.__enter__()

    def _write_or_warn(self, otherwise: str) -> None:
        """Write what was kept last: a full disk must not end hours of work, nor take what they found."""
        try:
            self._write()
        except FileError as error:
            warnings.warn(f"{otherwise}: {error}", stacklevel=3)
            self._written = time.monotonic()

    def _write(self) -> None:
        assert self.path is not None, "checked by the callers"
        assert self._kept is not None, "checked by the callers"
        state = self._kept()
        numbers = json.dumps({**state.numbers, "settings": self.settings})
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
        metadata = {
            "format": FORMAT,
            "run": json.dumps(self._run),
            "numbers": numbers,
            "content": _content_digest(tensors, numbers),
        }
        write_bytes(self.path, save(tensors, metadata))
        self._written = time.monotonic()

    def _found(self, work: str) -> Saved | None:
        """What an earlier run left."""
        assert self.path is not None, "checked by the caller"
        self._run = {
            "model": self._prepared.model.weights_hash,
            "task": task_digest(self._prepared),
            "work": work,
            "version": __version__,
        }
        if self.path.exists():
            return self._load()
        if not self.path.parent.is_dir():
            raise FileError(f"cannot keep a state in {self.path}: there is no folder {self.path.parent}")
        return None

    def _load(self) -> Saved:
        assert self.path is not None, "checked by the caller"
        try:
            with safe_open(self.path, "pt") as opened:
                metadata = opened.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise FileError(f"{self.path} is not the state of a run that this version can go on with")
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            if metadata["content"] != _content_digest(tensors, metadata["numbers"]):
                raise ValueError("its content has been changed since it was written")
            run, numbers = json.loads(metadata["run"]), json.loads(metadata["numbers"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise FileError(f"{self.path} is no state file, or a damaged one: {error}") from error
        self._refuse_another(run)
        return Saved(tensors, numbers)

    def _refuse_another(self, run: Any) -> None:
        words = {"model": "model", "task": "task (images, metric or ablation)", "work": "method or settings"}
        for key, own in self._run.items():
            theirs = run.get(key) if isinstance(run, dict) else None
            if theirs != own:
                what = words.get(key, "version of this library")
                detail = f": {theirs}, not {own}" if key in ("work", "version") else ""
                raise OptionError(
                    f"{self.path} is the state of a run with another {what}{detail}. Repeat that run's "
                    "command to go on with it, or delete the file to start anew"
                )


def task_digest(prepared: PreparedTask) -> str:
    """SHA-256 over what in a task changes a result: images, metric, ablation, groups and direction."""
    digest = hashlib.sha256()
    for part in (
        prepared.clean,
        prepared.corrupt,
        prepared.metric.label,
        prepared.metric.metric.name,
        prepared.metric.target,
        prepared.metric.foil,
        prepared.metric.vector,
        _metric_probe(prepared),
        prepared.ablation,
        prepared.direction,
        prepared.groups,
    ):
        _feed(digest, part)
    return digest.hexdigest()


def _metric_probe(prepared: PreparedTask) -> Tensor | None:
    """What the metric makes of some logits: tells functions of one name apart. None if it refuses them."""
    generator = torch.Generator().manual_seed(0)
    count = min(len(prepared), PROBES)
    shape = (2, count, prepared.model.n_logits)
    logits, clean = torch.randn(shape, generator=generator).to(prepared.model.device, prepared.model.dtype)
    try:
        with torch.no_grad():
            return prepared.metric(logits, clean, torch.arange(count))
    except DataError:
        return None


def _content_digest(tensors: Mapping[str, Tensor], numbers: str) -> str:
    """SHA-256 over what a state file holds: one changed bit would go unseen into the result."""
    digest = hashlib.sha256()
    for part in (numbers, *(item for name in sorted(tensors) for item in (name, tensors[name]))):
        _feed(digest, part)
    return digest.hexdigest()


def _feed(digest: Any, value: object) -> None:
    """Add a value to a digest, with its kind."""
    digest.update(f"|{type(value).__name__}:".encode())
    if isinstance(value, Tensor):
        digest.update(f"{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Images):
        for start in range(0, len(value), IMAGES_AT_ONCE):
            _feed(digest, value.take(start, min(start + IMAGES_AT_ONCE, len(value))))
    elif is_dataclass(value):
        for item in fields(value):
            _feed(digest, getattr(value, item.name))
    else:
        digest.update(repr(value).encode())

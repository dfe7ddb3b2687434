"""The folder that a command writes to: checked before long work, and honest about what was saved."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import typer

from circuitvit.errors import CircuitViTError, FileError

STATE = "state.safetensors"
"""Where a long run keeps what it has done, until it ends."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with what has been saved by then as its message."""


class Folder:
    """An output folder, used as a context manager around all work whose results it will hold.

    Entering makes it and tries to write. Leaving by an exception says what was saved; if that is nothing,
    folders that were made for it are taken away again.

    Attributes:
        path: of the folder.
        saved: names of the files that were written, in order.

    Raises:
        FileError: on entering, if the folder cannot be made or written to.
    """

    def __init__(self, path: Path, expected: tuple[str, ...]) -> None:
        """A folder for files of the `expected` names, which tell older results from those of this run."""
        self.path = path
        self.saved: list[str] = []
        self._expected = expected
        self._made: list[Path] = []

    def __enter__(self) -> Folder:
        missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        probe = self.path / f".{os.getpid()}.probe"
        try:
            for folder in reversed(missing):
                folder.mkdir(exist_ok=True)
                self._made.insert(0, folder)
            probe.touch()
            probe.unlink()
        except OSError as error:
            self._unmake()
            reason = "it is a file" if self.path.is_file() else error.strerror or error
            raise FileError(f"cannot write to the folder {self.path}: {reason}") from error
        return self

    def write(self, name: str, save: Callable[[Path], object]) -> None:
        """Write the file `name` by calling `save` with its path; a second time replaces it."""
        save(self.path / name)
        if name not in self.saved:
            self.saved.append(name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        if not self.saved:
            self._unmake()
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(self.account()) from None
        if isinstance(error, CircuitViTError) and self.saved:
            typer.echo(self.account(), err=True)

    def state(self, resume: bool) -> Path:
        """The file in which a long run keeps what it has done.

        Args:
            resume: whether one that an interrupted run has left may be gone on with.

        Raises:
            FileError: if there is one and it may not.
        """
        path = self.path / STATE
        if path.exists() and not resume:
            raise FileError(
                f"{path} holds what an interrupted run has done: add --resume to go on with it, or delete "
                "it to start anew"
            )
        return path

    def account(self) -> str:
        """What was saved, and what in the folder is older, in one line.

        Example:
            >>> folder = Folder(Path("out"), ("circuit.json", "report.md"))
            >>> folder.account()
            'nothing has been saved'
        """
        going_on = f"; --resume goes on from {self.path / STATE}" if (self.path / STATE).exists() else ""
        if not self.saved:
            return f"nothing has been saved{going_on}"
        older = [name for name in self._expected if name not in self.saved and (self.path / name).exists()]
        left = f"; from an earlier run: {', '.join(older)}" if older else ""
        return f"saved in {self.path}: {', '.join(self.saved)}{left}{going_on}"

    def _unmake(self) -> None:
        for folder in self._made:
            with contextlib.suppress(OSError):  # somebody else has put something into it
                folder.rmdir()

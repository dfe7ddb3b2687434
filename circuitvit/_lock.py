"""One process at a time: a lock file that names the process which holds it.

The operating system holds the lock, not the file: when a process dies, however it dies, its lock is free. The
file says who it is, for the message that others get. On a file system without locks (some network ones) the
work goes on with a warning.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import warnings
from pathlib import Path
from types import TracebackType

from circuitvit.errors import FileError

if os.name == "nt":
    import msvcrt

    def _seize(opened: int) -> None:
        os.lseek(opened, 1 << 20, os.SEEK_SET)  # behind the content, which others must be able to read
        msvcrt.locking(opened, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        os.lseek(opened, 0, os.SEEK_SET)

else:
    import fcntl

    def _seize(opened: int) -> None:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)


TAKEN = (BlockingIOError, PermissionError)
"""What `_seize` raises where another process holds the lock."""


class Lock:
    """A lock, as a context manager around the work that only one process may do.

    Args:
        path: of the lock file, which is there as long as the work; its folder must exist.
        what: is being worked on, for the message.

    Raises:
        FileError: on entering, if another process is at work; the message names it, and since when. Also if
            the lock file cannot be made.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with Lock(folder / ".lock", "the folder"):
        ...     [path.name for path in folder.iterdir()]
        ['.lock']
        >>> list(folder.iterdir())
        []
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        self.what = what
        self._opened: int | None = None

    def __enter__(self) -> Lock:
        while True:
            try:
                opened = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:  # a folder that is read only, a lock of another user, a full disk
                raise FileError(
                    f"cannot work with {self.what}: cannot write {self.path}: {error.strerror or error}"
                ) from error
            try:
                _seize(opened)
            except TAKEN:
                os.close(opened)
                raise FileError(self._refusal()) from None
            except OSError as error:
                os.close(opened)
                self.path.unlink(missing_ok=True)
                warnings.warn(
                    f"{self.what} cannot be locked ({error.strerror or error}): see to it that no other "
                    "process works there",
                    stacklevel=2,
                )
                return self
            if self._is_still_there(opened):
                break
            os.close(opened)  # the one before us has just taken the file away: make a new one
        self._opened = opened
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        os.ftruncate(opened, 0)
        os.write(opened, json.dumps(holder).encode())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        if self._opened is None:
            return
        opened, self._opened = self._opened, None
        if os.name == "nt":
            os.close(opened)
        with contextlib.suppress(OSError):  # on Windows, another process may have it open by now
            self.path.unlink()
        if os.name != "nt":
            os.close(opened)  # after the file is gone: who opened it meanwhile finds that out

    def _is_still_there(self, opened: int) -> bool:
        try:
            return os.path.samestat(os.fstat(opened), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _refusal(self) -> str:
        try:
            holder = json.loads(self.path.read_text(encoding="utf-8"))
            who = (
                f"process {holder['pid']} on {holder['host']} has been at work there since {holder['since']}"
            )
        except (OSError, ValueError, KeyError, TypeError):  # it has only just begun, or just ended
            who = "another process is at work there"
        return f"{self.what} is in use: {who}. Wait for it or stop it, or choose another place"

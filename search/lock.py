"""One controller per run folder."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from .errors import UserError, file_mistakes


class FolderLock:
    """An exclusive lock on a folder, released by `release`, by leaving the `with` block, or by the process's end.

    The operating system holds it (flock), so a killed controller leaves no lock behind, only its note of who it was.
    """

    def __init__(self, folder: Path) -> None:
        """Takes the lock.

        Raises:
            UserError: another process has it (named), or the folder cannot be written.
        """
        self._folder = folder
        with file_mistakes(str(folder / _NAME), "choose another folder with --out"):
            self._handle = os.open(folder / _NAME, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._handle)
            if isinstance(error, BlockingIOError):
                raise UserError(f"{folder} is in use by {_name(_read(folder))}; wait for it or stop it first") from None
            advice = "choose a folder on another file system with --out"
            raise UserError(f"{folder} cannot be locked: {error.strerror}; {advice}") from error
        note = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(self._handle, 0)
        # Advisory only: on a full disk the lock still holds, it just cannot say whose it is.
        with suppress(OSError):
            os.pwrite(self._handle, json.dumps(note).encode(), 0)

    def release(self) -> None:
        """Gives the lock back; a second call does nothing."""
        if self._handle >= 0:
            # The file stays: removing it would let two processes lock two files of one name.
            os.ftruncate(self._handle, 0)
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.release()


def holder(folder: Path) -> str | None:
    """The controller that works in the folder (process, host, since when), or None. Takes no lock itself."""
    note = _read(folder)
    pid = note.get("pid")
    if not isinstance(pid, int):
        return None
    if note.get("host") == socket.gethostname() and not _alive(pid):
        return None
    return _name(note)


_NAME = ".lock"


def _read(folder: Path) -> Mapping[str, object]:
    try:
        note = json.loads((folder / _NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return note if isinstance(note, dict) else {}


def _name(note: Mapping[str, object]) -> str:
    if not note:
        return "another planish process"
    return f"planish process {note.get('pid')} on {note.get('host')} since {note.get('started')}"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

"""Compiled kernels that can be used again: object code by key, in one SQLite file of the user's own cache folder.

Object code is only ever read from there, never from a run's folder, which may come from somebody else. Many processes
may read and write at once. Whatever is wrong with the file costs the time to compile again, nothing else.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import TypeVar

from .cache_folder import cache_folder

_log = logging.getLogger(__name__)
_FILE = "kernels.sqlite"
# A kernel takes some 50 kB: this holds those of hundreds of models.
_LIMIT_BYTES = 512 << 20
_WAIT_S = 5.0
_Result = TypeVar("_Result")


class KernelStore:
    """Object code by key. No method raises for what is wrong with the file; the first fault is logged."""

    def __init__(
        self, path: Path | None = None, limit_bytes: int = _LIMIT_BYTES, clock: Callable[[], float] = time.time
    ) -> None:
        """Opens nothing yet; the file and its folder are made when something is stored.

        Args:
            path: The SQLite file; by default `kernels.sqlite` in `cache_folder()`.
            limit_bytes: What was used least recently makes room above this.
            clock: Seconds, for telling that.
        """
        self.path = path or cache_folder() / _FILE
        self._limit_bytes, self._clock = limit_bytes, clock
        self._warned = False

    def get(self, key: str) -> bytes | None:
        """The object code of a key, None where there is none or it is damaged."""

        def read(connection: sqlite3.Connection) -> bytes | None:
            row = connection.execute("SELECT code, digest FROM objects WHERE key = ?", (key,)).fetchone()
            if row is None or not isinstance(row[0], bytes) or _digest(row[0]) != row[1]:
                return None
            return row[0]

        # Not `Path.exists`, which raises where a folder may not be searched.
        return self._try(read) if os.path.exists(self.path) else None

    def put(self, codes: dict[str, bytes]) -> None:
        """Stores object code by key, in one transaction."""

        def write(connection: sqlite3.Connection) -> None:
            with connection:
                connection.executemany(
                    "INSERT OR REPLACE INTO objects (key, code, digest, bytes, used) VALUES (?, ?, ?, ?, ?)",
                    [(key, code, _digest(code), len(code), self._clock()) for key, code in codes.items()],
                )
                self._make_room(connection)

        if codes:
            self._try(write)

    def touch(self, keys: list[str]) -> None:
        """Says that these were used just now."""

        def write(connection: sqlite3.Connection) -> None:
            with connection:
                rows = [(self._clock(), key) for key in keys]
                connection.executemany("UPDATE objects SET used = ? WHERE key = ?", rows)

        if keys:
            self._try(write)

    def _make_room(self, connection: sqlite3.Connection) -> None:
        connection.execute(
            "DELETE FROM objects WHERE key IN (SELECT key FROM (SELECT key, sum(bytes) OVER"
            " (ORDER BY used DESC, rowid DESC) AS total FROM objects) WHERE total > ?)",
            (self._limit_bytes,),
        )

    def _try(self, use: Callable[[sqlite3.Connection], _Result]) -> _Result | None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with closing(sqlite3.connect(self.path, timeout=_WAIT_S)) as connection:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS objects (key TEXT PRIMARY KEY, code BLOB NOT NULL,"
                    " digest TEXT NOT NULL, bytes INTEGER NOT NULL, used REAL NOT NULL)"
                )
                return use(connection)
        # SQLite quotes what is damaged in its message, and the sqlite3 module decodes that strictly.
        except (sqlite3.Error, OSError, UnicodeDecodeError) as error:
            if not self._warned:
                self._warned = True
                _log.warning(
                    "the kernel cache %s cannot be used (%s); kernels are compiled anew. Delete it, or name another"
                    " folder in PLANISH_CACHE",
                    self.path,
                    error,
                )
            return None


def kernel_key(*parts: object) -> str:
    """A key of everything that decides about a kernel's code: these parts, by their `repr`, and our own sources."""
    text = "\n".join([schedules_version(), *(repr(part) for part in parts)])
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def schedules_version() -> str:
    """A digest of the files that make kernels, so that no kernel outlives the code that wrote it."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("cpu/*.py"), *folder.glob("tvm_*.py")]):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _digest(code: bytes) -> str:
    return hashlib.sha256(code).hexdigest()

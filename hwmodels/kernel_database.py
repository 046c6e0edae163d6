"""Measured kernel times by device, in one SQLite file that many processes may use and machines may exchange.

A time belongs to a device (its fingerprint and threads), to a version of the schedules that wrote the kernel, and to a
workload. Times of another device or version are never given out; `contents` says that they are there.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any

from .quiet import SLACK, Settled
from .workload import Workload

_FORMAT = 1
_WAIT_S = 30.0
# After a reference's name: what it took when the oldest times that count as quiet were judged by it.
_JUDGE = " of quiet times"
# Seconds since 1970 at the end of the year 9999, after which no date can be told.
_LATEST_S = 253402300800.0
_TABLES = (
    "CREATE TABLE IF NOT EXISTS about (format INTEGER NOT NULL)",
    "CREATE TABLE IF NOT EXISTS devices (device TEXT NOT NULL, schedules TEXT NOT NULL, title TEXT NOT NULL,"
    " PRIMARY KEY (device, schedules))",
    "CREATE TABLE IF NOT EXISTS refs (device TEXT NOT NULL, schedules TEXT NOT NULL, reference TEXT NOT NULL,"
    " reference_s REAL NOT NULL, PRIMARY KEY (device, schedules, reference))",
    "CREATE TABLE IF NOT EXISTS times (device TEXT NOT NULL, schedules TEXT NOT NULL, key TEXT NOT NULL,"
    " workload TEXT NOT NULL, median_s REAL NOT NULL, low_s REAL NOT NULL, high_s REAL NOT NULL,"
    " runs INTEGER NOT NULL, quiet INTEGER NOT NULL, measured REAL NOT NULL, PRIMARY KEY (device, schedules, key))",
    "CREATE TABLE IF NOT EXISTS networks (device TEXT NOT NULL, schedules TEXT NOT NULL, key TEXT NOT NULL,"
    " workloads TEXT NOT NULL, median_s REAL NOT NULL, low_s REAL NOT NULL, high_s REAL NOT NULL,"
    " runs INTEGER NOT NULL, quiet INTEGER NOT NULL, measured REAL NOT NULL, PRIMARY KEY (device, schedules, key))",
    "CREATE TABLE IF NOT EXISTS tiles (device TEXT NOT NULL, schedules TEXT NOT NULL, convolution TEXT NOT NULL,"
    " tile TEXT NOT NULL, measured REAL NOT NULL, PRIMARY KEY (device, schedules, convolution))",
)


class DatabaseError(ValueError):
    """A kernel database that cannot be read or written; the message says what to do."""


@dataclass(frozen=True)
class KernelTime:
    """A workload and how long its kernel takes alone."""

    workload: Workload
    time: Settled


@dataclass(frozen=True)
class NetworkTime:
    """The calls of a whole network, in order, and how long it takes."""

    workloads: tuple[Workload, ...]
    time: Settled

    def key(self) -> str:
        """See `network_key`."""
        return network_key(self.workloads)


def network_key(workloads: Sequence[Workload]) -> str:
    """Equal for networks of the same calls (16 hexadecimal digits)."""
    return hashlib.sha256(" ".join(work.key() for work in workloads).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Contents:
    """What a database holds of one device and version of the schedules; `newest` is seconds since 1970."""

    device: str
    schedules: str
    title: str
    kernels: int
    quiet: int
    networks: int
    newest: float


class KernelDatabase:
    """Kernel times of one device and one version of the schedules, beside whatever else the file holds."""

    def __init__(
        self, path: Path, device: str, schedules: str, title: str = "", clock: Callable[[], float] = time.time
    ) -> None:
        """Opens nothing yet; the file and its folder are made when something is added.

        Args:
            path: The SQLite file.
            device: Fingerprint of the device, threads included.
            schedules: Version of the schedules.
            title: What people call the device.
            clock: Seconds since 1970.
        """
        self.path, self.device, self.schedules, self.title = path, device, schedules, title
        self._clock = clock

    def times(self) -> dict[str, KernelTime]:
        """Every time of this device and version, by the workload's key; empty where there is no file."""
        if not self._there():
            return {}
        found = {}
        for key, text, *numbers in self._rows("times", "workload"):
            workload = _workload(_json(text, self.path), self.path)
            self._check(key, workload.key())
            found[workload.key()] = KernelTime(workload, self._settled(key, numbers))
        return found

    def networks(self) -> list[NetworkTime]:
        """Every measured network of this device and version."""
        if not self._there():
            return []
        found = []
        for key, text, *numbers in self._rows("networks", "workloads"):
            parts = _json(text, self.path)
            if not isinstance(parts, list):
                raise DatabaseError(f"{self.path} is damaged: network {key} is no list of workloads. {_REMEDY}")
            network = NetworkTime(tuple(_workload(w, self.path) for w in parts), self._settled(key, numbers))
            self._check(key, network.key())
            found.append(network)
        return found

    def _there(self) -> bool:
        # An empty one is being made by another process, or could not be written to: it holds nothing.
        with _told(self.path, "read"):
            return self.path.exists() and self.path.stat().st_size > 0

    def _rows(self, table: str, column: str) -> list[tuple[object, ...]]:
        query = (
            f"SELECT key, {column}, median_s, low_s, high_s, runs, quiet FROM {table}"
            " WHERE device = ? AND schedules = ? ORDER BY key"
        )
        with self._reading() as connection:
            return connection.execute(query, (self.device, self.schedules)).fetchall()

    def _check(self, key: object, own: str) -> None:
        if key != own:
            raise DatabaseError(f"{self.path} is damaged: what it holds as {key} has the key {own}. {_REMEDY}")

    def _settled(self, key: object, numbers: Sequence[Any]) -> Settled:
        try:
            median, low, high = (float(number) for number in numbers[:3])
            runs, quiet = int(numbers[3]), bool(numbers[4])
        except (TypeError, ValueError, OverflowError):
            raise DatabaseError(f"{self.path} is damaged: the times of {key} are no numbers. {_REMEDY}") from None
        if not 0 < low <= median <= high < inf:
            raise DatabaseError(f"{self.path} is damaged: {key} takes {low} to {high} s. {_REMEDY}")
        return Settled(median, low, high, runs, quiet)

    def reference_s(self, reference: str) -> float | None:
        """What the reference of that name took on a quiet machine; None where that is not known."""
        if not self._there():
            return None
        with self._reading() as connection:
            return self._reference(connection, reference)

    def _reference(self, connection: sqlite3.Connection, reference: str) -> float | None:
        query = "SELECT reference_s FROM refs WHERE device = ? AND schedules = ? AND reference = ?"
        row = connection.execute(query, (self.device, self.schedules, reference)).fetchone()
        if row is None:
            return None
        if not isinstance(row[0], float) or not 0 < row[0] < inf:
            raise DatabaseError(f"{self.path} is damaged: the reference {reference} takes {row[0]!r} s. {_REMEDY}")
        return row[0]

    def knows_device(self) -> bool:
        """Whether anything was ever added for this device and version, were it nothing."""
        if not self._there():
            return False
        query = "SELECT 1 FROM devices WHERE device = ? AND schedules = ?"
        with self._reading() as connection:
            return connection.execute(query, (self.device, self.schedules)).fetchone() is not None

    def add(self, times: Sequence[KernelTime | NetworkTime], references: Mapping[str, float]) -> int:
        """Adds kernels and networks in one transaction, and what references took on a quiet machine, by name.

        What was measured on a quiet machine is only replaced by what was, too; of a reference the fastest time counts.
        A reference that is by more than `quiet.SLACK` faster than the one by which earlier times of the same sort (of
        kernels, or of networks) count as quiet says that they are not: they are kept as ratios to it.

        Returns:
            How many earlier times count as quiet no more.

        Raises:
            DatabaseError: the file cannot be written.
        """
        kernels = [self._row(t.workload.key(), asdict(t.workload), t.time) for t in times if isinstance(t, KernelTime)]
        networks = [
            self._row(n.key(), [asdict(work) for work in n.workloads], n.time)
            for n in times
            if isinstance(n, NetworkTime)
        ]
        for name, seconds in references.items():
            # The fastest counts for ever: with a zero nothing would be quiet again.
            if not 0 < seconds < inf:
                raise ValueError(f"the reference {name} takes {seconds} s; it must be positive and finite")
        named = [(self.device, self.schedules, name, seconds) for name, seconds in references.items()]
        tables = [table for table, rows in (("times", kernels), ("networks", networks)) if rows]
        with self._writing() as connection:
            questioned = sum(self._question(connection, name, seconds, tables) for name, seconds in references.items())
            _put(connection, [(self.device, self.schedules, self.title)], named, kernels, networks)
        return questioned

    def _question(self, connection: sqlite3.Connection, name: str, seconds: float, tables: Sequence[str]) -> int:
        """Times of these tables are quiet no more where the reference that judged them was slower than it can be."""
        judge = f"{name}{_JUDGE}"
        # Files of an earlier version hold the fastest alone.
        judged_s = self._reference(connection, judge) or self._reference(connection, name) or seconds
        fell = seconds * (1 + SLACK) < judged_s
        connection.execute(
            "INSERT OR REPLACE INTO refs VALUES (?, ?, ?, ?)",
            (self.device, self.schedules, judge, seconds if fell else judged_s),
        )
        return sum(
            connection.execute(
                f"UPDATE {table} SET quiet = 0, median_s = median_s * ?, low_s = low_s * ?, high_s = high_s * ?"
                " WHERE device = ? AND schedules = ? AND quiet = 1",
                (*[seconds / judged_s] * 3, self.device, self.schedules),
            ).rowcount
            for table in (tables if fell else ())
        )

    def _row(self, key: str, value: object, time: Settled) -> tuple[object, ...]:
        numbers = (time.median_s, time.low_s, time.high_s, time.runs, int(time.quiet), self._clock())
        return (self.device, self.schedules, key, json.dumps(value), *numbers)

    def tiles(self) -> dict[str, str]:
        """How a convolution is computed fastest, by the convolution; empty where none was measured."""
        if not self._there():
            return {}
        with self._reading() as connection:
            rows = [row[2:4] for row in _tiles(connection) if row[:2] == (self.device, self.schedules)]
        return {self._text(convolution): self._text(tile) for convolution, tile in rows}

    def _text(self, value: object) -> str:
        if not isinstance(value, str):
            raise DatabaseError(f"{self.path} is damaged: {value!r} is no tile of a convolution. {_REMEDY}")
        return value

    def add_tiles(self, tiles: Mapping[str, str]) -> None:
        """Adds tiles by convolution; those that are there are replaced.

        Raises:
            DatabaseError: the file cannot be written.
        """
        rows = [(self.device, self.schedules, name, tile, self._clock()) for name, tile in tiles.items()]
        with self._writing() as connection:
            _put(connection, [(self.device, self.schedules, self.title)], [], [], [], rows)

    def export(self, path: Path) -> int:
        """Copies everything into a new database file; the number of kernel times in it.

        Raises:
            DatabaseError: the file exists, or one of the two cannot be read or written.
        """
        with _told(path, "written"):
            exists = path.exists()
        if exists:
            raise DatabaseError(f"{path} exists; name a new file, or import this database into it")
        return KernelDatabase(path, self.device, self.schedules).merge(self.path)

    def merge(self, other: Path) -> int:
        """Adds everything that another database file holds; the number of kernel times in that.

        What references took there is left: the same processor at a higher clock would make nothing here quiet again.

        Raises:
            DatabaseError: a file cannot be read or written.
        """
        with _told(other, "read"):
            there, empty = other.is_file(), other.is_file() and not other.stat().st_size
        if not there:
            raise DatabaseError(f"{other} is no file; name a kernel database")
        if empty:  # the first who wrote to it met a full disk
            with self._writing():
                return 0
        with KernelDatabase(other, "", "")._reading() as connection:
            connection.execute("BEGIN")  # all of one moment
            devices = connection.execute("SELECT device, schedules, title FROM devices").fetchall()
            rows = connection.execute(
                "SELECT device, schedules, key, workload, median_s, low_s, high_s, runs, quiet, measured FROM times"
            ).fetchall()
            networks = connection.execute(
                "SELECT device, schedules, key, workloads, median_s, low_s, high_s, runs, quiet, measured FROM networks"
            ).fetchall()
            tiles = _tiles(connection)
        # What is damaged is refused here, not found in this database later.
        for device, schedules in {tuple(row[:2]) for row in [*rows, *networks, *tiles]}:
            damaged = KernelDatabase(other, device, schedules)
            damaged.times()
            damaged.networks()
            damaged.tiles()
            damaged.contents()
        with self._writing() as connection:
            _put(connection, devices, [], rows, networks, tiles)
        return len(rows)

    def contents(self) -> list[Contents]:
        """What the file holds, by device and version, the newest first."""
        if not self._there():
            return []
        query = (
            "SELECT t.device, t.schedules, d.title, count(*), sum(t.quiet),"
            " (SELECT count(*) FROM networks n WHERE n.device = t.device AND n.schedules = t.schedules),"
            " max(t.measured) FROM times t JOIN devices d ON d.device = t.device AND d.schedules = t.schedules"
            " GROUP BY t.device, t.schedules ORDER BY 7 DESC"
        )
        with self._reading() as connection:
            rows = connection.execute(query).fetchall()
        for row in rows:
            when = isinstance(row[6], (int, float)) and 0 <= row[6] < _LATEST_S
            if not all(isinstance(text, str) for text in row[:3]) or not when:
                raise DatabaseError(f"{self.path} is damaged: it holds times of {row[:3]} from {row[6]!r} s. {_REMEDY}")
        return [Contents(*row) for row in rows]

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        # Not `mode=ro`: a file in WAL mode whose last writer was killed has to be recovered before it can be read.
        with _told(self.path, "read"), closing(sqlite3.connect(self.path, timeout=_WAIT_S)) as connection:
            row = connection.execute("SELECT format FROM about").fetchone()
            if row is None or row[0] != _FORMAT:
                have = row[0] if row else "none"
                raise DatabaseError(f"{self.path} has the format {have}; this version reads {_FORMAT}. {_REMEDY}")
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with _told(self.path, "written"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=_WAIT_S)) as connection:
                with connection:
                    connection.execute("BEGIN IMMEDIATE")
                    for table in _TABLES:
                        connection.execute(table)
                    if connection.execute("SELECT count(*) FROM about").fetchone()[0] == 0:
                        connection.execute("INSERT INTO about VALUES (?)", (_FORMAT,))
                with connection:
                    yield connection


_REMEDY = "Move the file away, or name another folder in PLANISH_CACHE; its times are then measured again"


def _put(
    connection: sqlite3.Connection,
    devices: Sequence[Sequence[object]],
    references: Sequence[Sequence[object]],
    times: Sequence[Sequence[object]],
    networks: Sequence[Sequence[object]],
    tiles: Sequence[Sequence[object]] = (),
) -> None:
    connection.executemany(
        "INSERT INTO devices VALUES (?, ?, ?) ON CONFLICT (device, schedules) DO UPDATE SET"
        " title = CASE WHEN excluded.title = '' THEN title ELSE excluded.title END",
        devices,
    )
    connection.executemany(
        "INSERT INTO refs VALUES (?, ?, ?, ?) ON CONFLICT (device, schedules, reference) DO UPDATE SET"
        " reference_s = min(reference_s, excluded.reference_s)",
        references,
    )
    for table, column, rows in (("times", "workload", times), ("networks", "workloads", networks)):
        connection.executemany(
            f"INSERT INTO {table} VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (device, schedules, key) DO UPDATE"
            f" SET {column} = excluded.{column}, median_s = excluded.median_s, low_s = excluded.low_s,"
            " high_s = excluded.high_s, runs = excluded.runs, quiet = excluded.quiet, measured = excluded.measured"
            " WHERE excluded.quiet > quiet OR (excluded.quiet = quiet AND excluded.measured >= measured)",
            rows,
        )
    connection.executemany(
        "INSERT INTO tiles VALUES (?, ?, ?, ?, ?) ON CONFLICT (device, schedules, convolution) DO UPDATE SET"
        " tile = excluded.tile, measured = excluded.measured WHERE excluded.measured >= measured",
        tiles,
    )


def _tiles(connection: sqlite3.Connection) -> list[tuple[object, ...]]:
    """Every row; none in a file that an earlier version wrote, which has no such table."""
    named = connection.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'tiles'").fetchone()
    if named is None:
        return []
    return connection.execute("SELECT device, schedules, convolution, tile, measured FROM tiles").fetchall()


def _json(text: object, path: Path) -> object:
    try:
        return json.loads(str(text))
    except (ValueError, RecursionError) as error:
        raise DatabaseError(f"{path} is damaged: a workload is no JSON ({error}). {_REMEDY}") from None


def _workload(fields: object, path: Path) -> Workload:
    try:
        if not isinstance(fields, dict):
            raise TypeError(f"a {type(fields).__name__}")
        shapes: Mapping[str, int] = {str(name): int(value) for name, value in fields["shapes"].items()}
        return Workload(
            str(fields["site"]), str(fields["op"]), shapes, int(fields["macs"]), int(fields["moved_bytes"]),
            int(fields["bits"]), int(fields["weight_bytes"]), int(fields["threads"]), str(fields["form"]),
            float(fields["cycles"]),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DatabaseError(f"{path} is damaged: a workload cannot be read ({error}). {_REMEDY}") from None


@contextmanager
def _told(path: Path, verb: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        remedy = "Another process holds it; try again" if "locked" in str(error) else _REMEDY
        raise DatabaseError(f"the kernel database {path} cannot be {verb}: {error}. {remedy}") from error
    # SQLite quotes what is damaged in its message, and the sqlite3 module decodes that strictly.
    except (sqlite3.Error, OSError, UnicodeDecodeError) as error:
        raise DatabaseError(f"the kernel database {path} cannot be {verb}: {error}. {_REMEDY}") from error

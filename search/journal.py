"""The journal of a run: append-only, one fsynced JSON line an event; everything else is derived from it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .atomic import sync_folder
from .errors import UserError, file_mistakes
from .json_text import parsed
from .trial import finite


@dataclass(frozen=True)
class Event:
    """A line of the journal: its number in the file (from 1) and its JSON object."""

    line: int
    data: Mapping[str, object]


class Journal:
    """Appends events to a journal; what `append` has returned from is on the disk."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        """Opens the journal, creating it where there is none, and cuts off the torn line of a killed writer.

        Raises:
            UserError: the file cannot be written, or a line before the last is corrupt.
        """
        self._path, self._clock = path, clock
        self._advice = f"what was recorded is kept; once there is room, carry on with: planish resume {path.parent}"
        with file_mistakes(str(path), self._advice):
            self._handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            sync_folder(path.parent)
        self._found, self._length, total = _scan(path)
        self._lines = self._found[-1].line if self._found else 0
        times = [event.data.get("time") for event in self._found[-1:]]
        self._latest = max((time for time in times if isinstance(time, (int, float))), default=0.0)
        if total > self._length:
            os.ftruncate(self._handle, self._length)

    def found(self) -> list[Event]:
        """The events that it had when it was opened; given once, so that they need not be kept."""
        found, self._found = self._found, []
        return found

    def append(self, *events: Mapping[str, object]) -> list[Event]:
        """Writes events, waits until they are on the disk, and returns them.

        Each gets its `time`: seconds since 1970, never less than the one before.

        Raises:
            UserError: the disk is full; nothing of the events is kept, everything before them is.
        """
        # A clock that is set back does not reorder what happened: phases count their items by time.
        now = self._latest = max(round(self._clock(), 3), self._latest)
        lines = [
            json.dumps(finite({**e, "time": now}), separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
            for e in events
        ]
        block = b"".join(line + b"\n" for line in lines)
        with file_mistakes(str(self._path), self._advice):
            try:
                written = 0
                while written < len(block):
                    written += os.write(self._handle, block[written:])
                os.fsync(self._handle)
            except OSError:
                self._cut()
                raise
        self._length += len(block)
        first, self._lines = self._lines + 1, self._lines + len(lines)
        # As a reader will find it: numbers as keys and tuples do not outlive the file.
        return [Event(first + place, json.loads(line)) for place, line in enumerate(lines)]

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _cut(self) -> None:
        # Half a line would join with the next event into a corrupt one. Where even cutting fails, the reader drops it.
        try:
            os.ftruncate(self._handle, self._length)
        except OSError:
            self.close()


def read_events(path: Path) -> list[Event]:
    """The events of a journal, in order; a torn last line is left out, and the file is not changed.

    Raises:
        UserError: a line before the last is not a JSON object (named by file and line).
    """
    return _scan(path)[0]


def _scan(path: Path) -> tuple[list[Event], int, int]:
    """The events, the length in bytes of the sound part, and the length of the file."""
    content = path.read_bytes()
    events: list[Event] = []
    sound = 0
    lines = content.split(b"\n")
    # What follows the last newline was never acknowledged, even if it happens to be a whole object.
    for number, line in enumerate(lines[:-1], start=1):
        data = _decode(line)
        if data is None and line.strip():
            if number == len(lines) - 1 and not lines[-1]:
                # A power cut can leave a last line of the right length that was never filled.
                break
            raise UserError(
                f"{path}:{number}: the line is not a JSON object; restore the file from a copy, or delete that line "
                "to go on without the event"
            )
        sound += len(line) + 1
        if data is not None:
            events.append(Event(number, data))
    return events, sound, len(content)


def _decode(line: bytes) -> Mapping[str, object] | None:
    try:
        data = parsed(line)
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None

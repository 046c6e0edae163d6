"""Progress of long work: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from typing import TextIO

_BAR_WIDTH = 24


class Progress:
    """Shows the phase, how far it is, the time left and the best so far. Without a stream it shows nothing."""

    def __init__(
        self,
        stream: TextIO | None,
        terminal: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
        every_s: float = 15.0,
    ) -> None:
        """Shows nothing yet.

        Args:
            stream: Where to, normally sys.stderr.
            terminal: Whether to redraw one line; None: whether the stream is a terminal.
            clock: Seconds, from any start.
            every_s: Between two lines where it is not a terminal.
        """
        self._stream, self._clock = stream, clock
        self._terminal = bool(stream and stream.isatty()) if terminal is None else terminal
        self._every_s = 0.1 if self._terminal else every_s
        self._phase, self._total, self._done = "", 0, 0
        self._best = ""
        self._begun_s = self._shown_s = 0.0
        self._begun_at = 0
        self._open = False

    def begin(self, phase: str, total: int, done: int = 0) -> None:
        """Starts a phase of `total` items, of which an earlier session has done `done`; ends the phase before."""
        self.close()
        self._phase, self._total, self._done, self._begun_at = phase, total, done, done
        self._begun_s = self._clock()
        self._show()

    def advance(self, count: int = 1) -> None:
        """Counts items of the phase as done."""
        self._done += count
        if self._done >= self._total or self._clock() - self._shown_s >= self._every_s:
            self._show()

    def best(self, text: str) -> None:
        """Names the best result so far, shown from now on."""
        self._best = text

    def note(self, text: str) -> None:
        """Shows a line that stays."""
        self._clear()
        self._write(text + "\n")
        if self._open and self._terminal:
            self._show()

    def close(self) -> None:
        """Ends the phase's line; a second call does nothing."""
        if self._open and self._terminal:
            self._show()
            self._write("\n")
        self._open = False

    def line(self) -> str:
        """What is shown: `search 12/96 [###-----] 3 min left, best 91.2 % at 0.43x`."""
        share = min(1.0, self._done / self._total) if self._total else 1.0
        filled = round(share * _BAR_WIDTH)
        bar = f" [{'#' * filled}{'-' * (_BAR_WIDTH - filled)}]" if self._terminal else ""
        left = self._left_s()
        parts = [f"{self._phase} {self._done}/{self._total}{bar}"]
        parts += [f"{duration(left)} left"] if left is not None and self._done < self._total else []
        parts += [f"best {self._best}"] if self._best else []
        return ", ".join(parts)

    def _left_s(self) -> float | None:
        """The time left at the phase's pace in this session; None before its first item."""
        done = self._done - self._begun_at
        return None if done <= 0 else (self._clock() - self._begun_s) / done * (self._total - self._done)

    def _show(self) -> None:
        self._shown_s, self._open = self._clock(), True
        if self._terminal:
            self._clear()
            self._write(self.line()[: shutil.get_terminal_size().columns - 1])
        else:
            self._write(self.line() + "\n")

    def _clear(self) -> None:
        if self._terminal and self._open:
            self._write("\r\x1b[2K")

    def _write(self, text: str) -> None:
        if self._stream is not None:
            self._stream.write(text)
            self._stream.flush()


def duration(seconds: float) -> str:
    """A time as a person reads it: `8 s`, `3 min`, `2 h 5 min`, `3 d 4 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"

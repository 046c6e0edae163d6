"""How much of this machine's processors others use: a time that was measured beside them says nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from types import TracebackType

# Others may use this much of a core beyond those that the measurement leaves free. Less than a third: so much more is
# theirs where two that never rest share two cores with a measurement of one thread, whose part they slow down.
_TOLERATED_CORES = 0.25


class BusyMachine(ValueError):
    """A machine whose processors others use while something is measured; the message says how much and what to do."""


class LoadWatch:
    """The cores that other processes keep busy while a block of code runs.

    What this process and its children use does not count, nor what the host of a virtual machine takes away, which
    nobody here can see or stop: for that there is the reference beside every sample (see `quiet`).
    """

    def __init__(self, cores: int | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.others = 0.0
        self._cores = cores or os.cpu_count() or 1
        self._clock = clock

    def __enter__(self) -> LoadWatch:
        self._start, self._busy, self._own = self._clock(), _busy_s(), _own_s()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        passed = max(self._clock() - self._start, 1e-9)
        self.others = max(0.0, (_busy_s() - self._busy) - (_own_s() - self._own)) / passed

    def refusal(self, threads: int) -> str | None:
        """Why nothing that uses so many threads can be measured beside the others; None where it can."""
        return refusal(self.others, threads, self._cores)


def refusal(others: float, threads: int, cores: int) -> str | None:
    """Why nothing can be measured on `threads` of `cores` cores while others keep so many of them busy, or None."""
    if others <= max(0, cores - threads) + _TOLERATED_CORES:
        return None
    return (
        f"other processes keep {others:.1f} of {cores} cores busy, and {threads} "
        f"{'is' if threads == 1 else 'are'} needed for measuring; stop them and try again"
    )


def wait_for_quiet(threads: int, wait_s: float = 20.0, look_s: float = 0.5) -> None:
    """Returns once others leave enough cores free.

    Raises:
        BusyMachine: they do not within so many seconds.
    """
    end = time.monotonic() + wait_s
    while True:
        with LoadWatch() as watch:
            time.sleep(look_s)
        reason = watch.refusal(threads)
        if reason is None:
            return
        if time.monotonic() > end:
            raise BusyMachine(reason)


def _busy_s() -> float:
    """Seconds that all cores together were busy since the machine's start."""
    import psutil

    times = psutil.cpu_times()
    return float(sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq")))


def _own_s() -> float:
    """Seconds that this process, its children that have ended, and those that run have used."""
    import psutil

    process = psutil.Process()
    times = process.cpu_times()
    total = times.user + times.system + times.children_user + times.children_system
    for child in process.children(recursive=True):
        try:
            own = child.cpu_times()
        except psutil.Error:
            continue
        total += own.user + own.system + own.children_user + own.children_system
    return float(total)

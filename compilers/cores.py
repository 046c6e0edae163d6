"""How many cores compiling may take in this process."""

from __future__ import annotations

import os

_limit: int | None = None


def limit_cores(count: int) -> None:
    """Lets compiling take at most so many cores from now on: 1 in a worker, beside which others compile.

    Raises:
        ValueError: the count is less than 1.
    """
    global _limit
    if count < 1:
        raise ValueError(f"compiling on {count} cores is impossible; the least is 1")
    _limit = count


def cores() -> int:
    """The cores that compiling may take: those that this process may run on, or the limit."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return allowed if _limit is None else min(allowed, _limit)

"""Memory that is freed stays with the process while a network is trained: the next step asks for as much again.

By default glibc returns large blocks to the kernel, which clears every page that comes back.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

# glibc's numbers, and its own upper limits of what it adjusts itself.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_USUAL_TRIM, _USUAL_MMAP = 64 << 20, 32 << 20
_KEPT = 2**31 - 1


@contextmanager
def kept_memory() -> Iterator[None]:
    """Keeps what is freed inside, returns it to the system at the end; nothing happens without glibc."""
    try:
        library = ctypes.CDLL(None)
        adjust, trim = library.mallopt, library.malloc_trim
    except (OSError, AttributeError, TypeError):
        yield
        return
    adjust(_TRIM_THRESHOLD, _KEPT)
    adjust(_MMAP_THRESHOLD, _KEPT)
    try:
        yield
    finally:
        adjust(_TRIM_THRESHOLD, _USUAL_TRIM)
        adjust(_MMAP_THRESHOLD, _USUAL_MMAP)
        trim(0)

"""What a process frees stays with it: large tensors come and go with every step of a training."""

from __future__ import annotations

import ctypes

# Parameters of glibc's mallopt (malloc.h).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_ALL = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tells malloc to use freed memory again rather than to give it back; whether it has (other C libraries do not).

    By default glibc maps every large tensor anew, and the kernel clears its pages, one fault each: a good part of a
    step of training. The process's peak stays what it was; what it frees, others get only once it has ended.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    values = {_MMAP_THRESHOLD: 2**30, _TRIM_THRESHOLD: _ALL, _TOP_PAD: 2**26}
    return all(mallopt(name, value) == 1 for name, value in values.items())

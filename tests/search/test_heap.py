"""Memory that stays with the process: blocks that are freed come back without new pages, and go in the end."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

import pytest
import torch

from planish.search.heap import kept_memory

glibc = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's allocator alone is adjusted"
)
COUNT, SIZE = 12, 16_000_000
PAGES = COUNT * SIZE / resource.getpagesize()


def _step() -> float:
    """Tensors as a step of training has them, all freed; the pages that the kernel handed out, of those they fill."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(SIZE // 4) for _ in range(COUNT)]
    del held
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / PAGES


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@glibc
def test_blocks_that_are_freed_are_used_again_and_go_back_at_the_end() -> None:
    before = _resident()
    with kept_memory():
        for _ in range(8):  # until the holes fit
            _step()
        assert sum(_step() for _ in range(5)) < 1
        assert _resident() > before + COUNT * SIZE / 2
    assert _resident() < before + COUNT * SIZE / 2


@glibc
def test_an_error_inside_passes_and_memory_goes_back() -> None:
    def fail() -> None:
        with kept_memory():
            _step()
            raise ValueError("inside")

    before = _resident()
    with pytest.raises(ValueError, match="inside"):
        fail()
    assert _resident() < before + COUNT * SIZE / 2


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: object) -> object:
        raise OSError("no library")

    monkeypatch.setattr(ctypes, "CDLL", none)
    with kept_memory():
        pass

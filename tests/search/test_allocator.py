"""What a process frees it uses again: the kernel clears no page for it a second time."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

STEPS = """
import resource
import torch
from planish.search.allocator import keep_freed_memory

def step():
    kept = [torch.ones(2_000_000) for _ in range(8)]

assert {kept} is False or keep_freed_memory()
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(kept: bool) -> int:
    """Page faults of a new process in ten steps, each with eight tensors of 8 MB that it drops at its end."""
    ended = subprocess.run(
        [sys.executable, "-c", STEPS.format(kept=kept)], capture_output=True, text=True, check=True, timeout=120
    )
    return int(ended.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc has the setting")
def test_a_tensor_that_comes_again_costs_no_page_faults() -> None:
    assert faults(kept=True) < 0.1 * faults(kept=False)

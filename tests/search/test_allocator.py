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
    kept = [torch.ones(10_000_000) for _ in range(2)]

assert {kept} is False or keep_freed_memory()
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(kept: bool) -> int:
    """Page faults of a new process in twenty steps, each with two tensors that it drops at its end.

    They are of 40 MB: whatever malloc has learned, what is larger than 32 MB is mapped anew where it is not told else.
    """
    ended = subprocess.run(
        [sys.executable, "-c", STEPS.format(kept=kept)], capture_output=True, text=True, check=True, timeout=120
    )
    return int(ended.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc has the setting")
def test_a_tensor_that_comes_again_costs_no_page_faults() -> None:
    # The heap may still grow in the first of them.
    assert faults(kept=True) < 0.25 * faults(kept=False)

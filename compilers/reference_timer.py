"""What the reference of whole networks takes on a quiet machine, told by the reference of kernels.

Which times of a kernel's reference are quiet is known from thousands of them, spread over minutes. The network that
networks are timed beside is not just the sum of its kernels: with more than one thread each reads what another core
wrote. So it is timed between two times of the kernel.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..hwmodels.device import Device
from ..hwmodels.measurement import MeasureProtocol
from ..hwmodels.quiet import SLACK
from .kernel_timer import KernelProtocol, time_kernels
from .remote import DeviceLost
from .runner import device_lock, run_child
from .tvm_workloads import KernelWork

_NAME = "reference"
# Times of the network between two quiet ones of the kernel that are enough, and how often that is tried.
_ENOUGH, _TRIES = 3, 8
_KERNEL = KernelProtocol(runs=6, rounds=1)
_NETWORK = MeasureProtocol(runs=8)


def quiet_network_s(network: Path, kernel: KernelWork, kernel_s: float, device: Device) -> tuple[float, bool] | None:
    """Seconds of an artifact on a quiet machine: the fastest twentieth of its runs while the kernel's were quiet.

    Where the machine never is, what the artifact took is scaled by how much slower the kernel was. A neighbour slows
    both down, but not by the same: that is a guess.

    Args:
        network: The artifact.
        kernel: Timed before and after it.
        kernel_s: What the kernel takes on a quiet machine.
        device: Must be here.

    Returns:
        The seconds, and whether they are more than a guess; None where the kernel does not run.

    Raises:
        RunError: the artifact does not run.
        DeviceLost: the device is behind RPC and does not answer.
    """
    quiet: list[float] = []
    scaled: list[float] = []
    before = _kernel_s(kernel, device)
    for _ in range(_TRIES):
        with device_lock(device):
            runs = run_child({_NAME: network}, device, _NETWORK).run_s[_NAME]
        after = _kernel_s(kernel, device)
        if before is None or after is None:
            return None
        if max(before, after) <= (1 + SLACK) * kernel_s:
            quiet += runs
        scaled.append(float(np.median(runs)) * 2 * kernel_s / (before + after))
        before = after
        if len(quiet) >= _ENOUGH * _NETWORK.runs:
            break
    return (float(np.quantile(quiet, 0.05)), True) if quiet else (float(np.median(scaled)), False)


def _kernel_s(kernel: KernelWork, device: Device) -> float | None:
    """The median of a process's runs; None where there are none."""
    timed = time_kernels({_NAME: kernel}, kernel, device, _KERNEL)
    if isinstance(timed.lost, DeviceLost):
        raise timed.lost
    return float(np.median(timed.samples[_NAME].run_s)) if _NAME in timed.samples else None

"""Where the times of kernels are kept: one database of the user's, for this version of the schedules."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from ..hwmodels.device import Device
from ..hwmodels.fingerprint import fingerprint
from ..hwmodels.kernel_database import KernelDatabase
from .cache_folder import cache_folder
from .kernel_store import schedules_version

_FILE = "kernel_times.sqlite"
# Counted up when times are taken otherwise: 2, networks in samples of 5 ms after 2 ms untimed; 3, kernels in samples of
# 1 ms after 1 ms untimed, not of 0.1 ms at once, in which weights of a megabyte were still on their way to the caches.
_TIMING = 3


def database_of(device: Device, path: Path | None = None) -> KernelDatabase:
    """The database of a device's kernel times: the user's, or the file that is named."""
    return KernelDatabase(path or cache_folder() / _FILE, fingerprint(device), times_version(), device.title)


def times_version() -> str:
    """What times must have in common to be used together: the code of schedules and compiler, and how it is timed."""
    return f"{schedules_version()[:14]}.{_TIMING}.tvm{version('apache-tvm')}"

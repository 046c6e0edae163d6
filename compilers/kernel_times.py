"""Where the times of kernels are kept: one database of the user's, for this version of the schedules."""

from __future__ import annotations

from pathlib import Path

from ..hwmodels.device import Device
from ..hwmodels.fingerprint import fingerprint
from ..hwmodels.kernel_database import KernelDatabase
from .cache_folder import cache_folder
from .kernel_store import schedules_version

_FILE = "kernel_times.sqlite"


def database_of(device: Device, path: Path | None = None) -> KernelDatabase:
    """The database of a device's kernel times: the user's, or the file that is named."""
    return KernelDatabase(path or cache_folder() / _FILE, fingerprint(device), schedules_version()[:16], device.title)

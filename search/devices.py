"""Every known device: usable here, or what is missing."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

from ..compilers.kernel_times import database_of, times_version
from ..compilers.registry import COMPILERS
from ..hwmodels.device import Device, described, host, parse_device
from ..hwmodels.fingerprint import fingerprint


def list_devices() -> list[dict[str, object]]:
    """This machine's CPU at every thread count worth naming, then the described devices."""
    return [_row(device) for device in [*_here(), *described().values()]]


def _here() -> list[Device]:
    cores = os.cpu_count() or 1
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= cores]
    return [host() if n == 1 else parse_device(f"cpu?threads={n}") for n in counts]


def table_of(path: Path | None = None) -> list[dict[str, object]]:
    """What the database of kernel times holds, by device and version of the schedules, the newest first.

    Args:
        path: The database; by default the user's.

    Raises:
        DatabaseError: it cannot be read.
    """
    counts = range(2, (os.cpu_count() or 1) + 1)
    ours = [host(), *(parse_device(f"cpu?threads={count}") for count in counts)]
    names = {fingerprint(device): device.name for device in ours}
    return [
        {
            "device": held.device,
            "title": held.title,
            "name": names.get(held.device, ""),
            "schedules": held.schedules,
            "current": held.schedules == times_version(),
            "kernels": held.kernels,
            "quiet": held.quiet,
            "networks": held.networks,
            "newest": datetime.fromtimestamp(held.newest, UTC).isoformat(timespec="seconds"),
        }
        for held in database_of(host(), path).contents()
    ]


def export_times(file: Path, path: Path | None = None) -> int:
    """Writes all kernel times to a new file; how many kernels."""
    return database_of(host(), path).export(file)


def import_times(file: Path, path: Path | None = None) -> int:
    """Adds the kernel times of a file to the database; how many kernels."""
    return database_of(host(), path).merge(file)


def _row(device: Device) -> dict[str, object]:
    lacking = next(compiler.missing(device) for compiler in COMPILERS if compiler.name == "tvm")
    return {
        "name": device.name,
        "kind": device.kind,
        "usable": lacking is None,
        "timed": lacking is None and device.timed,
        "missing": lacking or "",
        "title": device.title,
        "threads": device.threads,
        "lanes": device.lanes,
        "features": list(device.features),
        "macs_per_s": {str(bits): rate for bits, rate in device.macs_per_s.items()},
        "bytes_per_s": device.bytes_per_s,
        "source": device.source,
    }
